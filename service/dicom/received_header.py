"""What the receiver must know of an object before it answers: its identifiers, its kind, whose it is."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from typing import BinaryIO

from pydicom.charset import decode_bytes, python_encoding

from service.dicom.contexts import is_image_class
from service.dicom.element_scan import UnreadableDataSetError, scan
from service.records.tables import InstanceKind

_CHARACTER_SET = 0x00080005
_SOP_CLASS = 0x00080016
_SOP_INSTANCE = 0x00080018
_MODALITY = 0x00080060
_PATIENT_NAME = 0x00100010
_PATIENT_ID = 0x00100020
_ISSUER_OF_PATIENT_ID = 0x00100021
_BIRTH_DATE = 0x00100030
_STUDY_INSTANCE = 0x0020000D
_SERIES_INSTANCE = 0x0020000E
_WANTED = frozenset(
    {
        _CHARACTER_SET,
        _SOP_CLASS,
        _SOP_INSTANCE,
        _MODALITY,
        _PATIENT_NAME,
        _PATIENT_ID,
        _ISSUER_OF_PATIENT_ID,
        _BIRTH_DATE,
        _STUDY_INSTANCE,
        _SERIES_INSTANCE,
    }
)

# PS3.5 section 9.1, but for leading zeros in a component, which are wrong, common, and harm nobody here.
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_PN_DELIMITERS = {0x5E, 0x3D, 0x5C}
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]+")


def is_uid(text: str) -> bool:
    """True for 1 to 64 characters, digits in groups with dots between them."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


@dataclass(frozen=True)
class ReceivedHeader:
    """The identifiers of a received object. Nothing that names the patient is in its ``repr``.

    ``identity_digest`` is the SHA-256 of patient and study: of PatientID, its issuer, PatientName,
    PatientBirthDate and StudyInstanceUID, each decoded and normalised, so that an archive that changes the
    character set, the case or the padding on the way does not make another patient of this one.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str | None
    kind: InstanceKind
    patient_id: str | None = field(repr=False)
    identity_digest: str


def read_received_header(stream: BinaryIO, transfer_syntax_uid: str) -> ReceivedHeader:
    """Read the header of a data set; the stream stands at its first byte. Pixel Data is not looked at.

    A study without PatientID is read like any other: whether a result can be filed is asked later.

    Raises
    ------
    UnreadableDataSetError
        If the data set cannot be walked, or lacks one of the identifiers that every object has.
    """
    found = scan(stream, transfer_syntax_uid, _WANTED, last_tag=_SERIES_INSTANCE)
    uids = {
        name: _uid(found, tag, name)
        for name, tag in (
            ("SOPClassUID", _SOP_CLASS),
            ("SOPInstanceUID", _SOP_INSTANCE),
            ("StudyInstanceUID", _STUDY_INSTANCE),
            ("SeriesInstanceUID", _SERIES_INSTANCE),
        )
    }
    encodings = _encodings(found.get(_CHARACTER_SET, b""))
    patient_id = _text(found.get(_PATIENT_ID, b""), encodings)
    whose = [
        patient_id,
        _text(found.get(_ISSUER_OF_PATIENT_ID, b""), encodings),
        _name(found.get(_PATIENT_NAME, b""), encodings),
        _text(found.get(_BIRTH_DATE, b""), ["ascii"]),
        uids["StudyInstanceUID"],
    ]
    return ReceivedHeader(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_instance_uid=uids["StudyInstanceUID"],
        series_instance_uid=uids["SeriesInstanceUID"],
        modality=_text(found.get(_MODALITY, b""), ["ascii"])[:16] or None,
        kind=InstanceKind.IMAGE if is_image_class(uids["SOPClassUID"]) else InstanceKind.OTHER,
        # The column has the 64 characters that the VR allows; the digest is of all that was sent.
        patient_id=patient_id[:64] or None,
        identity_digest=hashlib.sha256(json.dumps(whose).encode()).hexdigest(),
    )


def _uid(found: dict[int, bytes], tag: int, name: str) -> str:
    text = found.get(tag, b"").decode("ascii", errors="replace").strip("\x00 ")
    if not text:
        raise UnreadableDataSetError(f"The object has no {name}.", remedy="Repair it at its source.")
    if not is_uid(text):
        raise UnreadableDataSetError(f"The object's {name} is not a UID.", remedy="Repair it at its source.")
    return text


def _encodings(character_set: bytes) -> list[str]:
    """Python's names for SpecificCharacterSet; what is not known is read as Latin-1, which never fails."""
    terms = character_set.decode("ascii", errors="replace").strip("\x00 ").split("\\")
    encodings = [python_encoding.get(term.strip()) for term in terms]
    return [encoding for encoding in encodings if encoding is not None] or ["latin_1"]


def _text(value: bytes, encodings: list[str], delimiters: set[int] | None = None) -> str:
    """Decode a value, replacing what its character set does not hold: this must never fail."""
    try:
        if len(encodings) == 1 and b"\x1b" not in value:
            text = value.decode(encodings[0], errors="replace")
        else:
            text = decode_bytes(value, encodings, delimiters or set())
    except (LookupError, ValueError, Warning):  # an escape sequence to a character set nobody knows
        text = value.decode("latin_1")
    return unicodedata.normalize("NFC", _UNPRINTABLE.sub(" ", text)).strip()


def _name(value: bytes, encodings: list[str]) -> str:
    """The alphabetic group of a person's name, without case and trailing delimiters (PS3.5 section 6.2)."""
    alphabetic = _text(value, encodings, _PN_DELIMITERS).split("=")[0]
    return "^".join(" ".join(part.split()) for part in alphabetic.split("^")).rstrip("^ ").casefold()
