"""The chain of the audit trail: each line's digest covers the line and the digest of the one before it.

A line that is changed, removed or moved breaks the chain at its place. Cutting lines off at the end leaves a
chain that is whole, and so does rewriting all of it: the heads that are kept elsewhere show both
(:mod:`service.audit_trail`).

A line gets its place in the chain as the last act of its transaction, when nothing but the commit is to come.
So whoever waits for the chain's lock holds no other lock that the holder may want, and writers on PostgreSQL,
who otherwise go on side by side, stand in line for the time of a commit alone.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

from sqlalchemy import event as hooks
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.records.tables import Event

GENESIS = "0" * 64
"""What stands for the digest before the first line."""

_CHAIN_LOCK = 0x5E610E0  # advisory, on PostgreSQL; the writers' own is one below
_UNSEALED = "segnode lines of the audit trail without a place in the chain"


def line_digest(
    previous: str,
    *,
    chain_index: int,
    at: datetime,
    kind: str,
    alert: bool,
    actor: str,
    origin: str,
    outcome: str,
    subject: str,
    detail: dict[str, Any],
) -> str:
    """SHA-256, in hexadecimal, over the digest before, a line feed, and the line as JSON.

    The JSON has its keys sorted, no spaces, and ASCII alone; times are ISO 8601 with microseconds, UTC.
    """
    line = {
        "index": chain_index,
        "at": at.isoformat(timespec="microseconds"),
        "kind": kind,
        "alert": alert,
        "actor": actor,
        "origin": origin,
        "outcome": outcome,
        "subject": subject,
        "detail": json.loads(json.dumps(detail)),  # as it comes back from the database
    }
    written = json.dumps(line, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{previous}\n{written}".encode()).hexdigest()


def digest_of(previous: str, row: Event) -> str:
    """The digest that a line in its place should have."""
    assert row.chain_index is not None
    return line_digest(
        previous,
        chain_index=row.chain_index,
        at=row.at,
        kind=row.kind,
        alert=row.alert,
        actor=row.actor,
        origin=row.origin,
        outcome=row.outcome,
        subject=row.subject,
        detail=row.detail,
    )


def append(session: Session, row: Event) -> None:
    """Add a line to the session; it gets its place in the chain when the transaction commits."""
    session.add(row)
    session.info.setdefault(_UNSEALED, []).append(row)
    if not hooks.contains(session, "before_commit", _seal):
        hooks.listen(session, "before_commit", _seal)


def _seal(session: Session) -> None:
    if session.in_nested_transaction():
        return
    rows = [row for row in session.info.pop(_UNSEALED, []) if row in session]
    if not rows:
        return
    session.flush()  # whatever else this transaction locks, it has locked now
    if session.get_bind().dialect.name != "sqlite":
        session.execute(select(func.pg_advisory_xact_lock(_CHAIN_LOCK)))
    last = session.execute(
        select(Event.chain_index, Event.digest)
        .where(Event.chain_index.is_not(None))
        .order_by(Event.chain_index.desc())
        .limit(1)
    ).one_or_none()
    index, digest = (0, GENESIS) if last is None else (last.chain_index, last.digest)
    for row in rows:
        index += 1
        row.chain_index = index
        row.digest = digest = digest_of(digest, row)
