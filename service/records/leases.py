"""Leases that ran out, and those whose holders are known to be dead: they need not be waited for."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, exists, select, update
from sqlalchemy.orm import Session

from service.records.database import announce_work, change
from service.records.tables import Delivery, Job, JobState

RELEASED: dict[str, Any] = {"lease_owner": None, "lease_expires_at": None}


def lease_owners(session: Session) -> set[str]:
    """Everyone who holds a job or a delivery now."""
    owners = [session.scalars(select(kind.lease_owner).distinct()) for kind in (Job, Delivery)]
    return {owner for every in owners for owner in every if owner is not None}


def any_lease_lapsed(session: Session, *, now: datetime) -> bool:
    """True if there is a job whose holder has not been heard of in time."""
    lapsed = select(Job.job_id).where(Job.state == JobState.RUNNING, Job.lease_expires_at < now)
    return bool(session.scalar(select(exists(lapsed))))


def expire_leases(session: Session, owners: Collection[str], *, now: datetime) -> int:
    """End the leases of owners that are proven dead: reaping finds them lapsed. Returns how many."""
    return sum(
        change(
            session,
            update(kind)
            .where(kind.lease_owner.in_(owners), kind.lease_expires_at >= now)
            .values(lease_expires_at=now - timedelta(seconds=1)),
        )
        for kind in (Job, Delivery)
    )


def reap_lapsed_jobs(session: Session, *, maximum_lapses: int, now: datetime) -> list[str]:
    """Take back the jobs whose lease ran out: whoever held them is dead or stuck.

    A lapse counts apart from a failure of the job itself; after ``maximum_lapses`` of them the job fails
    for good. Returns the identifiers of the jobs taken back.
    """
    lapsed = session.scalars(
        select(Job).where(Job.state == JobState.RUNNING, Job.lease_expires_at < now)
    ).all()
    reaped = []
    for job in lapsed:
        final = job.lapses + 1 >= maximum_lapses
        values: dict[str, Any] = {"state": JobState.FAILED if final else JobState.QUEUED}
        if final:
            values |= {
                "finished_at": now,
                "reason_code": "WORKER_LOST",
                "reason": f"The worker that ran this job died {maximum_lapses} times.",
                "remedy": "Look for out-of-memory kills on the host, then retry the job.",
            }
        changed = change(
            session,
            update(Job)
            .where(
                and_(Job.job_id == job.job_id, Job.attempt == job.attempt, Job.state == JobState.RUNNING),
                Job.lease_expires_at < now,
            )
            .values(lapses=Job.lapses + 1, **values, **RELEASED),
        )
        if changed:
            reaped.append(job.job_id)
            announce_work(session)
    return reaped
