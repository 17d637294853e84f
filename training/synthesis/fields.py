"""Smooth random fields and changes of resolution, both as one small matrix an axis.

A separable operation on a volume is three products with matrices of at most a few hundred rows. That is
exact, the same on every device, and costs little beside a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))


def along_axes(volume: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Apply one matrix to each of the last three axes of (..., Z, Y, X); None leaves an axis as it is."""
    for axis, matrix in zip((-3, -2, -1), matrices, strict=True):
        if matrix is not None:
            volume = torch.movedim(torch.movedim(volume, axis, -1) @ matrix.T, -1, axis)
    return volume


def spline_matrix(n: int, spacing: float) -> NDArray[np.float64]:
    """(n, m) values at 0, 1, ..., n - 1 of the m uniform cubic B-splines with knots ``spacing`` apart.

    Every row is non-negative and sums to 1, so a field never leaves the range of its coefficients.
    Reference: de Boor, A Practical Guide to Splines (1978).
    """
    m = math.ceil((n - 1) / spacing) + 3
    # The knots lie symmetrically about the middle of the axis.
    centres = (np.arange(m) - (m - 1) / 2) * spacing + (n - 1) / 2
    t = np.abs(np.arange(n)[:, None] - centres[None, :]) / spacing
    inner = 2 / 3 - t**2 + t**3 / 2
    outer = np.clip(2 - t, 0, None) ** 3 / 6
    values: NDArray[np.float64] = np.where(t < 1, inner, outer)
    return values


def smooth_field(coefficients: Tensor, shape: tuple[int, int, int], spacing: float) -> Tensor:
    """Cubic B-spline fields (K, *shape) from coefficients (K, *control_shape(shape, spacing))."""
    return along_axes(
        coefficients, [torch.as_tensor(spline_matrix(n, spacing)).to(coefficients) for n in shape]
    )


def control_shape(shape: tuple[int, int, int], spacing: float) -> tuple[int, int, int]:
    """How many coefficients a field needs along each axis."""
    z, y, x = (spline_matrix(n, spacing).shape[1] for n in shape)
    return z, y, x


def slice_matrix(n: int, spacing: float, fwhm: float, shift: float) -> NDArray[np.float64]:
    """(m, n) samples of n voxels by slices ``spacing`` voxels apart with a Gaussian profile.

    Slice i lies at ``shift + i * spacing``; its profile has the full width ``fwhm`` at half maximum, which is
    the slice's thickness. Each row sums to 1. A profile that is far narrower than a voxel interpolates
    linearly between the nearest two instead.
    """
    positions = np.arange(shift, n - 1 + 1e-9, spacing)
    distance = np.arange(n)[None, :] - positions[:, None]
    sigma = fwhm / FWHM_PER_SIGMA
    weights: NDArray[np.float64]
    if sigma < 0.25:
        weights = np.clip(1.0 - np.abs(distance), 0.0, None)
    else:
        weights = np.exp(-0.5 * (distance / sigma) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def interpolation_matrix(n: int, spacing: float, shift: float) -> NDArray[np.float64]:
    """(n, m): from the samples of `slice_matrix` back to n voxels, linear between, constant beyond."""
    positions = np.arange(shift, n - 1 + 1e-9, spacing)
    place = np.clip((np.arange(n) - shift) / spacing, 0, len(positions) - 1)
    weights: NDArray[np.float64] = np.clip(
        1.0 - np.abs(place[:, None] - np.arange(len(positions))[None, :]), 0.0, None
    )
    return weights
