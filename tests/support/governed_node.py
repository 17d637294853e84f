"""A node for tests of governance: jobs over NIfTI images that have ended, without a process being started."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

import numpy as np
from api_harness import ApiHarness
from bundle_factory import write_nifti_ras
from numpy.typing import NDArray

from service.records.database import utc_now
from service.records.jobs import bind_model, claim_job, enqueue, succeed_job
from service.records.tables import JobOrigin, ResultKind, new_identifier
from service.records.work import NewInput, NewJob, NewResult, Outcome

THRESHOLDS = (100.5, 300.5)


def image(seed: int = 0) -> NDArray[np.float32]:
    """(Z, Y, X) intensities in which both labels occur, some of them near the first threshold."""
    array = np.random.default_rng(seed).integers(1, 60, (8, 10, 12)).astype(np.float32)
    array[2:5, 2:6, 2:6] = 120
    array[3:7, 5:9, 7:11] = 400
    return array


def labels_of(array: NDArray[np.float32], thresholds: tuple[float, ...] = THRESHOLDS) -> NDArray[np.uint8]:
    return np.sum([array > each for each in thresholds], axis=0).astype(np.uint8)


def finish_job(
    api: ApiHarness,
    *,
    seed: int = 0,
    version: str = "1.0.0",
    destinations: tuple[str, ...] = (),
    study: str | None = None,
    labels: NDArray[np.uint8] | None = None,
) -> str:
    """A job that has succeeded on an image, with its labelmap in the spool; its identifier."""
    job_key = new_identifier()
    folder = api.spool.uploads_dir / job_key
    api.spool.make_folder(folder)
    source = folder / "0000.nii.gz"
    array = image(seed)
    write_nifti_ras(source, array, (1.0, 1.0, 1.0))
    digest = api.registry.get("threshold", version).digest
    now = utc_now()
    with api.records.write() as session:
        new = NewJob(
            origin=JobOrigin.UPLOAD,
            model_name="threshold",
            input_key=job_key,
            inputs=[NewInput(api.spool.relative(source))],
            destinations=destinations,
            study_instance_uid=study,
            priority=100,
        )
        job_id = enqueue(session, new, at=now)[0].job_id
        job = claim_job(session, owner="worker", lease_s=60, now=now)
        assert job is not None
        assert job.job_id == job_id
        bind_model(session, job_id, job.attempt, version=version, digest=digest)
    result_folder = api.spool.results_dir / job_id
    api.spool.make_folder(result_folder)
    labelmap, segmentation = result_folder / "labelmap.nii.gz", result_folder / "seg.dcm"
    write_nifti_ras(labelmap, labels_of(array) if labels is None else labels, (1.0, 1.0, 1.0))
    segmentation.write_bytes(b"segmentation")
    results = [_result(api, ResultKind.LABELMAP, labelmap, None)]
    results.append(_result(api, ResultKind.SEGMENTATION, segmentation, f"2.25.{int(job_id, 16)}"))
    with api.records.write() as session:
        outcome = Outcome(results, "onnxruntime", "float32", {})
        succeed_job(session, job_id, job.attempt, outcome, now=now + timedelta(seconds=2))
    return job_id


def _result(api: ApiHarness, kind: ResultKind, path: Path, uid: str | None) -> NewResult:
    content = path.read_bytes()
    return NewResult(
        kind=kind,
        path=api.spool.relative(path),
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4" if uid else None,
        sop_instance_uid=uid,
    )
