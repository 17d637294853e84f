"""The header scan: as pydicom reads it where the data set is sound, bounded and clear where it is not."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from dicom_peer import data_set_of, encode, make_object
from hypothesis import given, settings
from hypothesis import strategies as st
from phantom import write_classic_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from service.dicom.contexts import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from service.dicom.element_scan import UnreadableDataSetError, scan
from service.dicom.received_header import ReceivedHeader, is_uid, read_received_header
from service.records.tables import InstanceKind

_SERIES = 0x0020000E
_PATIENT_ID = 0x00100020


def header_of(dataset: Dataset) -> ReceivedHeader:
    syntax = dataset.file_meta.TransferSyntaxUID
    return read_received_header(BytesIO(encode(dataset)), syntax)


def _deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


@pytest.mark.parametrize(
    "syntax", [IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN]
)
@pytest.mark.parametrize("undefined_length", [False, True])
def test_nested_sequences_are_stepped_over(syntax: str, undefined_length: bool) -> None:
    inner = Dataset()
    inner.ReferencedSOPInstanceUID = "1.2.3"
    middle = Dataset()
    middle.PatientID = "NOT THIS ONE"
    middle.ReferencedImageSequence = Sequence([inner, Dataset()])
    dataset = make_object(ReferencedStudySequence=Sequence([middle]), SourceImageSequence=Sequence([]))
    for sequence in (dataset["ReferencedStudySequence"], middle["ReferencedImageSequence"]):
        sequence.is_undefined_length = undefined_length
    for item in (middle, inner):
        item.is_undefined_length_sequence_item = undefined_length
    dataset.file_meta.TransferSyntaxUID = {
        IMPLICIT_VR_LITTLE_ENDIAN: ImplicitVRLittleEndian,
        EXPLICIT_VR_BIG_ENDIAN: ExplicitVRBigEndian,
    }.get(syntax, dataset.file_meta.TransferSyntaxUID)
    dataset.PixelData = None
    found = scan(BytesIO(encode(dataset)), syntax, {_PATIENT_ID, _SERIES}, last_tag=_SERIES)
    assert found == {_PATIENT_ID: b"P-0815", _SERIES: b"2.25.2"}


def test_unknown_vr_of_undefined_length_is_implicit_inside() -> None:
    def tag(group: int, element: int) -> bytes:
        return struct.pack("<HH", group, element)

    item = tag(0x0010, 0x0020) + struct.pack("<L", 4) + b"ABCD"  # implicit VR
    unknown = tag(0x0009, 0x1001) + b"UN\0\0" + b"\xff" * 4
    unknown += tag(0xFFFE, 0xE000) + b"\xff" * 4 + item + tag(0xFFFE, 0xE00D) + b"\0" * 4
    unknown += tag(0xFFFE, 0xE0DD) + b"\0" * 4
    wanted = tag(0x0010, 0x0020) + b"LO\x02\0" + b"ME"
    found = scan(BytesIO(unknown + wanted), EXPLICIT_VR_LITTLE_ENDIAN, {_PATIENT_ID}, last_tag=_SERIES)
    assert found == {_PATIENT_ID: b"ME"}


def test_a_writer_that_falls_into_implicit_vr_is_followed() -> None:
    data = struct.pack("<HHL", 0x0010, 0x0020, 2) + b"ME"
    assert scan(BytesIO(data), EXPLICIT_VR_LITTLE_ENDIAN, {_PATIENT_ID}, last_tag=_SERIES) == {
        _PATIENT_ID: b"ME"
    }


def test_real_files_are_read_as_pydicom_reads_them(shared_data: Path) -> None:
    paths = sorted((shared_data / "dicom_edge_cases").rglob("*.dcm"))[:120]
    assert len(paths) > 50
    for path in paths:
        dataset = dcmread(path, stop_before_pixels=True)
        header = read_received_header(
            BytesIO(data_set_of(path.read_bytes())), dataset.file_meta.TransferSyntaxUID
        )
        assert header.sop_class_uid == dataset.SOPClassUID
        assert header.sop_instance_uid == dataset.SOPInstanceUID
        assert header.study_instance_uid == dataset.StudyInstanceUID
        assert header.series_instance_uid == dataset.SeriesInstanceUID
        assert header.modality == dataset.Modality
        assert header.patient_id == (dataset.PatientID.strip() or None)


def test_pixel_data_is_never_read(tmp_path: Path) -> None:
    (path,) = write_classic_series(tmp_path, np.zeros((1, 64, 64), np.int16), np.eye(4))
    data = data_set_of(path.read_bytes())

    class Watched(BytesIO):
        furthest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            result = super().read(size)
            Watched.furthest = max(Watched.furthest, self.tell())
            return result

    read_received_header(Watched(data), EXPLICIT_VR_LITTLE_ENDIAN)
    assert Watched.furthest < len(data) - 64 * 64 * 2


@pytest.mark.parametrize("length", [1, 7, 20, 50, 100, 150])
def test_a_truncated_header_is_unreadable(length: int) -> None:
    with pytest.raises(UnreadableDataSetError):
        read_received_header(BytesIO(encode(make_object())[:length]), EXPLICIT_VR_LITTLE_ENDIAN)


def _open_items(count: int) -> bytes:
    sequence = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    return (sequence + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)) * count


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"no DICOM at all, but a text",
        struct.pack("<HH2sHL", 0x0008, 0x0005, b"UT", 0, 0xFFFFFFF0) + b"x" * 100,  # a length that lies
        struct.pack("<HH2sHL", 0x0010, 0x0020, b"UT", 0, 1 << 20) + b"x" * (1 << 20),  # a PatientID of 1 MiB
        _open_items(50_000),  # nested too deep for any recursion
        struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
        + struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 250_000,  # two million bytes, a gigabyte of objects
        struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + b"junk" * 10,
    ],
    ids=["empty", "short", "text", "lying-length", "huge-value", "deep", "many-items", "no-item"],
)
def test_hostile_bytes_are_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableDataSetError):
        read_received_header(BytesIO(data), EXPLICIT_VR_LITTLE_ENDIAN)


def test_a_deflated_header_is_read() -> None:
    data = _deflate(encode(make_object()))
    assert (
        read_received_header(BytesIO(data), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN).sop_instance_uid == "2.25.3.1"
    )


def test_a_deflated_bomb_is_not_inflated() -> None:
    skipped = struct.pack("<HH2sHL", 0x0008, 0x0008, b"UT", 0, 1 << 30)
    data = _deflate(skipped + b"\0" * (200 << 20))
    with pytest.raises(UnreadableDataSetError, match="inflates to more than"):
        read_received_header(BytesIO(data), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)


def test_a_damaged_deflated_stream_is_unreadable() -> None:
    with pytest.raises(UnreadableDataSetError, match="deflated stream"):
        read_received_header(BytesIO(b"\xff" * 500), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)


_SYNTAXES = st.sampled_from(
    [
        IMPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_BIG_ENDIAN,
        DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 500),
    syntax=_SYNTAXES,
)
def test_damage_gives_a_header_or_a_clear_error(
    changes: list[tuple[int, int]], cut: int, syntax: str
) -> None:
    data = bytearray(encode(make_object()))
    for position, value in changes:
        data[position % len(data)] = value
    message = ""
    try:
        header = read_received_header(BytesIO(bytes(data[: len(data) - cut])), syntax)
        assert is_uid(header.sop_instance_uid)
    except UnreadableDataSetError as error:
        message = str(error)
    assert "Petra" not in message
    assert "0815" not in message


@pytest.mark.parametrize(
    "keyword", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
)
@pytest.mark.parametrize("value", [None, ""])
def test_every_identifier_is_needed(keyword: str, value: str | None) -> None:
    with pytest.raises(UnreadableDataSetError, match=f"no {keyword}"):
        header_of(make_object(**{keyword: value}))


def test_a_study_without_patient_id_is_read() -> None:
    header = header_of(make_object(PatientID=None, PatientName=None, PatientBirthDate=None))
    assert header.patient_id is None
    assert header.identity_digest != header_of(make_object()).identity_digest


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("1.2.840.10008.5.1.4.1.1.4", True),
        ("2.25.01", True),  # a leading zero: wrong by the standard, seen every day
        ("0", True),
        ("1." * 31 + "12", True),
        ("1." * 32 + "1", False),
        ("", False),
        ("1..2", False),
        (".1", False),
        ("../../etc/passwd", False),
        ("1.2/../3", False),
        ("1.2.3\n", False),
        ("1.2.٣", False),
    ],
)
def test_what_is_a_uid(text: str, valid: bool) -> None:
    assert is_uid(text) is valid


def _digest(edit: Callable[[Dataset], None] | None = None, **attributes: object) -> str:
    dataset = make_object(**attributes)
    if edit:
        edit(dataset)
    return header_of(dataset).identity_digest


@pytest.mark.parametrize(
    "attributes",
    [
        {"PatientID": "P-0816"},
        {"IssuerOfPatientID": "ELSEWHERE"},
        {"PatientName": "Phantom^Paula"},
        {"PatientBirthDate": "19700102"},
        {"StudyInstanceUID": "2.25.99"},
    ],
)
def test_another_identity_has_another_digest(attributes: dict[str, str]) -> None:
    assert _digest(**attributes) != _digest()


@pytest.mark.parametrize(
    "attributes",
    [
        {"PatientID": " P-0815 "},
        {"PatientName": "PHANTOM^PETRA^^^"},
        {"PatientName": "Phantom^ Petra =ファントム"},
        {"SeriesInstanceUID": "2.25.98"},
        {"InstanceNumber": 77},
    ],
)
def test_padding_case_and_other_attributes_do_not_matter(attributes: dict[str, object]) -> None:
    assert _digest(**attributes) == _digest()


def test_a_transcoded_name_is_the_same_identity() -> None:
    utf8 = _digest(PatientName="Müller^Jürgen", SpecificCharacterSet="ISO_IR 192")
    latin = _digest(PatientName="Müller^Jürgen", SpecificCharacterSet="ISO_IR 100")
    assert utf8 == latin


@pytest.mark.parametrize(
    "character_set",
    ["ISO_IR 192", "ISO_IR 999", "NONSENSE", "ISO 2022 IR 87", "\\ISO 2022 IR 87\\ISO 2022 IR 999"],
)
def test_a_name_that_cannot_be_decoded_is_read(character_set: str) -> None:
    data = encode(make_object(SpecificCharacterSet="ISO_IR 192", PatientName="Phantom^Petra"))
    name = b"\xff\xfe\x1b$B\xff\x1b(Zx"
    padded = character_set.encode() + b" " * (len(character_set) % 2)
    declared = b"CS\x0a\0ISO_IR 192"
    assert declared in data
    assert b"Phantom^Petra " in data
    data = data.replace(declared, b"CS" + struct.pack("<H", len(padded)) + padded)
    data = data.replace(b"PN\x0e\0Phantom^Petra ", b"PN\x0a\0" + name)
    assert read_received_header(BytesIO(data), EXPLICIT_VR_LITTLE_ENDIAN).patient_id == "P-0815"


def test_values_that_break_their_vr_are_kept_short_and_printable() -> None:
    data = encode(make_object(PatientID="P" * 64, Modality="MR"))
    data = data.replace(b"LO\x40\0" + b"P" * 64, b"LO\x80\0" + b"P\0Q\n" * 32)
    header = read_received_header(BytesIO(data), EXPLICIT_VR_LITTLE_ENDIAN)
    assert header.patient_id == "P Q " * 16
    assert "\0" not in header.patient_id


@pytest.mark.parametrize(
    ("sop_class_uid", "kind"),
    [
        ("1.2.840.10008.5.1.4.1.1.2", InstanceKind.IMAGE),
        ("1.2.840.10008.5.1.4.1.1.4.1", InstanceKind.IMAGE),
        ("1.2.840.10008.5.1.4.1.1.128", InstanceKind.IMAGE),
        ("1.2.840.10008.5.1.4.1.1.66.4", InstanceKind.OTHER),  # Segmentation
        ("1.2.840.10008.5.1.4.1.1.481.2", InstanceKind.OTHER),  # RT Dose
        ("1.2.840.10008.5.1.4.1.1.88.33", InstanceKind.OTHER),  # SR
        ("1.2.840.10008.5.1.4.1.1.11.1", InstanceKind.OTHER),  # presentation state
        ("1.3.46.670589.11.0.0.12.1", InstanceKind.OTHER),  # private
    ],
)
def test_kind(sop_class_uid: str, kind: InstanceKind) -> None:
    assert header_of(make_object(SOPClassUID=sop_class_uid)).kind is kind


def test_nothing_of_the_patient_is_in_the_repr() -> None:
    assert "0815" not in repr(header_of(make_object()))
