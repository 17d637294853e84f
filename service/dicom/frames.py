"""Frames: the planes of single-frame and enhanced multi-frame objects, brought to one form.

A single-frame object states its plane at the top level (PS3.3 C.7.6.2); an enhanced one in functional
groups, each of them either shared by all frames or given per frame (PS3.3 C.7.6.16).
"""

from __future__ import annotations

from dataclasses import dataclass

from pydicom.dataset import Dataset

from models.errors import ReasonCode, Refusal
from service.dicom.elements import decimal, decimals, integer, item, items, raw, string
from service.dicom.instances import Instance

Vector = tuple[float, ...]

_ENHANCED_ONLY = "Send the images as single-frame or as enhanced multi-frame objects."


@dataclass(frozen=True, eq=False)
class Frame:
    """One plane of pixels and its place in the patient.

    ``number`` counts the frames of its instance from 1. ``position_mm`` is the centre of the first pixel,
    ``row`` and ``column`` are the direction cosines of increasing column and row index (LPS);
    ``pixel_spacing_mm`` is (between rows, between columns). Stored values times ``slope`` plus
    ``intercept`` are the values of the image; ``rescaled`` says whether the frame states them.
    """

    instance: Instance
    number: int
    position_mm: Vector
    row: Vector
    column: Vector
    pixel_spacing_mm: Vector
    slice_thickness_mm: float | None
    slope: float
    intercept: float
    rescaled: bool
    rescale_type: str | None
    shared: Dataset | None
    own: Dataset | None

    def group(self, macro: str) -> Dataset | None:
        """A functional group of the frame, its own or else the one that all share; None where absent."""
        return _group(self.shared, self.own, macro)

    @property
    def label(self) -> str:
        """How a message names this frame."""
        return self.instance.label if self.own is None else f"frame {self.number} of {self.instance.label}"


def frame_count(instance: Instance) -> int:
    """How many frames an instance says it holds."""
    return integer(instance.header, "NumberOfFrames") or 1


def frames_of(instance: Instance, *, limit_frames: int) -> list[Frame]:
    """All frames of an instance, in stored order.

    Raises
    ------
    Refusal
        INVALID_GEOMETRY where a plane is not stated whole; NOT_A_VOLUME for multi-frame objects without
        functional groups; TOO_LARGE; UNSUPPORTED_PIXELS for values that a table would have to map.
    """
    header = instance.header
    if "NumberOfFrames" not in header and "PerFrameFunctionalGroupsSequence" not in header:
        return [_frame(instance, 1, None, None)]
    count = frame_count(instance)
    if count > limit_frames:
        raise Refusal(
            ReasonCode.TOO_LARGE,
            f"{_upper(instance.label)} claims {count} frames; the limit is {limit_frames}.",
            remedy="Raise the limit if images of this size are expected.",
        )
    per_frame = items(header, "PerFrameFunctionalGroupsSequence")
    if not per_frame:
        if count == 1:  # one frame that states its plane at the top level is as good as a single-frame object
            return [_frame(instance, 1, None, None)]
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{_upper(instance.label)} holds {count} frames without a position for each of them.",
            remedy=_ENHANCED_ONLY,
        )
    if len(per_frame) != count:
        raise Refusal(
            ReasonCode.INVALID_GEOMETRY,
            f"{_upper(instance.label)} claims {count} frames but describes {len(per_frame)} of them.",
            remedy="Send the study again; if it fails once more, the image is damaged at its source.",
        )
    shared = item(header, "SharedFunctionalGroupsSequence")
    return [_frame(instance, number, shared, own) for number, own in enumerate(per_frame, 1)]


def has_plane(header: Dataset) -> bool:
    """True where a header says, in one way or the other, that its pixels lie in the patient."""
    return "PerFrameFunctionalGroupsSequence" in header or (
        raw(header, "ImagePositionPatient") is not None and raw(header, "ImageOrientationPatient") is not None
    )


def _group(shared: Dataset | None, own: Dataset | None, keyword: str) -> Dataset | None:
    return item(own, keyword) or item(shared, keyword)


def _frame(instance: Instance, number: int, shared: Dataset | None, own: Dataset | None) -> Frame:
    header = instance.header

    def find(macro: str, keyword: str, count: int) -> Vector:
        source = header if own is None else _group(shared, own, macro)
        values = decimals(source, keyword, count) if source is not None else None
        if values is None:
            where = instance.label if own is None else f"frame {number} of {instance.label}"
            raise Refusal(
                ReasonCode.INVALID_GEOMETRY,
                f"{_upper(where)} has no usable {keyword} ({count} finite numbers are needed).",
                remedy="Send a series whose images all state position, orientation and pixel spacing.",
            )
        return tuple(values)

    orientation = find("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    measures = _group(shared, own, "PixelMeasuresSequence")
    scale = _scale(instance, shared, own)
    return Frame(
        instance=instance,
        number=number,
        position_mm=find("PlanePositionSequence", "ImagePositionPatient", 3),
        row=orientation[:3],
        column=orientation[3:],
        pixel_spacing_mm=find("PixelMeasuresSequence", "PixelSpacing", 2),
        slice_thickness_mm=_slice_thickness(header if own is None else measures),
        slope=_number(scale, "RescaleSlope", 1.0, instance),
        intercept=_number(scale, "RescaleIntercept", 0.0, instance),
        rescaled=string(scale, "RescaleIntercept") is not None,
        rescale_type=string(scale, "RescaleType"),
        shared=shared,
        own=own,
    )


def _slice_thickness(source: Dataset | None) -> float | None:
    value = decimal(source, "SliceThickness") if source is not None else None
    return value if value is not None and value > 0 else None


def _scale(instance: Instance, shared: Dataset | None, own: Dataset | None) -> Dataset:
    """Where a frame states how its values are rescaled."""
    header = instance.header
    source = header if own is None else _group(shared, own, "PixelValueTransformationSequence")
    if raw(header, "ModalityLUTSequence"):  # some writers leave an empty one beside slope and intercept
        raise Refusal(
            ReasonCode.UNSUPPORTED_PIXELS,
            f"{_upper(instance.label)} maps its values through a Modality LUT, which is not supported.",
            remedy="Send a series whose values are rescaled by slope and intercept.",
        )
    return source if source is not None else header  # several vendors write it there where the macro lacks


def _number(source: Dataset, keyword: str, default: float, instance: Instance) -> float:
    if string(source, keyword) is None:
        return default
    value = decimal(source, keyword)
    if value is None or (keyword == "RescaleSlope" and value == 0.0):
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            f"{_upper(instance.label)} has a {keyword} that is not a usable number.",
            remedy="Send the study again, or from its original source.",
        )
    return value


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
