"""Series that hold several volumes: one is taken by a rule, or the series is refused with its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantom import chiral_image, write_classic_series, write_enhanced_series
from phantom import test_uid as make_uid
from pydantic import ValidationError
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from models.errors import ReasonCode, Refusal
from service.dicom.series import SourceSeries, read_series
from service.reading import VolumeRule

AXIAL = np.diag([1.5, 1.5, 3.0, 1.0])
IMAGES = [chiral_image() + 1000 * n for n in range(3)]


def rule(**choice: Any) -> VolumeRule:
    return VolumeRule.model_validate(choice)


def volumes(folder: Path, *attributes: dict[str, Any], **of_all: Any) -> list[Path]:
    """A classic series of as many volumes, one image each: volume n holds ``IMAGES[n]``."""
    paths = []
    for number, own in enumerate(attributes):

        def name(dataset: Dataset, z: int, number: int = number) -> None:
            dataset.SOPInstanceUID = make_uid("volumes", number, z)
            dataset.InstanceNumber = number + len(attributes) * z + 1

        paths += write_classic_series(
            folder / str(number), IMAGES[number], AXIAL, edit=name, **{**of_all, **own}
        )
    return paths


def enhanced(
    folder: Path, groups: Callable[[int, Dataset], None], count: int = 2, **options: Any
) -> list[Path]:
    """An enhanced object of as many volumes, frame by frame in turns; ``groups`` writes frame n's own."""
    slices = len(IMAGES[0])
    array = np.concatenate(IMAGES[:count])
    order = [z + n * slices for z in range(slices) for n in range(count)]

    def place(dataset: Dataset) -> None:
        for frame, index in zip(dataset.PerFrameFunctionalGroupsSequence, order, strict=True):
            position = ["0", "0", str(3.0 * (index % slices))]
            frame.PlanePositionSequence[0].ImagePositionPatient = position
            groups(index // slices, frame)

    return write_enhanced_series(folder, array, AXIAL, frame_order=order, edit=place, **options)


def refusal(paths: list[Path], volume: VolumeRule | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_series(paths, volume=volume)
    assert caught.value.remedy
    return caught.value


def assert_is(source: SourceSeries, number: int) -> None:
    np.testing.assert_array_equal(source.volume.array[0], IMAGES[number])
    np.testing.assert_allclose(source.volume.affine, AXIAL, atol=1e-9)


ECHOES = ({"EchoTime": "9.5"}, {"EchoTime": "30"}, {"EchoTime": "100"})


@pytest.mark.parametrize(
    ("choice", "number", "value"),
    [
        ({"take": "first"}, 0, "9.5"),
        ({"take": "last"}, 2, "100"),  # by number: as text, 9.5 would come last
        ({"nearest": 40}, 1, "30"),
        ({"nearest": 65}, 1, "30"),  # of two that are equally near, the smaller
        ({"equals": 100}, 2, "100"),
        ({"equals": "30.0"}, 1, "30"),
    ],
)
def test_an_echo_is_taken_by_a_rule(tmp_path: Path, choice: dict[str, Any], number: int, value: str) -> None:
    paths = volumes(tmp_path, *ECHOES)
    source = read_series(paths[::-1], volume=rule(by="EchoTime", **choice))
    assert_is(source, number)
    assert source.warnings == (f"Taken: 7 of 21 images, by EchoTime {value} of 9.5, 30, 100.",)
    assert set(source.sop_instance_uids) == {make_uid("volumes", number, z) for z in range(7)}


def test_without_a_rule_the_figures_are_told(tmp_path: Path) -> None:
    error = refusal(volumes(tmp_path, *ECHOES))
    assert error.reason is ReasonCode.MULTI_VOLUME
    assert "3 images at each of 7 positions, told apart by EchoTime (9.5, 30, 100)." in error.message
    assert "volume: {by:" in error.remedy


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_an_echo_of_an_enhanced_object(tmp_path: Path, syntax: str) -> None:
    def echo(number: int, frame: Dataset) -> None:
        frame.MREchoSequence = [Dataset()]
        frame.MREchoSequence[0].EffectiveEchoTime = (9.5, 30.0)[number]

    paths = enhanced(tmp_path, echo, transfer_syntax=syntax)
    source = read_series(paths, volume=rule(by="EchoTime", equals=30))
    assert_is(source, 1)
    assert source.frame_numbers == tuple((0, 2 * z + 2) for z in range(7))
    assert "told apart by EchoTime (9.5, 30)" in refusal(paths).message


def test_a_time_point_of_a_compressed_enhanced_object_and_no_other_is_decoded(tmp_path: Path) -> None:
    def time(number: int, frame: Dataset) -> None:
        frame.FrameContentSequence[0].TemporalPositionIndex = number + 1

    paths = enhanced(tmp_path, time, count=3, transfer_syntax=JPEG2000Lossless)
    whole = paths[0].read_bytes()
    start_of_frame = b"\xff\x4f\xff\x51"
    third = whole.index(start_of_frame, whole.index(start_of_frame, whole.index(start_of_frame) + 1) + 1)
    paths[0].write_bytes(whole[: third + 4] + b"\xff" * 40 + whole[third + 44 :])
    assert_is(read_series(paths, volume=rule(by="TemporalPositionIndex", take="first")), 0)
    damaged = refusal(paths, rule(by="TemporalPositionIndex", take="last"))
    assert damaged.reason is ReasonCode.UNREADABLE


def siemens_b_value(value: str) -> Callable[[Dataset, int], None]:
    def write(dataset: Dataset, z: int) -> None:
        block = dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        block.add_new(0x0C, "IS", value)

    return write


def ge_b_value(value: str) -> Callable[[Dataset, int], None]:
    def write(dataset: Dataset, z: int) -> None:
        block = dataset.private_block(0x0043, "GEMS_PARM_01", create=True)
        block.add_new(0x39, "IS", [value, "8", "0", "0"])

    return write


@pytest.mark.parametrize("vendor", ["standard", "Siemens", "GE"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_the_unweighted_volume_of_a_diffusion_series(tmp_path: Path, vendor: str, syntax: str) -> None:
    weighted = {"Siemens": siemens_b_value("1000"), "GE": ge_b_value("1000001000")}
    unweighted = {"Siemens": siemens_b_value("0"), "GE": ge_b_value("0")}
    paths = []
    for number in range(3):  # once without weighting, then two directions
        write = (weighted if number else unweighted).get(vendor)

        def edit(dataset: Dataset, z: int, number: int = number, write: Any = write) -> None:
            dataset.SOPInstanceUID = make_uid("dwi", number, z)
            if write is None:
                dataset.DiffusionBValue = 1000.0 if number else 0.0
            else:
                write(dataset, z)

        paths += write_classic_series(
            tmp_path / str(number), IMAGES[number], AXIAL, edit=edit, transfer_syntax=syntax
        )
    source = read_series(paths, volume=rule(by="DiffusionBValue", equals=0))
    assert_is(source, 0)
    assert source.warnings == ("Taken: 7 of 21 images, by DiffusionBValue 0 of 0, 1000.",)
    directions = refusal(paths, rule(by="DiffusionBValue", equals=1000))
    assert directions.reason is ReasonCode.MULTI_VOLUME
    assert "2 images at each of 7 positions" in directions.message


def test_the_water_image_of_a_dixon_series(tmp_path: Path) -> None:
    kinds = [{"ImageType": ["DERIVED", "PRIMARY", "DIXON", part]} for part in ("WATER", "FAT")]
    paths = volumes(tmp_path, *kinds)
    assert_is(read_series(paths, volume=rule(by="ImageType", equals="WATER")), 0)
    assert_is(read_series(paths, volume=rule(by="ImageType", equals="DERIVED\\PRIMARY\\DIXON\\FAT")), 1)
    both = refusal(paths, rule(by="ImageType", equals="DIXON"))
    assert both.reason is ReasonCode.MULTI_VOLUME
    assert "told apart by ImageType (DERIVED\\PRIMARY\\DIXON\\FAT, DERIVED" in both.message


def test_the_magnitude_of_an_enhanced_object(tmp_path: Path) -> None:
    def component(number: int, frame: Dataset) -> None:
        frame.MRImageFrameTypeSequence = [Dataset()]
        frame.MRImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "M_FFE", "NONE"]
        frame.MRImageFrameTypeSequence[0].ComplexImageComponent = ("MAGNITUDE", "PHASE")[number]

    paths = enhanced(tmp_path, component)
    assert_is(read_series(paths, volume=rule(by="ComplexImageComponent", equals="MAGNITUDE")), 0)


def test_a_stack_of_a_localizer_in_three_planes(tmp_path: Path) -> None:
    def turn(number: int, frame: Dataset) -> None:
        frame.FrameContentSequence[0].StackID = "AB"[number]
        if number:
            turned = Dataset()  # the writer gives all frames one item
            turned.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
            frame.PlaneOrientationSequence = [turned]
            z = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
            frame.PlanePositionSequence[0].ImagePositionPatient = ["0", str(z), "0"]

    paths = enhanced(tmp_path, turn, orientation_per_frame=True)
    assert_is(read_series(paths, volume=rule(by="StackID", equals="A")), 0)
    assert refusal(paths).reason is ReasonCode.MIXED_ORIENTATION


def test_an_attribute_that_varies_from_slice_to_slice_takes_no_slice_away(tmp_path: Path) -> None:
    def times(dataset: Dataset, z: int) -> None:
        dataset.AcquisitionTime = f"1200{z:02d}"

    one = write_classic_series(tmp_path / "one", IMAGES[0], AXIAL, edit=times)
    source = read_series(one, volume=rule(by="AcquisitionTime", take="first"))
    assert_is(source, 0)
    assert source.warnings == ()

    def later(dataset: Dataset, z: int) -> None:
        dataset.SOPInstanceUID = make_uid("later", z)
        dataset.AcquisitionTime = f"1230{z:02d}"

    two = one + write_classic_series(tmp_path / "two", IMAGES[1], AXIAL, edit=later)
    error = refusal(two, rule(by="AcquisitionTime", take="first"))
    assert error.reason is ReasonCode.MULTI_VOLUME
    assert (
        "does not tell volumes apart: with AcquisitionTime 20200101120000 there are 1 of 14 images"
        in error.message
    )
    assert "none at 6 other positions" in error.message


# --- Times


EVENING, MORNING = {"AcquisitionTime": "235930.5"}, {"AcquisitionTime": "000210"}
DATES = ({"AcquisitionDate": "20260304"}, {"AcquisitionDate": "20260305"})
UNDATED = {"AcquisitionDate": ""}


@pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")  # of the writer
@pytest.mark.parametrize(
    ("evening", "morning"),
    [
        (EVENING | DATES[0], MORNING | DATES[1]),
        (
            EVENING | UNDATED | {"AcquisitionDateTime": "20260304235930.5"},
            MORNING | UNDATED | {"AcquisitionDateTime": "20260305000210"},
        ),
        (
            {"AcquisitionTime": None, "AcquisitionDateTime": "20260304235930.5"},
            {"AcquisitionTime": None, "AcquisitionDateTime": "20260305000210"},
        ),
        (
            {"AcquisitionDate": "2026.03.04", "AcquisitionTime": "23:59:30"},
            {"AcquisitionDate": "2026.03.05", "AcquisitionTime": "00:02:10"},
        ),
    ],
)
def test_the_first_volume_of_a_night_is_the_one_before_midnight(
    tmp_path: Path, evening: dict[str, Any], morning: dict[str, Any]
) -> None:
    paths = volumes(tmp_path, evening, morning)
    assert_is(read_series(paths, volume=rule(by="AcquisitionTime", take="first")), 0)
    assert_is(read_series(paths, volume=rule(by="AcquisitionTime", take="last")), 1)


def test_content_times_have_the_date_of_the_content(tmp_path: Path) -> None:
    paths = volumes(
        tmp_path,
        {"ContentTime": "235959", "ContentDate": "20261231"},
        {"ContentTime": "000001", "ContentDate": "20270101"},
    )
    source = read_series(paths, volume=rule(by="ContentTime", take="first"))
    assert_is(source, 0)
    said = "by ContentTime 20261231235959 of 20261231235959, 20270101000001."
    assert source.warnings == (f"Taken: 7 of 14 images, {said}",)


@pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")  # of the writer
@pytest.mark.parametrize(
    ("own", "of_all", "said"),
    [
        (
            (EVENING, MORNING),
            UNDATED,
            "24.0 h lie between them on one date or without any, and maybe midnight",
        ),
        ((EVENING, MORNING), DATES[0], "24.0 h lie between them on one date"),  # as de-identification may do
        ((EVENING | DATES[0], MORNING | UNDATED), {}, "some of them state a date"),
        ((EVENING, {"AcquisitionTime": "noon"}), {}, "one of them is no time"),
        ((EVENING, {"AcquisitionTime": "996100"}), {}, "one of them is no time"),
    ],
)
def test_times_whose_order_cannot_be_told_are_refused(
    tmp_path: Path, own: tuple[dict[str, Any], ...], of_all: dict[str, Any], said: str
) -> None:
    paths = volumes(tmp_path, *own, **of_all)
    error = refusal(paths, rule(by="AcquisitionTime", take="first"))
    assert error.reason is ReasonCode.MULTI_VOLUME
    assert "Which is the first AcquisitionTime of" in error.message
    assert said in error.message


def test_times_of_one_day_need_no_date_and_are_asked_for_without_one(tmp_path: Path) -> None:
    times = ({"AcquisitionTime": "0902"}, {"AcquisitionTime": "090230.25"}, {"AcquisitionTime": "10"})
    undated = volumes(tmp_path / "undated", *times, **UNDATED)
    assert_is(read_series(undated, volume=rule(by="AcquisitionTime", take="last")), 2)
    dated = volumes(tmp_path / "dated", *times)
    for wanted in ("090230.25", "09:02:30.25", "20200101090230.25"):
        assert_is(read_series(dated, volume=rule(by="AcquisitionTime", equals=wanted)), 1)


def test_offsets_from_utc_count_where_the_clocks_are_set_back(tmp_path: Path) -> None:
    texts = ("20261025025900+0200", "20261025020100+0100")

    def when(number: int, frame: Dataset) -> None:
        frame.FrameContentSequence[0].FrameAcquisitionDateTime = texts[number]

    paths = enhanced(tmp_path, when)
    assert_is(read_series(paths, volume=rule(by="AcquisitionTime", take="first")), 0)


def test_every_second_slice_is_no_volume(tmp_path: Path) -> None:
    def interleave(dataset: Dataset, z: int) -> None:
        dataset.AcquisitionNumber = z % 2 + 1

    paths = write_classic_series(tmp_path, IMAGES[0], AXIAL, edit=interleave)
    error = refusal(paths, rule(by="AcquisitionNumber", equals=1))
    assert error.reason is ReasonCode.MULTI_VOLUME
    assert "none at 3 other positions" in error.message
    assert_is(read_series(paths, volume=rule(by="AcquisitionNumber", take="first")), 0)


def test_a_volume_that_lacks_a_slice_of_the_others_is_not_taken(tmp_path: Path) -> None:
    paths = volumes(tmp_path, *ECHOES[:2])
    del paths[6]  # the last slice of the first echo
    error = refusal(paths, rule(by="EchoTime", take="first"))
    assert error.reason is ReasonCode.MULTI_VOLUME
    assert "with EchoTime 9.5 there are 6 of 13 images, and none at 1 other positions" in error.message
    assert_is(read_series(paths, volume=rule(by="EchoTime", take="last")), 1)


def test_a_rule_that_asks_for_a_value_holds_a_single_volume_to_it(tmp_path: Path) -> None:
    paths = volumes(tmp_path, {"EchoTime": "9.5"})
    assert_is(read_series(paths, volume=rule(by="EchoTime", equals=9.5)), 0)
    other = refusal(paths, rule(by="EchoTime", equals=30))
    assert other.reason is ReasonCode.OUT_OF_LIMITS
    assert "No image has EchoTime 30; 9.5 is there." in other.message
    for choice in ({"take": "last"}, {"nearest": 30.0}):
        assert_is(read_series(paths, volume=rule(by="EchoTime", **choice)), 0)
    assert_is(read_series(paths, volume=rule(by="DiffusionBValue", equals=0)), 0)  # nothing is stated


def test_a_value_that_none_of_several_volumes_has_is_refused(tmp_path: Path) -> None:
    error = refusal(volumes(tmp_path, *ECHOES), rule(by="EchoTime", equals=31))
    assert error.reason is ReasonCode.MULTI_VOLUME
    assert "No image has EchoTime 31; 9.5, 30, 100 are there." in error.message
    unstated = refusal(volumes(tmp_path / "b", *ECHOES), rule(by="FlipAngle", take="first"))
    assert "told apart by EchoTime" in unstated.message


def test_positions_that_are_rounded_differently_are_still_the_same(tmp_path: Path) -> None:
    paths = volumes(tmp_path, *ECHOES[:2])
    for z, path in enumerate(paths[7:]):
        dataset = dcmread(path)
        dataset.ImagePositionPatient = ["0", "0", f"{3 * z + 0.03:.2f}"]
        dataset.save_as(path)
    assert_is(read_series(paths, volume=rule(by="EchoTime", take="first")), 0)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"by": "Colour", "take": "first"}, "Colour is none of EchoTime"),
        ({"by": "EchoTime"}, "by one of take, nearest and equals"),
        ({"by": "EchoTime", "take": "first", "equals": 3}, "by one of"),
        ({"by": "ImageType", "take": "first"}, "has no order"),
        ({"by": "AcquisitionTime", "nearest": 3}, "is no number"),
        ({"by": "EchoTime", "equals": "long"}, "could not convert"),
        ({"by": "EchoTime", "equals": "nan"}, "must be finite"),
    ],
)
def test_what_is_no_rule_is_an_error_of_the_configuration(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rule(**choice)


def test_a_rule_in_one_word() -> None:
    assert VolumeRule.parse("EchoTime:first") == rule(by="EchoTime", take="first")
    assert VolumeRule.parse("EchoTime~30.5") == rule(by="EchoTime", nearest=30.5)
    assert VolumeRule.parse("DiffusionBValue=0") == rule(by="DiffusionBValue", equals=0)
    assert VolumeRule.parse("ImageType=W") == rule(by="ImageType", equals="W")
    with pytest.raises(ValueError, match="is not like"):
        VolumeRule.parse("the first echo")


@pytest.mark.parametrize("unquoted", [20260304120000, 101530.25, 43200])
def test_a_time_that_yaml_read_as_a_number_is_refused_with_the_remedy(unquoted: float) -> None:
    with pytest.raises(ValueError, match="write it in quotes"):
        rule(by="AcquisitionTime", equals=unquoted)
