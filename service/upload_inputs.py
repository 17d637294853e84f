"""What uploaded files are, told by their contents: NIfTI images, or archives of DICOM series.

Only what is cheap to see is judged here: the kind of a file, its header, the directory of an archive.
Geometry and voxels are judged by the job. A file's name, as its sender gave it, is never used.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
from nibabel import load
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Pair
from nibabel.spatialimages import HeaderDataError

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest
from service.archive import opened_archive
from service.headers import read_attributes

_PROBED_MEMBERS = 16
_PROBED_BYTES = 4 << 20
_UID = re.compile(r"[0-9.]{1,64}")


class _Kind(StrEnum):
    """What a file is; the value is the suffix that it gets."""

    NIFTI = ".nii"
    NIFTI_GZ = ".nii.gz"
    ARCHIVE = ".zip"


def take_inputs(
    paths: Sequence[Path], manifest: Manifest, *, whole_study: bool = False
) -> tuple[list[Path], str | None]:
    """Judge one uploaded file per channel, and rename each to ``<channel>`` with the suffix of what it is.

    With ``whole_study`` one archive may stand for all channels: the job tells them apart.

    Returns
    -------
    paths : list of Path
        One for each channel: NIfTI (``.nii``, ``.nii.gz``), or an archive of DICOM files (``.zip``).
    study_instance_uid : str or None
        Of the archive's first DICOM file; None for NIfTI, and where it cannot be told yet.

    Raises
    ------
    Refusal
        MISSING_CHANNEL for another number of files than the model has channels; CHANNEL_GRIDS_DIFFER for
        a mixture of kinds; UNREADABLE, NOT_A_VOLUME, TOO_LARGE for what the files are.
    """
    channels = [channel.name for channel in manifest.channels]
    one_for_all = whole_study and len(paths) == 1 and _kind_of(paths[0], "The file") is _Kind.ARCHIVE
    if len(paths) != len(channels) and not one_for_all:
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
    named = [p.rename(p.with_name(f"{i:04d}{k}")) for i, (p, k) in enumerate(zip(paths, kinds, strict=True))]
    if not archives:
        for path, name in zip(named, names, strict=True):
            _check_nifti_header(path, name)
        return named, None
    study_instance_uids = [_check_archive(path, name) for path, name in zip(named, names, strict=True)]
    return named, study_instance_uids[0]


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
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
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


def _check_archive(path: Path, name: str) -> str | None:
    """Judge an archive by its directory; the Study Instance UID of its first DICOM file, if it tells one."""
    with opened_archive(path, name) as (archive, members):
        return _study_instance_uid(archive, members, path.with_name("probe"))


def _study_instance_uid(
    archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], probe: Path
) -> str | None:
    """From the first DICOM file among the first members; the study can be deleted by it later.

    No more than a header's worth is unpacked. What cannot be told from it is for the job to judge.
    """
    for info in members[:_PROBED_MEMBERS]:
        with archive.open(info) as source:
            start = source.read(132)
            if start[128:] != b"DICM":
                continue
            probe.write_bytes(start + source.read(_PROBED_BYTES))
        try:
            values = read_attributes(probe, ["StudyInstanceUID"])["StudyInstanceUID"]
        except Refusal:
            return None
        finally:
            probe.unlink()
        return values[0] if len(values) == 1 and _UID.fullmatch(values[0]) else None
    return None
