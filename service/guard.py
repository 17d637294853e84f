"""Is this volume one that the model was made for? The manifest's limits, checked with figures."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest
from models.volume import Volume, spacing_xyz_mm

_TOLERANCE = 1e-3  # of a limit: what rounding in a header may take away


def check_modalities(manifest: Manifest, modalities: Sequence[str]) -> None:
    """Refuse a channel whose modality is not the model's.

    Parameters
    ----------
    modalities : sequence of str
        Modality (0008,0060) per channel, in the manifest's order; empty where it is not known.

    Raises
    ------
    Refusal
        WRONG_MODALITY.
    """
    for channel, modality in zip(manifest.channels, modalities, strict=True):
        allowed = (channel.modality,) if channel.modality else manifest.input_limits.modalities
        if allowed and modality and modality not in allowed:
            raise Refusal(
                ReasonCode.WRONG_MODALITY,
                f"The series for the channel {channel.name} is {modality}; {manifest.name} takes "
                f"{' or '.join(allowed)}.",
                remedy="Send a series of the right modality, or narrow the route's conditions.",
            )


def check_grid(manifest: Manifest, volume: Volume) -> None:
    """Refuse a grid outside the model's limits of spacing, field of view and number of slices.

    Slices are counted along the last voxel axis, z, of the volume as it was read.

    Raises
    ------
    Refusal
        OUT_OF_LIMITS.
    """
    limits = manifest.input_limits
    spacing = spacing_xyz_mm(volume.affine)
    slices = volume.shape_zyx[0]
    if slices < limits.minimum_slices:
        raise _outside(f"The series has {slices} slices; the model takes {limits.minimum_slices} or more.")
    extent = [n * step for n, step in zip(volume.shape_zyx[::-1], spacing, strict=True)]
    for what, values, allowed in (
        ("voxel spacing", spacing, limits.spacing_mm),
        ("field of view", extent, limits.field_of_view_mm),
    ):
        if allowed is None:
            continue
        lowest, highest = allowed
        if min(values) < lowest * (1 - _TOLERANCE) or max(values) > highest * (1 + _TOLERANCE):
            figures = " x ".join(f"{value:.4g}" for value in values)
            raise _outside(
                f"The {what} is {figures} mm (x, y, z); the model takes {lowest:g} to {highest:g} mm."
            )


def _outside(message: str) -> Refusal:
    return Refusal(
        ReasonCode.OUT_OF_LIMITS, message, remedy="Send a series that the model was made for; see its card."
    )
