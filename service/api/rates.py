"""How often one may ask: a bucket of tokens for each address, and one for each key.

A bucket holds ``burst`` tokens and gets ``per_s`` new ones a second; a request takes one, and one that finds
none is answered with 429 and how long to wait. The address is asked before anything else is done for the
request, the key when it is known.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.problem import ProblemError, problem_response
from service.security_rules import RateRule

_CAPACITY = 10_000
_FREE = frozenset({"/healthz", "/readyz"})  # whoever watches the node must never be told to wait


class Buckets:
    """One bucket for each name; the one that was not used for longest is forgotten first.

    Parameters
    ----------
    rule : RateRule, optional
        None: everything passes.
    clock : callable
        A monotonic clock in seconds.
    """

    def __init__(
        self,
        rule: RateRule | None,
        *,
        capacity: int = _CAPACITY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rule = rule
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # tokens, and when

    def take(self, name: Hashable) -> float:
        """Take a token. Returns 0, or for how many seconds there will be none."""
        if self._rule is None:
            return 0.0
        with self._lock:
            now = self._clock()
            tokens, then = self._buckets.get(name, (float(self._rule.burst), now))
            tokens = min(float(self._rule.burst), tokens + (now - then) * self._rule.per_s)
            wait_s = 0.0 if tokens >= 1 else (1 - tokens) / self._rule.per_s
            self._buckets[name] = (tokens if wait_s else tokens - 1, now)
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._capacity:
                self._buckets.popitem(last=False)
        return wait_s

    def check(self, name: Hashable, whose: str) -> None:
        """Take a token. Raises ProblemError 429 with Retry-After."""
        wait_s = self.take(name)
        if wait_s:
            assert self._rule is not None
            raise ProblemError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "TOO_MANY_REQUESTS",
                f"{whose} asks more often than {self._rule.per_s:g} times a second.",
                remedy="Wait as long as Retry-After says, and ask less often.",
                retryable=True,
                headers={"Retry-After": str(math.ceil(wait_s))},
            )


class AddressLimit:
    """Turns away an address that asks too often, before its key is looked at."""

    def __init__(self, app: ASGIApp, *, buckets: Buckets) -> None:
        self._app = app
        self._buckets = buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _FREE:
            client = scope.get("client")
            try:
                self._buckets.check(client[0] if client else "", "This address")
            except ProblemError as error:
                await problem_response(error.problem, dict(error.headers or {}))(scope, receive, send)
                return
        await self._app(scope, receive, send)
