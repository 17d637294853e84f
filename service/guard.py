"""Is this volume one that the model was made for, and is its result plausible? Judged with figures.

The limits and the plausible volumes are the manifest's; whether one that is not met is a warning or a
refusal is the route's to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest
from models.volume import Labelmap, Volume, spacing_xyz_mm
from service.guard_rules import USUAL_GUARD, Action, GuardRules

_TOLERANCE = 1e-3  # of a limit: what rounding in a header may take away
_INPUT_REMEDY = "Send a series that the model was made for; see its card."
_RESULT_REMEDY = "Look at the images: if the model may be used on them, have the route warn of this instead."


@dataclass(frozen=True)
class _Concern:
    reason: ReasonCode
    sentence: str
    action: Action
    remedy: str = _INPUT_REMEDY


def guard_modalities(
    manifest: Manifest, modalities: Sequence[str], rules: GuardRules = USUAL_GUARD
) -> tuple[str, ...]:
    """Judge the modality of every channel.

    Parameters
    ----------
    modalities : sequence of str
        Modality (0008,0060) per channel, in the manifest's order; empty where it is not known.

    Returns
    -------
    tuple of str
        Warnings.

    Raises
    ------
    Refusal
        WRONG_MODALITY.
    """
    return _judge(_about_modalities(manifest, modalities, rules))


def guard_grid(manifest: Manifest, volume: Volume, rules: GuardRules = USUAL_GUARD) -> tuple[str, ...]:
    """Judge the spacing, the field of view and the number of slices of a volume; the warnings.

    Slices are counted along the last voxel axis, z, of the volume as it was read.

    Raises
    ------
    Refusal
        OUT_OF_LIMITS.
    """
    return _judge(_about_grid(manifest, volume, rules))


def guard_result(manifest: Manifest, labelmap: Labelmap, rules: GuardRules = USUAL_GUARD) -> tuple[str, ...]:
    """Judge what the model has found: whether it is empty, of plausible volume, and whole; the warnings.

    Raises
    ------
    Refusal
        IMPLAUSIBLE_RESULT.
    """
    return _judge(_about_result(manifest, labelmap, rules))


def guard_removed(manifest: Manifest, labelmap: Labelmap, rules: GuardRules = USUAL_GUARD) -> tuple[str, ...]:
    """Tell what the model's post-processing took away, in mL, and judge whether it is too much; the warnings.

    Parameters
    ----------
    labelmap : Labelmap
        As the engine gave it.

    Raises
    ------
    Refusal
        IMPLAUSIBLE_RESULT.
    """
    return _judge(_about_removed(manifest, labelmap, rules))


def _judge(concerns: Iterator[_Concern]) -> tuple[str, ...]:
    warnings = []
    for concern in concerns:
        if concern.action == "refuse":
            raise Refusal(concern.reason, concern.sentence, remedy=concern.remedy)
        warnings.append(concern.sentence)
    return tuple(warnings)


def _about_modalities(manifest: Manifest, modalities: Sequence[str], rules: GuardRules) -> Iterator[_Concern]:
    for channel, modality in zip(manifest.channels, modalities, strict=True):
        allowed = (channel.modality,) if channel.modality else manifest.input_limits.modalities
        if allowed and modality and modality not in allowed:
            yield _Concern(
                ReasonCode.WRONG_MODALITY,
                f"The series for the channel {channel.name} is {modality}; {manifest.name} takes "
                f"{' or '.join(allowed)}.",
                rules.modality,
                "Send a series of the right modality, or narrow the route's conditions.",
            )


def _about_grid(manifest: Manifest, volume: Volume, rules: GuardRules) -> Iterator[_Concern]:
    limits = manifest.input_limits
    spacing = spacing_xyz_mm(volume.affine)
    slices = volume.shape_zyx[0]
    if slices < limits.minimum_slices:
        sentence = f"The series has {slices} slices; the model takes {limits.minimum_slices} or more."
        yield _Concern(ReasonCode.OUT_OF_LIMITS, sentence, rules.slices)
    extent = [n * step for n, step in zip(volume.shape_zyx[::-1], spacing, strict=True)]
    for what, values, allowed, action in (
        ("voxel spacing", spacing, limits.spacing_mm, rules.spacing),
        ("field of view", extent, limits.field_of_view_mm, rules.field_of_view),
    ):
        if allowed is None:
            continue
        lowest, highest = allowed
        if min(values) < lowest * (1 - _TOLERANCE) or max(values) > highest * (1 + _TOLERANCE):
            figures = " x ".join(f"{value:.4g}" for value in values)
            sentence = f"The {what} is {figures} mm (x, y, z); the model takes {lowest:g} to {highest:g} mm."
            yield _Concern(ReasonCode.OUT_OF_LIMITS, sentence, action)


def _about_result(manifest: Manifest, labelmap: Labelmap, rules: GuardRules) -> Iterator[_Concern]:
    def doubtful(sentence: str, action: Action) -> _Concern:
        return _Concern(ReasonCode.IMPLAUSIBLE_RESULT, sentence, action, _RESULT_REMEDY)

    volumes_ml = labelmap.volumes_ml()
    if not volumes_ml:
        yield doubtful("The result is empty: the model found nothing in this series.", rules.nothing_found)
        return
    for label in manifest.labels:
        limits, volume = label.volume_range_ml, volumes_ml.get(label.value, 0.0)
        if volume and limits is not None and not limits[0] <= volume <= limits[1]:
            usual = f"the training cases had {limits[0]:g} to {limits[1]:g} mL"
            yield doubtful(f"{label.name} has {volume:.4g} mL; {usual}.", rules.volume_range)
    at_border = _labels_at_border(labelmap.array)
    cut_off = [label.name for label in manifest.labels if label.value in at_border]
    if cut_off:
        reach, they = ("reaches", "it") if len(cut_off) == 1 else ("reach", "they")
        yield doubtful(
            f"{', '.join(cut_off)} {reach} the edge of the field of view: {they} may be cut off there.",
            rules.border,
        )


def _about_removed(manifest: Manifest, labelmap: Labelmap, rules: GuardRules) -> Iterator[_Concern]:
    removed, asked = labelmap.removed, manifest.postprocessing
    if removed is None or asked is None or not removed.islands:
        return
    names = {label.value: label.name for label in manifest.labels}
    by_size = sorted(removed.voxels.items(), key=lambda item: -item[1])
    volume = labelmap.voxel_volume_ml
    parts = ", ".join(f"{names[value]} {voxels * volume:.3g} mL" for value, voxels in by_size)
    sentence = (
        f"Islands left out, as they lie apart from the largest part: {removed.islands}, together "
        f"{sum(removed.voxels.values()) * volume:.3g} mL, {removed.share:.2%} of what was found ({parts})"
    )
    if removed.share <= asked.maximum_removed_share:
        yield _Concern(ReasonCode.IMPLAUSIBLE_RESULT, f"{sentence}.", "warn")
        return
    sentence += f"; the model's card allows {asked.maximum_removed_share:.2%}."
    yield _Concern(ReasonCode.IMPLAUSIBLE_RESULT, sentence, rules.removed, _RESULT_REMEDY)


def _labels_at_border(array: NDArray[Any]) -> frozenset[int]:
    """The labels in the outermost voxels of a (Z, Y, X) grid."""
    faces = [np.take(array, index, axis) for axis in range(3) for index in (0, -1)]
    return frozenset(int(value) for face in faces for value in np.unique(face)) - {0}
