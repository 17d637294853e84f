"""How well a labelmap agrees with a reference: Dice, surface Dice (NSD) and HD95, with a rule for nothing.

Where a label is in neither of the two, they agree: Dice 1, NSD 1, HD95 0. Where it is in one only, nothing
agrees: Dice 0, NSD 0, and HD95 is the diagonal of the volume, the largest distance there could be. No case
is ever left out of a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """The metrics of one label of one case. ``hd95_mm`` in millimetres, the others from 0 to 1."""

    dice: float
    nsd: float
    hd95_mm: float
    reference_ml: float
    predicted_ml: float


def compare(
    predicted: NDArray[Any],
    reference: NDArray[Any],
    value: int,
    spacing_zyx_mm: tuple[float, float, float],
    tolerance_mm: float,
) -> Agreement:
    """The agreement of one label.

    Parameters
    ----------
    predicted, reference : (Z, Y, X) integer arrays
        Labelmaps on the same grid.
    value : int
        The label.
    spacing_zyx_mm : tuple of float
        Voxel size along Z, Y, X in millimetres.
    tolerance_mm : float
        Distance up to which two surfaces count as the same, for NSD.
    """
    assert predicted.shape == reference.shape, "a labelmap is compared on the grid of its reference"
    p, r = predicted == value, reference == value
    voxel_ml = float(np.prod(spacing_zyx_mm)) / 1000.0
    nsd, hd95 = surface_agreement(p, r, spacing_zyx_mm, tolerance_mm)
    return Agreement(dice(p, r), nsd, hd95, float(r.sum()) * voxel_ml, float(p.sum()) * voxel_ml)


def dice(predicted: Mask, reference: Mask) -> float:
    """2 |P ∩ R| / (|P| + |R|); 1 where both are empty."""
    total = int(predicted.sum()) + int(reference.sum())
    return 1.0 if total == 0 else 2.0 * int((predicted & reference).sum()) / total


def surface(mask: Mask) -> Mask:
    """The voxels of a mask that touch, by a face, a voxel outside of it or the border of the volume."""
    eroded: Mask = ndimage.binary_erosion(mask, ndimage.generate_binary_structure(3, 1), border_value=0)
    return mask & ~eroded


def surface_agreement(
    predicted: Mask, reference: Mask, spacing_zyx_mm: tuple[float, float, float], tolerance_mm: float
) -> tuple[float, float]:
    """NSD and HD95 from the distances between the surface voxels of two masks.

    NSD is the part of both surfaces that lies within the tolerance of the other (Nikolov et al.,
    arXiv 1809.04430, with surface voxels as elements). HD95 is the larger of the two directed 95th
    percentiles.
    """
    if not predicted.any() and not reference.any():
        return 1.0, 0.0
    if not predicted.any() or not reference.any():
        diagonal = np.linalg.norm(np.array(predicted.shape) * np.array(spacing_zyx_mm))
        return 0.0, float(diagonal)
    box = _bounding_box(predicted | reference)
    p, r = surface(np.pad(predicted[box], 1)), surface(np.pad(reference[box], 1))
    to_reference = ndimage.distance_transform_edt(~r, sampling=spacing_zyx_mm)[p]
    to_predicted = ndimage.distance_transform_edt(~p, sampling=spacing_zyx_mm)[r]
    within = int((to_reference <= tolerance_mm).sum()) + int((to_predicted <= tolerance_mm).sum())
    hd95 = max(np.percentile(to_reference, 95), np.percentile(to_predicted, 95))
    return within / (to_reference.size + to_predicted.size), float(hd95)


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    return tuple(box)


@dataclass(frozen=True)
class Summary:
    """A mean over cases with its standard error (0 for a single case)."""

    mean: float
    standard_error: float
    cases: int


def summarise(values: list[float]) -> Summary:
    """Mean and standard error, s/√n with n - 1 degrees of freedom."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / np.sqrt(array.size)) if array.size > 1 else 0.0
    return Summary(float(array.mean()), error, array.size)


@dataclass(frozen=True)
class PairedTest:
    """Whether two models differ on the same cases; p values are two-sided, 1 where nothing differs."""

    mean_difference: float
    t_test_p: float
    wilcoxon_p: float


def paired_test(values: list[float], baseline: list[float]) -> PairedTest:
    """Paired t-test and Wilcoxon signed-rank test of ``values`` against ``baseline``, case by case."""
    assert len(values) == len(baseline), "a paired test needs the same cases in the same order"
    differences = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    if differences.size < 2 or np.allclose(differences, differences[0]):
        same = bool(np.allclose(differences, 0))
        p = 1.0 if same or differences.size < 2 else 0.0
        return PairedTest(float(differences.mean()), p, p)
    t_test = stats.ttest_rel(values, baseline)
    wilcoxon = stats.wilcoxon(differences, method="auto")
    return PairedTest(float(differences.mean()), float(t_test.pvalue), float(wilcoxon.pvalue))
