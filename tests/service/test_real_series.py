"""Series from real scanners: the volume that is expected of each, or the reason for refusing it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from phantom import phantom_manifest
from programs import program

from models.errors import ReasonCode, Refusal
from models.volume import Labelmap, Volume, axis_codes, reorient
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import build_segmentation, write_segmentation
from service.dicom.series import GeometryPolicy, SourceSeries, read_series

EDGE = "dicom_edge_cases"
FAILING = f"{EDGE}/failing"

VOLUMES = {  # folder (or file) -> (slices, rows, columns)
    f"{EDGE}/ge/anatomical/001": (4, 256, 256),
    f"{EDGE}/ge/anatomical/001_implicit": (4, 256, 256),
    f"{EDGE}/generic/anatomical/001": (4, 256, 256),
    f"{EDGE}/generic/anatomical/001_implicit": (4, 256, 256),
    # Derived MPR images with a slope of their own for each slice, and pixels of 4.0 x 6.4 mm.
    f"{EDGE}/generic/anatomical/002_non_isotropic": (4, 28, 64),
    f"{EDGE}/generic/compressed/001": (4, 256, 256),
    f"{EDGE}/generic/compressed_j2k/001": (4, 256, 256),
    f"{EDGE}/generic/compressed_jpeg/001": (4, 256, 256),
    f"{EDGE}/generic/compressed_jpegls/001": (4, 256, 256),
    f"{EDGE}/generic/compressed_rle/001": (4, 256, 256),
    f"{EDGE}/philips_enhanced/anatomical/001": (8, 256, 256),
    f"{EDGE}/philips_enhanced/anatomical/001_implicit": (8, 256, 256),
    f"{EDGE}/siemens_multiframe/anatomical/001": (8, 256, 256),
    "dicom_philips_t1": (170, 256, 256),
    "dicom_siemens_enhanced_t1/5_anat-T1w_acq-tfl": (96, 128, 128),
    # No Manufacturer and an empty Series Number, which say nothing about the geometry.
    "hippocampus_dicom/Study1_13_HCropVolume": (32, 51, 35),
    "hippocampus_dicom/Study3_11_HCropVolume": (40, 50, 34),
}

REFUSED = {
    f"{FAILING}/gantrytilting/001": (ReasonCode.GANTRY_TILT, "14.0 degrees"),
    # One image of every acquisition of a contrast timing series: four times the same plane.
    f"{FAILING}/notavolume/001": (ReasonCode.NOT_A_VOLUME, "All 4 images lie at one position"),
    # Two slices are regular by themselves, but a third one that is missing could not be noticed.
    f"{FAILING}/slicecount/001": (ReasonCode.NOT_A_VOLUME, "2 images"),
    f"{EDGE}/ge/anatomical/001_single_slice": (ReasonCode.NOT_A_VOLUME, "1 image;"),
    # Gaps of 5, 5 and 10 mm: the likelier story is a slice that got lost, and sending again can mend that.
    f"{FAILING}/sliceincrement/001": (ReasonCode.MISSING_SLICE, "at 33.11 mm"),
    # Tilted and incomplete. The tilt comes first: it would remain if the missing slice arrived.
    f"{FAILING}/sliceincrement/002": (ReasonCode.GANTRY_TILT, "Besides, slices are missing at 1 places"),
    f"{FAILING}/sliceorientation/001": (ReasonCode.MIXED_ORIENTATION, "2 orientations"),
    f"{EDGE}/generic/rgb/001": (ReasonCode.UNSUPPORTED_PIXELS, "in colour (RGB, 3 samples"),
    "dicom_ge_localizer/GE_3plane": (
        ReasonCode.MIXED_ORIENTATION,
        "3 orientations that differ by up to 90.0",
    ),
    # Anonymised until no study, series, instance or patient can be told: no result could be filed.
    "ct_abdomen/example_ct_dicom": (ReasonCode.IDENTITY_MISSING, "StudyInstanceUID and no usable PatientID"),
    "dicom_small_cases/693_J2KR.dcm": (ReasonCode.NOT_A_VOLUME, "1 image;"),
    # Two frames of a perfusion map.
    "dicom_small_cases/eCT_Supplemental.dcm": (ReasonCode.NOT_A_VOLUME, "2 images"),
    # Enhanced MR whose functional groups were cut out: ten frames without a place.
    "dicom_small_cases/emri_small.dcm": (ReasonCode.NOT_A_VOLUME, "does not state its place"),
    "dicom_small_cases/emri_small_RLE.dcm": (ReasonCode.NOT_A_VOLUME, "does not state its place"),
}


def files(path: Path) -> list[Path]:
    if not path.exists():
        pytest.skip(f"no {path.name} among the test data")
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [p for p in found if p.suffix not in (".txt", ".gz")]


def read(path: Path) -> SourceSeries:
    return read_series(files(path))


def from_nifti(path: Path) -> Volume:
    """A NIfTI image as a volume, by nothing but nibabel: (x, y, z[, 1]) to (1, z, y, x), RAS to LPS."""
    image = nibabel.load(path)
    array = np.asarray(image.dataobj)
    array = array[..., 0] if array.ndim == 4 else array
    return Volume(array.T[None].astype(np.float32), np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine)


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes_have_their_shape_and_their_values(shared_data: Path, name: str) -> None:
    source = read(shared_data / name)
    assert source.volume.shape_zyx == VOLUMES[name]
    assert source.warnings == ()
    truth = shared_data / f"{name}_ground_truth.nii.gz"
    if not truth.exists():
        return
    expected, _ = reorient(from_nifti(truth), axis_codes(source.volume.affine))
    np.testing.assert_allclose(source.volume.affine, expected.affine, atol=0.01)
    scale = np.abs(expected.array).max()
    np.testing.assert_allclose(source.volume.array, expected.array, atol=1e-6 * scale)


@pytest.mark.parametrize(
    "name", ["dicom_philips_t1", "hippocampus_dicom/Study1_13_HCropVolume", f"{EDGE}/ge/anatomical/001"]
)
def test_single_frame_series_agree_with_itk(shared_data: Path, name: str) -> None:
    source = read(shared_data / name)
    itk = SimpleITK.ImageSeriesReader()
    itk.SetFileNames(itk.GetGDCMSeriesFileNames(str(shared_data / name)))
    image = itk.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(source.volume.affine, affine, atol=0.01)
    itk_array = SimpleITK.GetArrayFromImage(image)
    np.testing.assert_allclose(source.volume.array[0], itk_array, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_is_refused(shared_data: Path, name: str) -> None:
    reason, figures = REFUSED[name]
    with pytest.raises(Refusal) as caught:
        read(shared_data / name)
    assert caught.value.reason is reason
    assert figures in caught.value.message


def test_anonymised_ct_is_read_where_no_object_is_made_of_it(shared_data: Path) -> None:
    folder = shared_data / "ct_abdomen"
    policy = replace(GeometryPolicy(), missing_identity="accept")
    source = read_series(files(folder / "example_ct_dicom"), policy=policy)
    labels, _ = reorient(from_nifti(folder / "example_seg_dicom.nii.gz"), axis_codes(source.volume.affine))
    np.testing.assert_allclose(source.volume.affine, labels.affine, atol=0.01)
    assert source.volume.shape_zyx == labels.shape_zyx == (20, 512, 512)
    assert -1100 < source.volume.array.min() < 0 < source.volume.array.max() < 4000  # Hounsfield units
    labelmap = Labelmap(labels.array[0].astype(np.uint16), source.volume.affine)
    with pytest.raises(Refusal) as caught:
        build_segmentation(source, labelmap, phantom_manifest(), **UIDS)
    assert caught.value.reason is ReasonCode.IDENTITY_MISSING


UIDS = {
    "model_digest": "0123456789abcdef" * 4,
    "sop_instance_uid": "2.25.7001",
    "series_instance_uid": "2.25.7002",
    "content_datetime": datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_segmentations_of_real_series_are_proven_and_valid(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    source = read(shared_data / name)
    array = source.volume.array[0]
    labels = np.digitize(array, np.quantile(array, [0.8, 0.95, 0.99])).astype(np.uint8)
    labels[:, :, : labels.shape[2] // 3] = 0
    labelmap = Labelmap(labels, source.volume.affine, source.frame_of_reference_uid)
    if name.startswith(EDGE):  # anonymised down to the Frame of Reference UID: nothing could be overlaid
        with pytest.raises(Refusal, match="no Frame of Reference UID"):
            build_segmentation(source, labelmap, phantom_manifest(), **UIDS)
        source = replace(source, frame_of_reference_uid="2.25.7003")
    path = write_segmentation(
        build_segmentation(source, labelmap, phantom_manifest(), **UIDS), tmp_path / "seg.dcm"
    )
    prove_segmentation(path, source, labelmap, phantom_manifest())
    dciodvfy = program("dciodvfy", "dicom3tools")
    said = subprocess.run([dciodvfy, path], capture_output=True, text=True, check=False).stderr
    assert said.startswith("Segmentation") or "\nSegmentation" in said
    assert [line for line in said.splitlines() if line.startswith("Error")] == []
