"""The last check before a segmentation leaves: what is in the file, read by another path than the writer's.

The file is decoded by pydicom's reader and NumPy alone. Every frame is placed by its own position and
orientation, the frames are painted into an empty labelmap, and that has to equal, voxel for voxel, the
labelmap that the engine gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from models.manifest import Label, Manifest
from models.volume import Labelmap
from service.dicom.elements import (
    PARSE_ERRORS,
    integer,
    item,
    items,
    macro_decimals,
    quiet,
    raw,
    string,
    text,
)
from service.dicom.identity import Identity
from service.dicom.predecessors import Predecessor, stated_predecessors
from service.dicom.series import SourceSeries
from service.errors import ProofError

_STORAGE = {"binary": "1.2.840.10008.5.1.4.1.1.66.4", "labelmap": "1.2.840.10008.5.1.4.1.1.66.7"}
_BACKGROUND = ("Background", "125040", "DCM", "125040", "DCM", None)
_TOLERANCE_MM = 0.05  # a position has at most 16 characters, a slice may lie a little off the regular grid
_TOLERANCE_COSINE = 1e-9  # the same numbers, written once more
_REMEDY = "Nothing was sent. Report this with the job's records: it is a defect of the node."


def prove_segmentation(
    path: Path,
    source: SourceSeries,
    labelmap: Labelmap,
    manifest: Manifest,
    *,
    form: Literal["binary", "labelmap"] = "binary",
    predecessors: Sequence[Predecessor] = (),
) -> None:
    """Return only if the file says what the labelmap says, of the patient whose images were segmented.

    Parameters
    ----------
    path : Path
        The Part 10 file that would be sent.
    source, labelmap, manifest
        What it was made from.
    form : str
        Whether it is to be a BINARY or a LABELMAP segmentation.
    predecessors : sequence of Predecessor
        What it has to say that it replaces, and nothing else.

    Raises
    ------
    ProofError
        With what differs: how many voxels, and where the first one is.
    """
    try:
        with quiet():
            dataset = dcmread(path)
            _prove_kind(dataset, source, form)
            prove_identity(dataset, source.identity)
            _prove_references(dataset, source)
            prove_predecessors(dataset, predecessors)
            label_of_segment = _prove_segments(dataset, labelmap, manifest, form)
            painted = _paint(dataset, source, label_of_segment, form)
    except PARSE_ERRORS as error:
        raise failed(f"the file cannot be decoded ({type(error).__name__})") from error
    _prove_voxels(painted, labelmap, source)


def prove_identity(dataset: Dataset, identity: Identity) -> None:
    """Return only if the object is filed under this patient and study. Raises ProofError."""
    if not identity.study_instance_uid or not identity.patient_id:
        raise failed("its source has no whole identity")
    if string(dataset, "StudyInstanceUID") != identity.study_instance_uid:
        raise failed("its StudyInstanceUID is not that of the source")
    for keyword in ("PatientID", "IssuerOfPatientID", "PatientName"):
        if text(dataset, keyword)[0] != identity.elements[keyword]:  # which may hold replacement characters
            raise failed(f"its {keyword} is not that of the source")


def prove_predecessors(dataset: Dataset, predecessors: Sequence[Predecessor]) -> None:
    """Return only if the object says that it replaces these, and no others. Raises ProofError."""
    wanted = sorted(
        (each.study_instance_uid, each.series_instance_uid, each.sop_class_uid, each.sop_instance_uid)
        for each in predecessors
    )
    if stated_predecessors(dataset) != wanted:
        raise failed("it does not name the objects that it replaces, and those alone")


def _prove_kind(dataset: Dataset, source: SourceSeries, form: str) -> None:
    kind = (string(dataset, "SOPClassUID"), string(dataset, "SegmentationType"))
    if kind != (_STORAGE[form], form.upper()):
        raise failed(f"it is not a {form.upper()} segmentation")
    frame_of_reference = source.frame_of_reference_uid
    if not frame_of_reference or string(dataset, "FrameOfReferenceUID") != frame_of_reference:
        raise failed("its FrameOfReferenceUID is not that of the source")
    if string(dataset, "SeriesInstanceUID") == source.series_instance_uid:
        raise failed("it lies in the series of its own source")
    if (string(dataset, "LossyImageCompression") == "01") is not source.lossy:
        raise failed("it does not say whether its source was compressed with loss")


def _prove_references(dataset: Dataset, source: SourceSeries) -> None:
    series = items(dataset, "ReferencedSeriesSequence")
    if [string(s, "SeriesInstanceUID") for s in series] != [source.series_instance_uid]:
        raise failed("it does not reference its source series, and that alone")
    referenced = [
        string(i, "ReferencedSOPInstanceUID") for i in items(series[0], "ReferencedInstanceSequence")
    ]
    if sorted(map(str, referenced)) != sorted(source.sop_instance_uids):
        raise failed("it does not reference every image of its source series once")


def _prove_segments(dataset: Dataset, labelmap: Labelmap, manifest: Manifest, form: str) -> dict[int, Label]:
    """Which label each segment number stands for, told by its codes, laterality and name."""
    segments = items(dataset, "SegmentSequence")
    if form == "labelmap":
        if not segments or integer(segments[0], "SegmentNumber") != 0:
            raise failed("it has no segment 0 for the background")
        if meaning_of_segment(segments[0]) != _BACKGROUND:
            raise failed("its segment 0 is not the background")
        segments = segments[1:]
    numbers = [integer(segment, "SegmentNumber") for segment in segments]
    if numbers != list(range(1, len(segments) + 1)):
        raise failed(f"its segment numbers are not consecutive from 1, but {numbers}")
    meant = {meaning_of_label(label): label for label in manifest.labels}
    label_of = {}
    for number, segment in enumerate(segments, 1):
        label = meant.get(meaning_of_segment(segment))
        if label is None:
            raise failed(f"the codes of segment {number} are those of no label of the model")
        label_of[number] = label
    present = {int(v) for v in np.flatnonzero(np.bincount(labelmap.array.ravel())) if v}
    if sorted(label.value for label in label_of.values()) != sorted(present):
        raise failed("its segments are not the labels that were found, each of them once")
    return label_of


Meaning = tuple[str | None, ...]


def meaning_of_label(label: Label) -> Meaning:
    """Name, codes and side of a label, to be compared with those of a segment."""
    side = label.laterality.value if label.laterality else None
    kinds = (label.category, label.type)
    return (label.name, *(part for code in kinds for part in (code.value, code.scheme)), side)


_SIDE = {"7771000": "left", "24028007": "right", "51440002": "both", None: None}


def meaning_of_segment(segment: Dataset) -> Meaning:
    """Name, codes and side of an item of the Segment Sequence; empty without codes."""
    category = item(segment, "SegmentedPropertyCategoryCodeSequence")
    kind = item(segment, "SegmentedPropertyTypeCodeSequence")
    if category is None or kind is None:
        return ()
    modifier = item(kind, "SegmentedPropertyTypeModifierCodeSequence")
    parts = [string(c, k) for c in (category, kind) for k in ("CodeValue", "CodingSchemeDesignator")]
    side = _SIDE.get(string(modifier, "CodeValue") if modifier is not None else None, "unknown")
    return (text(segment, "SegmentLabel")[0], *parts, side)


def _paint(
    dataset: Dataset, source: SourceSeries, label_of: dict[int, Label], form: str
) -> NDArray[np.uint16]:
    """The frames as a labelmap on the source grid: (Z, Y, X)."""
    shape = source.volume.shape_zyx
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    if (rows, columns) != shape[1:]:
        raise failed(f"its frames have {rows} x {columns} pixels, its source {shape[1]} x {shape[2]}")
    shared = item(dataset, "SharedFunctionalGroupsSequence")
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    count = integer(dataset, "NumberOfFrames")
    if count != len(per_frame) or not per_frame:
        raise failed(f"it has {count} frames and describes {len(per_frame)}")

    known = _Known()
    places = [
        known.get(own, _PLANE, partial(_slice_of, own, shared, source, number))
        for number, own in enumerate(per_frame, 1)
    ]
    if form == "labelmap":
        painted = _paint_numbers(dataset, shape, places, label_of)
    else:
        shown = [known.get(own, _SEGMENT, partial(_segment_of, own)) for own in per_frame]
        painted = _paint_bits(dataset, shape, places, shown, label_of)
    for number, (own, z) in enumerate(zip(per_frame, places, strict=True), 1):
        image = known.get(own, _SOURCE, partial(_source_image_of, own))
        _prove_source_image(image, source, z, number)
    return painted


def _paint_bits(
    dataset: Dataset,
    shape: tuple[int, int, int],
    places: list[int],
    shown: list[int | None],
    label_of: dict[int, Label],
) -> NDArray[np.uint16]:
    """Frames of one bit a pixel, each of one segment (PS3.5 section 8.1.1)."""
    size = shape[1] * shape[2]
    packed = _pixel_bytes(dataset, -(-size * len(places) // 8))
    painted = np.zeros(shape, np.uint16)
    seen: set[tuple[int, int]] = set()
    for number, (z, segment) in enumerate(zip(places, shown, strict=True), 1):
        if segment not in label_of or (segment, z) in seen:
            raise failed(f"frame {number} shows segment {segment} at slice {z + 1} wrongly or once more")
        seen.add((segment, z))
        first, last = (number - 1) * size, number * size
        bits = np.unpackbits(packed[first // 8 : -(-last // 8)], bitorder="little")
        mask = bits[first % 8 : first % 8 + size].reshape(shape[1:]).astype(bool)
        if painted[z][mask].any():
            raise failed(f"frame {number} overlaps another segment at slice {z + 1}")
        painted[z][mask] = label_of[segment].value
    return painted


def _paint_numbers(
    dataset: Dataset, shape: tuple[int, int, int], places: list[int], label_of: dict[int, Label]
) -> NDArray[np.uint16]:
    """Frames whose pixels are segment numbers, of 8 or 16 bits in little endian."""
    bits = integer(dataset, "BitsAllocated")
    form = tuple(integer(dataset, k) for k in ("BitsStored", "HighBit", "PixelRepresentation"))
    if bits not in (8, 16) or form != (bits, bits - 1, 0) or integer(dataset, "SamplesPerPixel") != 1:
        raise failed("its pixels are not unsigned numbers of 8 or 16 bits")
    size = shape[1] * shape[2]
    stored = _pixel_bytes(dataset, size * len(places) * bits // 8)
    numbers = stored[: size * len(places) * bits // 8].view(f"<u{bits // 8}").reshape(-1, *shape[1:])
    value_of = np.full(max(label_of, default=0) + 1, -1, np.int32)
    value_of[0] = 0
    for segment, label in label_of.items():
        value_of[segment] = label.value
    painted = np.zeros(shape, np.uint16)
    for number, z in enumerate(places):
        if z in places[:number]:
            raise failed(f"frame {number + 1} shows slice {z + 1} once more")
        if numbers[number].max() >= len(value_of):
            raise failed(f"frame {number + 1} holds a number that is no segment's")
        painted[z] = value_of[numbers[number]]
    return painted


def _pixel_bytes(dataset: Dataset, needed: int) -> NDArray[np.uint8]:
    value = raw(dataset, "PixelData")
    if not isinstance(value, bytes) or len(value) < needed:
        raise failed("its pixel data is short")
    return np.frombuffer(value, np.uint8)


_PLANE = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
_SEGMENT = ("SegmentIdentificationSequence",)
_SOURCE = ("DerivationImageSequence",)


class _Known:
    """What functional groups said, by their bytes: thousands of frames share a few hundred of them."""

    def __init__(self) -> None:
        self._answers: dict[object, Any] = {}

    def get(self, own: Dataset, keywords: tuple[str, ...], decode: Callable[[], Any]) -> Any:
        """The answer for groups with the same bytes, decoded the first time that they are met."""
        values = [raw(own, keyword) for keyword in keywords]
        if not all(value is None or isinstance(value, bytes) for value in values):
            return decode()  # a group that is decoded already
        key = (keywords, *values)
        if key not in self._answers:
            self._answers[key] = decode()
        return self._answers[key]


def _segment_of(own: Dataset) -> int | None:
    identification = item(own, "SegmentIdentificationSequence")
    return integer(identification, "ReferencedSegmentNumber") if identification is not None else None


def _slice_of(own: Dataset, shared: Dataset | None, source: SourceSeries, number: int) -> int:
    """The slice of the source that a frame covers pixel for pixel, by the frame's own words."""

    def values(macro: str, keyword: str, count: int) -> NDArray[np.float64]:
        found = macro_decimals(own, shared, macro, keyword, count)
        if found is None:
            raise failed(f"frame {number} does not state its {keyword}")
        return np.array(found)

    spacing = values("PixelMeasuresSequence", "PixelSpacing", 2)  # between rows, between columns
    cosines = values("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    if np.abs(cosines - source.orientation).max() > _TOLERANCE_COSINE:
        raise failed(f"frame {number} does not state the orientation that its source states")
    row, column = _right_angled(cosines)
    affine = source.volume.affine
    # The pixel in the last column and row tells in mm what direction and spacing are worth together.
    columns, rows = source.volume.shape_zyx[2] - 1, source.volume.shape_zyx[1] - 1
    for there, here in (
        (row * spacing[1] * columns, affine[:3, 0] * columns),
        (column * spacing[0] * rows, affine[:3, 1] * rows),
    ):
        if np.abs(there - here).max() > _TOLERANCE_MM:
            raise failed(f"the rows or columns of frame {number} do not lie along those of the source")
    position = values("PlanePositionSequence", "ImagePositionPatient", 3)
    distance = np.linalg.norm(source.positions_mm - position, axis=1)
    z = int(np.argmin(distance))
    if distance[z] > _TOLERANCE_MM:
        raise failed(f"frame {number} lies {distance[z]:.2f} mm away from every slice of the source")
    return z


def _right_angled(cosines: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The directions of rows and columns as unit vectors at a right angle, both in the plane that is stated.

    Vendors that round cosines to three decimals state neither: 0.001 is half a millimetre at 500 mm.
    """
    row = cosines[:3] / np.linalg.norm(cosines[:3])
    normal = np.cross(row, cosines[3:])
    return row, np.cross(normal / np.linalg.norm(normal), row)


def _source_image_of(own: Dataset) -> tuple[str | None, int | None]:
    """The instance that a frame says it was drawn on, and the frame of it where one is named."""
    image = item(item(own, "DerivationImageSequence"), "SourceImageSequence")
    if image is None:
        return None, None
    return string(image, "ReferencedSOPInstanceUID"), integer(image, "ReferencedFrameNumber")


def _prove_source_image(
    image: tuple[str | None, int | None], source: SourceSeries, z: int, number: int
) -> None:
    index, frame_number = source.frame_numbers[z]
    stated, stated_frame = image
    if stated != source.sop_instance_uids[index] or (stated_frame or frame_number) != frame_number:
        raise failed(f"frame {number} names another source image than the one at its place")


def _prove_voxels(painted: NDArray[np.uint16], labelmap: Labelmap, source: SourceSeries) -> None:
    apart = np.abs((source.volume.affine - labelmap.affine) @ [*labelmap.array.shape[::-1], 1.0]).max()
    if painted.shape != labelmap.array.shape or apart > _TOLERANCE_MM:
        raise failed("the labelmap does not lie on the grid of the source")
    differing = painted != labelmap.array
    count = int(np.count_nonzero(differing))
    if count:
        z, y, x = (int(i) for i in np.unravel_index(int(np.argmax(differing)), differing.shape))
        raise failed(
            f"{count} of {painted.size} voxels differ, the first at x {x}, y {y}, z {z}: label "
            f"{int(labelmap.array[z, y, x])} became {int(painted[z, y, x])}"
        )


def failed(what: str) -> ProofError:
    """An error that says what is wrong with an object, and names nobody."""
    return ProofError(f"The encoded object is not what it was made from: {what}.", remedy=_REMEDY)
