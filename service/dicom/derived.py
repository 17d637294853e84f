"""What every object that leaves the node has in common: whose it is, when, made by what, from what.

No clock is read and no random UID drawn: two builds of the same object are byte-identical.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as version_of
from pathlib import Path

from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.coding import Code
from pydicom.uid import MRImageStorage

from models.manifest import Label, Laterality, Manifest
from service.dicom.coding import LONGEST_TEXT, code_sequence, decimal_strings
from service.dicom.elements import string
from service.dicom.identifiers import derived_uid
from service.dicom.identity import Identity
from service.dicom.series import SourceSeries

LATERALITY = {
    Laterality.LEFT: Code("7771000", "SCT", "Left"),
    Laterality.RIGHT: Code("24028007", "SCT", "Right"),
    Laterality.BOTH: Code("51440002", "SCT", "Right and left"),
}
_CODE_STRING = re.compile(r"[A-Z0-9_ ]{1,16}")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
_PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")


@dataclass(frozen=True)
class Making:
    """How one object comes to be.

    Parameters
    ----------
    sop_instance_uid, series_instance_uid : str
        UIDs of the new object; inner UIDs are derived from the first.
    content_datetime : datetime
        When the job came into being, by its row in the records.
    model_digest : str
        SHA-256 of the bundle, 64 hexadecimal digits; empty where no model has run.
    software : str
        Version of segnode.
    device_serial_number : str
        Name of the node.
    """

    sop_instance_uid: str
    series_instance_uid: str
    content_datetime: datetime
    model_digest: str = ""
    software: str = ""
    device_serial_number: str = "segnode"

    @property
    def software_version(self) -> str:
        return (self.software or version_of("segnode"))[:LONGEST_TEXT]


@dataclass(frozen=True)
class Reference:
    """A SOP instance that an object refers to."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str

    def item(self) -> Dataset:
        """As an item of a sequence of SOP Instance References (PS3.3 table 10-11)."""
        item = Dataset()
        item.ReferencedSOPClassUID = self.sop_class_uid
        item.ReferencedSOPInstanceUID = self.sop_instance_uid
        return item


def references_of(source: SourceSeries) -> tuple[Reference, ...]:
    """Every instance of a series, in the order of its headers."""
    return tuple(
        Reference(string(header, "SOPClassUID") or "", sop_instance_uid, source.series_instance_uid)
        for header, sop_instance_uid in zip(source.headers, source.sop_instance_uids, strict=True)
    )


def evidence(identity: Identity, references: Iterable[Reference]) -> list[Dataset]:
    """What highdicom wants to see of instances that a report refers to: whose they are, and their UIDs."""
    found = []
    for reference in references:
        header = Dataset()
        identity.write(header)
        header.SOPClassUID = reference.sop_class_uid
        header.SOPInstanceUID = reference.sop_instance_uid
        header.SeriesInstanceUID = reference.series_instance_uid
        found.append(header)
    return found


def plane_header(source: SourceSeries, z: int) -> Dataset:
    """What highdicom reads of a source image, and nothing that a vendor may have got wrong."""
    index, _ = source.frame_numbers[z]
    header = Dataset()
    source.identity.write(header)
    header.SOPClassUID = MRImageStorage  # any single-frame class: all references are written anew
    header.SOPInstanceUID = source.sop_instance_uids[index]
    header.SeriesInstanceUID = source.series_instance_uid
    header.Modality = source.modality
    header.FrameOfReferenceUID = source.frame_of_reference_uid
    header.PositionReferenceIndicator = None
    header.Rows, header.Columns = source.volume.shape_zyx[1:]
    header.ImagePositionPatient = decimal_strings(source.positions_mm[z])
    header.ImageOrientationPatient = decimal_strings(source.orientation)
    header.PixelSpacing = decimal_strings(source.pixel_spacing_mm)
    header.SliceThickness = decimal_strings([source.slice_spacing_mm])[0]
    return header


def set_identity(dataset: Dataset, identity: Identity, headers: Sequence[Dataset]) -> None:
    """Patient, study and body part, as the source has them."""
    identity.write(dataset)
    body_part = string(headers[0], "BodyPartExamined")
    if body_part is not None and _CODE_STRING.fullmatch(body_part):
        dataset.BodyPartExamined = body_part


def set_dates(dataset: Dataset, moment: datetime) -> None:
    date, time = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S.%f")
    for keyword in ("InstanceCreation", "Content", "Series"):
        setattr(dataset, f"{keyword}Date", date)
        setattr(dataset, f"{keyword}Time", time)


def set_implementation(dataset: Dataset, making: Making) -> None:
    meta = dataset.file_meta
    meta.ImplementationClassUID = derived_uid("implementation", name="segnode")
    meta.ImplementationVersionName = f"SEGNODE {making.software_version}"[:16]


def set_device(dataset: Dataset, making: Making) -> None:
    """The Enhanced General Equipment Module (PS3.3 C.7.5.2)."""
    dataset.Manufacturer = dataset.ManufacturerModelName = "segnode"
    dataset.SoftwareVersions = making.software_version
    dataset.DeviceSerialNumber = making.device_serial_number[:LONGEST_TEXT]


def set_equipment(dataset: Dataset, making: Making, manifest: Manifest | None) -> None:
    """Which weights made this: the digest stands alone in Software Versions, 64 characters of 64."""
    equipment = []
    if manifest is not None:
        assert len(making.model_digest) == LONGEST_TEXT, "a model digest is 64 hexadecimal digits"
        weights = Dataset()
        weights.Manufacturer = "segnode"
        weights.ManufacturerModelName = f"{manifest.name} {manifest.version}"[:LONGEST_TEXT]
        weights.SoftwareVersions = making.model_digest
        weights.ContributionDateTime = making.content_datetime.strftime("%Y%m%d%H%M%S.%f")
        weights.ContributionDescription = "Model; the software version is the SHA-256 of its bundle"
        equipment.append(weights)
    library = Dataset()
    library.Manufacturer = "Highdicom open-source contributors"
    library.ManufacturerModelName = "highdicom"
    library.SoftwareVersions = version_of("highdicom")
    library.ContributionDescription = "Software library used to create this instance"
    equipment.append(library)
    for item in equipment:
        item.PurposeOfReferenceCodeSequence = code_sequence(_PROCESSING_EQUIPMENT)
    dataset.ContributingEquipmentSequence = DicomSequence(equipment)


def set_lossy(dataset: Dataset, source: SourceSeries) -> None:
    """Whether the source was compressed with loss, and how (PS3.3 C.7.6.1.1.5)."""
    dataset.LossyImageCompression = "01" if source.lossy else "00"
    if source.lossy:
        dataset.LossyImageCompressionRatio = source.lossy_ratio
        dataset.LossyImageCompressionMethod = source.lossy_method


def unverified(text: str) -> str:
    """A Series Description that says what this is before anything else."""
    return f"AI, unverified: {text}"[:LONGEST_TEXT]


def type_code(label: Label) -> Code:
    return Code(label.type.value, label.type.scheme, label.type.meaning)


def category_code(label: Label) -> Code:
    return Code(label.category.value, label.category.scheme, label.category.meaning)


def write_object(dataset: Dataset, path: Path) -> Path:
    """Write a Part 10 file that is on the disk when this returns, and whole or not there at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # two workers may make the same
    with temporary.open("wb") as file:
        dcmwrite(file, dataset, enforce_file_format=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path
