"""How the images of a route are read: what is done with a sheared stack, and with several volumes in one.

Nothing here reads anything: these are the settings that the reader of a series is given.
"""

from __future__ import annotations

import hashlib
import re
from math import isfinite
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

NUMBERED_TRAITS = (
    "EchoTime",
    "EchoNumbers",
    "InversionTime",
    "RepetitionTime",
    "FlipAngle",
    "DiffusionBValue",
    "TemporalPositionIndex",
    "TriggerTime",
    "NominalPercentageOfCardiacPhase",
    "FrameReferenceTime",
    "KVP",
    "AcquisitionNumber",
)
"""What volumes of one series can differ in, in DICOM's own words, where the values are numbers."""

TIME_TRAITS = ("AcquisitionTime", "ContentTime")
"""The same, where they are times. Of single-frame images a time is one with its date where that is stated
(AcquisitionDate, AcquisitionDateTime; ContentDate), as of enhanced ones: 20260304235930.5."""

NAMED_TRAITS = ("ImageType", "ComplexImageComponent", "ConvolutionKernel", "StackID")
"""The same, where they have no order."""


class VolumeRule(BaseModel):
    """Which volume is taken of a series that holds several: phases, echoes, time points, b-values.

    Parameters
    ----------
    by : str
        What the volumes differ in: one of ``NUMBERED_TRAITS``, ``TIME_TRAITS`` and ``NAMED_TRAITS``, in
        single-frame headers as well as in the functional groups of enhanced objects.
    take : str, optional
        The volume with the smallest value, or with the largest; of times the earliest or the latest, by their
        dates. Times without a date, or on one date, are refused where they lie more than 12 hours apart:
        midnight may be between them.
    nearest : float, optional
        The volume whose value is nearest to this one; the smaller of two that are equally near.
    equals : str or float, optional
        The volume with this value, or with this one among several (``ImageType``), or at this time of
        whatever date. It holds where a series
        is one volume too: one of another value is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str
    take: Literal["first", "last"] | None = None
    nearest: float | None = Field(default=None, allow_inf_nan=False)
    equals: float | str | None = None

    @field_validator("by")
    @classmethod
    def _is_known(cls, by: str) -> str:
        known = NUMBERED_TRAITS + TIME_TRAITS + NAMED_TRAITS
        if by not in known:
            raise ValueError(f"{by} is none of {', '.join(known)}")
        return by

    @field_validator("equals")
    @classmethod
    def _is_of_its_kind(cls, equals: float | str | None, info: ValidationInfo) -> float | str | None:
        if equals is None:
            return None
        if info.data.get("by") in TIME_TRAITS and not isinstance(equals, str):
            raise ValueError("YAML reads a time as another number: write it in quotes")
        if info.data.get("by") not in NUMBERED_TRAITS:
            return f"{equals:g}" if isinstance(equals, float) else equals.strip()
        number = float(equals)  # a ValueError says what is wrong
        if not isfinite(number):
            raise ValueError("the value must be finite")
        return number

    @model_validator(mode="after")
    def _is_one_choice(self) -> Self:
        if sum(choice is not None for choice in (self.take, self.nearest, self.equals)) != 1:
            raise ValueError("a volume is chosen by one of take, nearest and equals")
        if self.by in NAMED_TRAITS and self.equals is None:
            raise ValueError(f"{self.by} has no order: choose its volume by equals")
        if self.by in TIME_TRAITS and self.nearest is not None:
            raise ValueError(f"{self.by} is no number: choose its volume by take or equals")
        return self

    @staticmethod
    def parse(text: str) -> VolumeRule:
        """A rule from one word: ``EchoTime:first``, ``EchoTime:last``, ``EchoTime~30`` (nearest) or
        ``DiffusionBValue=0``.

        Raises
        ------
        ValueError
            If it is none.
        """
        found = re.fullmatch(r"(\w+)([:~=])(.+)", text.strip())
        if found is None:
            raise ValueError(f"{text} is not like EchoTime:first, EchoTime~30 or DiffusionBValue=0")
        by, sign, value = found.groups()
        return VolumeRule.model_validate(
            {"by": by, {":": "take", "~": "nearest", "=": "equals"}[sign]: value}
        )

    @property
    def sentence(self) -> str:
        """How a message names the rule."""
        if self.take is not None:
            return f"the {self.take} {self.by}"
        if self.nearest is not None:
            return f"the {self.by} nearest to {self.nearest:g}"
        wanted = f"{self.equals:g}" if isinstance(self.equals, float) else self.equals
        return f"{self.by} {wanted}"


class ReadingRules(BaseModel):
    """What a route says of the images that it takes.

    Parameters
    ----------
    gantry_tilt : str
        Whether a stack whose slices are shifted against each other is refused, or resampled onto a
        rectangular grid for the model; its labels are then brought back onto the slices as they are.
    volume : VolumeRule, optional
        Which volume of several is taken; without a rule such a series is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gantry_tilt: Literal["refuse", "resample"] = "refuse"
    volume: VolumeRule | None = None

    def mixed_into(self, settings_digest: str) -> str:
        """The digest of all settings that can change a result: these and the others; the others' alone
        where these are the defaults."""
        if self == AS_USUAL:
            return settings_digest
        text = f"{settings_digest}\0{self.model_dump_json(exclude_defaults=True)}"
        return hashlib.sha256(text.encode()).hexdigest()


AS_USUAL = ReadingRules()
