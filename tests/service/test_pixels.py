"""Stored values from every transfer syntax, with the right sign, and the decoder of JPEG written here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from phantom import LOSSY, chiral_image, oblique_affine, write_classic_series
from pydicom import dcmread
from pydicom.encaps import encapsulate

from models.errors import ReasonCode, Refusal
from service.dicom.codestreams import jpeg2000_frame_header, jpeg_frame_header
from service.dicom.jpeg import decode_jpeg
from service.dicom.series import read_series

SYNTAXES = [
    "1.2.840.10008.1.2" + tail
    for tail in (
        *("", ".1", ".1.99", ".2", ".5", ".4.50", ".4.51", ".4.57", ".4.70"),
        *(".4.80", ".4.81", ".4.90", ".4.91", ".4.201", ".4.202", ".4.203"),
    )
]  # fmt: skip
SHAPE = (3, 19, 21)  # odd, so that padding and partial blocks occur


def image_of(dtype: Any, bits: int) -> np.ndarray:
    z, y, x = np.indices(SHAPE)
    waves = np.sin(x / 5) + np.cos(y / 4) + z
    span = (1 << bits) - 1
    stored = np.rint((waves - waves.min()) / np.ptp(waves) * span)
    return (stored - (span + 1) // 2 if np.dtype(dtype).kind == "i" else stored).astype(dtype)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.uint16, 16), (np.int16, 15)])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_transfer_syntax(tmp_path: Path, syntax: str, dtype: Any, bits: int) -> None:
    if (syntax.endswith(".50") and bits > 8) or (syntax.endswith(".51") and bits > 12):
        pytest.skip("the process has no such precision")
    image = image_of(dtype, bits)
    if syntax in LOSSY and dtype is np.int16:  # at the very ends of the range, a loss may turn the sign over
        image = np.clip(image, -16000, 16000)
    paths = write_classic_series(tmp_path, image, oblique_affine(), transfer_syntax=syntax, bits_stored=bits)
    read = read_series(paths).volume.array[0]
    loss = 0 if syntax not in LOSSY else max(3, (1 << bits) // 500)
    assert np.abs(read - image).max() <= loss
    assert np.corrcoef(read.ravel(), image.ravel())[0, 1] > 0.999


def test_the_length_of_implicit_pixels_may_look_like_the_letters_of_a_vr(tmp_path: Path) -> None:
    image = np.arange(3 * 33 * 257).reshape(3, 33, 257).astype(np.int16)
    assert image[0].nbytes.to_bytes(2, "little") == b"BB"
    implicit = "1.2.840.10008.1.2"
    paths = write_classic_series(tmp_path, image, oblique_affine(), transfer_syntax=implicit)
    np.testing.assert_array_equal(read_series(paths).volume.array[0], image)


@pytest.mark.parametrize("syntax", [".4.57", ".4.70", ".4.51", ".4.80", ".4.90", ".4.201", "", ".1", ".5"])
def test_signed_twelve_bit_values(tmp_path: Path, syntax: str) -> None:
    """The sign stands in bit 11: codecs without signs return it as 2048 and more."""
    image = image_of(np.int16, 12)
    assert image.min() == -2048
    if syntax == ".4.51":  # at the very ends of the range, a loss may turn the sign over
        image = np.clip(image, -2000, 2000)
    paths = write_classic_series(tmp_path, image, oblique_affine(), bits_stored=12)
    for z, path in enumerate(paths):
        with12 = (image[z] & 0xFFF).astype(np.uint16)
        dataset = dcmread(path)
        if syntax in ("", ".1", ".5"):
            dataset.PixelData = with12.tobytes()
            if syntax == ".5":
                dataset.compress(
                    "1.2.840.10008.1.2.5", encoding_plugin="pydicom", generate_instance_uid=False
                )
        else:
            dataset.PixelData = encapsulate([_twelve_bits(with12, syntax)])
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = True
            dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" + syntax
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.save_as(path)
    read = read_series(paths).volume.array[0]
    assert np.abs(read - image).max() <= (4 if syntax == ".4.51" else 0)


def _twelve_bits(plane: np.ndarray, syntax: str) -> bytes:
    """An unsigned codestream of 12 bits, as many writers make it of signed values."""
    if syntax == ".4.80":
        return bytes(imagecodecs.jpegls_encode(plane))
    if syntax == ".4.90":
        return bytes(
            imagecodecs.jpeg2k_encode(plane, level=0, codecformat="j2k", resolutions=1, bitspersample=12)
        )
    if syntax == ".4.201":
        return bytes(imagecodecs.htj2k_encode(plane))
    if syntax == ".4.51":
        return bytes(imagecodecs.jpeg8_encode(plane, level=100, bitspersample=12))
    return bytes(imagecodecs.jpeg8_encode(plane, lossless=True, predictor=1, bitspersample=12))


def test_values_below_the_high_bit(tmp_path: Path) -> None:
    image = image_of(np.uint16, 10)
    paths = write_classic_series(tmp_path, image << 4, oblique_affine(), bits_stored=10, HighBit=13)
    source = read_series(paths)
    np.testing.assert_array_equal(source.volume.array[0], image)
    assert source.warnings == ()


def test_an_unknown_transfer_syntax_is_named(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path, chiral_image(), oblique_affine())
    for path in paths:
        dataset = dcmread(path)
        dataset.PixelData = encapsulate([b"1234"])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
        dataset.save_as(path)
    with pytest.raises(Refusal, match="MPEG-4") as caught:
        read_series(paths)
    assert caught.value.reason is ReasonCode.UNSUPPORTED_PIXELS


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_jpeg_with_every_predictor(predictor: int, bits: int) -> None:
    image = np.random.default_rng(bits).integers(0, 1 << bits, (33, 47))
    image = image.astype(np.uint8 if bits == 8 else np.uint16)
    stream = imagecodecs.jpeg8_encode(image, lossless=True, predictor=predictor, bitspersample=bits)
    np.testing.assert_array_equal(decode_jpeg(stream), image)


@pytest.mark.parametrize("level", [30, 75, 100])
@pytest.mark.parametrize("bits", [8, 12])
def test_sequential_jpeg_agrees_with_another_decoder(bits: int, level: int) -> None:
    image = image_of(np.uint8 if bits == 8 else np.uint16, bits)[1]
    stream = imagecodecs.jpeg8_encode(image, level=level, bitspersample=bits)
    other = imagecodecs.jpeg8_decode(stream).astype(int)
    assert np.abs(decode_jpeg(stream).astype(int) - other).max() <= 1  # their cosine transforms round apart


def _lossless_by_hand(rows: int, restart: int) -> bytes:
    """Three columns: after each restart 128, 128, 129 (code 0: the same again; code 10 and 1: one more)."""
    header = b"\xff\xd8\xff\xc3\x00\x0b\x08" + rows.to_bytes(2, "big") + b"\x00\x03\x01\x01\x11\x00"
    huffman = b"\xff\xc4\x00\x15\x00\x01\x01" + bytes(14) + b"\x00\x01"
    interval = b"\xff\xdd\x00\x04" + (3 * restart).to_bytes(2, "big")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00"
    data = b""
    for number, _ in enumerate(range(0, rows, restart)):
        bits = "0" * 2 + "101" + "0" * (3 * restart - 3)  # the third sample of the first row is one more
        bits += "1" * (-len(bits) % 8)
        data += int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
        data += bytes([0xFF, 0xD0 + number % 8])
    return header + huffman + interval + scan + data[:-2] + b"\xff\xd9"


@pytest.mark.parametrize("restart", [1, 2, 4])
def test_prediction_starts_anew_after_a_restart_marker(restart: int) -> None:
    image = decode_jpeg(_lossless_by_hand(4, restart))
    np.testing.assert_array_equal(image[::restart], [[128, 128, 129]] * (4 // restart))


@pytest.mark.parametrize("bits", [8, 12])
def test_damaged_jpeg_raises_value_errors_alone(bits: int) -> None:
    generator = np.random.default_rng(3)
    image = image_of(np.uint8 if bits == 8 else np.uint16, bits)[0]
    for options in ({"lossless": True, "predictor": 6}, {"level": 90}):
        stream = imagecodecs.jpeg8_encode(image, bitspersample=bits, **options)
        for cut in range(0, len(stream) - 2, 7):
            with pytest.raises(ValueError):
                decode_jpeg(stream[:cut])
        decoded = 0
        for _ in range(300):
            damaged = bytearray(stream)
            for _ in range(3):
                damaged[generator.integers(len(damaged))] = generator.integers(256)
            try:
                decoded += decode_jpeg(bytes(damaged)).size > 0
            except ValueError:
                continue
        assert decoded < 300


def test_frame_headers_of_codestreams() -> None:
    image = np.zeros((30, 40), np.uint16)
    for stream in (
        imagecodecs.jpeg8_encode(image, bitspersample=12),
        imagecodecs.jpeg8_encode(image, lossless=True, predictor=1, bitspersample=12),
    ):
        header = jpeg_frame_header(stream)
        assert header is not None
        assert (header.rows, header.columns, header.components, header.precision) == (30, 40, 1, 12)
        assert jpeg_frame_header(stream[:8]) is None
    for options in ({"codecformat": "j2k"}, {"codecformat": "jp2"}):
        header = jpeg2000_frame_header(imagecodecs.jpeg2k_encode(image, level=0, resolutions=1, **options))
        assert header is not None
        assert (header.rows, header.columns, header.components, header.precision) == (30, 40, 1, 16)
    assert jpeg_frame_header(b"") is jpeg2000_frame_header(b"\xff\x4f\xff\x51") is None
