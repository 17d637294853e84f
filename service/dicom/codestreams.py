"""What a compressed frame says about itself, read before any decoder sees it.

A decoder allocates what the codestream claims, and some return rubbish where the claims do not fit. The
frame header of JPEG and JPEG-LS is ITU-T T.81 section B.2.2 (T.87 section C.2.2); the SIZ segment of
JPEG 2000 is T.800 section A.5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_SOC_SIZ = b"\xff\x4f\xff\x51"


@dataclass(frozen=True)
class FrameHeader:
    """Size of a compressed frame in pixels, its components, and the bits and the sign of each sample.

    JPEG and JPEG-LS know no sign: their samples are never ``signed``.
    """

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool = False


def jpeg_frame_header(stream: bytes) -> FrameHeader | None:
    """Header of a JPEG or JPEG-LS frame; None where there is none before the first scan."""
    at = 2
    if stream[:2] != b"\xff\xd8":
        return None
    while at + 4 <= len(stream):
        if stream[at] != 0xFF:
            return None
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _NO_LENGTH:
            at += 2
            continue
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker in _START_OF_FRAME and at + 10 <= len(stream):
            return FrameHeader(
                rows=int.from_bytes(stream[at + 5 : at + 7], "big"),
                columns=int.from_bytes(stream[at + 7 : at + 9], "big"),
                components=stream[at + 9],
                precision=stream[at + 4],
            )
        if marker == 0xDA or length < 2:
            return None
        at += 2 + length
    return None


def jpeg2000_frame_header(stream: bytes) -> FrameHeader | None:
    """Header of a JPEG 2000 or HTJ2K codestream, bare or in a JP2 box; None where there is none."""
    at = stream.find(_SOC_SIZ, 0, 4096)
    if at < 0 or at + 43 > len(stream):
        return None
    right, bottom, left, top = (int.from_bytes(stream[at + i : at + i + 4], "big") for i in (8, 12, 16, 20))
    return FrameHeader(
        rows=bottom - top,
        columns=right - left,
        components=int.from_bytes(stream[at + 40 : at + 42], "big"),
        precision=(stream[at + 42] & 0x7F) + 1,
        signed=stream[at + 42] >= 0x80,
    )
