"""The life of a job, as the few transitions that are allowed.

    queued -> running -> succeeded | refused | failed
    running -> queued    the attempt went wrong, or its lease lapsed (leases.py), and tries are left
    queued | running -> cancelled    its input was corrected or deleted
    refused | failed -> queued       a person asked for it

Every report of a worker names the attempt it belongs to. A report on an attempt that is no longer the
present one raises LostClaimError, so that a worker that was believed dead can never overwrite its successor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from sqlalchemy import case, func, or_, select, update
from sqlalchemy.orm import Session

from models.errors import SegnodeError
from service.errors import ConflictError, LostClaimError, NotFoundError
from service.records.database import announce_work, change, lock_name
from service.records.fleet import is_for
from service.records.governance_tables import Purge
from service.records.leases import RELEASED
from service.records.outbox import queue_deliveries
from service.records.tables import (
    Delivery,
    DeliveryState,
    Job,
    JobInput,
    JobState,
    RefusalObject,
    Result,
    new_identifier,
)
from service.records.work import NewJob, Outcome


def enqueue(session: Session, new: NewJob, *, at: datetime) -> tuple[Job, bool]:
    """Put a job into the queue; the same input and model again give the job that is there already.

    A job of the same series and model that has ended before is named as superseded.

    Returns the job, and whether it is new.
    """
    lock_name(session, new.input_key)
    existing = session.scalar(
        select(Job).where(Job.input_key == new.input_key, Job.model_name == new.model_name)
    )
    if existing is not None:
        return existing, False
    older = None
    if new.series_id is not None:
        older = session.scalar(
            select(Job)
            .where(Job.series_id == new.series_id, Job.model_name == new.model_name)
            .order_by(Job.created_at.desc())
            .limit(1)
        )
    job = Job(
        origin=new.origin,
        model_name=new.model_name,
        requested_version=new.requested_version,
        route_name=new.route_name,
        destinations=list(new.destinations),
        refusal_destinations=list(new.refusal_destinations),
        refusal_object=RefusalObject.WANTED if new.refusal_destinations else RefusalObject.NONE,
        input_key=new.input_key,
        study_instance_uid=new.study_instance_uid,
        series_id=new.series_id,
        owner_key_id=new.owner_key_id,
        supersedes_job_id=older.job_id if older else None,
        priority=new.priority,
        created_at=at,
    )
    session.add(job)
    session.flush()
    session.add_all(
        JobInput(
            job_id=job.job_id,
            position=i,
            channel=n.channel,
            channel_name=n.channel_name,
            instance_id=n.instance_id,
            path=n.path,
        )
        for i, n in enumerate(new.inputs)
    )
    session.flush()
    announce_work(session)
    return job, True


def claim_job(
    session: Session,
    *,
    owner: str,
    lease_s: float,
    now: datetime,
    models: Sequence[str] = (),
    memory_bytes: int | None = None,
) -> Job | None:
    """Take the next job that is due, highest priority first, then oldest; None if there is none.

    Parameters
    ----------
    models : sequence of str
        Whose jobs the worker takes; all where none is named.
    memory_bytes : int or None
        The most a job may use there. A job that ran out of memory where there is no more than this is left
        to a larger worker, while there is one that is looking for jobs.
    """
    wanted = is_for(session, models, memory_bytes, now=now)
    while True:
        candidate = session.execute(
            select(Job.job_id, Job.attempt)
            .where(
                Job.state == JobState.QUEUED,
                or_(Job.not_before.is_(None), Job.not_before <= now),
                *wanted,
            )
            .order_by(Job.priority.desc(), Job.created_at, Job.job_id)
            .limit(1)
            .with_for_update(skip_locked=True)  # whoever else claims now takes the next one
        ).one_or_none()
        if candidate is None:
            return None
        taken = change(
            session,
            update(Job)
            .where(
                Job.job_id == candidate.job_id,
                Job.state == JobState.QUEUED,
                Job.attempt == candidate.attempt,
            )
            .values(
                state=JobState.RUNNING,
                attempt=Job.attempt + 1,
                lease_owner=owner,
                lease_expires_at=now + timedelta(seconds=lease_s),
                started_at=now,
                progress_stage=None,
                progress_fraction=0.0,
            ),
        )
        if taken:
            return session.get(Job, candidate.job_id, populate_existing=True)


def _report(session: Session, job_id: str, attempt: int, **values: Any) -> None:
    """Change a job that this attempt still holds, or raise LostClaimError."""
    changed = change(
        session,
        update(Job)
        .where(Job.job_id == job_id, Job.attempt == attempt, Job.state == JobState.RUNNING)
        .values(**values),
    )
    if not changed:
        raise LostClaimError(f"Job {job_id} is no longer held by attempt {attempt}.")


def bind_model(session: Session, job_id: str, attempt: int, *, version: str, digest: str) -> None:
    """Write down which weights this attempt runs on. Raises LostClaimError."""
    _report(session, job_id, attempt, model_version=version, model_digest=digest)


def renew_lease(
    session: Session, job_id: str, attempt: int, *, lease_s: float, now: datetime, stage: str, fraction: float
) -> None:
    """Report progress, and by that keep the lease. Call it only when progress was made.

    Raises LostClaimError.
    """
    _report(
        session,
        job_id,
        attempt,
        lease_expires_at=now + timedelta(seconds=lease_s),
        progress_stage=stage,
        progress_fraction=fraction,
    )


def succeed_job(
    session: Session,
    job_id: str,
    attempt: int,
    outcome: Outcome,
    *,
    now: datetime,
    profile_keys: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """End a job with its results, and queue its DICOM objects for the destinations that they were made for.

    ``profile_keys`` holds the key of every destination's profile. Raises LostClaimError.
    """
    _report(
        session,
        job_id,
        attempt,
        state=JobState.SUCCEEDED,
        finished_at=now,
        progress_fraction=1.0,
        runtime=outcome.runtime,
        precision=outcome.precision,
        summary=outcome.summary,
        reason_code=None,
        reason=None,
        remedy=None,
        **RELEASED,
    )
    job = session.get_one(Job, job_id)
    results = [
        Result(
            result_id=new_identifier(),
            job_id=job_id,
            kind=new.kind,
            path=new.path,
            size_bytes=new.size_bytes,
            sha256=new.sha256,
            sop_class_uid=new.sop_class_uid,
            sop_instance_uid=new.sop_instance_uid,
            profile=new.profile,
            withheld=new.withheld,
            created_at=now,
        )
        for new in outcome.results
    ]
    session.add_all(results)
    session.flush()
    queue_deliveries(session, job, results, job.destinations, profile_keys, at=now)


def refuse_job(
    session: Session, job_id: str, attempt: int, *, code: str, reason: str, remedy: str, now: datetime
) -> None:
    """End a job whose input cannot be segmented. Raises LostClaimError."""
    _report(
        session,
        job_id,
        attempt,
        state=JobState.REFUSED,
        finished_at=now,
        reason_code=code,
        reason=reason,
        remedy=remedy,
        **RELEASED,
    )


def fail_attempt(
    session: Session,
    job_id: str,
    attempt: int,
    error: SegnodeError,
    *,
    retry_after_s: float,
    maximum_failures: int,
    now: datetime,
) -> JobState:
    """Count a failure of the job itself: queued again while tries are left, else failed for good.

    Returns the state that the job is in now. Raises LostClaimError.
    """
    job = session.get_one(Job, job_id)
    final = job.failures + 1 >= maximum_failures
    _report(
        session,
        job_id,
        attempt,
        state=JobState.FAILED if final else JobState.QUEUED,
        failures=Job.failures + 1,
        not_before=None if final else now + timedelta(seconds=retry_after_s),
        finished_at=now if final else None,
        reason_code=error.code,
        reason=error.message,
        remedy=error.remedy,
        **RELEASED,
    )
    return JobState.FAILED if final else JobState.QUEUED


def release_job(session: Session, job_id: str, attempt: int) -> None:
    """Give a job back unharmed: the node is stopping. Counts as nothing. Raises LostClaimError."""
    _report(session, job_id, attempt, state=JobState.QUEUED, **RELEASED)
    announce_work(session)


def retry_job(session: Session, job_id: str) -> Job:
    """Queue a refused or failed job again, with its counters at zero.

    Raises
    ------
    NotFoundError
        If there is no such job.
    ConflictError
        If the job has not ended, or ended well, its files are purged, or a newer one stands for its series.
    """
    job = session.get(Job, job_id)
    if job is None:
        raise NotFoundError(f"There is no job {job_id}.")
    if session.get(Purge, job_id) is not None:
        raise ConflictError(
            f"The files of job {job_id} are no longer on the node.",
            remedy="Send the study or the file again.",
        )
    newer = session.scalar(select(Job.job_id).where(Job.supersedes_job_id == job_id).limit(1))
    if newer is not None:
        raise ConflictError(
            f"Job {job_id} is superseded: its series has changed since.", remedy=f"See job {newer}."
        )
    changed = change(
        session,
        update(Job)
        .where(Job.job_id == job_id, Job.state.in_((JobState.REFUSED, JobState.FAILED)))
        .values(
            state=JobState.QUEUED,
            failures=0,
            lapses=0,
            not_before=None,
            finished_at=None,
            reason_code=None,
            reason=None,
            remedy=None,
            refusal_object=case(
                (Job.refusal_object == RefusalObject.NONE, RefusalObject.NONE), else_=RefusalObject.WANTED
            ),
        ),
    )
    if not changed:
        raise ConflictError(
            f"Job {job_id} is {job.state}.", remedy="Only a refused or a failed job can be retried."
        )
    announce_work(session)
    session.refresh(job)
    return job


def cancel_jobs_of_instance(session: Session, instance_id: str, *, at: datetime) -> tuple[str, ...]:
    """Cancel what was being made of an instance that is corrected or deleted.

    Jobs that have not ended are cancelled (the worker that runs one loses its claim), and deliveries that
    have not left are cancelled. What was delivered already cannot be taken back: the caller alerts.
    Returns the identifiers of every job that had used the instance.
    """
    job_ids = tuple(
        session.scalars(select(JobInput.job_id).where(JobInput.instance_id == instance_id).distinct())
    )
    for_these = Job.job_id.in_(job_ids)
    session.execute(
        update(Job)
        .where(for_these, Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
        .values(state=JobState.CANCELLED, finished_at=at, **RELEASED)
    )
    session.execute(
        update(Delivery)
        .where(
            Delivery.job_id.in_(job_ids), Delivery.state.in_((DeliveryState.PENDING, DeliveryState.PARKED))
        )
        .values(state=DeliveryState.CANCELLED, lease_owner=None, lease_expires_at=None)
    )
    return job_ids


def queue_length(session: Session, *, route_name: str | None = None) -> int:
    """Number of jobs that wait, in all or of one route."""
    query = select(func.count()).select_from(Job).where(Job.state == JobState.QUEUED)
    if route_name is not None:
        query = query.where(Job.route_name == route_name)
    return session.scalar(query) or 0
