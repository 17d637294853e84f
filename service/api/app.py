"""The application: routers, the description of the interface, and what surrounds every request."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from models.registry import Registry
from service.api import (
    audit,
    cases,
    deliveries,
    destinations,
    governance,
    health,
    jobs,
    models,
    segmentations,
    studies,
)
from service.api.access import MINIMUM_ROLE, authorize
from service.api.login import router as login_router
from service.api.middleware import Boundary, Limits, SecurityHeaders
from service.api.problem import Problem, install_handlers, problem_responses
from service.api.rates import AddressLimit, Buckets
from service.api.schemas import API_PREFIX
from service.api.state import ApiState
from service.api.trail import Trail
from service.logs import get_logger
from service.oidc import Provider
from service.records.database import Records, utc_now
from service.settings import Settings
from service.spool import Spool
from service.uploads import UploadDesk, clear_abandoned

NOUNS = (segmentations, studies, jobs, deliveries, destinations, models, governance, cases, audit)
_STREAMED = frozenset(
    {
        ("POST", f"{API_PREFIX}/segmentations"),
        ("POST", f"{API_PREFIX}/models"),
        ("POST", f"{API_PREFIX}/cases"),
    }
)

_DESCRIPTION = """\
Volumes in, segmentations out; and what the node has received, does and has sent.

Every error is an RFC 9457 problem (`application/problem+json`) with a stable `code`, a sentence with its
figures in `detail`, and what to do about it in `remedy`. Every request but those for health carries a key:
`Authorization: Bearer sgn_…`. Times are UTC.
"""

log = get_logger(__name__)


def create_app(
    settings: Settings,
    records: Records,
    spool: Spool,
    registry: Registry,
    clock: Callable[[], datetime] = utc_now,
) -> FastAPI:
    """Make the application; what uploads of an earlier process left behind is removed.

    Parameters
    ----------
    clock : callable
        The present time, UTC and naive, as it stands in the records.
    """
    abandoned = clear_abandoned(records, spool)
    if abandoned:
        log.info("uploads.abandoned", removed=abandoned)
    app = FastAPI(
        title="segnode",
        version=version("segnode"),
        description=_DESCRIPTION,
        openapi_url=f"{API_PREFIX}/openapi.json",
        docs_url=None,  # these pages load scripts from elsewhere, and nothing here calls out
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    rates = settings.http.rates
    app.state.api = ApiState(
        settings,
        records,
        spool,
        registry,
        clock,
        UploadDesk(spool, records),
        provider=None if settings.oidc is None else Provider(settings.oidc),
        key_rates=Buckets(rates.key),
    )
    for noun in NOUNS:
        app.include_router(
            noun.router,
            prefix=API_PREFIX,
            dependencies=[Depends(authorize)],
            responses=problem_responses(400, 401, 403, 408, 413, 421, 422, 429, 500, 503),
        )
        _check_roles(noun.router.routes)
    app.include_router(health.router)
    if settings.oidc is not None:
        app.include_router(login_router)
    install_handlers(app)
    _describe(app)
    tls = settings.http.tls_certificate is not None or settings.http.behind_tls_proxy
    # The last one added is the outermost.
    app.add_middleware(Limits, http=settings.http, streamed=_STREAMED)
    app.add_middleware(AddressLimit, buckets=Buckets(rates.address))
    app.add_middleware(Trail, records=records, clock=clock)
    app.add_middleware(Boundary)
    app.add_middleware(SecurityHeaders, tls=tls)
    return app


def _check_roles(routes: list[Any]) -> None:
    for route in routes:
        assert isinstance(route, APIRoute)
        assert route.name in MINIMUM_ROLE, f"{route.name} has no place in the table of roles"


def _describe(app: FastAPI) -> None:
    """Have OpenAPI tell of problems; FastAPI itself knows only its own shape of errors."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            template = "#/components/schemas/{model}"
            schema = Problem.model_json_schema(ref_template=template)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas |= {**schema.pop("$defs"), "Problem": schema}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
