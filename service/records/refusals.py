"""Refusal objects: which refused jobs are to have one, and what becomes of it.

    wanted -> made | withheld     once the job is refused
    made | withheld -> wanted     the job is retried: it may be refused for another reason

A refusal is recorded at once and its object is made later, outside of any transaction. Between the two the
input may be corrected or the job retried; the object then does not leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.records.database import change
from service.records.outbox import queue_deliveries
from service.records.tables import (
    Delivery,
    DeliveryState,
    Instance,
    Job,
    JobInput,
    JobState,
    RefusalObject,
    Result,
    ResultKind,
)
from service.records.work import NewResult

_WANTED = (Job.state == JobState.REFUSED, Job.refusal_object == RefusalObject.WANTED)


@dataclass(frozen=True)
class WantedRefusal:
    """A refused job that is to have a refusal object. ``paths`` are relative to the spool."""

    job_id: str
    attempt: int
    model_name: str
    code: str
    reason: str
    remedy: str
    created_at: datetime
    paths: tuple[str, ...]
    one_identity: bool


def wanted_refusals(session: Session, *, limit: int = 16) -> list[WantedRefusal]:
    """Refused jobs whose refusal object is still to be made, oldest first."""
    jobs = session.scalars(select(Job).where(*_WANTED).order_by(Job.created_at, Job.job_id).limit(limit))
    return [
        WantedRefusal(
            job_id=job.job_id,
            attempt=job.attempt,
            model_name=job.model_name,
            code=job.reason_code or "",
            reason=job.reason or "",
            remedy=job.remedy or "",
            created_at=job.created_at,
            paths=tuple(each.path for each in job.inputs),
            one_identity=_has_one_identity(session, job.job_id),
        )
        for job in jobs
    ]


def refusal_made(
    session: Session, refusal: WantedRefusal, new: NewResult, profile_keys: Mapping[str, str], *, at: datetime
) -> bool:
    """Record a refusal object, and queue it for the destinations that asked for it.

    False, with nothing changed, where the job is not the refused one any more: retried, corrected, deleted.
    """
    if not _has_one_identity(session, refusal.job_id) or not _leave_wanted(
        session, refusal, RefusalObject.MADE
    ):
        return False
    job = session.get_one(Job, refusal.job_id, populate_existing=True)
    known = session.scalar(
        select(Result).where(Result.job_id == job.job_id, Result.sop_instance_uid == new.sop_instance_uid)
    )
    if known is not None:
        return True  # refused again for the very same reason: it is sent already
    result = Result(
        job_id=job.job_id,
        kind=ResultKind.REFUSAL,
        path=new.path,
        size_bytes=new.size_bytes,
        sha256=new.sha256,
        sop_class_uid=new.sop_class_uid,
        sop_instance_uid=new.sop_instance_uid,
        created_at=at,
    )
    session.add(result)
    session.flush()
    queue_deliveries(session, job, [result], job.refusal_destinations, profile_keys, at=at)
    return True


def refusal_withheld(session: Session, refusal: WantedRefusal) -> bool:
    """Record that nothing may leave; False where the job is not the refused one any more."""
    return _leave_wanted(session, refusal, RefusalObject.WITHHELD)


def add_refusal_destinations(
    session: Session, job: Job, destinations: Iterable[str], profile_keys: Mapping[str, str], *, at: datetime
) -> None:
    """Let a job's refusal go to further destinations too."""
    further = [name for name in destinations if name not in job.refusal_destinations]
    if not further:
        return
    job.refusal_destinations = [*job.refusal_destinations, *further]
    if job.refusal_object is RefusalObject.NONE:
        job.refusal_object = RefusalObject.WANTED
    elif job.refusal_object is RefusalObject.MADE:
        made = session.scalars(
            select(Result).where(Result.job_id == job.job_id, Result.kind == ResultKind.REFUSAL)
        ).all()
        queue_deliveries(session, job, made, further, profile_keys, at=at)
    session.flush()


def cancel_refusal_deliveries(session: Session, job_id: str, *, now: datetime) -> None:
    """A job that had been refused has succeeded: what has not left of its refusal does not leave."""
    of_refusals = select(Result.result_id).where(Result.job_id == job_id, Result.kind == ResultKind.REFUSAL)
    session.execute(
        update(Delivery)
        .where(
            Delivery.result_id.in_(of_refusals),
            Delivery.state.in_((DeliveryState.PENDING, DeliveryState.PARKED)),
            Delivery.lease_expires_at.is_(None) | (Delivery.lease_expires_at < now),
        )
        .values(state=DeliveryState.CANCELLED, lease_owner=None, lease_expires_at=None)
    )


def _leave_wanted(session: Session, refusal: WantedRefusal, outcome: RefusalObject) -> bool:
    changed = change(
        session,
        update(Job)
        .where(Job.job_id == refusal.job_id, Job.attempt == refusal.attempt, *_WANTED)
        .values(refusal_object=outcome),
    )
    return changed > 0


def _has_one_identity(session: Session, job_id: str) -> bool:
    """True where every input is a received instance in its current revision, all of one patient and study."""
    inputs = session.execute(
        select(Instance.current, Instance.identity_digest)
        .select_from(JobInput)
        .outerjoin(Instance, Instance.instance_id == JobInput.instance_id)
        .where(JobInput.job_id == job_id)
        .distinct()
    ).all()
    return len(inputs) == 1 and bool(inputs[0].current)
