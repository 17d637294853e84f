"""Who may do what: the one table of roles, and the dependency that holds every request against it.

A key's role includes the roles below it: uploader < operator < admin. What belongs to one uploader does
not exist for another: 404, never 403.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import Depends, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from service.api.problem import ProblemError
from service.api.state import ApiState, State
from service.errors import NotFoundError
from service.keys import authenticate
from service.records.tables import ApiKey, Job, Role
from service.sessions import find_session, is_csrf_token, is_due, see_session

CSRF_HEADER = "X-CSRF-Token"
# Over TLS the browser itself sees to it that no other host of the domain has set it.
SESSION_COOKIES = {True: "__Host-segnode_person", False: "segnode_person"}
_HARMLESS = frozenset({"GET", "HEAD", "OPTIONS"})

_RANK = {Role.UPLOADER: 0, Role.OPERATOR: 1, Role.ADMIN: 2}

# The lowest role that may call each operation. An operation under /api/v1 that is not here cannot be served:
# the application does not start.
MINIMUM_ROLE: dict[str, Role] = {
    "create_segmentation": Role.UPLOADER,
    "read_segmentation": Role.UPLOADER,  # an uploader's own; operators see all
    "read_labelmap": Role.UPLOADER,
    "read_segmentation_object": Role.UPLOADER,
    "read_measurements": Role.UPLOADER,
    "read_report": Role.UPLOADER,
    "read_capture": Role.UPLOADER,
    "list_results": Role.UPLOADER,
    "read_result": Role.UPLOADER,
    "read_preview": Role.UPLOADER,
    "delete_segmentation": Role.UPLOADER,  # one's own; another's takes an admin
    "list_studies": Role.OPERATOR,
    "read_study": Role.OPERATOR,
    "list_jobs": Role.OPERATOR,
    "retry_job": Role.OPERATOR,
    "list_deliveries": Role.OPERATOR,
    "retry_delivery": Role.OPERATOR,
    "list_destinations": Role.OPERATOR,
    "echo_destination": Role.OPERATOR,
    "list_cases": Role.OPERATOR,
    "approve_case": Role.OPERATOR,
    "remove_case": Role.OPERATOR,
    "delete_study": Role.ADMIN,
    "list_models": Role.ADMIN,
    "add_model": Role.ADMIN,
    "activate_model": Role.ADMIN,
    "roll_back_model": Role.ADMIN,
    "withdraw_model": Role.ADMIN,
    "list_studies_of_model": Role.ADMIN,
    "read_gate": Role.ADMIN,
    "run_gate": Role.ADMIN,
    "read_shadow": Role.ADMIN,
    "start_shadow": Role.ADMIN,
    "stop_shadow": Role.ADMIN,
    "list_activations": Role.ADMIN,
    "recall_model": Role.ADMIN,
    "list_events": Role.ADMIN,
}

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="A key made by `segnode keys create`: `Authorization: Bearer sgn_…`.",
)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


@dataclass(frozen=True)
class Caller:
    """The key that a request came with."""

    key_id: str
    name: str
    role: Role

    def has(self, role: Role) -> bool:
        """True if the key has this role, or one above it."""
        return _RANK[self.role] >= _RANK[role]


def identify(request: Request, state: State, credentials: Credentials) -> Caller:
    """Who calls, by a key or by the session of a person who has logged in.

    Raises
    ------
    ProblemError
        401 for no key, one that is unknown, revoked or expired, and a session that is over; 403 for a request
        of a session that changes something and does not carry the session's token; 429 for one too many.
    """
    secret = session_secret(request, state)
    key = None
    if credentials is not None:
        with state.records.read() as session:
            key = authenticate(session, credentials.credentials, state.clock())
    elif secret is not None:
        key = session_key(request, state)
        if key is not None:
            _check_csrf(request, secret)
    if key is None:
        raise ProblemError(
            HTTPStatus.UNAUTHORIZED,
            "KEY_MISSING" if credentials is None else "KEY_INVALID",
            ("The request carries no key." if secret is None else "The session is over.")
            if credentials is None
            else "The request's key is unknown, revoked or expired.",
            remedy="Send 'Authorization: Bearer sgn_…' with a key that an administrator made for you.",
            headers={"WWW-Authenticate": 'Bearer realm="segnode"'},
        )
    caller = Caller(key.key_id, key.name, key.role)
    request.state.caller = caller  # the audit trail names who is refused, too
    state.key_rates.check(caller.key_id, "This key")
    return caller


PersonDep = Annotated[Caller, Depends(identify)]
"""Who is there, by key or by session, whatever their role."""


def session_secret(request: Request, state: ApiState) -> str | None:
    """The secret of the session that a request carries."""
    return request.cookies.get(SESSION_COOKIES[is_secure(state)])


def session_key(request: Request, state: ApiState) -> ApiKey | None:
    """The key that a request's session began with; None if it carries none, or one that is over."""
    secret, rules, now = session_secret(request, state), state.settings.http.sessions, state.clock()
    if secret is None:
        return None
    with state.records.read() as session:
        found = find_session(session, secret, rules, now=now)
    if found is None:
        return None
    key, person_session = found
    if is_due(person_session, now):
        with state.records.write() as session:
            see_session(session, secret, now=now)
    return key


def keep_session(
    response: Response, state: ApiState, secret: str, *, samesite: Literal["lax", "strict"]
) -> None:
    """Have the browser hold the secret of a session."""
    response.set_cookie(
        SESSION_COOKIES[is_secure(state)],
        secret,
        max_age=int(state.settings.http.sessions.longest_s),
        path="/",
        httponly=True,
        samesite=samesite,
        secure=is_secure(state),
    )


def forget_session(response: Response, state: ApiState) -> None:
    """Have the browser forget it."""
    response.delete_cookie(SESSION_COOKIES[is_secure(state)], path="/", secure=is_secure(state))


def is_secure(state: ApiState) -> bool:
    """True if browsers reach the node over TLS, its own or that of the proxy in front of it."""
    http = state.settings.http
    return http.tls_certificate is not None or http.behind_tls_proxy


def _check_csrf(request: Request, secret: str) -> None:
    if request.method not in _HARMLESS and not is_csrf_token(secret, request.headers.get(CSRF_HEADER, "")):
        raise ProblemError(
            HTTPStatus.FORBIDDEN,
            "CSRF_TOKEN_MISSING",
            f"A request of a session that changes something must carry its token in {CSRF_HEADER}.",
            remedy="Take the token from /auth/session.",
        )


def authorize(request: Request, caller: Annotated[Caller, Depends(identify)]) -> Caller:
    """Who calls, if their role allows this operation. Raises ProblemError 401 or 403."""
    check_role(caller, MINIMUM_ROLE[request.scope["route"].name])
    return caller


def check_role(caller: Caller, role: Role) -> None:
    """Raises ProblemError 403 if the caller's role is below ``role``."""
    if not caller.has(role):
        raise ProblemError(
            HTTPStatus.FORBIDDEN,
            "ROLE_TOO_LOW",
            f"This takes the role {role}; the key's role is {caller.role}.",
            remedy="Ask an administrator for a key with that role.",
        )


CallerDep = Annotated[Caller, Depends(authorize)]


def visible_job(session: Session, caller: Caller, job_id: str) -> Job:
    """A job that the caller may see.

    Raises
    ------
    NotFoundError
        If there is no such job, or it is another uploader's.
    """
    job = session.get(Job, job_id)
    if job is None or not (caller.has(Role.OPERATOR) or job.owner_key_id == caller.key_id):
        raise NotFoundError(
            f"There is no job {job_id}.", remedy="Check the identifier, and with which key it was made."
        )
    return job
