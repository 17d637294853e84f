"""Golden cases of the site: finished studies whose labelmap a person has approved.

The images are those of the job, which from then on is neither purged nor deleted; the approved labelmap lies
in the spool's folder ``cases``. A version that does worse on them does not pass the gate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models.bundle import Bundle
from models.nifti import read_labelmap, write_nifti
from models.registry import Registry
from service.archive import is_dicom
from service.errors import ConflictError, NotFoundError
from service.records.database import Records
from service.records.events import record_event
from service.records.governance_tables import Purge, SiteCase
from service.records.tables import Job, JobState, ResultKind, new_identifier
from service.site_labelmap import read_approved
from service.spool import Spool

AS_PRODUCED, NIFTI, SEGMENTATION = "as_produced", "nifti", "segmentation"


def approve_case(
    records: Records,
    spool: Spool,
    registry: Registry,
    job_id: str,
    labelmap: Path | None,
    *,
    actor: str,
    now: datetime,
) -> SiteCase:
    """Make a finished job a golden case.

    Parameters
    ----------
    labelmap : Path or None
        What was approved, NIfTI or DICOM-SEG; None for the node's own result as it was produced.

    Raises
    ------
    NotFoundError
        If there is no such job.
    ConflictError
        If it has no labelmap (any more), or is a golden case already.
    Refusal
        If the file is not a labelmap of this model on the grid of the study.
    """
    with records.read() as session:
        produced, bundle = _result_of(session, spool, registry, job_id)
    grid = read_labelmap(produced)
    approved = read_approved(produced if labelmap is None else labelmap, grid, bundle.manifest)
    source = AS_PRODUCED if labelmap is None else SEGMENTATION if is_dicom(labelmap) else NIFTI
    case_id = new_identifier()
    path = cases_dir(spool) / f"{case_id}.nii.gz"
    spool.make_folder(path.parent)
    write_nifti(approved, path)
    found = set(np.unique(approved.array).tolist())
    case = SiteCase(
        case_id=case_id,
        job_id=job_id,
        model_name=bundle.manifest.name,
        path=spool.relative(path),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        source=source,
        labels=[label.name for label in bundle.manifest.labels if label.value in found],
        approved_by=actor,
        created_at=now,
    )
    try:
        with records.write() as session:
            session.get_one(Job, job_id, with_for_update=True)
            if session.get(Purge, job_id) is not None:
                raise _purged(job_id)
            session.add(case)
            session.flush()
            record_event(
                session,
                "case.approved",
                actor=actor,
                at=now,
                subject=case_id,
                detail={"job_id": job_id, "model": case.model_name, "source": source},
            )
    except IntegrityError as error:
        path.unlink()
        raise ConflictError(
            f"Job {job_id} is a golden case already.", remedy="Remove that case first to approve it anew."
        ) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return case


def list_cases(session: Session, *, model_name: str | None = None) -> Sequence[SiteCase]:
    """The golden cases of the site, the oldest first."""
    query = select(SiteCase).order_by(SiteCase.created_at, SiteCase.case_id)
    if model_name is not None:
        query = query.where(SiteCase.model_name == model_name)
    return session.scalars(query).all()


def remove_case(records: Records, spool: Spool, case_id: str, *, actor: str, now: datetime) -> None:
    """Remove a golden case; its study is an ordinary one again.

    Raises
    ------
    NotFoundError
        If there is no such case.
    """
    with records.write() as session:
        case = session.get(SiteCase, case_id)
        if case is None:
            raise NotFoundError(f"There is no golden case {case_id}.", remedy="List the cases.")
        path = spool.absolute(case.path)
        detail = {"job_id": case.job_id, "model": case.model_name}
        session.delete(case)
        record_event(session, "case.removed", actor=actor, at=now, subject=case_id, detail=detail)
    path.unlink(missing_ok=True)


def require_no_case(session: Session, job_ids: Sequence[str]) -> None:
    """Return only if none of these jobs is a golden case. Raises ConflictError."""
    case_id = session.scalar(select(SiteCase.case_id).where(SiteCase.job_id.in_(job_ids)).limit(1))
    if case_id is not None:
        raise ConflictError(
            f"The golden case {case_id} of the site rests on it.",
            remedy="Remove that case, then delete again.",
        )


def cases_dir(spool: Spool) -> Path:
    """Where the approved labelmaps lie."""
    return spool.root / "cases"


def _result_of(session: Session, spool: Spool, registry: Registry, job_id: str) -> tuple[Path, Bundle]:
    """A job's own labelmap, and the version that made it. Raises NotFoundError, ConflictError."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFoundError(f"There is no job {job_id}.")
    if job.state is not JobState.SUCCEEDED:
        raise ConflictError(
            f"Job {job_id} is {job.state} and has no labelmap.", remedy="Approve a job that has succeeded."
        )
    result = next((each for each in job.results if each.kind is ResultKind.LABELMAP), None)
    if session.get(Purge, job_id) is not None or result is None or not spool.absolute(result.path).is_file():
        raise _purged(job_id)
    assert job.model_version is not None, "a job that has succeeded has run on a version"
    return spool.absolute(result.path), registry.get(job.model_name, job.model_version)


def _purged(job_id: str) -> ConflictError:
    return ConflictError(
        f"The files of job {job_id} are no longer on the node.",
        remedy="Send the study again, or take another.",
    )
