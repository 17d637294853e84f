"""What a check of the node finds: well or not, a sentence, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What a check found: one sentence, and what to do where something is wrong."""

    what: str
    health: Health
    message: str
    remedy: str = ""


def ok(what: str, message: str) -> Finding:
    return Finding(what, Health.OK, message)


def warning(what: str, message: str, remedy: str) -> Finding:
    return Finding(what, Health.WARNING, message, remedy)


def problem(what: str, message: str, remedy: str) -> Finding:
    return Finding(what, Health.PROBLEM, message, remedy)
