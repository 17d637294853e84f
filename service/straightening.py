"""A sheared stack of slices, as a tilted gantry makes it, on a rectangular grid for the model and back.

Slice k of such a stack lies k times the same way sideways of where a rectangular stack would have it, in
its own plane. So every slice keeps its plane and its pixel spacing, and is only moved within it: by a
whole number of pixels, and by linear interpolation for the rest. Nothing is interpolated between slices,
and no value arises that is not between two of its neighbours. The grid grows until it holds all slices;
what no slice covers is background.

The labels of the rectangular grid come back by whole pixels, which is the nearest neighbour: a label moves
by half a pixel at most. Sheared and rectangular labelmaps then hold the same voxels, and the same volumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import ReasonCode, Refusal
from models.volume import Affine, Labelmap, Volume

AIR_HU = -1024.0


@dataclass(frozen=True, eq=False)
class Straightening:
    """How the slices of one sheared grid are moved onto a rectangular one.

    Parameters
    ----------
    sheared, rectangular : (4, 4) arrays
        The affines of both grids, LPS mm. Their voxel axes x and y are the same.
    sheared_shape_zyx, rectangular_shape_zyx : tuples of int
        Their sizes.
    shifts_yx : (Z, 2) array
        How far every slice is moved, in pixels along y and x; none is negative.
    """

    sheared: Affine
    rectangular: Affine
    sheared_shape_zyx: tuple[int, int, int]
    rectangular_shape_zyx: tuple[int, int, int]
    shifts_yx: NDArray[np.float64]

    @staticmethod
    def of(affine: Affine, shape_zyx: tuple[int, int, int], *, limit_voxels: int) -> Straightening:
        """The straightening of a grid whose x and y axes are at right angles.

        Raises
        ------
        Refusal
            TOO_LARGE where the rectangular grid would have more than ``limit_voxels``.
        """
        x_mm, y_mm = np.linalg.norm(affine[:3, :2], axis=0)
        row, column = affine[:3, 0] / x_mm, affine[:3, 1] / y_mm
        normal = np.cross(row, column)
        step = affine[:3, 2]
        slices, rows, columns = shape_zyx
        sideways = np.array([step @ column / y_mm, step @ row / x_mm])  # pixels from slice to slice
        shifts = np.round(np.arange(slices)[:, None] * sideways, 6)  # no column for rounding alone
        first = np.floor(shifts.min(axis=0))
        shifts = shifts - first
        more_rows, more_columns = np.ceil(shifts.max(axis=0)).astype(int)
        shape = (slices, rows + int(more_rows), columns + int(more_columns))
        if np.prod(shape, dtype=float) > limit_voxels:
            raise Refusal(
                ReasonCode.TOO_LARGE,
                f"The stack is sheared so far that the rectangular grid around it has "
                f"{np.prod(shape, dtype=float) / 1e6:.0f} of {limit_voxels / 1e6:.0f} Mvoxels allowed.",
                remedy="Send a reconstruction without gantry tilt.",
            )
        rectangular = affine.copy()
        rectangular[:3, 2] = (step @ normal) * normal
        rectangular[:3, 3] += first[0] * affine[:3, 1] + first[1] * affine[:3, 0]
        return Straightening(affine, rectangular, shape_zyx, shape, shifts)

    def forth(self, volume: Volume, background: Sequence[float]) -> Volume:
        """An image on the rectangular grid.

        Parameters
        ----------
        volume : Volume
            (C, Z, Y, X) on the sheared grid.
        background : sequence of float
            For every channel the value where no slice is.
        """
        assert volume.shape_zyx == self.sheared_shape_zyx
        array = np.empty((len(volume.array), *self.rectangular_shape_zyx), np.float32)
        around = np.reshape(background, (-1, 1, 1)).astype(np.float32)
        array[...] = around[:, None]
        rows, columns = self.sheared_shape_zyx[1:]
        for z, shift in enumerate(self.shifts_yx):
            (y, x), (part_y, part_x) = np.floor(shift).astype(int), shift % 1.0
            plane = array[:, z]
            plane[:, y : y + rows, x : x + columns] = volume.array[:, z]
            array[:, z] = _moved_on(_moved_on(plane, part_y, 1, around), part_x, 2, around)
        return Volume(array, self.rectangular, volume.frame_of_reference_uid)

    def back(self, labelmap: Labelmap) -> Labelmap:
        """The labels of the slices as they are, from those of the rectangular grid."""
        assert labelmap.array.shape == self.rectangular_shape_zyx
        array = np.empty(self.sheared_shape_zyx, labelmap.array.dtype)
        for z, window in enumerate(self._windows()):
            array[z] = labelmap.array[z][window]
        return Labelmap(array, self.sheared, labelmap.frame_of_reference_uid)

    def labels_forth(self, labelmap: Labelmap) -> Labelmap:
        """The labels of the rectangular grid, from those of the slices: what :meth:`back` undoes."""
        assert labelmap.array.shape == self.sheared_shape_zyx
        array = np.zeros(self.rectangular_shape_zyx, labelmap.array.dtype)
        for z, window in enumerate(self._windows()):
            array[z][window] = labelmap.array[z]
        return Labelmap(array, self.rectangular, labelmap.frame_of_reference_uid)

    def _windows(self) -> list[tuple[slice, slice]]:
        """Where every slice lies on the rectangular grid, to the nearest pixel."""
        rows, columns = self.sheared_shape_zyx[1:]
        whole = np.rint(self.shifts_yx).astype(int).tolist()
        return [(slice(y, y + rows), slice(x, x + columns)) for y, x in whole]


def background_of(channel: NDArray[np.float32], modality: str) -> float:
    """What lies around the slices: the least value; of a CT air, where its padding lies below that."""
    least = float(channel.min())
    return max(least, AIR_HU) if modality == "CT" else least


def _moved_on(
    planes: NDArray[np.float32], part: float, axis: int, around: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(C, Y, X) moved by a part of a pixel towards higher indices, where ``around`` (C, 1, 1) comes in."""
    if part == 0.0:
        return planes
    first = np.broadcast_to(around, planes.take([0], axis).shape)
    before = np.concatenate([first, planes.take(range(planes.shape[axis] - 1), axis)], axis)
    return np.asarray(np.float32(1 - part) * planes + np.float32(part) * before, np.float32)
