"""Which instances of a series are its images, and which are passed over or stand in the way."""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

from models.errors import ReasonCode, Refusal
from service.dicom.elements import integer, string, strings, uid
from service.dicom.frames import has_plane
from service.dicom.instances import Instance

_DERIVED = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.66.4",  # Segmentation
        "1.2.840.10008.5.1.4.1.1.66.7",  # Label Map Segmentation
        "1.2.840.10008.5.1.4.1.1.30",  # Parametric Map
        "1.2.840.10008.5.1.4.1.1.481.2",  # RT Dose
    }
)
"""Objects that have pixels and a plane, and are nevertheless no images of the series."""

_PET = "1.2.840.10008.5.1.4.1.1.128"

_PLANAR = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.2",  # CT
        "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
        "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
        "1.2.840.10008.5.1.4.1.1.4",  # MR
        "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
        "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
        _PET,
        "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
        "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    }
)
"""Classes whose every instance must state its plane: one that does not may not be passed over."""


def images_of(
    instances: list[Instance], *, non_image: Literal["ignore", "refuse"], warnings: list[str]
) -> list[Instance]:
    """The instances that are images of the patient; the others are passed over with a warning.

    Raises
    ------
    Refusal
        NOT_A_VOLUME where an image states no place or none is left; UNREADABLE without pixels.
    """
    images, others = [], []
    for instance in instances:
        sop_class = string(instance.header, "SOPClassUID") or ""
        planar = has_plane(instance.header)
        says_nothing = not sop_class and instance.pixels_at is None
        if sop_class in _DERIVED or not (sop_class in _PLANAR or planar or says_nothing):
            others.append(instance)
        elif not planar and _is_localizer(instance):
            others.append(instance)  # a scout without an orientation, beside slices that have one
        elif instance.pixels_at is None:
            raise Refusal(
                ReasonCode.UNREADABLE,
                f"{_upper(instance.label)} has no pixel data: it is damaged or cut short.",
                remedy="Send the study again; if it fails once more, the image is damaged at its source.",
            )
        elif not planar:
            raise Refusal(
                ReasonCode.NOT_A_VOLUME,
                f"{_upper(instance.label)} does not state its place in the patient.",
                remedy="Route a series that holds one stack of parallel slices.",
            )
        else:
            images.append(instance)
    if others and (non_image == "refuse" or not images):
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{len(others)} of {len(instances)} objects hold no plane of the patient.",
            remedy="Route a series that holds one stack of parallel slices.",
        )
    if others:
        warnings.append(f"Left out: {len(others)} of {len(instances)} objects, which hold no plane.")
    return images


def without_copies(images: list[Instance], warnings: list[str]) -> list[Instance]:
    """Drop files that repeat an instance.

    Raises
    ------
    Refusal
        IDENTITY_CONFLICT for different images with one SOP Instance UID.
    """
    first: dict[str, Instance] = {}
    kept = []
    for image in images:
        named = image.sop_instance_uid
        earlier = first.setdefault(named, image) if named else image
        if earlier is image:
            kept.append(image)
        elif _content(earlier) != _content(image):
            raise Refusal(
                ReasonCode.IDENTITY_CONFLICT,
                f"{_upper(earlier.label)} and {image.label} have the same SOP Instance UID, "
                "but are different images.",
                remedy="Send the study again from its original source.",
            )
    if len(kept) < len(images):
        warnings.append(f"Left out: {len(images) - len(kept)} files that repeat another image.")
    return kept


def _content(image: Instance) -> tuple[object, ...]:
    place = (strings(image.header, k) for k in ("ImagePositionPatient", "ImageOrientationPatient"))
    return (*(tuple(p) for p in place), sha256(image.read_pixel_element()[0]).digest())


def without_localizers(images: list[Instance], warnings: list[str]) -> list[Instance]:
    """Drop scout images that a scanner stored inside the series of its slices."""
    scouts = [image for image in images if _is_localizer(image)]
    if not scouts or len(scouts) == len(images):
        return images
    warnings.append(f"Left out: {len(scouts)} of {len(images)} images, which are localizers.")
    return [image for image in images if image not in scouts]


def _is_localizer(image: Instance) -> bool:
    return "LOCALIZER" in strings(image.header, "ImageType")


def refuse_mosaics(images: list[Instance]) -> None:
    """Raise Refusal (NOT_A_VOLUME) for images that tile many slices into one plane, as Siemens' do."""
    mosaics = sum("MOSAIC" in strings(image.header, "ImageType") for image in images)
    if mosaics:
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"{mosaics} of {len(images)} images are mosaics that tile many slices into one plane.",
            remedy="Send the series as enhanced multi-frame or as single slices.",
        )


def refuse_incomplete(images: list[Instance]) -> None:
    """Raise Refusal (MISSING_SLICE) where the images say themselves that some of them are not here.

    Slices that are missing between others are seen by their places. Those at an end are not, but two kinds
    of objects count themselves: parts of a concatenation (PS3.3 C.7.6.16.1) and PET (PS3.3 C.8.9.1, Number
    of Slices).
    """
    concatenations: dict[str, list[Instance]] = {}
    for image in images:
        if concatenation := uid(image.header, "ConcatenationUID"):
            concatenations.setdefault(concatenation, []).append(image)
    for parts in concatenations.values():
        total = max(integer(part.header, "InConcatenationTotalNumber") or 0 for part in parts)
        if len(parts) < total:
            raise _incomplete(f"{len(parts)} of the {total} parts of a multi-frame object have come.")
    counts = {integer(image.header, "NumberOfSlices") or 0 for image in images}
    is_pet = {string(image.header, "SOPClassUID") for image in images} == {_PET}
    if is_pet and len(images) < max(counts):
        raise _incomplete(f"{len(images)} of the {max(counts)} slices of a PET series have come.")


def _incomplete(sentence: str) -> Refusal:
    return Refusal(ReasonCode.MISSING_SLICE, sentence, remedy="Send the whole series again.")


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
