"""The last check before a segmentation leaves: what is in the file, read by another path than the writer's.

The file is decoded by pydicom's reader and NumPy alone. Every frame is placed by its own position and
orientation, the frames are painted into an empty labelmap, and that has to equal, voxel for voxel, the
labelmap that the engine gave.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from models.manifest import Label, Manifest
from models.volume import Labelmap
from service.dicom.elements import PARSE_ERRORS, decimals, integer, item, items, quiet, raw, string, text
from service.dicom.series import SourceSeries
from service.errors import ProofError

_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
_TOLERANCE_MM = 0.05  # a position has at most 16 characters, a slice may lie a little off the regular grid
_REMEDY = "Nothing was sent. Report this with the job's records: it is a defect of the node."


def prove_segmentation(path: Path, source: SourceSeries, labelmap: Labelmap, manifest: Manifest) -> None:
    """Return only if the file says what the labelmap says, of the patient whose images were segmented.

    Parameters
    ----------
    path : Path
        The Part 10 file that would be sent.
    source, labelmap, manifest
        What it was made from.

    Raises
    ------
    ProofError
        With what differs: how many voxels, and where the first one is.
    """
    try:
        with quiet():
            dataset = dcmread(path)
            _prove_identity(dataset, source)
            _prove_references(dataset, source)
            label_of_segment = _prove_segments(dataset, labelmap, manifest)
            painted = _paint(dataset, source, label_of_segment)
    except PARSE_ERRORS as error:
        raise _failed(f"the file cannot be decoded ({type(error).__name__})") from error
    _prove_voxels(painted, labelmap, source)


def _prove_identity(dataset: Dataset, source: SourceSeries) -> None:
    if string(dataset, "SOPClassUID") != _SEGMENTATION_STORAGE:
        raise _failed("it is no Segmentation object")
    if string(dataset, "SegmentationType") != "BINARY":
        raise _failed("its Segmentation Type is not BINARY")
    expected = {
        "StudyInstanceUID": source.study_instance_uid,
        "FrameOfReferenceUID": source.frame_of_reference_uid,
    }
    for keyword, value in expected.items():
        if not value or string(dataset, keyword) != value:
            raise _failed(f"its {keyword} is not that of the source")
    for keyword in ("PatientID", "IssuerOfPatientID", "PatientName"):
        if text(dataset, keyword) != (source.identity.elements[keyword], True):
            raise _failed(f"its {keyword} is not that of the source")
    if string(dataset, "SeriesInstanceUID") == source.series_instance_uid:
        raise _failed("it lies in the series of its own source")
    if (string(dataset, "LossyImageCompression") == "01") is not source.lossy:
        raise _failed("it does not say whether its source was compressed with loss")


def _prove_references(dataset: Dataset, source: SourceSeries) -> None:
    series = items(dataset, "ReferencedSeriesSequence")
    if [string(s, "SeriesInstanceUID") for s in series] != [source.series_instance_uid]:
        raise _failed("it does not reference its source series, and that alone")
    referenced = [
        string(i, "ReferencedSOPInstanceUID") for i in items(series[0], "ReferencedInstanceSequence")
    ]
    if sorted(map(str, referenced)) != sorted(source.sop_instance_uids):
        raise _failed("it does not reference every image of its source series once")


def _prove_segments(dataset: Dataset, labelmap: Labelmap, manifest: Manifest) -> dict[int, Label]:
    """Which label each segment number stands for, told by its codes, laterality and name."""
    segments = items(dataset, "SegmentSequence")
    numbers = [integer(segment, "SegmentNumber") for segment in segments]
    if numbers != list(range(1, len(segments) + 1)):
        raise _failed(f"its segment numbers are not consecutive from 1, but {numbers}")
    meant = {_meaning_of_label(label): label for label in manifest.labels}
    label_of = {}
    for number, segment in enumerate(segments, 1):
        label = meant.get(_meaning_of_segment(segment))
        if label is None:
            raise _failed(f"the codes of segment {number} are those of no label of the model")
        label_of[number] = label
    present = {int(v) for v in np.flatnonzero(np.bincount(labelmap.array.ravel())) if v}
    if sorted(label.value for label in label_of.values()) != sorted(present):
        raise _failed("its segments are not the labels that were found, each of them once")
    return label_of


_Meaning = tuple[str | None, ...]


def _meaning_of_label(label: Label) -> _Meaning:
    side = label.laterality.value if label.laterality else None
    kinds = (label.category, label.type)
    return (label.name, *(part for code in kinds for part in (code.value, code.scheme)), side)


_SIDE = {"7771000": "left", "24028007": "right", "51440002": "both", None: None}


def _meaning_of_segment(segment: Dataset) -> _Meaning:
    category = item(segment, "SegmentedPropertyCategoryCodeSequence")
    kind = item(segment, "SegmentedPropertyTypeCodeSequence")
    if category is None or kind is None:
        return ()
    modifier = item(kind, "SegmentedPropertyTypeModifierCodeSequence")
    parts = [string(c, k) for c in (category, kind) for k in ("CodeValue", "CodingSchemeDesignator")]
    side = _SIDE.get(string(modifier, "CodeValue") if modifier is not None else None, "unknown")
    return (text(segment, "SegmentLabel")[0], *parts, side)


def _paint(dataset: Dataset, source: SourceSeries, label_of: dict[int, Label]) -> NDArray[np.uint16]:
    """The frames as a labelmap on the source grid: (Z, Y, X)."""
    shape = source.volume.shape_zyx
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    if (rows, columns) != shape[1:]:
        raise _failed(f"its frames have {rows} x {columns} pixels, its source {shape[1]} x {shape[2]}")
    shared = item(dataset, "SharedFunctionalGroupsSequence")
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    count = integer(dataset, "NumberOfFrames")
    if count != len(per_frame) or not per_frame:
        raise _failed(f"it has {count} frames and describes {len(per_frame)}")

    size = shape[1] * shape[2]
    value = raw(dataset, "PixelData")
    if not isinstance(value, bytes) or len(value) * 8 < size * count:
        raise _failed("its pixel data is short")
    packed = np.frombuffer(value, np.uint8)

    painted = np.zeros(shape, np.uint16)
    seen: set[tuple[int, int]] = set()
    known = _Known()
    for number, own in enumerate(per_frame, 1):
        z = known.get(own, _PLANE, partial(_slice_of, own, shared, source, number))
        segment = known.get(own, _SEGMENT, partial(_segment_of, own))
        if segment not in label_of or (segment, z) in seen:
            raise _failed(f"frame {number} shows segment {segment} at slice {z + 1} wrongly or once more")
        seen.add((segment, z))
        image = known.get(own, _SOURCE, partial(_source_image_of, own))
        _prove_source_image(image, source, z, number)
        first, last = (number - 1) * size, number * size
        bits = np.unpackbits(packed[first // 8 : -(-last // 8)], bitorder="little")
        mask = bits[first % 8 : first % 8 + size].reshape(shape[1:]).astype(bool)
        if painted[z][mask].any():
            raise _failed(f"frame {number} overlaps another segment at slice {z + 1}")
        painted[z][mask] = label_of[segment].value
    return painted


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
        group = item(own, macro) or item(shared, macro)
        found = decimals(group, keyword, count) if group is not None else None
        if found is None:
            raise _failed(f"frame {number} does not state its {keyword}")
        return np.array(found)

    spacing = values("PixelMeasuresSequence", "PixelSpacing", 2)  # between rows, between columns
    cosines = values("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    affine = source.volume.affine
    # The pixel in the last column and row tells in mm what direction and spacing are worth together.
    columns, rows = source.volume.shape_zyx[2] - 1, source.volume.shape_zyx[1] - 1
    for there, here in (
        (cosines[:3] * spacing[1] * columns, affine[:3, 0] * columns),
        (cosines[3:] * spacing[0] * rows, affine[:3, 1] * rows),
    ):
        if np.abs(there - here).max() > _TOLERANCE_MM:
            raise _failed(f"the rows or columns of frame {number} do not lie along those of the source")
    position = values("PlanePositionSequence", "ImagePositionPatient", 3)
    distance = np.linalg.norm(source.positions_mm - position, axis=1)
    z = int(np.argmin(distance))
    if distance[z] > _TOLERANCE_MM:
        raise _failed(f"frame {number} lies {distance[z]:.2f} mm away from every slice of the source")
    return z


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
        raise _failed(f"frame {number} names another source image than the one at its place")


def _prove_voxels(painted: NDArray[np.uint16], labelmap: Labelmap, source: SourceSeries) -> None:
    apart = np.abs((source.volume.affine - labelmap.affine) @ [*labelmap.array.shape[::-1], 1.0]).max()
    if painted.shape != labelmap.array.shape or apart > _TOLERANCE_MM:
        raise _failed("the labelmap does not lie on the grid of the source")
    differing = painted != labelmap.array
    count = int(np.count_nonzero(differing))
    if count:
        z, y, x = (int(i) for i in np.unravel_index(int(np.argmax(differing)), differing.shape))
        raise _failed(
            f"{count} of {painted.size} voxels differ, the first at x {x}, y {y}, z {z}: label "
            f"{int(labelmap.array[z, y, x])} became {int(painted[z, y, x])}"
        )


def _failed(what: str) -> ProofError:
    return ProofError(f"The encoded segmentation is not what it was made from: {what}.", remedy=_REMEDY)
