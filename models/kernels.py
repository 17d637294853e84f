"""The two inner loops of the engine, compiled by numba, and the threads that run them.

The kernels are plain functions until they are first needed (`numba` compiles nothing at import), release the
interpreter lock, and are split over threads by the caller: no threading layer of numba's is involved, so they
are safe in any thread and after a fork. Compiled code is kept on disk where some place is writable.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Kernel = Callable[..., Any]


def accumulate(
    total: NDArray[np.float32],
    tile: NDArray[np.float32],
    weights: NDArray[np.float32],
    origin_z: int,
    origin_y: int,
    origin_x: int,
    first: int,
    last: int,
) -> None:
    """Add a tile, weighted, to the running sums, for the tile's planes ``first`` to ``last``.

    Parameters
    ----------
    total : (A + 1, Z, Y, X) array
        Running sums of the tiles' A channels; the last channel is the running sum of the weights.
    tile : (A, Pz, Py, Px) array
    weights : (Pz, Py, Px) array
    origin_z, origin_y, origin_x : int
        Where the tile's first voxel lies in ``total``.
    """
    channels, _, height, width = tile.shape
    for z in range(first, last):
        for y in range(height):
            for c in range(channels):
                for x in range(width):
                    total[c, origin_z + z, origin_y + y, origin_x + x] += tile[c, z, y, x] * weights[z, y, x]
            for x in range(width):
                total[channels, origin_z + z, origin_y + y, origin_x + x] += weights[z, y, x]


def paint(
    features: NDArray[np.float32],
    low_z: NDArray[np.int64],
    high_z: NDArray[np.int64],
    part_z: NDArray[np.float32],
    low_y: NDArray[np.int64],
    high_y: NDArray[np.int64],
    part_y: NDArray[np.float32],
    low_x: NDArray[np.int64],
    high_x: NDArray[np.int64],
    part_x: NDArray[np.float32],
    matrix: NDArray[np.float32],
    bias: NDArray[np.float32],
    regions: NDArray[np.int32],
    labels: NDArray[Any],
    first: int,
    last: int,
) -> bool:
    """Interpolate features, apply the linear head and decide the label, for the rows ``first`` to ``last``.

    Output voxel (z, y, x) mixes the source planes ``low_z[z]`` and ``high_z[z]`` with the part ``part_z[z]``
    of the second, and so along y and x; nothing larger than one row is ever held.

    Parameters
    ----------
    features : (A + 1, Z, Y, X) array
        Normalised features; the last channel is not read.
    matrix, bias : (K, A) and (K,) arrays
        The head: logits are ``matrix @ features + bias``. A ``matrix`` of shape (0, 0) says that the
        features are the logits.
    regions : (K,) array, or (0,) for an argmax
        Label value that each channel paints, in turn, where its logit is above 0 (its sigmoid above 0.5).
    labels : (Z', Y', X') array of integers
        Where the result goes.
    first, last : int
        Rows, counted over Z' and Y' together.

    Returns
    -------
    bool
        False if a feature was infinite or not a number.
    """
    channels = features.shape[0] - 1
    source_width = features.shape[3]
    height, width = labels.shape[1], labels.shape[2]
    has_head = matrix.shape[0] > 0
    classes = matrix.shape[0] if has_head else channels
    painted = regions.shape[0] > 0
    row = np.empty(source_width, np.float32)
    line = np.empty((channels, width), np.float32)
    value = np.empty(width, np.float32)
    best = np.empty(width, np.float32)
    winner = np.empty(width, np.int32)
    probe = np.zeros(width, np.float32)
    for index in range(first, last):
        z, y = index // height, index % height
        z0, z1, y0, y1 = low_z[z], high_z[z], low_y[y], high_y[y]
        one = np.float32(1.0)
        for c in range(channels):
            w01 = (one - part_z[z]) * part_y[y]
            w00 = (one - part_z[z]) * (one - part_y[y])
            w11 = part_z[z] * part_y[y]
            w10 = part_z[z] * (one - part_y[y])
            for x in range(source_width):
                row[x] = (
                    w00 * features[c, z0, y0, x]
                    + w01 * features[c, z0, y1, x]
                    + w10 * features[c, z1, y0, x]
                    + w11 * features[c, z1, y1, x]
                )
            for x in range(width):
                line[c, x] = row[low_x[x]] * (one - part_x[x]) + row[high_x[x]] * part_x[x]
            for x in range(width):
                probe[x] += line[c, x] * np.float32(0.0)
        for x in range(width):
            best[x] = np.float32(-np.inf)
            winner[x] = 0
        for k in range(classes):
            if has_head:
                for x in range(width):
                    value[x] = bias[k]
                for c in range(channels):
                    factor = matrix[k, c]
                    for x in range(width):
                        value[x] += factor * line[c, x]
            else:
                for x in range(width):
                    value[x] = line[k, x]
            if painted:
                label = regions[k]
                for x in range(width):
                    winner[x] = label if value[x] > np.float32(0.0) else winner[x]
            else:
                label = np.int32(k)
                for x in range(width):
                    better = value[x] > best[x]
                    best[x] = value[x] if better else best[x]
                    winner[x] = label if better else winner[x]
        for x in range(width):
            labels[z, y, x] = winner[x]
    finite = True
    for x in range(width):
        finite = finite and probe[x] == np.float32(0.0)
    return finite


@functools.cache
def compiled(kernel: Kernel) -> Kernel:
    """The kernel as machine code, from the cache on disk where there is one.

    A read-only installation without a writable home has no place for a cache; the kernels are then compiled
    anew in each process, which takes a second or two.
    """
    import numba

    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(kernel)  # type: ignore[no-any-return]
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        return numba.njit(**options)(kernel)  # type: ignore[no-any-return]


def warm_up(label_type: np.dtype[Any]) -> None:
    """Compile both kernels now, or load them, rather than in the middle of the first volume."""
    total, tile = np.ones((3, 2, 2, 2), np.float32), np.ones((2, 2, 2, 2), np.float32)
    for either in (tile, np.moveaxis(tile, -1, 0)):  # as one runtime or the other has it in memory
        compiled(accumulate)(total, either, tile[0], 0, 0, 0, 0, 2)
    tap = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32)
    nothing = np.empty((0, 0), np.float32), np.empty(0, np.float32), np.empty(0, np.int32)
    compiled(paint)(total, *tap * 3, *nothing, np.zeros((1, 1, 1), label_type), 0, 1)


def keep_compiled_code_in(folder: Path) -> None:
    """Let numba keep compiled kernels in a folder, unless NUMBA_CACHE_DIR says another."""
    import numba

    if not os.environ.get("NUMBA_CACHE_DIR"):
        folder.mkdir(parents=True, exist_ok=True)
        numba.config.CACHE_DIR = str(folder.resolve())  # wherever the process goes from here


class Workers:
    """A fixed number of threads that share out a range of planes or rows."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "segnode-kernel") if threads > 1 else None

    def share(self, length: int, part: Callable[[int, int], Any]) -> list[Any]:
        """Call ``part(first, last)`` on consecutive pieces of ``range(length)``; the results in order."""
        if self._pool is None or length < 2:
            return [part(0, length)] if length else []
        edges = np.linspace(0, length, min(self._threads, length) + 1).astype(int).tolist()
        return list(self._pool.map(part, edges[:-1], edges[1:]))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
