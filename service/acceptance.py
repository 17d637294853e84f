"""The acceptance of a node at a site: echo, a study in, a proven SEG out and delivered, with figures.

What is looked at is the node that runs: the study goes through its DICOM port, and what became of it is read
from its records and its spool. No check repairs or hides anything; a failed one is in the report as it is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from sqlalchemy import select

from models.bundle import Bundle
from models.nifti import read_labelmap
from service.dicom.send import OutcomeKind, echo, send_files
from service.node import Node
from service.records.database import Records
from service.records.tables import Delivery, DeliveryState, Job, JobState, Result, ResultKind
from service.routes import Route
from service.settings import Destination

MINIMUM_DICE = 0.99  # the phantom was rounded to 16 bits on its way through DICOM
_POLL_S = 0.5

Found = TypeVar("Found")
_ENDED = (JobState.SUCCEEDED, JobState.REFUSED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class Check:
    """One line of the report: what was asked, whether it held, and the figures."""

    what: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Trial:
    """What is tried: a study, the node's DICOM port, and the route that the study is meant for.

    ``is_phantom`` says that the study is the model's golden image, so that its labels are known.
    """

    paths: Sequence[Path]
    node: Destination
    calling_ae_title: str
    route: Route
    bundle: Bundle
    is_phantom: bool
    timeout_s: float


def run_trial(node: Node, trial: Trial) -> Iterator[Check]:
    """Make every check in order, one by one; ends early where the next would have nothing to look at."""
    yield _echo(trial.node, trial.calling_ae_title)
    own_title = node.settings.dicom.ae_title
    destinations = [found for name in trial.route.destinations if (found := node.settings.destination(name))]
    for destination in destinations:
        yield _echo(destination, own_title)
    sent = _send(trial)
    yield sent
    if not sent.passed:
        return
    study_instance_uid = str(dcmread(trial.paths[0], stop_before_pixels=True).StudyInstanceUID)
    job = _wait_for_job(node, study_instance_uid, trial)
    yield _judge_job(job, trial)
    if job is None or job.state is not JobState.SUCCEEDED:
        return
    segmentations = _segmentations(node, job.job_id)
    yield _judge_files(node, segmentations)
    if trial.is_phantom:
        yield _compare_with_golden(node, segmentations, trial.bundle)
    for destination in destinations:
        yield judge_delivery(node.records, job.job_id, destination, timeout_s=trial.timeout_s)


def _echo(destination: Destination, calling_ae_title: str) -> Check:
    began = time.monotonic()
    outcome = echo(destination, calling_ae_title=calling_ae_title)
    where = f"{destination.ae_title}@{destination.host}:{destination.port}"
    passed = outcome.kind is OutcomeKind.DELIVERED
    took = f"answered in {1000 * (time.monotonic() - began):.0f} ms"
    return Check(
        f"C-ECHO from {calling_ae_title} to {where}", passed, took if passed else outcome.error or ""
    )


def _send(trial: Trial) -> Check:
    outcomes = send_files(trial.paths, trial.node, calling_ae_title=trial.calling_ae_title)
    results = [outcome for _, outcome in outcomes]
    taken = sum(outcome.kind is OutcomeKind.DELIVERED for outcome in results)
    errors = {outcome.error for outcome in results if outcome.error}
    found = f"{taken} of {len(results)} objects answered with 0x0000. {' '.join(sorted(errors))}".strip()
    return Check("C-STORE of the study", taken == len(results), found)


def _wait_for_job(node: Node, study_instance_uid: str, trial: Trial) -> Job | None:
    """The job of the route, when it has ended, or as it is after the time is over."""
    query = select(Job).where(
        Job.study_instance_uid == study_instance_uid, Job.model_name == trial.route.model
    )

    def look() -> Job | None:
        with node.records.read() as session:
            return session.scalars(query.order_by(Job.created_at.desc())).first()

    return _wait(look, lambda job: job is not None and job.state in _ENDED, trial.timeout_s)


def _judge_job(job: Job | None, trial: Trial) -> Check:
    manifest = trial.bundle.manifest
    what = f"Segmented by {manifest.name} {manifest.version}"
    if job is None:
        return Check(what, False, f"No job within {trial.timeout_s:g} s: does the route match the study?")
    if job.state is not JobState.SUCCEEDED:
        return Check(what, False, f"{job.state.value}: {job.reason_code or ''} {job.reason or ''}".strip())
    assert job.started_at is not None
    assert job.finished_at is not None
    figures = (
        f"{(job.finished_at - job.started_at).total_seconds():.1f} s on {job.runtime}, {job.precision}; "
        f"attempt {job.attempt}; digest {job.model_digest}"
    )
    return Check(what, job.model_digest == trial.bundle.digest, figures)


def _segmentations(node: Node, job_id: str) -> list[Result]:
    query = select(Result).where(Result.job_id == job_id, Result.kind == ResultKind.SEGMENTATION)
    with node.records.read() as session:
        return list(session.scalars(query.order_by(Result.path)))


def _judge_files(node: Node, segmentations: Sequence[Result]) -> Check:
    """The node made them results only after it had proven them; here: that they are still those."""
    whole = all(
        hashlib.sha256(node.spool.absolute(each.path).read_bytes()).hexdigest() == each.sha256
        for each in segmentations
    )
    names = "; ".join(f"{each.sop_instance_uid}, {each.size_bytes} bytes" for each in segmentations)
    return Check(
        "Proven DICOM-SEG, its file as recorded", bool(segmentations) and whole, names or "no segmentation"
    )


def _compare_with_golden(node: Node, segmentations: Sequence[Result], bundle: Bundle) -> Check:
    """Decode by highdicom, place every voxel by its own position, and compare with the known labels."""
    golden = read_labelmap(bundle.folder / "golden" / "labelmap.nii.gz")
    expected = np.asarray(golden.array)
    to_voxel = np.linalg.inv(golden.affine)
    found: dict[str, NDArray[np.bool_]] = {}
    for result in segmentations:
        segmentation = highdicom.seg.segread(node.spool.absolute(result.path))
        volume = segmentation.get_volume(combine_segments=True)
        names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in segmentation.SegmentSequence}
        indices = np.argwhere(volume.array)
        places_mm = volume.affine @ np.c_[indices, np.ones(len(indices))].T
        x, y, z = np.rint(to_voxel @ places_mm)[:3].astype(int)
        inside = np.all([(v >= 0) & (v < n) for v, n in zip((z, y, x), expected.shape, strict=True)], axis=0)
        numbers = volume.array[tuple(indices.T)]
        for number, name in names.items():
            mask = found.setdefault(name, np.zeros(expected.shape, bool))
            chosen = inside & (numbers == number)
            mask[z[chosen], y[chosen], x[chosen]] = True
    dice = {
        label.name: _dice(expected == label.value, found.get(label.name, np.zeros(expected.shape, bool)))
        for label in bundle.manifest.labels
        if (expected == label.value).any()
    }
    figures = ", ".join(f"{name} {value:.4f}" for name, value in dice.items())
    passed = bool(dice) and min(dice.values()) >= MINIMUM_DICE
    return Check(f"Labels as the training framework gave them (Dice >= {MINIMUM_DICE})", passed, figures)


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return 2.0 * float((one & other).sum()) / float(one.sum() + other.sum())


def judge_delivery(records: Records, job_id: str, destination: Destination, *, timeout_s: float) -> Check:
    """Every delivery of the job to one destination, sent; committed where the destination is asked for it."""
    query = select(Delivery).where(Delivery.job_id == job_id, Delivery.destination == destination.name)
    wanted = DeliveryState.COMMITTED if destination.storage_commitment else DeliveryState.SENT

    def look() -> list[Delivery]:
        with records.read() as session:
            return list(session.scalars(query))

    def done(deliveries: list[Delivery]) -> bool:
        return bool(deliveries) and all(each.state in (wanted, DeliveryState.PARKED) for each in deliveries)

    deliveries = _wait(look, done, timeout_s)
    states = ", ".join(f"{each.state.value} {each.last_error or ''}".strip() for each in deliveries)
    passed = bool(deliveries) and all(each.state is wanted for each in deliveries)
    word = "Committed by" if destination.storage_commitment else "Sent to"
    return Check(f"{word} {destination.name}", passed, f"{len(deliveries)} object(s): {states or 'none'}")


def _wait(look: Callable[[], Found], done: Callable[[Found], bool], timeout_s: float) -> Found:
    deadline = time.monotonic() + timeout_s
    while not done(found := look()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return found
