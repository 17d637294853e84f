"""The worker: closes series, claims jobs and runs them, sends results, takes back what the dead have held.

Three loops share the process: jobs in the thread that calls :meth:`Worker.run`, housekeeping (completeness
and lapsed leases) and deliveries in threads of their own, so that a long job holds up neither. An error
that nobody foresaw ends none of the loops: it is logged with its place, and the loop goes on after a pause.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import select

from models.registry import Registry
from service.attempt import JobRunner
from service.completeness import Completeness
from service.delivery import Deliverer
from service.errors import StorageFullError
from service.lease import LeaseOwner, is_proven_dead
from service.logs import get_logger
from service.records.database import Records, utc_now
from service.records.events import record_event
from service.records.jobs import claim_job, reap_lapsed_jobs
from service.records.leases import any_lease_lapsed, expire_leases, lease_owners
from service.records.tables import Job, JobState
from service.refusals import RefusalObjects
from service.settings import Settings
from service.spool import Spool

_ACTOR = "worker"
_PAUSE_AFTER_ERROR_S = 5.0

log = get_logger(__name__)


class Worker:
    """Everything a node does between receiving a study and having delivered its results.

    Several workers may share one data folder and one database.

    Parameters
    ----------
    settings, records, spool, registry
        The node's.
    """

    def __init__(self, settings: Settings, records: Records, spool: Spool, registry: Registry) -> None:
        self.owner = str(LeaseOwner.of_this_process())
        self.runner = JobRunner(settings, records, spool, registry)
        self._settings = settings.worker
        self._records = records
        self._spool = spool
        self._completeness = Completeness(settings, records, spool)
        self._refusals = RefusalObjects(records, spool, settings.profile_keys)
        self._deliverer = Deliverer(settings, records, spool)
        self._disk_is_full = False

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set. A job that is under way is then given back unharmed."""
        threads = [
            threading.Thread(target=self._repeat, args=(step, stop), name=name)
            for name, step in (("housekeeping", self._keep_house), ("deliveries", self._deliver))
        ]
        for thread in threads:
            thread.start()
        try:
            self._repeat(lambda: self.run_one(stop), stop)
        finally:
            stop.set()
            self.runner.close()
            for thread in threads:
                thread.join()

    def run_one(self, stop: threading.Event) -> bool:
        """Claim the next job and take it to an end; False if there is none, or no room for its results."""
        if not self._has_room():
            return False
        with self._records.write() as session:
            job = claim_job(session, owner=self.owner, lease_s=self._settings.lease_s, now=utc_now())
        if job is None:
            return False
        log.info("job.claimed", job_id=job.job_id, attempt=job.attempt)
        self.runner.run(job, stop)
        return True

    def reap(self, now: datetime) -> list[str]:
        """Take back the jobs of workers that are dead: proven so on this host, else by their lapsed leases.

        Returns the identifiers of the jobs.
        """
        with self._records.read() as session:
            dead = [owner for owner in lease_owners(session) if is_proven_dead(owner)]
            if not dead and not any_lease_lapsed(session, now=now):
                return []
        with self._records.write() as session:
            expire_leases(session, dead, now=now)
            reaped = reap_lapsed_jobs(session, maximum_lapses=self._settings.maximum_lapses, now=now)
            for job in session.scalars(select(Job).where(Job.job_id.in_(reaped))):
                failed = job.state is JobState.FAILED
                record_event(
                    session,
                    "job.failed" if failed else "job.lapsed",
                    actor=_ACTOR,
                    at=now,
                    subject=job.job_id,
                    alert=failed,
                    detail={"attempt": job.attempt, "lapses": job.lapses},
                )
        for job_id in reaped:
            log.warning("job.lapsed", job_id=job_id)
        return reaped

    def _keep_house(self) -> bool:
        self.reap(utc_now())
        jobs = self._completeness.sweep(utc_now())
        return jobs + self._refusals.sweep(utc_now()) > 0

    def _deliver(self) -> bool:
        return self._deliverer.run_once(utc_now())

    def _has_room(self) -> bool:
        """False while results would eat into the reserve of the disk; says so once."""
        try:
            self._spool.check_reserve()
        except StorageFullError as error:
            if not self._disk_is_full:
                self._disk_is_full = True
                log.error("worker.disk_full", free_bytes=self._spool.free_bytes())
                with self._records.write() as session:
                    detail = {"code": error.code}
                    record_event(
                        session, "worker.disk_full", actor=_ACTOR, at=utc_now(), alert=True, detail=detail
                    )
            return False
        self._disk_is_full = False
        return True

    def _repeat(self, step: Callable[[], bool], stop: threading.Event) -> None:
        """Do a step again and again: at once while there is work, else at the poll interval."""
        while not stop.is_set():
            try:
                pause_s = 0.0 if step() else self._settings.poll_interval_s
            except Exception:
                log.exception("worker.step_failed", thread=threading.current_thread().name)
                pause_s = _PAUSE_AFTER_ERROR_S
            stop.wait(pause_s)
