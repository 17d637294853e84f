"""A result that replaces another says so, in every object and in the records, and says what had left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from findings import dciodvfy_errors, make_finding, phantom_source, rendered
from phantom import write_classic_series
from pydicom import dcmread
from small_node import AFFINE, SmallNode, image_array, make_node
from sqlalchemy import select

from service.api.schemas import segmentation
from service.completeness import Completeness
from service.dicom.predecessors import Predecessor, stated_predecessors
from service.errors import ProofError
from service.profiles import Profile
from service.records.database import utc_now
from service.records.supersession import supersede
from service.records.tables import Delivery, DeliveryState, Event, Job, Result, ResultKind

SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.22"


def older(sop_class_uid: str, number: int, profile: str | None = None) -> Predecessor:
    return Predecessor(
        sop_class_uid=sop_class_uid,
        sop_instance_uid=f"2.25.90{number}",
        series_instance_uid=f"2.25.80{number}",
        study_instance_uid="2.25.101",
        profile=profile,
    )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SmallNode]:
    made = make_node(tmp_path / "node")
    made.add_model(tmp_path / "model")
    yield made
    made.records.close()


def test_a_late_slice_gives_objects_that_name_what_they_replace(node: SmallNode, tmp_path: Path) -> None:
    array = image_array()
    paths = write_classic_series(tmp_path / "series", array, AFFINE)
    worker = node.worker()

    def run(given: list[Path]) -> Job:
        node.receive(given)
        assert Completeness(node.settings, node.records, node.spool).sweep(utc_now()) == 1
        assert worker.run_one(threading.Event())
        return max(node.jobs(), key=lambda job: job.created_at)

    first = run(paths[:-1])
    with node.records.write() as session:
        delivered = session.scalars(
            select(Delivery).join(Result).where(Result.kind == ResultKind.SEGMENTATION)
        ).one()
        delivered.state = DeliveryState.SENT
        delivered_id = delivered.delivery_id
    second = run(paths[-1:])
    worker.runner.close()
    assert second.supersedes_job_id == first.job_id

    with node.records.read() as session:
        results = {
            (result.job_id, result.kind): (result.sop_instance_uid, node.spool.absolute(result.path))
            for result in session.scalars(select(Result))
        }
        states = {(d.job_id, d.result.kind): d.state for d in session.scalars(select(Delivery))}
        (alert,) = session.scalars(select(Event).where(Event.kind == "result.superseded"))
        documents = {job.job_id: segmentation(job) for job in session.scalars(select(Job))}
    for kind in (ResultKind.SEGMENTATION, ResultKind.REPORT):
        old_uid, old_path = results[first.job_id, kind]
        new = dcmread(results[second.job_id, kind][1])
        old = dcmread(old_path)
        assert stated_predecessors(new) == [
            (old.StudyInstanceUID, old.SeriesInstanceUID, old.SOPClassUID, old_uid)
        ]
        assert "PredecessorDocumentsSequence" not in old
    assert states[first.job_id, ResultKind.SEGMENTATION] is DeliveryState.SENT
    assert states[first.job_id, ResultKind.REPORT] is DeliveryState.CANCELLED
    assert alert.alert
    assert alert.detail["supersedes"] == [first.job_id]
    assert alert.detail["delivered"] == [
        {
            "delivery_id": delivered_id,
            "destination": "PACS",
            "state": "sent",
            "sop_instance_uid": results[first.job_id, ResultKind.SEGMENTATION][0],
        }
    ]
    assert documents[first.job_id].superseded_by_job_id == second.job_id
    assert documents[second.job_id].superseded_by_job_id is None


def test_nothing_that_had_left_is_no_alert(node: SmallNode, tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path / "series", image_array(), AFFINE)
    node.receive(paths[:-1])
    completeness = Completeness(node.settings, node.records, node.spool)
    completeness.sweep(utc_now())
    node.receive(paths[-1:])
    completeness.sweep(utc_now() + timedelta(seconds=5))
    newer = max(node.jobs(), key=lambda job: job.created_at)
    with node.records.write() as session:
        assert supersede(session, newer.job_id, now=utc_now()) == 0
        assert not session.scalars(select(Event).where(Event.alert)).all()


def test_each_destination_is_told_of_what_it_has_got_alone(tmp_path: Path) -> None:
    binary, labelmap = Profile(), Profile(segmentation="labelmap")
    finding = make_finding(
        phantom_source(tmp_path / "source"),
        predecessors=(
            older(SEG, 1, binary.key),
            older(SR, 2, binary.key),
            older(SR, 3, labelmap.key),
            older(SR, 4),
        ),
    )
    files = {file.kind: tmp_path / "b" / file.name for file in rendered(finding, tmp_path / "b")}
    assert [each[-1] for each in stated_predecessors(dcmread(files["segmentation"]))] == ["2.25.901"]
    assert [each[-1] for each in stated_predecessors(dcmread(files["report"]))] == ["2.25.902", "2.25.904"]
    assert dciodvfy_errors(files["segmentation"], "Segmentation") == []
    assert dciodvfy_errors(files["report"], "EnhancedSR") == []
    files = {
        file.kind: tmp_path / "l" / file.name
        for file in rendered(finding, tmp_path / "l", segmentation="labelmap")
    }
    assert stated_predecessors(dcmread(files["segmentation"])) == []
    assert [each[-1] for each in stated_predecessors(dcmread(files["report"]))] == ["2.25.903", "2.25.904"]


@pytest.mark.parametrize("kind", ["segmentation", "report"])
def test_an_object_that_does_not_say_what_it_replaces_is_not_sent(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = make_finding(
        phantom_source(tmp_path / "source"),
        predecessors=(older(SEG if kind == "segmentation" else SR, 1),),
    )
    monkeypatch.setattr("service.rendering.set_predecessors", lambda *_: None)
    with pytest.raises(ProofError, match="does not name the objects that it replaces"):
        rendered(finding, tmp_path / "out")
