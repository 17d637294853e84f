"""The golden case: a bundle proves on this very machine that it still does what it did in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.errors import GoldenCaseError, Refusal, RuntimeUnavailableError
from models.manifest import Label, Precision
from models.nifti import read_labelmap, read_nifti
from models.runtimes import available_runtimes
from models.segmenter import Segmenter
from models.volume import Labelmap, Volume

MINIMUM_DICE = {Precision.FLOAT32: 0.999, Precision.INT8: 0.99}
"""Smallest Dice that every label must reach, by the precision of the weights."""

_GRID_TOLERANCE_MM = 1e-3


def check_golden_case(
    bundle: Bundle, *, runtime: str = "auto", precision: Precision | None = None
) -> dict[str, float]:
    """Segment the golden image and compare with the golden labelmap.

    Parameters
    ----------
    bundle : Bundle
        What to check.
    runtime : str
        One of :func:`models.runtimes.available_runtimes`, or ``"auto"``.
    precision : Precision, optional
        Which weights; by default those that the manifest says are run.

    Returns
    -------
    dict of str to float
        Dice per label name, every one at least :data:`MINIMUM_DICE`.

    Raises
    ------
    GoldenCaseError
        If a label's Dice is too low, or the golden case itself can prove nothing: it is unreadable, on two
        different grids, holds values that are no labels, or no label at all.
    RuntimeUnavailableError
        If the runtime is not installed or does not start.
    UnsupportedModelError
        If the bundle has no weights of this precision, or the runtime cannot run its network.
    """
    precision = precision or bundle.manifest.precision
    volume, expected = _read_golden_case(bundle)
    segmenter = Segmenter(bundle, runtime=runtime, precision=precision)
    try:
        result = segmenter.segment(volume)
        ran_on = segmenter.runtime_name
    except Refusal as refusal:
        raise _error(bundle, f"was refused: {refusal.message}") from refusal
    finally:
        segmenter.close()
    dice = dice_per_label(result.array, expected.array, bundle.manifest.labels)
    too_low = {name: value for name, value in dice.items() if value < MINIMUM_DICE[precision]}
    if too_low:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in too_low.items())
        raise _error(
            bundle,
            f"disagrees on {ran_on} in {precision}: Dice {figures},"
            f" where at least {MINIMUM_DICE[precision]} is needed",
        )
    return dice


def check_golden_case_everywhere(
    bundle: Bundle, *, runtimes: Sequence[str] | None = None
) -> dict[tuple[str, Precision], dict[str, float]]:
    """Check the golden case on every runtime in use, for every precision that the bundle has.

    ``runtimes`` is by default every available one. Weights that are not float32 are made for OpenVINO and
    are checked there alone where it is in use.

    Raises
    ------
    GoldenCaseError, RuntimeUnavailableError, UnsupportedModelError
        As :func:`check_golden_case` does.
    """
    in_use = tuple(available_runtimes() if runtimes is None else runtimes)
    if not in_use:
        raise RuntimeUnavailableError(
            "There is no runtime here to check the golden case on.", remedy="Install openvino or onnxruntime."
        )
    dice = {}
    for precision in sorted({weights.precision for weights in bundle.manifest.weights}):
        lower = precision is not Precision.FLOAT32
        for runtime in ("openvino",) if lower and "openvino" in in_use else in_use:
            dice[runtime, precision] = check_golden_case(bundle, runtime=runtime, precision=precision)
    return dice


def dice_per_label(result: NDArray[Any], expected: NDArray[Any], labels: Sequence[Label]) -> dict[str, float]:
    """Dice similarity coefficient ``2 |A and B| / (|A| + |B|)`` per label name, from 0 to 1.

    Parameters
    ----------
    result, expected : (Z, Y, X) arrays of integers
        Labelmaps on the same grid.
    labels : sequence of Label
        Which values to compare.

    A label that is in neither labelmap has a Dice of 1 (both say the same), in one alone of 0.

    >>> liver = Label.model_validate({
    ...     "value": 1, "name": "liver", "color_rgb": (221, 130, 101),
    ...     "category": {"value": "123037004", "meaning": "Anatomical Structure"},
    ...     "type": {"value": "10200004", "meaning": "Liver"}})
    >>> dice_per_label(np.array([[[0, 1, 1]]]), np.array([[[1, 1, 1]]]), [liver])
    {'liver': 0.8}
    >>> dice_per_label(np.zeros((1, 1, 3), int), np.zeros((1, 1, 3), int), [liver])
    {'liver': 1.0}
    """
    dice = {}
    for label in labels:
        in_result, in_expected = result == label.value, expected == label.value
        size = int(np.count_nonzero(in_result)) + int(np.count_nonzero(in_expected))
        overlap = int(np.count_nonzero(in_result & in_expected))
        dice[label.name] = 2 * overlap / size if size else 1.0
    return dice


def _read_golden_case(bundle: Bundle) -> tuple[Volume, Labelmap]:
    try:
        volume = read_nifti(bundle.golden_image_paths)
        expected = read_labelmap(bundle.golden_labelmap_path)
    except Refusal as refusal:
        raise _error(bundle, f"cannot be read: {refusal.message}") from refusal
    if expected.array.shape != volume.shape_zyx or not np.allclose(
        expected.affine, volume.affine, rtol=0, atol=_GRID_TOLERANCE_MM
    ):
        raise _error(bundle, "has its image and its labelmap on different grids")
    found = set(np.unique(expected.array).tolist()) - {0}
    unknown = found - {label.value for label in bundle.manifest.labels}
    if unknown:
        raise _error(bundle, f"has values that are no labels: {sorted(unknown)}")
    if not found:
        raise _error(bundle, "has an empty labelmap, which proves nothing")
    return volume, expected


def _error(bundle: Bundle, what: str) -> GoldenCaseError:
    manifest = bundle.manifest
    return GoldenCaseError(
        f"The golden case of {manifest.name} {manifest.version} {what}.",
        remedy="Do not use this bundle on this machine; ask its maker.",
    )
