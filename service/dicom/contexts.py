"""Which SOP classes and transfer syntaxes the node takes: every storage class, every encoding of a file.

A PACS routes whole studies and tries for ever to deliver what a context was refused for. So nothing that
could be part of a study is refused here: what the node has no use for is stored, recorded, and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.uid import UID, AllTransferSyntaxes, UID_dictionary
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import Verification

STORAGE_SERVICE_CLASS = "1.2.840.10008.4.2"

IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1.99"
DEFLATED = frozenset(
    {DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
)
NATIVE = frozenset(
    {
        IMPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_BIG_ENDIAN,
        DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    }
)

_STANDARD_ROOT = "1.2.840.10008."
_STORAGE_ARC = "1.2.840.10008.5.1.4.1.1."
# PS3.4 Annex GG: objects that belong to no patient and no study.
_NON_PATIENT = (
    "1.2.840.10008.5.1.4.1.1.200.1",
    "1.2.840.10008.5.1.4.1.1.200.3",
    "1.2.840.10008.5.1.4.1.1.200.7",
    "1.2.840.10008.5.1.4.1.1.201.1",
    "1.2.840.10008.5.1.4.38.1",
    "1.2.840.10008.5.1.4.39.1",
    "1.2.840.10008.5.1.4.43.1",
    "1.2.840.10008.5.1.4.44.1",
    "1.2.840.10008.5.1.4.45.1",
)

# Where a peer offers several encodings in one context, the first of these is taken: uncompressed never
# loses anything and needs no codec; then what is lossless; lossy and the rest only where nothing else is
# offered.
_PREFERRED = (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, selection value 1
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202",
    "1.2.840.10008.1.2.5",  # RLE
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
)
# Not encodings of a file in the DICOM file format: MIME, XML, Papyrus, and live streams (SMPTE ST 2110).
_NOT_FILES = ("1.2.840.10008.1.2.6.", "1.2.840.10008.1.2.7.", "1.2.840.10008.1.20")

TRANSFER_SYNTAXES: tuple[str, ...] = (
    *_PREFERRED,
    *(
        str(uid)
        for uid in AllTransferSyntaxes
        if uid not in _PREFERRED and not str(uid).startswith(_NOT_FILES)
    ),
)


def is_storage_class(sop_class_uid: str) -> bool:
    """True for every class of objects that a study may hold, private and future ones too."""
    if sop_class_uid in _NON_PATIENT:
        return False
    if sop_class_uid.startswith(_STORAGE_ARC) or not sop_class_uid.startswith(_STANDARD_ROOT):
        return True
    name, kind, *_ = UID_dictionary.get(sop_class_uid, ("", ""))
    return kind == "SOP Class" and "Storage" in name and "Commitment" not in name and "Directory" not in name


def is_image_class(sop_class_uid: str) -> bool:
    """True for the standard's image classes; a segmentation, a dose, a report or a private object is none."""
    name, kind, *_ = UID_dictionary.get(sop_class_uid, ("", ""))
    return kind == "SOP Class" and "Image Storage" in name


def acceptable_contexts(proposed: Iterable[PresentationContext]) -> list[PresentationContext]:
    """What to accept of the contexts that a peer proposes: storage and verification."""
    classes = {str(context.abstract_syntax) for context in proposed}
    contexts = [build_context(c, list(TRANSFER_SYNTAXES)) for c in sorted(classes) if is_storage_class(c)]
    return [*contexts, verification_context()]


def verification_context() -> PresentationContext:
    """C-ECHO, in the transfer syntaxes that it may have."""
    return build_context(Verification, [IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN])


def is_encapsulated(transfer_syntax_uid: str) -> bool:
    """True if Pixel Data is compressed, so that the file can only be sent as it is."""
    return UID(transfer_syntax_uid) not in NATIVE
