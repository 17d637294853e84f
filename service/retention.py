"""What is done goes, after its time or when the disk runs low; what is not done stays, however long it takes.

A study is done when all of its series are complete, every job of it has ended well or in a refusal, and every
delivery has arrived: ``sent``, or ``committed`` where the destination is asked to confirm. What is parked,
what has failed and what a golden case of the site rests on is never purged; a person decides about it.

The files go, and the rows of instances and series with them. The rows of jobs, results and deliveries stay:
a recall must name every study that a version has touched. The same input that comes in again is known by
them, and is not computed twice; an upload is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import and_, delete, exists, func, not_, or_, select, update
from sqlalchemy.orm import Session

from service.deletion import unlink_files
from service.logs import get_logger
from service.records.database import Records
from service.records.events import record_event
from service.records.governance_tables import Purge, SiteCase
from service.records.tables import (
    Delivery,
    DeliveryState,
    Instance,
    Job,
    JobInput,
    JobOrigin,
    JobState,
    RefusalObject,
    Result,
    Series,
    SeriesState,
)
from service.settings import Settings
from service.spool import Spool

_ACTOR = "retention"
_BATCH = 200

log = get_logger(__name__)


@dataclass(frozen=True)
class Purged:
    """What a sweep has removed."""

    studies: int = 0
    uploads: int = 0
    files: int = 0
    size_bytes: int = 0


class Retention:
    """Purges by age, and by watermark the oldest first.

    Parameters
    ----------
    settings, records, spool
        The node's.
    """

    def __init__(self, settings: Settings, records: Records, spool: Spool) -> None:
        self._rules = settings.retention
        self._records = records
        self._spool = spool
        self._confirming = tuple(d.name for d in settings.destinations if d.storage_commitment)
        self._next_at: datetime | None = None

    def sweep(self, now: datetime) -> Purged:
        """Purge what is due, if the last sweep is long enough ago."""
        if self._next_at is not None and now < self._next_at:
            return Purged()
        self._next_at = now + timedelta(seconds=self._rules.interval_s)
        purged: list[Purged] = []
        if self._rules.maximum_age_days is not None:
            before = now - timedelta(days=self._rules.maximum_age_days)
            purged += self._purge_until(before, now, enough=lambda: False)
        below = self._rules.purge_below_free_bytes
        if below is not None and self._spool.free_bytes() < below:
            before = now - timedelta(hours=self._rules.keep_at_least_hours)
            wanted = self._rules.purge_up_to_free_bytes or below
            purged += self._purge_until(before, now, enough=lambda: self._spool.free_bytes() >= wanted)
        total = Purged(
            sum(p.studies for p in purged),
            sum(p.uploads for p in purged),
            sum(p.files for p in purged),
            sum(p.size_bytes for p in purged),
        )
        if purged:
            log.info("retention.purged", **vars(total))
        return total

    def _purge_until(self, before: datetime, now: datetime, *, enough: Callable[[], bool]) -> list[Purged]:
        """Purge what was last touched before a time, the oldest first, until it is enough."""
        purged = []
        with self._records.read() as session:
            due = [*self._studies(session, before), *self._uploads(session, before)]
        for _, kind, identifier in sorted(due):
            if enough():
                break
            done = (
                self._purge_study(identifier, before, now)
                if kind == "study"
                else self._purge_upload(identifier, before, now)
            )
            if done is not None:
                purged.append(done)
        return purged

    def _studies(self, session: Session, before: datetime) -> list[tuple[datetime, str, str]]:
        """Studies of which nothing has come in since, by when it was; whether they are done is seen later."""
        last = func.max(Instance.received_at)
        rows = session.execute(
            select(Instance.study_instance_uid, last)
            .group_by(Instance.study_instance_uid)
            .having(last < before)
            .order_by(last)
        )
        return [(at, "study", uid) for uid, at in rows]

    def _uploads(self, session: Session, before: datetime) -> list[tuple[datetime, str, str]]:
        rows = session.execute(
            select(Job.job_id, Job.finished_at)
            .where(
                Job.origin == JobOrigin.UPLOAD,
                Job.finished_at < before,
                ~exists().where(Purge.job_id == Job.job_id),
            )
            .order_by(Job.finished_at)
        )
        return [(at, "upload", job_id) for job_id, at in rows if at is not None]

    def _purge_study(self, study_instance_uid: str, before: datetime, now: datetime) -> Purged | None:
        """Purge a study if it is done; None if it is not."""
        with self._records.write(alone=True) as session:
            instances = session.scalars(
                select(Instance).where(Instance.study_instance_uid == study_instance_uid)
            ).all()
            series = session.scalars(
                select(Series).where(Series.study_instance_uid == study_instance_uid)
            ).all()
            if not instances or any(each.received_at >= before for each in instances):
                return None
            if any(each.state is SeriesState.RECEIVING for each in series):
                return None
            jobs = _jobs_that_use(session, [each.instance_id for each in instances])
            if not all(self._is_done(session, job, before) for job in jobs):
                return None
            paths = {each.path for each in instances} | self._forget_files(session, jobs, now)
            session.execute(
                update(Job)
                .where(Job.series_id.in_([each.series_id for each in series]))
                .values(series_id=None)
            )
            session.execute(delete(Instance).where(Instance.study_instance_uid == study_instance_uid))
            session.execute(delete(Series).where(Series.study_instance_uid == study_instance_uid))
            purged = Purged(1, 0, *unlink_files(self._spool, paths))
            detail = {"jobs": len(jobs), "instances": len(instances), "files": purged.files}
            record_event(
                session, "study.purged", actor=_ACTOR, at=now, subject=study_instance_uid, detail=detail
            )
        return purged

    def _purge_upload(self, job_id: str, before: datetime, now: datetime) -> Purged | None:
        with self._records.write(alone=True) as session:
            job = session.get(Job, job_id)
            if job is None or not self._is_done(session, job, before):
                return None
            paths = self._forget_files(session, [job], now)
            job.input_key = f"purged:{job_id}"  # the same file may be uploaded and computed again
            purged = Purged(0, 1, *unlink_files(self._spool, paths))
            record_event(session, "job.purged", actor=_ACTOR, at=now, subject=job_id)
        return purged

    def _is_done(self, session: Session, job: Job, before: datetime) -> bool:
        """Whether nothing is left to be done about a job, and nobody has asked for it to stay."""
        if job.state not in (JobState.SUCCEEDED, JobState.REFUSED, JobState.CANCELLED):
            return False
        if job.finished_at is None or job.finished_at >= before:
            return False
        if job.state is JobState.REFUSED and job.refusal_object is RefusalObject.WANTED:
            return False
        if session.scalar(select(exists().where(SiteCase.job_id == job.job_id))):
            return False
        arrived = or_(
            Delivery.state.in_((DeliveryState.COMMITTED, DeliveryState.CANCELLED)),
            and_(Delivery.state == DeliveryState.SENT, Delivery.destination.not_in(self._confirming)),
        )
        recent = Delivery.sent_at >= before
        left = exists().where(Delivery.job_id == job.job_id, or_(not_(arrived), recent))
        return not session.scalar(select(left))

    def _forget_files(self, session: Session, jobs: Sequence[Job], now: datetime) -> set[str]:
        """Mark jobs as purged, and return the files that were theirs."""
        job_ids = [job.job_id for job in jobs]
        results = session.scalars(select(Result.path).where(Result.job_id.in_(job_ids)))
        uploaded = session.scalars(
            select(JobInput.path).where(JobInput.job_id.in_(job_ids), JobInput.instance_id.is_(None))
        )
        paths = {*results, *uploaded}
        session.execute(delete(JobInput).where(JobInput.job_id.in_(job_ids)))
        known = set(session.scalars(select(Purge.job_id).where(Purge.job_id.in_(job_ids))))
        session.add_all(Purge(job_id=job_id, purged_at=now) for job_id in job_ids if job_id not in known)
        return paths


def _jobs_that_use(session: Session, instance_ids: Iterable[str]) -> list[Job]:
    """The jobs that read any of these instances, those of another study too."""
    wanted, found = list(instance_ids), dict[str, Job]()
    for start in range(0, len(wanted), _BATCH):
        batch = wanted[start : start + _BATCH]
        used = select(JobInput.job_id).where(JobInput.instance_id.in_(batch))
        for job in session.scalars(select(Job).where(Job.job_id.in_(used))):
            found[job.job_id] = job
    return list(found.values())
