"""What surrounds every request: the last catch of errors, security headers, hosts, and limits of a body."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problem import ProblemError, problem_of, problem_response, unexpected_problem
from service.logs import get_logger
from service.records.outage import outage_of
from service.settings import HttpSettings

SMALL_BODY_BYTES = 64 << 10
BODY_TIMEOUT_S = 60.0  # without a byte of the body

_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = get_logger(__name__)


class Boundary:
    """Nothing that goes wrong inside leaves as anything but a problem, nor reaches the server's own log.

    An exception's text can hold a value of a row or of a file; the product's log keeps it out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            log.info("http.client_gone")
        except Exception as error:
            outage = outage_of(error)
            log.error("http.unexpected" if outage is None else "http.records_unavailable", exc_info=error)
            if not started:
                problem = unexpected_problem() if outage is None else problem_of(outage)
                await problem_response(problem)(scope, receive, send)


class SecurityHeaders:
    """Headers that keep answers out of caches, frames and guesses about their type."""

    def __init__(self, app: ASGIApp, *, tls: bool) -> None:
        self._app = app
        self._headers = dict(_SECURITY_HEADERS)
        if tls:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)  # the operator's page has a policy of its own
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


class Limits:
    """Which hosts are answered, and how much of a body is read and how long one waits for it.

    ``streamed`` are the (method, path) pairs that count their bodies themselves, under a quota of their own.
    On loopback, where some answers need no key, only loopback's own names are taken as a host: a page in a
    browser on the same machine cannot make itself the node's origin by an answer of its DNS.
    """

    def __init__(self, app: ASGIApp, *, http: HttpSettings, streamed: frozenset[tuple[str, str]]) -> None:
        self._app = app
        self._hosts = _LOOPBACK_HOSTS if is_loopback(http) else None
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            limit_bytes = None if (scope["method"], scope["path"]) in self._streamed else SMALL_BODY_BYTES
            _check_length(headers, limit_bytes)
        except ProblemError as error:
            await problem_response(error.problem)(scope, receive, send)
            return
        await self._app(scope, _guarded(receive, limit_bytes), send)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        if self._hosts is not None and name not in self._hosts:
            raise ProblemError(
                HTTPStatus.MISDIRECTED_REQUEST,
                "HOST_UNKNOWN",
                "The node listens on loopback and does not answer under this host name.",
                remedy="Use localhost or 127.0.0.1.",
            )


def is_loopback(http: HttpSettings) -> bool:
    """True if only processes of this machine can reach the listener."""
    return http.host in ("127.0.0.1", "::1", "localhost") and not http.behind_tls_proxy


def _check_length(headers: Headers, limit_bytes: int | None) -> None:
    length = headers.get("content-length")
    if length is None:
        return
    if not (length.isascii() and length.isdigit()):
        raise ProblemError(HTTPStatus.BAD_REQUEST, "MALFORMED", "Content-Length is not a number.")
    if limit_bytes is not None and int(length[:20]) > limit_bytes:
        raise _body_too_large(limit_bytes)


def _body_too_large(limit_bytes: int) -> ProblemError:
    return ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "BODY_TOO_LARGE",
        f"The body has more than the {limit_bytes} bytes that this path takes.",
    )


def _guarded(receive: Receive, limit_bytes: int | None) -> Receive:
    """``receive`` with a limit of the body's size, and of the time that it may make one wait."""
    received_bytes = 0
    complete = False

    async def guarded() -> Message:
        nonlocal received_bytes, complete
        if complete:
            return await receive()  # waits for the client to go away, for as long as the answer takes
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await receive()
        except TimeoutError as error:
            raise ProblemError(
                HTTPStatus.REQUEST_TIMEOUT,
                "REQUEST_TIMEOUT",
                f"No byte of the body came for {BODY_TIMEOUT_S:g} seconds.",
                retryable=True,
            ) from error
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        received_bytes += len(message.get("body", b""))
        if limit_bytes is not None and received_bytes > limit_bytes:
            raise _body_too_large(limit_bytes)
        return message

    return guarded
