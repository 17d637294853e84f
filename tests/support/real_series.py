"""Every folder of real images that the tests have, with what is expected of it: one table for all tests.

A case is read into a volume of a shape, or refused with a reason and its figures. Beside that, DICOM
objects can be made of some volumes only: images that were anonymised down to their frame of reference or
their identifiers give a NIfTI file, and a refusal where an object is wanted.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from models.errors import ReasonCode
from models.volume import Labelmap, Volume
from service.dicom.series import GeometryPolicy, read_series

EDGE = "dicom_edge_cases"
FAILING = f"{EDGE}/failing"
NO_FRAME_OF_REFERENCE = (ReasonCode.INVALID_GEOMETRY, "no Frame of Reference UID")
ACCEPTING = GeometryPolicy(missing_identity="accept", gantry_tilt="accept")
NOBODYS = (ReasonCode.IDENTITY_MISSING, "no usable StudyInstanceUID and no usable PatientID")

Why = tuple[ReasonCode, str]
"""A reason code, and a part of the sentence with its figures."""


@dataclass(frozen=True)
class Case:
    """A series among the test data.

    Parameters
    ----------
    name : str
        Folder or file, from the folder of all data.
    shape_zyx : tuple of int, optional
        Of the volume; None for what is refused.
    refused : Why, optional
        Why it is no volume.
    no_object : Why, optional
        Why no DICOM object can be made of the volume.
    resampled : Why or tuple of int, optional
        What becomes of it where a tilted gantry is set right: the shape of the rectangular volume, or why
        it is refused all the same.
    """

    name: str
    shape_zyx: tuple[int, int, int] | None = None
    refused: Why | None = None
    no_object: Why | None = None
    resampled: Why | tuple[int, int, int] | None = None

    @property
    def truth_name(self) -> str:
        return f"{self.name}_ground_truth.nii.gz"


def _volume(name: str, *shape_zyx: int, no_object: Why | None = None) -> Case:
    z, y, x = shape_zyx
    return Case(name, (z, y, x), no_object=no_object)


def _edge(name: str, *shape_zyx: int) -> Case:
    return _volume(f"{EDGE}/{name}", *shape_zyx, no_object=NO_FRAME_OF_REFERENCE)


VOLUMES = (
    _edge("ge/anatomical/001", 4, 256, 256),
    _edge("ge/anatomical/001_implicit", 4, 256, 256),
    _edge("generic/anatomical/001", 4, 256, 256),
    _edge("generic/anatomical/001_implicit", 4, 256, 256),
    # Derived MPR images with a slope of their own for each slice, and pixels of 4.0 x 6.4 mm.
    _edge("generic/anatomical/002_non_isotropic", 4, 28, 64),
    _edge("generic/compressed/001", 4, 256, 256),
    _edge("generic/compressed_j2k/001", 4, 256, 256),
    _edge("generic/compressed_jpeg/001", 4, 256, 256),
    _edge("generic/compressed_jpegls/001", 4, 256, 256),
    _edge("generic/compressed_rle/001", 4, 256, 256),
    _edge("philips_enhanced/anatomical/001", 8, 256, 256),
    _edge("philips_enhanced/anatomical/001_implicit", 8, 256, 256),
    _edge("siemens_multiframe/anatomical/001", 8, 256, 256),
    _volume("dicom_philips_t1", 170, 256, 256),
    _volume("dicom_siemens_enhanced_t1/5_anat-T1w_acq-tfl", 96, 128, 128),
    # No Manufacturer and an empty Series Number, which say nothing about the geometry.
    _volume("hippocampus_dicom/Study1_13_HCropVolume", 32, 51, 35),
    _volume("hippocampus_dicom/Study3_11_HCropVolume", 40, 50, 34),
    # Anonymised until no study, series, instance or patient can be told: no result could be filed.
    _volume("ct_abdomen/example_ct_dicom", 20, 512, 512, no_object=NOBODYS),
)

REFUSED = (
    Case(
        f"{FAILING}/gantrytilting/001",
        refused=(ReasonCode.GANTRY_TILT, "14.0 degrees"),
        resampled=(4, 521, 512),  # three slices 5 tan(14) = 1.2 mm further each, of 0.418 mm a pixel
    ),
    # One image of every acquisition of a contrast timing series: four times the same plane.
    Case(f"{FAILING}/notavolume/001", refused=(ReasonCode.NOT_A_VOLUME, "All 4 images lie at one position")),
    # Two slices are regular by themselves, but a third one that is missing could not be noticed.
    Case(f"{FAILING}/slicecount/001", refused=(ReasonCode.NOT_A_VOLUME, "2 images")),
    Case(f"{EDGE}/ge/anatomical/001_single_slice", refused=(ReasonCode.NOT_A_VOLUME, "1 image;")),
    # Gaps of 5, 5 and 10 mm: the likelier story is a slice that got lost, and sending again can mend that.
    Case(f"{FAILING}/sliceincrement/001", refused=(ReasonCode.MISSING_SLICE, "at 33.11 mm")),
    # Tilted and incomplete. The tilt comes first: it would remain if the missing slice arrived.
    Case(
        f"{FAILING}/sliceincrement/002",
        refused=(ReasonCode.GANTRY_TILT, "Besides, slices are missing at 1 places"),
        resampled=(ReasonCode.MISSING_SLICE, "1 slice is missing from a stack of 4"),
    ),
    Case(f"{FAILING}/sliceorientation/001", refused=(ReasonCode.MIXED_ORIENTATION, "2 orientations")),
    Case(f"{EDGE}/generic/rgb/001", refused=(ReasonCode.UNSUPPORTED_PIXELS, "in colour (RGB, 3 samples")),
    Case(
        "dicom_ge_localizer/GE_3plane",
        refused=(ReasonCode.MIXED_ORIENTATION, "3 orientations that differ by up to 90.0"),
    ),
    Case("dicom_small_cases/693_J2KR.dcm", refused=(ReasonCode.NOT_A_VOLUME, "1 image;")),
    # Two frames of a perfusion map.
    Case("dicom_small_cases/eCT_Supplemental.dcm", refused=(ReasonCode.NOT_A_VOLUME, "2 images")),
    # Enhanced MR whose functional groups were cut out: ten frames without a place.
    Case("dicom_small_cases/emri_small.dcm", refused=(ReasonCode.NOT_A_VOLUME, "does not state its place")),
    Case(
        "dicom_small_cases/emri_small_RLE.dcm", refused=(ReasonCode.NOT_A_VOLUME, "does not state its place")
    ),
)

CASES = (*VOLUMES, *REFUSED)

ORIENTATIONS = ("ARS", "ASL", "IAL", "LAS", "LPS", "PIR", "RAS", "SRP")
NIFTI = (
    *(
        f"nifti_orientations/{code}.nii.gz"
        for code in ["ARS", "ASL", "IAL", "LAS", "LPS", "PIR", "RAS", "SRP"]
    ),
    "ct_abdomen/example_ct_sm.nii.gz",
)
"""Volumes that are NIfTI files themselves."""


def names(cases: Sequence[Case]) -> list[str]:
    """For the identifiers of parametrized tests."""
    return [case.name for case in cases]


def files(path: Path) -> list[Path]:
    """The DICOM files of a case; the test skips where the data has none."""
    if not path.exists():
        pytest.skip(f"no {path.name} among the test data")
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [p for p in found if p.suffix not in (".txt", ".gz")]


def from_nifti(path: Path) -> Volume:
    """A NIfTI image as a volume, by nothing but nibabel: (x, y, z[, 1]) to (1, z, y, x), RAS to LPS."""
    image = nibabel.load(path)
    array = np.asarray(image.dataobj)
    array = array[..., 0] if array.ndim == 4 else array
    return Volume(array.T[None].astype(np.float32), np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine)


def truth_of(data: Path, case: Case) -> Volume:
    """The truth of a case where there is one, and else what the reader makes of it."""
    path = data / case.truth_name
    if path.exists():
        return from_nifti(path)
    return read_series(files(data / case.name), policy=ACCEPTING).volume


def labels_in(nifti: Path | bytes) -> Labelmap:
    """A labelmap, read by nibabel alone."""
    if isinstance(nifti, bytes):
        image = nibabel.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(nifti)))
    else:
        image = nibabel.load(nifti)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    return Labelmap(np.asarray(image.dataobj, np.uint8).T, affine)


def thresholds_of(array: NDArray[np.float32]) -> tuple[float, float]:
    """Two thresholds that lie between values of an image, so that rounding decides no label."""
    values = np.unique(array)
    low, high = (int(np.searchsorted(values, np.quantile(array, q))) for q in (0.8, 0.97))
    low = min(max(low, 1), len(values) - 2)
    high = min(max(high, low + 1), len(values) - 1)
    return tuple(float((values[i - 1] + values[i]) / 2) for i in (low, high))  # type: ignore[return-value]
