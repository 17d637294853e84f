"""The life of a storage commitment: asked for, and confirmed, refused or not answered.

Only a report that names the request makes a delivery ``committed``. What the destination says it does not
have is sent again; what it does not answer is asked for again; both end with a parked delivery, and an alert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import and_, delete, exists, or_, select, update
from sqlalchemy.orm import Session

from service.records.database import change
from service.records.governance_tables import Commitment, Purge
from service.records.tables import Delivery, DeliveryState, Result


@dataclass(frozen=True)
class Uncommitted:
    """A delivery that a destination has not yet confirmed."""

    delivery_id: str
    destination: str
    sop_class_uid: str
    sop_instance_uid: str
    requests: int  # made so far


@dataclass(frozen=True)
class Confirmation:
    """What a report has changed, by identifiers of deliveries."""

    destination: str | None
    committed: Sequence[str] = ()
    not_there: Sequence[str] = ()  # queued to be sent again
    refused: Sequence[str] = ()  # to be asked for again


def due_commitments(
    session: Session, destinations: Collection[str], *, now: datetime, limit: int
) -> list[Uncommitted]:
    """Deliveries of one destination that are to be asked for now, the oldest first."""
    sent_again = Delivery.sent_at > Commitment.requested_at
    rows = session.execute(
        select(Delivery, Result.sop_class_uid, Result.sop_instance_uid, Commitment)
        .join(Result, Result.result_id == Delivery.result_id)
        .outerjoin(Commitment, Commitment.delivery_id == Delivery.delivery_id)
        .where(
            Delivery.state == DeliveryState.SENT,
            Delivery.destination.in_(destinations),
            Result.sop_instance_uid.is_not(None),
            or_(Commitment.delivery_id.is_(None), Commitment.due_at <= now, sent_again),
            ~exists().where(Purge.job_id == Delivery.job_id),
        )
        .order_by(Delivery.sent_at, Delivery.delivery_id)
        .limit(limit)
    ).all()
    return [
        Uncommitted(
            delivery_id=delivery.delivery_id,
            destination=delivery.destination,
            sop_class_uid=sop_class_uid or "",
            sop_instance_uid=sop_instance_uid or "",
            requests=0 if commitment is None else commitment.requests,
        )
        for delivery, sop_class_uid, sop_instance_uid, commitment in rows
        if delivery.destination == rows[0].Delivery.destination
    ]


def begin_request(
    session: Session,
    deliveries: Sequence[Uncommitted],
    transaction_uid: str,
    *,
    due_at: datetime,
    now: datetime,
) -> None:
    """Write down that they are being asked for, before the peer can answer."""
    for each in deliveries:
        session.merge(
            Commitment(
                delivery_id=each.delivery_id,
                transaction_uid=transaction_uid,
                requests=each.requests + 1,
                due_at=due_at,
                requested_at=now,
            )
        )


def put_off(session: Session, transaction_uid: str, *, until: datetime, error: str) -> None:
    """The request did not get through: make it again then."""
    session.execute(
        update(Commitment)
        .where(Commitment.transaction_uid == transaction_uid, Commitment.committed_at.is_(None))
        .values(due_at=until, last_error=error)
    )


def take_report(
    session: Session,
    transaction_uid: str,
    stored: Collection[str],
    failed: Mapping[str, int],
    *,
    not_there: int,
    retry_after_s: float,
    now: datetime,
) -> Confirmation | None:
    """Apply a report; None if no request has this transaction UID.

    Parameters
    ----------
    failed : mapping of SOP Instance UID to failure reason
        ``not_there`` is the reason that says that the destination does not have the object.
    """
    rows = session.execute(
        select(Commitment, Delivery, Result.sop_instance_uid)
        .join(Delivery, Delivery.delivery_id == Commitment.delivery_id)
        .join(Result, Result.result_id == Delivery.result_id)
        .where(Commitment.transaction_uid == transaction_uid)
    ).all()
    if not rows:
        return None
    done: dict[str, list[str]] = {"committed": [], "not_there": [], "refused": []}
    for commitment, delivery, named in rows:
        uid = named or ""
        if uid in stored:
            kind, state = "committed", DeliveryState.COMMITTED
            commitment.committed_at, commitment.last_error = now, None
        elif uid in failed:
            commitment.last_error = (
                f"The destination does not confirm it: failure reason 0x{failed[uid]:04X}."
            )
            commitment.due_at = now + timedelta(seconds=retry_after_s)
            lost = failed[uid] == not_there
            kind = "not_there" if lost else "refused"
            state = DeliveryState.PENDING if lost else DeliveryState.SENT
        else:
            continue
        values = {"state": state} | (
            {"next_attempt_at": now, "created_at": now} if kind == "not_there" else {}
        )
        changed = change(
            session,
            update(Delivery)
            .where(Delivery.delivery_id == delivery.delivery_id, Delivery.state == DeliveryState.SENT)
            .values(**values),
        )
        if changed:
            done[kind].append(delivery.delivery_id)
    return Confirmation(rows[0].Delivery.destination, done["committed"], done["not_there"], done["refused"])


def park_uncommitted(session: Session, delivery_id: str, *, error: str) -> bool:
    """Set a delivery that nobody confirms aside for a person; False if it has changed meanwhile.

    Where the person sends it again, asking begins anew.
    """
    where = and_(Delivery.delivery_id == delivery_id, Delivery.state == DeliveryState.SENT)
    parked = change(
        session, update(Delivery).where(where).values(state=DeliveryState.PARKED, last_error=error)
    )
    if parked:
        session.execute(delete(Commitment).where(Commitment.delivery_id == delivery_id))
    return bool(parked)


def last_error_of(session: Session, delivery_id: str) -> str | None:
    """Why the destination has not confirmed a delivery, as far as it has said."""
    return session.scalar(select(Commitment.last_error).where(Commitment.delivery_id == delivery_id))
