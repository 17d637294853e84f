"""A backup holds what the node holds, is restored on either engine, and is refused where it is not whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgresql import PostgresServer
from small_node import SmallNode, make_node
from sqlalchemy import MetaData, select

from service.backup import BackupError, back_up, restore
from service.records.database import Records
from service.records.events import record_event
from service.records.governance_tables import Purge, SiteCase
from service.records.jobs import claim_job, succeed_job
from service.records.migrate import downgrade, upgrade
from service.records.supersession import enqueue_newest
from service.records.tables import Event, Job, JobOrigin, JobState, ResultKind
from service.records.work import NewInput, NewJob, NewResult, Outcome
from service.settings import Settings


def rows_of(url: str) -> dict[str, list[Any]]:
    records = Records(url)
    metadata = MetaData()
    with records.engine.connect() as connection:
        metadata.reflect(connection)
        found = {
            name: [
                tuple(map(str, row)) for row in connection.execute(select(t).order_by(*t.primary_key.columns))
            ]
            for name, t in metadata.tables.items()
        }
    records.close()
    return found


@pytest.fixture
def node(tmp_path: Path, empty_url: str) -> Iterator[SmallNode]:
    """A node with a series, a result, and a job that supersedes an older one with a larger identifier."""
    made = make_node(tmp_path / "node", database_url=empty_url)
    made.add_model(tmp_path / "bundle")
    made.receive_phantom(tmp_path / "series")
    result_path = made.spool.results_dir / "a" / "1" / "s.dcm"
    made.spool.make_folder(result_path.parent)
    result_path.write_bytes(b"result")
    with made.records.write() as session:
        now = made.records.now()
        for key in ("one", "two"):
            new = NewJob(
                JobOrigin.DICOM,
                "threshold",
                key,
                [NewInput("uploads/gone")],
                study_instance_uid="1.2",
                route_name="r",
            )
            enqueue_newest(session, new, at=now, one_per_study=True)
        job = claim_job(session, owner="w", lease_s=60, now=now)
        assert job is not None
        result = NewResult(
            ResultKind.SEGMENTATION, made.spool.relative(result_path), 6, "0" * 64, "1.2", "1.3"
        )
        succeed_job(session, job.job_id, job.attempt, Outcome([result], "r", "float32"), now=now)
        record_event(session, "test.event", actor="somebody", at=now, detail={"text": "Größe"})
    yield made
    made.records.close()


@pytest.mark.both_engines
def test_what_is_restored_is_what_was_backed_up(
    node: SmallNode, tmp_path: Path, postgresql: PostgresServer
) -> None:
    done = back_up(node.settings, tmp_path / "backup")
    assert done.missing == ("uploads/gone",)
    other = postgresql.new_database() if node.records.is_sqlite else f"sqlite:///{tmp_path / 'o.sqlite'}"
    settings = Settings(data_dir=tmp_path / "other", database_url=other)
    assert restore(settings, tmp_path / "backup") == done
    assert rows_of(other) == rows_of(node.settings.records_url)
    for folder in ("spool", "models"):
        before = {
            p.relative_to(node.settings.data_dir): p.read_bytes()
            for p in (node.settings.data_dir / folder).rglob("*")
            if p.is_file()
        }
        after = {
            p.relative_to(settings.data_dir): p.read_bytes()
            for p in (settings.data_dir / folder).rglob("*")
            if p.is_file()
        }
        assert before == after
        assert before
    records = Records(other)
    with records.write() as session:  # numbers go on behind those that were restored
        record_event(session, "after.restore", actor="somebody", at=records.now())
    with records.read() as session:
        assert session.scalars(select(Event.kind).order_by(Event.event_id.desc())).first() == "after.restore"
    records.close()


def test_the_approved_labelmap_of_a_golden_case_is_in_it(node: SmallNode, tmp_path: Path) -> None:
    approved = node.spool.root / "cases" / "a.nii.gz"
    node.spool.make_folder(approved.parent)
    approved.write_bytes(b"approved")
    with node.records.write() as session:
        job = session.scalars(select(Job).where(Job.state == JobState.SUCCEEDED)).one()
        case = SiteCase(
            job_id=job.job_id,
            model_name=job.model_name,
            path=node.spool.relative(approved),
            sha256="0" * 64,
            source="as_produced",
            labels=[],
            approved_by="somebody",
            created_at=node.records.now(),
        )
        session.add(case)
    back_up(node.settings, tmp_path / "backup")
    settings = Settings(data_dir=tmp_path / "other")
    restore(settings, tmp_path / "backup")
    assert (settings.spool_dir / "cases" / "a.nii.gz").read_bytes() == b"approved"


def test_what_the_retention_has_purged_is_not_missed(node: SmallNode, tmp_path: Path) -> None:
    with node.records.write() as session:
        job = session.scalars(select(Job).where(Job.state == JobState.SUCCEEDED)).one()
        (result,) = job.results
        node.spool.absolute(result.path).unlink()
    assert result.path in back_up(node.settings, tmp_path / "before").missing
    with node.records.write() as session:
        session.add(Purge(job_id=job.job_id, purged_at=node.records.now()))
    assert result.path not in back_up(node.settings, tmp_path / "after").missing


def test_a_backup_of_an_older_release_is_upgraded(node: SmallNode, tmp_path: Path) -> None:
    node.records.close()
    downgrade(node.settings.records_url, "0002")
    before = rows_of(node.settings.records_url)["instance"]
    assert back_up(node.settings, tmp_path / "backup").revision == "0002"
    settings = Settings(data_dir=tmp_path / "other")
    restore(settings, tmp_path / "backup")
    upgrade(node.settings.records_url)
    assert [row[0] for row in rows_of(settings.records_url)["instance"]] == [row[0] for row in before]


@pytest.mark.parametrize("fault", ["changed", "removed", "added"])
def test_a_backup_that_is_not_whole_is_refused(node: SmallNode, tmp_path: Path, fault: str) -> None:
    back_up(node.settings, tmp_path / "backup")
    victim = tmp_path / "backup" / "records" / "job.jsonl"
    if fault == "changed":
        victim.write_text(victim.read_text().replace("succeeded", "failed"))
    elif fault == "removed":
        victim.unlink()
    else:
        (tmp_path / "backup" / "spool" / "foreign").write_text("x")
    settings = Settings(data_dir=tmp_path / "other")
    with pytest.raises(BackupError, match="1 file"):
        restore(settings, tmp_path / "backup")
    assert not settings.data_dir.exists()


def test_nothing_is_overwritten(node: SmallNode, tmp_path: Path) -> None:
    back_up(node.settings, tmp_path / "backup")
    with pytest.raises(BackupError, match="not empty"):
        back_up(node.settings, tmp_path / "backup")
    with pytest.raises(BackupError, match="holds files already"):
        restore(node.settings, tmp_path / "backup")
    elsewhere = Settings(data_dir=tmp_path / "other", database_url=node.settings.records_url)
    with pytest.raises(BackupError, match="holds records already"):
        restore(elsewhere, tmp_path / "backup")
