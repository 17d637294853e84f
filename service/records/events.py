"""The audit trail: rows are added in the transaction of what they tell of, and never changed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from service.records.tables import Event


def record_event(
    session: Session,
    kind: str,
    *,
    actor: str,
    at: datetime,
    subject: str = "",
    alert: bool = False,
    detail: dict[str, Any] | None = None,
) -> None:
    """Add a line to the audit trail.

    ``actor`` is a key's name, an AE title or a component of the node; ``subject`` an identifier of the
    node's own. ``detail`` may hold figures and codes, and nothing that names a patient. ``alert`` marks what
    a person must look at.
    """
    session.add(Event(at=at, kind=kind, actor=actor, subject=subject, alert=alert, detail=detail or {}))
