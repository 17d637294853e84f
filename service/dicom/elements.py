"""Read single elements of a header without trusting them.

pydicom converts an element when it is first touched, and a value that breaks its VR then raises or warns,
with the value in the message. Headers from the field do break their VRs, and a message must never hold a
patient's data. The functions here parse the bytes as they were read: what cannot be understood is None.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.tag import Tag

_CHARACTER_SET = "SpecificCharacterSet"
_PN_DELIMITERS = {0x5E, 0x3D, 0x5C}  # ^ = \ set the character set back (PS3.5 section 6.1.2.5.3)
_UID = re.compile(r"[0-9.]{1,64}", re.ASCII)
_BYTES_OF = {"US": 2, "SS": 2, "UL": 4, "SL": 4}
_FLOATS = {"FL": (4, "f"), "FD": (8, "d")}
_TEXT_DELIMITERS = {0x0D, 0x0A, 0x09, 0x0C}

PARSE_ERRORS = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,  # with RecursionError, for sequences nested without end
    TypeError,
    ValueError,  # with UnicodeError
    struct.error,
    zlib.error,
)
"""What pydicom and the codecs are known to raise on damaged input; their text may quote the input."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings, which quote values, out of the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _element(dataset: Dataset, keyword: str) -> Any:
    """The element as it was read, neither converted nor fetched; None where absent."""
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return dataset.get_item(tag, keep_deferred=True) if tag in dataset else None


def raw(dataset: Dataset, keyword: str) -> Any:
    """The value as it was read (bytes) or as it was set; None where absent or empty."""
    element = _element(dataset, keyword)
    value = element.value if element is not None else None
    return None if value is None or value in ("", b"") else value


def strings(dataset: Dataset, keyword: str) -> list[str]:
    """The values of a CS, UI, DS, IS, DA or TM element, without padding; ASCII only, the rest replaced."""
    value = raw(dataset, keyword)
    if value is None:
        return []
    if isinstance(value, bytes):
        text = value.decode("ascii", "replace")
    elif isinstance(value, str | int | float):
        text = str(value)
    else:
        text = "\\".join(str(v) for v in value)
    return [part.strip(" \0\r\n\t") for part in text.split("\\")]


def string(dataset: Dataset, keyword: str) -> str | None:
    """The first value of :func:`strings`, or None where absent or empty."""
    values = strings(dataset, keyword)
    return values[0] if values and values[0] else None


def uid(dataset: Dataset, keyword: str) -> str | None:
    """A UID as it was sent, if it is made of digits and dots and not too long.

    Components with leading zeros break the rules (PS3.5 section 9.1) but occur, and have to be returned as
    they are.
    """
    value = string(dataset, keyword)
    return value if value is not None and _UID.fullmatch(value) else None


def decimals(dataset: Dataset, keyword: str, count: int) -> list[float] | None:
    """The values of a DS element; None unless there are ``count`` of them and all are finite."""
    try:
        values = [float(text) for text in strings(dataset, keyword)]
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def decimal(dataset: Dataset, keyword: str) -> float | None:
    """The single value of a DS element; None where absent or not a finite number."""
    values = decimals(dataset, keyword, 1)
    return values[0] if values else None


def integer(dataset: Dataset, keyword: str) -> int | None:
    """The first value of an IS, US, SS, UL or SL element; None where absent or not a whole number."""
    element = _element(dataset, keyword)
    if element is None:
        return None
    value = element.value
    if isinstance(value, int):
        return int(value)
    vr = dictionary_VR(element.tag) if element.VR in (None, "UN") else element.VR
    if isinstance(value, bytes) and vr in _BYTES_OF:
        first = value[: _BYTES_OF[vr]]
        if len(first) < _BYTES_OF[vr]:
            return None
        return int.from_bytes(first, "little" if element.is_little_endian else "big", signed=vr[0] == "S")
    text = string(dataset, keyword)
    try:
        number = float(text or "")
    except ValueError:
        return None
    return int(number) if math.isfinite(number) and number == int(number) else None


def signless(dataset: Dataset, keyword: str) -> int | None:
    """The first value of an element of two bytes (US or SS), as a number from 0 to 65535."""
    element = _element(dataset, keyword)
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        return (
            int.from_bytes(value[:2], "little" if element.is_little_endian else "big")
            if len(value) > 1
            else None
        )
    return value & 0xFFFF if isinstance(value, int) else None


def real(dataset: Dataset, keyword: str) -> float | None:
    """The first value of a numeric element of any VR (DS, IS, FD, FL, US, ...); None where not finite."""
    element = _element(dataset, keyword)
    if element is None:
        return None
    vr = dictionary_VR(element.tag) if element.VR in (None, "UN") else element.VR
    if isinstance(element.value, bytes) and vr in _FLOATS:
        size, code = _FLOATS[vr]
        if len(element.value) < size:
            return None
        (number,) = struct.unpack_from(f"{'<' if element.is_little_endian else '>'}{code}", element.value)
    elif vr in _BYTES_OF:
        number = integer(dataset, keyword)
    else:
        try:
            number = float(string(dataset, keyword) or "")
        except ValueError:
            return None
    return float(number) if number is not None and math.isfinite(number) else None


def private_strings(dataset: Dataset, group: int, element: int, creator: str) -> list[str]:
    """The values of a private element of a creator, as :func:`strings`; empty where there is none.

    Private blocks are looked for at 0x10, where the writers of the elements that are known here put them.
    """
    named, held = Tag(group, 0x0010), Tag(group, 0x1000 + element)
    if named not in dataset or held not in dataset:
        return []
    texts = []
    for tag in (named, held):
        value = dataset.get_item(tag, keep_deferred=True).value
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        elif value is not None and not isinstance(value, str | int | float):
            value = "\\".join(map(str, value))
        texts.append([part.strip(" \0") for part in str(value or "").split("\\")])
    return texts[1] if texts[0] == [creator] else []


def text(dataset: Dataset, keyword: str) -> tuple[str, bool]:
    """An element that the Specific Character Set applies to (LO, SH, PN, ...), and whether it was whole.

    Undecodable bytes become replacement characters; the second value is then False.
    """
    value = raw(dataset, keyword)
    if value is None:
        return "", True
    if not isinstance(value, bytes):
        return str(value).strip(" \0"), True
    declared = strings(dataset, _CHARACTER_SET)
    delimiters = _PN_DELIMITERS if keyword.endswith("Name") else _TEXT_DELIMITERS
    with quiet():
        try:
            decoded = decode_bytes(value, convert_encodings(declared or None), delimiters)
        except PARSE_ERRORS:
            decoded = value.decode("ascii", "replace")
    return decoded.strip(" \0"), "\N{REPLACEMENT CHARACTER}" not in decoded


def items(dataset: Dataset | None, keyword: str) -> list[Dataset]:
    """The items of a sequence; an empty list where it is absent or cannot be read."""
    element = _element(dataset, keyword) if dataset is not None else None
    if dataset is None or element is None:
        return []
    with quiet():
        try:
            value = dataset[element.tag].value
        except PARSE_ERRORS:
            return []
    return [item for item in value or [] if isinstance(item, Dataset)]


def macro_decimals(
    own: Dataset, shared: Dataset | None, macro: str, keyword: str, count: int
) -> list[float] | None:
    """The values of a DS element in a frame's functional group, its own or else the shared one.

    None unless there are ``count`` of them and all are finite (PS3.3 C.7.6.16).
    """
    group = item(own, macro) or item(shared, macro)
    return decimals(group, keyword, count) if group is not None else None


def item(dataset: Dataset | None, keyword: str) -> Dataset | None:
    """The first item of a sequence, or None."""
    found = items(dataset, keyword)
    return found[0] if found else None
