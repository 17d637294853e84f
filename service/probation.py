"""After an activation: a version that fails here is rolled back by the node itself.

Before a worker gives a job to a version on probation, the golden case must come out right in that worker's
own runtime. After that, jobs are counted: when too many of them fail, the version goes. What it leaves as
failed is queued again for the version that stands in for it. Every such step alerts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from models.bundle import Bundle
from models.errors import RegistryError, SegnodeError
from models.registry import Registry
from service.errors import ConflictError
from service.gate import golden_figures
from service.gate_checks import judge_golden
from service.logs import get_logger
from service.records.database import Records, change, utc_now
from service.records.events import record_event
from service.records.governance_tables import Activation, ActivationState
from service.records.jobs import retry_job
from service.records.tables import Job, JobState
from service.settings import Settings
from service.trial import Trial
from service.watch import Stop

_ACTOR = "probation"

log = get_logger(__name__)


@dataclass(frozen=True)
class Tally:
    """The jobs of a version since its activation: how many have ended or failed once, and how they did."""

    total: int
    failing: int
    succeeded: int


class Probation:
    """Watches over the versions that were activated a short while ago.

    Parameters
    ----------
    settings, records, registry
        The node's.
    """

    def __init__(self, settings: Settings, records: Records, registry: Registry) -> None:
        self._settings = settings
        self._records = records
        self._registry = registry
        self._proven: set[str] = set()  # digests whose golden case came out right in this process

    def prove_active(self, stop: Stop) -> bool:
        """Run the golden case of a version on probation that this worker has not seen; False if none is.

        Raises StoppingError.
        """
        for activation in self._on_probation():
            if activation.model_digest in self._proven or not self._is_active(activation):
                continue
            self._prove(activation, stop)
            return True
        return False

    def sweep(self, now: datetime) -> int:
        """Look at the jobs of every version on probation; how many were confirmed or rolled back."""
        ended = 0
        for activation in self._on_probation():
            if not self._is_active(activation):
                ended += self._end(activation, ActivationState.REPLACED, now)
                continue
            with self._records.read() as session:
                tally = tally_of(session, activation)
            rules = self._settings.probation
            if tally.total >= rules.minimum_jobs and (
                tally.failing > rules.maximum_failure_fraction * tally.total
            ):
                why = f"{tally.failing} of {tally.total} jobs failed since it was activated."
                self._roll_back(activation, why, now)
                ended += 1
            elif tally.succeeded >= rules.jobs:
                ended += self._end(activation, ActivationState.CONFIRMED, now)
        return ended

    def _prove(self, activation: Activation, stop: Stop) -> None:
        try:
            bundle = self._registry.get(activation.model_name, activation.model_version)
        except SegnodeError as error:
            self._roll_back(activation, error.message, utc_now())
            return
        with Trial(self._settings, bundle, stop) as trial:
            check = judge_golden(golden_figures(trial, bundle))
        if check.passed:
            self._proven.add(bundle.digest)
            log.info("model.proven", model=f"{activation.model_name}@{activation.model_version}")
        else:
            self._roll_back(activation, check.sentence, utc_now())

    def _on_probation(self) -> list[Activation]:
        with self._records.read() as session:
            query = select(Activation).where(Activation.state == ActivationState.ON_PROBATION)
            return list(session.scalars(query.order_by(Activation.activated_at)))

    def _is_active(self, activation: Activation) -> bool:
        return self._registry.active_version(activation.model_name) == activation.model_version

    def _end(self, activation: Activation, state: ActivationState, now: datetime) -> int:
        """End a probation that ended well, or was overtaken; 0 if another process has done so."""
        with self._records.write() as session:
            ended = _mark(session, activation, state, None, now)
            if ended and state is ActivationState.CONFIRMED:
                subject = f"{activation.model_name}@{activation.model_version}"
                record_event(session, "model.confirmed", actor=_ACTOR, at=now, subject=subject)
        return ended

    def _roll_back(self, activation: Activation, why: str, now: datetime) -> None:
        name, version = activation.model_name, activation.model_version
        subject = f"{name}@{version}"
        to: Bundle | None = None
        try:
            to = self._registry.rollback(name, only_from=version)
        except RegistryError as error:
            if not self._is_active(activation):
                return  # another worker was faster
            log.error("model.not_rolled_back", model=subject, reason=error.message)
        state = ActivationState.ROLLED_BACK if to is not None else ActivationState.FAILED
        with self._records.write() as session:
            _mark(session, activation, state, why, now)
            again = _retry_failed(session, activation) if to is not None else 0
            detail = {
                "reason": why,
                "back_to": to.manifest.version if to is not None else None,
                "jobs_queued_again": again,
            }
            kind = "model.rolled_back_by_itself" if to is not None else "model.not_rolled_back"
            record_event(session, kind, actor=_ACTOR, at=now, subject=subject, alert=True, detail=detail)
        if to is not None:
            log.error("model.rolled_back_by_itself", model=subject, back_to=to.manifest.version, reason=why)


def tally_of(session: Session, activation: Activation) -> Tally:
    """Count the jobs that a version has run since an activation of it."""
    mine = (Job.model_digest == activation.model_digest, Job.started_at >= activation.activated_at)
    ended = Job.state.in_((JobState.SUCCEEDED, JobState.REFUSED, JobState.FAILED))
    failing = or_(Job.failures > 0, Job.state == JobState.FAILED)

    def count(*conditions: object) -> int:
        query = select(func.count()).select_from(Job).where(*mine, *conditions)  # type: ignore[arg-type]
        return session.scalar(query) or 0

    return Tally(count(or_(ended, failing)), count(failing), count(Job.state == JobState.SUCCEEDED))


def _mark(
    session: Session, activation: Activation, state: ActivationState, reason: str | None, now: datetime
) -> int:
    return change(
        session,
        update(Activation)
        .where(
            Activation.activation_id == activation.activation_id,
            Activation.state == ActivationState.ON_PROBATION,
        )
        .values(state=state, ended_at=now, reason=reason),
    )


def _retry_failed(session: Session, activation: Activation) -> int:
    """Queue again what failed on the version that has gone."""
    failed = session.scalars(
        select(Job.job_id).where(
            Job.model_digest == activation.model_digest,
            Job.started_at >= activation.activated_at,
            Job.state == JobState.FAILED,
            Job.requested_version.is_(None),
        )
    ).all()
    again = 0
    for job_id in failed:
        try:
            retry_job(session, job_id)
            again += 1
        except ConflictError:
            continue  # a newer job stands for its series
    return again
