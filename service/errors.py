"""What can go wrong in the service, beside what ``models.errors`` already names."""

from __future__ import annotations

from models.errors import SegnodeError


class SettingsError(SegnodeError):
    """Raised when the configuration is not usable; the message names every error in it."""

    code = "SETTINGS_INVALID"


class StorageFullError(SegnodeError):
    """Raised before a write that would eat into the reserve of the spool's disk."""

    code = "STORAGE_FULL"
    retryable = True


class NotFoundError(SegnodeError):
    """Raised when something that was asked for by its identifier is not in the records."""

    code = "NOT_FOUND"


class ConflictError(SegnodeError):
    """Raised when a record is not in a state that allows what was asked of it."""

    code = "CONFLICT"


class LostClaimError(SegnodeError):
    """Raised when a worker reports on a job or a delivery that another worker holds by now.

    The reporter must throw its work away: its lease lapsed and the records have moved on.
    """

    code = "CLAIM_LOST"


class ProofError(SegnodeError):
    """Raised when an encoded object does not say what it was meant to say. Nothing of it may leave."""

    code = "PROOF_FAILED"


class AttemptError(SegnodeError):
    """Raised when one attempt at a job ended without a result and without a refusal.

    Its ``code`` and ``retryable`` are the attempt's own: what the inference process reported, or what
    became of that process (CHILD_DIED, CHILD_STALLED, DEADLINE_EXCEEDED, PROTOCOL).
    """

    def __init__(self, code: str, message: str, *, remedy: str = "", retryable: bool = True) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code
        self.retryable = retryable


class GateError(ConflictError):
    """Raised when a version would be activated that has not passed the gate, or not this one."""

    code = "GATE_NOT_PASSED"
