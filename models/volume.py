"""Geometry, stated once: how a voxel index becomes a place in the patient.

Arrays are indexed ``(Z, Y, X)``, or ``(C, Z, Y, X)`` with channels first. An affine maps the voxel index
``(x, y, z)`` (note the order: the reverse of the array's) to millimetres in DICOM patient coordinates,
LPS: x grows towards the patient's Left, y towards Posterior, z towards Superior (PS3.3 C.7.6.2.1.1).
NIfTI's RAS is converted where files are read and written, and nowhere else.

An axis code such as ``"RAS"`` names, for the voxel axes x, y, z in this order, the anatomical direction in
which the index grows. An identity affine in LPS therefore has the code ``"LPS"``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Affine = NDArray[np.float64]
"""A (4, 4) matrix from voxel index (x, y, z, 1) to LPS millimetres (x, y, z, 1)."""

_POSITIVE = "LPS"
_NEGATIVE = "RAI"


@dataclass(frozen=True, eq=False)
class Volume:
    """An image on a voxel grid in the patient.

    Parameters
    ----------
    array : (C, Z, Y, X) array, float32
        Intensities as stored after rescaling (Hounsfield units for CT), one channel per modality.
    affine : (4, 4) array, float64
        Voxel index (x, y, z) to LPS millimetres.
    frame_of_reference_uid : str or None
        DICOM Frame of Reference UID; None for input that is not DICOM.
    """

    array: NDArray[np.float32]
    affine: Affine
    frame_of_reference_uid: str | None = None

    def __post_init__(self) -> None:
        assert self.array.ndim == 4, f"a Volume is (C, Z, Y, X), not {self.array.shape}"
        assert self.affine.shape == (4, 4)

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        _, z, y, x = self.array.shape
        return z, y, x


@dataclass(frozen=True)
class Removed:
    """What post-processing took away from a labelmap.

    Parameters
    ----------
    islands : int
        How many connected components.
    voxels : dict of int to int
        Voxels of each label value in them.
    share : float
        Of all voxels with a label, 0 to 1.
    """

    islands: int
    voxels: dict[int, int]
    share: float


@dataclass(frozen=True, eq=False)
class Labelmap:
    """An integer label for every voxel of a grid in the patient.

    Parameters
    ----------
    array : (Z, Y, X) array, uint8 or uint16
        Label values; 0 is background.
    affine : (4, 4) array, float64
        Voxel index (x, y, z) to LPS millimetres.
    frame_of_reference_uid : str or None
        DICOM Frame of Reference UID; None for input that is not DICOM.
    removed : Removed or None
        What is not in it any more; None where nothing was looked for.
    """

    array: NDArray[Any]
    affine: Affine
    frame_of_reference_uid: str | None = None
    removed: Removed | None = None

    def __post_init__(self) -> None:
        assert self.array.ndim == 3, f"a Labelmap is (Z, Y, X), not {self.array.shape}"
        assert self.array.dtype in (np.uint8, np.uint16), self.array.dtype

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres: the affine's determinant over 1000."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def volumes_ml(self) -> dict[int, float]:
        """Volume in millilitres of every label value that occurs, background left out."""
        counts = np.bincount(self.array.ravel())
        return {int(v): float(counts[v]) * self.voxel_volume_ml for v in np.flatnonzero(counts) if v != 0}


def spacing_xyz_mm(affine: Affine) -> tuple[float, float, float]:
    """Distance in millimetres between neighbouring voxels along the voxel axes x, y, z."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def axis_codes(affine: Affine) -> str:
    """The code of the anatomical direction closest to each voxel axis, for example ``"RAS"``.

    Each anatomical direction is given to one voxel axis only, so that an oblique grid gets a valid code
    too: of all assignments the one with the largest sum of absolute cosines wins.

    Raises
    ------
    ValueError
        If an axis of the affine has no length.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all(np.isfinite(lengths)) or np.any(lengths <= 0):
        raise ValueError("the affine has an axis without length")
    cosines = affine[:3, :3] / lengths  # column i: the direction of voxel axis i in LPS
    best = max(permutations(range(3)), key=lambda p: sum(abs(cosines[p[i], i]) for i in range(3)))
    return "".join(_POSITIVE[d] if cosines[d, i] >= 0 else _NEGATIVE[d] for i, d in enumerate(best))


def is_axis_code(code: str) -> bool:
    """True for one of the 48 codes made of one letter each of L/R, P/A and S/I."""
    return len(code) == 3 and {_direction(c) for c in code} == {0, 1, 2}


def _direction(letter: str) -> int:
    """0 for L and R, 1 for P and A, 2 for S and I, -1 for anything else."""
    return next((i for i in range(3) if letter in (_POSITIVE[i], _NEGATIVE[i])), -1)


@dataclass(frozen=True)
class Reorientation:
    """How to bring an array from one axis code to another, by transposing and flipping alone.

    ``order[i]`` is the source voxel axis that becomes target voxel axis i (both counted x, y, z), and
    ``flip[i]`` says whether the target axis i runs against it. No voxel value is ever changed.
    """

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]

    @staticmethod
    def between(source: str, target: str) -> Reorientation:
        """The reorientation from one axis code to another.

        Raises
        ------
        ValueError
            If either is not an axis code.
        """
        if not (is_axis_code(source) and is_axis_code(target)):
            raise ValueError(f"{source!r} and {target!r} must be axis codes such as 'RAS' or 'LPS'")
        directions = [_direction(c) for c in source]
        a, b, c = (directions.index(_direction(letter)) for letter in target)
        order = (a, b, c)
        fx, fy, fz = (source[order[i]] != target[i] for i in range(3))
        return Reorientation(order, (fx, fy, fz))

    def inverse(self) -> Reorientation:
        """The reorientation that undoes this one."""
        a, b, c = (self.order.index(i) for i in range(3))
        return Reorientation((a, b, c), (self.flip[a], self.flip[b], self.flip[c]))

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Apply to the last three axes (Z, Y, X) of an array; a view is returned."""
        lead = array.ndim - 3
        # Array axis of voxel axis i (x, y, z) is lead + 2 - i.
        axes = [*range(lead), *(lead + 2 - self.order[i] for i in (2, 1, 0))]
        out = array.transpose(axes)
        flips = tuple(slice(None, None, -1) if self.flip[i] else slice(None) for i in (2, 1, 0))
        return out[(..., *flips)]

    def apply_affine(self, affine: Affine, shape_zyx: tuple[int, int, int]) -> Affine:
        """The affine of the reoriented array. ``shape_zyx`` is the shape before reorientation."""
        size_xyz = shape_zyx[::-1]
        to_source = np.zeros((4, 4))  # target index -> source index
        to_source[3, 3] = 1.0
        for i, source_axis in enumerate(self.order):
            to_source[source_axis, i] = -1.0 if self.flip[i] else 1.0
            to_source[source_axis, 3] = size_xyz[source_axis] - 1 if self.flip[i] else 0.0
        return affine @ to_source


def reorient(volume: Volume, target: str) -> tuple[Volume, Reorientation]:
    """Bring a volume's voxel axes to ``target`` (an axis code) without resampling.

    Returns the reoriented volume (same places in the patient) and the reorientation, whose inverse brings
    a labelmap of the result back onto the original grid.
    """
    change = Reorientation.between(axis_codes(volume.affine), target)
    moved = replace(
        volume,
        array=change.apply(volume.array),
        affine=change.apply_affine(volume.affine, volume.shape_zyx),
    )
    return moved, change
