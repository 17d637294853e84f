"""Routes: which series go to which model, under which rules, and where its results go."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydicom.datadict import dictionary_VR, tag_for_keyword

from service.channel_rules import AlignmentRules
from service.guard_rules import USUAL_GUARD, GuardRules
from service.reading import ReadingRules, VolumeRule

SERIES_FACTS = ("calling_ae_title", "called_ae_title", "instances")
"""What a route's condition may name beside DICOM keywords."""

# Value representations that hold no text or number to compare (PS3.5 6.2).
_NOT_COMPARABLE = ("SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN", "AT", "OB or OW")


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
ChannelName = Annotated[str, Field(min_length=1, max_length=64)]


class Section(BaseModel):
    """A part of the configuration: frozen, and nothing unknown in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Condition(Section):
    """What one attribute must be. All that is given must hold."""

    equals: str | float | None = None
    regex: Pattern | None = None
    min: float | None = None
    max: float | None = None
    present: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if all(v is None for v in (self.equals, self.regex, self.min, self.max, self.present)):
            raise ValueError("a condition needs equals, regex, min, max or present")
        return self


class Route(Section):
    """Which series go to which model, and where its results go.

    ``match`` maps a DICOM keyword (``Modality``, ``SeriesDescription``, ...), or one of
    ``calling_ae_title``, ``called_ae_title`` and ``instances``, to a condition; a bare value means
    ``equals``. :mod:`service.routing` says what holds when. ``several`` says what happens when several
    series of a study match: every one is segmented, the best one is (most instances, then the smallest
    series number), or the study is refused. A series is complete when nothing came for ``quiet_time_s``, or
    (where ``complete_when`` names the series that a study must have, each by conditions like those of
    ``match``) as soon as its study has all of them and none of these got an image for ``settled_after_s``.
    ``gantry_tilt`` and ``volume`` are those of :class:`service.reading.ReadingRules`. With
    ``refusal_objects`` a refusal is sent to the destinations
    too, as a small report, wherever patient and study can be told.

    For a model of several channels ``channels`` gives each channel of the model, by its name there, the
    conditions by which its series is told from the others that match; the study is complete when all of
    them are there. A channel that no series matches, or more than one, is refused by name; with ``several:
    best`` the best one is taken. ``reference``, ``registration``, ``registration_limit_mm`` and ``volumes``
    (like ``volume``, for one channel) are those of :class:`service.channel_rules.AlignmentRules`. ``guard``
    says what is only warned of, and what is refused: :class:`service.guard_rules.GuardRules`.
    """

    name: Identifier
    model: Identifier
    version: str | None = None
    match: dict[str, Condition]
    several: Literal["all", "best", "refuse"] = "all"
    quiet_time_s: float = Field(default=30.0, gt=0)
    complete_when: tuple[dict[str, Condition], ...] = ()
    settled_after_s: float = Field(default=5.0, gt=0)
    gantry_tilt: Literal["refuse", "resample"] = "refuse"
    volume: VolumeRule | None = None
    channels: dict[ChannelName, dict[str, Condition]] = {}
    reference: ChannelName | None = None
    registration: Literal["none", "rigid"] = "none"
    registration_limit_mm: float = Field(default=30.0, gt=0)
    volumes: dict[ChannelName, VolumeRule] = {}
    guard: GuardRules = USUAL_GUARD
    destinations: tuple[Identifier, ...] = ()
    priority: int = Field(default=0, ge=-100, le=100)
    maximum_study_age_days: float | None = Field(default=None, gt=0)
    queue_limit: int | None = Field(default=None, ge=1)
    refusal_objects: bool = False

    @model_validator(mode="before")
    @classmethod
    def _bare_values(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        written = dict(data)
        if isinstance(required := data.get("complete_when"), (list, tuple)):
            written["complete_when"] = [_as_conditions(each) for each in required]
        if "match" in data:
            written["match"] = _as_conditions(data["match"])
        if isinstance(channels := data.get("channels"), dict):
            written["channels"] = {name: _as_conditions(each) for name, each in channels.items()}
        return written

    @field_validator("match")
    @classmethod
    def _known_names(cls, match: dict[str, Condition]) -> dict[str, Condition]:
        return _check_conditions(match, "a route")

    @model_validator(mode="after")
    def _settles_before_it_is_quiet(self) -> Self:
        if self.required_series and self.settled_after_s > self.quiet_time_s:
            raise ValueError("settled_after_s cannot be longer than quiet_time_s")
        return self

    @field_validator("complete_when")
    @classmethod
    def _known_names_of_each(cls, required: tuple[dict[str, Condition], ...]) -> Any:
        return tuple(_check_conditions(each, "each series of complete_when") for each in required)

    @model_validator(mode="after")
    def _channels_can_be_told_apart(self) -> Self:
        if not self.channels:
            if self.reference is not None or self.registration != "none" or self.volumes:
                raise ValueError("reference, registration and volumes belong to a route with channels")
            return self
        if len(self.channels) == 1:
            raise ValueError("a model of one channel takes its series by match alone")
        for name, conditions in self.channels.items():
            _check_conditions(conditions, f"the channel {name}")
            if twice := sorted(set(conditions) & set(self.match)):
                raise ValueError(f"{', '.join(twice)} is in match and in the channel {name}: name it in one")
        if self.reference is not None and self.reference not in self.channels:
            raise ValueError(f"the reference {self.reference} is none of the channels")
        if unknown := sorted(set(self.volumes) - set(self.channels)):
            raise ValueError(f"volumes names {', '.join(unknown)}, which is none of the channels")
        return self

    @property
    def takes_one_of_a_study(self) -> bool:
        """Whether the route makes one job of a study, instead of one for each series."""
        return self.several != "all" or bool(self.channels)

    @property
    def required_series(self) -> tuple[dict[str, Condition], ...]:
        """The series with which a study is complete, each by its conditions; none where only quiet tells."""
        return self.complete_when or tuple({**self.match, **own} for own in self.channels.values())

    @property
    def alignment(self) -> AlignmentRules:
        """How the channels of the route are brought together."""
        return AlignmentRules(
            reference=self.reference,
            registration=self.registration,
            registration_limit_mm=self.registration_limit_mm,
            volumes=self.volumes,
        )

    @property
    def reading(self) -> ReadingRules:
        """How the images that the route takes are read."""
        return ReadingRules(gantry_tilt=self.gantry_tilt, volume=self.volume)


def _as_conditions(match: Any) -> Any:
    """A bare value means ``equals``."""
    if not isinstance(match, dict):
        return match
    return {k: v if isinstance(v, (dict, Condition)) else {"equals": v} for k, v in match.items()}


def _check_conditions(match: dict[str, Condition], whose: str) -> dict[str, Condition]:
    if not match:
        raise ValueError(f"{whose} needs at least one condition")
    for name in match:
        if name in SERIES_FACTS:
            continue
        tag = tag_for_keyword(name)
        if tag is None or dictionary_VR(tag) in _NOT_COMPARABLE:
            facts = ", ".join(SERIES_FACTS)
            raise ValueError(f"{name} is neither a DICOM keyword with plain values nor one of {facts}")
    return match
