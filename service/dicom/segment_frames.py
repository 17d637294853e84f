"""The frames of a segmentation, encoded in bulk.

highdicom builds every frame's functional groups as data sets of their own and pydicom then encodes them
one element after the other, which takes minutes for a hundred labels. All that differs between frames is
where the plane lies, which segment it shows and two index values; the parts are encoded once for each
slice and each segment here, and joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag

FrameList = list[tuple[int, int]]
"""(segment number, z) of every frame, in stored order; the number is 0 where a frame shows all segments."""

_ITEM = b"\xfe\xff\x00\xe0"


def pack_frames(segments: NDArray[Any], count: int, *, keep_empty: bool = False) -> tuple[FrameList, bytes]:
    """List the planes that hold a segment, segment by segment, and pack their pixels.

    Parameters
    ----------
    segments : (Z, Y, X) array, unsigned
        Segment numbers; 0 is none.
    count : int
        Number of segments.
    keep_empty : bool
        List every plane of every segment, also where it is empty.

    Returns
    -------
    frames, pixel_data
        Pixels are packed without a gap between frames, the first pixel in the lowest bit (PS3.5 section
        8.1.1), and padded to an even length.
    """
    present = np.full((len(segments), count + 1), keep_empty)
    for z, plane in enumerate(segments):
        present[z, plane.ravel()] = True
    frames = [(n, int(z)) for n in range(1, count + 1) for z in np.flatnonzero(present[:, n])]

    size = segments[0].size
    together = 8 // gcd(size, 8)  # frames that end on a byte
    packed = np.zeros(-(-len(frames) * size // 8), np.uint8)
    for first in range(0, len(frames), together):
        bits = np.stack([segments[z] == n for n, z in frames[first : first + together]])
        group = np.packbits(bits, bitorder="little")
        start = first * size // 8
        packed[start : start + group.size] = group
    data = packed.tobytes()
    return frames, data + b"\0" * (len(data) % 2)


def pack_labelmap_frames(segments: NDArray[Any], *, keep_empty: bool = False) -> tuple[FrameList, bytes]:
    """List the planes that hold anything, and their pixels, of which each is a segment number.

    Parameters
    ----------
    segments : (Z, Y, X) array, uint8 or uint16
        Segment numbers; 0 is background.
    keep_empty : bool
        List every plane.

    Returns
    -------
    frames, pixel_data
        Pixels are in little endian, padded to an even length.
    """
    planes = [z for z in range(len(segments)) if keep_empty or segments[z].any()]
    data = segments[planes].astype(segments.dtype.newbyteorder("<")).tobytes()
    return [(0, z) for z in planes], data + b"\0" * (len(data) % 2)


def functional_groups(
    frames: FrameList, positions: Sequence[Dataset], derivations: Sequence[Dataset]
) -> RawDataElement:
    """The Per-Frame Functional Groups Sequence, in explicit VR little endian.

    Parameters
    ----------
    positions, derivations : sequences of Dataset, one for each z
        The items of the Plane Position and the Derivation Image Sequence.
    """
    last = max(n for n, _ in frames)
    position_of = [_sequence("PlanePositionSequence", item) for item in positions]
    derivation_of = [_sequence("DerivationImageSequence", item) for item in derivations]
    segment_of = [
        _sequence("SegmentIdentificationSequence", _segment(n)) if n else b"" for n in range(last + 1)
    ]
    for_all = _sequence("FrameContentSequence", _index_values(0))
    for_one = _sequence("FrameContentSequence", _index_values(0, 0))

    parts: list[bytes] = []
    for n, z in frames:
        # The index values of 4 bytes each come last: of the segment, where a frame shows one, and the plane.
        content = for_one[:-8] + n.to_bytes(4, "little") if n else for_all[:-4]
        body = b"".join(
            (  # in the order of tags
                derivation_of[z],
                content,
                (z + 1).to_bytes(4, "little"),
                position_of[z],
                segment_of[n],
            )
        )
        parts += (_ITEM, len(body).to_bytes(4, "little"), body)
    value = b"".join(parts)
    tag = Tag("PerFrameFunctionalGroupsSequence")
    return RawDataElement(tag, "SQ", len(value), value, 0, is_implicit_VR=False, is_little_endian=True)


def _segment(number: int) -> Dataset:
    item = Dataset()
    item.ReferencedSegmentNumber = number
    return item


def _index_values(*values: int) -> Dataset:
    item = Dataset()
    item.DimensionIndexValues = list(values)
    return item


def _sequence(keyword: str, item: Dataset) -> bytes:
    """A sequence of one item, encoded in explicit VR little endian with defined lengths."""
    dataset = Dataset()
    setattr(dataset, keyword, DicomSequence([item]))
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    write_dataset(stream, dataset)
    return bytes(stream.getvalue())
