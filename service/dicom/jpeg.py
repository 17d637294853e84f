"""Decode greyscale JPEG: lossless (process 14) and sequential DCT of 8 or 12 bits (processes 1, 2 and 4).

ITU-T T.81, the sections are named where they are followed. This exists because the free decoders for these
processes end the whole process on damaged input (GDCM), cannot do them (Pillow), or may not be shipped.
All offsets are checked: damaged input raises ValueError, or decodes to other pixels, and does nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.kernels import compiled

_LOSSLESS = 0xC3
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_END, _SCAN, _QUANTIZATION, _HUFFMAN, _RESTART = 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
_RESTARTS = range(0xD0, 0xD8)

# Coefficient k of a block in the order of the stream stands at _ZIGZAG[k], row by row (figure A.6).
_ZIGZAG = np.array(
    sorted(range(64), key=lambda i: (i // 8 + i % 8, i % 8 if (i // 8 + i % 8) % 2 == 0 else i // 8))
)


@dataclass
class _Tables:
    """What the marker segments before the scan define."""

    process: int = 0
    precision: int = 0
    rows: int = 0
    columns: int = 0
    quantizer: int = 0
    restart_interval: int = 0
    quantization: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    huffman: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    scan: bytes = b""
    scan_data: int = 0


def decode_jpeg(stream: bytes) -> NDArray[np.uint16]:
    """The samples of a greyscale JPEG: (Y, X), unsigned, in the low bits.

    Raises
    ------
    ValueError
        If the stream is damaged, in colour, or of another process.
    """
    tables = _read_tables(stream)
    intervals = _intervals(np.frombuffer(stream, np.uint8, offset=tables.scan_data))
    if tables.process == _LOSSLESS:
        return _decode_lossless(tables, intervals)
    return _decode_sequential(tables, intervals)


def _read_tables(stream: bytes) -> _Tables:
    tables = _Tables()
    if stream[:2] != b"\xff\xd8":
        raise ValueError("no JPEG stream")
    at = 2
    while True:
        if at + 4 > len(stream) or stream[at] != 0xFF:
            raise ValueError("a marker is missing")
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte (B.1.1.2)
            at += 1
            continue
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = stream[at + 4 : at + 2 + length]
        if length < 2 or len(segment) != length - 2:
            raise ValueError("a marker segment is cut short")
        at += 2 + length
        if marker == _SCAN:
            tables.scan, tables.scan_data = segment, at
            break
        _read_segment(marker, segment, tables)
    if tables.rows == 0 or len(tables.scan) != 6 or tables.scan[0] != 1:
        raise ValueError("no scan of one component")
    return tables


def _read_segment(marker: int, segment: bytes, tables: _Tables) -> None:
    if marker == _LOSSLESS or marker in _SEQUENTIAL:  # B.2.2
        if len(segment) != 9 or segment[5] != 1:
            raise ValueError("not one component")
        tables.process, tables.precision = marker, segment[0]
        tables.rows = int.from_bytes(segment[1:3], "big")
        tables.columns = int.from_bytes(segment[3:5], "big")
        tables.quantizer = segment[8]
        if not (2 <= tables.precision <= 16 and tables.rows and tables.columns):
            raise ValueError("no usable frame header")
    elif marker == _HUFFMAN:  # B.2.4.2
        while segment:
            counts, total = segment[1:17], sum(segment[1:17])
            if len(segment) < 17 + total or total > 256:
                raise ValueError("a Huffman table is cut short")
            tables.huffman[segment[0]] = _lookup(counts, segment[17 : 17 + total])
            segment = segment[17 + total :]
    elif marker == _QUANTIZATION:  # B.2.4.1
        while segment:
            width = 2 if segment[0] >> 4 else 1
            values = np.frombuffer(segment[1 : 1 + 64 * width], ">u2" if width == 2 else "u1")
            if values.size != 64:
                raise ValueError("a quantization table is cut short")
            tables.quantization[segment[0] & 15] = values.astype(np.int64)
            segment = segment[1 + 64 * width :]
    elif marker == _RESTART:  # B.2.4.4
        tables.restart_interval = int.from_bytes(segment[:2], "big")
    elif marker in range(0xC0, 0xD0) or marker == _END:
        raise ValueError(f"process {marker:#x} is not decoded here")


def _lookup(counts: bytes, symbols: bytes) -> NDArray[np.int32]:
    """For every 16 bits that may come next: the symbol they begin with, times 32, plus its length (C.2)."""
    table = np.zeros(1 << 16, np.int32)  # length 0: no code
    code, used = 0, 0
    for length, count in enumerate(counts, 1):
        for symbol in symbols[used : used + count]:
            first = code << (16 - length)
            last = first + (1 << (16 - length))
            if last > table.size:
                raise ValueError("a Huffman table has too many codes")
            table[first:last] = symbol * 32 + length
            code += 1
        used += count
        code <<= 1
    return table


def _intervals(data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The entropy-coded bytes between restart markers, without stuffing (B.1.1.5)."""
    prefix = np.flatnonzero(data[:-1] == 0xFF)
    following = data[prefix + 1]
    markers = prefix[(following != 0) & (following != 0xFF)]
    intervals, start = [], 0
    for at in (*markers.tolist(), len(data)):
        part = data[start:at]
        keep = np.ones(part.size, bool)
        keep[1:] = (part[1:] != 0) | (part[:-1] != 0xFF)
        intervals.append(part[keep])
        if at == len(data) or int(data[at + 1]) not in _RESTARTS:
            break
        start = at + 2
    return intervals


def _decode_lossless(tables: _Tables, intervals: list[NDArray[np.uint8]]) -> NDArray[np.uint16]:
    table = tables.huffman.get(tables.scan[2] >> 4)
    predictor, shift = tables.scan[3], tables.scan[5] & 15
    if table is None or not 1 <= predictor <= 7 or shift >= tables.precision:
        raise ValueError("no usable lossless scan header")
    rows_each = tables.rows
    if tables.restart_interval:
        rows_each, rest = divmod(tables.restart_interval, tables.columns)
        if rest:
            raise ValueError("a restart interval is no whole number of rows (H.1.1)")
    out = np.zeros((tables.rows, tables.columns), np.int32)
    first = 1 << (tables.precision - shift - 1)
    decode = compiled(_lossless)
    for number, start in enumerate(range(0, tables.rows, rows_each)):
        if number >= len(intervals):
            raise ValueError("the scan is cut short")
        if not decode(intervals[number], table, predictor, first, out[start : start + rows_each]):
            raise ValueError("the scan is damaged or cut short")
    return (out << shift).astype(np.uint16)


def _decode_sequential(tables: _Tables, intervals: list[NDArray[np.uint8]]) -> NDArray[np.uint16]:
    dc, ac = tables.huffman.get(tables.scan[2] >> 4), tables.huffman.get(16 | (tables.scan[2] & 15))
    quantization = tables.quantization.get(tables.quantizer)
    if dc is None or ac is None or quantization is None:
        raise ValueError("a table is missing")
    down, across = -(-tables.rows // 8), -(-tables.columns // 8)
    coefficients = np.zeros((down * across, 64), np.int32)
    each = tables.restart_interval or len(coefficients)
    decode = compiled(_sequential)
    for number, start in enumerate(range(0, len(coefficients), each)):
        if number >= len(intervals):
            raise ValueError("the scan is cut short")
        if not decode(intervals[number], dc, ac, coefficients[start : start + each]):
            raise ValueError("the scan is damaged or cut short")
    blocks = np.zeros((down * across, 64))
    blocks[:, _ZIGZAG] = coefficients * quantization
    # A.3.3: the inverse cosine transform, one matrix product for the rows and one for the columns.
    k = np.arange(8)
    cosines = np.cos((2 * k[None, :] + 1) * k[:, None] * np.pi / 16) / 2
    cosines[0] /= np.sqrt(2)
    samples = cosines.T @ blocks.reshape(-1, 8, 8) @ cosines + (1 << (tables.precision - 1))
    image = samples.reshape(down, across, 8, 8).swapaxes(1, 2).reshape(down * 8, across * 8)
    limited = np.clip(np.rint(image), 0, (1 << tables.precision) - 1)
    return limited[: tables.rows, : tables.columns].astype(np.uint16)


def _lossless(data: Any, table: Any, predictor: int, first: int, out: Any) -> bool:
    """Fill ``out`` (Y, X) from one restart interval (H.1.2); False where the data ends before it is full."""
    position, bits, held = 0, 0, 0
    rows, columns = out.shape
    for y in range(rows):
        for x in range(columns):
            while held < 32 and position < data.size:
                bits = ((bits << 8) | data[position]) & 0xFFFFFFFFFF
                position += 1
                held += 8
            entry = table[((bits << 16) >> held) & 0xFFFF]
            length, size = entry & 31, entry >> 5
            extra = 0 if size == 16 else size
            if length == 0 or size > 16 or length + extra > held:
                return False
            held -= length + extra
            difference = (bits >> held) & ((1 << extra) - 1)
            if size == 16:
                difference = 32768
            elif size > 0 and difference < (1 << (size - 1)):
                difference -= (1 << size) - 1
            if y == 0:
                predicted = first if x == 0 else out[0, x - 1]
            elif x == 0:
                predicted = out[y - 1, 0]
            else:
                left, above, corner = out[y, x - 1], out[y - 1, x], out[y - 1, x - 1]
                if predictor == 1:
                    predicted = left
                elif predictor == 2:
                    predicted = above
                elif predictor == 3:
                    predicted = corner
                elif predictor == 4:
                    predicted = left + above - corner
                elif predictor == 5:
                    predicted = left + ((above - corner) >> 1)
                elif predictor == 6:
                    predicted = above + ((left - corner) >> 1)
                else:
                    predicted = (left + above) >> 1
            out[y, x] = (predicted + difference) & 0xFFFF
    return True


def _sequential(data: Any, dc: Any, ac: Any, out: Any) -> bool:
    """Fill ``out`` (blocks, 64) with coefficients in the order of the stream (F.2.2); False where it ends."""
    position, bits, held, last = 0, 0, 0, 0
    for block in range(out.shape[0]):
        k = 0
        while k < 64:
            while held < 32 and position < data.size:
                bits = ((bits << 8) | data[position]) & 0xFFFFFFFFFF
                position += 1
                held += 8
            ahead = ((bits << 16) >> held) & 0xFFFF
            entry = dc[ahead] if k == 0 else ac[ahead]
            length, symbol = entry & 31, entry >> 5
            run, size = (0, symbol) if k == 0 else (symbol >> 4, symbol & 15)
            if length == 0 or size > 16 or length + size > held:
                return False
            held -= length + size
            value = (bits >> held) & ((1 << size) - 1)
            if size > 0 and value < (1 << (size - 1)):
                value -= (1 << size) - 1
            if k == 0:
                last += value
                out[block, 0] = last
                k = 1
            elif size == 0:
                if run != 15:  # end of block
                    break
                k += 16
            else:
                k += run
                if k > 63:
                    return False
                out[block, k] = value
                k += 1
    return True
