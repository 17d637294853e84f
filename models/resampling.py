"""Resampling as nnU-Net v2 does it by default, axis by axis.

nnU-Net's ``resample_data_or_seg_to_shape`` calls scikit-image's ``resize`` with edge padding and no
anti-aliasing, which is scipy's ``zoom`` in grid mode followed by clipping to the input's range. Spline
interpolation is linear and separable, so along each axis it is one matrix, and scipy's own one-dimensional
``zoom`` of the unit vectors is that matrix, edge handling and all. An image is resampled by three matrix
products. Where one axis is much coarser than the others ("separate z") that axis is resampled last, by
itself, as ``map_coordinates`` does it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.errors import UnsupportedModelError
from models.manifest import Resampling

ANISOTROPY_THRESHOLD = 3.0
"""Largest over smallest spacing above which the coarse axis is resampled separately (nnU-Net's value)."""

Triple = tuple[int, int, int]


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]
) -> Triple:
    """Shape of the same field of view at another spacing, rounded half to even as nnU-Net rounds."""
    a, b, c = (round(old / new * n) for old, new, n in zip(spacing_mm, new_spacing_mm, shape, strict=True))
    return a, b, c


def separate_axis(
    spacing_mm: Sequence[float], new_spacing_mm: Sequence[float], force_separate_z: bool | None
) -> int | None:
    """The axis that is resampled by itself, or None.

    The present spacing is looked at first and then the new one; an axis counts only where exactly one has
    the largest spacing. ``force_separate_z`` says yes or no instead of the threshold.
    """
    if force_separate_z is None:
        candidates = [s for s in (spacing_mm, new_spacing_mm) if max(s) / min(s) > ANISOTROPY_THRESHOLD]
        decisive = candidates[0] if candidates else None
    else:
        decisive = spacing_mm if force_separate_z else None
    if decisive is None:
        return None
    coarse = [axis for axis in range(3) if max(decisive) / decisive[axis] == 1]
    return coarse[0] if len(coarse) == 1 else None


def resample_image(
    image: NDArray[np.float32],
    new_shape: Triple,
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
    how: Resampling,
) -> NDArray[np.float32]:
    """Resample every channel of an image to a new shape.

    Parameters
    ----------
    image : (C, Z, Y, X) array, float32
    new_shape : three ints
    spacing_mm, new_spacing_mm : three floats
        Spacing of the array's axes, in its order, before and after; they decide about separate z only.
    how : Resampling
        Spline orders, from the manifest.

    Returns
    -------
    (C, *new_shape) array, float32
        The image itself where the shape does not change.
    """
    if image.shape[1:] == tuple(new_shape):
        return image
    alone = separate_axis(spacing_mm, new_spacing_mm, how.force_separate_z)
    out = np.empty((image.shape[0], *new_shape), np.float32)
    for channel, target in zip(image, out, strict=True):
        together = tuple(axis for axis in range(3) if axis != alone)
        # Shrinking axes first keeps what is in between small.
        order = sorted(together, key=lambda axis: new_shape[axis] / channel.shape[axis])
        moved = channel
        for axis in order:
            moved = _along(moved, axis, _zoom_matrix(channel.shape[axis], new_shape[axis], how.order))
        # scikit-image clips what the spline overshoots; where z is separate it sees one slice at a time.
        lowest, highest = channel.min(axis=together, keepdims=True), channel.max(axis=together, keepdims=True)
        moved = np.clip(moved, lowest, highest)
        if alone is not None:
            size = channel.shape[alone], new_shape[alone]
            moved = _along(moved, alone, _coordinate_matrix(*size, how.order_z))
        target[...] = moved
    return out


@dataclass(frozen=True)
class Taps:
    """Linear interpolation along one axis: where each output sample reads, and how much of the second.

    ``low``, ``high`` : (n,) int64, source indices; ``part`` : (n,) float32, the part of ``high``.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    part: NDArray[np.float32]

    @staticmethod
    def between(source: int, target: int, order: int) -> Taps:
        """From ``source`` samples to ``target`` over the same field of view, order 0 (nearest) or 1."""
        position = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
        if order == 0:
            nearest = np.floor(position + 0.5).astype(np.int64)
            return Taps(nearest, nearest, np.zeros(target, np.float32))
        low = np.floor(position).astype(np.int64)
        return Taps(low, np.minimum(low + 1, source - 1), (position - low).astype(np.float32))

    def __getitem__(self, part: slice) -> Taps:
        return Taps(self.low[part], self.high[part], self.part[part])

    def moved(self, offset: int) -> Taps:
        """The same taps for a source whose first sample is at ``-offset``."""
        return Taps(self.low + offset, self.high + offset, self.part)


def check_logits_resampling(how: Resampling) -> None:
    """Check that `logits_taps` can do what a model asks for.

    Raises
    ------
    UnsupportedModelError
        For orders above 1, which nnU-Net's planner never writes for probabilities.
    """
    if how.order > 1 or how.order_z > 1:
        raise UnsupportedModelError(
            f"Resampling of probabilities with order {how.order} (order_z {how.order_z}) is not supported.",
            remedy="Export the model with a probability resampling of order 0 or 1.",
        )


def logits_taps(
    shape: Triple,
    new_shape: Triple,
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
    how: Resampling,
) -> tuple[Taps, Taps, Taps]:
    """How logits are brought from the network's grid to the image's, along each axis."""
    alone = separate_axis(spacing_mm, new_spacing_mm, how.force_separate_z)
    a, b, c = (
        Taps.between(shape[axis], new_shape[axis], how.order_z if axis == alone else how.order)
        for axis in range(3)
    )
    return a, b, c


def _along(array: NDArray[np.float32], axis: int, matrix: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Multiply a (Z, Y, X) array by a (new, old) matrix along one axis; None is the identity."""
    if matrix is None:
        return array
    if axis == 0:
        flat = matrix @ array.reshape(array.shape[0], -1)
        return flat.reshape(-1, *array.shape[1:])
    if axis == 1:
        return np.asarray(np.matmul(matrix, array))
    return np.asarray(np.matmul(array, matrix.T))


@functools.lru_cache(maxsize=16)
def _zoom_matrix(source: int, target: int, order: int) -> NDArray[np.float32] | None:
    """(target, source) matrix of scipy's zoom as scikit-image's resize calls it; None for the identity."""
    if source == target:
        return None
    columns = (
        ndimage.zoom(unit, 1 / (source / target), order=order, mode="nearest", grid_mode=True)
        for unit in np.eye(source)
    )
    return np.ascontiguousarray(np.stack(tuple(columns), axis=1), dtype=np.float32)


@functools.lru_cache(maxsize=16)
def _coordinate_matrix(source: int, target: int, order: int) -> NDArray[np.float32] | None:
    """(target, source) matrix of scipy's map_coordinates at the centres of the new samples."""
    if source == target:
        return None
    position = (source / target) * (np.arange(target) + 0.5) - 0.5
    columns = (
        ndimage.map_coordinates(unit, position[None], order=order, mode="nearest") for unit in np.eye(source)
    )
    return np.ascontiguousarray(np.stack(tuple(columns), axis=1), dtype=np.float32)
