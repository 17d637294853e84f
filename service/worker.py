"""The worker: closes series, claims jobs and runs them, sends results, takes back what the dead have held.

Three loops share the process: jobs in the thread that calls :meth:`Worker.run`, housekeeping (completeness
and lapsed leases) and deliveries in threads of their own, so that a long job holds up neither. Where there is
a broker, its bell wakes the first, which then looks by itself only now and then; the others go by the clock.
An error that nobody foresaw ends none of the loops: it is logged with its place, and the loop goes on after a
pause.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol

from sqlalchemy import select

from models.registry import Registry
from models.resources import available_memory_bytes
from service.attempt import JobRunner
from service.commitment import Committer
from service.completeness import Completeness
from service.delivery import Deliverer
from service.errors import StorageFullError
from service.governance import Governance
from service.lease import LeaseOwner, is_proven_dead
from service.logs import get_logger
from service.records.database import LARGEST_CLOCK_OFFSET, Records
from service.records.events import record_event
from service.records.fleet import beat, sign_off
from service.records.jobs import claim_job
from service.records.leases import any_lease_lapsed, expire_leases, lease_owners, reap_lapsed_jobs
from service.records.tables import Job, JobState
from service.refusals import RefusalObjects
from service.retention import Retention
from service.settings import Settings
from service.spool import Spool

_ACTOR = "worker"
_PAUSE_AFTER_ERROR_S = 5.0
_BEAT_EVERY_S = 10.0
_TELL_OF_CLOCKS_EVERY_S = 60.0
_STOP_NOTICED_WITHIN_S = 0.2

log = get_logger(__name__)


class Bell(Protocol):
    """What wakes a worker: see :class:`service.tasks.Listener`."""

    @property
    def rings(self) -> int: ...

    @property
    def is_proven(self) -> bool: ...

    @property
    def silence_s(self) -> float | None: ...

    def wait(self, rings: int, timeout_s: float) -> bool: ...


class Worker:
    """Everything a node does between receiving a study and having delivered its results.

    Several workers may share one data folder and one database, on one host or on many.

    Parameters
    ----------
    settings, records, spool, registry
        The node's.
    bell : Bell or None
        Wakes it; without one it polls.
    """

    def __init__(
        self,
        settings: Settings,
        records: Records,
        spool: Spool,
        registry: Registry,
        *,
        bell: Bell | None = None,
    ) -> None:
        self.owner = str(LeaseOwner.of_this_process())
        self.runner = JobRunner(settings, records, spool, registry)
        self._settings = settings.worker
        self._records = records
        self._spool = spool
        self._completeness = Completeness(settings, records, spool)
        self._refusals = RefusalObjects(records, spool, settings.profile_keys)
        self._deliverer = Deliverer(settings, records, spool)
        self._committer = Committer(settings, records)
        self._retention = Retention(settings, records, spool)
        self._governance = Governance(settings, records, spool, registry, owner=self.owner)
        self._disk_is_full = False
        self._bell = bell
        self._memory_bytes = self._settings.memory_bytes or available_memory_bytes()
        self._beat_at = self._clocks_told_at = float("-inf")
        self._at_models_since: float | None = None

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set. A job that is under way is then given back unharmed."""
        threads = [
            threading.Thread(target=self._repeat, args=(step, stop), name=name)
            for name, step in (("housekeeping", self._keep_house), ("deliveries", self._deliver))
        ]
        for thread in threads:
            thread.start()
        try:
            self._repeat(lambda: self.run_one(stop), stop, self._bell)
        finally:
            stop.set()
            self.runner.close()
            for thread in threads:
                thread.join()
            with self._records.write() as session:
                sign_off(session, self.owner)

    def run_one(self, stop: threading.Event) -> bool:
        """Claim the next job and take it to an end, or do what there is to do about models.

        False if there is nothing to do, or no room for results.
        """
        self._beat()
        if not self._has_room():
            return False
        if self._at_models(self._governance.before_a_job, stop):
            return True
        with self._records.write() as session:
            job = claim_job(
                session,
                owner=self.owner,
                lease_s=self._settings.lease_s,
                now=self._records.now(),
                models=self._settings.models,
                memory_bytes=self._memory_bytes,
            )
        if job is None:
            return self._at_models(self._governance.when_idle, stop)
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

    def _at_models(self, work: Callable[[threading.Event], bool], stop: threading.Event) -> bool:
        """Do what there is to do about models. It may take long; housekeeping beats meanwhile."""
        self._at_models_since = time.monotonic()
        try:
            return work(stop)
        finally:
            self._at_models_since = None

    def _beat(self) -> None:
        """Write down, now and then, that jobs are being looked for. Called where they are, nowhere else."""
        if time.monotonic() - self._beat_at < _BEAT_EVERY_S:
            return
        silence_s = self._bell.silence_s if self._bell is not None else None
        now = self._records.now()
        with self._records.write() as session:
            beat(
                session,
                owner=self.owner,
                host=socket.gethostname()[:64],
                models=self._settings.models,
                memory_bytes=self._memory_bytes,
                bell_heard_at=now - timedelta(seconds=silence_s) if silence_s is not None else None,
                now=now,
            )
        self._beat_at = time.monotonic()

    def _tell_of_clocks(self) -> None:
        """Say now and then that this host's clock is wrong; leases go by the database's."""
        if time.monotonic() - self._clocks_told_at < _TELL_OF_CLOCKS_EVERY_S:
            return
        offset = self._records.compare_clocks()
        self._clocks_told_at = time.monotonic()
        if abs(offset) > LARGEST_CLOCK_OFFSET:
            log.warning("worker.clock_differs", by_s=round(offset.total_seconds(), 1))

    def _keep_house(self) -> bool:
        self._tell_of_clocks()
        since = self._at_models_since
        if since is not None and time.monotonic() - since < self._settings.job_deadline_s:
            self._beat()
        self.reap(self._records.now())
        now = self._records.now()
        jobs = self._completeness.sweep(now)
        self._governance.probation.sweep(now)
        self._retention.sweep(now)
        return jobs + self._refusals.sweep(now) > 0

    def _deliver(self) -> bool:
        return self._deliverer.run_once(self._records.now()) or self._committer.run_once(self._records.now())

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
                        session,
                        "worker.disk_full",
                        actor=_ACTOR,
                        at=self._records.now(),
                        alert=True,
                        detail=detail,
                    )
            return False
        self._disk_is_full = False
        return True

    def _repeat(self, step: Callable[[], bool], stop: threading.Event, bell: Bell | None = None) -> None:
        """Do a step again and again: at once while there is work, else when the bell rings or time is up."""
        while not stop.is_set():
            rings = bell.rings if bell is not None else 0
            try:
                if step():
                    continue
            except Exception:
                log.exception("worker.step_failed", thread=threading.current_thread().name)
                stop.wait(_PAUSE_AFTER_ERROR_S)
                continue
            self._rest(bell, rings, stop)

    def _rest(self, bell: Bell | None, rings: int, stop: threading.Event) -> None:
        """Wait for the bell, and no longer than the poll interval: the longer one if the bell is proven."""
        if bell is None or not bell.is_proven:
            stop.wait(self._settings.poll_interval_s)
            return
        end = time.monotonic() + self._settings.idle_poll_interval_s
        while not stop.is_set() and (left_s := end - time.monotonic()) > 0 and bell.is_proven:
            if bell.wait(rings, min(left_s, _STOP_NOTICED_WITHIN_S)):
                return
