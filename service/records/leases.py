"""Leases whose holders are known to be dead: they need not be waited for."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import exists, select, update
from sqlalchemy.orm import Session

from service.records.database import change
from service.records.tables import Delivery, Job, JobState


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
