"""``/models``: which models the node has, which version is active, and how that is changed."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from models.bundle import Bundle
from models.errors import BundleError, ModelUnknownError, RegistryError
from models.registry import Registry
from service.activation import activate, roll_back
from service.api.access import Caller, CallerDep
from service.api.multipart import declared_length, receive_form, require_json
from service.api.paging import AfterIdentifier, Limit, ModelName, Version, page
from service.api.problem import ProblemError, problem_responses
from service.api.schemas import (
    API_PREFIX,
    Activation,
    ModelDocument,
    ModelVersion,
    Page,
    RecalledDelivery,
    RecalledJob,
)
from service.api.state import ApiState, State
from service.records.events import record_event
from service.records.tables import Delivery, Job, Result

router = APIRouter(tags=["models"])

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["bundle"],
                    "properties": {
                        "bundle": {
                            "type": "string",
                            "format": "binary",
                            "description": "A model bundle as one .zip.",
                        }
                    },
                }
            }
        },
    }
}


@router.get("/models")
def list_models(state: State, _caller: CallerDep) -> list[ModelDocument]:
    """Every model with its versions, the withdrawn ones too."""
    return [_model(state.registry, name) for name in state.registry.names()]


def _model(registry: Registry, name: str) -> ModelDocument:
    return ModelDocument(
        name=name,
        active_version=registry.active_version(name),
        versions=[_version(registry, name, version) for version in registry.versions(name)],
    )


def _version(registry: Registry, name: str, version: str) -> ModelVersion:
    bundle, fault = None, None
    try:
        bundle = registry.get(name, version)
    except (BundleError, RegistryError) as error:  # one bad version must not hide the others
        fault = f"{error.message} {error.remedy}".strip()
    return ModelVersion(
        version=version,
        digest=bundle.digest if bundle else None,
        title=bundle.manifest.title if bundle else None,
        channels=[channel.name for channel in bundle.manifest.channels] if bundle else [],
        labels=[label.name for label in bundle.manifest.labels] if bundle else [],
        active=registry.active_version(name) == version,
        withdrawn=registry.is_withdrawn(name, version),
        fault=fault,
    )


@router.post(
    "/models",
    status_code=HTTPStatus.CREATED,
    openapi_extra=_FORM,
    responses={
        201: {
            "description": "The version, verified and installed, not active yet",
            "headers": {"Location": {"schema": {"type": "string"}}},
        },
        **problem_responses(409, 415, 507),
    },
)
async def add_model(request: Request, response: Response, state: State, caller: CallerDep) -> ModelVersion:
    """Upload a bundle. It is installed if its digests, its signature where asked for, its graphs and its
    golden case are in order; activating it is another step.
    """
    upload = await run_in_threadpool(
        state.desk.begin, declared_length(request), maximum_bytes=state.settings.models.maximum_bundle_bytes
    )
    try:
        await receive_form(request, upload, file_field="bundle", field_names=frozenset())
        if len(upload.files) != 1:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "INVALID_REQUEST",
                f"{len(upload.files)} bundles were sent, where one is taken.",
                remedy="Send one .zip in the field bundle.",
            )
        async with state.adding_model:
            bundle = await run_in_threadpool(state.registry.add, upload.files[0].path)
    finally:
        await run_in_threadpool(upload.close)
    await run_in_threadpool(partial(_record, state, caller, "model.added", bundle))
    name, version = bundle.manifest.name, bundle.manifest.version
    response.headers["Location"] = f"{API_PREFIX}/models/{name}/{version}/studies"
    return await run_in_threadpool(_version, state.registry, name, version)


@router.post(
    "/models/{name}/activate",
    dependencies=[Depends(require_json)],
    responses=problem_responses(404, 409, 415),
)
def activate_model(name: ModelName, activation: Activation, state: State, caller: CallerDep) -> ModelDocument:
    """Make a version the active one, once it has passed the gate. Jobs that run finish on the version that
    they began with.
    """
    activate(
        state.records,
        state.registry,
        state.settings.models,
        name,
        activation.version,
        actor=caller.name,
        now=state.clock(),
        accept_changed_labels=activation.accept_changed_labels,
        override_reason=activation.override_reason,
    )
    return _model(state.registry, name)


@router.post("/models/{name}/rollback", responses=problem_responses(404, 409))
def roll_back_model(name: ModelName, state: State, caller: CallerDep) -> ModelDocument:
    """Go back to the version that was active before."""
    roll_back(state.records, state.registry, name, actor=caller.name, now=state.clock())
    return _model(state.registry, name)


@router.post("/models/{name}/{version}/withdraw", responses=problem_responses(404, 409))
def withdraw_model(name: ModelName, version: Version, state: State, caller: CallerDep) -> ModelDocument:
    """Withdraw a version for good: it starts no job from now on."""
    state.registry.withdraw(name, version)
    with state.records.write() as session:
        record_event(
            session,
            "model.withdrawn",
            actor=caller.name,
            at=state.clock(),
            subject=f"{name}@{version}",
            alert=state.registry.active_version(name) == version,  # until another one is activated
        )
    return _model(state.registry, name)


@router.get("/models/{name}/{version}/studies", responses=problem_responses(404))
def list_studies_of_model(
    name: ModelName,
    version: Version,
    state: State,
    _caller: CallerDep,
    limit: Limit = 50,
    after: AfterIdentifier = None,
) -> Page[RecalledJob]:
    """Every job that a version has run, with its study and where its results went: what a recall needs."""
    if version not in state.registry.versions(name):
        raise ModelUnknownError(f"There is no version {version!r} of the model {name!r} here.")
    query = select(Job).where(Job.model_name == name, Job.model_version == version)
    with state.records.read() as session:
        rows = page(session, query, time=Job.created_at, key=Job.job_id, after=after, limit=limit)
        items = [_recalled(session, row.Job) for row in rows[:limit]]
    return Page(items=items, next=items[-1].job_id if len(rows) > limit else None)


def _recalled(session: Session, job: Job) -> RecalledJob:
    deliveries = session.execute(
        select(Delivery, Result.sop_instance_uid)
        .join(Result, Result.result_id == Delivery.result_id)
        .where(Delivery.job_id == job.job_id)
        .order_by(Delivery.created_at, Delivery.delivery_id)
    ).all()
    return RecalledJob(
        job_id=job.job_id,
        study_instance_uid=job.study_instance_uid,
        state=job.state,
        model_digest=job.model_digest,
        finished_at=job.finished_at,
        deliveries=[
            RecalledDelivery(
                delivery_id=delivery.delivery_id,
                destination=delivery.destination,
                state=delivery.state,
                sop_instance_uid=sop_instance_uid,
                sent_at=delivery.sent_at,
            )
            for delivery, sop_instance_uid in deliveries
        ],
    )


def _record(state: ApiState, caller: Caller, kind: str, bundle: Bundle, **detail: Any) -> None:
    with state.records.write() as session:
        record_event(
            session,
            kind,
            actor=caller.name,
            at=state.clock(),
            subject=f"{bundle.manifest.name}@{bundle.manifest.version}",
            detail={"digest": bundle.digest, **detail},
        )
