"""Errors as RFC 9457 problem details: what is wrong with its figures, and what to do about it.

A problem has a stable ``code``. It never holds a traceback, an input that was sent, or anything that names
a patient.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from models.errors import (
    BundleError,
    ModelChangedError,
    ModelUnknownError,
    ModelWithdrawnError,
    OutOfMemoryError,
    Refusal,
    RegistryBusyError,
    RegistryError,
    SegnodeError,
    UnsupportedModelError,
)
from service.errors import ConflictError, NotFoundError, StorageFullError
from service.logs import get_logger
from service.records.outage import RecordsUnavailableError
from service.uploads import UploadTooLargeError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 60

log = get_logger(__name__)

# The nearest class of an error's own line of classes decides.
_STATUS: dict[type[SegnodeError], HTTPStatus] = {
    SegnodeError: HTTPStatus.INTERNAL_SERVER_ERROR,
    NotFoundError: HTTPStatus.NOT_FOUND,
    ModelUnknownError: HTTPStatus.NOT_FOUND,
    ConflictError: HTTPStatus.CONFLICT,
    RegistryError: HTTPStatus.CONFLICT,
    ModelWithdrawnError: HTTPStatus.CONFLICT,
    ModelChangedError: HTTPStatus.CONFLICT,
    UploadTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Refusal: HTTPStatus.UNPROCESSABLE_ENTITY,
    BundleError: HTTPStatus.UNPROCESSABLE_ENTITY,
    UnsupportedModelError: HTTPStatus.UNPROCESSABLE_ENTITY,
    RegistryBusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    RecordsUnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    OutOfMemoryError: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageFullError: HTTPStatus.INSUFFICIENT_STORAGE,
}


class InvalidField(BaseModel):
    """One part of a request that is not what it should be."""

    location: str = Field(examples=["query.limit"])
    message: str = Field(examples=["Input should be less than or equal to 200"])


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Unprocessable Content",
                    "status": 422,
                    "code": "NOT_A_VOLUME",
                    "detail": "File 1 of 1 has the shape 64 x 64 x 9 x 120; one volume has three dimensions.",
                    "remedy": "Send one 3D file for each channel.",
                    "retryable": False,
                }
            ]
        }
    )

    type: str = "about:blank"
    title: str = Field(description="The HTTP status in words.")
    status: int = Field(ge=400, le=599)
    code: str = Field(description="Stable and made for programs; reason codes of refusals among them.")
    detail: str = Field(description="What is wrong, with its figures, in a sentence.")
    remedy: str = Field(default="", description="What to do about it.")
    retryable: bool = Field(default=False, description="Whether the very same request may succeed later.")
    errors: list[InvalidField] | None = Field(default=None, description="Every invalid part of the request.")


class ProblemError(HTTPException):
    """Raised to answer with a problem that no error of the product stands for."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        *,
        remedy: str = "",
        retryable: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status.value, detail, headers)
        self.problem = Problem(
            title=status.phrase,
            status=status.value,
            code=code,
            detail=detail,
            remedy=remedy,
            retryable=retryable,
        )


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer that carries a problem."""
    retry = {"Retry-After": str(RETRY_AFTER_S)} if problem.retryable else {}
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=problem.status,
        headers={**retry, **(headers or {})},
        media_type=MEDIA_TYPE,
    )


def problem_of(error: SegnodeError) -> Problem:
    """The problem that an error of the product is."""
    status = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
    return Problem(
        title=status.phrase,
        status=status.value,
        code=error.reason.value if isinstance(error, Refusal) else error.code,
        detail=error.message,
        remedy=error.remedy,
        retryable=error.retryable,
    )


def unexpected_problem() -> Problem:
    """The problem of an error that nobody thought of."""
    return Problem(
        title=HTTPStatus.INTERNAL_SERVER_ERROR.phrase,
        status=HTTPStatus.INTERNAL_SERVER_ERROR.value,
        code="INTERNAL_ERROR",
        detail="The node met an error that it was not made for.",
        remedy="Look at the node's log at this time, and report it.",
    )


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` of an endpoint that can answer with these problems."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def install_handlers(app: FastAPI) -> None:
    """Have every error that an endpoint raises answered as a problem."""
    app.add_exception_handler(SegnodeError, _product_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)


def _product_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SegnodeError)
    problem = problem_of(error)
    if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("http.failed", exc_info=error)
    return problem_response(problem)


def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if isinstance(error, ProblemError):
        return problem_response(error.problem, headers)
    status = HTTPStatus(error.status_code)
    code, detail = {
        404: ("NO_SUCH_PATH", "There is nothing at this path."),
        405: ("METHOD_NOT_ALLOWED", "This path does not take this method."),
        400: ("MALFORMED", "The request could not be read."),
    }.get(status.value, (status.name, f"{status.phrase}."))
    remedy = "The interface is described at /api/v1/openapi.json."
    problem = Problem(title=status.phrase, status=status.value, code=code, detail=detail, remedy=remedy)
    return problem_response(problem, headers)


def _invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = [
        InvalidField(location=".".join(map(str, item["loc"])), message=item["msg"]) for item in error.errors()
    ]
    malformed = any(item["type"] == "json_invalid" for item in error.errors())
    status = HTTPStatus.BAD_REQUEST if malformed else HTTPStatus.UNPROCESSABLE_ENTITY
    problem = Problem(
        title=status.phrase,
        status=status.value,
        code="MALFORMED" if malformed else "INVALID_REQUEST",
        detail=f"{len(errors)} part(s) of the request are not what they should be: "
        + "; ".join(f"{e.location}: {e.message}" for e in errors)
        + ".",
        remedy="Correct them; the interface is described at /api/v1/openapi.json.",
        errors=errors,
    )
    return problem_response(problem)
