"""An exact 3D wavelet transform for tensors, and projections onto its detail bands.

Per axis the periodised discrete wavelet transform of an even length n is an orthonormal (n, n) matrix, made
from the filters of PyWavelets: its first n/2 rows are the low pass (L), the others the high pass (H). A 3D
transform is three small matrix products, its inverse is three products with the transposes, both are
differentiable, and the energy of the coefficients is the energy of the input (Parseval). An axis of odd
length is extended by its last voxel and cropped again by the inverse; Parseval then holds for the extended
array.

A band is named by one letter per axis in the order Z, Y, X: ``"LLH"`` is low along Z and Y, high along X.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from types import EllipsisType

import numpy as np
import pywt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALL_BANDS = tuple("".join(letters) for letters in product("LH", repeat=3))
DETAIL_BANDS = ("LLH", "LHL", "LHH", "HLL", "HLH", "HHL")
"""The bands that DCD keeps (arXiv 2605.26382, section 3): neither LLL (semantics) nor HHH (noise)."""


@lru_cache(maxsize=256)
def analysis_matrix(size: int, wavelet: str = "db4") -> Tensor:
    """The orthonormal periodised analysis matrix of one axis.

    Parameters
    ----------
    size : int
        Length of the axis, even and at least 2.
    wavelet : str
        An orthogonal wavelet of PyWavelets.

    Returns
    -------
    (size, size) tensor, float64
        Row k < size/2 is the low-pass filter moved by 2k samples, row size/2 + k the high-pass filter; both
        wrap around (S. Mallat, A Wavelet Tour of Signal Processing, section 7.5.1).

    Raises
    ------
    ValueError
        If the size is odd or under 2, or the wavelet is not orthogonal.
    """
    if size < 2 or size % 2:
        raise ValueError(f"an axis of {size} has no periodised transform: the length must be even")
    filters = pywt.Wavelet(wavelet)
    if not filters.orthogonal:
        raise ValueError(f"wavelet {wavelet!r} is not orthogonal")
    matrix = np.zeros((size, size))
    for half, taps in ((0, filters.rec_lo), (size // 2, filters.rec_hi)):
        for k in range(size // 2):
            for m, tap in enumerate(taps):  # a filter that is longer than the axis adds up on itself
                matrix[half + k, (2 * k + m) % size] += tap
    return torch.from_numpy(matrix)


def exact_levels(shape_zyx: tuple[int, ...], levels: int, taps: int = 8) -> int:
    """Levels that a map supports before wrapping around dominates: min(J, floor(log2(n_min / (taps - 1)))).

    This is PyWavelets' ``dwt_max_level`` for the shortest axis.
    """
    return max(0, min(levels, int(np.floor(np.log2(min(shape_zyx) / (taps - 1))))))


def _along(matrix: Tensor, array: Tensor, axis: int) -> Tensor:
    """Multiply one of the three last axes of an array by a matrix, without a copy of a contiguous array."""
    if axis == -1:
        return array @ matrix.T
    behind = array.shape[axis:].numel() // array.shape[axis]
    rows = array.reshape(*array.shape[:axis], array.shape[axis], behind)
    return (matrix @ rows).reshape(array.shape)


def _pad_to_even(array: Tensor) -> Tensor:
    for axis in (-3, -2, -1):
        if array.shape[axis] % 2:
            array = torch.cat([array, array.narrow(axis, array.shape[axis] - 1, 1)], dim=axis)
    return array


def _crop(array: Tensor, shape_zyx: tuple[int, ...]) -> Tensor:
    z, y, x = shape_zyx
    return array[..., :z, :y, :x]


class WaveletTransform(nn.Module):
    """One level of the separable 3D transform.

    The eight bands stay side by side in one array of the (even) input size: along each axis the first half
    is L, the second H. `octant` says where a band lies.
    """

    def __init__(self, wavelet: str = "db4") -> None:
        super().__init__()
        self.wavelet = wavelet

    def _matrix(self, size: int, like: Tensor) -> Tensor:
        return analysis_matrix(size, self.wavelet).to(device=like.device, dtype=like.dtype)

    def forward(self, array: Tensor) -> Tensor:
        """(N, C, Z, Y, X) to coefficients of the same shape, odd axes extended by one."""
        array = _pad_to_even(array)
        for axis in (-3, -2, -1):
            array = _along(self._matrix(array.shape[axis], array), array, axis)
        return array

    def inverse(self, coefficients: Tensor, shape_zyx: tuple[int, ...] | None = None) -> Tensor:
        """Coefficients back to the array; ``shape_zyx`` crops what was extended."""
        array = coefficients
        for axis in (-3, -2, -1):
            array = _along(self._matrix(array.shape[axis], array).T, array, axis)
        return array if shape_zyx is None else _crop(array, shape_zyx)


def octant(band: str, shape_zyx: tuple[int, ...]) -> tuple[EllipsisType | slice, ...]:
    """Where a band lies in the coefficients of shape (..., Z, Y, X)."""
    halves = [n // 2 for n in shape_zyx]
    pick = (slice(h, None) if letter == "H" else slice(0, h) for letter, h in zip(band, halves, strict=True))
    return (..., *pick)


def _only(coefficients: Tensor, bands: tuple[str, ...]) -> Tensor:
    mask = torch.zeros(coefficients.shape[-3:], device=coefficients.device, dtype=coefficients.dtype)
    for band in bands:
        mask[octant(band, mask.shape)] = 1
    return coefficients * mask


def decompose(array: Tensor, levels: int, wavelet: str = "db4") -> list[Tensor]:
    """The coefficients of each level, finest first: level j transforms the LLL band of level j - 1.

    Parameters
    ----------
    array : (N, C, Z, Y, X) tensor
    levels : int
        At least 1.

    Returns
    -------
    list of (N, C, Z_j, Y_j, X_j) tensors
        Each holds its eight bands side by side; see `WaveletTransform`.
    """
    transform, result = WaveletTransform(wavelet), []
    for _ in range(levels):
        coefficients = transform(array)
        result.append(coefficients)
        array = coefficients[octant("LLL", coefficients.shape[-3:])]
    return result


def detail_coefficients(
    array: Tensor, levels: int, *, bands: tuple[str, ...] = DETAIL_BANDS, wavelet: str = "db4"
) -> list[Tensor]:
    """The coefficients of each level as `decompose` gives them, with zeros but in the chosen bands.

    Their energy is that of `detail_parts` (Parseval).
    """
    return [_only(coefficients, bands) for coefficients in decompose(array, levels, wavelet)]


def detail_parts(
    array: Tensor, levels: int, *, bands: tuple[str, ...] = DETAIL_BANDS, wavelet: str = "db4"
) -> list[Tensor]:
    """P_j(array) for j = 1..levels: what the chosen bands of level j contribute, at the array's own size.

    P_j sets every coefficient but those bands of level j to zero and transforms back; it is an orthogonal
    projection (for even sizes), so ``sum(P_j(x)**2)`` is the energy of those coefficients.

    Returns
    -------
    list of (N, C, Z, Y, X) tensors
    """
    transform = WaveletTransform(wavelet)
    sizes, result = [tuple(array.shape[-3:])], []
    decomposition = decompose(array, levels, wavelet)
    for coefficients in decomposition[:-1]:
        sizes.append(tuple(n // 2 for n in coefficients.shape[-3:]))
    for level in range(levels):
        part = transform.inverse(_only(decomposition[level], bands), sizes[level])
        for above in range(level - 1, -1, -1):  # every finer level holds nothing but this in its LLL band
            full = decomposition[above].shape[-3:]
            padding = [
                p for n, m in zip(reversed(full), reversed(part.shape[-3:]), strict=True) for p in (0, n - m)
            ]
            part = transform.inverse(F.pad(part, padding), sizes[above])
        result.append(part)
    return result
