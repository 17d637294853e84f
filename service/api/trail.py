"""What the HTTP interface puts into the audit trail by itself: who was refused, and who has read what.

What an endpoint changes it records itself, in the transaction of the change. A study, a job or a result that
is read is recorded here, before the first byte of it leaves: what cannot be recorded is not handed out.

A page of the operator's console bears the name of the operation that it shows, so it is recorded as that
operation is. Work lists (queue, studies, deliveries) are not: they name studies and say how far each is, the
queue is read again every ten seconds, and a line for each would hide the others. The pictures of a list are
results that are handed out one by one, and are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from http import HTTPStatus

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.dicom.throttle import Throttle
from service.records.database import Records
from service.records.events import acting_from, record_event

# Operations whose answers tell of one patient or of what others did, and what their line is called.
READS = {
    "read_study": "study.read",
    "read_segmentation": "job.read",  # with the volumes that were found
    "read_labelmap": "result.read",
    "read_segmentation_object": "result.read",
    "read_measurements": "result.read",
    "read_report": "result.read",
    "read_capture": "result.read",
    "read_result": "result.read",
    "read_preview": "result.read",
    "list_events": "audit.read",
}
_REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)


class Trail:
    """Records refusals and reads; the same one again by the same caller once an hour."""

    def __init__(self, app: ASGIApp, *, records: Records, clock: Callable[[], datetime]) -> None:
        self._app = app
        self._records = records
        self._clock = clock
        self._throttle = Throttle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        token = acting_from.set(client[0] if client else "")

        async def recording(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._look_at(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, recording)
        finally:
            acting_from.reset(token)

    async def _look_at(self, scope: Scope, status: int) -> None:
        route = scope.get("route")
        operation = getattr(route, "name", "")
        caller = scope.get("state", {}).get("caller")
        actor = caller.name if caller is not None else ""
        if status in _REFUSALS:
            kind, subject = "access.refused", ""
        elif status == HTTPStatus.OK and operation in READS:
            kind = READS[operation]
            subject = str(next(iter(scope.get("path_params", {}).values()), ""))
        else:
            return
        if not self._throttle.passes((kind, operation, subject, actor, acting_from.get(), status)):
            return

        def record() -> None:
            with self._records.write() as session:
                record_event(
                    session,
                    kind,
                    actor=actor,
                    at=self._clock(),
                    subject=subject,
                    outcome="refused" if status in _REFUSALS else "success",
                    detail={"operation": operation, "status": status},
                )

        await run_in_threadpool(record)
