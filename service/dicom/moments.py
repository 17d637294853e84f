"""Which of several times came first: texts of DT, or of DA and TM one after the other (PS3.5 section 6.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta

_TEXT = re.compile(r"(\d{8})?(\d\d)(\d\d)?(\d\d)?(\.\d{1,6})?([+-]\d{4})?", re.ASCII)
_LONGEST = timedelta(hours=12)  # between volumes of one series on one day; more is across midnight
_NO_DAY = date(1900, 1, 1)


def in_order(texts: Sequence[str]) -> list[str]:
    """The texts, the earliest first.

    Texts with a date are ordered by date and time, and those with an offset from UTC by that too. Without
    a date, or on one date (which a de-identification may have set), times that lie more than twelve hours
    apart are taken to lie on both sides of midnight, so that their order is unknown.

    Raises
    ------
    ValueError
        If the order cannot be told; the message ends a sentence about the times.
    """
    moments = {text: _moment(text) for text in texts}
    if len({(dated, at.tzinfo is None) for dated, at in moments.values()}) > 1:
        raise ValueError("some of them state a date or an offset from UTC, and others do not")
    by_day: dict[date, list[datetime]] = {}
    for _, at in moments.values():
        by_day.setdefault(at.date(), []).append(at)
    span = max((max(day) - min(day) for day in by_day.values()), default=timedelta())
    if span > _LONGEST:
        hours = span / timedelta(hours=1)
        raise ValueError(f"{hours:.1f} h lie between them on one date or without any, and maybe midnight")
    return sorted(texts, key=lambda text: moments[text][1])


def _moment(text: str) -> tuple[bool, datetime]:
    """Whether a text has a date, and what it says."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError("one of them is no time")
    day, hour, minute, second, fraction, offset = found.groups()
    try:
        on = date.fromisoformat(day) if day else _NO_DAY
        clock = f"{hour}:{minute or '00'}:{second or '00'}{fraction or ''}{offset or ''}"
        return bool(day), datetime.fromisoformat(f"{on} {clock}")
    except ValueError as error:
        raise ValueError("one of them is no time") from error
