"""A refusal as an object: exactly one, for the right patient, where the route asks for it, or none at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from findings import CREATED_AT, dciodvfy_errors
from phantom import chiral_image, oblique_affine, write_classic_series
from pydicom import Dataset, dcmread
from small_node import AFFINE, SmallNode, image_array, make_node
from sqlalchemy import select
from storage_scp import StorageScp
from waiting import wait_until

from models.errors import ReasonCode, Refusal
from service import refusals as refusals_module
from service.completeness import Completeness
from service.dicom.derived import Making, write_object
from service.dicom.refusal import RefusedImages, build_refusal, headline
from service.dicom.report_proof import prove_refusal
from service.errors import ProofError
from service.records.database import utc_now
from service.records.jobs import (
    bind_model,
    cancel_jobs_of_instance,
    claim_job,
    refuse_job,
    retry_job,
    succeed_job,
)
from service.records.refusals import cancel_refusal_deliveries
from service.records.tables import (
    Delivery,
    DeliveryState,
    Event,
    JobInput,
    JobState,
    RefusalObject,
    Result,
    ResultKind,
)
from service.records.work import NewResult, Outcome
from service.refusals import RefusalObjects

REPORT = "1.2.840.10008.5.1.4.1.1.88.22"
MAKING = Making("2.25.501", "2.25.502", CREATED_AT)
REASON = "The slices are sheared by 18.5 degrees: the gantry was tilted."
WORDS = {"code": "GANTRY_TILT", "reason": REASON, "remedy": "Reconstruct the series without tilt."}
TILT = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return write_classic_series(tmp_path / "series", chiral_image(), oblique_affine())


# --- the object ---------------------------------------------------------------------------------------


def written(folder: Path, images: list[Path]) -> Path:
    return write_object(build_refusal(RefusedImages(images), MAKING, **WORDS), folder / "refusal.dcm")


def prove(path: Path, images: list[Path]) -> None:
    uids = [dcmread(image).SOPInstanceUID for image in images]
    identity = RefusedImages(images).identity
    prove_refusal(path, identity, uids, code="GANTRY_TILT", reason=REASON)


def test_it_says_why_and_of_which_images(tmp_path: Path, images: list[Path]) -> None:
    path = written(tmp_path, images)
    prove(path, images)
    dataset = dcmread(path)
    assert dataset.SeriesDescription == "Not segmented: the slices are sheared by 18.5 degrees: the..."
    assert (dataset.PatientID, dataset.PatientName) == ("PHANTOM-1", "Phantom^Test")
    assert (dataset.StudyInstanceUID, dataset.SOPInstanceUID) == ("2.25.101", "2.25.501")
    assert (dataset.VerificationFlag, dataset.ContentDate) == ("UNVERIFIED", "20260304")
    texts = [item.TextValue for item in dataset.ContentSequence if item.ValueType == "TEXT"]
    assert f"Not segmented (GANTRY_TILT): {REASON}" in texts
    assert WORDS["remedy"] in texts
    series = dataset.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert [s.SeriesInstanceUID for s in series] == ["2.25.102"]
    assert isinstance(highdicom.sr.srread(path), highdicom.sr.EnhancedSR)
    assert dciodvfy_errors(path, "EnhancedSR") == []


def test_two_builds_are_byte_identical(tmp_path: Path, images: list[Path]) -> None:
    first = written(tmp_path, images).read_bytes()
    assert written(tmp_path, images).read_bytes() == first


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("Gantry tilt 18.5 degrees.", "Not segmented: gantry tilt 18.5 degrees"),
        ("MR is not taken.", "Not segmented: MR is not taken"),
        ("A" + " word" * 30, "Not segmented: a word word word word word word word word word..."),
    ],
)
def test_the_headline_fits_a_series_description(reason: str, expected: str) -> None:
    assert headline(reason) == expected
    assert len(expected) <= 64


def test_a_damaged_image_is_passed_over(tmp_path: Path, images: list[Path]) -> None:
    images[3].write_bytes(images[3].read_bytes()[:200])
    refused = RefusedImages(images)
    assert len(refused.references) == len(images) - 1
    for image in images:
        image.write_bytes(b"rubbish")
    with pytest.raises(Refusal) as caught:
        RefusedImages(images)
    assert caught.value.reason is ReasonCode.UNREADABLE


def test_an_identity_that_is_missing_or_in_conflict_makes_none(tmp_path: Path, images: list[Path]) -> None:
    def edit(path: Path, patient_id: str) -> None:
        dataset = dcmread(path)
        dataset.PatientID = patient_id
        dataset.save_as(path)

    edit(images[2], "ANOTHER")
    with pytest.raises(Refusal) as caught:
        RefusedImages(images)
    assert caught.value.reason is ReasonCode.IDENTITY_CONFLICT
    for image in images:
        edit(image, "")
    with pytest.raises(Refusal) as caught:
        RefusedImages(images)
    assert caught.value.reason is ReasonCode.IDENTITY_MISSING


FAULTS: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "the reason": (
        lambda d: setattr(d.ContentSequence[-2], "TextValue", "Fine."),
        "does not give the reason",
    ),
    "the patient": (lambda d: setattr(d, "PatientID", "SOMEBODY"), "its PatientID is not"),
    "the study": (lambda d: setattr(d, "StudyInstanceUID", "2.25.666"), "its StudyInstanceUID is not"),
    "the description": (lambda d: setattr(d, "SeriesDescription", "Liver"), "does not say what it is"),
    "verified": (lambda d: setattr(d, "VerificationFlag", "VERIFIED"), "unverified"),
    "no images": (lambda d: delattr(d, "CurrentRequestedProcedureEvidenceSequence"), "every image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(tmp_path: Path, images: list[Path], fault: str) -> None:
    path = written(tmp_path, images)
    change, words = FAULTS[fault]
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)
    with pytest.raises(ProofError, match=words):
        prove(path, images)


# --- a node -------------------------------------------------------------------------------------------


@pytest.fixture
def pacs() -> Iterator[StorageScp]:
    with StorageScp() as scp:
        yield scp


@pytest.fixture
def make(tmp_path: Path, pacs: StorageScp) -> Iterator[Callable[..., SmallNode]]:
    """A node whose route asks for refusal objects unless told otherwise, with a model."""
    made: list[SmallNode] = []

    def make(**route: Any) -> SmallNode:
        routes = [
            {
                "name": "mr",
                "model": "threshold",
                "match": {"Modality": "MR"},
                "quiet_time_s": 1.0,
                "destinations": ["PACS"],
                "refusal_objects": True,
                **route,
            }
        ]
        destination = {"name": "PACS", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port}
        node = make_node(tmp_path / "node", destinations=[destination], routes=routes)
        node.add_model(tmp_path / "bundle")
        made.append(node)
        return node

    yield make
    for node in made:
        node.records.close()


def tilted(folder: Path, **attributes: Any) -> list[Path]:
    return write_classic_series(folder, image_array(), TILT, **attributes)


def deliveries(node: SmallNode) -> list[Delivery]:
    with node.records.read() as session:
        return list(session.scalars(select(Delivery)))


def events(node: SmallNode, kind: str) -> list[Event]:
    with node.records.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == kind)))


def test_a_refused_study_gives_exactly_one_object(
    tmp_path: Path, make: Callable[..., SmallNode], pacs: StorageScp
) -> None:
    node = make()
    paths = tilted(tmp_path / "s")
    node.receive(paths)
    with node.working():
        node.wait_for_jobs(JobState.REFUSED)
        wait_until(lambda: [d.state for d in deliveries(node)] == [DeliveryState.SENT], 60)
        node.receive(paths)  # the PACS sends it once more
        node.receive([node.spool.absolute(r.path) for r in results(node)])  # and what it was sent
        wait_until(lambda: len(sweep_now(node)) == 1)
    (job,) = node.jobs()
    assert job.reason_code == "GANTRY_TILT"
    assert job.refusal_object is RefusalObject.MADE
    (sent,) = pacs.objects
    assert sent.sop_class_uid == REPORT
    (result,) = results(node)
    stored = node.spool.absolute(result.path)
    assert sent.data_set in stored.read_bytes()
    dataset = dcmread(stored)
    assert dataset.PatientID == "PHANTOM-1"
    assert any(job.reason in item.TextValue for item in dataset.ContentSequence if "TextValue" in item)
    assert [e.subject for e in events(node, "refusal.object_made")] == [job.job_id]


def results(node: SmallNode) -> list[Result]:
    with node.records.read() as session:
        return list(session.scalars(select(Result)))


def sweep_now(node: SmallNode) -> list[Delivery]:
    """Every delivery, after everything that could make one had its turn."""
    Completeness(node.settings, node.records, node.spool).sweep(utc_now() + timedelta(hours=1))
    objects_of(node).sweep(utc_now())
    return deliveries(node)


def objects_of(node: SmallNode) -> RefusalObjects:
    return RefusalObjects(node.records, node.spool, node.settings.profile_keys)


def test_without_being_asked_for_nothing_leaves(
    tmp_path: Path, make: Callable[..., SmallNode], pacs: StorageScp
) -> None:
    node = make(refusal_objects=False)
    node.receive(tilted(tmp_path / "s"))
    with node.working():
        (job,) = node.wait_for_jobs(JobState.REFUSED)
    assert sweep_now(node) == results(node) == pacs.objects == []
    assert job.refusal_object is RefusalObject.NONE


def test_a_refusal_before_the_job_runs_gives_one_too(
    tmp_path: Path, make: Callable[..., SmallNode], pacs: StorageScp
) -> None:
    node = make(maximum_study_age_days=1.0)
    node.receive(write_classic_series(tmp_path / "s", image_array(), AFFINE))
    with node.working():
        (job,) = node.wait_for_jobs(JobState.REFUSED)
        wait_until(lambda: len(pacs.objects) == 1, 60)
    assert (
        job.reason_code in dcmread(node.spool.absolute(results(node)[0].path)).ContentSequence[-2].TextValue
    )


@pytest.mark.parametrize("conflict", [False, True])
def test_without_a_whole_identity_nothing_leaves(
    tmp_path: Path, make: Callable[..., SmallNode], pacs: StorageScp, conflict: bool
) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.PatientID = ("PHANTOM-2" if z == 3 else "PHANTOM-1") if conflict else ""

    node = make()
    node.receive(tilted(tmp_path / "s", edit=edit))
    with node.working():
        (job,) = node.wait_for_jobs(JobState.REFUSED)
        wait_until(lambda: node.jobs()[0].refusal_object is RefusalObject.WITHHELD, 60)
    assert job.reason_code == ("IDENTITY_CONFLICT" if conflict else "IDENTITY_MISSING")
    assert results(node) == deliveries(node) == pacs.objects == []
    (event,) = events(node, "refusal.object_withheld")
    assert event.alert
    assert "PHANTOM" not in str(event.detail)


def refused(node: SmallNode, folder: Path, *, reason: str = REASON) -> str:
    """A refused job whose object is still to be made."""
    node.receive(tilted(folder))
    Completeness(node.settings, node.records, node.spool).sweep(utc_now())
    return refuse_again(node, reason)


def refuse_again(node: SmallNode, reason: str) -> str:
    with node.records.write() as session:
        job = claim_job(session, owner="w", lease_s=60, now=utc_now())
        assert job is not None
        refuse_job(
            session, job.job_id, job.attempt, code="GANTRY_TILT", reason=reason, remedy="", now=utc_now()
        )
        return job.job_id


def test_a_correction_before_the_object_is_made_keeps_it_here(
    tmp_path: Path, make: Callable[..., SmallNode]
) -> None:
    node = make()
    refused(node, tmp_path / "s")
    node.receive(tilted(tmp_path / "t", patient_id="RIGHT"), ago_s=0)
    assert objects_of(node).sweep(utc_now()) == 0
    assert results(node) == deliveries(node) == []
    assert node.jobs()[0].refusal_object is RefusalObject.WITHHELD


def test_a_correction_while_the_object_is_made_keeps_it_here_too(
    tmp_path: Path, make: Callable[..., SmallNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make()
    refused(node, tmp_path / "s")
    plain = refusals_module.build_refusal

    def correct_meanwhile(*given: Any, **words: Any) -> Dataset:
        node.receive(tilted(tmp_path / "t", patient_id="RIGHT"), ago_s=0)
        return plain(*given, **words)

    monkeypatch.setattr(refusals_module, "build_refusal", correct_meanwhile)
    assert objects_of(node).sweep(utc_now()) == 0
    assert results(node) == deliveries(node) == []


def test_an_object_that_was_queued_is_cancelled_by_a_correction(
    tmp_path: Path, make: Callable[..., SmallNode]
) -> None:
    node = make()
    job_id = refused(node, tmp_path / "s")
    assert objects_of(node).sweep(utc_now()) == 1
    with node.records.write() as session:
        instance_id = session.scalars(select(JobInput.instance_id).where(JobInput.job_id == job_id)).first()
        assert instance_id is not None
        cancel_jobs_of_instance(session, instance_id, at=utc_now())
    assert [d.state for d in deliveries(node)] == [DeliveryState.CANCELLED]


def test_a_retry_that_is_refused_again_sends_only_what_is_new(
    tmp_path: Path, make: Callable[..., SmallNode]
) -> None:
    node = make()
    job_id = refused(node, tmp_path / "s")
    objects = objects_of(node)
    for reason, count in ((REASON, 1), ("The gantry was tilted by 3 degrees.", 2)):
        objects.sweep(utc_now())
        with node.records.write() as session:
            retry_job(session, job_id)
        assert objects.sweep(utc_now()) == 0  # it is not refused now
        refuse_again(node, reason)
        objects.sweep(utc_now())
        assert len(deliveries(node)) == len(results(node)) == count


def test_a_retry_that_succeeds_takes_back_what_has_not_left(
    tmp_path: Path, make: Callable[..., SmallNode]
) -> None:
    node = make()
    job_id = refused(node, tmp_path / "s")
    assert objects_of(node).sweep(utc_now()) == 1
    with node.records.write() as session:
        retry_job(session, job_id)
        job = claim_job(session, owner="w", lease_s=60, now=utc_now())
        assert job is not None
        bind_model(session, job_id, job.attempt, version="1", digest="d" * 64)
        new = NewResult(ResultKind.REPORT, "results/x", 1, "0" * 64, REPORT, "2.25.9")
        outcome = Outcome([new], "r", "float32")
        succeed_job(session, job_id, job.attempt, outcome, now=utc_now())
        cancel_refusal_deliveries(session, job_id, now=utc_now())
    with node.records.read() as session:
        states = {d.result.kind: d.state for d in session.scalars(select(Delivery))}
    assert states == {ResultKind.REFUSAL: DeliveryState.CANCELLED, ResultKind.REPORT: DeliveryState.PENDING}


def test_the_workers_retry_does_not_remove_the_file_of_a_refusal(
    tmp_path: Path, make: Callable[..., SmallNode]
) -> None:
    node = make()
    job_id = refused(node, tmp_path / "s")
    objects_of(node).sweep(utc_now())
    with node.records.write() as session:
        retry_job(session, job_id)
    worker = node.worker()
    assert worker.run_one(threading.Event())
    worker.runner.close()
    (result, *_) = results(node)
    assert node.spool.absolute(result.path).is_file()


def test_one_that_cannot_be_made_keeps_none_waiting(
    tmp_path: Path, make: Callable[..., SmallNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make()
    refused(node, tmp_path / "s")
    monkeypatch.setattr(refusals_module, "build_refusal", lambda *_, **__: 1 / 0)
    assert objects_of(node).sweep(utc_now()) == 0
    assert node.jobs()[0].refusal_object is RefusalObject.WITHHELD
    (event,) = events(node, "refusal.object_withheld")
    assert "ZeroDivisionError" in str(event.detail)
    assert event.alert
