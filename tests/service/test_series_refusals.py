"""What is no volume is refused, each with its reason and its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from phantom import (
    chiral_image,
    write_classic_series,
    write_enhanced_series,
)
from pydicom import Dataset
from series_builders import AXIAL, refusal, report, series, with_change

from models.errors import ReasonCode
from models.volume import Affine

TURNED = ["0.999962", "0.008727", "0", "-0.008727", "0.999962", "0"]  # by half a degree


def at(z: float) -> Callable[[Dataset], None]:
    return lambda d: setattr(d, "ImagePositionPatient", ["0", "0", str(z)])


def tilted(degrees: float) -> Affine:
    affine = AXIAL.copy()
    affine[1, 2] = 3.0 * np.tan(np.radians(degrees))
    return affine


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
    "echoes between each other": (
        lambda f: series(f, edit=lambda d, z: setattr(d, "EchoTime", ("3", "90")[z % 2])),
        ReasonCode.MULTI_VOLUME,
        "EchoTime takes turns (3, 90): the images are those of 2 volumes",
    ),
    "kernels between each other": (
        lambda f: series(
            f, modality="CT", edit=lambda d, z: setattr(d, "ConvolutionKernel", ("B20", "B50", "B80")[z % 3])
        ),
        ReasonCode.MULTI_VOLUME,
        "those of 3 volumes",
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
        "sideways by up to 1.71 mm from the straight line",
    ),
    "two frames of reference": (
        lambda f: with_change(f, [3], lambda d: setattr(d, "FrameOfReferenceUID", "2.25.8")),
        ReasonCode.NOT_A_VOLUME,
        "2 frames of reference",
    ),
    "a slice without frame of reference": (
        lambda f: with_change(f, [3], lambda d: d.pop("FrameOfReferenceUID")),
        ReasonCode.NOT_A_VOLUME,
        "1 of 7 images name no frame of reference",
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
