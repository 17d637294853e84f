"""Files in, a job, results out; and every bad upload gets a clear answer and leaves nothing behind."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from api_harness import STUDY, ApiHarness, assert_problem, nifti
from findings import make_finding, phantom_source, rendered
from phantom import STUDY_INSTANCE_UID, chiral_image, write_classic_series

from service.api import multipart
from service.records.database import Records
from service.records.jobs import refuse_job, succeed_job
from service.records.tables import Job, ResultKind, Role
from service.records.work import NewResult, Outcome

URL = "/api/v1/segmentations"


def test_an_upload_becomes_a_job_that_its_uploader_can_follow(api: ApiHarness) -> None:
    api.install()
    response = api.upload(nifti(api.folder))
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"{URL}/{job['job_id']}"
    assert job["state"] == "queued"
    assert job["model"] == {"name": "threshold", "requested_version": None, "version": None, "digest": None}
    assert job["created_at"] == "2026-03-01T12:00:00Z"
    followed = api.get(response.headers["location"], key="uploader")
    assert followed.json() == job
    assert followed.headers["cache-control"] == "no-store"


def test_results_are_offered_once_they_are_there(api: ApiHarness) -> None:
    job_id = api.enqueue(owner="uploader")
    for path in ("labelmap", "segmentation", "measurements"):
        response = api.get(f"{URL}/{job_id}/{path}", key="uploader")
        assert assert_problem(response, 409, "RESULT_NOT_READY")["retryable"] is True
        assert int(response.headers["retry-after"]) < 60
    contents = api.succeed(job_id)
    job = api.get(f"{URL}/{job_id}", key="uploader").json()
    assert job["model"] | {"requested_version": None} == job["model"]
    assert (job["model"]["version"], job["model"]["digest"]) == ("1.0.0", "d" * 64)
    assert job["summary"] == {"volumes_ml": {"low": 1.5}}
    assert set(job["links"]) == {"self", "results", "labelmap", "segmentation", "measurements"}
    for kind, media_type, suffix in (
        (ResultKind.LABELMAP, "application/gzip", ".nii.gz"),
        (ResultKind.SEGMENTATION, "application/dicom", ".dcm"),
        (ResultKind.MEASUREMENTS, "application/json", ".json"),
    ):
        response = api.get(job["links"][kind.value], key="uploader", headers={"Range": "bytes=9-1,x"})
        assert (response.status_code, response.content) == (200, contents[kind])
        assert response.headers["content-type"] == media_type
        assert f'filename="{job_id}{suffix}"' in response.headers["content-disposition"]
        digest = base64.b64encode(hashlib.sha256(contents[kind]).digest()).decode()
        assert response.headers["repr-digest"] == f"sha-256=:{digest}:"
        assert response.headers["x-content-type-options"] == "nosniff"


def test_every_object_of_a_job_is_listed_and_given(api: ApiHarness, tmp_path: Path) -> None:
    job_id = api.enqueue(owner="uploader")
    assert_problem(api.get(f"{URL}/{job_id}/results", key="uploader"), 409, "RESULT_NOT_READY")
    files = rendered(make_finding(phantom_source(tmp_path / "source")), tmp_path / "out", one_per_label=True)
    job = api.claim(job_id)
    folder = api.spool.results_dir / job_id
    shutil.copytree(tmp_path / "out", folder)
    with api.records.write() as session:
        results = [
            NewResult(
                ResultKind(file.kind),
                api.spool.relative(folder / file.name),
                file.size_bytes,
                file.sha256,
                file.sop_class_uid,
                file.sop_instance_uid,
                file.profile,
            )
            for file in files
        ]
        succeed_job(session, job_id, job.attempt, Outcome(results, "r", "float32"), now=api.now)
    listed = api.get(f"{URL}/{job_id}/results", key="uploader").json()
    shown = {each["sop_instance_uid"]: each["segments"] for each in listed if each["kind"] == "segmentation"}
    assert sorted(shown.values()) == [["part 1"], ["part 2"], ["part 3"]]
    assert {each["sop_instance_uid"] for each in listed} == {file.sop_instance_uid for file in files}
    for each in listed:
        response = api.get(each["link"], key="uploader")
        assert response.headers["content-type"] == each["media_type"] == "application/dicom"
        assert hashlib.sha256(response.content).hexdigest() == each["sha256"]
    assert api.get(f"{URL}/{job_id}/segmentation").content == api.get(listed[1]["link"]).content
    stranger = api.get(f"{URL}/{job_id}/results/{'0' * 32}", key="uploader")
    assert_problem(stranger, 404, "NO_SUCH_RESULT")
    api.make_key("other", Role.UPLOADER)
    assert api.get(listed[0]["link"], key="other").status_code == 404


def test_a_result_that_does_not_exist_or_is_gone_is_told_apart(api: ApiHarness) -> None:
    job_id = api.enqueue(owner="uploader")
    api.succeed(job_id, dicom=False)
    assert_problem(api.get(f"{URL}/{job_id}/segmentation"), 404, "NO_SUCH_RESULT")
    assert "segmentation" not in api.get(f"{URL}/{job_id}").json()["links"]
    (api.spool.results_dir / job_id / "labelmap").unlink()
    assert_problem(api.get(f"{URL}/{job_id}/labelmap"), 410, "RESULT_GONE")


def test_a_refusal_says_why_and_what_to_do(api: ApiHarness) -> None:
    job_id = api.enqueue(owner="uploader")
    job = api.claim(job_id)
    with api.records.write() as session:
        refuse_job(
            session,
            job_id,
            job.attempt,
            code="GANTRY_TILT",
            reason="The gantry is tilted by 18.5 degrees.",
            remedy="Send a series without tilt.",
            now=api.now,
        )
    told = api.get(f"{URL}/{job_id}", key="uploader").json()
    assert told["state"] == "refused"
    assert told["reason"] == {
        "code": "GANTRY_TILT",
        "sentence": "The gantry is tilted by 18.5 degrees.",
        "remedy": "Send a series without tilt.",
    }
    problem = assert_problem(api.get(f"{URL}/{job_id}/labelmap"), 409, "GANTRY_TILT")
    assert "18.5 degrees" in problem["detail"]
    assert problem["remedy"] == "Send a series without tilt."
    assert problem["retryable"] is False


def test_the_same_upload_gives_the_same_job(api: ApiHarness) -> None:
    api.install()
    image = nifti(api.folder)
    first = api.upload(image).json()["job_id"]
    api.now += timedelta(hours=1)
    assert api.upload(image).json()["job_id"] == first
    assert api.upload(image, key="operator").json()["job_id"] != first
    assert len(list(api.spool.uploads_dir.iterdir())) == 2


def test_a_zipped_series_belongs_to_its_study(api: ApiHarness) -> None:
    api.install()
    files = write_classic_series(api.folder / "series", chiral_image(), np.eye(4))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for path in files:
            opened.write(path, path.name)
    response = api.upload(archive.getvalue(), name="../../series.zip")
    assert response.status_code == 202
    assert response.json()["study_instance_uid"] == STUDY_INSTANCE_UID
    study = api.get(f"/api/v1/studies/{STUDY_INSTANCE_UID}").json()
    assert [job["job_id"] for job in study["jobs"]] == [response.json()["job_id"]]
    assert api.delete(f"/api/v1/studies/{STUDY_INSTANCE_UID}").json()["files"] == 1
    assert api.spool_files() == set()


NAN = np.full((4, 4, 4), np.nan, np.float32)
BAD_UPLOADS: dict[str, tuple[bytes, str]] = {
    "text named .nii.gz": (b"Dear colleague,", "UNREADABLE"),
    "gzip of text": (gzip.compress(b"Dear colleague," * 100), "UNREADABLE"),
    "empty": (b"", "UNREADABLE"),
    "damaged archive": (b"PK\x03\x04" + bytes(50), "UNREADABLE"),
}


@pytest.mark.parametrize("case", BAD_UPLOADS)
def test_a_bad_file_is_refused_and_leaves_nothing(api: ApiHarness, case: str) -> None:
    api.install()
    content, code = BAD_UPLOADS[case]
    problem = assert_problem(api.upload(content), 422, code)
    assert problem["remedy"]
    assert list(api.spool.uploads_dir.iterdir()) == []
    assert api.get("/api/v1/jobs").json()["items"] == []


def test_a_4d_image_is_refused_with_its_shape(api: ApiHarness) -> None:
    api.install()
    image = nibabel.Nifti1Image(np.zeros((5, 4, 3, 2), np.float32), np.eye(4))
    problem = assert_problem(api.upload(gzip.compress(image.to_bytes())), 422, "NOT_A_VOLUME")
    assert "5 x 4 x 3 x 2" in problem["detail"]


@pytest.mark.parametrize("content", [nifti, lambda folder: nifti(folder, NAN)], ids=["good", "NaN"])
def test_voxels_are_left_to_the_job(api: ApiHarness, content: Any) -> None:
    api.install()
    assert api.upload(content(api.folder)).status_code == 202


def test_the_number_of_files_must_be_that_of_the_channels(api: ApiHarness) -> None:
    api.install(channels=2)
    image = nifti(api.folder)
    problem = assert_problem(api.upload(image), 422, "MISSING_CHANNEL")
    assert "1 file(s)" in problem["detail"]
    assert_problem(api.upload(image, image, image), 422, "MISSING_CHANNEL")
    assert api.upload(image, image).status_code == 202


def test_an_unknown_model_is_not_found_and_the_known_are_named(api: ApiHarness) -> None:
    api.install()
    problem = assert_problem(api.upload(nifti(api.folder), model="nothing"), 404, "MODEL_UNKNOWN")
    assert "threshold" in problem["remedy"]
    assert_problem(api.upload(nifti(api.folder), version="7.0.0"), 404, "MODEL_UNKNOWN")
    assert_problem(api.upload(nifti(api.folder), model="../../etc"), 404, "MODEL_UNKNOWN")
    assert_problem(api.upload(nifti(api.folder), model=None), 422, "INVALID_REQUEST")
    api.registry.withdraw("threshold", "1.0.0")
    assert_problem(api.upload(nifti(api.folder)), 409, "MODEL_WITHDRAWN")
    assert list(api.spool.uploads_dir.iterdir()) == []


def test_a_named_version_is_asked_for(api: ApiHarness) -> None:
    api.install()
    api.install(version="1.1.0", activate=False)
    job = api.upload(nifti(api.folder), version="1.1.0").json()
    assert job["model"]["requested_version"] == "1.1.0"


# --- limits


@pytest.fixture
def small(tmp_path: Path, records: Records) -> ApiHarness:
    """A node that takes uploads of up to 10 000 bytes."""
    storage = {"low_watermark_bytes": 0, "reserve_bytes": 0}
    api = ApiHarness(tmp_path, records, storage=storage, http={"maximum_upload_bytes": 10_000})
    api.install()
    return api


class Body:
    """A request body of any length, that counts how much of it was asked for."""

    def __init__(self, head: bytes, size_bytes: int) -> None:
        self.head = head
        self.size_bytes = size_bytes
        self.taken_bytes = 0

    async def __aiter__(self) -> Any:
        yield self.head
        while self.taken_bytes < self.size_bytes:
            self.taken_bytes += 1000
            yield b"x" * 1000


HEAD = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def test_what_says_it_is_too_large_is_refused_before_its_first_byte(small: ApiHarness) -> None:
    body = Body(HEAD, 50_000)
    response = small.post(URL, key="uploader", content=body, headers={**FORM, "Content-Length": "10001"})
    problem = assert_problem(response, 413, "UPLOAD_TOO_LARGE")
    assert "10001 bytes" in problem["detail"]
    assert "10000 bytes" in problem["detail"]
    assert body.taken_bytes == 0


@pytest.mark.parametrize("declared", [{}, {"Content-Length": "500"}], ids=["nothing said", "a lie"])
def test_what_becomes_too_large_is_stopped_on_the_way(small: ApiHarness, declared: dict[str, str]) -> None:
    body = Body(HEAD, 10_000_000)
    response = small.post(URL, key="uploader", content=body, headers={**FORM, **declared})
    assert_problem(response, 413, "UPLOAD_TOO_LARGE")
    assert body.taken_bytes <= 11_000
    assert list(small.spool.uploads_dir.iterdir()) == []
    assert small.app.state.api.desk.promised_bytes == 0


def test_below_the_watermark_nothing_is_taken(tmp_path: Path, records: Records) -> None:
    storage = {"low_watermark_bytes": 1 << 60, "reserve_bytes": 0}
    api = ApiHarness(tmp_path, records, storage=storage)
    api.install()
    body = Body(HEAD, 5000)
    response = api.post(URL, key="uploader", content=body, headers=FORM)
    assert assert_problem(response, 507, "STORAGE_FULL")["retryable"] is True
    assert response.headers["retry-after"]
    assert body.taken_bytes == 0


def test_without_a_key_no_byte_is_read(small: ApiHarness) -> None:
    body = Body(HEAD, 5000)
    assert_problem(small.post(URL, key=None, content=body, headers=FORM), 401, "KEY_MISSING")
    assert body.taken_bytes == 0


@pytest.fixture
def no_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default folder for temporary files that nothing can be written to."""
    missing = tmp_path / "no-tmp"
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(missing))
    monkeypatch.setattr(tempfile, "tempdir", str(missing))
    with pytest.raises(FileNotFoundError), tempfile.TemporaryFile():
        pass


@pytest.mark.usefixtures("no_tmp")
def test_an_upload_needs_no_default_temporary_folder(api: ApiHarness) -> None:
    api.install()
    noise = os.urandom(3 << 20)  # over every threshold from which form parsers spool to files
    volume = nibabel.Nifti1Image(np.frombuffer(noise, np.uint8).reshape(3, 1024, 1024), np.eye(4))
    assert api.upload(volume.to_bytes(), name="image.nii").status_code == 202


def part(name: str, value: bytes = b"x", *, file: bool = False) -> bytes:
    filename = '; filename="a"' if file else ""
    return (
        f'--b\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + value + b"\r\n"
    )


END = b"--b--\r\n"
MALFORMED = {
    "no boundary in it": b"hello",
    "cut off": part("model", b"threshold")[:-4],
    "no last boundary": part("model", b"threshold") + part("files", file=True),
    "a field twice": part("model") + part("model") + END,
    "an unknown field": part("modle") + END,
    "a file in another field": part("model", file=True) + END,
    "invalid UTF-8": part("model", b"\xff\xfe") + END,
    "an endless field": part("model", b"x" * 2000) + END,
    "an endless header": b"--b\r\nX: " + b"x" * 9000 + b"\r\n\r\nx\r\n" + END,
    "many headers": b"--b\r\n" + b"A: b\r\n" * 100 + b"\r\nx\r\n" + END,
    "no name": b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n" + END,
    "too many files": part("files", file=True) * (multipart.MAX_FILES + 1) + END,
    "a million parts": part("x") * 1000 + END,
    "nothing": b"",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_body_that_is_no_form_is_a_bad_request(api: ApiHarness, case: str) -> None:
    response = api.post(URL, key="uploader", content=MALFORMED[case], headers=FORM)
    assert_problem(response, 400, "MALFORMED")
    assert list(api.spool.uploads_dir.iterdir()) == []


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain; boundary=b", "\x80"])
def test_another_media_type_is_not_supported(api: ApiHarness, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type.encode("latin-1")}
    response = api.post(URL, key="uploader", content=b"x", headers=headers)  # type: ignore[arg-type]
    assert_problem(response, 415, "UNSUPPORTED_MEDIA_TYPE")


def test_a_form_without_boundary_is_malformed(api: ApiHarness) -> None:
    for boundary in ("", "; boundary=", "; boundary=" + "b" * 300):
        content_type = f"multipart/form-data{boundary}"
        response = api.post(URL, key="uploader", content=b"x", headers={"Content-Type": content_type})
        assert_problem(response, 400, "MALFORMED")


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64])
def test_a_form_is_the_same_however_it_is_cut(api: ApiHarness, chunk_bytes: int) -> None:
    api.install()
    image = nifti(api.folder)
    body = part("version", b"1.0.0") + part("files", image, file=True) + part("model", b"threshold") + END

    async def chunks() -> Any:
        for start in range(0, len(body), chunk_bytes):
            yield body[start : start + chunk_bytes]

    response = api.post(URL, key="uploader", content=chunks(), headers=FORM)
    assert response.status_code == 202, response.text
    with api.records.read() as session:
        (given,) = session.get_one(Job, response.json()["job_id"]).inputs
    assert api.spool.absolute(given.path).read_bytes() == image


def test_identifiers_are_checked_before_they_are_used(api: ApiHarness) -> None:
    for trick in ("..%2f..%2fetc", "A" * 32, "0" * 31, "0" * 33, "%00" * 32, STUDY):
        assert api.get(f"{URL}/{trick}").status_code in (404, 422)
