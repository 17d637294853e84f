"""A series of DICOM instances, read into one volume in the patient, or refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from models.errors import ReasonCode, Refusal
from models.volume import Volume
from service.dicom.elements import string, strings, uid
from service.dicom.frames import Frame, frame_count, frames_of, has_plane
from service.dicom.geometry import GeometryPolicy, Grid, regular_grid
from service.dicom.identity import Identity, common_identity
from service.dicom.instances import Instance, read_instance
from service.dicom.pixels import PixelFormat, is_lossy, lossy_method, lossy_ratio, stored_frames
from service.dicom.volumes import pick_volume
from service.reading import VolumeRule

__all__ = ["GeometryPolicy", "SourceSeries", "read_series"]

_DERIVED = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.66.4",  # Segmentation
        "1.2.840.10008.5.1.4.1.1.66.7",  # Label Map Segmentation
        "1.2.840.10008.5.1.4.1.1.30",  # Parametric Map
        "1.2.840.10008.5.1.4.1.1.481.2",  # RT Dose
    }
)
"""Objects that have pixels and a plane, and are nevertheless no images of the series."""

_PLANAR = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.2",  # CT
        "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
        "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
        "1.2.840.10008.5.1.4.1.1.4",  # MR
        "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
        "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
        "1.2.840.10008.5.1.4.1.1.128",  # PET
        "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
        "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    }
)
"""Classes whose every instance must state its plane: one that does not may not be passed over."""


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """One series as a volume, with what a derived object must say about it.

    Parameters
    ----------
    volume : Volume
        One channel: ``array`` (1, Z, Y, X) float32, z in the order of increasing position along the
        normal (row x column); ``affine`` from positions and orientations, LPS mm.
    headers : tuple of Dataset
        Headers without pixel data, one per instance: in slice order for single-frame objects, one element
        for an enhanced object. They hold what was sent: read them through ``service.dicom.elements``.
    frame_numbers : tuple of (int, int)
        For every slice the index into ``headers`` and the frame number, counted from 1.
    positions_mm : (Z, 3) array
        Image Position (Patient) of every slice, as its header states it.
    orientation : tuple of 6 float
        Image Orientation (Patient) as the first slice states it: direction cosines of the rows (along
        increasing column index), then of the columns.
    pixel_spacing_mm : tuple of 2 float
        Pixel Spacing as the first slice states it: between rows, between columns.
    slice_thickness_mm : float or None
        Slice Thickness as stated; it says nothing about the distance between slices.
    lossy : bool
        True where any image was compressed with loss; then ``lossy_ratio`` (DS) and ``lossy_method`` (CS,
        PS3.3 C.7.6.1.1.5) tell how.
    tilt_degrees : float
        How far the stack is sheared; 0 where it is rectangular.
    warnings : tuple of str
        What was passed over or set right; no sentence holds patient data.
    """

    volume: Volume
    headers: tuple[Dataset, ...] = field(repr=False)
    frame_numbers: tuple[tuple[int, int], ...] = field(repr=False)
    positions_mm: NDArray[np.float64] = field(repr=False)
    identity: Identity
    series_instance_uid: str
    sop_instance_uids: tuple[str, ...] = field(repr=False)
    modality: str
    frame_of_reference_uid: str | None
    orientation: tuple[float, ...]
    pixel_spacing_mm: tuple[float, ...]
    slice_thickness_mm: float | None
    lossy: bool
    lossy_ratio: str = ""
    lossy_method: str = ""
    tilt_degrees: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def slice_spacing_mm(self) -> float:
        """Distance between neighbouring slices along their normal (PS3.3 C.7.6.16.2.1)."""
        row, column, step = (self.volume.affine[:3, i] for i in range(3))
        normal = np.cross(row, column)
        return float(abs(normal @ step) / np.linalg.norm(normal))

    @property
    def study_instance_uid(self) -> str:
        return self.identity.study_instance_uid

    @property
    def patient_id(self) -> str:
        return self.identity.patient_id


def read_series(
    paths: Sequence[Path], *, policy: GeometryPolicy | None = None, volume: VolumeRule | None = None
) -> SourceSeries:
    """Read the files of one series, in any order, into a volume.

    Parameters
    ----------
    paths : sequence of Path
        Part 10 files of one series. Their names and order mean nothing, except that messages count them.
    policy : GeometryPolicy, optional
        Tolerances and limits.
    volume : VolumeRule, optional
        Which volume is taken where the series holds several; without a rule it is refused.

    Raises
    ------
    Refusal
        With a reason code and the figures, where the files are not one regular volume of one patient.
    """
    policy = policy or GeometryPolicy()
    if not paths:
        raise Refusal(
            ReasonCode.NOT_A_VOLUME, "There is no file to read.", remedy="Send at least one series."
        )
    instances = [
        read_instance(path, ordinal, limit_bytes=policy.limit_inflated_bytes)
        for ordinal, path in enumerate(paths, 1)
    ]
    warnings: list[str] = []
    images = _images(instances, policy, warnings)
    identity = _one_identity(images, policy)
    frame_of_reference_uid = _one_frame_of_reference(images)
    images = _without_localizers(_without_copies(images, warnings), warnings)
    _refuse_mosaic(images)

    frames = [f for image in images for f in frames_of(image, limit_frames=policy.limit_frames)]
    if volume is not None:
        frames, which = pick_volume(frames, volume)
        warnings += [which] if which else []
    forms = {image: PixelFormat.of(image) for image in dict.fromkeys(f.instance for f in frames)}
    voxels = sum(forms[f.instance].rows * forms[f.instance].columns for f in frames)
    if voxels > policy.limit_voxels:
        raise Refusal(
            ReasonCode.TOO_LARGE,
            f"The series claims {voxels / 1e6:.0f} of {policy.limit_voxels / 1e6:.0f} Mvoxels allowed.",
            remedy="Raise the limit if images of this size are expected.",
        )
    shapes = [(forms[f.instance].rows, forms[f.instance].columns) for f in frames]
    grid = regular_grid(frames, shapes, policy)
    array = _decode(grid, forms, warnings)

    ordered = tuple(dict.fromkeys(frame.instance for frame in grid.frames))
    lossy = [instance for instance in ordered if is_lossy(instance)]
    index = {instance: i for i, instance in enumerate(ordered)}
    return SourceSeries(
        volume=Volume(array[None], grid.affine, frame_of_reference_uid),
        headers=tuple(instance.header for instance in ordered),
        frame_numbers=tuple((index[f.instance], f.number) for f in grid.frames),
        positions_mm=np.array([f.position_mm for f in grid.frames]),
        identity=identity,
        series_instance_uid=uid(ordered[0].header, "SeriesInstanceUID") or "",
        sop_instance_uids=tuple(instance.sop_instance_uid for instance in ordered),
        modality=string(ordered[0].header, "Modality") or "",
        frame_of_reference_uid=frame_of_reference_uid,
        orientation=grid.frames[0].row + grid.frames[0].column,
        pixel_spacing_mm=grid.frames[0].pixel_spacing_mm,
        slice_thickness_mm=grid.frames[0].slice_thickness_mm,
        lossy=bool(lossy),
        lossy_ratio=lossy_ratio(lossy[0], forms[lossy[0]]) if lossy else "",
        lossy_method=lossy_method(lossy[0]) if lossy else "",
        tilt_degrees=grid.tilt_degrees,
        warnings=tuple(warnings),
    )


def _images(instances: list[Instance], policy: GeometryPolicy, warnings: list[str]) -> list[Instance]:
    """The instances that are images of the patient; the others are passed over with a warning."""
    images, others = [], []
    for instance in instances:
        sop_class = string(instance.header, "SOPClassUID") or ""
        planar = has_plane(instance.header)
        says_nothing = not sop_class and instance.pixels_at is None
        if sop_class in _DERIVED or not (sop_class in _PLANAR or planar or says_nothing):
            others.append(instance)
        elif instance.pixels_at is None:
            raise Refusal(
                ReasonCode.UNREADABLE,
                f"{_upper(instance.label)} has no pixel data: it is damaged or cut short.",
                remedy="Send the study again; if it fails once more, the image is damaged at its source.",
            )
        elif not planar:
            raise Refusal(
                ReasonCode.NOT_A_VOLUME,
                f"{_upper(instance.label)} does not state its place in the patient.",
                remedy="Route a series that holds one stack of parallel slices.",
            )
        else:
            images.append(instance)
    if others and (policy.non_image == "refuse" or not images):
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{len(others)} of {len(instances)} objects hold no plane of the patient.",
            remedy="Route a series that holds one stack of parallel slices.",
        )
    if others:
        warnings.append(f"Left out: {len(others)} of {len(instances)} objects, which hold no plane.")
    return images


def _one_identity(images: list[Instance], policy: GeometryPolicy) -> Identity:
    headers = [image.header for image in images]
    identity = common_identity(headers)
    if policy.missing_identity == "refuse":
        identity.require_whole()
    series = {uid(header, "SeriesInstanceUID") or "" for header in headers}
    if len(series) > 1:
        raise Refusal(
            ReasonCode.AMBIGUOUS_SERIES,
            f"The images belong to {len(series)} series.",
            remedy="Give the images of one series.",
        )
    unnamed = sum(not image.sop_instance_uid for image in images) + ("" in series)
    if unnamed and policy.missing_identity == "refuse":
        raise Refusal(
            ReasonCode.IDENTITY_MISSING,
            f"Of {len(images)} images, some have no SOP Instance UID or no Series Instance UID.",
            remedy="Send the study again from its original source.",
        )
    return identity


def _one_frame_of_reference(images: list[Instance]) -> str | None:
    uids = {uid(image.header, "FrameOfReferenceUID") for image in images}
    if len(uids) > 1:
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"The images lie in {len(uids)} frames of reference: their positions cannot be compared.",
            remedy="Route a series that holds one stack of parallel slices.",
        )
    return uids.pop()


def _without_copies(images: list[Instance], warnings: list[str]) -> list[Instance]:
    """Drop files that repeat an instance; the same UID on different images is refused."""
    first: dict[str, Instance] = {}
    kept = []
    for image in images:
        uid = image.sop_instance_uid
        earlier = first.setdefault(uid, image) if uid else image
        if earlier is image:
            kept.append(image)
        elif _content(earlier) != _content(image):
            raise Refusal(
                ReasonCode.IDENTITY_CONFLICT,
                f"{_upper(earlier.label)} and {image.label} have the same SOP Instance UID, "
                "but are different images.",
                remedy="Send the study again from its original source.",
            )
    if len(kept) < len(images):
        warnings.append(f"Left out: {len(images) - len(kept)} files that repeat another image.")
    return kept


def _content(image: Instance) -> tuple[object, ...]:
    place = (strings(image.header, k) for k in ("ImagePositionPatient", "ImageOrientationPatient"))
    return (*(tuple(p) for p in place), sha256(image.read_pixel_element()[0]).digest())


def _without_localizers(images: list[Instance], warnings: list[str]) -> list[Instance]:
    """Drop scout images that a scanner stored inside the series of its slices."""
    scouts = [image for image in images if "LOCALIZER" in strings(image.header, "ImageType")]
    if not scouts or len(scouts) == len(images):
        return images
    warnings.append(f"Left out: {len(scouts)} of {len(images)} images, which are localizers.")
    return [image for image in images if image not in scouts]


def _refuse_mosaic(images: list[Instance]) -> None:
    mosaics = sum("MOSAIC" in strings(image.header, "ImageType") for image in images)
    if mosaics:
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{mosaics} of {len(images)} images are mosaics that tile many slices into one plane.",
            remedy="Send the series as enhanced multi-frame or as single slices.",
        )


def _decode(grid: Grid, forms: dict[Instance, PixelFormat], warnings: list[str]) -> NDArray[np.float32]:
    """The rescaled values of every frame at its place: (Z, Y, X) float32."""
    array = np.empty(grid.shape_zyx, np.float32)
    wanted: dict[Instance, dict[int, tuple[int, Frame]]] = {}
    for z, frame in enumerate(grid.frames):
        wanted.setdefault(frame.instance, {})[frame.number] = (z, frame)
    cleared = 0
    for instance, places in wanted.items():
        for number, plane, was_cleared in stored_frames(
            instance, forms[instance], frame_count(instance), places
        ):
            z, frame = places[number]
            _rescale(plane, frame, array[z])
            cleared += was_cleared
    if cleared:
        warnings.append(f"Bits outside Bits Stored were cleared in {cleared} of {len(array)} slices.")
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            "Some voxels are not finite numbers after rescaling.",
            remedy="Send the study again from its original source.",
        )
    if low == high:
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            f"Every voxel has the same value ({low:g}).",
            remedy="Route a series that holds an image.",
        )
    return array


def _rescale(plane: NDArray[Any], frame: Frame, out: NDArray[np.float32]) -> None:
    if frame.slope == 1.0 and frame.intercept == 0.0:
        out[...] = plane
        return
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused with the volume
        out[...] = plane * np.float64(frame.slope) + np.float64(frame.intercept)  # each value rounded once


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
