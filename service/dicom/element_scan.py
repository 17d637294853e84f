"""Find a few elements near the start of a data set, in bounded time and memory, whatever the bytes are.

A received object is foreign: its sequences may nest without end, its lengths may lie, its deflated stream
may be a bomb. So nothing here builds a data set: the scan walks from element to element, seeks over what it
does not want, holds no more than the values it was asked for, and never gets as far as Pixel Data.

The encoding is that of PS3.5 section 7 (explicit and implicit VR, nested and undefined lengths).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from models.errors import SegnodeError
from service.dicom.contexts import DEFLATED, EXPLICIT_VR_BIG_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG_FORM = frozenset((b"OB OD OF OL OV OW SQ SV UC UN UR UT UV").split())  # PS3.5 table 7.1-1

_MAXIMUM_ELEMENTS = 200_000
_MAXIMUM_VALUE_BYTES = 16 * 1024
_MAXIMUM_INFLATED_BYTES = 64 * 1024**2
_CHUNK_BYTES = 64 * 1024


class UnreadableDataSetError(SegnodeError):
    """Raised when bytes are no data set, or one that cannot be walked. No value is in the message."""

    code = "DATA_SET_UNREADABLE"


class _Source(Protocol):
    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes, or none at all at the end."""

    def skip(self, count: int) -> None: ...


def scan(
    stream: BinaryIO, transfer_syntax_uid: str, wanted: Collection[int], *, last_tag: int
) -> dict[int, bytes]:
    """Values of the wanted top-level elements that come up to ``last_tag``, as the bytes that stand there.

    Parameters
    ----------
    stream : binary file
        At the first byte of the data set (after the File Meta Information); must be seekable.
    transfer_syntax_uid : str
        How the data set is encoded.
    wanted : collection of int
        Tags, as group << 16 | element.
    last_tag : int
        The scan ends at the first element beyond this tag.

    Raises
    ------
    UnreadableDataSetError
        If the bytes end in the middle of an element, or make no sense, or would take too long to walk.
    """
    source: _Source = _Inflating(stream) if transfer_syntax_uid in DEFLATED else _Plain(stream)
    walk = _Walk(source, big_endian=transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN)
    implicit = transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN
    found: dict[int, bytes] = {}
    while (element := walk.element(implicit)) is not None and element.tag <= last_tag:
        if element.length == _UNDEFINED:
            walk.skip_undefined(element)
        elif element.tag in wanted:
            if element.length > _MAXIMUM_VALUE_BYTES:
                raise _unreadable(f"element ({element.tag:08X}) claims {element.length} bytes")
            found[element.tag] = walk.value(element.length)
        else:
            source.skip(element.length)
    return found


@dataclass(frozen=True)
class _Element:
    tag: int
    vr: bytes | None  # None where the VR is implicit
    length: int

    @property
    def holds_implicit(self) -> bool:
        """True if what is nested in it has implicit VRs: so it is in UN too (PS3.5 section 6.2.2)."""
        return self.vr is None or self.vr == b"UN"


class _Walk:
    def __init__(self, source: _Source, *, big_endian: bool) -> None:
        order = ">" if big_endian else "<"
        self._source = source
        self._tag_and_length = struct.Struct(f"{order}HHL")
        self._short = struct.Struct(f"{order}H")
        self._long = struct.Struct(f"{order}L")
        self._elements = 0

    def element(self, implicit: bool) -> _Element | None:
        """The header of the next element; None at the end of the source."""
        self._elements += 1
        if self._elements > _MAXIMUM_ELEMENTS:
            raise _unreadable(f"more than {_MAXIMUM_ELEMENTS} elements before the identifiers")
        start = self._source.read(8)
        if not start:
            return None
        group, number, length = self._tag_and_length.unpack(start)
        tag, vr = group << 16 | number, start[4:6]
        # Items have no VR; and some writers fall into implicit VR in the middle of an explicit data set.
        if implicit or group == 0xFFFE or not (vr.isalpha() and vr.isupper()):
            return _Element(tag, None, length)
        if vr in _LONG_FORM:
            return _Element(tag, vr, self._long.unpack(self.value(4))[0])
        return _Element(tag, vr, self._short.unpack(start[6:])[0])

    def value(self, count: int) -> bytes:
        data = self._source.read(count)
        if len(data) != count:
            raise _unreadable("it ends in the middle of an element")
        return data

    def skip_undefined(self, outer: _Element) -> None:
        """Skip a value of undefined length: items up to a delimiter, nested to any depth."""
        stack = [(True, outer.holds_implicit)]  # (between items?, implicit VR inside?)
        while stack:
            between_items, implicit = stack[-1]
            element = self.element(implicit)
            if element is None:
                raise _unreadable("it ends in the middle of a sequence")
            if element.tag == (_SEQUENCE_END if between_items else _ITEM_END):
                stack.pop()
            elif between_items and element.tag != _ITEM:
                raise _unreadable("something other than an item stands in a sequence")
            elif element.length != _UNDEFINED:
                self._source.skip(element.length)
            elif between_items:
                stack.append((False, implicit))
            else:
                stack.append((True, element.holds_implicit))


class _Plain:
    """The bytes of a file from where it stands, with every seek checked against its end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        start = stream.tell()
        self._left = stream.seek(0, 2) - start
        stream.seek(start)

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._left -= len(data)
        if data and len(data) != count:
            raise _unreadable("it ends in the middle of an element")
        return data

    def skip(self, count: int) -> None:
        if count > self._left:
            raise _unreadable("it ends in the middle of an element")
        self._left -= count
        self._stream.seek(count, 1)


class _Inflating:
    """The bytes of a deflated data set (PS3.5 section A.5), inflated no further than a header needs."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._buffer = bytearray()
        self._inflated = 0

    def read(self, count: int) -> bytes:
        self._fill(count)
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        if data and len(data) != count:
            raise _unreadable("it ends in the middle of an element")
        return data

    def skip(self, count: int) -> None:
        while count:
            step = min(count, _CHUNK_BYTES)
            if len(self.read(step)) != step:
                raise _unreadable("it ends in the middle of an element")
            count -= step

    def _fill(self, count: int) -> None:
        while len(self._buffer) < count and not self._inflater.eof:
            compressed = self._inflater.unconsumed_tail or self._stream.read(_CHUNK_BYTES)
            if not compressed:
                return
            try:
                inflated = self._inflater.decompress(compressed, _CHUNK_BYTES)
            except zlib.error as error:
                raise _unreadable("its deflated stream is damaged") from error
            self._buffer += inflated
            self._inflated += len(inflated)
            if self._inflated > _MAXIMUM_INFLATED_BYTES:
                raise _unreadable(f"it inflates to more than {_MAXIMUM_INFLATED_BYTES} bytes of header")


def _unreadable(why: str) -> UnreadableDataSetError:
    return UnreadableDataSetError(
        f"The data set cannot be read: {why}.", remedy="Send the object again, or repair it at its source."
    )
