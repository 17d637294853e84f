"""The life of a delivery: one result on its way to one destination.

    pending -> sent | parked | cancelled
    sent -> committed                by storage commitment only
    parked -> pending                a person asked for it

Like a job's, a delivery's reports name their attempt. See PS3.4 Table B.2-1 for the statuses.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from service.errors import ConflictError, LostClaimError, NotFoundError
from service.records.database import announce_work, change
from service.records.tables import Delivery, DeliveryState


def claim_delivery(session: Session, *, owner: str, lease_s: float, now: datetime) -> Delivery | None:
    """Take the next delivery that is due and held by nobody alive; None if there is none."""
    free = or_(Delivery.lease_expires_at.is_(None), Delivery.lease_expires_at < now)
    while True:
        candidate = session.execute(
            select(Delivery.delivery_id, Delivery.attempt)
            .where(Delivery.state == DeliveryState.PENDING, Delivery.next_attempt_at <= now, free)
            .order_by(Delivery.next_attempt_at, Delivery.created_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        ).one_or_none()
        if candidate is None:
            return None
        taken = change(
            session,
            update(Delivery)
            .where(
                Delivery.delivery_id == candidate.delivery_id,
                Delivery.attempt == candidate.attempt,
                Delivery.state == DeliveryState.PENDING,
                free,
            )
            .values(
                attempt=Delivery.attempt + 1,
                lease_owner=owner,
                lease_expires_at=now + timedelta(seconds=lease_s),
            ),
        )
        if taken:
            return session.get(Delivery, candidate.delivery_id, populate_existing=True)


def extend_delivery_lease(session: Session, delivery_id: str, attempt: int, *, until: datetime) -> None:
    """Hold a claimed delivery longer: a large object on a slow line takes its time. Raises LostClaimError."""
    changed = change(
        session,
        update(Delivery)
        .where(
            Delivery.delivery_id == delivery_id,
            Delivery.attempt == attempt,
            Delivery.state == DeliveryState.PENDING,
        )
        .values(lease_expires_at=until),
    )
    if not changed:
        raise LostClaimError(f"Delivery {delivery_id} is no longer held by attempt {attempt}.")


def _report(session: Session, delivery_id: str, attempt: int, **values: Any) -> None:
    changed = change(
        session,
        update(Delivery)
        .where(
            Delivery.delivery_id == delivery_id,
            Delivery.attempt == attempt,
            Delivery.state == DeliveryState.PENDING,
        )
        .values(lease_owner=None, lease_expires_at=None, **values),
    )
    if not changed:
        raise LostClaimError(f"Delivery {delivery_id} is no longer held by attempt {attempt}.")


def mark_sent(
    session: Session, delivery_id: str, attempt: int, *, status: int, note: str | None, now: datetime
) -> None:
    """The destination has taken the object; ``note`` records a warning status. Raises LostClaimError."""
    _report(
        session,
        delivery_id,
        attempt,
        state=DeliveryState.SENT,
        sent_at=now,
        last_status=status,
        last_error=note,
    )


def retry_later(
    session: Session,
    delivery_id: str,
    attempt: int,
    *,
    after_s: float,
    status: int | None,
    error: str,
    failure_status: bool,
    now: datetime,
) -> None:
    """Try again in ``after_s`` seconds; ``failure_status`` counts an answer of 0xCxxx.

    Raises LostClaimError.
    """
    _report(
        session,
        delivery_id,
        attempt,
        next_attempt_at=now + timedelta(seconds=after_s),
        last_status=status,
        last_error=error,
        failure_statuses=Delivery.failure_statuses + int(failure_status),
    )


def park(session: Session, delivery_id: str, attempt: int, *, status: int | None, error: str) -> None:
    """Set a delivery aside for a person: trying again would not help. Raises LostClaimError."""
    _report(session, delivery_id, attempt, state=DeliveryState.PARKED, last_status=status, last_error=error)


def retry_delivery(session: Session, delivery_id: str, *, now: datetime) -> Delivery:
    """Put a parked delivery back into the queue, with its counters at zero.

    Raises
    ------
    NotFoundError
        If there is no such delivery.
    ConflictError
        If the delivery is not parked.
    """
    delivery = session.get(Delivery, delivery_id)
    if delivery is None:
        raise NotFoundError(f"There is no delivery {delivery_id}.")
    changed = change(
        session,
        update(Delivery)
        .where(Delivery.delivery_id == delivery_id, Delivery.state == DeliveryState.PARKED)
        .values(state=DeliveryState.PENDING, next_attempt_at=now, failure_statuses=0, created_at=now),
    )
    if not changed:
        raise ConflictError(
            f"Delivery {delivery_id} is {delivery.state}.", remedy="Only a parked delivery can be retried."
        )
    announce_work(session)
    session.refresh(delivery)
    return delivery
