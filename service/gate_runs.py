"""Gate runs: asked for over HTTP and run by a worker, or run at once by a command."""

from __future__ import annotations

import time
from datetime import datetime

from models.registry import Registry
from service.errors import LostClaimError
from service.gate import GateReport, run_gate
from service.logs import get_logger
from service.records.database import Records
from service.records.events import record_event
from service.records.gates import (
    claim_gate,
    finish_gate,
    oldest_waiting_since,
    release_gate,
    renew_gate,
    request_gate,
)
from service.records.governance_tables import Gate
from service.settings import Settings
from service.spool import Spool
from service.watch import Stop, StoppingError

_ACTOR = "gate"
_LEASE_S = 120.0
_RENEW_EVERY_S = 20.0

log = get_logger(__name__)


def ask_for_gate(
    records: Records,
    registry: Registry,
    name: str,
    version: str,
    *,
    accept_changed_labels: bool,
    actor: str,
    now: datetime,
) -> Gate:
    """Put a run of the gate into the queue.

    Raises
    ------
    ModelUnknownError, RegistryError, SignatureError
        If the version is not installed, or no longer what was.
    """
    bundle = registry.get(name, version)
    with records.write() as session:
        gate, is_new = request_gate(
            session,
            model_name=name,
            model_version=version,
            model_digest=bundle.digest,
            accept_changed_labels=accept_changed_labels,
            actor=actor,
            at=now,
        )
        if is_new:
            detail = {"gate_id": gate.gate_id, "accept_changed_labels": accept_changed_labels}
            subject = f"{name}@{version}"
            record_event(session, "gate.requested", actor=actor, at=now, subject=subject, detail=detail)
        return gate


class GateRunner:
    """Runs what waits at the gate, one version at a time.

    Parameters
    ----------
    settings, records, spool, registry
        The node's.
    owner : str
        Who holds a run while it is under way.
    """

    def __init__(
        self, settings: Settings, records: Records, spool: Spool, registry: Registry, *, owner: str
    ) -> None:
        self._settings = settings
        self._records = records
        self._spool = spool
        self._registry = registry
        self._owner = owner

    def is_overdue(self, now: datetime) -> bool:
        """True if a run has waited so long for a moment without jobs that it goes before them."""
        with self._records.read() as session:
            since = oldest_waiting_since(session, now=now)
        return since is not None and (now - since).total_seconds() >= self._settings.gate.longest_wait_s

    def run_one(self, stop: Stop) -> bool:
        """Run the version that is next; False if none waits. A stop gives it back."""
        with self._records.write() as session:
            gate = claim_gate(session, owner=self._owner, lease_s=_LEASE_S, now=self._records.now())
        if gate is None:
            return False
        self.run(gate, stop)
        return True

    def run(self, gate: Gate, stop: Stop) -> GateReport | None:
        """Take a claimed run to its end; None if it was given back or has been lost."""
        renewed = time.monotonic()

        def renew() -> None:
            nonlocal renewed
            if time.monotonic() - renewed > _RENEW_EVERY_S:
                renewed = time.monotonic()
                with self._records.write() as session:
                    renew_gate(session, gate.gate_id, gate.attempt, lease_s=_LEASE_S, now=self._records.now())

        accepted = bool(gate.report.get("accept_changed_labels"))
        try:
            report = run_gate(
                self._settings,
                self._records,
                self._spool,
                self._registry,
                gate.model_name,
                gate.model_version,
                accept_changed_labels=accepted,
                stop=stop,
                renew=renew,
            )
            self._finish(gate, report, accepted)
        except StoppingError:
            with self._records.write() as session:
                release_gate(session, gate.gate_id, gate.attempt)
            return None
        except LostClaimError:
            log.warning("gate.claim_lost", gate_id=gate.gate_id)
            return None
        return report

    def _finish(self, gate: Gate, report: GateReport, accepted: bool) -> None:
        now = self._records.now()
        subject = f"{gate.model_name}@{gate.model_version}"
        passed = report.passed and report.digest == gate.model_digest
        with self._records.write() as session:
            finish_gate(
                session,
                gate.gate_id,
                gate.attempt,
                passed=passed,
                against_version=report.against_version,
                against_digest=report.against_digest,
                report=report.content | {"accept_changed_labels": accepted},
                now=now,
            )
            detail = {"gate_id": gate.gate_id, "reasons": report.failed_sentences}
            kind = "gate.passed" if passed else "gate.failed"
            record_event(session, kind, actor=_ACTOR, at=now, subject=subject, detail=detail)
        log.info("gate.finished", model=subject, passed=passed)
