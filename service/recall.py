"""Recall a version: withdraw it, hold back what has not left, and name every study that it touched.

What was delivered cannot be taken back by the node: the alert and the list say what a person has to look for,
at which destination, and under which SOP Instance UID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models.registry import Registry
from service.activation import end_probation
from service.records.database import Records, change
from service.records.events import record_event
from service.records.governance_tables import ActivationState
from service.records.tables import Delivery, DeliveryState, Job, JobState, Result

_HELD_BACK = "The version that made this was recalled. Retry the delivery to send it all the same."


@dataclass(frozen=True)
class TouchedDelivery:
    """One object that a version made, on its way to one destination."""

    job_id: str
    study_instance_uid: str | None
    delivery_id: str
    destination: str
    state: DeliveryState
    sop_instance_uid: str | None
    sent_at: datetime | None


@dataclass(frozen=True)
class Recall:
    """What a recall has found and done. ``deliveries`` are all that were ever made, sent or not."""

    name: str
    version: str
    studies: int
    jobs: int
    jobs_taken_back: int
    held_back: int
    deliveries: Sequence[TouchedDelivery]

    @property
    def delivered(self) -> list[TouchedDelivery]:
        """What has left the node."""
        return [d for d in self.deliveries if d.state in (DeliveryState.SENT, DeliveryState.COMMITTED)]


def recall(
    records: Records, registry: Registry, name: str, version: str, *, actor: str, now: datetime
) -> Recall:
    """Recall a version. Doing it again finds what has changed meanwhile.

    Jobs that run on it are taken from their workers and queued again, for whatever is active when they
    start. Deliveries that have not left are parked: a person lets them go, or not.

    Raises
    ------
    ModelUnknownError
        If the version is not installed.
    """
    registry.withdraw(name, version)
    mine = (Job.model_name == name, Job.model_version == version)
    with records.write(alone=True) as session:
        end_probation_of(session, registry, name, version, now)
        taken_back = change(
            session,
            update(Job)
            .where(*mine, Job.state == JobState.RUNNING)
            .values(state=JobState.QUEUED, lease_owner=None, lease_expires_at=None),
        )
        job_ids = select(Job.job_id).where(*mine)
        held_back = change(
            session,
            update(Delivery)
            .where(Delivery.job_id.in_(job_ids), Delivery.state == DeliveryState.PENDING)
            .values(
                state=DeliveryState.PARKED,
                last_error=_HELD_BACK,
                lease_owner=None,
                lease_expires_at=None,
            ),
        )
        jobs = session.execute(select(Job.job_id, Job.study_instance_uid).where(*mine)).all()
        found = Recall(
            name=name,
            version=version,
            studies=len({job.study_instance_uid for job in jobs} - {None}),
            jobs=len(jobs),
            jobs_taken_back=taken_back,
            held_back=held_back,
            deliveries=touched_deliveries(session, name, version),
        )
        _tell(session, found, actor=actor, now=now)
    return found


def touched_deliveries(session: Session, name: str, version: str) -> list[TouchedDelivery]:
    """Every delivery of what a version has made, the newest first."""
    rows = session.execute(
        select(Delivery, Job.study_instance_uid, Result.sop_instance_uid)
        .join(Job, Job.job_id == Delivery.job_id)
        .join(Result, Result.result_id == Delivery.result_id)
        .where(Job.model_name == name, Job.model_version == version)
        .order_by(Delivery.created_at.desc(), Delivery.delivery_id)
    )
    return [
        TouchedDelivery(
            job_id=delivery.job_id,
            study_instance_uid=study_instance_uid,
            delivery_id=delivery.delivery_id,
            destination=delivery.destination,
            state=delivery.state,
            sop_instance_uid=sop_instance_uid,
            sent_at=delivery.sent_at,
        )
        for delivery, study_instance_uid, sop_instance_uid in rows
    ]


def end_probation_of(session: Session, registry: Registry, name: str, version: str, now: datetime) -> None:
    """A recalled version is not watched any more."""
    if registry.active_version(name) == version:
        end_probation(session, name, ActivationState.REPLACED, now=now)


def _tell(session: Session, found: Recall, *, actor: str, now: datetime) -> None:
    """One alert for the recall, and a line for every job whose objects have left the node."""
    delivered: dict[str, list[TouchedDelivery]] = {}
    for each in found.delivered:
        delivered.setdefault(each.job_id, []).append(each)
    record_event(
        session,
        "model.recalled",
        actor=actor,
        at=now,
        subject=f"{found.name}@{found.version}",
        alert=True,
        detail={
            "studies": found.studies,
            "jobs": found.jobs,
            "jobs_taken_back": found.jobs_taken_back,
            "deliveries_held_back": found.held_back,
            "deliveries_that_left": len(found.delivered),
        },
    )
    for job_id, deliveries in delivered.items():
        objects = [{"destination": d.destination, "sop_instance_uid": d.sop_instance_uid} for d in deliveries]
        record_event(
            session,
            "result.recalled",
            actor=actor,
            at=now,
            subject=job_id,
            detail={"version": found.version, "delivered": objects},
        )
