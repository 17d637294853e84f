"""The pages. Each shows what a function of the interface returns, or calls one and goes back.

A page that the audit trail tells of bears the name of its operation: see :mod:`service.api.trail`.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Form, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import select

from models.errors import ModelChangedError
from service.api import audit, deliveries, destinations, governance, jobs, models, segmentations, studies
from service.api.access import forget_session, keep_session, session_secret, visible_job
from service.api.governance_schemas import GateRequest, ShadowRequest
from service.api.paging import AfterIdentifier, Identifier, ModelName, StudyUid, StudyUidAfter, Version
from service.api.schemas import Activation, segmentation
from service.api.state import ApiState, State
from service.console.frame import (
    PREFIX,
    ConsoleRoute,
    PosterDep,
    VisitorDep,
    back_to,
    safe_next,
    show,
)
from service.errors import NotFoundError
from service.keys import authenticate
from service.records.events import record_event
from service.records.tables import DeliveryState, Job, JobState
from service.sessions import begin_session, end_session

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute, include_in_schema=False)

Said = Annotated[str, Query(max_length=300)]
_PAGE_LENGTH = 50
_REFRESH_S = 10


def build_console(app: FastAPI, state: ApiState) -> None:
    """Add the operator's page to the application of the interface."""
    for path in ("/", PREFIX, f"{PREFIX}/"):  # as people type it; before the router, which takes any path
        app.add_api_route(path, _beginning, include_in_schema=False)
    app.include_router(router)


def _beginning() -> RedirectResponse:
    return RedirectResponse(f"{PREFIX}/queue", HTTPStatus.SEE_OTHER)


@router.get("/console.css")
def stylesheet() -> Response:
    css = resources.files("service.console").joinpath("static/console.css").read_bytes()
    return Response(css, media_type="text/css")


# Coming and going ------------------------------------------------------------------------------------------


@router.get("/login")
def login_page(request: Request, state: State, next: str = "") -> Response:  # noqa: A002 - of the address
    return _ask_to_log_in(request, state, next)


def _ask_to_log_in(
    request: Request, state: ApiState, wanted: str, *, wrong: bool = False, status: int = HTTPStatus.OK
) -> Response:
    address = safe_next(wanted)
    provider = f"/auth/login?next={quote(address)}" if state.provider is not None else None
    return show(
        request, "login.html", visitor=None, status=status, next=address, provider=provider, wrong=wrong
    )


@router.post("/login")
def log_in(
    request: Request,
    state: State,
    key: Annotated[str, Form(max_length=256)],
    next: Annotated[str, Form(max_length=512)] = "",  # noqa: A002
) -> Response:
    now = state.clock()
    with state.records.write() as session:
        found = authenticate(session, key.strip(), now)
        client = request.client.host if request.client else "unknown"
        record_event(
            session,
            "console.login" if found else "console.login_refused",
            actor=found.name if found else client,
            at=now,
            subject=found.key_id if found else "",
        )
        secret = None
        if found is not None:
            if (before := session_secret(request, state)) is not None:
                end_session(session, before)  # whoever was there, in this browser
            secret = begin_session(session, found.key_id, state.settings.http.sessions, now=now)
    if secret is None:
        return _ask_to_log_in(request, state, next, wrong=True, status=HTTPStatus.UNAUTHORIZED)
    response = RedirectResponse(safe_next(next), HTTPStatus.SEE_OTHER)
    keep_session(response, state, secret, samesite="strict")
    return response


@router.post("/logout")
def log_out(request: Request, state: State, visitor: PosterDep) -> Response:
    response = back_to("login")
    secret = session_secret(request, state)
    with state.records.write() as session:
        if secret is not None:
            end_session(session, secret)
        record_event(
            session,
            "logout",
            actor=visitor.caller.name,
            at=state.clock(),
            subject=visitor.caller.key_id,
        )
    forget_session(response, state)
    return response


# The queue and its jobs ------------------------------------------------------------------------------------


@router.get("/queue")
def queue(
    request: Request,
    state: State,
    visitor: VisitorDep,
    of: JobState | None = None,
    after: AfterIdentifier = None,
    live: bool = True,
    said: Said = "",
) -> Response:
    page = jobs.list_jobs(
        state, visitor.require("list_jobs"), job_state=of, model=None, limit=_PAGE_LENGTH, after=after
    )
    return show(
        request,
        "queue.html",
        visitor=visitor,
        page=page,
        of=of,
        states=list(JobState),
        refresh_s=_REFRESH_S if live and after is None else None,
        said=said,
    )


@router.get("/jobs/{job_id}", name="read_segmentation")
def job(request: Request, state: State, visitor: VisitorDep, job_id: Identifier, said: Said = "") -> Response:
    caller = visitor.require("read_segmentation")
    with state.records.read() as session:
        document = segmentation(visible_job(session, caller, job_id))
    return show(request, "job.html", visitor=visitor, job=document, said=said)


@router.get("/jobs/{job_id}/preview.png", name="read_preview")
def preview(state: State, visitor: VisitorDep, job_id: Identifier) -> Response:
    return segmentations.read_preview(job_id, state, visitor.require("read_preview"))


@router.post("/jobs/{job_id}/retry")
def retry_job(state: State, visitor: PosterDep, job_id: Identifier) -> Response:
    jobs.retry_job(job_id, state, visitor.require("retry_job"))
    return back_to(f"jobs/{job_id}", "The job waits again.")


# Studies ---------------------------------------------------------------------------------------------------


@router.get("/studies")
def study_list(
    request: Request, state: State, visitor: VisitorDep, after: StudyUidAfter = None, said: Said = ""
) -> Response:
    page = studies.list_studies(state, visitor.require("list_studies"), limit=_PAGE_LENGTH, after=after)
    with state.records.read() as session:
        uids = [item.study_instance_uid for item in page.items]
        rows = session.scalars(
            select(Job).where(Job.study_instance_uid.in_(uids)).order_by(Job.created_at, Job.job_id)
        )
        newest = {str(row.study_instance_uid): segmentation(row) for row in rows}  # the last one stays
    return show(request, "studies.html", visitor=visitor, page=page, newest=newest, said=said)


@router.get("/studies/{study_instance_uid}", name="read_study")
def study(
    request: Request, state: State, visitor: VisitorDep, study_instance_uid: StudyUid, said: Said = ""
) -> Response:
    document = studies.read_study(study_instance_uid, state, visitor.require("read_study"))
    return show(request, "study.html", visitor=visitor, study=document, said=said)


# Deliveries and destinations -------------------------------------------------------------------------------


@router.get("/deliveries")
def delivery_list(
    request: Request,
    state: State,
    visitor: VisitorDep,
    of: DeliveryState | None = None,
    after: AfterIdentifier = None,
    said: Said = "",
) -> Response:
    page = deliveries.list_deliveries(
        state,
        visitor.require("list_deliveries"),
        delivery_state=of,
        destination=None,
        limit=_PAGE_LENGTH,
        after=after,
    )
    return show(
        request, "deliveries.html", visitor=visitor, page=page, of=of, states=list(DeliveryState), said=said
    )


@router.post("/deliveries/{delivery_id}/retry")
def retry_delivery(state: State, visitor: PosterDep, delivery_id: Identifier) -> Response:
    deliveries.retry_delivery(delivery_id, state, visitor.require("retry_delivery"))
    return back_to("deliveries", "The delivery waits again.")


@router.get("/destinations")
def destination_list(request: Request, state: State, visitor: VisitorDep, said: Said = "") -> Response:
    listed = destinations.list_destinations(state, visitor.require("list_destinations"))
    return show(request, "destinations.html", visitor=visitor, destinations=listed, said=said)


@router.post("/destinations/{name}/echo")
def echo(state: State, visitor: PosterDep, name: destinations.DestinationName) -> Response:
    answer = destinations.echo_destination(name, state, visitor.require("echo_destination"))
    said = f"{name} answered C-ECHO." if answer.answered else f"{name} did not answer: {answer.error}"
    return back_to("destinations", said[:300])


# Models ----------------------------------------------------------------------------------------------------


@router.get("/models")
def model_list(request: Request, state: State, visitor: VisitorDep, said: Said = "") -> Response:
    caller = visitor.require("list_models")
    listed = models.list_models(state, caller)
    gates = {
        (model.name, version.version): _found(
            governance.read_gate, model.name, version.version, state, caller
        )
        for model in listed
        for version in model.versions
    }
    shadows = {model.name: _found(governance.read_shadow, model.name, state, caller) for model in listed}
    return show(
        request, "models.html", visitor=visitor, models=listed, gates=gates, shadows=shadows, said=said
    )


def _found(read: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the interface reads, or None where there is nothing to read."""
    try:
        return read(*arguments)
    except NotFoundError:
        return None


@router.post("/models/{name}/{version}/gate")
def run_gate(
    state: State,
    visitor: PosterDep,
    name: ModelName,
    version: Version,
    accept_changed_labels: Annotated[bool, Form()] = False,
) -> Response:
    wanted = GateRequest(accept_changed_labels=accept_changed_labels)
    governance.run_gate(name, version, wanted, state, visitor.require("run_gate"))
    return back_to("models", f"{name} {version} goes through the gate as soon as no job waits.")


@router.post("/models/{name}/{version}/shadow")
def start_shadow(state: State, visitor: PosterDep, name: ModelName, version: Version) -> Response:
    governance.start_shadow(name, ShadowRequest(version=version), state, visitor.require("start_shadow"))
    return back_to("models", f"{name} {version} runs beside the active version; nothing of it leaves.")


@router.post("/models/{name}/shadow/stop")
def stop_shadow(state: State, visitor: PosterDep, name: ModelName) -> Response:
    governance.stop_shadow(name, state, visitor.require("stop_shadow"))
    return back_to("models", f"Shadow mode of {name} has ended.")


@router.post("/models/{name}/activate")
def activate(
    request: Request,
    state: State,
    visitor: PosterDep,
    name: ModelName,
    version: Annotated[str, Form(max_length=64)],
    accept_changed_labels: Annotated[bool, Form()] = False,
) -> Response:
    caller = visitor.require("activate_model")
    wanted = Activation(version=version, accept_changed_labels=accept_changed_labels)
    try:
        models.activate_model(name, wanted, state, caller)
    except ModelChangedError as error:
        values: dict[str, Any] = {"name": name, "version": version, "sentence": error.message}
        return show(request, "confirm.html", visitor=visitor, status=409, **values)
    return back_to("models", f"{name} {version} is active. Jobs that run finish on the version before.")


@router.post("/models/{name}/rollback")
def roll_back(state: State, visitor: PosterDep, name: ModelName) -> Response:
    document = models.roll_back_model(name, state, visitor.require("roll_back_model"))
    return back_to("models", f"{name} is back on {document.active_version}.")


# The audit trail -------------------------------------------------------------------------------------------


@router.get("/audit", name="list_events")
def events(
    request: Request,
    state: State,
    visitor: VisitorDep,
    alert: bool = False,
    after: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
) -> Response:
    page = audit.list_events(
        state, visitor.require("list_events"), kind=None, alert=alert or None, limit=_PAGE_LENGTH, after=after
    )
    return show(request, "audit.html", visitor=visitor, page=page, alert=alert, said="")


@router.get("/{path:path}")
def elsewhere(path: str) -> Response:
    """An address of the console that it does not have. It is the last one, and takes what is left."""
    raise NotFoundError(f"There is no page {path[:80]!r} here.", remedy="Choose one from the menu.")
