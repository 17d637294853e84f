"""The audit trail: rows are added in the transaction of what they tell of, and never changed."""

from __future__ import annotations

from contextvars import ContextVar
from datetime import datetime
from typing import Any, Literal

from sqlalchemy.orm import Session

from service.records import chain
from service.records.tables import Event

Outcome = Literal["success", "refused", "failure"]

acting_from: ContextVar[str] = ContextVar("acting_from", default="")
"""Where the request that is being answered came from: an address, or the terminal of the machine itself."""


def record_event(
    session: Session,
    kind: str,
    *,
    actor: str,
    at: datetime,
    subject: str = "",
    alert: bool = False,
    outcome: Outcome = "success",
    origin: str | None = None,
    detail: dict[str, Any] | None = None,
) -> None:
    """Add a line to the audit trail.

    ``actor`` is a key's name, an AE title or a component of the node; ``subject`` an identifier of the
    node's own. ``detail`` may hold figures and codes, and nothing that names a patient. ``alert`` marks what
    a person must look at. ``origin`` is where the actor acted from; unless given, where the present request
    came from.
    """
    chain.append(
        session,
        Event(
            at=at,
            kind=kind,
            actor=actor,
            subject=subject,
            alert=alert,
            outcome=outcome,
            origin=acting_from.get() if origin is None else origin,
            detail=detail or {},
        ),
    )
