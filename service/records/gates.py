"""The life of a gate run: queued -> running -> passed | failed. The newest run of a version counts."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session

from service.errors import LostClaimError
from service.records.database import change
from service.records.governance_tables import Gate, GateState

_MAXIMUM_ATTEMPTS = 3
_COMMAND_LEASE_S = 120.0
_WAITING = (GateState.QUEUED, GateState.RUNNING)


def request_gate(
    session: Session,
    *,
    model_name: str,
    model_version: str,
    model_digest: str,
    accept_changed_labels: bool,
    actor: str,
    at: datetime,
) -> tuple[Gate, bool]:
    """Ask for a run of the gate; the one that waits or runs already, where there is one. And: is it new."""
    waiting = session.scalar(
        select(Gate)
        .where(
            Gate.model_name == model_name,
            Gate.model_version == model_version,
            Gate.model_digest == model_digest,
            Gate.state.in_(_WAITING),
        )
        .limit(1)
    )
    if waiting is not None and waiting.report.get("accept_changed_labels") == accept_changed_labels:
        return waiting, False
    gate = Gate(
        model_name=model_name,
        model_version=model_version,
        model_digest=model_digest,
        requested_by=actor,
        requested_at=at,
        report={"accept_changed_labels": accept_changed_labels},
    )
    session.add(gate)
    session.flush()
    return gate, True


def latest_gate(session: Session, model_name: str, model_version: str) -> Gate | None:
    """The newest run for a version, whatever its state."""
    return session.scalar(
        select(Gate)
        .where(Gate.model_name == model_name, Gate.model_version == model_version)
        .order_by(Gate.requested_at.desc(), Gate.gate_id.desc())
        .limit(1)
    )


def oldest_waiting_since(session: Session, *, now: datetime) -> datetime | None:
    """Since when the run that is next has been waiting; None where there is none."""
    return session.scalar(select(Gate.requested_at).where(_is_due(now)).order_by(Gate.requested_at).limit(1))


def claim_gate(session: Session, *, owner: str, lease_s: float, now: datetime) -> Gate | None:
    """Take the run that is next, or one whose holder has died; None if there is none."""
    while True:
        candidate = session.execute(
            select(Gate.gate_id, Gate.attempt).where(_is_due(now)).order_by(Gate.requested_at).limit(1)
        ).one_or_none()
        if candidate is None:
            return None
        lost = candidate.attempt >= _MAXIMUM_ATTEMPTS
        values: dict[str, Any] = {
            "state": GateState.RUNNING,
            "attempt": Gate.attempt + 1,
            "lease_owner": owner,
            "lease_expires_at": now + timedelta(seconds=lease_s),
        }
        if lost:
            check = {
                "name": "run",
                "passed": False,
                "sentence": f"The process that ran the gate died {_MAXIMUM_ATTEMPTS} times.",
            }
            values = {
                "state": GateState.FAILED,
                "finished_at": now,
                "lease_owner": None,
                "lease_expires_at": None,
                "report": {"schema_version": 1, "passed": False, "checks": [check]},
            }
        taken = change(
            session,
            update(Gate)
            .where(Gate.gate_id == candidate.gate_id, Gate.attempt == candidate.attempt, _is_due(now))
            .values(**values),
        )
        if taken and not lost:
            return session.get(Gate, candidate.gate_id, populate_existing=True)


def take_gate(session: Session, gate_id: str, *, owner: str, now: datetime) -> Gate:
    """Take a certain run, even from another holder, whose report is then void."""
    session.execute(
        update(Gate)
        .where(Gate.gate_id == gate_id)
        .values(
            state=GateState.RUNNING,
            attempt=Gate.attempt + 1,
            lease_owner=owner,
            lease_expires_at=now + timedelta(seconds=_COMMAND_LEASE_S),
        )
    )
    return session.get_one(Gate, gate_id, populate_existing=True)


def renew_gate(session: Session, gate_id: str, attempt: int, *, lease_s: float, now: datetime) -> None:
    """Hold a run longer. Raises LostClaimError."""
    _report(session, gate_id, attempt, lease_expires_at=now + timedelta(seconds=lease_s))


def release_gate(session: Session, gate_id: str, attempt: int) -> None:
    """Give a run back unharmed. Raises LostClaimError."""
    values = {"state": GateState.QUEUED, "lease_owner": None, "lease_expires_at": None}
    _report(session, gate_id, attempt, **values, attempt=Gate.attempt - 1)


def finish_gate(
    session: Session,
    gate_id: str,
    attempt: int,
    *,
    passed: bool,
    against_version: str | None,
    against_digest: str | None,
    report: dict[str, Any],
    now: datetime,
) -> None:
    """Write down what a run has found. Raises LostClaimError."""
    _report(
        session,
        gate_id,
        attempt,
        state=GateState.PASSED if passed else GateState.FAILED,
        finished_at=now,
        lease_owner=None,
        lease_expires_at=None,
        against_version=against_version,
        against_digest=against_digest,
        report=report,
    )


def _is_due(now: datetime) -> Any:
    lapsed = and_(Gate.state == GateState.RUNNING, Gate.lease_expires_at < now)
    return or_(Gate.state == GateState.QUEUED, lapsed)


def _report(session: Session, gate_id: str, held_attempt: int, /, **values: Any) -> None:
    changed = change(
        session,
        update(Gate)
        .where(Gate.gate_id == gate_id, Gate.attempt == held_attempt, Gate.state == GateState.RUNNING)
        .values(**values),
    )
    if not changed:
        raise LostClaimError(f"The gate run {gate_id} is no longer held by attempt {held_attempt}.")
