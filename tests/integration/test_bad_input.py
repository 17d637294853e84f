"""Bad input: a clear error each, nothing crashes, and nothing else is lost."""

from __future__ import annotations

import gzip
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pytest
from bundle_factory import make_threshold_bundle
from phantom import test_uid as make_uid
from phantom import write_classic_series
from places import AFFINE, image, write_study
from pydicom import dcmread
from running_node import RunningNode
from waiting import wait_until

from models.bundle import Bundle
from models.bundle_zip import pack_zip
from service.records.tables import Role

NAME = "Kummerspeck^Wendelin"


def nifti_bytes(array_xyz: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    loaded = nibabel.Nifti1Image(array_xyz, np.eye(4) if affine is None else affine)
    loaded.set_sform(loaded.affine, 1)
    loaded.set_qform(None, 0)
    return gzip.compress(loaded.to_bytes(), mtime=0)


def gzip_bomb() -> bytes:
    """A header that promises a small volume, and two gigabytes of zeros behind it."""
    header = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes()[:352]
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=9) as out:
        out.write(header)
        for _ in range(256):
            out.write(bytes(8 << 20))
    return stream.getvalue()


def huge_claim() -> bytes:
    """A header that claims a volume of 27 terabytes."""
    loaded = nibabel.Nifti1Image(np.zeros((1, 1, 1), np.float64), np.eye(4))
    loaded.header.set_data_shape((15000, 15000, 15000))
    return gzip.compress(bytes(loaded.header.binaryblock) + bytes(4), mtime=0)


def truncated_dicom_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("1.dcm", bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00\xff\xff")
    return stream.getvalue()


def volume_4d() -> bytes:
    return nifti_bytes(np.ones((4, 4, 4, 3), np.int16))


def volume_with_nan() -> bytes:
    array = np.ones((8, 8, 8), np.float32)
    array[3, 3, 3] = np.nan
    return nifti_bytes(array)


def zero_spacing() -> bytes:
    loaded = nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4))
    loaded.header["pixdim"][1:4] = 0
    loaded.header["srow_x"][:] = loaded.header["srow_y"][:] = loaded.header["srow_z"][:] = 0
    loaded.header["sform_code"], loaded.header["qform_code"] = 1, 0
    return gzip.compress(bytes(loaded.header.binaryblock) + bytes(4) + bytes(128), mtime=0)


UPLOADS: dict[str, tuple[Callable[[], bytes], str]] = {
    "text named .nii.gz": (lambda: f"Dear sir, {NAME}".encode() * 20, "UNREADABLE"),
    "gzipped text": (lambda: gzip.compress(NAME.encode() * 50), "UNREADABLE"),
    "truncated": (lambda: nifti_bytes(np.ones((30, 30, 30), np.int16) * 7)[:60], "UNREADABLE"),
    "gzip bomb": (gzip_bomb, "UNREADABLE TOO_LARGE INVALID_VALUES"),
    "27 TB claimed": (huge_claim, "TOO_LARGE UNREADABLE"),
    "4D": (volume_4d, "NOT_A_VOLUME"),
    "NaN": (volume_with_nan, "INVALID_VALUES"),
    "zero spacing": (zero_spacing, "INVALID_GEOMETRY"),
    "truncated DICOM in a zip": (truncated_dicom_zip, "UNREADABLE"),
    "empty": (lambda: b"", "UNREADABLE"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_a_bad_upload_gets_a_reason(node: RunningNode, case: str) -> None:
    make, codes = UPLOADS[case]
    with node.client(Role.UPLOADER) as client:
        files = {"files": ("case.nii.gz", make(), "application/gzip")}
        response = client.post("/segmentations", data={"model": "threshold"}, files=files)
        problem = response.json()
        if response.status_code == 202:  # what only reading shows is told by the job
            location = response.headers["Location"].removeprefix("/api/v1")
            wait_until(
                lambda: client.get(location).json()["state"] not in ("queued", "running"), 90, node.log
            )
            job = client.get(location).json()
            assert job["state"] == "refused", job
            code, sentence = job["reason"]["code"], job["reason"]["sentence"]
        else:
            assert 400 <= response.status_code < 500, response.text
            assert response.headers["Content-Type"] == "application/problem+json"
            code, sentence = problem["code"], problem["detail"]
    assert code in codes.split()
    assert len(sentence) > 20
    assert "Traceback" not in sentence
    assert "Kummerspeck" not in sentence


def test_an_unknown_model_is_404(node: RunningNode) -> None:
    with node.client(Role.UPLOADER) as client:
        good = nifti_bytes(np.arange(512, dtype=np.int16).reshape(8, 8, 8))
        files = {"files": ("case.nii.gz", good, "application/gzip")}
        response = client.post("/segmentations", data={"model": "../../etc"}, files=files)
    assert response.status_code == 404
    assert response.json()["code"] == "MODEL_UNKNOWN"


def changed_byte(folder: Path) -> None:
    path = folder / "student.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def extra_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("nothing listed me")


@pytest.mark.parametrize("damage", [changed_byte, extra_file])
def test_a_damaged_bundle_is_not_installed(
    node: RunningNode, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", version="6.6.6")
    pack_zip(bundle, tmp_path / "whole.zip")
    with zipfile.ZipFile(tmp_path / "whole.zip") as archive:
        archive.extractall(tmp_path / "damaged")
    damage(tmp_path / "damaged")
    damaged = shutil.make_archive(str(tmp_path / "damaged"), "zip", tmp_path / "damaged")
    with node.client() as client:
        files = {"bundle": ("bundle.zip", Path(damaged).read_bytes(), "application/zip")}
        response = client.post("/models", files=files)
        versions = client.get("/models").json()
    assert response.status_code == 422, response.text
    assert response.json()["code"] == "BUNDLE_INVALID"
    assert "6.6.6" not in str(versions)
    assert Bundle.open(tmp_path / "bundle").digest == bundle.digest


def test_a_study_without_patient_id_is_refused_and_sent_nowhere(node: RunningNode, tmp_path: Path) -> None:
    paths = write_study(tmp_path, 501, PatientID="")
    assert node.send(paths) == paths
    assert _end(node, make_uid("study", 501))["reason"]["code"] == "IDENTITY_MISSING"


def test_a_series_of_two_patients_is_refused(node: RunningNode, tmp_path: Path) -> None:
    def of_another(dataset: object, z: int) -> None:
        if z > 4:
            dataset.PatientID = "SOMEBODY-ELSE"  # type: ignore[attr-defined]

    paths = write_classic_series(
        tmp_path,
        image(502),
        AFFINE,
        study_instance_uid=make_uid("study", 502),
        series_instance_uid=make_uid("series", 502),
        edit=of_another,
    )
    assert node.send(paths) == paths
    assert _end(node, make_uid("study", 502))["reason"]["code"] == "IDENTITY_CONFLICT"


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # pydicom sees what is wrong with it
@pytest.mark.parametrize("uid", ["../../../../etc/passwd", "1.2.840/../..", "......"])
def test_uids_of_dots_and_slashes_get_a_status_and_make_no_file(
    node: RunningNode, tmp_path: Path, uid: str
) -> None:
    def outside() -> set[Path]:
        return {p for p in node.folder.rglob("*") if "spool" not in p.parts and ".sqlite" not in p.name}

    before = outside()
    (path,) = write_study(tmp_path, 503)[:1]
    dataset = dcmread(path)
    dataset.StudyInstanceUID = dataset.SOPInstanceUID = uid
    dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.save_as(tmp_path / "evil.dcm")
    assert node.send([tmp_path / "evil.dcm"]) == []
    assert outside() == before


def test_a_truncated_object_is_refused_and_the_rest_of_its_study_is_kept(
    node: RunningNode, tmp_path: Path
) -> None:
    paths = write_study(tmp_path, 504)
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(paths[0].read_bytes()[:-100])
    taken = node.send([cut, *paths[1:]])
    assert set(paths[1:]) <= set(taken)
    job = _end(node, make_uid("study", 504))
    assert job["state"] == ("refused" if cut in taken else "succeeded")


def test_after_all_of_it_the_node_works_and_says_no_name(node: RunningNode, tmp_path: Path) -> None:
    node.send(write_study(tmp_path, 505, PatientName=NAME))
    assert _end(node, make_uid("study", 505))["state"] == "succeeded"
    assert httpx.get(f"http://127.0.0.1:{node.http_port}/healthz", trust_env=False).is_success
    log = node.log()
    assert "process.died" not in log
    assert "Traceback" not in log
    assert "Kummerspeck" not in log
    assert "SOMEBODY-ELSE" not in log


def _end(node: RunningNode, study: str) -> dict[str, object]:
    def jobs() -> list[dict[str, object]]:
        found = [j for j in node.jobs() if j["study_instance_uid"] == study]
        return [j for j in found if j["state"] not in ("queued", "running")]

    wait_until(lambda: bool(jobs()), 90, node.log)
    (job,) = jobs()
    return job
