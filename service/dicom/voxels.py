"""The values of a volume: every frame decoded, rescaled on its own, and laid at its place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ReasonCode, Refusal
from service.dicom.elements import string
from service.dicom.frames import Frame, frame_count
from service.dicom.geometry import Grid
from service.dicom.instances import Instance
from service.dicom.pixels import PixelFormat, padding_range, stored_frames

_RESEND = "Send the study again from its original source."
_NOT_HOUNSFIELD = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")  # PS3.3 C.11.1.1.2


def rescaled_volume(
    grid: Grid, forms: dict[Instance, PixelFormat], warnings: list[str]
) -> NDArray[np.float32]:
    """The rescaled values of every frame at its place: (Z, Y, X) float32.

    Raises
    ------
    Refusal
        UNREADABLE; INVALID_VALUES for what is not finite, or the same everywhere, or cannot be compared
        from slice to slice, or is not in Hounsfield units where a CT should be.
    """
    _refuse_unknown_scales(grid.frames, forms)
    array = np.empty(grid.shape_zyx, np.float32)
    wanted: dict[Instance, dict[int, tuple[int, Frame]]] = {}
    for z, frame in enumerate(grid.frames):
        wanted.setdefault(frame.instance, {})[frame.number] = (z, frame)
    cleared = 0
    padding: list[tuple[int, NDArray[np.bool_]]] = []
    for instance, places in wanted.items():
        padded = padding_range(instance, forms[instance])
        for number, plane, was_cleared in stored_frames(
            instance, forms[instance], frame_count(instance), places
        ):
            z, frame = places[number]
            _rescale(plane, frame, array[z])
            cleared += was_cleared
            if padded is not None and padded[0] <= plane.max() <= padded[1]:  # else it is not the brightest
                padding.append((z, plane >= padded[0]))
    if cleared:
        warnings.append(f"Bits outside Bits Stored were cleared in {cleared} of {len(array)} slices.")
    if padding:
        _darken(array, padding, warnings)
    if any(string(i.header, "PhotometricInterpretation") == "MONOCHROME1" for i in wanted):
        warnings.append("Viewers show low values of these images bright (MONOCHROME1); none was inverted.")
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            "Some voxels are not finite numbers after rescaling.",
            remedy=_RESEND,
        )
    if low == high:
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            f"Every voxel has the same value ({low:g}).",
            remedy="Route a series that holds an image.",
        )
    return array


def _refuse_unknown_scales(frames: tuple[Frame, ...], forms: dict[Instance, PixelFormat]) -> None:
    """Raise where stored values say nothing: each frame's own scale has to be known."""
    stated = sum(frame.rescaled for frame in frames)
    if 0 < stated < len(frames) and any((f.slope, f.intercept) != (1.0, 0.0) for f in frames):
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            f"{len(frames) - stated} of {len(frames)} images state no Rescale Slope and Intercept, and the "
            "others do: their values cannot be compared.",
            remedy=_RESEND,
        )
    for frame in frames:
        if string(frame.instance.header, "Modality") != "CT":
            continue
        if frame.rescale_type in _NOT_HOUNSFIELD:
            raise Refusal(
                ReasonCode.INVALID_VALUES,
                f"The values of the CT are no Hounsfield units (Rescale Type {frame.rescale_type}).",
                remedy="Route the series of original CT images.",
            )
        if not frame.rescaled and not forms[frame.instance].signed:
            raise Refusal(
                ReasonCode.INVALID_VALUES,
                "The CT states no Rescale Intercept, and its stored values are unsigned: they are no "
                "Hounsfield units.",
                remedy=_RESEND,
            )


def _darken(
    array: NDArray[np.float32], padding: list[tuple[int, NDArray[np.bool_]]], warnings: list[str]
) -> None:
    """Give padding that is brighter than the whole image the image's least value.

    Pixel Padding Value (PS3.3 C.7.5.1.1.2) stands for no measurement. Below the image it is background as
    it is; within the image's range it may be stated wrongly, and is left alone.
    """
    within = np.ones(array.shape, bool)
    for z, mask in padding:
        within[z] = ~mask
    if not within.any():
        return
    least = array.min(where=within, initial=np.inf)
    most = array.max(where=within, initial=-np.inf)
    bright = [(z, mask) for z, mask in padding if array[z][mask].min() > most]
    for z, mask in bright:
        array[z][mask] = least
    if bright:
        warnings.append(
            f"Padding brighter than the image was set to its least value in {len(bright)} slices."
        )


def _rescale(plane: NDArray[Any], frame: Frame, out: NDArray[np.float32]) -> None:
    if frame.slope == 1.0 and frame.intercept == 0.0:
        out[...] = plane
        return
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused with the volume
        out[...] = plane * np.float64(frame.slope) + np.float64(frame.intercept)  # each value rounded once
