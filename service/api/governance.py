"""Under ``/models``: gate, shadow mode, activations and recall, how versions come into use and out of it."""

from __future__ import annotations

from http import HTTPStatus
from statistics import fmean

from fastapi import APIRouter, Depends
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models.errors import ModelUnknownError
from service import recall as recalls
from service import shadow as shadows
from service.activation import activations
from service.api.access import CallerDep
from service.api.governance_schemas import (
    ActivationDocument,
    CheckDocument,
    ComparisonDocument,
    GateDocument,
    GateRequest,
    LabelComparison,
    RecallDocument,
    RecalledObject,
    ShadowDocument,
    ShadowRequest,
)
from service.api.multipart import require_json
from service.api.paging import Limit, ModelName, Version
from service.api.problem import problem_responses
from service.api.state import State
from service.errors import NotFoundError
from service.gate_runs import ask_for_gate
from service.records.gates import latest_gate
from service.records.governance_tables import Comparison, ComparisonState, Gate, Shadow

router = APIRouter(tags=["models"])


@router.get("/models/{name}/activations", responses=problem_responses(404))
def list_activations(
    name: ModelName, state: State, _caller: CallerDep, limit: Limit = 50
) -> list[ActivationDocument]:
    """Which versions were made the active one, by whom, and how each has stood the test; newest first."""
    if name not in state.registry.names():
        raise ModelUnknownError(f"There is no model {name!r} here.")
    with state.records.read() as session:
        return [
            ActivationDocument(
                version=each.model_version,
                digest=each.model_digest,
                previous_version=each.previous_version,
                state=each.state,
                gate_id=each.gate_id,
                override_reason=each.override_reason,
                activated_by=each.activated_by,
                activated_at=each.activated_at,
                ended_at=each.ended_at,
                reason=each.reason,
            )
            for each in activations(session, name, limit=limit)
        ]


@router.get("/models/{name}/{version}/gate", responses=problem_responses(404))
def read_gate(name: ModelName, version: Version, state: State, _caller: CallerDep) -> GateDocument:
    """The newest run of the gate for a version."""
    with state.records.read() as session:
        gate = latest_gate(session, name, version)
    if gate is None:
        raise NotFoundError(
            f"Version {version} of {name!r} has not been through the gate.", remedy="POST here to run it."
        )
    return _gate(gate)


@router.post(
    "/models/{name}/{version}/gate",
    status_code=HTTPStatus.ACCEPTED,
    dependencies=[Depends(require_json)],
    responses=problem_responses(404, 409, 415),
)
def run_gate(
    name: ModelName, version: Version, wanted: GateRequest, state: State, caller: CallerDep
) -> GateDocument:
    """Put a version to the test: a worker runs it as soon as no job waits. GET tells how it came out."""
    gate = ask_for_gate(
        state.records,
        state.registry,
        name,
        version,
        accept_changed_labels=wanted.accept_changed_labels,
        actor=caller.name,
        now=state.clock(),
    )
    return _gate(gate)


def _gate(gate: Gate) -> GateDocument:
    return GateDocument(
        gate_id=gate.gate_id,
        model=gate.model_name,
        version=gate.model_version,
        digest=gate.model_digest,
        against_version=gate.against_version,
        state=gate.state,
        requested_by=gate.requested_by,
        requested_at=gate.requested_at,
        finished_at=gate.finished_at,
        checks=[CheckDocument.model_validate(check) for check in gate.report.get("checks", [])],
        report=gate.report,
    )


@router.get("/models/{name}/shadow", responses=problem_responses(404))
def read_shadow(name: ModelName, state: State, _caller: CallerDep, limit: Limit = 50) -> ShadowDocument:
    """What is, or was last, in shadow mode, and the table of comparisons with the active version."""
    with state.records.read() as session:
        shadow = shadows.latest_shadow(session, name)
        if shadow is None:
            raise NotFoundError(
                f"No version of {name!r} has been in shadow mode.", remedy="POST to start it."
            )
        return _shadow(session, shadow, limit)


@router.post(
    "/models/{name}/shadow",
    status_code=HTTPStatus.CREATED,
    dependencies=[Depends(require_json)],
    responses=problem_responses(404, 409, 415),
)
def start_shadow(name: ModelName, wanted: ShadowRequest, state: State, caller: CallerDep) -> ShadowDocument:
    """Run a version beside the active one, on the studies that are finished from now on. Nothing leaves."""
    shadow = shadows.start_shadow(
        state.records, state.registry, name, wanted.version, actor=caller.name, now=state.clock()
    )
    with state.records.read() as session:
        return _shadow(session, shadow, 1)


@router.delete("/models/{name}/shadow", responses=problem_responses(404))
def stop_shadow(name: ModelName, state: State, caller: CallerDep) -> ShadowDocument:
    """End shadow mode; the table stays."""
    shadow = shadows.stop_shadow(state.records, name, actor=caller.name, now=state.clock())
    with state.records.read() as session:
        return _shadow(session, shadow, 50)


def _shadow(session: Session, shadow: Shadow, limit: int) -> ShadowDocument:
    rows = session.scalars(
        select(Comparison)
        .where(Comparison.shadow_id == shadow.shadow_id)
        .order_by(Comparison.created_at.desc(), Comparison.comparison_id)
    ).all()
    done = [row for row in rows if row.state is ComparisonState.DONE]
    active_s = [row.active_seconds for row in done if row.active_seconds is not None]
    peak = session.scalar(
        select(func.max(Comparison.peak_bytes)).where(Comparison.shadow_id == shadow.shadow_id)
    )
    return ShadowDocument(
        model=shadow.model_name,
        version=shadow.model_version,
        digest=shadow.model_digest,
        running=shadow.stopped_at is None,
        started_by=shadow.started_by,
        started_at=shadow.started_at,
        stopped_by=shadow.stopped_by,
        stopped_at=shadow.stopped_at,
        compared=len(done),
        failed=len(rows) - len(done),
        mean_seconds=fmean(row.seconds or 0.0 for row in done) if done else None,
        mean_active_seconds=fmean(active_s) if active_s else None,
        peak_bytes=peak,
        labels=_labels(done),
        comparisons=[ComparisonDocument.model_validate(row) for row in rows[:limit]],
    )


def _labels(done: list[Comparison]) -> dict[str, LabelComparison]:
    figures: dict[str, list[dict[str, float]]] = {}
    for row in done:
        for name, each in row.labels.items():
            figures.setdefault(name, []).append(each)
    return {
        name: LabelComparison(
            studies=len(each),
            mean_dice=fmean(one["dice"] for one in each),
            lowest_dice=min(one["dice"] for one in each),
            mean_difference_ml=fmean(one["difference_ml"] for one in each),
            largest_difference_ml=max((one["difference_ml"] for one in each), key=abs),
        )
        for name, each in sorted(figures.items())
    }


@router.post("/models/{name}/{version}/recall", responses=problem_responses(404, 409))
def recall_model(name: ModelName, version: Version, state: State, caller: CallerDep) -> RecallDocument:
    """Withdraw a version, hold back what has not left, and name every object that has."""
    found = recalls.recall(state.records, state.registry, name, version, actor=caller.name, now=state.clock())
    return RecallDocument(
        model=name,
        version=version,
        studies=found.studies,
        jobs=found.jobs,
        jobs_taken_back=found.jobs_taken_back,
        deliveries_held_back=found.held_back,
        deliveries_that_left=len(found.delivered),
        deliveries=[RecalledObject.model_validate(each) for each in found.deliveries],
    )
