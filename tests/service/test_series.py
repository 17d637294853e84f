"""Series of any vendor to one volume: order, places, values, and every reason to refuse."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import suppress
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
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from models.errors import ReasonCode, Refusal
from models.volume import Affine, Volume, axis_codes
from service.dicom.series import GeometryPolicy, SourceSeries, read_series

AXIAL = np.diag([1.5, 1.5, 3.0, 1.0])
TURNED = ["0.999962", "0.008727", "0", "-0.008727", "0.999962", "0"]  # by half a degree


def assert_same_places(volume: Volume, image: np.ndarray, affine: Affine) -> None:
    """Every voxel of ``image`` lies, by ``affine``, where the volume has the same value."""
    index = np.indices(image.shape).reshape(3, -1)[::-1]  # x, y, z
    places_mm = affine @ np.vstack([index, np.ones(index.shape[1])])
    back = (np.linalg.inv(volume.affine) @ places_mm)[:3]
    rounded = np.rint(back).astype(int)
    assert np.abs(back - rounded).max() < 1e-3
    x, y, z = rounded
    np.testing.assert_array_equal(volume.array[0, z, y, x], image[tuple(index[::-1])])


def refusal(paths: list[Path], policy: GeometryPolicy | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_series(paths, policy=policy)
    return caught.value


def rewrite(path: Path, change: Callable[[Dataset], Any]) -> None:
    with warnings.catch_warnings():  # values that break their VR are the point
        warnings.simplefilter("ignore")
        dataset = dcmread(path)
        change(dataset)
        dataset.save_as(path)


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


def report(folder: Path, uid: str = "2.25.900") -> Path:
    path = write_classic_series(folder, np.zeros((1, 2, 2), np.uint8), AXIAL, SOPInstanceUID=uid)[0]

    def strip(dataset: Dataset) -> None:
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        for keyword in ("PixelData", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient"):
            delattr(dataset, keyword)

    rewrite(path, strip)
    return path


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


# --- refusals, with their figures ---------------------------------------------------------------------


def at(z: float) -> Callable[[Dataset], None]:
    return lambda d: setattr(d, "ImagePositionPatient", ["0", "0", str(z)])


def tilted(degrees: float) -> Affine:
    affine = AXIAL.copy()
    affine[1, 2] = 3.0 * np.tan(np.radians(degrees))
    return affine


def series(folder: Path, affine: Affine = AXIAL, **options: Any) -> list[Path]:
    return write_classic_series(folder, chiral_image(), affine, **options)


def with_change(folder: Path, which: list[int], change: Callable[[Dataset], None]) -> list[Path]:
    paths = series(folder)
    for i in which:
        rewrite(paths[i], change)
    return paths


REFUSED: dict[str, tuple[Callable[[Path], list[Path]], ReasonCode, str]] = {
    "gantry tilt": (
        lambda f: series(f, tilted(18.5)),
        ReasonCode.GANTRY_TILT,
        "7 slices is sheared: gantry tilt 18.5 degrees",
    ),
    "slight tilt": (lambda f: series(f, tilted(0.4)), ReasonCode.GANTRY_TILT, "0.4 degrees"),
    "tilt and a gap": (
        lambda f: [p for i, p in enumerate(series(f, tilted(12))) if i != 3],
        ReasonCode.GANTRY_TILT,
        "12.0 degrees. Besides, slices are missing at 1 places",
    ),
    "one missing": (
        lambda f: [p for i, p in enumerate(series(f)) if i != 3],
        ReasonCode.MISSING_SLICE,
        "1 slice is missing from a stack of 6 with 3.000 mm spacing, at 9.00 mm",
    ),
    "two missing": (
        lambda f: [p for i, p in enumerate(series(f)) if i not in (2, 3)],
        ReasonCode.MISSING_SLICE,
        "2 slices are missing from a stack of 5 with 3.000 mm spacing, at 6.00, 9.00 mm",
    ),
    "varying": (
        lambda f: with_change(f, [6], at(19.5)),
        ReasonCode.VARYING_SPACING,
        "varies from 3.000 to 4.500 mm",
    ),
    "varying a little": (
        lambda f: with_change(f, [6], at(18.25)),
        ReasonCode.VARYING_SPACING,
        "varies from 3.000 to 3.250 mm",
    ),
    "varying by a fraction of thin slices": (
        lambda f: series(f, np.diag([1.0, 1.0, 0.4, 1.0]), edit=_thin_but_uneven),
        ReasonCode.VARYING_SPACING,
        "varies from 0.320 to 0.480 mm",
    ),
    "mostly wide": (  # gaps 3, 6, 6: whole multiples, yet no stack with something missing
        lambda f: with_change(f, [2], at(9))[:3] + with_change(f / "b", [3], at(15))[3:4],
        ReasonCode.VARYING_SPACING,
        "varies from 3.000 to 6.000 mm",
    ),
    "duplicates": (
        lambda f: with_change(f, [4], at(9)),
        ReasonCode.DUPLICATE_POSITIONS,
        "1 of 6 positions hold more than one image (9.00 mm)",
    ),
    "phases": (
        lambda f: series(f)
        + series(f / "b", series_instance_uid="2.25.102", edit=_as_second_echo),
        ReasonCode.MULTI_VOLUME,
        "2 images at each of 7 positions, told apart by EchoTime (3, 90)",
    ),
    "cine": (
        lambda f: with_change(f, list(range(7)), at(5)),
        ReasonCode.NOT_A_VOLUME,
        "All 7 images lie at one position (5.00 mm)",
    ),
    "mixed orientation": (
        lambda f: with_change(
            f, [2], lambda d: setattr(d, "ImageOrientationPatient", ["1", "0", "0", "0", "0", "-1"])
        ),
        ReasonCode.MIXED_ORIENTATION,
        "2 orientations that differ by up to 90.0 degrees",
    ),
    "turned by half a degree": (
        lambda f: with_change(
            f, [2], lambda d: setattr(d, "ImageOrientationPatient", TURNED)
        ),
        ReasonCode.MIXED_ORIENTATION,
        "0.5 degrees",
    ),
    "two slices": (lambda f: series(f)[:2], ReasonCode.NOT_A_VOLUME, "2 images; a volume needs at least 3"),
    "one slice": (lambda f: series(f)[:1], ReasonCode.NOT_A_VOLUME, "1 image; a volume"),
    "nothing": (lambda f: [], ReasonCode.NOT_A_VOLUME, "no file"),
    "reports only": (lambda f: [report(f)], ReasonCode.NOT_A_VOLUME, "1 of 1 objects"),
    "mosaic": (
        lambda f: series(f, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]),
        ReasonCode.NOT_A_VOLUME,
        "7 of 7 images are mosaics",
    ),
    "no position": (
        lambda f: with_change(f, [1], lambda d: d.pop("ImagePositionPatient")),
        ReasonCode.NOT_A_VOLUME,
        "Image 2 (Instance Number 2) does not state its place",
    ),
    "position of words": (
        lambda f: with_change(f, [1], lambda d: _raw(d, "ImagePositionPatient", b"a\\b\\c ")),
        ReasonCode.INVALID_GEOMETRY,
        "Image 2 (Instance Number 2) has no usable ImagePositionPatient",
    ),
    "position of two": (
        lambda f: with_change(f, [1], lambda d: _raw(d, "ImagePositionPatient", b"1\\2 ")),
        ReasonCode.INVALID_GEOMETRY,
        "3 finite numbers",
    ),
    "infinite position": (
        lambda f: with_change(f, [1], lambda d: _raw(d, "ImagePositionPatient", b"1\\2\\inf ")),
        ReasonCode.INVALID_GEOMETRY,
        "3 finite numbers",
    ),
    "zero cosines": (
        lambda f: series(f, ImageOrientationPatient=["0"] * 6),
        ReasonCode.INVALID_GEOMETRY,
        "right angle",
    ),
    "zero spacing": (lambda f: series(f, PixelSpacing=["0", "1"]), ReasonCode.INVALID_GEOMETRY, "0 mm"),
    "two matrices": (
        lambda f: series(f)[:3] + write_classic_series(f / "b", chiral_image((7, 9, 13)), AXIAL)[3:],
        ReasonCode.NOT_A_VOLUME,
        "2 different matrix sizes (9 x 13, 11 x 13)",
    ),
    "two pixel spacings": (
        lambda f: with_change(f, [1], lambda d: setattr(d, "PixelSpacing", ["1.6", "1.5"])),
        ReasonCode.NOT_A_VOLUME,
        "from 1.5000 to 1.6000 mm",
    ),
    "slices shifted sideways": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "ImagePositionPatient", ["2", "0", "9"])),
        ReasonCode.INVALID_GEOMETRY,
        "sideways by up to 2.00 mm",
    ),
    "two frames of reference": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "FrameOfReferenceUID", "2.25.8")),
        ReasonCode.NOT_A_VOLUME,
        "2 frames of reference",
    ),
    "colour": (
        lambda f: series(f, PhotometricInterpretation="RGB", SamplesPerPixel=3),
        ReasonCode.UNSUPPORTED_PIXELS,
        "RGB, 3 samples",
    ),
    "palette": (
        lambda f: series(f, PhotometricInterpretation="PALETTE COLOR"),
        ReasonCode.UNSUPPORTED_PIXELS,
        "PALETTE COLOR",
    ),
    "one bit": (lambda f: series(f, BitsAllocated=1), ReasonCode.UNSUPPORTED_PIXELS, "16 of 1 bits"),
    "table of values": (
        lambda f: series(f, ModalityLUTSequence=[Dataset()]),
        ReasonCode.UNSUPPORTED_PIXELS,
        "Modality LUT",
    ),
    "slope of words": (
        lambda f: with_change(f, [5], lambda d: _raw(d, "RescaleSlope", b"one ")),
        ReasonCode.INVALID_VALUES,
        "RescaleSlope",
    ),
    "slope not a number": (
        lambda f: with_change(f, [5], lambda d: _raw(d, "RescaleSlope", b"nan ")),
        ReasonCode.INVALID_VALUES,
        "RescaleSlope",
    ),
    "overflow": (
        lambda f: with_change(f, [5], lambda d: _raw(d, "RescaleSlope", b"1e300 ")),
        ReasonCode.INVALID_VALUES,
        "not finite",
    ),
    "constant": (
        lambda f: write_classic_series(f, np.full((4, 5, 6), 7, np.int16), AXIAL),
        ReasonCode.INVALID_VALUES,
        "same value (7)",
    ),
    "two series": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "SeriesInstanceUID", "2.25.7")),
        ReasonCode.AMBIGUOUS_SERIES,
        "2 series",
    ),
    "no patient": (
        lambda f: series(f, PatientID=""),
        ReasonCode.IDENTITY_MISSING,
        "no usable PatientID",
    ),
    "no study": (
        lambda f: series(f, study_instance_uid=""),
        ReasonCode.IDENTITY_MISSING,
        "no usable StudyInstanceUID",
    ),
    "no instance": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "SOPInstanceUID", "")),
        ReasonCode.IDENTITY_MISSING,
        "no SOP Instance UID",
    ),
    "two patients": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "PatientID", "SECRET-2")),
        ReasonCode.IDENTITY_CONFLICT,
        "7 images hold 2 different values of PatientID",
    ),
    "two names": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "PatientName", "SECRET^Other")),
        ReasonCode.IDENTITY_CONFLICT,
        "PatientName",
    ),
    "two studies": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "StudyInstanceUID", "2.25.6")),
        ReasonCode.IDENTITY_CONFLICT,
        "StudyInstanceUID",
    ),
    "several frames, one position": (
        lambda f: write_enhanced_series(f, chiral_image(), AXIAL, frame_order=[0, 1, 2, 0, 1, 2]),
        ReasonCode.MULTI_VOLUME,
        "2 images at each of 3 positions",
    ),
    "frames not described": (
        lambda f: write_enhanced_series(f, chiral_image(), AXIAL, NumberOfFrames=9),
        ReasonCode.INVALID_GEOMETRY,
        "claims 9 frames but describes 7",
    ),
    "frames without places": (
        lambda f: write_classic_series(f, chiral_image(), AXIAL, NumberOfFrames=5)[:1],
        ReasonCode.NOT_A_VOLUME,
        "5 frames without a position",
    ),
    "frame without position": (
        lambda f: write_enhanced_series(
            f, chiral_image(), AXIAL, edit=_without_third_position
        ),
        ReasonCode.INVALID_GEOMETRY,
        "Frame 3 of image 1",
    ),
}  # fmt: skip


def _as_second_echo(dataset: Dataset, z: int) -> None:
    dataset.SOPInstanceUID = f"2.25.5{z}"
    dataset.EchoTime = "90"


def _thin_but_uneven(dataset: Dataset, z: int) -> None:
    dataset.ImagePositionPatient = ["0", "0", f"{0.4 * z + 0.08 * (z == 3):.2f}"]


def _without_third_position(dataset: Dataset) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def _raw(dataset: Dataset, keyword: str, value: bytes) -> None:
    """Plant bytes that break the VR."""
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag = Tag(keyword)
    dataset[tag] = RawDataElement(tag, "DS", len(value), value, 0, False, True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_is_refused_with_a_reason_and_figures(tmp_path: Path, name: str) -> None:
    make, reason, figures = REFUSED[name]
    error = refusal(make(tmp_path))
    assert error.reason is reason, error
    assert figures in error.message
    assert error.remedy
    for private in ("SECRET", "PHANTOM-1", "Phantom^Test", "19700101"):
        assert private not in str(error) + repr(error)


# --- damaged and hostile files ------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 100, 200, 700, 0.5, 0.9, -1])
def test_a_truncated_file_is_unreadable(tmp_path: Path, keep: float) -> None:
    paths = write_classic_series(tmp_path, chiral_image((3, 40, 50)), AXIAL)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: int(keep * len(whole))] if isinstance(keep, float) else whole[:keep])
    error = refusal(paths)
    assert error.reason is ReasonCode.UNREADABLE
    assert "mage 2" in error.message


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_a_truncated_compressed_file_is_unreadable(tmp_path: Path, syntax: str) -> None:
    paths = write_classic_series(tmp_path, chiral_image((3, 40, 50)), AXIAL, transfer_syntax=syntax)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2 + 400])
    assert refusal(paths).reason is ReasonCode.UNREADABLE


def test_a_claimed_size_is_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    paths = series(tmp_path, Rows=65535, Columns=65535)
    error = refusal(paths)
    assert error.reason is ReasonCode.TOO_LARGE
    assert "30064 of 1074 Mvoxels" in error.message
    frames = write_enhanced_series(tmp_path / "e", chiral_image(), AXIAL, NumberOfFrames=2_000_000_000)
    assert refusal(frames).reason is ReasonCode.TOO_LARGE


def test_a_codestream_larger_than_its_header_is_not_decoded(tmp_path: Path) -> None:
    paths = write_classic_series(
        tmp_path, chiral_image((3, 40, 50)), AXIAL, transfer_syntax=JPEG2000Lossless, Rows=20
    )
    error = refusal(paths)
    assert error.reason is ReasonCode.UNREADABLE
    assert "40 x 50" in error.message


def test_a_deflated_bomb_is_not_inflated(tmp_path: Path) -> None:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    image = np.zeros((3, 500, 500), np.int16)
    image[0, 0, 0] = 1
    paths = write_classic_series(tmp_path, image, AXIAL, transfer_syntax=DeflatedExplicitVRLittleEndian)
    assert read_series(paths).volume.shape_zyx == (3, 500, 500)
    error = refusal(paths, replace(GeometryPolicy(), limit_inflated_bytes=100_000))
    assert error.reason is ReasonCode.TOO_LARGE


def test_damage_anywhere_is_a_refusal_or_a_volume_and_never_a_crash(tmp_path: Path) -> None:
    generator = random.Random(7)
    for syntax in (ImplicitVRLittleEndian, "1.2.840.10008.1.2.1", RLELossless, JPEG2000Lossless):
        for make in (write_classic_series, write_enhanced_series):
            paths = make(
                tmp_path / f"{make.__name__}{syntax}",
                chiral_image((3, 20, 16)),
                AXIAL,
                transfer_syntax=syntax,
            )
            whole = paths[0].read_bytes()
            for _ in range(25):
                damaged = bytearray(whole)
                for _ in range(generator.randint(1, 8)):
                    damaged[generator.randrange(132, len(damaged))] = generator.randrange(256)
                paths[0].write_bytes(damaged)
                with suppress(Refusal):
                    assert isinstance(read_series(paths), SourceSeries)


# --- identity -----------------------------------------------------------------------------------------


def test_values_that_break_their_vr_never_stop_the_reading(tmp_path: Path) -> None:
    def break_all(dataset: Dataset, z: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.PatientID = "P" * 80
            dataset.PatientName = "N" * 90
            dataset.PatientBirthDate = "unknown"
            dataset.StudyTime = "25:61"
            dataset.AccessionNumber = "A" * 30

    paths = series(tmp_path, edit=break_all)
    source = read_series(paths)
    assert source.patient_id == "P" * 80  # a shortened identifier is another patient's
    assert source.identity.elements["PatientBirthDate"] == ""
    assert source.identity.elements["StudyTime"] == ""
    assert source.identity.elements["AccessionNumber"] == "A" * 30


@pytest.mark.parametrize(
    ("character_set", "stored", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen".encode("latin-1"), "Müller^Jürgen"),
        ("ISO_IR 192", "山田^太郎".encode(), "山田^太郎"),
        ("\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
        ("NO SUCH SET", b"Doe^John", "Doe^John"),
        ("ISO_IR 192", b"M\xfcller^J", "M\N{REPLACEMENT CHARACTER}ller^J"),
    ],
)
def test_names_in_any_character_set(tmp_path: Path, character_set: str, stored: bytes, name: str) -> None:
    with warnings.catch_warnings():  # the placeholder is no character set
        warnings.simplefilter("ignore")
        paths = series(tmp_path, SpecificCharacterSet="X" * len(character_set), PatientName="Y" * len(stored))
    for path in paths:
        data = path.read_bytes().replace(b"X" * len(character_set), character_set.encode())
        path.write_bytes(data.replace(b"Y" * len(stored), stored))
    assert read_series(paths).identity.elements["PatientName"] == name


def test_a_name_spelt_in_another_way_is_the_same_name(tmp_path: Path) -> None:
    paths = with_change(tmp_path, [3], lambda d: setattr(d, "PatientName", "PHANTOM^TEST^^ "))
    assert len(read_series(paths).headers) == 7


def test_anonymised_series_can_be_read_on_request(tmp_path: Path) -> None:
    paths = series(tmp_path, PatientID="", study_instance_uid="")
    source = read_series(paths, policy=replace(GeometryPolicy(), missing_identity="accept"))
    assert source.patient_id == source.study_instance_uid == ""


def test_the_repr_of_a_series_names_nobody(tmp_path: Path) -> None:
    source = read_series(series(tmp_path))
    assert source.patient_id == "PHANTOM-1"
    for private in ("PHANTOM-1", "Phantom^Test", "19700101"):
        assert private not in repr(source)


@pytest.mark.parametrize(
    ("syntax", "stated", "lossy"),
    [
        ("1.2.840.10008.1.2.1", None, False),
        ("1.2.840.10008.1.2.1", "01", True),
        ("1.2.840.10008.1.2.4.81", None, True),
        ("1.2.840.10008.1.2.4.91", None, True),
        ("1.2.840.10008.1.2.4.91", "00", False),
        ("1.2.840.10008.1.2.4.90", None, False),
    ],
)
def test_loss_is_told(tmp_path: Path, syntax: str, stated: str | None, lossy: bool) -> None:
    def state(dataset: Dataset, z: int) -> None:
        if "LossyImageCompression" in dataset:
            del dataset.LossyImageCompression
        if (stated is not None and z == 2) or stated == "00":
            dataset.LossyImageCompression = stated

    source = read_series(series(tmp_path, transfer_syntax=syntax, edit=state))
    assert source.lossy is lossy
    assert bool(source.lossy_ratio) is bool(source.lossy_method) is lossy
