"""Why there is no result, as a small object that lies beside the images: an Enhanced SR document.

Its Series Description alone says it, so that a list of series is enough to see it. No model has written
into it, and nothing in it depends on the pixels: patient and study come from the headers, which all have to
agree, and the sentence from the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from models.errors import ReasonCode, Refusal
from service.dicom.coding import LONGEST_TEXT
from service.dicom.derived import Making, Reference
from service.dicom.elements import string, uid
from service.dicom.identity import Identity, common_identity
from service.dicom.instances import read_instance
from service.dicom.measurements import make_document, observer

SERIES_NUMBER = 903
_LIMIT_BYTES = 64 * 1024**2  # of a deflated header once inflated
_REPORT = Code("18748-4", "LN", "Diagnostic imaging report")
_FINDING = Code("121071", "DCM", "Finding")
_COMMENT = Code("121106", "DCM", "Comment")


class RefusedImages:
    """Whose images were refused, and which they are: read from their headers.

    Parameters
    ----------
    paths : sequence of Path
        The files of a refused job. Those that cannot be read are passed over.

    Raises
    ------
    Refusal
        IDENTITY_MISSING or IDENTITY_CONFLICT where it cannot be told, of all that can be read, whose they
        are; UNREADABLE where nothing can be read. Nothing may leave then.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        headers = [header for path in paths if (header := _header(path)) is not None]
        if not headers:
            raise Refusal(
                ReasonCode.UNREADABLE,
                "Nothing of the input can be read.",
                remedy="Send the study again from its original source.",
            )
        self.identity: Identity = common_identity(headers)
        self.identity.require_whole()
        found = (
            Reference(
                string(header, "SOPClassUID") or "",
                uid(header, "SOPInstanceUID") or "",
                uid(header, "SeriesInstanceUID") or "",
            )
            for header in headers
        )
        self.references: tuple[Reference, ...] = tuple(
            dict.fromkeys(each for each in found if all(vars(each).values()))
        )
        if not self.references:
            raise Refusal(
                ReasonCode.IDENTITY_MISSING,
                "None of the images has all of its UIDs.",
                remedy="Send the study again from its original source.",
            )


def headline(reason: str) -> str:
    """What a list of series shows: at most 64 characters, cut at a word."""
    sentence = reason.strip().rstrip(".")
    if not sentence[1:2].isupper():  # MR stays MR
        sentence = sentence[:1].lower() + sentence[1:]
    text = f"Not segmented: {sentence}"
    if len(text) <= LONGEST_TEXT:
        return text
    return text[: LONGEST_TEXT - 2].rsplit(" ", 1)[0] + "..."


def build_refusal(images: RefusedImages, making: Making, *, code: str, reason: str, remedy: str) -> Dataset:
    """The object that says that, and why, there is no segmentation.

    Parameters
    ----------
    images : RefusedImages
        What was refused.
    making : Making
        UIDs and time.
    code, reason, remedy : str
        As the records keep them: reason code, sentence with figures, and what a person should do.

    Returns
    -------
    Dataset
        With ``file_meta``, in explicit VR little endian.
    """
    root = sr.ContainerContentItem(name=_REPORT)
    root.ContentSequence = sr.ContentSequence()
    root.ContentSequence.extend(sr.ObservationContext(observer_device_context=observer(making, None)))
    sentences = [(_FINDING, f"Not segmented ({code}): {reason}")]
    if remedy:
        sentences.append((_COMMENT, remedy))
    root.ContentSequence.extend(
        sr.TextContentItem(name=name, value=text, relationship_type=sr.RelationshipTypeValues.CONTAINS)
        for name, text in sentences
    )
    return make_document(
        images.identity,
        images.references,
        sr.ContentSequence([root], is_root=True),
        making,
        None,
        description=headline(reason),
        series_number=SERIES_NUMBER,
    )


def _header(path: Path) -> Dataset | None:
    try:
        return read_instance(path, 1, limit_bytes=_LIMIT_BYTES).header
    except Refusal:
        return None  # damaged: whose it is was told when it was received
