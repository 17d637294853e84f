"""Whose images these are: read once from the source, compared, and written unchanged into what leaves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from models.errors import ReasonCode, Refusal
from service.dicom.elements import string, text, uid

_TEXTS = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyID",
    "StudyDescription",
)
_DATES = ("PatientBirthDate", "StudyDate")
_COMPARED = ("StudyInstanceUID", "PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate")

_DATE = re.compile(r"(?:\d{4}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))")
_TIME = re.compile(r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:(?:[0-5]\d|60)(?:\.\d{1,6})?)?)?")

_REMEDY = "Correct the identifiers at the modality or in the PACS, then send the study again."


@dataclass(frozen=True)
class Identity:
    """Patient and study of a series, with every value kept out of ``repr``.

    Texts are decoded; :meth:`write` stores them as UTF-8. Values that break their VR are kept where they
    identify (a shortened identifier is another patient's), and left empty where they only describe.
    """

    study_instance_uid: str
    patient_id: str = field(repr=False)
    elements: dict[str, str] = field(repr=False)

    @staticmethod
    def read(header: Dataset) -> Identity:
        """Take patient and study from a header; nothing is checked yet."""
        elements = {keyword: text(header, keyword)[0] for keyword in _TEXTS}
        for keyword in _DATES:
            value = string(header, keyword) or ""
            elements[keyword] = value if _DATE.fullmatch(value) else ""
        time = string(header, "StudyTime") or ""
        elements["StudyTime"] = time if _TIME.fullmatch(time) else ""
        sex = string(header, "PatientSex") or ""
        elements["PatientSex"] = sex if sex in ("M", "F", "O") else ""
        elements["StudyInstanceUID"] = uid(header, "StudyInstanceUID") or ""
        if not (text(header, "PatientID")[1] and text(header, "IssuerOfPatientID")[1]):
            elements["PatientID"] = ""  # bytes that no declared character set explains identify nobody
        return Identity(elements["StudyInstanceUID"], elements["PatientID"], elements)

    @property
    def missing(self) -> tuple[str, ...]:
        """Keywords of the identifiers without which no result can be filed."""
        return tuple(k for k in ("StudyInstanceUID", "PatientID") if not self.elements[k])

    def write(self, dataset: Dataset) -> None:
        """Put patient and study into a derived object, in UTF-8 (ISO_IR 192)."""
        dataset.SpecificCharacterSet = "ISO_IR 192"
        for keyword, value in self.elements.items():
            if value or keyword not in ("IssuerOfPatientID", "StudyDescription"):  # those two are type 3
                setattr(dataset, keyword, value)

    def require_whole(self) -> None:
        """Raise unless patient and study can be told.

        Raises
        ------
        Refusal
            IDENTITY_MISSING.
        """
        if self.missing:
            raise Refusal(
                ReasonCode.IDENTITY_MISSING,
                f"The images have no usable {' and no usable '.join(self.missing)}.",
                remedy=_REMEDY,
            )


def common_identity(headers: Sequence[Dataset]) -> Identity:
    """The one identity of all headers.

    Raises
    ------
    Refusal
        IDENTITY_CONFLICT where headers name different patients or studies.
    """
    identities = [Identity.read(header) for header in headers]
    for keyword in _COMPARED:
        values = {_comparable(keyword, identity.elements[keyword]) for identity in identities}
        if len(values) > 1:
            raise Refusal(
                ReasonCode.IDENTITY_CONFLICT,
                f"The {len(headers)} images hold {len(values)} different values of {keyword}.",
                remedy=_REMEDY,
            )
    return identities[0]


def _comparable(keyword: str, value: str) -> str:
    """Names that differ in case, padding or trailing delimiters are one name (PS3.5 section 6.2)."""
    return value.rstrip("^= ").casefold() if keyword == "PatientName" else value
