"""Has a study every series that a route waits for? Pure functions over what is known of its series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.routes import Condition
from service.routing import SeriesFacts, satisfies


def are_present(required: Sequence[Mapping[str, Condition]], found: Sequence[SeriesFacts]) -> bool:
    """True if every required series is there, each of them another one.

    One series never stands for two: where T1 and T1 with contrast are required by conditions that both
    hold for the second, the first must have come as well.
    """
    taken: dict[int, int] = {}  # index in found -> index in required
    return all(_find_one(i, required, found, taken, set()) for i in range(len(required)))


def _find_one(
    wanted: int,
    required: Sequence[Mapping[str, Condition]],
    found: Sequence[SeriesFacts],
    taken: dict[int, int],
    tried: set[int],
) -> bool:
    """Give one requirement a series, moving others to further ones where that helps (an augmenting path)."""
    for i, series in enumerate(found):
        if i in tried or not satisfies(series, required[wanted]):
            continue
        tried.add(i)
        if i not in taken or _find_one(taken[i], required, found, taken, tried):
            taken[i] = wanted
            return True
    return False
