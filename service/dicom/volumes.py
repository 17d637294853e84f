"""One volume of a series that holds several: echoes, phases, time points, b-values, reconstructions.

A volume is taken by one attribute that a rule names, and only if the images that have the value are a
whole volume: one at every position at which the series has any. An attribute that varies from slice to
slice tells no volumes apart, and taking its first value would silently leave slices out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.errors import ReasonCode, Refusal
from service.dicom.frames import Frame
from service.dicom.moments import in_order
from service.dicom.traits import Trait, differing_traits, text_of, trait
from service.reading import TIME_TRAITS, VolumeRule

_SAME_PLACE_MM = 0.1  # positions of one slice in two volumes may be rounded differently
_PARALLEL = 0.999  # cosine between the normals of images whose positions are compared
_LISTED = 6
_DATE = 8  # characters of a date before its time
_RELATIVE = 1e-6  # between two decimal spellings of one number
_ONE_NOMINAL = 0.05  # relative: values this near are one setting, as each pass of an acquisition realised it
_ONE_CONTRAST = (  # what has one value throughout a volume, in whatever order its slices were acquired
    "EchoTime",
    "EchoNumbers",
    "DiffusionBValue",
    "ImageType",
    "ComplexImageComponent",
    "ConvolutionKernel",
    "KVP",
)


def pick_volume(frames: Sequence[Frame], rule: VolumeRule) -> tuple[list[Frame], str | None]:
    """The frames of the volume that a rule takes, and a sentence that says which it was.

    Where the series is one volume, a rule that takes the first, the last or the nearest has no choice and
    says nothing; one that asks for a value is held to it wherever the images state one.

    Raises
    ------
    Refusal
        MULTI_VOLUME where the rule does not single one whole volume out; OUT_OF_LIMITS where the series is
        one volume of another value than the one that is asked for.
    """
    values = [trait(frame, rule.by) for frame in frames]
    stated = sorted({value for value in values if value is not None}, key=_order)
    several = _have_repeated_places(frames)
    if not stated or (not several and rule.equals is None):
        return list(frames), None  # where places repeat all the same, the grid refuses them with its figures
    chosen = _choose(stated, rule)
    if not chosen:
        raise Refusal(
            ReasonCode.MULTI_VOLUME if several else ReasonCode.OUT_OF_LIMITS,
            f"No image has {rule.sentence}; {_listed(stated)} {'is' if len(stated) == 1 else 'are'} there.",
            remedy="Route the series that is wanted, or change the rule by which the route takes a volume.",
        )
    picked = [frame for frame, value in zip(frames, values, strict=True) if value in chosen]
    others = [frame for frame, value in zip(frames, values, strict=True) if value not in chosen]
    if not others:
        return picked, None
    without = 0 if rule.by == "StackID" else _places_without(picked, others)  # a stack is one by its nature
    which = f"{rule.by} {' and '.join(text_of(value) for value in sorted(chosen, key=_order))}"
    if without:
        raise Refusal(
            ReasonCode.MULTI_VOLUME,
            f"{rule.by} does not tell volumes apart: with {which} there are {len(picked)} of {len(frames)} "
            f"images, and none at {without} other positions of the series.",
            remedy="Route a series that holds one volume, or name another attribute in the route's rule.",
        )
    return picked, f"Taken: {len(picked)} of {len(frames)} images, by {which} of {_listed(stated)}."


def told_apart(frames: Sequence[Frame], places: NDArray[np.intp], count: int) -> str:
    """By what the volumes of a series can be told apart, for a message; empty where nothing is known.

    Parameters
    ----------
    frames : sequence of Frame
        Several at each place.
    places : (N,) array
        At which place each of them lies.
    count : int
        How many places there are.
    """
    differing = differing_traits(frames)
    clean = []
    for name in differing:
        values = [trait(frame, name) for frame in frames]
        seats = Counter(zip(values, places.tolist(), strict=True))
        sizes = Counter(values)
        if None not in sizes and max(seats.values()) == 1 and set(sizes.values()) == {count}:
            clean.append(f"{name} ({_listed(sorted(sizes, key=_order))})")
    if clean:
        return f", told apart by {' or by '.join(clean[:3])}"
    return f"; they differ in {', '.join(differing)}" if differing else ""


def refuse_interleaved(frames: Sequence[Frame]) -> None:
    """Raise Refusal (MULTI_VOLUME) where volumes of several contrasts lie between each other's slices.

    Two echoes or kernels that are shifted by half a spacing look like one regular stack of half of it.

    Parameters
    ----------
    frames : sequence of Frame
        In the order of their positions along the normal.
    """
    for name in _ONE_CONTRAST:
        values = [trait(frame, name) for frame in frames]
        kinds = sorted(set(values), key=_order)
        count = len(kinds)
        numbers = [kind for kind in kinds if isinstance(kind, float)]
        if None in kinds or not 1 < count <= len(values) // 2:
            continue
        if numbers and max(numbers) - min(numbers) <= _ONE_NOMINAL * max(numbers):
            continue
        if len(set(values[:count])) == count and values[count:] == values[:-count]:
            raise Refusal(
                ReasonCode.MULTI_VOLUME,
                f"From slice to slice {name} takes turns ({_listed(kinds)}): the images are those of {count} "
                "volumes, each of them shifted against the others.",
                remedy="Route a series that holds one volume (one phase, echo, time point or contrast).",
            )


def separating_traits(frames: Sequence[Frame], groups: Sequence[int]) -> list[str]:
    """The attributes that have one value in each group of frames, and another in every other group."""
    found = []
    for name in differing_traits(frames):
        values = [trait(frame, name) for frame in frames]
        pairs = set(zip(values, groups, strict=True))
        if None not in values and len(pairs) == len(set(values)) == len(set(groups)):
            found.append(name)
    return found


def _choose(stated: Sequence[Trait], rule: VolumeRule) -> set[Trait]:
    """The values that a rule takes of those that are stated, in ascending order."""
    if rule.take is not None:
        ordered = _by_time(stated, rule) if rule.by in TIME_TRAITS else stated
        return {ordered[0 if rule.take == "first" else -1]}
    if rule.nearest is not None:
        numbers = [value for value in stated if isinstance(value, float)]
        return {min(numbers, key=lambda value: abs(value - (rule.nearest or 0.0)))} if numbers else set()
    return {value for value in stated if _is(value, rule.equals) or _is_at(value, rule)}


def _is(value: Trait, wanted: float | str | None) -> bool:
    if isinstance(value, float):
        return isinstance(wanted, float) and abs(value - wanted) <= _RELATIVE * max(1.0, abs(wanted))
    return value is not None and (wanted in value or wanted == "\\".join(value))


def _is_at(value: Trait, rule: VolumeRule) -> bool:
    """True if a time of day that a rule asks for is that of a value, on whatever date."""
    return rule.by in TIME_TRAITS and text_of(value)[_DATE:] == str(rule.equals).replace(":", "")


def _by_time(stated: Sequence[Trait], rule: VolumeRule) -> list[Trait]:
    """Times, the earliest first. Raises Refusal (MULTI_VOLUME) where their order cannot be told."""
    by_text: dict[str, Trait] = {text_of(value): value for value in stated}
    try:
        return [by_text[text] for text in in_order(list(by_text))]
    except ValueError as error:
        raise Refusal(
            ReasonCode.MULTI_VOLUME,
            f"Which is {rule.sentence} of {_listed(stated)} cannot be told: {error}.",
            remedy="Name another attribute in the route's rule, such as AcquisitionNumber or "
            "TemporalPositionIndex, or choose the volume by equals.",
        ) from error


def _have_repeated_places(frames: Sequence[Frame]) -> bool:
    """True if two parallel images lie at one position along their normal."""
    while frames:
        along = np.sort(_along(frames[0], frames))
        parallel = along[~np.isnan(along)]
        if np.diff(parallel).min(initial=np.inf) < _SAME_PLACE_MM:
            return True
        frames = [f for f, place in zip(frames, _along(frames[0], frames), strict=True) if np.isnan(place)]
    return False


def _places_without(picked: Sequence[Frame], others: Sequence[Frame]) -> int:
    """How many positions of other parallel images have none of the picked ones."""
    here = _along(picked[0], picked)
    there = _along(picked[0], others)
    alone = [p for p in there[~np.isnan(there)] if np.nanmin(np.abs(here - p)) > _SAME_PLACE_MM]
    return len(np.unique(np.round(alone, 1)))


def _along(first: Frame, frames: Sequence[Frame]) -> NDArray[np.float64]:
    """Where frames lie along the normal of the first, in mm; not a number for those that are not parallel."""
    normal = np.cross(first.row, first.column)
    normals = np.cross([frame.row for frame in frames], [frame.column for frame in frames])
    lengths = np.linalg.norm(normals, axis=1) * np.linalg.norm(normal)
    parallel = np.abs(normals @ normal) >= _PARALLEL * lengths
    parallel[0] |= frames[0] is first  # also where its directions are no directions at all
    return np.where(parallel, np.array([frame.position_mm for frame in frames]) @ normal, np.nan)


def _order(value: Trait) -> tuple[float, tuple[str, ...]]:
    return (value, ()) if isinstance(value, float) else (0.0, value or ())


def _listed(values: Sequence[Trait]) -> str:
    some = ", ".join(text_of(value) for value in values[:_LISTED])
    return some if len(values) <= _LISTED else f"{some} and {len(values) - _LISTED} more"
