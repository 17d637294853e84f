"""Which series a route takes: pure functions over what is known of a series.

A condition holds if any one value of the attribute satisfies all of it. Text is compared without its
padding and as it is written, ``regex`` is searched for anywhere in the value, and ``min`` and ``max`` are
inclusive and hold for numbers alone. ``present: false`` holds where the attribute is absent or empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from math import isfinite

from models.errors import ReasonCode, Refusal
from service.routes import SERIES_FACTS, Condition, Route

FURTHER_KEYWORDS = ("StudyDate", "SeriesNumber")
"""Attributes that decisions need beside those that conditions name."""


@dataclass(frozen=True)
class SeriesFacts:
    """What is known of one series when routes look at it.

    ``attributes`` maps DICOM keywords to the values of the first current instance, as text and without
    padding; an absent or empty attribute has no values. ``instances`` counts the current revisions.
    """

    series_id: str
    study_instance_uid: str
    series_instance_uid: str
    instances: int
    calling_ae_title: str | None = None
    called_ae_title: str | None = None
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def values(self, name: str) -> tuple[str, ...]:
        """All values of a DICOM keyword, or of one of the facts that conditions may name."""
        if name == "instances":
            return (str(self.instances),)
        if name in SERIES_FACTS:
            title = self.calling_ae_title if name == "calling_ae_title" else self.called_ae_title
            return (title,) if title else ()
        return self.attributes.get(name, ())


def wanted_keywords(routes: Sequence[Route]) -> tuple[str, ...]:
    """The DICOM keywords whose values the routes need, in order."""
    conditions = [
        match for route in routes for match in (route.match, *route.complete_when, *route.channels.values())
    ]
    named = {name for match in conditions for name in match if name not in SERIES_FACTS}
    return tuple(sorted(named | set(FURTHER_KEYWORDS)))


def takes(route: Route, series: SeriesFacts) -> bool:
    """True if every condition of the route holds for the series, and those of a channel if it has any."""
    if not satisfies(series, route.match):
        return False
    return not route.channels or any(satisfies(series, match) for match in route.channels.values())


def satisfies(series: SeriesFacts, match: Mapping[str, Condition]) -> bool:
    """True if every condition holds for the series."""
    return all(holds(condition, series.values(name)) for name, condition in match.items())


def holds(condition: Condition, values: Sequence[str]) -> bool:
    """True if the condition holds for an attribute with these values (none: absent or empty)."""
    filled = [value for value in values if value]
    if condition.present is not None and condition.present != bool(filled):
        return False
    only_presence = all(
        part is None for part in (condition.equals, condition.regex, condition.min, condition.max)
    )
    return only_presence or any(_value_holds(condition, value) for value in filled)


def _value_holds(condition: Condition, value: str) -> bool:
    number = _number(value)
    if isinstance(condition.equals, str) and value != condition.equals.strip():
        return False
    if isinstance(condition.equals, float) and number != condition.equals:
        return False
    if condition.regex is not None and re.search(condition.regex, value) is None:
        return False
    if condition.min is not None and (number is None or number < condition.min):
        return False
    return condition.max is None or (number is not None and number <= condition.max)


def choose(route: Route, matching: Sequence[SeriesFacts]) -> tuple[SeriesFacts, ...]:
    """Which of the matching series of one study the route takes.

    ``best`` is the series with the most instances, then with the smallest series number, then with the
    smallest Series Instance UID.

    Raises
    ------
    Refusal
        AMBIGUOUS_SERIES, if the route wants exactly one and several match.
    """
    if route.several == "all" or len(matching) <= 1:
        return tuple(matching)
    if route.several == "best":
        return (min(matching, key=_rank),)
    raise Refusal(
        ReasonCode.AMBIGUOUS_SERIES,
        f"{len(matching)} series of the study match the route {route.name}, which takes exactly one.",
        remedy="Narrow the route's conditions, or set 'several' to best or all.",
    )


def choose_channels(route: Route, matching: Sequence[SeriesFacts]) -> dict[str, SeriesFacts]:
    """Which of the series of one study is which channel, in the order of the route's channels.

    With ``several: best`` the best of those that match a channel is taken, as in :func:`choose`.

    Raises
    ------
    Refusal
        MISSING_CHANNEL or AMBIGUOUS_CHANNEL, with the name of every channel that is concerned.
    """
    candidates = {
        name: [series for series in matching if satisfies(series, match)]
        for name, match in route.channels.items()
    }
    missing = [name for name, found in candidates.items() if not found]
    if missing:
        raise Refusal(
            ReasonCode.MISSING_CHANNEL,
            f"The study has no series for {_channels(missing)}; the route {route.name} wants "
            f"{len(candidates)} channels: {', '.join(candidates)}.",
            remedy="Send the series that is missing, or widen the conditions of the channel.",
        )
    several = [name for name, found in candidates.items() if len(found) > 1]
    if several and route.several != "best":
        counts = ", ".join(f"{len(candidates[name])} match {name}" for name in several)
        raise Refusal(
            ReasonCode.AMBIGUOUS_CHANNEL,
            f"More than one series of the study can be {_channels(several)}: {counts}.",
            remedy="Narrow the conditions of the channel, or set 'several' to best.",
        )
    chosen = {name: min(found, key=_rank) for name, found in candidates.items()}
    by_series: dict[str, list[str]] = {}
    for name, series in chosen.items():
        by_series.setdefault(series.series_id, []).append(name)
    shared = [name for names in by_series.values() if len(names) > 1 for name in names]
    if shared:
        raise Refusal(
            ReasonCode.AMBIGUOUS_CHANNEL,
            f"One series of the study matches {_channels(shared)} alike.",
            remedy="Give each of these channels a condition that the other's series does not meet.",
        )
    return chosen


def _channels(names: Sequence[str]) -> str:
    """``the channel A``, or ``the channels A and B``."""
    if len(names) == 1:
        return f"the channel {names[0]}"
    return f"the channels {', '.join(names[:-1])} and {names[-1]}"


def _rank(series: SeriesFacts) -> tuple[int, float, str]:
    number = _number(next(iter(series.values("SeriesNumber")), ""))
    return -series.instances, float("inf") if number is None else number, series.series_instance_uid


def check_study_age(route: Route, series: SeriesFacts, *, now: datetime) -> None:
    """Refuse a study that is older than the route allows; one without a readable date is let through.

    Raises
    ------
    Refusal
        STUDY_TOO_OLD.
    """
    studied = _date(next(iter(series.values("StudyDate")), ""))
    if route.maximum_study_age_days is None or studied is None:
        return
    age_days = (now.date() - studied).days
    if age_days > route.maximum_study_age_days:
        raise Refusal(
            ReasonCode.STUDY_TOO_OLD,
            f"The study is {age_days} days old; the route {route.name} takes studies of up to "
            f"{route.maximum_study_age_days:g} days.",
            remedy="Retry the job if this study is wanted all the same.",
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None


def _date(text: str) -> date | None:
    # PS3.5 6.2, VR DA: YYYYMMDD; the older YYYY.MM.DD is still met.
    digits = text.replace(".", "")
    if re.fullmatch(r"\d{8}", digits) is None:
        return None
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return None
