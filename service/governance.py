"""The work of a worker on models rather than on studies: probation, gate and shadow, around its jobs."""

from __future__ import annotations

import time

from sqlalchemy import exists, or_, select

from models.registry import Registry
from service.gate_runs import GateRunner
from service.probation import Probation
from service.records.database import Records
from service.records.tables import Job, JobState
from service.settings import Settings
from service.shadow import ShadowRunner
from service.spool import Spool
from service.watch import Stop, StoppingError

_LOOK_EVERY_S = 0.5


class Governance:
    """What a worker does about models before it takes a job, and when there is none.

    Parameters
    ----------
    settings, records, spool, registry
        The node's.
    owner : str
        The worker, as it holds leases.
    """

    def __init__(
        self, settings: Settings, records: Records, spool: Spool, registry: Registry, *, owner: str
    ) -> None:
        self.probation = Probation(settings, records, registry)
        self._gates = GateRunner(settings, records, spool, registry, owner=owner)
        self._shadows = ShadowRunner(settings, records, spool, registry)
        self._records = records

    def before_a_job(self, stop: Stop) -> bool:
        """Prove a version that was just activated, or run a gate that has waited too long; False if none."""
        try:
            if self.probation.prove_active(stop):
                return True
        except StoppingError:
            return False
        return self._gates.is_overdue(self._records.now()) and self._gates.run_one(stop)

    def when_idle(self, stop: Stop) -> bool:
        """Run a gate, or compare a study in shadow mode; both make way for a job that comes in."""
        making_way = MakingWay(stop, self._records)
        return self._gates.run_one(making_way) or self._shadows.run_one(making_way)


class MakingWay:
    """A stop that is also set as soon as a job is due. Looks into the records now and then."""

    def __init__(self, stop: Stop, records: Records) -> None:
        self._stop = stop
        self._records = records
        self._looked_at = time.monotonic()
        self._job_is_due = False

    def is_set(self) -> bool:
        now = time.monotonic()
        if not self._job_is_due and now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            self._job_is_due = _is_any_job_due(self._records)
        return self._job_is_due or self._stop.is_set()


def _is_any_job_due(records: Records) -> bool:
    due = or_(Job.not_before.is_(None), Job.not_before <= records.now())
    with records.read() as session:
        return bool(session.scalar(select(exists().where(Job.state == JobState.QUEUED, due))))
