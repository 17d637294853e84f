"""``/healthz``, ``/readyz`` and ``/metrics``: for orchestrators and Prometheus.

The first two are open and tell nothing but yes and no. Metrics name models, destinations and figures of the
work; they are open where only this machine can reach the listener, and take an operator's key elsewhere.
"""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from models.errors import SegnodeError
from models.registry import Registry
from service.api.access import Credentials, check_role, identify
from service.api.middleware import is_loopback
from service.api.problem import problem_responses
from service.api.schemas import Health, Readiness
from service.api.state import State
from service.errors import StorageFullError
from service.logs import get_logger
from service.metrics import is_usable, render_metrics
from service.records.database import Records
from service.records.tables import Job, Role
from service.spool import Spool

router = APIRouter(tags=["health"])

log = get_logger(__name__)


@router.get("/healthz", responses=problem_responses(400, 413, 421))
def read_health() -> Health:
    """Whether the process answers."""
    return Health()


@router.get(
    "/readyz",
    responses={503: {"model": Readiness, "description": "Not ready"}, **problem_responses(400, 413, 421)},
)
def read_readiness(state: State, response: Response) -> Readiness:
    """Whether the node can do its work: records reachable, room on the disk, a model active."""
    records, spool = _records_ready(state.records), _spool_ready(state.spool)
    model = _model_ready(state.registry)
    readiness = Readiness(ready=records and spool and model, records=records, spool=spool, model=model)
    if not readiness.ready:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return readiness


def _records_ready(records: Records) -> bool:
    try:
        with records.read() as session:
            session.execute(select(Job.job_id).limit(1))  # that there are tables, too
    except SQLAlchemyError as error:
        log.error("readiness.records", exc_info=error)
        return False
    return True


def _spool_ready(spool: Spool) -> bool:
    try:
        spool.check_space()
    except (StorageFullError, OSError) as error:
        log.error("readiness.spool", exc_info=error)
        return False
    return True


def _model_ready(registry: Registry) -> bool:
    try:
        return any(is_usable(registry, name) for name in registry.names())
    except (SegnodeError, OSError) as error:
        log.error("readiness.models", exc_info=error)
        return False


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text format",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problem_responses(400, 401, 403, 413, 421, 500, 503),
    },
)
def read_metrics(request: Request, state: State, credentials: Credentials) -> Response:
    """Figures of the work. Open on loopback; elsewhere it takes the role operator."""
    if not is_loopback(state.settings.http):
        check_role(identify(request, state, credentials), Role.OPERATOR)
    text = render_metrics(state.records, state.spool, state.registry, now=state.clock())
    return Response(text, media_type=CONTENT_TYPE_LATEST)
