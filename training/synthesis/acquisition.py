"""What a scanner does to a head: uneven sensitivity, slices of some thickness, noise, a tone curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.synthesis.fields import (
    along_axes,
    control_shape,
    interpolation_matrix,
    slice_matrix,
    smooth_field,
)


def random_bias(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing_mm: float,
    *,
    knot_mm: float,
    log_sd: float,
    device: torch.device,
) -> Tensor:
    """A smooth positive factor of each voxel, (Z, Y, X): exp of a cubic B-spline field."""
    spacing = knot_mm / spacing_mm
    logs = rng.normal(0.0, log_sd, (1, *control_shape(shape, spacing)))
    return smooth_field(torch.as_tensor(logs, dtype=torch.float32, device=device), shape, spacing)[0].exp_()


@dataclass(frozen=True)
class Slices:
    """The voxels of a scanner, for each axis (z, y, x).

    Parameters
    ----------
    spacing_mm : (3,) array
        Distance of the samples.
    thickness_mm : (3,) array
        Full width at half maximum of each sample's Gaussian profile.
    phase : (3,) array
        Where the first sample lies, as a part of the spacing from 0 to under 1.
    """

    spacing_mm: NDArray[np.float64]
    thickness_mm: NDArray[np.float64]
    phase: NDArray[np.float64]


def random_slices(
    rng: np.random.Generator,
    *,
    thick_probability: float,
    thickest_mm: float,
    in_plane_mm: tuple[float, float],
    isotropic_mm: tuple[float, float],
) -> Slices:
    """Thick slices in one of the three directions, or voxels of one size; thickness mostly the spacing."""
    if rng.random() < thick_probability:
        spacing = np.full(3, rng.uniform(*in_plane_mm))
        spacing[rng.integers(3)] = rng.uniform(2.0, thickest_mm)
    else:
        spacing = np.full(3, rng.uniform(*isotropic_mm))
    return Slices(spacing, spacing * rng.uniform(0.7, 1.0), rng.random(3))


def acquire(
    image: Tensor, spacing_mm: float, slices: Slices, noise_sd: float, gen: torch.Generator
) -> Tensor:
    """Sample (Z, Y, X) with the scanner's voxels, add its noise, and bring it back to the grid.

    Magnitude images have no negative values, so those that the noise makes are set to 0.
    """
    forward: list[Tensor | None] = []
    back: list[Tensor | None] = []
    for n, spacing, thickness, phase in zip(
        image.shape, slices.spacing_mm, slices.thickness_mm, slices.phase, strict=True
    ):
        step = float(spacing) / spacing_mm
        if step <= 1.0:  # finer than the grid: the scan is thinned out to it, without averaging
            forward.append(None)
            back.append(None)
            continue
        shift = float(phase) * min(step, n - 1.0)
        down = slice_matrix(n, step, float(thickness) / spacing_mm, shift)
        up = interpolation_matrix(n, step, shift)
        forward.append(torch.as_tensor(down, dtype=image.dtype, device=image.device))
        back.append(torch.as_tensor(up, dtype=image.dtype, device=image.device))
    seen = along_axes(image, forward)
    noise = torch.randn(seen.shape, generator=gen, device=image.device)
    return along_axes((seen + noise_sd * noise).clamp_(min=0), back)


def tone(image: Tensor, log_gamma: float) -> Tensor:
    """Bring the intensities to 0 to 1, then raise them to the power exp(log_gamma)."""
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-6)).pow(float(np.exp(log_gamma)))
