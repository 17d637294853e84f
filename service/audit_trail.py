"""Is the audit trail whole? The chain says so of every line, and heads kept elsewhere of its end.

A head is how far the chain goes and the digest of its last line. The node writes it to its log and into a
file beside the records, every minute in which it has moved; whoever keeps the log elsewhere, or prints the
head with ``segnode audit head``, holds a proof against lines cut off at the end and against a chain that was
made anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models.errors import SegnodeError
from service.logs import get_logger
from service.records.chain import GENESIS, digest_of
from service.records.database import Records
from service.records.events import record_event
from service.records.tables import Event

HEAD_FILE = "audit-head.json"
_AT_ONCE = 1000
_MOST_FAULTS = 100

log = get_logger(__name__)


class AuditBrokenError(SegnodeError):
    """Raised when the audit trail is not what it was."""

    code = "AUDIT_BROKEN"


@dataclass(frozen=True)
class Head:
    """The end of the chain: how many lines it has, and the digest of the last."""

    chain_index: int
    digest: str

    def __str__(self) -> str:
        return f"{self.chain_index}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What ``str`` gave. Raises ValueError."""
        index, colon, digest = text.strip().partition(":")
        if not (colon and index.isdigit() and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            raise ValueError("a head is written INDEX:DIGEST, as segnode audit head prints it")
        return cls(int(index), digest)


@dataclass(frozen=True)
class Verification:
    """What a look at the whole trail has found: a sentence for each fault, the first hundred of them."""

    head: Head
    faults: list[str] = field(default_factory=list)


def read_head(session: Session) -> Head:
    """The present end of the chain."""
    row = session.execute(
        select(Event.chain_index, Event.digest)
        .where(Event.chain_index.is_not(None))
        .order_by(Event.chain_index.desc())
        .limit(1)
    ).one_or_none()
    return Head(0, GENESIS) if row is None else Head(row.chain_index, row.digest)


def verify(session: Session, heads: Iterable[Head] = ()) -> Verification:
    """Compute every digest again, and compare with the heads that were kept."""
    faults: list[str] = []
    wanted = {head.chain_index: head for head in heads}
    expected, previous = 1, GENESIS
    while rows := session.scalars(
        select(Event).where(Event.chain_index >= expected).order_by(Event.chain_index).limit(_AT_ONCE)
    ).all():
        for row in rows:
            assert row.chain_index is not None
            if row.chain_index > expected:
                faults.append(f"{_lines(expected, row.chain_index - 1)} missing.")
            elif row.digest != digest_of(previous, row):
                faults.append(f"Line {row.chain_index} is not what was written there.")
            head = wanted.pop(row.chain_index, None)
            if head is not None and head.digest != row.digest:
                faults.append(f"The chain up to line {row.chain_index} was made anew: its head was another.")
            expected, previous = row.chain_index + 1, row.digest or ""
        session.expunge_all()
        if len(faults) >= _MOST_FAULTS:
            break
    last = expected - 1
    cut = max((index for index in wanted if index > last), default=None)
    if cut is not None and len(faults) < _MOST_FAULTS:
        faults.append(f"{_lines(last + 1, cut)} missing at the end.")
    outside = session.scalar(select(func.count()).where(Event.chain_index.is_(None)))
    if outside:
        faults.append(f"{outside} line(s) were put in beside the chain.")
    return Verification(Head(last, previous), faults[:_MOST_FAULTS])


def read_head_file(path: Path) -> Head | None:
    """The head that the node kept last; None if it has kept none. Raises AuditBrokenError."""
    try:
        kept = json.loads(path.read_text(encoding="ascii"))
        return Head.parse(f"{kept['chain_index']}:{kept['digest']}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AuditBrokenError(
            f"{path} cannot be read as the head of the audit trail.",
            remedy="Find out who changed it; the node's log has the heads too (audit.head).",
        ) from error


class HeadKeeper:
    """Writes the head to a file and to the log when it has moved; never backwards."""

    def __init__(self, records: Records, path: Path) -> None:
        self._records = records
        self._path = path
        self._broken = False

    def keep(self, now: datetime) -> bool:
        """Keep the present head; False if the trail no longer holds the one that was kept before.

        That raises an alert, once in the life of the process, and the head from before stays.
        """
        kept = read_head_file(self._path)
        with self._records.read() as session:
            head = read_head(session)
            if kept is not None and kept.chain_index:
                found = session.scalar(select(Event.digest).where(Event.chain_index == kept.chain_index))
                if found != kept.digest:
                    self._alert(kept, head, now)
                    return False
        if kept != head:
            self._write(head)
            log.info("audit.head", chain_index=head.chain_index, digest=head.digest)
        return True

    def _alert(self, kept: Head, head: Head, now: datetime) -> None:
        if self._broken:
            return
        self._broken = True
        log.error("audit.broken", kept=str(kept), found=str(head))
        with self._records.write() as session:
            record_event(
                session,
                "audit.broken",
                actor="audit",
                at=now,
                alert=True,
                outcome="failure",
                detail={"kept": asdict(kept), "found": asdict(head)},
            )

    def _write(self, head: Head) -> None:
        unfinished = self._path.with_suffix(".part")
        with unfinished.open("w", encoding="ascii") as file:
            file.write(json.dumps(asdict(head)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._path)


def _lines(first: int, last: int) -> str:
    return f"Line {first} is" if first == last else f"Lines {first} to {last} are"
