"""One error tree for the whole product.

Every error that is meant for a person carries three things: a stable ``code``, a sentence with its
figures, and a ``remedy`` that says what the person should do. ``retryable`` says whether trying the very
same thing again later can help. No message may hold a patient's name, identifier or birth date.
"""

from __future__ import annotations

from enum import StrEnum


class SegnodeError(Exception):
    """Root of every error that segnode raises on purpose.

    Parameters
    ----------
    message : str
        What is wrong, with its figures, in one sentence.
    remedy : str
        What a person should do about it, in one sentence; may be empty where nothing can be done.
    """

    code: str = "ERROR"
    retryable: bool = False

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, remedy={self.remedy!r})"


class ReasonCode(StrEnum):
    """Why a study, a series or an upload was refused. The values are part of the public contract."""

    GANTRY_TILT = "GANTRY_TILT"
    MISSING_SLICE = "MISSING_SLICE"
    VARYING_SPACING = "VARYING_SPACING"
    DUPLICATE_POSITIONS = "DUPLICATE_POSITIONS"
    MULTI_VOLUME = "MULTI_VOLUME"
    MIXED_ORIENTATION = "MIXED_ORIENTATION"
    NOT_A_VOLUME = "NOT_A_VOLUME"
    WRONG_MODALITY = "WRONG_MODALITY"
    IDENTITY_MISSING = "IDENTITY_MISSING"
    IDENTITY_CONFLICT = "IDENTITY_CONFLICT"
    OUT_OF_LIMITS = "OUT_OF_LIMITS"
    UNREADABLE = "UNREADABLE"  # truncated, damaged, or not what its name says
    UNSUPPORTED_PIXELS = "UNSUPPORTED_PIXELS"  # colour, an unknown codec, a mixed set of pixel formats
    INVALID_VALUES = "INVALID_VALUES"  # NaN or infinite voxels, an all-constant volume
    INVALID_GEOMETRY = "INVALID_GEOMETRY"  # no usable affine, zero spacing, qform and sform that disagree
    MISSING_CHANNEL = "MISSING_CHANNEL"
    AMBIGUOUS_CHANNEL = "AMBIGUOUS_CHANNEL"
    AMBIGUOUS_SERIES = "AMBIGUOUS_SERIES"  # several series match a route that wants exactly one
    CHANNEL_GRIDS_DIFFER = "CHANNEL_GRIDS_DIFFER"
    REGISTRATION_FAILED = "REGISTRATION_FAILED"  # moves a channel implausibly far, or to no avail
    IMPLAUSIBLE_RESULT = "IMPLAUSIBLE_RESULT"  # empty, cut off, or unlike the training; refused by route only
    TOO_LARGE = "TOO_LARGE"  # would not fit in memory, or over a configured limit
    STUDY_TOO_OLD = "STUDY_TOO_OLD"
    MODEL_UNKNOWN = "MODEL_UNKNOWN"
    MODEL_WITHDRAWN = "MODEL_WITHDRAWN"


class Refusal(SegnodeError):
    """Raised when an input cannot be segmented, for a reason that the same input will always have.

    ``reason`` is the machine-readable code; the message is the sentence with the figures.
    """

    def __init__(self, reason: ReasonCode, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason

    def __repr__(self) -> str:
        return f"Refusal({self.reason.value}, {self.message!r})"


class BundleError(SegnodeError):
    """Raised when a model bundle is incomplete, altered, unsafe or not understood."""

    code = "BUNDLE_INVALID"


class GoldenCaseError(BundleError):
    """Raised when a bundle's own golden case does not come out as the training framework had it."""

    code = "GOLDEN_CASE_DISAGREES"


class SignatureError(BundleError):
    """Raised when a bundle is not signed, or not by a key that the node trusts."""

    code = "BUNDLE_NOT_TRUSTED"


class UnsupportedModelError(SegnodeError):
    """Raised when a model needs something that this engine does not do; the message names it."""

    code = "MODEL_UNSUPPORTED"


class RegistryError(SegnodeError):
    """Raised when a model or version is not in the registry, or may not be activated."""

    code = "REGISTRY"


class RegistryBusyError(RegistryError):
    """Raised when another process holds the registry for longer than is reasonable to wait."""

    code = "REGISTRY_BUSY"
    retryable = True


class ModelUnknownError(RegistryError):
    """Raised when there is no model of this name, or no such version of it."""

    code = "MODEL_UNKNOWN"


class ModelWithdrawnError(RegistryError):
    """Raised when a version that was withdrawn would be activated or run."""

    code = "MODEL_WITHDRAWN"


class ModelChangedError(RegistryError):
    """Raised when a version means something else than the active one, and nobody confirmed that."""

    code = "MODEL_CHANGED"


class RuntimeUnavailableError(SegnodeError):
    """Raised when the runtime that was asked for is not installed or does not start."""

    code = "RUNTIME_UNAVAILABLE"


class OutOfMemoryError(SegnodeError):
    """Raised before a volume is run whose estimated memory exceeds what the machine has free."""

    code = "OUT_OF_MEMORY"
    retryable = True


class NonFiniteLogitsError(SegnodeError):
    """Raised when a network gives infinity or not a number, so that no label can be decided."""

    code = "LOGITS_NOT_FINITE"
