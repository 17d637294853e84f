"""The picture as a DICOM object: what it shows is what was drawn, and other programs open it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from findings import DIGEST, dciodvfy_errors, make_finding, phantom_source, rendered
from orthanc import Orthanc
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.uid import JPEGLSNearLossless

from service.dicom.report_proof import prove_secondary_capture
from service.dicom.series import SourceSeries
from service.errors import ProofError
from service.rendering import Finding


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceSeries:
    return phantom_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def finding(source: SourceSeries) -> Finding:
    return make_finding(source)


def capture_of(folder: Path, finding: Finding) -> Path:
    files = rendered(finding, folder, secondary_capture=True)
    assert [file.kind for file in files] == ["segmentation", "report", "capture"]
    return folder / files[-1].name


def test_it_holds_the_picture_and_says_where_it_comes_from(tmp_path: Path, finding: Finding) -> None:
    dataset = dcmread(capture_of(tmp_path, finding))
    np.testing.assert_array_equal(dataset.pixel_array, finding.picture)
    assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert (dataset.PatientID, dataset.StudyInstanceUID) == ("PHANTOM-1", "2.25.101")
    assert dataset.SeriesDescription == "AI, unverified: Phantom parts"
    assert dataset.SeriesInstanceUID != finding.source.series_instance_uid
    assert (dataset.ContentDate, dataset.DateOfSecondaryCapture) == ("20260304", "20260304")
    assert dataset.ContributingEquipmentSequence[0].SoftwareVersions == DIGEST
    named = {image.ReferencedSOPInstanceUID for image in dataset.SourceImageSequence}
    assert named == set(finding.source.sop_instance_uids)
    assert (dataset.Modality, dataset.BurnedInAnnotation) == ("OT", "NO")


def test_two_builds_are_byte_identical(tmp_path: Path, finding: Finding) -> None:
    one, two = (capture_of(tmp_path / name, finding) for name in "ab")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("lossy", [False, True])
def test_dciodvfy_finds_no_error(tmp_path: Path, finding: Finding, lossy: bool) -> None:
    if lossy:
        finding = make_finding(phantom_source(tmp_path / "s", transfer_syntax=JPEGLSNearLossless))
    path = capture_of(tmp_path, finding)
    assert dciodvfy_errors(path, "SCImage") == []
    assert dcmread(path).LossyImageCompression == ("01" if lossy else "00")


def test_orthanc_shows_the_same_pixels(tmp_path: Path, finding: Finding) -> None:
    path = capture_of(tmp_path / "out", finding)
    with Orthanc(tmp_path / "orthanc") as orthanc:
        orthanc.start(node_port=9)
        stored = orthanc.client.post("/instances", content=path.read_bytes()).json()["ID"]
        shown = orthanc.client.get(f"/instances/{stored}/preview")
        shown.raise_for_status()
        pixels = np.asarray(Image.open(io.BytesIO(shown.content)).convert("RGB"))
    np.testing.assert_array_equal(pixels, finding.picture)


# --- the proof ----------------------------------------------------------------------------------------


def _change_pixel(dataset: Dataset) -> None:
    pixels = bytearray(dataset.PixelData)
    pixels[3000] ^= 1
    dataset.PixelData = bytes(pixels)


def _swap_colors(dataset: Dataset) -> None:
    pixels = np.frombuffer(dataset.PixelData, np.uint8)[: dataset.Rows * dataset.Columns * 3].reshape(-1, 3)
    data = pixels[:, ::-1].tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)


FAULTS: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "a pixel": (_change_pixel, "1 of its pixels"),
    "blue for red": (_swap_colors, "of its pixels are not"),
    "short": (lambda d: setattr(d, "PixelData", d.PixelData[:-100]), "fewer than it says"),
    "rows": (lambda d: setattr(d, "Rows", d.Rows - 1), "pixels, or fewer"),
    "planes": (lambda d: setattr(d, "PlanarConfiguration", 1), "8-bit RGB"),
    "color space": (lambda d: setattr(d, "PhotometricInterpretation", "YBR_FULL"), "8-bit RGB"),
    "the patient": (lambda d: setattr(d, "PatientID", "SOMEBODY"), "its PatientID is not"),
    "the study": (lambda d: setattr(d, "StudyInstanceUID", "2.25.666"), "its StudyInstanceUID is not"),
    "no source": (lambda d: delattr(d, "SourceImageSequence"), "every image that it is about"),
    "loss": (lambda d: setattr(d, "LossyImageCompression", "01"), "compressed with loss"),
    "the class": (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "no secondary capture"),
    "an annotation": (lambda d: setattr(d, "BurnedInAnnotation", "YES"), "who the patient is"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(tmp_path: Path, finding: Finding, fault: str) -> None:
    path = capture_of(tmp_path, finding)
    prove_secondary_capture(path, finding.source, finding.picture)
    change, words = FAULTS[fault]
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)
    with pytest.raises(ProofError, match=words):
        prove_secondary_capture(path, finding.source, finding.picture)


def test_a_picture_of_another_result_is_caught(tmp_path: Path, finding: Finding) -> None:
    path = capture_of(tmp_path, replace(finding, picture=finding.picture[:, ::-1].copy()))
    with pytest.raises(ProofError, match="of its pixels are not"):
        prove_secondary_capture(path, finding.source, finding.picture)
