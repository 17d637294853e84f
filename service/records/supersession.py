"""What becomes of older jobs when a newer one is made for the same series, or for the same study.

A late slice makes a new job, and the new one stands for the series from then on:

- a correction does the same, also where it puts the images into another study;
- older jobs that have not ended are cancelled at once, since their input is not the series any more;
- what older jobs have produced stays, and is still delivered, until the newer job has succeeded; then every
  delivery of theirs that has not left is cancelled. Where the newer job is refused or fails, the older
  result remains the only one there is, and goes out.

A result that has left cannot be called back: the newer job names the older one (``supersedes_job_id``), its
objects and measurements name the older objects, the older job names the newer one, and an alert says what had
been delivered where.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import Select, or_, select, update
from sqlalchemy.orm import Session, aliased

from service.records.database import change
from service.records.events import record_event
from service.records.jobs import enqueue
from service.records.outbox import is_result, queue_deliveries
from service.records.refusals import add_refusal_destinations
from service.records.tables import Delivery, DeliveryState, Instance, Job, JobInput, JobState, Result
from service.records.work import NewJob

_NOT_ENDED = (JobState.QUEUED, JobState.RUNNING)


def enqueue_newest(
    session: Session,
    new: NewJob,
    *,
    at: datetime,
    one_per_study: bool = False,
    profile_keys: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Job, bool]:
    """Put a job into the queue, and cancel the older ones of its series and model that have not ended.

    Where the job is there already, its destinations are completed by those of ``new``, and of both priorities
    it gets the higher.

    Parameters
    ----------
    new : NewJob
        As for :func:`service.records.jobs.enqueue`.
    one_per_study : bool
        The route takes one series of a study: jobs of the same route for other series of the study are
        superseded too.
    profile_keys : mapping of str to str
        The key of every destination's profile.

    Returns
    -------
    tuple of Job and bool
        The job, and whether it is new.
    """
    job, is_new = enqueue(session, new, at=at)
    if not is_new:
        job.priority = max(job.priority, new.priority)
        add_destinations(session, job, new.destinations, profile_keys, at=at)
        add_refusal_destinations(session, job, new.refusal_destinations, profile_keys, at=at)
        return job, False
    of_the_same = [Job.series_id == new.series_id] if new.series_id else []
    if one_per_study and new.study_instance_uid:
        in_study = Job.study_instance_uid == new.study_instance_uid
        of_the_same.append(in_study & (Job.route_name == new.route_name))
    if any(each.instance_id for each in new.inputs):
        of_the_same.append(Job.job_id.in_(_jobs_of_earlier_revisions(job.job_id)))
    if not of_the_same:
        return job, True
    older = session.scalars(
        select(Job)
        .where(Job.job_id != job.job_id, Job.model_name == job.model_name, or_(*of_the_same))
        .order_by(Job.created_at.desc(), Job.job_id)
    ).all()
    if older:
        job.supersedes_job_id = older[0].job_id
        session.execute(
            update(Job)
            .where(Job.job_id.in_([old.job_id for old in older]), Job.state.in_(_NOT_ENDED))
            .values(state=JobState.CANCELLED, finished_at=at, lease_owner=None, lease_expires_at=None)
        )
        session.flush()
    return job, True


def _jobs_of_earlier_revisions(job_id: str) -> Select[Any]:
    """The jobs that had used what was corrected into this job's input, in another study maybe."""
    present, earlier, used = aliased(Instance), aliased(Instance), aliased(JobInput)
    return (
        select(used.job_id)
        .join(earlier, earlier.instance_id == used.instance_id)
        .join(
            present,
            (present.sop_instance_uid == earlier.sop_instance_uid)
            & (present.series_instance_uid == earlier.series_instance_uid)
            & (present.revision > earlier.revision),
        )
        .join(JobInput, JobInput.instance_id == present.instance_id)
        .where(JobInput.job_id == job_id, present.revision > 1)
    )


def refuse_at_once(
    session: Session,
    new: NewJob,
    *,
    code: str,
    reason: str,
    remedy: str,
    at: datetime,
    one_per_study: bool,
    profile_keys: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Job, bool]:
    """Record a job that is refused before it runs, so that the refusal is seen like every other.

    Returns the job, and whether it is new; the same input again changes nothing.
    """
    job, is_new = enqueue_newest(session, new, at=at, one_per_study=one_per_study, profile_keys=profile_keys)
    if is_new:
        job.state = JobState.REFUSED
        job.finished_at = at
        job.reason_code, job.reason, job.remedy = code, reason, remedy
        session.flush()
    return job, is_new


def add_destinations(
    session: Session, job: Job, destinations: Iterable[str], profile_keys: Mapping[str, str], *, at: datetime
) -> None:
    """Let a job's results go to further destinations; results that exist are queued for them now."""
    further = [name for name in destinations if name not in job.destinations]
    if not further:
        return
    job.destinations = [*job.destinations, *further]
    if job.state is JobState.SUCCEEDED:
        results = session.scalars(select(Result).where(Result.job_id == job.job_id).order_by(Result.path))
        queue_deliveries(session, job, [r for r in results if is_result(r)], further, profile_keys, at=at)
    session.flush()


def superseded_jobs(session: Session, job_id: str) -> list[Job]:
    """The job that this one supersedes, the one that was superseded by that, and so on."""
    chain: list[Job] = []
    older = session.get_one(Job, job_id).supersedes_job_id
    while older is not None:
        chain.append(session.get_one(Job, older))
        older = chain[-1].supersedes_job_id
    return chain


def superseded_results(session: Session, job_id: str) -> list[Result]:
    """The DICOM objects that this job's result will supersede, newest job first."""
    found: list[Result] = []
    for job in superseded_jobs(session, job_id):
        found += session.scalars(
            select(Result)
            .where(Result.job_id == job.job_id, Result.sop_instance_uid.is_not(None))
            .order_by(Result.sop_instance_uid)
        )
    return found


def superseded_objects(session: Session, job_id: str) -> list[str]:
    """SOP Instance UIDs of the objects that this job's result will supersede, newest job first."""
    return [str(result.sop_instance_uid) for result in superseded_results(session, job_id)]


def supersede(session: Session, job_id: str, *, now: datetime) -> int:
    """A job has succeeded: its result stands for those of older jobs from now on.

    What they have not delivered is cancelled, each of them names the newer job in its summary, and an alert
    tells what had left already, and what is on its way at this moment. Returns how many deliveries were
    cancelled.
    """
    older = superseded_jobs(session, job_id)
    cancelled = cancel_superseded_deliveries(session, job_id, now=now)
    for job in older:
        job.summary = {**job.summary, "superseded_by_job_id": job_id}
    left = session.execute(
        select(Delivery.delivery_id, Delivery.destination, Delivery.state, Result.sop_instance_uid)
        .join(Result, Result.result_id == Delivery.result_id)
        .where(
            Delivery.job_id.in_([job.job_id for job in older]),
            Delivery.state != DeliveryState.CANCELLED,
        )
        .order_by(Delivery.created_at, Delivery.delivery_id)
    ).all()
    if left:
        record_event(
            session,
            "result.superseded",
            actor="supersession",
            at=now,
            subject=job_id,
            alert=True,
            detail={
                "supersedes": [job.job_id for job in older],
                "delivered": [
                    {"delivery_id": d, "destination": to, "state": state.value, "sop_instance_uid": uid}
                    for d, to, state, uid in left
                ],
            },
        )
    return cancelled


def cancel_superseded_deliveries(session: Session, job_id: str, *, now: datetime) -> int:
    """A job has succeeded: cancel what older jobs have not delivered yet. Returns how many it were.

    A delivery that is being sent at this moment is left alone, so that the records never say of an object
    that it was cancelled when it has arrived.
    """
    older = [job.job_id for job in superseded_jobs(session, job_id)]
    return change(
        session,
        update(Delivery)
        .where(
            Delivery.job_id.in_(older),
            Delivery.state.in_((DeliveryState.PENDING, DeliveryState.PARKED)),
            or_(Delivery.lease_expires_at.is_(None), Delivery.lease_expires_at < now),
        )
        .values(state=DeliveryState.CANCELLED, lease_owner=None, lease_expires_at=None),
    )
