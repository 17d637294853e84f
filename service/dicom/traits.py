"""What the volumes of one series can differ in, read from single-frame headers and functional groups alike.

The names are those of :mod:`service.reading`. An enhanced object states most of them in macros of its own
(PS3.3 C.8.13.5, C.8.15.3), with other keywords for some; b-values of older single-frame images stand in
private elements of their vendors.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.dataset import Dataset

from service.dicom.elements import private_strings, real, string, strings
from service.dicom.frames import Frame
from service.reading import NAMED_TRAITS, NUMBERED_TRAITS, TIME_TRAITS

Trait = float | tuple[str, ...] | None
"""A number, or texts, or None where a frame does not state the attribute."""

_FRAME = "FrameContentSequence"

# Where each is found: (macro or "" for the top level, keyword), the first that is stated counts.
_SOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "EchoTime": (("MREchoSequence", "EffectiveEchoTime"), ("", "EchoTime")),
    "EchoNumbers": (("", "EchoNumbers"),),
    "InversionTime": (("MRModifierSequence", "InversionTimes"), ("", "InversionTime")),
    "RepetitionTime": (("MRTimingAndRelatedParametersSequence", "RepetitionTime"), ("", "RepetitionTime")),
    "FlipAngle": (("MRTimingAndRelatedParametersSequence", "FlipAngle"), ("", "FlipAngle")),
    "DiffusionBValue": (("MRDiffusionSequence", "DiffusionBValue"), ("", "DiffusionBValue")),
    "TemporalPositionIndex": ((_FRAME, "TemporalPositionIndex"), ("", "TemporalPositionIdentifier")),
    "TriggerTime": (
        ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
        ("", "TriggerTime"),
    ),
    "NominalPercentageOfCardiacPhase": (
        ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase"),
        ("", "NominalPercentageOfCardiacPhase"),
    ),
    "FrameReferenceTime": (("", "FrameReferenceTime"),),
    "KVP": (("CTXRayDetailsSequence", "KVP"), ("", "KVP")),
    "AcquisitionNumber": ((_FRAME, "FrameAcquisitionNumber"), ("", "AcquisitionNumber")),
    "AcquisitionTime": (
        (_FRAME, "FrameAcquisitionDateTime"),
        ("", "AcquisitionTime"),
        ("", "AcquisitionDateTime"),
    ),
    "ContentTime": (("", "ContentTime"),),
    "ImageType": (
        ("MRImageFrameTypeSequence", "FrameType"),
        ("CTImageFrameTypeSequence", "FrameType"),
        ("PETFrameTypeSequence", "FrameType"),
        ("", "ImageType"),
    ),
    "ComplexImageComponent": (
        ("MRImageFrameTypeSequence", "ComplexImageComponent"),
        ("", "ComplexImageComponent"),
    ),
    "ConvolutionKernel": (("CTReconstructionSequence", "ConvolutionKernel"), ("", "ConvolutionKernel")),
    "StackID": ((_FRAME, "StackID"),),
}
assert set(_SOURCES) == {*NUMBERED_TRAITS, *TIME_TRAITS, *NAMED_TRAITS}

# Where the date of a time of day is found, which goes in front of it: the first that is stated counts.
_DATES = {
    "AcquisitionTime": ("AcquisitionDate", "AcquisitionDateTime"),
    "ContentTime": ("ContentDate",),
}

# The first number of a private element: (group, element, creator). Siemens' and GE's conformance statements
# for MR name both; GE adds a thousand million to mark b-values of several directions.
_PRIVATE_B_VALUES = ((0x0019, 0x0C, "SIEMENS MR HEADER"), (0x0043, 0x39, "GEMS_PARM_01"))
_GE_MARK = 1e9


def trait(frame: Frame, name: str) -> Trait:
    """What a frame states of an attribute that tells volumes apart; a time with its date, as in a DT."""
    for macro, keyword in _SOURCES[name]:
        group = frame.group(macro) if macro else frame.instance.header
        value = _value(group, keyword, name) if group is not None else None
        if value is not None:
            return value
    return _private_b_value(frame.instance.header) if name == "DiffusionBValue" else None


def text_of(value: Trait) -> str:
    """How a message writes a value."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else "\\".join(value)


def differing_traits(frames: Sequence[Frame]) -> list[str]:
    """The attributes in which frames differ, in the order in which they are worth telling."""
    return [name for name in _SOURCES if len({trait(frame, name) for frame in frames}) > 1]


def _value(group: Dataset, keyword: str, name: str) -> Trait:
    if name in NUMBERED_TRAITS:
        return real(group, keyword)
    texts = tuple(text for text in strings(group, keyword) if text)
    if texts and keyword in _DATES:
        return (_date(group, keyword) + texts[0].replace(":", ""),)
    return texts or None


def _date(header: Dataset, keyword: str) -> str:
    """The date of a time of day as YYYYMMDD; empty where none is stated."""
    for source in _DATES[keyword]:
        stated = (string(header, source) or "").replace(".", "")[:8]  # dots are the form of ACR-NEMA
        if len(stated) == 8 and stated.isdecimal():
            return stated
    return ""


def _private_b_value(header: Dataset) -> float | None:
    for group, element, creator in _PRIVATE_B_VALUES:
        texts = private_strings(header, group, element, creator)
        try:
            value = float(texts[0]) if texts else None
        except ValueError:
            continue
        if value is not None:
            return value % _GE_MARK
    return None
