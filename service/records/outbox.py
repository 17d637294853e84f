"""Which results go to which destinations: one delivery for each pair that belongs together.

An object was made for a profile, and goes to the destinations that have it; an object of no profile goes to
all. Nothing that a destination should get is dropped: where no object of its profile was made, because the
configuration has changed meanwhile, the objects of another are queued for it and parked, and so is an object
that was made to be withheld. A person can let either go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from sqlalchemy.orm import Session

from service.records.database import announce_work
from service.records.events import record_event
from service.records.tables import Delivery, DeliveryState, Job, Result, ResultKind, new_identifier

_ACTOR = "delivery"
_OTHER_PROFILE = (
    "The destination's profile was changed since this was made: it is in another form than the profile says. "
    "Retry the delivery to send it all the same."
)


def queue_deliveries(
    session: Session,
    job: Job,
    results: Sequence[Result],
    destinations: Iterable[str],
    profile_keys: Mapping[str, str],
    *,
    at: datetime,
) -> None:
    """Put deliveries into the queue; those that are parked at once raise an alert.

    Parameters
    ----------
    results : sequence of Result
        Those of the job; files that are no DICOM objects stay here.
    destinations : iterable of str
        Names.
    profile_keys : mapping of str to str
        The key of every destination's profile. A destination without one is not configured any more.
    """
    objects = [result for result in results if result.sop_instance_uid is not None]
    for destination in destinations:
        chosen, parked_for = _chosen(objects, profile_keys.get(destination))
        for result in chosen:
            reason = parked_for or result.withheld
            delivery = Delivery(
                delivery_id=new_identifier(),
                result_id=result.result_id,
                job_id=job.job_id,
                destination=destination,
                state=DeliveryState.PARKED if reason else DeliveryState.PENDING,
                last_error=reason,
                next_attempt_at=at,
                created_at=at,
            )
            session.add(delivery)
            announce_work(session)
            if reason:
                record_event(
                    session,
                    "delivery_parked",
                    actor=_ACTOR,
                    at=at,
                    subject=delivery.delivery_id,
                    alert=True,
                    detail={"destination": destination, "reason": reason},
                )


def is_result(result: Result) -> bool:
    """True for what a job was made for; a refusal object says that there is no such thing."""
    return result.kind is not ResultKind.REFUSAL


def _chosen(objects: Sequence[Result], key: str | None) -> tuple[list[Result], str | None]:
    """The objects that a destination with this profile gets, and why they are parked, if they are."""
    made = list(dict.fromkeys(result.profile for result in objects if result.profile is not None))
    other = bool(made) and key not in made
    wanted = made[0] if other else key
    chosen = [result for result in objects if result.profile in (None, wanted)]
    return chosen, _OTHER_PROFILE if other and key is not None else None
