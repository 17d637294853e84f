"""Which workers there are, what they take, and whether they still consume."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from service.records.database import change
from service.records.fleet_tables import JobNeed, WorkerRow
from service.records.tables import Job, JobState

DEAD_AFTER_S = 60.0
"""A worker that has consumed nothing for so long, and holds no job, is not counted on."""

_FORGOTTEN_AFTER = timedelta(days=1)


def beat(
    session: Session,
    *,
    owner: str,
    host: str,
    models: Sequence[str],
    memory_bytes: int,
    bell_heard_at: datetime | None,
    now: datetime,
) -> None:
    """Write down that a worker has looked for jobs just now; forget those of another day."""
    changed = change(
        session,
        update(WorkerRow)
        .where(WorkerRow.owner == owner)
        .values(beat_at=now, bell_heard_at=bell_heard_at, memory_bytes=memory_bytes),
    )
    if not changed:
        session.execute(delete(WorkerRow).where(WorkerRow.beat_at < now - _FORGOTTEN_AFTER))
        session.add(
            WorkerRow(
                owner=owner,
                host=host,
                started_at=now,
                beat_at=now,
                bell_heard_at=bell_heard_at,
                models=list(models),
                memory_bytes=memory_bytes,
            )
        )
        session.flush()


def sign_off(session: Session, owner: str) -> None:
    """A worker ends."""
    session.execute(delete(WorkerRow).where(WorkerRow.owner == owner))


def live_workers(session: Session, *, now: datetime, host: str | None = None) -> list[WorkerRow]:
    """The workers that consume: they looked for jobs a moment ago, or hold one whose lease they renew."""
    query = select(WorkerRow).where(_is_live(now)).order_by(WorkerRow.started_at, WorkerRow.owner)
    if host is not None:
        query = query.where(WorkerRow.host == host)
    return list(session.scalars(query))


def jobs_no_worker_takes(session: Session, *, now: datetime) -> int:
    """How many jobs wait whose model no worker takes that is alive: nobody would ever begin them."""
    live = live_workers(session, now=now)
    if any(not worker.models for worker in live):
        return 0
    taken = {name for worker in live for name in worker.models}
    waiting = select(func.count()).where(Job.state == JobState.QUEUED, Job.model_name.not_in(taken))
    return session.scalar(waiting) or 0


def note_need(session: Session, job_id: str, *, more_than_bytes: int) -> None:
    """A job ran out of memory on a worker that has so much: a larger one tries it next, if there is one."""
    need = session.get(JobNeed, job_id)
    if need is None:
        session.add(JobNeed(job_id=job_id, more_than_bytes=more_than_bytes))
    else:
        need.more_than_bytes = max(need.more_than_bytes, more_than_bytes)
    session.flush()


def is_for(
    session: Session, models: Sequence[str], memory_bytes: int | None, *, now: datetime
) -> list[ColumnElement[bool]]:
    """Conditions on the jobs that a worker takes.

    They are of its models, and none that ran out of memory where there was as much as here, while a larger
    worker that takes their model is looking for jobs.
    """
    conditions: list[ColumnElement[bool]] = [Job.model_name.in_(models)] if models else []
    if memory_bytes is None or session.scalar(select(JobNeed.job_id).limit(1)) is None:
        return conditions
    larger = session.scalars(
        select(WorkerRow).where(_looked_just_now(now), WorkerRow.memory_bytes > memory_bytes)
    ).all()
    if larger:
        too_large: ColumnElement[bool] = exists().where(
            JobNeed.job_id == Job.job_id, JobNeed.more_than_bytes >= memory_bytes
        )
        if all(worker.models for worker in larger):
            too_large &= Job.model_name.in_({name for worker in larger for name in worker.models})
        conditions.append(~too_large)
    return conditions


def _looked_just_now(now: datetime) -> ColumnElement[bool]:
    return WorkerRow.beat_at > now - timedelta(seconds=DEAD_AFTER_S)


def _is_live(now: datetime) -> ColumnElement[bool]:
    holds_a_job = exists().where(
        Job.lease_owner == WorkerRow.owner, Job.state == JobState.RUNNING, Job.lease_expires_at > now
    )
    return or_(_looked_just_now(now), holds_a_job)
