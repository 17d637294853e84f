"""Negative values keep sign and range where their codestream knows no sign, or another than the header."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import imagecodecs
import jpeg_ls
import numpy as np
import pytest
from numpy.typing import NDArray
from phantom import oblique_affine, write_classic_series
from pydicom import dcmread
from pydicom.encaps import encapsulate

from models.errors import ReasonCode, Refusal
from service.dicom.codestreams import FrameHeader
from service.dicom.lossy import UncertainSignError, values_after_loss
from service.dicom.series import read_series

BITS = 12
SYNTAX = "1.2.840.10008.1.2.4."
# A loss of this many grey values is the encoder's; a lost sign is one of 4096.
LOSS = {"51": 4, "81": 2, "91": 20, "203": 0}


def stored_values(low: int, high: int) -> NDArray[np.int16]:
    z, y, x = np.indices((3, 19, 21))
    waves = np.sin(x / 5) + np.cos(y / 4) + z
    return np.rint(low + (waves - waves.min()) / np.ptp(waves) * (high - low)).astype(np.int16)


def code(plane: NDArray[Any], syntax: str, codecformat: str = "j2k", bits: int = BITS) -> bytes:
    """One frame, with the sign of the array in its codestream where that has a place for one."""
    if syntax == "51":
        return bytes(imagecodecs.jpeg8_encode(plane, level=100, bitspersample=bits))
    if syntax in ("80", "81"):
        kind = {
            "rows": plane.shape[0],
            "columns": plane.shape[1],
            "samples_per_pixel": 1,
            "bits_stored": bits,
        }
        return bytes(jpeg_ls.encode_pixel_data(plane.tobytes(), lossy_error=LOSS.get(syntax, 0), **kind))
    if syntax in ("90", "91"):
        level = 60 + 6.5 * (bits - BITS) if syntax == "91" else 0  # decibels below the codestream's range
        options = {"codecformat": codecformat, "resolutions": 1 if bits == BITS else 3, "bitspersample": bits}
        return bytes(imagecodecs.jpeg2k_encode(plane, level=level, **options))
    return htj2k_of_12_bits(plane)


def htj2k_of_12_bits(plane: NDArray[Any]) -> bytes:
    """The encoder always writes 16 bits; the depth has a part in the level shift of unsigned values alone."""
    if plane.dtype == np.int16:
        return bytes(imagecodecs.htj2k_encode(plane))
    stream = bytearray(imagecodecs.htj2k_encode(plane + (1 << 15) - (1 << (BITS - 1))))
    depth = stream.index(b"\xff\x4f\xff\x51") + 42  # Ssiz of T.800 table A.9
    assert stream[depth] == 15
    stream[depth] = BITS - 1
    return bytes(stream)


def read_back(
    folder: Path, image: NDArray[np.int16], syntax: str, *, header_dtype: type, coded_dtype: type, **how: Any
) -> NDArray[np.float32]:
    """The values that a reader gets of a header with one sign around codestreams with another.

    Unsigned samples are two's complement in ``mask_bits``, 12 unless given.
    """
    mask_bits = how.pop("mask_bits", BITS)
    paths = write_classic_series(folder, image.astype(header_dtype), oblique_affine(), bits_stored=BITS)
    for path, plane in zip(paths, image, strict=True):
        dataset = dcmread(path)
        coded = plane & np.int32((1 << mask_bits) - 1) if coded_dtype is np.uint16 else plane
        dataset.PixelData = encapsulate([code(coded.astype(coded_dtype), syntax, **how)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = SYNTAX + syntax
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.save_as(path)
    return read_series(paths).volume.array[0]


def assert_equal_but_for_loss(read: NDArray[np.float32], image: NDArray[np.int16], syntax: str) -> None:
    assert np.abs(read - image).max() <= LOSS.get(syntax, 0)


@pytest.mark.parametrize("syntax", ["80", "81", "90", "91", "201", "202", "203"])
def test_the_sign_of_values_in_an_unsigned_codestream_is_kept(tmp_path: Path, syntax: str) -> None:
    """As many writers make it of signed images; JPEG-LS knows no sign at all."""
    image = stored_values(-2000, -100)
    read = read_back(tmp_path, image, syntax, header_dtype=np.int16, coded_dtype=np.uint16)
    assert_equal_but_for_loss(read, image, syntax)


@pytest.mark.parametrize("syntax", ["90", "91"])
@pytest.mark.parametrize("coded", [np.uint16, np.int16])
def test_a_file_header_around_the_codestream_hides_no_sign(tmp_path: Path, syntax: str, coded: type) -> None:
    """A JP2 header has no place in a DICOM object, and some have one."""
    image = stored_values(-2000, -100)
    read = read_back(tmp_path, image, syntax, header_dtype=np.int16, coded_dtype=coded, codecformat="jp2")
    assert_equal_but_for_loss(read, image, syntax)


@pytest.mark.parametrize("syntax", ["90", "91", "201", "202", "203"])
@pytest.mark.parametrize("header", [np.int16, np.uint16])
def test_a_signed_codestream_is_read_under_either_header(tmp_path: Path, syntax: str, header: type) -> None:
    image = stored_values(-2000 if header is np.int16 else 20, 2000)
    read = read_back(tmp_path, image, syntax, header_dtype=header, coded_dtype=np.int16)
    assert_equal_but_for_loss(read, image, syntax)


# --- With loss, in codestreams that are deeper than what is stored, or that contradict their header

IN_16_BITS = {"header_dtype": np.int16, "coded_dtype": np.uint16, "bits": 16}


@pytest.mark.parametrize("mask_bits", [12, 16])
@pytest.mark.parametrize("syntax", ["80", "81", "90", "91"])
def test_the_sign_of_twelve_bits_in_an_unsigned_codestream_of_sixteen(
    tmp_path: Path, syntax: str, mask_bits: int
) -> None:
    """Some writers clear the bits above Bits Stored, others fill them with the sign."""
    image = stored_values(-1000, -100)
    image[:, :, 10:] += 1500  # and positive ones in the same frame, far away in the codestream
    read = read_back(tmp_path, image, syntax, **IN_16_BITS, mask_bits=mask_bits)
    assert_equal_but_for_loss(read, image, syntax)


def test_a_signed_codestream_of_sixteen_bits_overshoots_and_does_not_wrap(tmp_path: Path) -> None:
    image = np.clip(stored_values(-3000, 3000), -2048, 2047)
    image[:, ::2] = 2047
    read = read_back(tmp_path, image, "91", header_dtype=np.int16, coded_dtype=np.int16, bits=16)
    assert_equal_but_for_loss(read, image, "91")
    assert read.max() > 2047


def test_an_unsigned_image_in_a_signed_codestream_overshoots_zero_and_does_not_wrap(tmp_path: Path) -> None:
    image = np.clip(stored_values(-500, 1000), 0, None)
    image[:, ::2] = 0
    read = read_back(tmp_path, image, "91", header_dtype=np.uint16, coded_dtype=np.int16, bits=16)
    assert_equal_but_for_loss(read, image, "91")
    assert read.min() == 0


@pytest.mark.parametrize(
    ("syntax", "low", "high", "header", "coded", "bits", "said"),
    [
        ("81", -2048, -1000, np.int16, np.uint16, 12, "knows no sign"),  # -2048 may come out as 2047
        ("91", 1000, 2047, np.int16, np.uint16, 12, "knows no sign"),
        ("51", -2048, 2047, np.int16, np.uint16, 12, "knows no sign"),
        ("91", 1000, 2300, np.int16, np.uint16, 16, "knows no sign"),  # an overshoot, or -1748?
        ("81", -9000, 9000, np.int16, np.uint16, 16, "no two's complement of 12 bits"),
        ("91", -1000, 4000, np.int16, np.int16, 16, "do not fit in 12 bits with sign"),
        ("91", -1000, 1000, np.uint16, np.int16, 12, "Pixel Representation knows no sign"),
    ],
)
def test_values_whose_sign_a_loss_leaves_uncertain_are_refused(
    tmp_path: Path, syntax: str, low: int, high: int, header: type, coded: type, bits: int, said: str
) -> None:
    image = stored_values(low, high)
    with pytest.raises(Refusal) as caught:
        read_back(tmp_path, image, syntax, header_dtype=header, coded_dtype=coded, bits=bits, mask_bits=bits)
    assert caught.value.reason is ReasonCode.UNSUPPORTED_PIXELS
    assert said in caught.value.message
    assert caught.value.remedy


def test_the_upper_half_of_a_codestream_shallower_than_bits_stored_is_refused() -> None:
    """Twelve bits without sign in a signed image of sixteen: 3000, or -1096?"""
    header = FrameHeader(rows=1, columns=2, components=1, precision=12, signed=False)
    positive = np.array([[0, 1900]])
    assert (values_after_loss(positive, header, bits_stored=16, signed=True) == positive).all()
    with pytest.raises(UncertainSignError, match="1 of 2 values may be positive or negative"):
        values_after_loss(np.array([[0, 3000]]), header, bits_stored=16, signed=True)
