"""Damaged and hostile files, identities that break their rules, and loss: told, and never a crash."""

from __future__ import annotations

import random
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from phantom import (
    chiral_image,
    write_classic_series,
    write_enhanced_series,
)
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from series_builders import AXIAL, refusal, series, with_change

from models.errors import ReasonCode, Refusal
from service.dicom.series import GeometryPolicy, SourceSeries, read_series

# --- damaged and hostile files ------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 100, 200, 700, 0.5, 0.9, -1])
def test_a_truncated_file_is_unreadable(tmp_path: Path, keep: float) -> None:
    paths = write_classic_series(tmp_path, chiral_image((3, 40, 50)), AXIAL)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: int(keep * len(whole))] if isinstance(keep, float) else whole[:keep])
    error = refusal(paths)
    assert error.reason is ReasonCode.UNREADABLE
    assert "mage 2" in error.message


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_a_truncated_compressed_file_is_unreadable(tmp_path: Path, syntax: str) -> None:
    paths = write_classic_series(tmp_path, chiral_image((3, 40, 50)), AXIAL, transfer_syntax=syntax)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2 + 400])
    assert refusal(paths).reason is ReasonCode.UNREADABLE


def test_a_claimed_size_is_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    paths = series(tmp_path, Rows=65535, Columns=65535)
    error = refusal(paths)
    assert error.reason is ReasonCode.TOO_LARGE
    assert "30064 of 1074 Mvoxels" in error.message
    frames = write_enhanced_series(tmp_path / "e", chiral_image(), AXIAL, NumberOfFrames=2_000_000_000)
    assert refusal(frames).reason is ReasonCode.TOO_LARGE


def test_a_codestream_larger_than_its_header_is_not_decoded(tmp_path: Path) -> None:
    paths = write_classic_series(
        tmp_path, chiral_image((3, 40, 50)), AXIAL, transfer_syntax=JPEG2000Lossless, Rows=20
    )
    error = refusal(paths)
    assert error.reason is ReasonCode.UNREADABLE
    assert "40 x 50" in error.message


def test_a_deflated_bomb_is_not_inflated(tmp_path: Path) -> None:
    image = np.zeros((3, 500, 500), np.int16)
    image[0, 0, 0] = 1
    paths = write_classic_series(tmp_path, image, AXIAL, transfer_syntax=DeflatedExplicitVRLittleEndian)
    assert read_series(paths).volume.shape_zyx == (3, 500, 500)
    error = refusal(paths, replace(GeometryPolicy(), limit_inflated_bytes=100_000))
    assert error.reason is ReasonCode.TOO_LARGE


def test_damage_anywhere_is_a_refusal_or_a_volume_and_never_a_crash(tmp_path: Path) -> None:
    generator = random.Random(7)
    for syntax in (ImplicitVRLittleEndian, "1.2.840.10008.1.2.1", RLELossless, JPEG2000Lossless):
        for make in (write_classic_series, write_enhanced_series):
            paths = make(
                tmp_path / f"{make.__name__}{syntax}",
                chiral_image((3, 20, 16)),
                AXIAL,
                transfer_syntax=syntax,
            )
            whole = paths[0].read_bytes()
            for _ in range(25):
                damaged = bytearray(whole)
                for _ in range(generator.randint(1, 8)):
                    damaged[generator.randrange(132, len(damaged))] = generator.randrange(256)
                paths[0].write_bytes(damaged)
                with suppress(Refusal):
                    assert isinstance(read_series(paths), SourceSeries)


# --- identity -----------------------------------------------------------------------------------------


def test_values_that_break_their_vr_never_stop_the_reading(tmp_path: Path) -> None:
    def break_all(dataset: Dataset, z: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.PatientID = "P" * 80
            dataset.PatientName = "N" * 90
            dataset.PatientBirthDate = "unknown"
            dataset.StudyTime = "25:61"
            dataset.AccessionNumber = "A" * 30

    paths = series(tmp_path, edit=break_all)
    source = read_series(paths)
    assert source.patient_id == "P" * 80  # a shortened identifier is another patient's
    assert source.identity.elements["PatientBirthDate"] == ""
    assert source.identity.elements["StudyTime"] == ""
    assert source.identity.elements["AccessionNumber"] == "A" * 30


@pytest.mark.parametrize(
    ("character_set", "stored", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen".encode("latin-1"), "Müller^Jürgen"),
        ("ISO_IR 192", "山田^太郎".encode(), "山田^太郎"),
        ("\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
        ("NO SUCH SET", b"Doe^John", "Doe^John"),
        ("ISO_IR 192", b"M\xfcller^J", "M\N{REPLACEMENT CHARACTER}ller^J"),
    ],
)
def test_names_in_any_character_set(tmp_path: Path, character_set: str, stored: bytes, name: str) -> None:
    with warnings.catch_warnings():  # the placeholder is no character set
        warnings.simplefilter("ignore")
        paths = series(tmp_path, SpecificCharacterSet="X" * len(character_set), PatientName="Y" * len(stored))
    for path in paths:
        data = path.read_bytes().replace(b"X" * len(character_set), character_set.encode())
        path.write_bytes(data.replace(b"Y" * len(stored), stored))
    assert read_series(paths).identity.elements["PatientName"] == name


def test_a_name_spelt_in_another_way_is_the_same_name(tmp_path: Path) -> None:
    paths = with_change(tmp_path, [3], lambda d: setattr(d, "PatientName", "PHANTOM^TEST^^ "))
    assert len(read_series(paths).headers) == 7


def test_anonymised_series_can_be_read_on_request(tmp_path: Path) -> None:
    paths = series(tmp_path, PatientID="", study_instance_uid="")
    source = read_series(paths, policy=replace(GeometryPolicy(), missing_identity="accept"))
    assert source.patient_id == source.study_instance_uid == ""


def test_the_repr_of_a_series_names_nobody(tmp_path: Path) -> None:
    source = read_series(series(tmp_path))
    assert source.patient_id == "PHANTOM-1"
    for private in ("PHANTOM-1", "Phantom^Test", "19700101"):
        assert private not in repr(source)


@pytest.mark.parametrize(
    ("syntax", "stated", "lossy"),
    [
        ("1.2.840.10008.1.2.1", None, False),
        ("1.2.840.10008.1.2.1", "01", True),
        ("1.2.840.10008.1.2.4.81", None, True),
        ("1.2.840.10008.1.2.4.91", None, True),
        ("1.2.840.10008.1.2.4.91", "00", False),
        ("1.2.840.10008.1.2.4.90", None, False),
    ],
)
def test_loss_is_told(tmp_path: Path, syntax: str, stated: str | None, lossy: bool) -> None:
    def state(dataset: Dataset, z: int) -> None:
        if "LossyImageCompression" in dataset:
            del dataset.LossyImageCompression
        if (stated is not None and z == 2) or stated == "00":
            dataset.LossyImageCompression = stated

    source = read_series(series(tmp_path, transfer_syntax=syntax, edit=state))
    assert source.lossy is lossy
    assert bool(source.lossy_ratio) is bool(source.lossy_method) is lossy
