"""What every page has around it: who is there, the menu, the template, and errors as a page."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from fastapi import Depends, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined

from models.errors import SegnodeError
from service.api.access import MINIMUM_ROLE, Caller, check_role, session_key, session_secret
from service.api.problem import Problem, ProblemError, problem_of
from service.api.state import State
from service.sessions import csrf_token

PREFIX = "/console"

# In the order of the menu; each with the operation of the interface whose role it takes.
MENU = (
    ("queue", "Queue", "list_jobs"),
    ("studies", "Studies", "list_studies"),
    ("deliveries", "Deliveries", "list_deliveries"),
    ("models", "Models", "list_models"),
    ("destinations", "Destinations", "list_destinations"),
    ("audit", "Audit", "list_events"),
)

# No script at all: what a patient's data or a model's name might smuggle in could not run.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


class LoginRequired(Exception):
    """There is no session, or it is over."""


@dataclass(frozen=True)
class Visitor:
    """Who is at the page: the caller that the interface knows, and what their forms carry."""

    caller: Caller
    form_token: str

    def may(self, operation: str) -> bool:
        """True if the visitor's role allows an operation of the interface."""
        return self.caller.has(MINIMUM_ROLE[operation])

    def require(self, operation: str) -> Caller:
        """The caller, if allowed. Raises ProblemError 403."""
        check_role(self.caller, MINIMUM_ROLE[operation])
        return self.caller


def get_visitor(request: Request, state: State) -> Visitor:
    """Who is there. Raises LoginRequired."""
    secret, key = session_secret(request, state), session_key(request, state)
    if secret is None or key is None:
        raise LoginRequired
    caller = Caller(key.key_id, key.name, key.role)
    request.state.caller = caller  # the audit trail names who reads
    return Visitor(caller, csrf_token(secret))


VisitorDep = Annotated[Visitor, Depends(get_visitor)]


def get_poster(visitor: VisitorDep, form_token: Annotated[str, Form(max_length=128)] = "") -> Visitor:
    """Who sent a form. Raises ProblemError 403 if the form is not one of the visitor's own session."""
    if not hmac.compare_digest(form_token.encode(), visitor.form_token.encode()):
        raise ProblemError(
            HTTPStatus.FORBIDDEN,
            "FORM_EXPIRED",
            "This form does not belong to your session.",
            remedy="Go back, reload the page, and do it again.",
        )
    return visitor


PosterDep = Annotated[Visitor, Depends(get_poster)]


def show(
    request: Request,
    template: str,
    *,
    visitor: Visitor | None,
    status: int = HTTPStatus.OK,
    **values: Any,
) -> HTMLResponse:
    """A page from a template."""
    menu = [(path, title) for path, title, operation in MENU if visitor and visitor.may(operation)]
    here = request.url.path.removeprefix(PREFIX).strip("/").partition("/")[0]
    text = _TEMPLATES.get_template(template).render(
        visitor=visitor,
        menu=menu,
        here=here,
        prefix=PREFIX,
        form_token=visitor.form_token if visitor else "",
        **values,
    )
    return HTMLResponse(text, status, {"Content-Security-Policy": _CONTENT_SECURITY_POLICY})


def back_to(path: str, said: str = "") -> RedirectResponse:
    """After a form: to a page of the console, which shows what was done."""
    address = f"{PREFIX}/{path}" + (f"?said={quote(said)}" if said else "")
    return RedirectResponse(address, HTTPStatus.SEE_OTHER)


def safe_next(path: str) -> str:
    """A page of this console to go on to; its beginning for anything else."""
    parts = urlsplit(path)
    inside = parts.path.startswith(f"{PREFIX}/") and "\\" not in path and ".." not in parts.path
    return path if not parts.scheme and not parts.netloc and inside else f"{PREFIX}/queue"


def _visitor_or_none(request: Request) -> Visitor | None:
    """Who is there, for the menu of a page that tells of a problem."""
    try:
        return get_visitor(request, request.app.state.api)
    except LoginRequired:
        return None


class ConsoleRoute(APIRoute):
    """Answers with a page also where something is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def page(request: Request) -> Response:
            try:
                return await handle(request)
            except LoginRequired:
                wanted = request.url.path if request.method == "GET" else f"{PREFIX}/queue"
                return RedirectResponse(f"{PREFIX}/login?next={quote(wanted)}", HTTPStatus.SEE_OTHER)
            except ProblemError as error:
                problem = error.problem
            except SegnodeError as error:
                problem = problem_of(error)
            except RequestValidationError:
                problem = Problem(
                    title=HTTPStatus.UNPROCESSABLE_ENTITY.phrase,
                    status=HTTPStatus.UNPROCESSABLE_ENTITY.value,
                    code="INVALID_REQUEST",
                    detail="This address or form is not one that the page makes.",
                    remedy="Go back and choose from the page.",
                )
            visitor = _visitor_or_none(request)
            return show(request, "problem.html", visitor=visitor, status=problem.status, problem=problem)

        return page


def _moment(time: datetime | None) -> str:
    """A time of the records, or of a document, in UTC to the second."""
    return "" if time is None else f"{time:%Y-%m-%d %H:%M:%S} UTC"


_TEMPLATES = Environment(
    loader=PackageLoader("service.console"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_TEMPLATES.filters["moment"] = _moment
