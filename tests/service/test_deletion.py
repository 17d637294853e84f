"""Deletion on request: rows and files both, nothing of another study, and never under someone's hands."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from api_harness import STUDY, ApiHarness, nifti
from sqlalchemy import func, select

from service.deletion import delete_job, delete_study
from service.errors import ConflictError, NotFoundError
from service.records.deliveries import claim_delivery
from service.records.instances import complete_series
from service.records.tables import Base, Delivery, Event, Instance, Job, Series

pytestmark = pytest.mark.both_engines

OTHER = "1.2.826.0.1.3680043.8.498.2"


@pytest.fixture
def study(api: ApiHarness) -> str:
    """A study with a result on its way, beside another one; the job's identifier."""
    instances = [api.receive_instance(str(i)) for i in range(3)]
    other = api.receive_instance(study=OTHER)
    _complete(api)
    job_id = api.enqueue(instances=instances, destinations=["pacs"])
    api.succeed(job_id)
    api.enqueue(instances=[other], study=OTHER)
    return job_id


def _complete(api: ApiHarness) -> None:
    with api.records.write() as session:
        for series in session.scalars(select(Series)):
            assert complete_series(
                session, series.series_id, last_instance_at=series.last_instance_at, at=api.now
            )


def _rows(api: ApiHarness) -> dict[str, int]:
    with api.records.read() as session:
        return {
            name: session.scalar(select(func.count()).select_from(table)) or 0
            for name, table in Base.metadata.tables.items()
            if name not in ("api_key", "event")
        }


def test_a_study_goes_with_its_rows_and_files_and_the_others_stay(api: ApiHarness, study: str) -> None:
    deleted = delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now)
    assert (deleted.instances, deleted.jobs, deleted.files) == (3, 1, 6)
    assert deleted.size_bytes == 3 * 8 + sum(
        map(len, (b"segmentation", b'{"ml": 1}', f"labelmap of {study}"))
    )
    expected = {"instance": 1, "series": 1, "job": 1, "job_input": 1, "result": 0, "delivery": 0}
    assert _rows(api).items() >= expected.items()
    (left,) = api.spool_files()
    with api.records.read() as session:
        assert session.scalar(select(Instance.path)) == left
        event = session.scalars(select(Event).where(Event.kind == "study.deleted")).one()
        assert (event.subject, event.actor, event.detail["files"]) == (STUDY, "admin", 6)
    with pytest.raises(NotFoundError):
        delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now)


def test_a_study_that_is_still_being_received_stays(api: ApiHarness) -> None:
    api.receive_instance()
    before = (_rows(api), api.spool_files())
    with pytest.raises(ConflictError, match="1 of the study's 1 series are still being received"):
        delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now)
    assert (_rows(api), api.spool_files()) == before


def test_nothing_is_deleted_while_a_job_runs(api: ApiHarness) -> None:
    instance = api.receive_instance()
    _complete(api)
    job_id = api.enqueue(instances=[instance])
    api.claim(job_id)
    before = (_rows(api), api.spool_files())
    with pytest.raises(ConflictError, match="is running"):
        delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now)
    with pytest.raises(ConflictError, match="is running"):
        delete_job(api.records, api.spool, job_id, actor="admin", now=api.now)
    assert (_rows(api), api.spool_files()) == before


def test_nothing_is_deleted_while_a_result_is_being_sent(api: ApiHarness, study: str) -> None:
    with api.records.write() as session:
        assert claim_delivery(session, owner="w", lease_s=60, now=api.now) is not None
    with pytest.raises(ConflictError, match="is being sent"):
        delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now)
    # whoever was sending it has died
    later = api.now + timedelta(seconds=61)
    assert delete_study(api.records, api.spool, STUDY, actor="admin", now=later).jobs == 1
    with api.records.read() as session:
        assert session.scalars(select(Delivery)).all() == []


def test_a_jobs_deletion_leaves_what_was_received(api: ApiHarness, study: str) -> None:
    newer = api.enqueue(instances=[])
    with api.records.write() as session:
        session.get_one(Job, newer).supersedes_job_id = study
    assert delete_job(api.records, api.spool, study, actor="admin", now=api.now).files == 3
    with api.records.read() as session:
        assert session.get(Job, study) is None
        assert session.get_one(Job, newer).supersedes_job_id is None
        assert session.scalar(select(func.count()).select_from(Instance)) == 4
    assert not (api.spool.results_dir / study).exists()
    with pytest.raises(NotFoundError):
        delete_job(api.records, api.spool, study, actor="admin", now=api.now)


def test_an_uploads_files_and_folder_go_with_its_job(api: ApiHarness) -> None:
    api.install()
    job_id = api.upload(nifti(api.folder)).json()["job_id"]
    assert len(list(api.spool.uploads_dir.iterdir())) == 1
    assert delete_job(api.records, api.spool, job_id, actor="admin", now=api.now).files == 1
    assert list(api.spool.uploads_dir.iterdir()) == []
    assert api.upload(nifti(api.folder)).json()["job_id"] != job_id


def test_an_interrupted_deletion_is_finished_by_asking_again(
    api: ApiHarness, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(api)
    unlink, calls = os.unlink, 0

    def failing(path: Path, **_options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise PermissionError(13, "no")
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        with pytest.raises(PermissionError):
            delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now)
    assert _rows(api) == rows  # every file that is left still has its row
    assert delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now).files == 3
    assert len(api.spool_files()) == 1


@pytest.mark.usefixtures("study")
def test_a_path_in_the_records_that_leads_out_deletes_nothing(api: ApiHarness, tmp_path: Path) -> None:
    before = api.spool_files()
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    with api.records.write() as session:
        instance = session.scalars(select(Instance).where(Instance.study_instance_uid == STUDY)).first()
        assert instance is not None
        instance.path = f"results/../../../{precious.name}"
    with pytest.raises(NotFoundError, match="leads out"):
        delete_study(api.records, api.spool, STUDY, actor="admin", now=api.now)
    assert precious.exists()
    assert api.spool_files() == before
