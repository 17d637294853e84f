"""What the objects of other vendors do: each is read into the same volume, or refused; never into another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantom import chiral_image, oblique_affine, write_classic_series, write_enhanced_series
from phantom import test_uid as make_uid
from pydicom import Dataset, dcmread
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_sequence
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from models.errors import ReasonCode, Refusal
from service.dicom.series import SourceSeries, read_series
from service.reading import VolumeRule

AXIAL = np.diag([1.5, 1.5, 3.0, 1.0])
IMAGE = chiral_image()


def refusal(paths: list[Path]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_series(paths)
    assert caught.value.remedy
    return caught.value


def assert_is_the_phantom(source: SourceSeries, image: np.ndarray = IMAGE, affine: Any = AXIAL) -> None:
    np.testing.assert_array_equal(source.volume.array[0], image)
    np.testing.assert_allclose(source.volume.affine, affine, atol=1e-6)


# --- geometry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [None, "3", "-3", "7.5", "0"])
def test_spacing_between_slices_may_be_missing_negative_or_wrong(tmp_path: Path, spacing: str | None) -> None:
    paths = write_classic_series(tmp_path, IMAGE, AXIAL, SpacingBetweenSlices=spacing)
    assert_is_the_phantom(read_series(paths[::-1]))


def _gone(dataset: Dataset, z: int) -> None:
    del dataset.InstanceNumber


def _reversed(dataset: Dataset, z: int) -> None:
    dataset.InstanceNumber = 7 - z


def _all_one(dataset: Dataset, z: int) -> None:
    dataset.InstanceNumber = 1


def _empty(dataset: Dataset, z: int) -> None:
    dataset.InstanceNumber = None


@pytest.mark.parametrize("number", [_gone, _reversed, _all_one, _empty])
def test_instance_numbers_may_be_anything(tmp_path: Path, number: Callable[[Dataset, int], None]) -> None:
    assert_is_the_phantom(read_series(write_classic_series(tmp_path, IMAGE, AXIAL, edit=number)))


def test_directions_and_positions_may_be_rounded_slice_by_slice(tmp_path: Path) -> None:
    """As several vendors write oblique stacks: six decimals of a cosine, and tenths of a millimetre."""
    affine = oblique_affine()

    def rounded(dataset: Dataset, z: int) -> None:
        jitter = (0.0, 1e-6, -1e-6)[z % 3]
        dataset.ImageOrientationPatient = [
            f"{float(v) + jitter:.6f}" for v in dataset.ImageOrientationPatient
        ]
        dataset.ImagePositionPatient = [f"{float(v):.1f}" for v in dataset.ImagePositionPatient]

    paths = write_classic_series(tmp_path, IMAGE, affine, edit=rounded)
    source = read_series(paths)
    np.testing.assert_array_equal(source.volume.array[0], IMAGE)
    np.testing.assert_allclose(source.volume.affine, affine, atol=0.06)


def test_tenths_of_a_millimetre_shift_and_refuse_no_oblique_stack(tmp_path: Path) -> None:
    """First and last position are rounded like all others: the grid is that which fits all of them."""
    image = chiral_image((60, 3, 4))
    affine = oblique_affine((1.0, 1.0, 1.1))

    def rounded(dataset: Dataset, z: int) -> None:
        dataset.ImagePositionPatient = [f"{float(v):.1f}" for v in dataset.ImagePositionPatient]

    for case in range(4):
        affine[:3, 3] = 7.77 * case, -81.33 * case, 12.34
        source = read_series(write_classic_series(tmp_path / str(case), image, affine, edit=rounded))
        np.testing.assert_array_equal(source.volume.array[0], image)
        np.testing.assert_allclose(source.volume.affine[:3, 2], affine[:3, 2], atol=5e-4)
        np.testing.assert_allclose(source.volume.affine[:3, 3], affine[:3, 3], atol=0.02)


def test_rounded_positions_of_a_thin_stack_are_no_gantry_tilt(tmp_path: Path) -> None:
    def rounded(dataset: Dataset, z: int) -> None:
        dataset.ImagePositionPatient = ["0", ("0", "0", "0.1")[z], f"{0.5 * z}"]

    paths = write_classic_series(tmp_path, IMAGE[:3], np.diag([1, 1, 0.5, 1.0]), edit=rounded)
    assert read_series(paths).tilt_degrees == 0.0


def _one_more(folder: Path, **changes: Any) -> list[Path]:
    """An image more for the series of the phantom."""

    def of_its_own(dataset: Dataset, _z: int) -> None:
        dataset.SOPInstanceUID = make_uid(folder.name)

    return write_classic_series(folder, IMAGE[:1], AXIAL, edit=of_its_own, **changes)


def test_a_localizer_without_orientation_inside_the_series_is_left_out(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path / "s", IMAGE, AXIAL)
    scout = _one_more(
        tmp_path / "scout",
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=None,
        ImagePositionPatient=None,
    )
    source = read_series([*scout, *paths])
    assert_is_the_phantom(source)
    assert source.warnings == ("Left out: 1 of 8 objects, which hold no plane.",)
    assert refusal(scout).reason is ReasonCode.NOT_A_VOLUME


def _nearly_one_echo_time(dataset: Dataset, z: int) -> None:
    dataset.EchoTime = ("84.9", "85.1")[z % 2]


def _passes(dataset: Dataset, z: int) -> None:
    dataset.AcquisitionNumber, dataset.AcquisitionTime = z % 2 + 1, f"12000{z % 2}"


@pytest.mark.parametrize("acquire", [_nearly_one_echo_time, _passes])
def test_a_volume_may_be_acquired_in_two_passes(tmp_path: Path, acquire: Any) -> None:
    assert_is_the_phantom(read_series(write_classic_series(tmp_path, IMAGE, AXIAL, edit=acquire)))


@pytest.mark.parametrize("frame_of_reference", ["2.25.99", ""])
def test_a_localizer_may_lie_in_another_frame_of_reference(tmp_path: Path, frame_of_reference: str) -> None:
    paths = write_classic_series(tmp_path / "s", IMAGE, AXIAL)
    scout = _one_more(
        tmp_path / "scout",
        frame_of_reference_uid=frame_of_reference,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"],
    )
    source = read_series([*scout, *paths])
    assert_is_the_phantom(source)
    assert source.frame_of_reference_uid == dcmread(paths[0]).FrameOfReferenceUID


def test_images_of_another_orientation_are_told_apart(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path / "s", IMAGE, AXIAL)
    projection = _one_more(
        tmp_path / "mip",
        ImageType=["DERIVED", "SECONDARY", "PROJECTION IMAGE"],
        ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"],
    )
    error = refusal([*paths, *projection])
    assert error.reason is ReasonCode.MIXED_ORIENTATION
    assert "told apart by ImageType" in error.message
    assert error.remedy is not None
    assert "by: ImageType" in error.remedy
    rule = VolumeRule.parse("ImageType=ORIGINAL")
    assert_is_the_phantom(read_series([*paths, *projection], volume=rule))


def test_stacks_that_lie_apart_are_named_as_stacks(tmp_path: Path) -> None:
    def second_stack(dataset: Dataset) -> None:
        for frame in dataset.PerFrameFunctionalGroupsSequence[4:]:
            frame.FrameContentSequence[0].StackID = "2"
            x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
            frame.PlanePositionSequence[0].ImagePositionPatient = [x, y, z + 51]

    paths = write_enhanced_series(tmp_path, IMAGE, AXIAL, edit=second_stack)
    error = refusal(paths)
    assert error.reason is ReasonCode.VARYING_SPACING
    assert "2 stacks" in error.message
    assert error.remedy is not None
    assert "StackID, equals: '1'" in error.remedy
    assert_is_the_phantom(read_series(paths, volume=VolumeRule.parse("StackID=1")), IMAGE[:4])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("place", ["shared", "per frame"])
def test_functional_groups_may_be_shared_or_per_frame(tmp_path: Path, syntax: str, place: str) -> None:
    def move(dataset: Dataset) -> None:
        (shared,) = dataset.SharedFunctionalGroupsSequence
        macros = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence")
        if place == "per frame":
            for keyword in macros:
                for frame in dataset.PerFrameFunctionalGroupsSequence:
                    setattr(frame, keyword, getattr(shared, keyword))
                delattr(shared, keyword)

    affine = oblique_affine()
    paths = write_enhanced_series(tmp_path, IMAGE, affine, edit=move, transfer_syntax=syntax)
    assert_is_the_phantom(read_series(paths), affine=affine)


def _no_dimensions(dataset: Dataset) -> None:
    for keyword in ("DimensionIndexSequence", "DimensionOrganizationSequence"):
        if keyword in dataset:
            delattr(dataset, keyword)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.FrameContentSequence


def _misleading_dimensions(dataset: Dataset) -> None:
    for number, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence[0].DimensionIndexValues = [1, 7 - number]
        frame.FrameContentSequence[0].InStackPositionNumber = 7 - number


@pytest.mark.parametrize("dimensions", [_no_dimensions, _misleading_dimensions])
def test_dimension_indices_have_no_part_in_the_geometry(tmp_path: Path, dimensions: Any) -> None:
    paths = write_enhanced_series(tmp_path, IMAGE, AXIAL, frame_order=[3, 1, 6, 0, 5, 2, 4], edit=dimensions)
    assert_is_the_phantom(read_series(paths))


def test_functional_groups_that_a_pacs_stored_as_unknown_are_read(tmp_path: Path) -> None:
    (path,) = write_enhanced_series(tmp_path, IMAGE, AXIAL)
    dataset = dcmread(path)
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        stream = DicomBytesIO()
        stream.is_little_endian, stream.is_implicit_VR = True, True  # PS3.5 section 6.2.2, note 2
        write_sequence(stream, DataElement(Tag(keyword), "SQ", dataset[keyword].value), ["iso8859"])
        value = stream.getvalue()
        tag = Tag(keyword)
        del dataset[tag]
        dataset[tag] = RawDataElement(tag, "UN", len(value), value, 0, False, True)
    dataset.save_as(path)
    assert_is_the_phantom(read_series([path]))


def test_parts_of_a_concatenation_are_counted(tmp_path: Path) -> None:
    def part(number: int) -> Callable[[Dataset], None]:
        def write(dataset: Dataset) -> None:
            dataset.ConcatenationUID = "2.25.400"
            dataset.InConcatenationNumber, dataset.InConcatenationTotalNumber = number, 2
            dataset.SOPInstanceUID = make_uid("part", number)

        return write

    lower = write_enhanced_series(tmp_path / "a", IMAGE, AXIAL, frame_order=[0, 1, 2, 3], edit=part(1))
    upper = write_enhanced_series(tmp_path / "b", IMAGE, AXIAL, frame_order=[4, 5, 6], edit=part(2))
    assert_is_the_phantom(read_series([*upper, *lower]))
    error = refusal(lower)  # regular by itself
    assert error.reason is ReasonCode.MISSING_SLICE
    assert "1 of the 2 parts" in error.message


def test_a_pet_series_says_itself_how_many_slices_it_has(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path, IMAGE, AXIAL, modality="PT", NumberOfSlices=7)
    assert_is_the_phantom(read_series(paths))
    error = refusal(paths[:-1])
    assert error.reason is ReasonCode.MISSING_SLICE
    assert "6 of the 7 slices" in error.message


def test_a_mosaic_is_refused_by_its_name(tmp_path: Path) -> None:
    paths = write_classic_series(
        tmp_path, IMAGE, AXIAL, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "NORM", "MOSAIC"]
    )
    error = refusal(paths)
    assert error.reason is ReasonCode.NOT_A_VOLUME
    assert "mosaics" in error.message


# --- values -------------------------------------------------------------------------------------------


def _private_rescale(dataset: Dataset, z: int) -> None:
    """As Philips writes it: the standard's slope, and another one in private elements."""
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "2", "-10", "normalized"
    block = dataset.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
    block.add_new(0x0E, "FL", 0.0123)
    block.add_new(0x0D, "FL", 0.0)


def test_private_scales_are_not_taken_for_the_standards(tmp_path: Path) -> None:
    source = read_series(write_classic_series(tmp_path, IMAGE, AXIAL, edit=_private_rescale))
    assert_is_the_phantom(source, IMAGE * 2 - 10)


def test_a_scale_that_some_slices_lack_is_no_scale(tmp_path: Path) -> None:
    def lose(dataset: Dataset, z: int) -> None:
        if z != 3:
            dataset.RescaleSlope, dataset.RescaleIntercept = "2.5", "0"

    error = refusal(write_classic_series(tmp_path, IMAGE, AXIAL, modality="PT", edit=lose))
    assert error.reason is ReasonCode.INVALID_VALUES
    assert "1 of 7 images state no Rescale" in error.message


def _without_scale(folder: Path, image: np.ndarray) -> list[Path]:
    return write_classic_series(
        folder, image, AXIAL, modality="CT", RescaleSlope=None, RescaleIntercept=None, RescaleType=None
    )


def test_a_ct_whose_scale_was_lost_is_not_taken_for_hounsfield_units(tmp_path: Path) -> None:
    unsigned = (IMAGE - IMAGE.min()).astype(np.uint16)
    error = refusal(_without_scale(tmp_path / "unsigned", unsigned))
    assert error.reason is ReasonCode.INVALID_VALUES
    assert "no Rescale Intercept" in error.message
    assert_is_the_phantom(read_series(_without_scale(tmp_path / "signed", IMAGE)))


@pytest.mark.parametrize(("kind", "is_read"), [("HU", True), ("US", True), ("MGML", False), ("Z_EFF", False)])
def test_a_spectral_map_is_no_ct(tmp_path: Path, kind: str, is_read: bool) -> None:
    classic = write_classic_series(tmp_path / "c", IMAGE, AXIAL, modality="CT", RescaleType=kind)

    def retype(dataset: Dataset) -> None:
        (shared,) = dataset.SharedFunctionalGroupsSequence
        shared.PixelValueTransformationSequence[0].RescaleType = kind

    enhanced = write_enhanced_series(tmp_path / "e", IMAGE, AXIAL, modality="CT", edit=retype)
    for paths in (classic, enhanced):
        if is_read:
            assert_is_the_phantom(read_series(paths))
        else:
            error = refusal(paths)
            assert error.reason is ReasonCode.INVALID_VALUES
            assert kind in error.message


def test_an_empty_table_of_values_is_none(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path, IMAGE, AXIAL, ModalityLUTSequence=[], RescaleSlope="2")
    assert_is_the_phantom(read_series(paths), IMAGE * 2)


def test_monochrome1_is_not_inverted_and_is_told(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path, IMAGE, AXIAL, PhotometricInterpretation="MONOCHROME1")
    source = read_series(paths)
    assert_is_the_phantom(source)
    assert "MONOCHROME1" in " ".join(source.warnings)


def test_sixteen_unsigned_bits_are_not_taken_for_signed(tmp_path: Path) -> None:
    image = (chiral_image().astype(np.int32) + 300 + 60_000).astype(np.uint16)
    assert_is_the_phantom(read_series(write_classic_series(tmp_path, image, AXIAL)), image)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("vr", ["US", "SS"])
def test_bright_padding_of_unsigned_images_becomes_background(tmp_path: Path, syntax: str, vr: str) -> None:
    """63536 is -2000 in the two's complement: outside the round field of view of many a CT."""
    image = (IMAGE.astype(np.int32) + 400).astype(np.uint16)
    padded = image.copy()
    padded[:, :2] = 63536

    def state(dataset: Dataset, z: int) -> None:
        dataset.add_new("PixelPaddingValue", vr, 63536 if vr == "US" else -2000)

    paths = write_classic_series(
        tmp_path, padded, AXIAL, modality="CT", RescaleIntercept="-1024", edit=state, transfer_syntax=syntax
    )
    source = read_series(paths)
    np.testing.assert_array_equal(source.volume.array[0][:, 2:], image[:, 2:] - 1024.0)
    assert set(source.volume.array[0][:, :2].ravel()) == {image[:, 2:].min() - 1024.0}
    assert source.warnings == ("Padding brighter than the image was set to its least value in 7 slices.",)


def test_dark_padding_and_padding_among_the_values_stay_as_they_are(tmp_path: Path) -> None:
    dark = IMAGE.copy()
    dark[:, :2] = -2000
    paths = write_classic_series(tmp_path / "dark", dark, AXIAL, PixelPaddingValue=-2000)
    assert_is_the_phantom(read_series(paths), dark)
    paths = write_classic_series(tmp_path / "among", IMAGE, AXIAL, PixelPaddingValue=int(IMAGE[3, 4, 5]))
    assert_is_the_phantom(read_series(paths))


def test_a_range_of_padding_is_padding(tmp_path: Path) -> None:
    image = (IMAGE.astype(np.int32) + 400).astype(np.uint16)
    padded = image.copy()
    padded[2, 0, :3] = 65000, 65010, 65020
    paths = write_classic_series(
        tmp_path, padded, AXIAL, PixelPaddingValue=65000, PixelPaddingRangeLimit=65535
    )
    source = read_series(paths)
    assert set(source.volume.array[0][2, 0, :3]) == {float(image.min())}
    assert source.volume.array.max() == image.max()


def test_signs_may_differ_between_slices(tmp_path: Path) -> None:
    """Each slice says itself whether its values have a sign."""
    image = np.abs(IMAGE) + 20
    paths = write_classic_series(tmp_path, image, AXIAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in paths[::2]:
            dataset = dcmread(path)
            dataset.PixelRepresentation = 0
            dataset.save_as(path)
    assert_is_the_phantom(read_series(paths), image)


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels_are_refused_for_what_they_are(tmp_path: Path, keyword: str) -> None:
    def float_pixels(dataset: Dataset, z: int) -> None:
        kind, bits, vr = (np.float32, 32, "OF") if keyword == "FloatPixelData" else (np.float64, 64, "OD")
        del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
        dataset.BitsAllocated = bits
        dataset.add_new(keyword, vr, IMAGE[z].astype(kind).tobytes())

    error = refusal(write_classic_series(tmp_path, IMAGE, AXIAL, edit=float_pixels))
    assert error.reason is ReasonCode.UNSUPPORTED_PIXELS
    assert "floating point" in error.message
