"""Series of any vendor to one volume: order, places, values, and what is passed over."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantom import (
    all_orientations,
    chiral_image,
    oblique_affine,
    write_classic_series,
    write_enhanced_series,
)
from pydicom import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from series_builders import AXIAL, refusal, report, rewrite

from models.errors import ReasonCode
from models.volume import Affine, Volume, axis_codes
from service.dicom.series import GeometryPolicy, read_series


def assert_same_places(volume: Volume, image: np.ndarray, affine: Affine) -> None:
    """Every voxel of ``image`` lies, by ``affine``, where the volume has the same value."""
    index = np.indices(image.shape).reshape(3, -1)[::-1]  # x, y, z
    places_mm = affine @ np.vstack([index, np.ones(index.shape[1])])
    back = (np.linalg.inv(volume.affine) @ places_mm)[:3]
    rounded = np.rint(back).astype(int)
    assert np.abs(back - rounded).max() < 1e-3
    x, y, z = rounded
    np.testing.assert_array_equal(volume.array[0, z, y, x], image[tuple(index[::-1])])


# --- places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", all_orientations(), ids=axis_codes)
def test_every_orientation_keeps_its_places(tmp_path: Path, affine: Affine) -> None:
    image = chiral_image()
    paths = write_classic_series(tmp_path, image, affine)
    random.Random(1).shuffle(paths)
    source = read_series(paths)
    assert_same_places(source.volume, image, affine)
    normal = np.cross(source.volume.affine[:3, 0], source.volume.affine[:3, 1])
    assert normal @ source.volume.affine[:3, 2] > 0  # z grows along row x column


@pytest.mark.parametrize("mirror", [1.0, -1.0])
@pytest.mark.parametrize("write", [write_classic_series, write_enhanced_series])
def test_oblique_series_keep_their_places(tmp_path: Path, write: Any, mirror: float) -> None:
    affine = oblique_affine()
    affine[:3, 2] *= mirror
    image = chiral_image()
    source = read_series(write(tmp_path, image, affine))
    assert_same_places(source.volume, image, affine)
    assert source.volume.array.dtype == np.float32
    assert source.volume.frame_of_reference_uid == source.frame_of_reference_uid == "2.25.103"


def test_numbers_names_locations_and_thickness_have_no_part_in_the_geometry(tmp_path: Path) -> None:
    def mislead(dataset: Dataset, z: int) -> None:
        dataset.InstanceNumber = 100 - z
        dataset.SliceLocation = str(-z)
        dataset.SliceThickness = "7"
        dataset.SpacingBetweenSlices = "9"

    image = chiral_image()
    paths = write_classic_series(tmp_path, image, AXIAL, edit=mislead)
    source = read_series(paths[::-1])
    np.testing.assert_array_equal(source.volume.array[0], image)
    np.testing.assert_allclose(source.volume.affine, AXIAL, atol=1e-9)
    assert source.slice_spacing_mm == pytest.approx(3.0)
    assert source.slice_thickness_mm == 7.0
    assert [h.InstanceNumber for h in source.headers] == [100 - z for z in range(7)]


def test_headers_and_frames_follow_the_slices(tmp_path: Path) -> None:
    image = chiral_image()
    classic = read_series(write_classic_series(tmp_path / "c", image, AXIAL)[::-1])
    assert classic.frame_numbers == tuple((z, 1) for z in range(7))
    assert classic.sop_instance_uids == tuple(h.SOPInstanceUID for h in classic.headers)
    assert all("PixelData" not in header for header in classic.headers)
    order = [3, 0, 6, 1, 5, 2, 4]
    enhanced = read_series(write_enhanced_series(tmp_path / "e", image, AXIAL, frame_order=order))
    assert enhanced.frame_numbers == tuple((0, order.index(z) + 1) for z in range(7))
    assert len(enhanced.headers) == len(enhanced.sop_instance_uids) == 1
    np.testing.assert_array_equal(enhanced.volume.array[0], image)


def test_small_irregularities_are_within_tolerance(tmp_path: Path) -> None:
    def jitter(dataset: Dataset, z: int) -> None:
        x, y, _ = map(float, dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [f"{x + 0.02 * (-1) ** z:.3f}", str(y), f"{round(0.625 * z, 1)}"]
        dataset.ImageOrientationPatient = ["1", f"{1e-4 * z:.6f}", "0", "0", "1", "0"]

    affine = np.diag([1.0, 1.0, 0.625, 1.0])
    paths = write_classic_series(tmp_path, chiral_image((9, 4, 5)), affine, edit=jitter)
    assert read_series(paths).slice_spacing_mm == pytest.approx(0.625, abs=0.02)


# --- values -------------------------------------------------------------------------------------------


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    def rescale(dataset: Dataset, z: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{0.5 + z}", f"{-10 * z}"

    image = chiral_image()
    source = read_series(write_classic_series(tmp_path, image, AXIAL, modality="PT", edit=rescale))
    z = np.arange(7)[:, None, None]
    np.testing.assert_array_equal(source.volume.array[0], (image * (0.5 + z) - 10 * z).astype(np.float32))


def test_every_frame_has_its_own_slope(tmp_path: Path) -> None:
    pairs = [(0.25 + z, 3.0 - z) for z in range(7)]
    image = chiral_image()
    paths = write_enhanced_series(
        tmp_path, image, AXIAL, frame_order=[6, 5, 4, 3, 2, 1, 0], slope_intercept=pairs
    )
    slope, intercept = (np.array(v)[:, None, None] for v in zip(*pairs, strict=True))
    np.testing.assert_array_equal(
        read_series(paths).volume.array[0], (image * slope + intercept).astype(np.float32)
    )


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless]
)
def test_enhanced_objects_in_several_transfer_syntaxes(tmp_path: Path, syntax: str, per_frame: bool) -> None:
    image = chiral_image()
    paths = write_enhanced_series(
        tmp_path,
        image,
        oblique_affine(),
        transfer_syntax=syntax,
        orientation_per_frame=per_frame,
        modality="CT",
    )
    source = read_series(paths)
    assert_same_places(source.volume, image, oblique_affine())
    assert source.modality == "CT"


def test_what_a_frame_says_itself_goes_before_what_all_share(tmp_path: Path) -> None:
    def contradict(dataset: Dataset) -> None:
        wrong = Dataset()
        wrong.ImageOrientationPatient = ["0", "1", "0", "1", "0", "0"]
        dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence = [wrong]

    image = chiral_image()
    paths = write_enhanced_series(tmp_path, image, AXIAL, orientation_per_frame=True, edit=contradict)
    assert_same_places(read_series(paths).volume, image, AXIAL)


def test_a_series_may_hold_several_enhanced_objects(tmp_path: Path) -> None:
    image = chiral_image((8, 5, 6))
    lower = write_enhanced_series(tmp_path / "a", image, AXIAL, frame_order=[0, 2, 4, 6])
    upper = write_enhanced_series(
        tmp_path / "b", image, AXIAL, frame_order=[1, 3, 5, 7], SOPInstanceUID="2.25.77"
    )
    source = read_series(upper + lower)
    np.testing.assert_array_equal(source.volume.array[0], image)
    assert source.frame_numbers[:3] == ((0, 1), (1, 1), (0, 2))


def test_bits_outside_bits_stored_are_cleared_and_told(tmp_path: Path) -> None:
    image = (chiral_image() + 300).astype(np.uint16)
    paths = write_classic_series(tmp_path, image | 0xA000, AXIAL, bits_stored=12)
    source = read_series(paths)
    np.testing.assert_array_equal(source.volume.array[0], image)
    assert source.warnings == ("Bits outside Bits Stored were cleared in 7 of 7 slices.",)


# --- what is passed over ------------------------------------------------------------------------------


def screenshot(folder: Path) -> Path:
    path = write_classic_series(folder, np.zeros((1, 30, 40), np.uint8), AXIAL, SOPInstanceUID="2.25.901")[0]

    def strip(dataset: Dataset) -> None:
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "RGB", 3
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient

    rewrite(path, strip)
    return path


def older_segmentation(folder: Path) -> Path:
    path = write_classic_series(folder, np.zeros((1, 11, 13), np.uint8), AXIAL, SOPInstanceUID="2.25.902")[0]
    rewrite(path, lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.66.4"))
    return path


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("other", [report, screenshot, older_segmentation])
def test_an_object_that_is_no_slice_shifts_none(tmp_path: Path, other: Any, place: int) -> None:
    image = chiral_image()
    paths = write_classic_series(tmp_path / "series", image, AXIAL)
    paths.insert(place, other(tmp_path / "other"))
    source = read_series(paths)
    np.testing.assert_array_equal(source.volume.array[0], image)
    assert source.warnings == ("Left out: 1 of 8 objects, which hold no plane.",)
    assert len(source.headers) == 7
    strict = replace(GeometryPolicy(), non_image="refuse")
    assert refusal(paths, strict).reason is ReasonCode.NOT_A_VOLUME


def test_a_localizer_inside_the_series_is_left_out(tmp_path: Path) -> None:
    image = chiral_image()
    paths = write_classic_series(tmp_path / "series", image, AXIAL)
    scout = write_classic_series(
        tmp_path / "scout",
        image[:1],
        all_orientations()[20],
        SOPInstanceUID="2.25.903",
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    source = read_series(scout + paths)
    np.testing.assert_array_equal(source.volume.array[0], image)
    assert source.warnings == ("Left out: 1 of 8 images, which are localizers.",)


def test_a_repeated_file_is_one_image(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path, chiral_image(), AXIAL)
    copy = tmp_path / "copy.dcm"
    copy.write_bytes(paths[2].read_bytes())
    source = read_series([*paths, copy])
    assert len(source.headers) == 7
    assert source.warnings == ("Left out: 1 files that repeat another image.",)
    rewrite(copy, lambda d: setattr(d, "PixelData", bytes(len(d.PixelData))))
    assert refusal([*paths, copy]).reason is ReasonCode.IDENTITY_CONFLICT
