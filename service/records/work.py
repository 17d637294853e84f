"""What is asked of the records, and what is reported to them: a job to be done, and how one came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.records.tables import JobOrigin, ResultKind


@dataclass(frozen=True)
class NewInput:
    """A file that a job reads: ``path`` is relative to the spool.

    ``channel`` counts the job's inputs; ``channel_name`` is the model's channel that it is to be, where that
    was chosen by name.
    """

    path: str
    channel: int = 0
    channel_name: str | None = None
    instance_id: str | None = None


@dataclass(frozen=True)
class NewJob:
    """What is needed to enqueue a job."""

    origin: JobOrigin
    model_name: str
    input_key: str
    inputs: Sequence[NewInput]
    requested_version: str | None = None
    route_name: str | None = None
    destinations: Sequence[str] = ()
    refusal_destinations: Sequence[str] = ()  # that get an object if the job is refused
    study_instance_uid: str | None = None
    series_id: str | None = None
    owner_key_id: str | None = None
    priority: int = 0


@dataclass(frozen=True)
class NewResult:
    """A file that a job produced; ``path`` is relative to the spool."""

    kind: ResultKind
    path: str
    size_bytes: int
    sha256: str
    sop_class_uid: str | None = None
    sop_instance_uid: str | None = None
    profile: str | None = None  # of the destinations that get it; None for all
    withheld: str | None = None  # why its deliveries are parked at once


@dataclass(frozen=True)
class Outcome:
    """What a successful attempt reports."""

    results: Sequence[NewResult]
    runtime: str
    precision: str
    summary: dict[str, Any] = field(default_factory=dict)


def input_key(identities: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over a job's inputs: sorted pairs of SOP Instance UID and ``<revision>:<identity digest>``."""
    return hashlib.sha256(json.dumps(sorted(identities)).encode()).hexdigest()
