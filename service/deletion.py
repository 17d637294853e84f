"""Deletion on request, of one study or of one job: its rows and its files.

One writing transaction holds everything else off while files are unlinked, and is committed only when
they are gone. If it is interrupted between the two, the rows are still there and the same request finishes
the work; nothing is left on the disk that no row speaks of. The audit trail keeps that it happened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from service.errors import ConflictError, NotFoundError
from service.records.database import Records
from service.records.events import record_event
from service.records.tables import (
    Delivery,
    DeliveryState,
    Instance,
    Job,
    JobInput,
    JobState,
    Result,
    Series,
    SeriesState,
)
from service.site_cases import require_no_case
from service.spool import Spool

_IDENTIFIER = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Deleted:
    """What was deleted."""

    instances: int
    jobs: int
    files: int
    size_bytes: int


def delete_study(
    records: Records, spool: Spool, study_instance_uid: str, *, actor: str, now: datetime
) -> Deleted:
    """Delete all that the node holds of a study: instances, jobs, results, and deliveries not yet made.

    Raises
    ------
    NotFoundError
        If nothing of the study is here.
    ConflictError
        If it is still being received, a job of it is running, a result of it is being sent right now, or a
        golden case of the site rests on it.
    """
    with records.write(alone=True) as session:
        instances = session.scalars(
            select(Instance).where(Instance.study_instance_uid == study_instance_uid)
        ).all()
        series = session.scalars(
            select(Series).where(Series.study_instance_uid == study_instance_uid).with_for_update()
        ).all()
        jobs = _jobs_of_study(session, study_instance_uid)
        if not (instances or series or jobs):
            raise NotFoundError(
                f"There is no study {study_instance_uid}.", remedy="List the studies to see which are here."
            )
        receiving = sum(s.state is SeriesState.RECEIVING for s in series)
        if receiving:
            raise ConflictError(
                f"{receiving} of the study's {len(series)} series are still being received.",
                remedy="Wait until they are complete, then delete the study again.",
            )
        _check_idle(session, jobs, now)
        require_no_case(session, [job.job_id for job in jobs])
        paths = {i.path for i in instances} | _forget_jobs(session, jobs)
        session.execute(delete(Instance).where(Instance.study_instance_uid == study_instance_uid))
        session.execute(delete(Series).where(Series.series_id.in_([s.series_id for s in series])))
        files, size_bytes = unlink_files(spool, paths)
        deleted = Deleted(len(instances), len(jobs), files, size_bytes)
        _record(session, "study.deleted", study_instance_uid, deleted, actor=actor, now=now)
    return deleted


def delete_job(records: Records, spool: Spool, job_id: str, *, actor: str, now: datetime) -> Deleted:
    """Delete one job with its results and, where it was uploaded, its input. Received instances stay.

    Raises
    ------
    NotFoundError
        If there is no such job.
    ConflictError
        If it is running, a result of it is being sent right now, or a golden case of the site rests on it.
    """
    with records.write(alone=True) as session:
        job = session.get(Job, job_id)
        if job is None:
            raise NotFoundError(f"There is no job {job_id}.")
        _check_idle(session, [job], now)
        require_no_case(session, [job_id])
        files, size_bytes = unlink_files(spool, _forget_jobs(session, [job]))
        deleted = Deleted(0, 1, files, size_bytes)
        _record(session, "job.deleted", job_id, deleted, actor=actor, now=now)
    return deleted


def _jobs_of_study(session: Session, study_instance_uid: str) -> list[Job]:
    used = (
        select(JobInput.job_id)
        .join(Instance, Instance.instance_id == JobInput.instance_id)
        .where(Instance.study_instance_uid == study_instance_uid)
    )
    return list(
        session.scalars(
            select(Job)
            .where(or_(Job.study_instance_uid == study_instance_uid, Job.job_id.in_(used)))
            .with_for_update()
        )
    )


def _check_idle(session: Session, jobs: Iterable[Job], now: datetime) -> None:
    for job in jobs:
        if job.state is JobState.RUNNING:
            raise ConflictError(
                f"Job {job.job_id} is running.", remedy="Wait until it has ended, then delete again."
            )
    sending = session.scalar(
        select(Delivery.delivery_id)
        .where(
            Delivery.job_id.in_([job.job_id for job in jobs]),
            Delivery.state == DeliveryState.PENDING,
            Delivery.lease_expires_at >= now,
        )
        .limit(1)
    )
    if sending is not None:
        raise ConflictError(
            f"Delivery {sending} is being sent.", remedy="Wait until it has ended, then delete again."
        )


def _forget_jobs(session: Session, jobs: Iterable[Job]) -> set[str]:
    """Delete the rows of these jobs, and return the files that belonged to them alone."""
    job_ids = [job.job_id for job in jobs]
    uploaded = session.scalars(
        select(JobInput.path).where(JobInput.job_id.in_(job_ids), JobInput.instance_id.is_(None))
    )
    results = session.scalars(select(Result.path).where(Result.job_id.in_(job_ids)))
    paths = {*uploaded, *results}
    session.execute(update(Job).where(Job.supersedes_job_id.in_(job_ids)).values(supersedes_job_id=None))
    for table in (Delivery, Result, JobInput, Job):
        session.execute(delete(table).where(table.job_id.in_(job_ids)))
    return paths


def unlink_files(spool: Spool, paths: Iterable[str]) -> tuple[int, int]:
    """Unlink files, and the folders of one upload or job that are empty then; count and bytes."""
    files, size_bytes = 0, 0
    folders: set[Path] = set()
    for path in sorted(spool.absolute(relative) for relative in paths):
        folders.add(path.parent)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            continue  # an earlier deletion was interrupted after this file
        files, size_bytes = files + 1, size_bytes + size
    for folder in folders:
        # A folder that several jobs share stays: another process may be about to write into it.
        if _IDENTIFIER.fullmatch(folder.name) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return files, size_bytes


def _record(
    session: Session, kind: str, subject: str, deleted: Deleted, *, actor: str, now: datetime
) -> None:
    detail = {
        "instances": deleted.instances,
        "jobs": deleted.jobs,
        "files": deleted.files,
        "size_bytes": deleted.size_bytes,
    }
    record_event(session, kind, actor=actor, at=now, subject=subject, detail=detail)
