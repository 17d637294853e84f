"""Who may do what: the one table of roles, and the dependency that holds every request against it.

A key's role includes the roles below it: uploader < operator < admin. What belongs to one uploader does
not exist for another: 404, never 403.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from service.api.problem import ProblemError
from service.api.state import State
from service.errors import NotFoundError
from service.keys import authenticate
from service.records.tables import Job, Role

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
    "delete_study": Role.ADMIN,
    "list_models": Role.ADMIN,
    "add_model": Role.ADMIN,
    "activate_model": Role.ADMIN,
    "roll_back_model": Role.ADMIN,
    "withdraw_model": Role.ADMIN,
    "list_studies_of_model": Role.ADMIN,
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


def identify(state: State, credentials: Credentials) -> Caller:
    """Who calls. Raises ProblemError 401 for no key, or one that is unknown, revoked or expired."""
    key = None
    if credentials is not None:
        with state.records.read() as session:
            key = authenticate(session, credentials.credentials, state.clock())
    if key is None:
        raise ProblemError(
            HTTPStatus.UNAUTHORIZED,
            "KEY_MISSING" if credentials is None else "KEY_INVALID",
            "The request carries no key."
            if credentials is None
            else "The request's key is unknown, revoked or expired.",
            remedy="Send 'Authorization: Bearer sgn_…' with a key that an administrator made for you.",
            headers={"WWW-Authenticate": 'Bearer realm="segnode"'},
        )
    return Caller(key.key_id, key.name, key.role)


def authorize(request: Request, caller: Annotated[Caller, Depends(identify)]) -> Caller:
    """Who calls, if their role allows this operation. Raises ProblemError 401 or 403."""
    request.state.caller = caller  # the audit trail names who is refused, too
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
