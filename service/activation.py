"""Make a version the active one, and go back: with the gate before it and a line in the records after it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models.bundle import Bundle
from models.errors import ModelUnknownError
from models.registry import Registry
from service.errors import GateError
from service.records.database import Records
from service.records.events import record_event
from service.records.gates import latest_gate
from service.records.governance_tables import Activation, ActivationState, Gate, GateState
from service.settings import ModelSettings


def activate(
    records: Records,
    registry: Registry,
    settings: ModelSettings,
    name: str,
    version: str,
    *,
    actor: str,
    now: datetime,
    accept_changed_labels: bool = False,
    override_reason: str | None = None,
) -> Bundle:
    """Make a version the active one; new jobs run on it from now.

    Parameters
    ----------
    override_reason : str, optional
        Why it is activated without a passed gate. It stands in the audit trail, with who did it, and alerts.

    Raises
    ------
    GateError
        If the gate is asked for, and the version has not passed it against what is active now.
    ModelUnknownError, ModelWithdrawnError, ModelChangedError, RegistryError, BundleError
        As :meth:`models.registry.Registry.activate` does.
    """
    before = registry.active_version(name)
    candidate = registry.get(name, version)
    if before == version or registry.is_withdrawn(name, version):
        return registry.activate(name, version)  # nothing to do; or the refusal of a withdrawn one
    gate = None
    if settings.require_gate:
        with records.read() as session:
            gate = latest_gate(session, name, version)
        if override_reason is None:
            _require_passed(gate, registry, candidate)
    bundle = registry.activate(name, version, accept_changed_labels=accept_changed_labels)
    gate_id = gate.gate_id if gate is not None else None
    with records.write() as session:
        begin_probation(
            session,
            bundle,
            previous_version=before,
            gate_id=gate_id,
            override_reason=override_reason,
            actor=actor,
            now=now,
        )
        subject = f"{name}@{version}"
        detail: dict[str, Any] = {"digest": bundle.digest, "before": before, "gate_id": gate_id}
        record_event(session, "model.activated", actor=actor, at=now, subject=subject, detail=detail)
        if override_reason is not None:
            why = {"reason": override_reason, "gate": gate.state.value if gate is not None else "never run"}
            record_event(
                session,
                "model.gate_overridden",
                actor=actor,
                at=now,
                subject=subject,
                alert=True,
                detail=why | {"gate_id": gate_id},
            )
    return bundle


def roll_back(records: Records, registry: Registry, name: str, *, actor: str, now: datetime) -> Bundle:
    """Go back to the version that was active before.

    Raises
    ------
    ModelUnknownError
        If the model has no active version.
    RegistryError
        If there is nothing to go back to.
    """
    before = registry.active_version(name)
    if before is None:
        raise ModelUnknownError(
            f"The model {name!r} has no active version here.",
            remedy=f"Models here: {', '.join(registry.names()) or 'none'}.",
        )
    bundle = registry.rollback(name)
    with records.write() as session:
        end_probation(session, name, ActivationState.REPLACED, now=now)
        subject = f"{name}@{bundle.manifest.version}"
        detail = {"digest": bundle.digest, "before": before}
        record_event(session, "model.rolled_back", actor=actor, at=now, subject=subject, detail=detail)
    return bundle


def begin_probation(
    session: Session,
    bundle: Bundle,
    *,
    previous_version: str | None,
    gate_id: str | None,
    override_reason: str | None,
    actor: str,
    now: datetime,
) -> Activation:
    """Write down an activation; the one before it has been replaced."""
    name = bundle.manifest.name
    end_probation(session, name, ActivationState.REPLACED, now=now)
    activation = Activation(
        model_name=name,
        model_version=bundle.manifest.version,
        model_digest=bundle.digest,
        previous_version=previous_version,
        state=ActivationState.ON_PROBATION,
        gate_id=gate_id,
        override_reason=override_reason,
        activated_by=actor,
        activated_at=now,
    )
    session.add(activation)
    session.flush()
    return activation


def end_probation(session: Session, name: str, state: ActivationState, *, now: datetime) -> None:
    """End the probation of whatever version of a model is on it."""
    session.execute(
        update(Activation)
        .where(Activation.model_name == name, Activation.state == ActivationState.ON_PROBATION)
        .values(state=state, ended_at=now)
    )


def activations(session: Session, name: str, *, limit: int = 50) -> list[Activation]:
    """The activations of a model, the newest first."""
    query = select(Activation).where(Activation.model_name == name)
    return list(session.scalars(query.order_by(Activation.activated_at.desc()).limit(limit)))


def _require_passed(gate: Gate | None, registry: Registry, candidate: Bundle) -> None:
    """Return only if this gate run is one that lets this version in now. Raises GateError."""
    manifest = candidate.manifest
    name, version = manifest.name, manifest.version
    run_it = f"Run the gate: segnode models gate {name} {version}, or POST to its /gate."
    if gate is None:
        raise GateError(f"Version {version} of {name!r} has not been through the gate.", remedy=run_it)
    if gate.state in (GateState.QUEUED, GateState.RUNNING):
        raise GateError(
            f"Version {version} of {name!r} is at the gate ({gate.state}).", remedy="Wait for its report."
        )
    if gate.state is GateState.FAILED:
        reasons = " ".join(c["sentence"] for c in gate.report.get("checks", ()) if not c["passed"])
        raise GateError(
            f"Version {version} of {name!r} has not passed the gate. {reasons}",
            remedy="Read the gate's report; an administrator may override it, with a reason.",
        )
    active_version = registry.active_version(name)
    withdrawn = active_version is not None and registry.is_withdrawn(name, active_version)
    against = None if withdrawn else active_version
    if gate.model_digest != candidate.digest or gate.against_version != against:
        compared = gate.against_version or "no version"
        raise GateError(
            f"Version {version} of {name!r} passed the gate beside {compared};"
            f" now {against or 'no version'} is active.",
            remedy=run_it,
        )
