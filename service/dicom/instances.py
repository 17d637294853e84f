"""One DICOM file: its header in memory, its pixel data left on disk until they are wanted."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import (
    _read_file_meta_info,
    data_element_generator,
    read_dataset,
    read_preamble,
)
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from models.errors import ReasonCode, Refusal
from service.dicom.elements import PARSE_ERRORS, integer, quiet, uid

_PIXELS = (Tag("FloatPixelData"), Tag("DoubleFloatPixelData"), Tag("PixelData"))
# fmt: off
_WANTED = [Tag(keyword) for keyword in (
    # patient and study
    "SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName",
    # series and instance
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality",
    "Manufacturer",
    "ManufacturerModelName", "BodyPartExamined", "Laterality", "PatientPosition", "ProtocolName",
    "InstanceNumber",
    "ImageType", "FrameOfReferenceUID", "PositionReferenceIndicator", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod",
    # plane and pixels
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "NumberOfFrames",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "Rows", "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ConcatenationUID", "InConcatenationTotalNumber", "NumberOfSlices",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    # what tells volumes of one series apart
    "EchoTime", "EchoNumbers", "InversionTime", "RepetitionTime", "FlipAngle", "DiffusionBValue",
    "TemporalPositionIdentifier", "TriggerTime", "NominalPercentageOfCardiacPhase", "FrameReferenceTime",
    "KVP", "ComplexImageComponent",
    "AcquisitionNumber", "ConvolutionKernel", "AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime",
    "ContentDate", "ContentTime",
    "SeriesDate", "SeriesTime",
)]
_WANTED += [Tag(0x0019, 0x0010), Tag(0x0019, 0x100C), Tag(0x0043, 0x0010), Tag(0x0043, 0x1039)]  # b-values
# fmt: on
"""The elements that are kept. Vendors' private ones are most of a header and cost most of its reading."""

_RESEND = "Send the study again; if it fails once more, the images are damaged at their source."


@dataclass(frozen=True, eq=False)
class Instance:
    """A SOP instance whose header has been read.

    ``ordinal`` counts the given files from 1 and is what messages call it. ``pixels_at`` is the offset
    of the pixel data element in the file (in ``inflated`` where the file was deflated); None without one.
    """

    path: Path
    ordinal: int
    header: Dataset
    transfer_syntax: str
    pixels_at: int | None
    inflated: bytes | None = None

    @property
    def sop_instance_uid(self) -> str:
        return uid(self.header, "SOPInstanceUID") or ""

    @property
    def label(self) -> str:
        """How a message names this instance: by place and Instance Number, never by who is in it."""
        number = integer(self.header, "InstanceNumber")
        return f"image {self.ordinal}" + (f" (Instance Number {number})" if number is not None else "")

    def read_pixel_element(self) -> tuple[bytes, str | None]:
        """The value of Pixel Data (native samples, or the encapsulated stream) and its VR.

        Raises
        ------
        Refusal
            UNREADABLE where the element cannot be read.
        """
        assert self.pixels_at is not None, "this instance has no pixel data"
        # As the header was found to be written. To guess it anew here would fail: in implicit VR the length
        # of the pixels stands where an explicit VR has its two letters, and some lengths look like letters.
        implicit, little = self.header.original_encoding
        try:
            with _opened(self.path, self.inflated) as stream, quiet():
                stream.seek(self.pixels_at)
                for element in data_element_generator(
                    stream, bool(implicit), bool(little), stop_when=_after_pixels
                ):
                    if element.tag == _PIXELS[-1] and isinstance(element.value, bytes):
                        return element.value, element.VR
        except PARSE_ERRORS as error:
            raise _unreadable(self.label) from error
        raise _unreadable(self.label)


def read_instance(path: Path, ordinal: int, *, limit_bytes: int) -> Instance:
    """Read a file's header up to its pixel data.

    Parameters
    ----------
    limit_bytes : int
        Largest size that a deflated data set may have once inflated.

    Raises
    ------
    Refusal
        UNREADABLE where it is not a DICOM file or is cut short; TOO_LARGE for a deflated bomb.
    """
    try:
        with path.open("rb") as file, quiet():
            read_preamble(file, force=False)
            syntax = uid(_read_file_meta_info(file), "TransferSyntaxUID") or ""
            if not syntax:
                raise InvalidDicomError("no transfer syntax")
            inflated = None
            stream: BinaryIO = file
            if syntax == DeflatedExplicitVRLittleEndian:
                inflated = _inflate(file, ordinal, limit_bytes)
                stream = io.BytesIO(inflated)
            header = read_dataset(
                stream,
                is_implicit_VR=syntax == ImplicitVRLittleEndian,
                is_little_endian=syntax != ExplicitVRBigEndian,
                stop_when=_at_pixels,
                specific_tags=_WANTED,
            )
            offset = stream.tell()
            has_pixels = len(stream.read(4)) == 4  # the reader stopped there, or at the end of the file
            return Instance(path, ordinal, header, syntax, offset if has_pixels else None, inflated)
    except PARSE_ERRORS as error:
        raise _unreadable(f"image {ordinal}") from error


def _opened(path: Path, inflated: bytes | None) -> BinaryIO:
    return path.open("rb") if inflated is None else io.BytesIO(inflated)


def _inflate(file: BinaryIO, ordinal: int, limit_bytes: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    out = inflater.decompress(file.read(), limit_bytes + 1)
    if len(out) > limit_bytes:
        raise Refusal(
            ReasonCode.TOO_LARGE,
            f"The deflated image {ordinal} inflates to more than {limit_bytes / 1e6:.0f} MB.",
            remedy="Send the study uncompressed, or raise the limit if images of this size are expected.",
        )
    return out


def _at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag in _PIXELS


def _after_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
    return bool(tag > _PIXELS[-1])


def _unreadable(label: str) -> Refusal:
    sentence = f"{label[0].upper()}{label[1:]} cannot be read as DICOM: it is damaged or cut short."
    return Refusal(ReasonCode.UNREADABLE, sentence, remedy=_RESEND)
