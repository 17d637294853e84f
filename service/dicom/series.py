"""A series of DICOM instances, read into one volume in the patient, or refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from models.errors import ReasonCode, Refusal
from models.volume import Volume
from service.dicom.elements import string, uid
from service.dicom.frames import frames_of
from service.dicom.geometry import GeometryPolicy, regular_grid
from service.dicom.identity import Identity, common_identity
from service.dicom.instances import Instance, read_instance
from service.dicom.pixels import PixelFormat, is_lossy, lossy_method, lossy_ratio
from service.dicom.selection import (
    images_of,
    refuse_incomplete,
    refuse_mosaics,
    without_copies,
    without_localizers,
)
from service.dicom.volumes import pick_volume
from service.dicom.voxels import rescaled_volume
from service.reading import VolumeRule

__all__ = ["GeometryPolicy", "SourceSeries", "read_series"]


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
    images = images_of(instances, non_image=policy.non_image, warnings=warnings)
    identity = _one_identity(images, policy)
    images = without_localizers(without_copies(images, warnings), warnings)
    frame_of_reference_uid = _one_frame_of_reference(images)  # scouts may lie in one of their own
    refuse_mosaics(images)
    refuse_incomplete(images)

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
    array = rescaled_volume(grid, forms, warnings)

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
    uids = [uid(image.header, "FrameOfReferenceUID") for image in images]
    named = {each for each in uids if each is not None}
    if len(set(uids)) > 1:
        which = (
            f"{uids.count(None)} of {len(uids)} images name no frame of reference, and the others do"
            if len(named) == 1
            else f"The images lie in {len(named)} frames of reference"
        )
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{which}: their positions cannot be compared.",
            remedy="Route a series that holds one stack of parallel slices.",
        )
    return uids[0]
