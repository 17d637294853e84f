"""Tiles: where they lie, how they are weighted, and how their sums stream to the labelmap.

Tile starts, weights and order of arithmetic are those of nnU-Net v2.8's predictor
(``inference/sliding_window_prediction.py``), with sums in float32 instead of float16. Tiles are visited in
layers along one axis; once a layer is done, the planes that no later tile reaches are final. Only the planes
of one patch are ever held, whatever the size of the volume.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models import kernels
from models.resampling import Triple

_PEAK = 10.0
_SIGMA_OF_PATCH = 1.0 / 8


@functools.lru_cache(maxsize=4)
def gaussian_weights(patch: Triple) -> NDArray[np.float32]:
    """nnU-Net's importance of each voxel of a tile, (Z, Y, X) float32, rounded to float16 as nnU-Net has it.

    A Gaussian of sigma = patch / 8 around the voxel patch // 2, cut off at four sigma, its peak scaled to 10;
    what float16 rounds to zero is lifted to the smallest value that is not. scipy's filter of a single voxel
    is the outer product of its one-dimensional filters, to the last bit, and takes no time.
    """
    lines = []
    for size in patch:
        line = np.zeros(size)
        line[size // 2] = 1
        lines.append(ndimage.gaussian_filter1d(line, size * _SIGMA_OF_PATCH, mode="constant", cval=0))
    z, y, x = lines
    weights = z[:, None, None] * y[:, None] * x
    weights /= weights.max() / _PEAK
    rounded = weights.astype(np.float32).astype(np.float16)  # in two steps, as torch rounds float64
    rounded[rounded == 0] = rounded[rounded > 0].min()
    return np.asarray(rounded.astype(np.float32))


def tile_starts(size: int, patch: int, step: float) -> tuple[int, ...]:
    """Starts of the tiles along one axis, evenly spread and rounded, at most ``step`` patches apart."""
    count = math.ceil((size - patch) / (patch * step)) + 1
    if count == 1:
        return (0,)
    return tuple(int(np.round((size - patch) / (count - 1) * i)) for i in range(count))


@dataclass(frozen=True)
class Tiling:
    """The tiles of one volume.

    ``shape`` is the padded shape, ``before`` the padding in front of each axis, ``axis`` the one along which
    finished planes stream out: where the volume is longest in patches, so that the least is held.
    """

    shape: Triple
    before: Triple
    patch: Triple
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    axis: int

    @staticmethod
    def of(shape: Sequence[int], patch: Triple, step: float) -> Tiling:
        """Tiles for a volume of ``shape``; what is smaller than a patch is padded around its middle."""
        padded = [max(n, p) for n, p in zip(shape, patch, strict=True)]
        before = [(m - n) // 2 for m, n in zip(padded, shape, strict=True)]
        starts = [tile_starts(m, p, step) for m, p in zip(padded, patch, strict=True)]
        axis = max(range(3), key=lambda a: padded[a] / patch[a])
        return Tiling(
            (padded[0], padded[1], padded[2]),
            (before[0], before[1], before[2]),
            patch,
            (starts[0], starts[1], starts[2]),
            axis,
        )

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(len(starts) for starts in self.starts)

    @property
    def held_shape(self) -> Triple:
        """Shape of what is held at once: one patch along `axis` and the finished plane before it."""
        held = list(self.shape)
        if held[self.axis] > self.patch[self.axis]:
            held[self.axis] = self.patch[self.axis] + 1
        return held[0], held[1], held[2]

    def layers(self) -> Iterator[tuple[int, int, list[Triple]]]:
        """For each layer: its start, the first plane that is not final after it, and its tiles' starts."""
        along = self.starts[self.axis]
        for start, final in zip(along, (*along[1:], self.shape[self.axis]), strict=True):
            choices = [(start,) if a == self.axis else self.starts[a] for a in range(3)]
            yield start, final, [(z, y, x) for z, y, x in itertools.product(*choices)]


def pad(image: NDArray[np.float32], tiling: Tiling) -> NDArray[np.float32]:
    """Zeros around a (C, Z, Y, X) image up to the tiling's shape; the image itself where it fits."""
    if image.shape[1:] == tiling.shape:
        return image
    after = [m - n - b for m, n, b in zip(tiling.shape, image.shape[1:], tiling.before, strict=True)]
    return np.pad(image, [(0, 0), *zip(tiling.before, after, strict=True)])


def cut_tile(image: NDArray[np.float32], corner: Triple, patch: Triple) -> NDArray[np.float32]:
    """The tile of a padded (C, Z, Y, X) image that starts at ``corner``, (C, *patch), contiguous."""
    where = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
    return np.ascontiguousarray(image[(slice(None), *where)])


def tiles(image: NDArray[np.float32], tiling: Tiling) -> Iterator[NDArray[np.float32]]:
    """Every tile of a preprocessed (C, Z, Y, X) image, in the order in which the network sees them."""
    padded = pad(image, tiling)
    for _, _, corners in tiling.layers():
        for corner in corners:
            yield cut_tile(padded, corner, tiling.patch)


@dataclass(frozen=True)
class Planes:
    """Finished planes of normalised features.

    ``features`` : (A + 1, Z, Y, X), of which the planes from ``first`` to ``last`` of the padded volume along
    the tiling's axis are final, and plane ``i`` lies at index ``i - origin``. One plane before ``first`` is
    still there, so that an interpolation has both its neighbours.
    """

    features: NDArray[np.float32]
    origin: int
    first: int
    last: int


def stream_features(
    image: NDArray[np.float32],
    tiling: Tiling,
    run_tile: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    channels: int,
    workers: kernels.Workers,
    after_tile: Callable[[int], None],
) -> Iterator[Planes]:
    """Run the network over all tiles and yield the planes of the weighted mean as they become final.

    Parameters
    ----------
    image : (C, Z, Y, X) array, float32
        After `pad`.
    run_tile : callable
        (C, *patch) to (channels, *patch), both float32.
    after_tile : callable
        Gets the number of tiles that are done.
    """
    accumulate = kernels.compiled(kernels.accumulate)
    weights = gaussian_weights(tiling.patch)
    axis = tiling.axis
    held = tiling.held_shape
    sums = np.zeros((channels + 1, *held), np.float32)
    rolling = held != tiling.shape
    origin, done = 0, 0
    for start, final, corners in tiling.layers():
        if rolling and start - 1 > origin:
            _roll(sums, axis + 1, start - 1 - origin)
            origin = start - 1
        for corner in corners:
            at = [c - origin if a == axis else c for a, c in enumerate(corner)]
            tile = run_tile(cut_tile(image, corner, tiling.patch))
            workers.share(
                tiling.patch[0],
                functools.partial(accumulate, sums, tile, weights, *at),
            )
            done += 1
            after_tile(done)
        _normalise(sums, axis + 1, start - origin, final - origin)
        yield Planes(sums, origin, start, final)


def _roll(array: NDArray[np.float32], axis: int, distance: int) -> None:
    """Move planes towards the front by ``distance``, in place, and clear what they leave behind."""
    front = np.moveaxis(array, axis, 0)
    keep = max(len(front) - distance, 0)
    for index in range(keep):  # plane by plane: overlapping slices would make numpy copy the whole
        front[index] = front[index + distance]
    front[keep:] = 0


def _normalise(sums: NDArray[np.float32], axis: int, first: int, last: int) -> None:
    """Divide the sums of the planes first to last by the sum of their weights, in place."""
    planes = np.moveaxis(sums, axis, 0)[first:last]
    for plane in planes:
        plane[:-1] /= plane[-1]
