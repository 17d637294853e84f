"""NIfTI files in and out: RAS becomes LPS here, and nowhere else.

Standard: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h ("method 2" and "method 3" orientation).
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Image, Nifti1Pair
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from models.errors import ReasonCode, Refusal
from models.resources import available_memory_bytes
from models.volume import Affine, Labelmap, Volume

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_FORMS_AGREE_MM = 0.1
_GRIDS_AGREE_MM = 0.01
_LARGEST_COSINE = 1e-3  # of two axes that should be at right angles
_CHECK_FILE = "Check that the file is a complete NIfTI image."


def read_nifti(paths: Sequence[Path]) -> Volume:
    """Read one volume from one 3D file per channel, all on the same grid.

    Parameters
    ----------
    paths : paths of .nii or .nii.gz files, in the order of the model's channels

    Returns
    -------
    Volume
        (C, Z, Y, X) float32, scaled by the headers' slope and intercept, in LPS.

    Raises
    ------
    Refusal
        UNREADABLE for what is not NIfTI or damaged; NOT_A_VOLUME for other than three dimensions;
        INVALID_GEOMETRY for no form code, two forms that disagree, or axes without length or not at right
        angles; INVALID_VALUES for voxels that are not finite; CHANNEL_GRIDS_DIFFER; TOO_LARGE for more than
        the memory that is free. Messages name files by their place in ``paths``, not by their name.
    """
    if not paths:
        raise Refusal(ReasonCode.MISSING_CHANNEL, "No file was given.", remedy="Give one file per channel.")
    images = [_open(path, f"File {i} of {len(paths)}") for i, path in enumerate(paths, 1)]
    shape, affine = images[0].shape, _affine(images[0], f"File 1 of {len(paths)}")
    for i, image in enumerate(images[1:], 2):
        _check_same_grid(i, image.shape, _affine(image, f"File {i} of {len(paths)}"), shape, affine)
    needed = int(np.prod(shape)) * 4 * (len(images) + 1)
    if needed > available_memory_bytes():
        raise Refusal(
            ReasonCode.TOO_LARGE,
            f"{len(images)} x {' x '.join(map(str, shape))} voxels need {needed / 1e9:.1f} GB to read, more "
            f"than the {available_memory_bytes() / 1e9:.1f} GB that are free.",
            remedy="Crop or resample the image, or use a machine with more memory.",
        )
    array = np.empty((len(images), *shape[::-1]), np.float32)
    for i, (image, target) in enumerate(zip(images, array, strict=True), 1):
        target[...] = _values(image, f"File {i} of {len(paths)}", np.float32).T
        if not np.isfinite(target).all():
            count = target.size - int(np.isfinite(target).sum())
            raise Refusal(
                ReasonCode.INVALID_VALUES,
                f"File {i} of {len(paths)} has {count} voxels that are infinite or not a number.",
                remedy="Check how the image was made; replace such voxels by a background value.",
            )
    return Volume(array, affine)


def read_labelmap(path: Path) -> Labelmap:
    """Read a labelmap.

    Raises
    ------
    Refusal
        As `read_nifti`; INVALID_VALUES also for values that are not integers from 0 to 65535.
    """
    image = _open(path, "The labelmap")
    affine = _affine(image, "The labelmap")
    values = _values(image, "The labelmap", np.float64).T
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0 and highest <= 65535 and np.all(values == np.rint(values))):
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            f"The labelmap must hold integers from 0 to 65535, but has {lowest:g} to {highest:g}.",
            remedy="Give a labelmap, not an image or probabilities.",
        )
    return Labelmap(np.ascontiguousarray(values, np.uint8 if highest < 256 else np.uint16), affine)


def write_nifti(labelmap: Labelmap, path: Path) -> None:
    """Write a labelmap as .nii or .nii.gz: whole or not at all, and the same bytes each time.

    sform and qform are both set, with code 1 (scanner).

    Parameters
    ----------
    path : Path
        Where to; an existing file is replaced at once, by renaming a complete one.
    """
    affine = _RAS_TO_LPS @ labelmap.affine
    image = Nifti1Image(labelmap.array.T, affine, dtype=labelmap.array.dtype)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=4, mtime=0)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _open(path: Path, what: str) -> Any:
    """The image, its header read and its voxels not yet."""
    try:
        image = nibabel.load(path)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise Refusal(
            ReasonCode.UNREADABLE, f"{what} is not readable as NIfTI.", remedy=_CHECK_FILE
        ) from error
    if not isinstance(image, Nifti1Pair):
        raise Refusal(ReasonCode.UNREADABLE, f"{what} is not NIfTI.", remedy=_CHECK_FILE)
    shape = image.shape
    if len(shape) != 3 or min(shape) < 1:
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{what} has the shape {' x '.join(map(str, shape))}; one volume has three dimensions.",
            remedy="Give one 3D file for each channel.",
        )
    return image


def _values(image: Any, what: str, dtype: type[Any]) -> NDArray[Any]:
    """Scaled voxel values (X, Y, Z)."""
    if image.get_data_dtype().kind not in "iuf":
        raise Refusal(
            ReasonCode.UNSUPPORTED_PIXELS,
            f"{what} has voxels of type {image.get_data_dtype()}; integers and reals are supported.",
            remedy="Convert the image to one number per voxel.",
        )
    try:
        return np.asarray(image.dataobj, dtype=dtype)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Refusal(
            ReasonCode.UNREADABLE, f"{what} ends before its last voxel, or is damaged.", remedy=_CHECK_FILE
        ) from error


def _affine(image: Any, what: str) -> Affine:
    """The affine in LPS, of sform where its code is set, else of qform.

    With both codes 0 a file says nothing about the patient, and readers guess differently; with both set
    and different, each viewer picks its own. Neither is a base for a result that goes into a patient's file.
    """
    header = image.header
    sform = header.get_sform(coded=True)[0]
    try:
        qform = header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError) as error:
        raise _geometry(f"{what} has a quaternion that is no rotation.") from error
    if sform is None and qform is None:
        raise Refusal(
            ReasonCode.INVALID_GEOMETRY,
            f"{what} has qform_code 0 and sform_code 0: it does not say how it lies in the patient.",
            remedy="Set the qform or the sform with its code; the DICOM series it was made of has both.",
        )
    affine = np.array(sform if sform is not None else qform, np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not np.isfinite(lengths).all() or lengths.min() <= 0:
        raise _geometry(f"{what} has a voxel axis without a length.")
    cosines = affine[:3, :3] / lengths
    shear = float(np.abs(cosines.T @ cosines - np.eye(3)).max())
    if shear > _LARGEST_COSINE:
        angle = 90 - float(np.degrees(np.arccos(min(shear, 1.0))))
        raise _geometry(f"{what} has axes that are {angle:.2f} degrees from right angles.")
    if sform is not None and qform is not None:
        corners = np.array(np.meshgrid(*((0, n - 1) for n in image.shape))).reshape(3, -1)
        corners = np.vstack((corners, np.ones(corners.shape[1])))
        apart = float(np.linalg.norm(((affine - qform) @ corners)[:3], axis=0).max())
        if not apart <= _FORMS_AGREE_MM:
            raise Refusal(
                ReasonCode.INVALID_GEOMETRY,
                f"{what} has a qform and an sform that differ by {apart:.3g} mm.",
                remedy="Make both the same, or set the code of the wrong one to 0.",
            )
    return np.asarray(_RAS_TO_LPS @ affine)


def _geometry(message: str) -> Refusal:
    return Refusal(ReasonCode.INVALID_GEOMETRY, message, remedy="Resample the image onto a rectangular grid.")


def _check_same_grid(
    index: int, shape: Sequence[int], affine: Affine, first_shape: Sequence[int], first_affine: Affine
) -> None:
    if tuple(shape) != tuple(first_shape):
        difference = f"{' x '.join(map(str, shape))} voxels, not {' x '.join(map(str, first_shape))}"
    else:
        apart = float((np.abs(affine - first_affine) @ np.array([*shape, 1.0])).max())
        if apart <= _GRIDS_AGREE_MM:
            return
        difference = f"a grid that is {apart:.3g} mm from the first's"
    raise Refusal(
        ReasonCode.CHANNEL_GRIDS_DIFFER,
        f"File {index} has {difference}.",
        remedy="Register and resample the channels to one grid.",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
