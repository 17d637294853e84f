"""Stored values of frames, from every transfer syntax that the node accepts.

One decoder is chosen for each transfer syntax and never another tried after it. GDCM is none of them: it
ends the whole process on some damaged JPEG and RLE frames, where a refusal of one series is wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom._uid_dict import UID_dictionary
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from models.errors import ReasonCode, Refusal
from service.dicom.codestreams import FrameHeader, jpeg2000_frame_header, jpeg_frame_header
from service.dicom.elements import PARSE_ERRORS, decimal, integer, quiet, raw, signless, string
from service.dicom.instances import Instance
from service.dicom.jpeg import decode_jpeg
from service.dicom.lossy import UncertainSignError, values_after_loss

_NATIVE = frozenset(
    {ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian}
)
_PLUGIN = {
    RLELossless: "pydicom",
    JPEGBaseline8Bit: "pillow",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    HTJ2K: "pylibjpeg",
}
_OWN = frozenset({JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1})
_JPEG = frozenset({JPEGBaseline8Bit, *_OWN, JPEGLSLossless, JPEGLSNearLossless})
_JPEG2000 = frozenset({JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K})
_ALWAYS_LOSSY = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless})
_MAYBE_LOSSY = frozenset({JPEG2000, HTJ2K})

_METHOD = {
    JPEGLSNearLossless: "ISO_14495_1",
    JPEG2000: "ISO_15444_1",
    HTJ2K: "ISO_15444_15",
}

_RESEND = "Send the study again; if it fails once more, the images are damaged at their source."


@dataclass(frozen=True)
class PixelFormat:
    """How the samples of an instance are stored (PS3.3 C.7.6.3)."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @staticmethod
    def of(instance: Instance) -> PixelFormat:
        """Read and check the Image Pixel module of a header.

        Raises
        ------
        Refusal
            UNSUPPORTED_PIXELS for colour, palettes, floating point, odd depths and unknown codecs.
        """
        header = instance.header
        samples = integer(header, "SamplesPerPixel") or 1
        photometric = string(header, "PhotometricInterpretation") or "MONOCHROME2"
        if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise _unsupported(
                f"{_upper(instance.label)} is in colour ({photometric[:16]}, {samples} samples per pixel)."
            )
        values = {
            keyword: integer(header, keyword)
            for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
        }
        rows, columns, allocated, stored, representation = values.values()
        if allocated in (32, 64) and stored is None and representation is None:  # PS3.3 C.7.6.24, C.7.6.25
            raise _unsupported(f"{_upper(instance.label)} stores its pixels as floating point numbers.")
        if not rows or not columns or representation not in (0, 1) or not stored:
            missing = ", ".join(k for k, v in values.items() if v is None) or "a size of 0"
            raise _unsupported(f"{_upper(instance.label)} does not describe its pixels ({missing}).")
        high_bit = integer(header, "HighBit")
        high_bit = stored - 1 if high_bit is None else high_bit
        if (
            allocated not in (8, 16, 32)
            or not 0 < stored <= allocated
            or not stored - 1 <= high_bit < allocated
        ):
            raise _unsupported(
                f"{_upper(instance.label)} stores {stored} of {allocated} bits up to bit {high_bit}, "
                "which is not supported."
            )
        syntax = instance.transfer_syntax
        if syntax not in _NATIVE and syntax not in _PLUGIN and syntax not in _OWN:
            raise _unsupported(
                f"{_upper(instance.label)} is encoded in {_name(syntax)}, which is not supported."
            )
        return PixelFormat(rows, columns, allocated, stored, high_bit, representation == 1)


def is_lossy(instance: Instance) -> bool:
    """True where the image was compressed with loss, now or earlier (PS3.3 C.7.6.1.1.5)."""
    said = string(instance.header, "LossyImageCompression")
    syntax = instance.transfer_syntax
    return said == "01" or syntax in _ALWAYS_LOSSY or (syntax in _MAYBE_LOSSY and said != "00")


def lossy_method(instance: Instance) -> str:
    """Lossy Image Compression Method: as stated, or of the transfer syntax."""
    return string(instance.header, "LossyImageCompressionMethod") or _METHOD.get(
        instance.transfer_syntax, "ISO_10918_1"
    )


def lossy_ratio(instance: Instance, form: PixelFormat) -> str:
    """Lossy Image Compression Ratio: as stated, or the pixels' size over the file's; at least 1."""
    stated = decimal(instance.header, "LossyImageCompressionRatio")
    if stated is None:
        count = integer(instance.header, "NumberOfFrames") or 1
        size = form.rows * form.columns * form.bits_allocated // 8 * count
        stated = size / max(instance.path.stat().st_size, 1)
    return f"{max(stated, 1.0):.4g}"


def padding_range(instance: Instance, form: PixelFormat) -> tuple[int, int] | None:
    """Lowest and highest stored value that stand for no measurement; None where none does.

    The elements have the sign of the pixels (PS3.3 C.7.5.1.1.2), whatever VR they were written in.
    """
    stated = [signless(instance.header, k) for k in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if stated[0] is None:
        return None
    sign = 1 << 15 if form.signed else 0
    ends = [(number ^ sign) - sign for number in stated if number is not None]
    return min(ends), max(ends)


def stored_frames(
    instance: Instance, form: PixelFormat, count: int, wanted: Collection[int]
) -> Iterator[tuple[int, NDArray[Any], bool]]:
    """Yield frames as (Y, X) integer arrays, with whether bits outside Bits Stored had to be cleared.

    Parameters
    ----------
    count : int
        How many frames the instance holds.
    wanted : collection of int
        The numbers of those that are wanted, from 1; they come in the order in which they are stored.

    Raises
    ------
    Refusal
        UNREADABLE where the pixel data is short, damaged, or not of the size that the header claims;
        UNSUPPORTED_PIXELS where compression with loss leaves the sign of a value uncertain.
    """
    value, vr = instance.read_pixel_element()
    if instance.transfer_syntax in _NATIVE:
        if instance.transfer_syntax == ExplicitVRBigEndian and form.bits_allocated == 8 and vr == "OW":
            value = np.frombuffer(value, "<u2", len(value) // 2).byteswap().tobytes()  # a word is two samples
        yield from _native_frames(value, instance, form, count, wanted)
        return
    table = [raw(instance.header, k) for k in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    offsets = (table[0], table[1]) if all(isinstance(t, bytes) for t in table) else None
    number = 0
    try:
        with quiet():
            for number, stream in enumerate(
                generate_frames(value, number_of_frames=count, extended_offsets=offsets), 1
            ):
                if number > count:
                    break
                if number in wanted:
                    _check_codestream(stream, instance, form)
                    yield number, *_decoded(stream, instance, form)
    except PARSE_ERRORS as error:
        raise _damaged(instance, f"frame {number} of its compressed pixel data cannot be decoded") from error
    if number < count:
        raise _damaged(instance, f"it holds {number} of {count} compressed frames")


def _native_frames(
    value: bytes, instance: Instance, form: PixelFormat, count: int, wanted: Collection[int]
) -> Iterator[tuple[int, NDArray[Any], bool]]:
    dtype = form.dtype
    size = form.rows * form.columns
    needed = size * dtype.itemsize * count
    if len(value) < needed:
        raise _damaged(instance, f"it holds {len(value)} of {needed} bytes of pixel data")
    if instance.transfer_syntax == ExplicitVRBigEndian:
        dtype = dtype.newbyteorder(">")
    samples = np.frombuffer(value, dtype, size * count).reshape(count, form.rows, form.columns)
    for number in sorted(wanted):
        yield number, *_significant(samples[number - 1].astype(form.dtype, copy=False), form)


def _significant(plane: NDArray[Any], form: PixelFormat) -> tuple[NDArray[Any], bool]:
    """The value between High Bit and the lowest stored bit; other bits may hold anything (PS3.5 8.1.1)."""
    below = form.high_bit + 1 - form.bits_stored
    above = form.bits_allocated - 1 - form.high_bit
    if below == above == 0:
        return plane, False
    # Left to the top, then back down: the dtype's sign decides between sign bits and zeros.
    out = np.right_shift(np.left_shift(plane, above), above + below)
    return out, below == 0 and not np.array_equal(out, plane)


def _decoded(stream: bytes, instance: Instance, form: PixelFormat) -> tuple[NDArray[Any], bool]:
    syntax = instance.transfer_syntax
    if syntax in _ALWAYS_LOSSY or syntax in _MAYBE_LOSSY:
        return _decoded_with_loss(stream, instance, form), False
    if syntax in _OWN:
        return _jpeg(stream, form), False
    return _significant(_by_plugin(stream, syntax, form).astype(form.dtype, copy=False), form)


def _decoded_with_loss(stream: bytes, instance: Instance, form: PixelFormat) -> NDArray[Any]:
    syntax = instance.transfer_syntax
    header = _frame_header(stream, syntax)
    assert header is not None, "the frame header was checked before"
    coded = replace(form, bits_stored=header.precision, signed=header.signed)  # which no decoder corrects
    samples = decode_jpeg(stream) if syntax in _OWN else _by_plugin(stream, syntax, coded)
    try:
        values = values_after_loss(samples, header, bits_stored=form.bits_stored, signed=form.signed)
    except UncertainSignError as error:
        raise Refusal(
            ReasonCode.UNSUPPORTED_PIXELS,
            f"{_upper(instance.label)} was compressed with loss, and {error}.",
            remedy="Route the series as it was before that compression, or compressed without loss.",
        ) from error
    return values.astype(form.dtype)


def _by_plugin(stream: bytes, syntax: str, form: PixelFormat) -> NDArray[Any]:
    plane: NDArray[Any] = next(
        get_decoder(UID(syntax)).iter_array(
            _encapsulated(stream),
            raw=True,
            decoding_plugin=_PLUGIN[syntax],
            transfer_syntax_uid=UID(syntax),
            rows=form.rows,
            columns=form.columns,
            number_of_frames=1,
            samples_per_pixel=1,
            photometric_interpretation="MONOCHROME2",
            bits_allocated=form.bits_allocated,
            bits_stored=form.bits_stored,
            pixel_representation=int(form.signed),
            pixel_keyword="PixelData",
        )
    )[0]
    return plane


def _jpeg(stream: bytes, form: PixelFormat) -> NDArray[Any]:
    plane = decode_jpeg(stream)
    if not form.signed:
        return plane
    header = jpeg_frame_header(stream)
    assert header is not None, "the frame header was checked before"
    unused = 16 - min(header.precision, form.bits_stored)  # JPEG knows no sign: it is the highest stored bit
    return np.right_shift(np.left_shift(plane, unused).view(np.int16), unused)


def _frame_header(stream: bytes, syntax: str) -> FrameHeader | None:
    return jpeg_frame_header(stream) if syntax in _JPEG else jpeg2000_frame_header(stream)


def _check_codestream(stream: bytes, instance: Instance, form: PixelFormat) -> None:
    if instance.transfer_syntax not in _JPEG and instance.transfer_syntax not in _JPEG2000:
        return
    header = _frame_header(stream, instance.transfer_syntax)
    if header is None:
        raise _damaged(instance, "a compressed frame has no frame header")
    if (header.rows, header.columns, header.components) != (form.rows, form.columns, 1):
        raise _damaged(
            instance,
            f"a compressed frame has {header.rows} x {header.columns} pixels of {header.components} samples, "
            f"not {form.rows} x {form.columns} of 1",
        )
    if not 2 <= header.precision <= form.bits_allocated:
        raise _damaged(
            instance,
            f"a compressed frame has {header.precision} bits where {form.bits_allocated} are allocated",
        )


def _encapsulated(stream: bytes) -> bytes:
    """One frame as one fragment behind an empty offset table (PS3.5 section A.4)."""
    stream += b"\0" * (len(stream) % 2)
    return b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0" + len(stream).to_bytes(4, "little") + stream


def _damaged(instance: Instance, what: str) -> Refusal:
    return Refusal(
        ReasonCode.UNREADABLE, f"{_upper(instance.label)} cannot be decoded: {what}.", remedy=_RESEND
    )


def _unsupported(sentence: str) -> Refusal:
    return Refusal(
        ReasonCode.UNSUPPORTED_PIXELS, sentence, remedy="Route the series of original greyscale images."
    )


def _name(transfer_syntax: str) -> str:
    known = UID_dictionary.get(transfer_syntax)
    return known[0] if known else transfer_syntax


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
