"""How far two labelmaps agree: of two versions of a model, or of a result and what a person approved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.changes import same_label
from models.manifest import Label


@dataclass(frozen=True)
class Agreement:
    """One label in two labelmaps. ``dice`` is 1 where it is in neither, 0 where it is in one alone."""

    dice: float
    voxels: int
    expected_voxels: int


def same_labels(labels: Sequence[Label], others: Sequence[Label]) -> list[tuple[Label, Label]]:
    """The labels of two versions that mean the same (name, codes and side), whatever their values are."""
    return [(one, other) for one in labels for other in others if same_label(one, other)]


def agreement(
    result: NDArray[Any], expected: NDArray[Any], pairs: Sequence[tuple[Label, Label]]
) -> dict[str, Agreement]:
    """Dice similarity coefficient ``2 |A and B| / (|A| + |B|)`` and voxel counts, per label name.

    Parameters
    ----------
    result, expected : (Z, Y, X) arrays, uint8 or uint16
        Labelmaps on the same grid.
    pairs : sequence of two Labels
        A label as it is written in ``result``, and the same one as it is written in ``expected``.
    """
    assert result.shape == expected.shape
    width = int(max(expected.max(initial=0), *(other.value for _, other in pairs), 0)) + 1
    height = int(max(result.max(initial=0), *(one.value for one, _ in pairs), 0)) + 1
    joint = np.bincount(
        result.astype(np.int64).ravel() * width + expected.ravel(), minlength=width * height
    ).reshape(height, width)
    in_result, in_expected = joint.sum(axis=1), joint.sum(axis=0)
    found = {}
    for one, other in pairs:
        voxels, wanted = int(in_result[one.value]), int(in_expected[other.value])
        overlap = int(joint[one.value, other.value])
        dice = 2 * overlap / (voxels + wanted) if voxels + wanted else 1.0
        found[one.name] = Agreement(dice, voxels, wanted)
    return found
