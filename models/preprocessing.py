"""What nnU-Net v2 does to an image before its network: transpose, crop, normalise, resample, in this order.

Source: nnunetv2 2.8.1, ``DefaultPreprocessor.run_case_npy`` and the classes of its normalization module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.errors import ReasonCode, Refusal
from models.manifest import Channel, Manifest, NormalizationScheme, Preprocessing
from models.resampling import Triple, resample_image, resampled_shape
from models.volume import Reorientation, Volume, reorient, spacing_xyz_mm

_SMALLEST_STD = 1e-8


@dataclass(frozen=True)
class Placement:
    """Where the network's grid lies in the array that was read, all in transposed axis order.

    ``box`` is what was cropped out of ``shape_before``; it has ``shape_cropped`` at ``spacing_mm``, and
    ``shape_network`` at the model's spacing.
    """

    shape_before: Triple
    box: tuple[slice, slice, slice]
    shape_cropped: Triple
    shape_network: Triple
    spacing_mm: tuple[float, float, float]


def transpose(array: NDArray[np.float32], how: Preprocessing) -> NDArray[np.float32]:
    """Permute the spatial axes of a (C, Z, Y, X) array as the plans say; a view."""
    return array.transpose(0, *(axis + 1 for axis in how.transpose_forward))


def locate(volume: Volume, manifest: Manifest) -> tuple[NDArray[np.float32], Placement, Reorientation | None]:
    """Bring a volume to the axes that the network was trained on, and find its place there.

    Returns
    -------
    (C, Z, Y, X) array, Placement, Reorientation
        The volume in the manifest's orientation and transposed; where its crop and its resampled image lie;
        and how it was turned, None where the model takes any orientation.
    """
    change = None
    if manifest.orientation != "any":
        volume, change = reorient(volume, manifest.orientation)
    array = transpose(volume.array, manifest.preprocessing)
    return array, place(array, spacing_xyz_mm(volume.affine)[::-1], manifest.preprocessing), change


def place(array: NDArray[np.float32], spacing_zyx_mm: Sequence[float], how: Preprocessing) -> Placement:
    """Find the crop and the shapes for a transposed array.

    Parameters
    ----------
    array : (C, Z, Y, X) array, float32
        After `transpose`.
    spacing_zyx_mm : three floats
        Spacing of the axes as they were read, before the transpose.

    Raises
    ------
    Refusal
        INVALID_VALUES for an array without a nonzero voxel, OUT_OF_LIMITS for a field of view that has no
        voxel left at the model's spacing.
    """
    a, b, c = array.shape[1:]
    return _place((a, b, c), nonzero_box(array), spacing_zyx_mm, how)


def place_all(shape_zyx: Triple, spacing_zyx_mm: Sequence[float], how: Preprocessing) -> Placement:
    """`place` for an array of this shape, before the transpose, in which nothing can be cropped."""
    a, b, c = (shape_zyx[axis] for axis in how.transpose_forward)
    return _place((a, b, c), (slice(0, a), slice(0, b), slice(0, c)), spacing_zyx_mm, how)


def _place(
    shape: Triple, box: tuple[slice, slice, slice], spacing_zyx_mm: Sequence[float], how: Preprocessing
) -> Placement:
    spacing = tuple(float(spacing_zyx_mm[axis]) for axis in how.transpose_forward)
    cropped = tuple(part.stop - part.start for part in box)
    network = resampled_shape(cropped, spacing, how.spacing_mm)
    if min(network) < 1:
        raise Refusal(
            ReasonCode.OUT_OF_LIMITS,
            f"{' x '.join(map(str, cropped))} voxels of {' x '.join(f'{s:.3g}' for s in spacing)} mm leave "
            f"no voxel at the model's spacing of {' x '.join(f'{s:.3g}' for s in how.spacing_mm)} mm.",
            remedy="Send a series that covers the whole organ.",
        )
    return Placement(shape, box, _triple(cropped), network, (spacing[0], spacing[1], spacing[2]))


def preprocess(array: NDArray[np.float32], placement: Placement, manifest: Manifest) -> NDArray[np.float32]:
    """Crop, normalise and resample a transposed array.

    Parameters
    ----------
    array : (C, Z, Y, X) array, float32
        After `transpose`; it is not changed.

    Returns
    -------
    (C, *placement.shape_network) array, float32, contiguous
    """
    cropped = np.array(array[(slice(None), *placement.box)], np.float32, order="C")
    inside = None
    if any(channel.use_mask_for_norm for channel in manifest.channels):
        inside = fill_holes(np.any(cropped != 0, axis=0))
    for image, channel in zip(cropped, manifest.channels, strict=True):
        normalise(image, channel, inside if channel.use_mask_for_norm else None)
    how = manifest.preprocessing
    return resample_image(
        cropped, placement.shape_network, placement.spacing_mm, how.spacing_mm, how.resampling_data
    )


def nonzero_box(array: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """The bounding box of the voxels that are not zero in some channel.

    nnU-Net fills the holes of this mask first, which cannot move its bounding box.

    Raises
    ------
    Refusal
        INVALID_VALUES if every voxel is zero.
    """
    occupied = np.zeros(array.shape[1:], bool)
    for channel in array:
        occupied |= channel != 0
    sides = []
    for axis in range(3):
        indices = np.flatnonzero(occupied.any(axis=tuple(a for a in range(3) if a != axis)))
        if len(indices) == 0:
            raise Refusal(
                ReasonCode.INVALID_VALUES, "Every voxel is zero.", remedy="Send a series that has an image."
            )
        sides.append(slice(int(indices[0]), int(indices[-1]) + 1))
    return sides[0], sides[1], sides[2]


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill what is enclosed: background that no path through faces leads to the border of the array.

    Equal to ``scipy.ndimage.binary_fill_holes``, which grows from the border layer by layer and is slower.
    """
    background, count = ndimage.label(~mask)
    outside = np.zeros(count + 1, bool)
    for axis in range(3):
        for face in (0, -1):
            outside[np.unique(background.take(face, axis=axis))] = True
    outside[0] = False  # 0 is the mask itself
    return np.asarray(~outside[background])


def normalise(image: NDArray[np.float32], channel: Channel, inside: NDArray[np.bool_] | None) -> None:
    """Normalise one channel in place.

    Parameters
    ----------
    image : (Z, Y, X) array, float32
    channel : Channel
        Names the scheme; ``CTNormalization`` has its intensity properties.
    inside : (Z, Y, X) array of bool, or None
        Where the z-score is taken and applied; everything else keeps its value.

    Raises
    ------
    Refusal
        INVALID_VALUES if a model for 8-bit images gets values outside 0 to 255.
    """
    match channel.normalization:
        case NormalizationScheme.ZSCORE if inside is not None:
            values = image[inside]
            image[inside] = (values - values.mean()) / max(values.std(), _SMALLEST_STD)
        case NormalizationScheme.ZSCORE:
            mean, std = image.mean(), image.std()
            image -= mean
            image /= max(std, _SMALLEST_STD)
        case NormalizationScheme.CT:
            assert channel.intensity is not None
            span = channel.intensity
            np.clip(image, span.percentile_00_5, span.percentile_99_5, out=image)
            image -= span.mean
            image /= max(span.std, _SMALLEST_STD)
        case NormalizationScheme.RESCALE_0_1:
            image -= image.min()
            image /= max(image.max(), _SMALLEST_STD)
        case NormalizationScheme.RGB_0_1:
            lowest, highest = float(image.min()), float(image.max())
            if lowest < 0 or highest > 255:
                raise Refusal(
                    ReasonCode.INVALID_VALUES,
                    f"Channel {channel.name!r} must have 8-bit values, but has {lowest:g} to {highest:g}.",
                    remedy="Send the 8-bit image that the model was made for.",
                )
            image /= 255.0
        case NormalizationScheme.NONE:
            pass


def restore(labels: NDArray[np.integer], placement: Placement, how: Preprocessing) -> NDArray[np.integer]:
    """Put cropped labels back into the array that was read: undo the crop, then the transpose.

    Parameters
    ----------
    labels : (Z, Y, X) array of shape ``placement.shape_cropped``

    Returns
    -------
    (Z, Y, X) array
        In the axis order before `transpose`; outside the crop it is 0.
    """
    whole = np.zeros(placement.shape_before, labels.dtype)
    whole[placement.box] = labels
    return whole.transpose(how.transpose_backward)


def _triple(values: Sequence[int]) -> Triple:
    a, b, c = values
    return a, b, c
