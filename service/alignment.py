"""The channels of a study on one grid: that of the reference channel, through patient coordinates.

A channel that lies on the reference's grid already is taken as it is. Any other is interpolated linearly at
the places of the reference's voxels. Up to half a voxel outside of its outermost voxel centres it has the
value of the nearest one; beyond, where the channel shows nothing, it has its own smallest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from models.errors import ReasonCode, Refusal
from models.volume import Affine, Volume
from service.channel_rules import AlignmentRules
from service.dicom.identity import common_identity
from service.dicom.series import SourceSeries
from service.registration import Registration, register_rigid

_SAME_GRID_MM = 1e-3
_HALF_VOXEL = 0.5 + 1e-6
_LEAST_COVERED = 0.5  # of the reference's voxels; a channel that shows less of it is refused
_WHOLE = 0.9995


@dataclass(frozen=True, eq=False)
class AlignedChannel:
    """What became of one channel.

    ``resampled`` is False where it lay on the reference's grid. ``covered`` is the fraction of the
    reference's voxels that lie within the channel's field of view.
    """

    name: str
    series_instance_uid: str
    reference: bool = False
    resampled: bool = False
    covered: float = 1.0
    registration: Registration | None = None

    def sentence(self, reference: str) -> str:
        """For the reader of a report."""
        who = f"Channel {self.name}: series {self.series_instance_uid}"
        if self.reference:
            return f"{who}, the reference."
        if not self.resampled:
            return f"{who}, on the grid of {reference}."
        how = "interpolated linearly onto"
        if (found := self.registration) is not None:
            how = (
                f"registered (rotated by {found.rotation_degrees:.2f} degrees, moved by up to "
                f"{found.moved_mm:.2f} mm, metric {found.metric:.4f}; rigid, mutual information) and "
                "interpolated linearly onto"
            )
        return f"{who}, {how} the grid of {reference}."

    def figures(self) -> dict[str, Any]:
        """As JSON, for records and measurements."""
        said: dict[str, Any] = {
            "name": self.name,
            "series_instance_uid": self.series_instance_uid,
            "reference": self.reference,
            "resampled": self.resampled,
            "covered": round(self.covered, 6),
        }
        if self.registration is not None:
            said["registration"] = self.registration.figures()
        return said


def align(
    sources: Sequence[SourceSeries], names: Sequence[str], reference: int, rules: AlignmentRules
) -> tuple[Volume, tuple[AlignedChannel, ...]]:
    """Bring every channel to the grid of one of them.

    Parameters
    ----------
    sources, names : sequences, one for each channel of the model
        The series and the channels' names, in the model's order.
    reference : int
        Which of them the others are brought to.

    Returns
    -------
    Volume
        All channels in the model's order, on the reference's grid.
    tuple of AlignedChannel
        What became of each, in the same order.

    Raises
    ------
    Refusal
        IDENTITY_CONFLICT for series of two patients or studies; CHANNEL_GRIDS_DIFFER for another frame of
        reference without registration, or where a channel shows too little of the reference;
        REGISTRATION_FAILED.
    """
    common_identity([source.headers[0] for source in sources])
    fixed = sources[reference].volume
    arrays, aligned = [], []
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        if number == reference:
            arrays.append(source.volume.array[0])
            aligned.append(AlignedChannel(name, source.series_instance_uid, reference=True))
            continue
        found = None
        if rules.registration == "rigid":
            found = register_rigid(fixed, source.volume, limit_mm=rules.registration_limit_mm, name=name)
        else:
            _require_one_frame_of_reference(sources[reference], source, names[reference], name)
            if _same_grid(source.volume, fixed):
                arrays.append(source.volume.array[0])
                aligned.append(AlignedChannel(name, source.series_instance_uid))
                continue
        to_channel = np.eye(4) if found is None else found.transform
        array, covered = resample_linear(source.volume, fixed, to_channel)
        if covered < _LEAST_COVERED:
            raise Refusal(
                ReasonCode.CHANNEL_GRIDS_DIFFER,
                f"The channel {name} shows only {covered:.0%} of what {names[reference]} shows.",
                remedy="Send channels of the same part of the body.",
            )
        arrays.append(array)
        aligned.append(
            AlignedChannel(
                name, source.series_instance_uid, resampled=True, covered=covered, registration=found
            )
        )
    return Volume(np.stack(arrays), fixed.affine, fixed.frame_of_reference_uid), tuple(aligned)


def alignment_warnings(aligned: Sequence[AlignedChannel]) -> tuple[str, ...]:
    """A sentence for every channel that does not show all of the reference."""
    return tuple(
        f"The channel {each.name} shows {each.covered:.1%} of the reference's field of view; the rest of it "
        "was filled with its smallest value."
        for each in aligned
        if each.covered < _WHOLE
    )


def resample_linear(moving: Volume, fixed: Volume, to_moving: Affine) -> tuple[NDArray[np.float32], float]:
    """Interpolate one channel at the voxels of another grid.

    Parameters
    ----------
    moving, fixed : Volume
        The channel, of which the first (Z, Y, X) array counts, and the grid.
    to_moving : (4, 4) array
        From LPS millimetres of the grid to LPS millimetres of the channel.

    Returns
    -------
    (Z, Y, X) array, float32
        On the grid of ``fixed``.
    float
        The fraction of its voxels that lie within the channel's field of view.
    """
    to_index = np.linalg.inv(moving.affine) @ to_moving @ fixed.affine  # (x, y, z) index to index
    reverse = to_index[:3, :3][::-1, ::-1]  # arrays are indexed (z, y, x)
    offset = to_index[:3, 3][::-1]
    array = moving.array[0]
    resampled = affine_transform(array, reverse, offset, fixed.shape_zyx, np.float32, order=1, mode="nearest")
    inside = 0
    axes = [np.arange(size, dtype=float) for size in fixed.shape_zyx]
    smallest = array.min()
    for z in range(fixed.shape_zyx[0]):  # a plane at a time: three coordinates of a whole volume are large
        plane = np.ones(fixed.shape_zyx[1:], bool)
        for axis, size in enumerate(array.shape):
            place = (
                offset[axis]
                + reverse[axis, 0] * z
                + reverse[axis, 1] * axes[1][:, None]
                + reverse[axis, 2] * axes[2]
            )
            plane &= (place >= -_HALF_VOXEL) & (place <= size - 1 + _HALF_VOXEL)
        resampled[z][~plane] = smallest
        inside += int(plane.sum())
    return np.asarray(resampled, np.float32), inside / resampled.size


def _require_one_frame_of_reference(
    reference: SourceSeries, source: SourceSeries, reference_name: str, name: str
) -> None:
    known = reference.frame_of_reference_uid
    if known is None or known != source.frame_of_reference_uid:
        raise Refusal(
            ReasonCode.CHANNEL_GRIDS_DIFFER,
            f"The channel {name} lies in another frame of reference than {reference_name}.",
            remedy="Have the route register its channels, or send channels of one examination.",
        )


def _same_grid(one: Volume, other: Volume) -> bool:
    """True for grids of one shape whose voxels lie on each other."""
    if one.shape_zyx != other.shape_zyx:
        return False
    size = np.array(one.shape_zyx[::-1]) - 1
    corners = np.array([[*(size * corner), 1.0] for corner in np.ndindex(2, 2, 2)])
    apart_mm = np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1)
    return float(apart_mm.max()) <= _SAME_GRID_MM
