"""What uploaded files are, told by their contents: NIfTI images, or archives of DICOM series.

Only what is cheap to see is judged here: the kind of a file, its header, the list of an archive. Geometry
and voxels are judged by whoever reads the volume. A file's name, as its sender gave it, is never used.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pydicom
from nibabel import Nifti1Pair, load
from nibabel.filebasedimages import ImageFileError

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest
from service.spool import Spool
from service.zipped_dicom import unpack_dicom

_UID = re.compile(r"[0-9.]{1,64}")


class _Kind(StrEnum):
    """What a file is; the value is the suffix that it gets."""

    NIFTI = ".nii"
    NIFTI_GZ = ".nii.gz"
    ARCHIVE = ".zip"


@dataclass(frozen=True)
class UploadedInput:
    """A file that a job will read."""

    path: Path
    channel: int


def take_inputs(
    paths: Sequence[Path], manifest: Manifest, spool: Spool, *, maximum_bytes: int
) -> tuple[list[UploadedInput], str | None]:
    """Judge one uploaded file per channel, and give every file its proper name.

    NIfTI files are renamed to ``<channel>.nii`` or ``<channel>.nii.gz``; archives are unpacked to
    ``<channel>-<number>.dcm`` beside them and removed.

    Returns
    -------
    inputs : list of UploadedInput
    study_instance_uid : str or None
        Of the DICOM files; None for NIfTI.

    Raises
    ------
    Refusal
        MISSING_CHANNEL for another number of files than the model has channels, or a mixture of kinds;
        UNREADABLE, NOT_A_VOLUME, TOO_LARGE for what the files are.
    StorageFullError
        If an archive does not fit on the disk unpacked.
    """
    channels = [channel.name for channel in manifest.channels]
    if len(paths) != len(channels):
        raise Refusal(
            ReasonCode.MISSING_CHANNEL,
            f"{len(paths)} file(s) were sent, but the model {manifest.name} takes {len(channels)}: "
            f"{', '.join(channels)}.",
            remedy="Send one file per channel in this order: NIfTI, or one .zip of a DICOM series each.",
        )
    names = [f"File {i} of {len(paths)}" for i in range(1, len(paths) + 1)]
    kinds = [_kind_of(path, name) for path, name in zip(paths, names, strict=True)]
    archives = kinds.count(_Kind.ARCHIVE)
    if archives not in (0, len(kinds)):
        raise Refusal(
            ReasonCode.CHANNEL_GRIDS_DIFFER,
            f"{archives} of {len(kinds)} files are archives of DICOM and the others are NIfTI.",
            remedy="Send all channels in the same form.",
        )
    if archives:
        inputs = []
        for channel, path in enumerate(paths):
            unpacked = unpack_dicom(
                path, names[channel], prefix=f"{channel:04d}", spool=spool, limit_bytes=maximum_bytes
            )
            path.unlink()
            inputs += [UploadedInput(each, channel) for each in unpacked]
        return inputs, _study_instance_uid(inputs[0].path)
    inputs = []
    for channel, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        named = path.rename(path.with_name(f"{channel:04d}{kind}"))
        _check_nifti_header(named, names[channel])
        inputs.append(UploadedInput(named, channel))
    return inputs, None


def _kind_of(path: Path, name: str) -> _Kind:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b":
        return _Kind.NIFTI_GZ
    if start in (b"PK\x03\x04", b"PK\x05\x06"):
        return _Kind.ARCHIVE
    if start in tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big")):
        return _Kind.NIFTI  # a header begins with its own size: 348 bytes in NIfTI-1, 540 in NIfTI-2
    raise Refusal(
        ReasonCode.UNREADABLE,
        f"{name} ({path.stat().st_size} bytes) is neither NIfTI nor an archive, whatever its name says.",
        remedy="Send .nii, .nii.gz, or a .zip of a DICOM series.",
    )


def _check_nifti_header(path: Path, name: str) -> None:
    """Read a header, never a voxel: what would unpack to terabytes is told by its first 352 bytes."""
    try:
        image = load(path)
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        raise Refusal(
            ReasonCode.UNREADABLE,
            f"{name} has no readable NIfTI header.",
            remedy="Check that the file is a complete NIfTI image.",
        ) from error
    if not isinstance(image, Nifti1Pair):
        raise Refusal(
            ReasonCode.UNREADABLE, f"{name} is an image, but not NIfTI.", remedy="Convert it to NIfTI."
        )
    shape = " x ".join(map(str, image.shape))
    if len(image.shape) != 3 or min(image.shape) < 1:
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{name} has the shape {shape}; one volume has three dimensions.",
            remedy="Send one 3D file for each channel.",
        )
    if path.suffix == ".nii":
        size_bytes = path.stat().st_size
        needed_bytes = int(image.dataobj.offset) + int(np.prod(image.shape, dtype=object)) * (
            image.get_data_dtype().itemsize
        )
        if size_bytes < needed_bytes:
            raise Refusal(
                ReasonCode.UNREADABLE,
                f"{name} has {size_bytes} bytes, but its header ({shape}) asks for {needed_bytes}.",
                remedy="The file is cut off: send it again, whole.",
            )


def _study_instance_uid(path: Path) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that break their VR; the job judges them
        try:
            header = pydicom.dcmread(path, specific_tags=["StudyInstanceUID"], stop_before_pixels=True)
            value = str(header.get("StudyInstanceUID", ""))
        except Exception as error:  # the parser lets anything out for broken input
            raise Refusal(
                ReasonCode.UNREADABLE,
                f"The first DICOM file of the archive cannot be read ({type(error).__name__}).",
                remedy="Check that the archive holds complete DICOM files.",
            ) from error
    return value if _UID.fullmatch(value) else None
