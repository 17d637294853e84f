"""Another head from a label map: one resampling through an affine map and a smooth displacement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.synthesis.fields import control_shape, smooth_field

INJECTIVE = 0.4
"""A cubic B-spline displacement whose coefficients stay under 0.4 of the knots' distance never folds.

Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic B-spline functions, Graphical Models 62
(2000).
"""


@dataclass(frozen=True)
class Deformation:
    """From places in the new image to places in the label map.

    A voxel at p mm from the middle of the new image comes from q = matrix · p + offset_mm + u(p), in mm from
    the middle of the brain in the label map; all vectors are (z, y, x).

    Parameters
    ----------
    matrix : (3, 3) array
    offset_mm : (3,) array
    coefficients_mm : (3, *control) array
        Of the displacement u, knots ``knot_mm`` apart.
    flipped : bool
        Left and right change places.
    """

    matrix: NDArray[np.float64]
    offset_mm: NDArray[np.float64]
    coefficients_mm: NDArray[np.float64]
    knot_mm: float
    flipped: bool = False


def random_matrix(
    rng: np.random.Generator, *, rotation_degrees: float, scaling: float, shearing: float
) -> NDArray[np.float64]:
    """Rotation about the three axes, scaling of each by up to ±``scaling``, and shearing, (3, 3)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-rotation_degrees, rotation_degrees, 3))):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = rng.uniform(-shearing, shearing, 3)
    return matrix @ shear @ np.diag(rng.uniform(1 - scaling, 1 + scaling, 3))


def random_coefficients_mm(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: float, *, knot_mm: float, sd_mm: float
) -> NDArray[np.float64]:
    """Coefficients of a displacement that cannot fold, (3, *control)."""
    control = control_shape(shape, knot_mm / spacing_mm)
    limit = INJECTIVE * knot_mm
    return np.clip(rng.normal(0.0, sd_mm, (3, *control)), -limit, limit)


def deform(
    places: Tensor,
    map_spacing_mm: float,
    middle: NDArray[np.float64],
    swapped: Tensor,
    shape: tuple[int, int, int],
    spacing_mm: float,
    deformation: Deformation,
) -> Tensor:
    """The labels of the new image: the nearest voxel of the map, and 0 outside of it.

    Parameters
    ----------
    places : (Z, Y, X) tensor of uint8
        The map. RAS, so the last axis runs from left to right.
    middle : (3,) array
        Where in the map, in voxels, the offset starts.
    swapped : (L,) tensor
        Each label's partner on the other side.
    shape : tuple
        Of the new image, with voxels of ``spacing_mm``.

    Returns
    -------
    (Z, Y, X) tensor of uint8
    """
    device = places.device
    source = torch.as_tensor(deformation.coefficients_mm, dtype=torch.float32, device=device)
    moved = smooth_field(source, shape, deformation.knot_mm / spacing_mm)
    axes = [(torch.arange(n, device=device) - (n - 1) / 2) * spacing_mm for n in shape]
    if deformation.flipped:
        axes[2] = -axes[2]
        # The field is drawn in the new image; it need not be mirrored, being as likely either way round.
    inside = torch.ones(shape, dtype=torch.bool, device=device)
    index = torch.zeros(shape, dtype=torch.int64, device=device)
    for axis in range(3):
        row = deformation.matrix[axis]
        position = (
            float(row[0]) * axes[0][:, None, None]
            + float(row[1]) * axes[1][None, :, None]
            + float(row[2]) * axes[2][None, None, :]
        )
        position = (position + moved[axis] + float(deformation.offset_mm[axis])) / map_spacing_mm
        voxel = (position + float(middle[axis])).round_().to(torch.int64)
        length = places.shape[axis]
        inside &= (voxel >= 0) & (voxel < length)
        index = index * length + voxel.clamp_(0, length - 1)
    found = torch.where(inside, places.reshape(-1)[index], torch.zeros((), dtype=torch.uint8, device=device))
    return swapped.to(torch.uint8)[found.long()] if deformation.flipped else found
