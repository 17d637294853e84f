"""Series from real scanners: the volume that is expected of each, or the reason for refusing it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from phantom import phantom_manifest
from programs import program
from real_series import EDGE, NOBODYS, REFUSED, VOLUMES, Case, files, from_nifti, names

from models.errors import ReasonCode, Refusal
from models.volume import Labelmap, axis_codes, reorient
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import build_segmentation, write_segmentation
from service.dicom.series import GeometryPolicy, SourceSeries, read_series

ACCEPTING = GeometryPolicy(missing_identity="accept")


def read(path: Path, policy: GeometryPolicy = ACCEPTING) -> SourceSeries:
    return read_series(files(path), policy=policy)


@pytest.mark.parametrize("case", VOLUMES, ids=names(VOLUMES))
def test_volumes_have_their_shape_and_their_values(shared_data: Path, case: Case) -> None:
    source = read(shared_data / case.name)
    assert source.volume.shape_zyx == case.shape_zyx
    assert source.warnings == ()
    truth = shared_data / case.truth_name
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


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
def test_what_is_no_volume_is_refused(shared_data: Path, case: Case) -> None:
    with pytest.raises(Refusal) as caught:
        read(shared_data / case.name, GeometryPolicy())
    assert case.refused is not None
    assert caught.value.reason is case.refused[0]
    assert case.refused[1] in caught.value.message


def test_anonymised_ct_is_read_where_no_object_is_made_of_it(shared_data: Path) -> None:
    folder = shared_data / "ct_abdomen"
    with pytest.raises(Refusal) as refused:
        read(folder / "example_ct_dicom", GeometryPolicy())
    assert refused.value.reason is ReasonCode.IDENTITY_MISSING
    source = read(folder / "example_ct_dicom")
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


OF_SOMEBODY = [case for case in VOLUMES if case.no_object != NOBODYS]


@pytest.mark.parametrize("case", OF_SOMEBODY, ids=names(OF_SOMEBODY))
def test_segmentations_of_real_series_are_proven_and_valid(
    shared_data: Path, tmp_path: Path, case: Case
) -> None:
    source = read(shared_data / case.name)
    array = source.volume.array[0]
    labels = np.digitize(array, np.quantile(array, [0.8, 0.95, 0.99])).astype(np.uint8)
    labels[:, :, : labels.shape[2] // 3] = 0
    labelmap = Labelmap(labels, source.volume.affine, source.frame_of_reference_uid)
    if case.no_object is not None:  # anonymised down to the Frame of Reference UID: nothing could be overlaid
        with pytest.raises(Refusal, match=case.no_object[1]):
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
