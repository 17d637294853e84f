"""``/auth``: people log in at the hospital's identity provider, and out again."""

from __future__ import annotations

import hmac
from datetime import UTC
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel

from service.api.access import (
    CSRF_HEADER,
    PersonDep,
    forget_session,
    is_secure,
    keep_session,
    session_secret,
)
from service.api.problem import ProblemError
from service.api.state import ApiState, State
from service.oidc import OidcError, Provider
from service.oidc_logins import ATTEMPT_FOR, let_in, remember_attempt, take_attempt
from service.records.events import record_event
from service.records.tables import Role
from service.sessions import begin_session, csrf_token, end_session

router = APIRouter(prefix="/auth", include_in_schema=False)

_STATE_COOKIE = "segnode_login"
_Parameter = Annotated[str, Query(max_length=4096)]


class SessionDocument(BaseModel):
    """Who is logged in, and what their requests that change something must carry."""

    name: str
    role: Role
    csrf_header: str
    csrf_token: str


class LogoutDocument(BaseModel):
    """Where to go to be logged out at the identity provider too, if it has such a place."""

    provider_url: str | None


@router.get("/login")
def begin_login(state: State, next: _Parameter = "/") -> Response:  # noqa: A002 - the word of the address
    """Send the person to the identity provider."""
    provider = _provider(state)
    try:
        beginning = provider.begin()
    except OidcError as error:
        raise _problem(error) from error
    with state.records.write() as session:
        remember_attempt(session, beginning, own_path(next), now=state.clock())
    response = RedirectResponse(beginning.url, HTTPStatus.SEE_OTHER)
    response.set_cookie(
        _STATE_COOKIE,
        beginning.state,
        max_age=int(ATTEMPT_FOR.total_seconds()),
        path="/auth",
        httponly=True,
        samesite="lax",  # the person comes back from another site
        secure=is_secure(state),
    )
    return response


@router.get("/callback")
def finish_login(
    request: Request,
    api: State,
    state: _Parameter = "",
    code: _Parameter = "",
    error: _Parameter = "",
    iss: Annotated[str | None, Query(max_length=4096)] = None,
) -> Response:
    """Take the person back from the identity provider and let them in."""
    rules = api.settings.oidc
    provider = _provider(api)
    assert rules is not None
    now = api.clock()
    try:
        if not hmac.compare_digest(request.cookies.get(_STATE_COOKIE, "").encode(), state.encode()):
            raise OidcError(
                "LOGIN_EXPIRED", "This login was not begun in this browser.", remedy="Log in again."
            )
        with api.records.write() as session:
            attempt = take_attempt(session, state, now=now)
        provider.check_issuer(iss)
        if error or not code:
            raise OidcError("LOGIN_FAILED", "The identity provider has not let you in.")
        person = provider.finish(
            code,
            nonce=attempt.nonce,
            code_verifier=attempt.code_verifier,
            now=now.replace(tzinfo=UTC).timestamp(),
        )
        with api.records.write() as session:
            key = let_in(session, person, rules, now=now)
            sessions = api.settings.http.sessions
            secret = begin_session(session, key.key_id, sessions, now=now, id_token=person.id_token)
            record_event(
                session,
                "login",
                actor=key.name,
                at=now,
                subject=key.key_id,
                detail={"role": key.role},
            )
    except OidcError as failure:
        with api.records.write() as session:
            record_event(session, "login", actor="", at=now, outcome="refused", detail={"code": failure.code})
        raise _problem(failure) from failure
    response = RedirectResponse(attempt.next_path or "/", HTTPStatus.SEE_OTHER)
    response.delete_cookie(_STATE_COOKIE, path="/auth")
    keep_session(response, api, secret, samesite="lax")  # the person comes from another site
    return response


@router.get("/session")
def read_session(request: Request, state: State, person: PersonDep) -> SessionDocument:
    """Who is logged in."""
    secret = _session_of(request, state)
    return SessionDocument(
        name=person.name, role=person.role, csrf_header=CSRF_HEADER, csrf_token=csrf_token(secret)
    )


@router.post("/logout")
def log_out(request: Request, response: Response, state: State, person: PersonDep) -> LogoutDocument:
    """End the session, here at once and for every tab."""
    secret = _session_of(request, state)
    with state.records.write() as session:
        ended = end_session(session, secret)
        record_event(session, "logout", actor=person.name, at=state.clock(), subject=person.key_id)
    forget_session(response, state)
    url = None
    if ended is not None:
        try:
            url = _provider(state).logout_url(ended.id_token)
        except OidcError:
            url = None  # the provider is away; here the session is over
    return LogoutDocument(provider_url=url)


def own_path(path: str) -> str:
    """The path if it leads to a place of this node's own, else its beginning."""
    own = path.startswith("/") and not path.startswith(("//", "/\\")) and len(path) <= 512
    return path if own and path.isprintable() and "\\" not in path else "/"


def _session_of(request: Request, state: ApiState) -> str:
    secret = session_secret(request, state)
    if secret is None or request.headers.get("authorization"):
        raise ProblemError(
            HTTPStatus.CONFLICT, "NO_SESSION", "This request comes with a key and not with a session."
        )
    return secret


def _provider(state: ApiState) -> Provider:
    if state.provider is None:
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            "NO_PROVIDER",
            "This node knows no identity provider.",
            remedy="Use a key, or have an administrator set the section oidc.",
        )
    return state.provider


def _problem(error: OidcError) -> ProblemError:
    status = HTTPStatus.SERVICE_UNAVAILABLE if error.retryable else HTTPStatus.UNAUTHORIZED
    return ProblemError(status, error.code, error.message, remedy=error.remedy, retryable=error.retryable)
