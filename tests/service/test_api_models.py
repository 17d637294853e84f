"""Models over HTTP: only what proves itself is installed, swaps are deliberate, recalls find every study."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import STUDY, ApiHarness, assert_problem, bundle_zip
from sqlalchemy import select
from structlog.testing import capture_logs

from models.bundle import Bundle
from models.errors import BundleError
from service.records.database import Records
from service.records.tables import Event

URL = "/api/v1/models"


@pytest.fixture
def api(tmp_path: Path, records: Records) -> Iterator[ApiHarness]:
    """An interface whose site does without the gate, which has tests of its own."""
    storage = {"low_watermark_bytes": 0, "reserve_bytes": 0}
    with capture_logs():
        yield ApiHarness(tmp_path, records, storage=storage, models={"require_gate": False})


def send(api: ApiHarness, *archives: bytes, field: str = "bundle"):  # type: ignore[no-untyped-def]
    return api.post(URL, files=[(field, ("bundle.zip", archive)) for archive in archives])


def events(api: ApiHarness, prefix: str = "model.") -> list[tuple[str, str, str]]:
    with api.records.read() as session:
        return [
            (event.kind, event.actor, event.subject)
            for event in session.scalars(select(Event).order_by(Event.event_id))
            if event.kind.startswith(prefix)
        ]


def rewrite(archive: bytes, change: dict[str, bytes | None]) -> bytes:
    """The same archive with entries replaced, removed (None) or added."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if name not in change:
                new.writestr(name, old.read(name))
        for name, content in change.items():
            if content is not None:
                new.writestr(name, content)
    return buffer.getvalue()


def test_a_bundle_is_added_activated_and_listed(api: ApiHarness, tmp_path: Path) -> None:
    response = send(api, bundle_zip(tmp_path))
    assert response.status_code == 201, response.text
    added = response.json()
    assert (added["version"], added["active"], added["labels"]) == ("1.0.0", False, ["low", "high"])
    assert list(api.spool.uploads_dir.iterdir()) == []
    (listed,) = api.get(URL).json()
    assert (listed["name"], listed["active_version"]) == ("threshold", None)
    activated = api.post(f"{URL}/threshold/activate", json={"version": "1.0.0"}).json()
    assert activated["active_version"] == "1.0.0"
    assert activated["versions"] == [{**added, "active": True}]
    assert added["digest"] == api.registry.active("threshold").digest
    assert events(api) == [
        ("model.added", "admin", "threshold@1.0.0"),
        ("model.activated", "admin", "threshold@1.0.0"),
    ]


def test_a_bundle_with_one_changed_byte_is_refused(api: ApiHarness, tmp_path: Path) -> None:
    whole = bundle_zip(tmp_path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        weights = bytearray(archive.read("student.onnx"))
    weights[len(weights) // 2] ^= 1
    problem = assert_problem(
        send(api, rewrite(whole, {"student.onnx": bytes(weights)})), 422, "BUNDLE_INVALID"
    )
    assert "student.onnx" in problem["detail"]
    assert api.get(URL).json() == []
    assert events(api) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra.txt": b"x"}, "extra.txt"),
        ({"card.md": None}, "card.md"),
        ({"../escape": b"x"}, "escape"),
        ({"model.json": b"{}"}, "model.json"),
    ],
)
def test_a_bundle_that_is_not_what_it_was_is_refused(
    api: ApiHarness, tmp_path: Path, change: dict[str, bytes | None], named: str
) -> None:
    problem = assert_problem(send(api, rewrite(bundle_zip(tmp_path), change)), 422, "BUNDLE_INVALID")
    assert named in problem["detail"]
    assert api.registry.names() == []
    assert list(api.spool.uploads_dir.iterdir()) == []


def test_a_bundle_whose_golden_case_disagrees_is_refused(api: ApiHarness, tmp_path: Path) -> None:
    response = send(api, bundle_zip(tmp_path, golden="wrong"))
    assert "Dice" in assert_problem(response, 422, "GOLDEN_CASE_DISAGREES")["detail"]
    assert api.registry.names() == []


def test_what_is_no_bundle_is_refused(api: ApiHarness, tmp_path: Path) -> None:
    assert_problem(send(api, b"not a zip"), 422, "BUNDLE_INVALID")
    assert_problem(send(api, b""), 422, "BUNDLE_INVALID")
    assert_problem(send(api, b"a", b"b"), 422, "INVALID_REQUEST")
    assert_problem(send(api, b"a", field="files"), 400, "MALFORMED")
    assert_problem(api.post(URL, content=b"PK"), 415, "UNSUPPORTED_MEDIA_TYPE")


def test_the_same_version_with_other_contents_is_a_conflict(api: ApiHarness, tmp_path: Path) -> None:
    whole = bundle_zip(tmp_path)
    assert send(api, whole).status_code == 201
    assert send(api, whole).status_code == 201  # the very same again changes nothing
    assert_problem(send(api, bundle_zip(tmp_path, thresholds=(50.5, 60.5))), 409, "REGISTRY")


def test_a_bundle_over_the_limit_is_refused_before_it_is_read(tmp_path: Path, records: Records) -> None:
    api = ApiHarness(
        tmp_path,
        records,
        models={"maximum_bundle_bytes": 1000},
        storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
    )
    problem = assert_problem(send(api, b"x" * 2000), 413, "UPLOAD_TOO_LARGE")
    assert "at most 1000" in problem["detail"]


def test_changed_labels_take_a_confirmation(api: ApiHarness) -> None:
    api.install()
    api.install(version="2.0.0", labels=("one", "two"), activate=False)
    problem = assert_problem(
        api.post(f"{URL}/threshold/activate", json={"version": "2.0.0"}), 409, "MODEL_CHANGED"
    )
    assert "label" in problem["detail"]
    assert api.registry.active_version("threshold") == "1.0.0"
    confirmed = {"version": "2.0.0", "accept_changed_labels": True}
    assert api.post(f"{URL}/threshold/activate", json=confirmed).json()["active_version"] == "2.0.0"


def test_a_swap_is_rolled_back(api: ApiHarness) -> None:
    api.install()
    api.install(version="1.1.0", thresholds=(50.5, 300.5))
    assert api.post(f"{URL}/threshold/rollback").json()["active_version"] == "1.0.0"
    assert_problem(api.post(f"{URL}/threshold/rollback"), 409, "REGISTRY")
    assert events(api) == [("model.rolled_back", "admin", "threshold@1.0.0")]
    with api.records.read() as session:
        detail = session.scalars(select(Event.detail).where(Event.kind == "model.rolled_back")).one()
    assert detail["before"] == "1.1.0"


def test_a_withdrawn_version_is_not_activated_again(api: ApiHarness) -> None:
    api.install()
    api.install(version="1.1.0", thresholds=(50.5, 300.5))
    document = api.post(f"{URL}/threshold/1.1.0/withdraw").json()
    assert [(v["version"], v["withdrawn"]) for v in document["versions"]] == [
        ("1.0.0", False),
        ("1.1.0", True),
    ]
    with api.records.read() as session:
        assert session.scalars(select(Event).where(Event.kind == "model.withdrawn")).one().alert is True
    assert api.post(f"{URL}/threshold/rollback").json()["active_version"] == "1.0.0"
    assert_problem(api.post(f"{URL}/threshold/activate", json={"version": "1.1.0"}), 409, "MODEL_WITHDRAWN")


@pytest.mark.parametrize("name", ["nothing", "..", "%2e%2e", "A", "x" * 65, "%00"])
def test_an_unknown_model_is_not_found(api: ApiHarness, name: str) -> None:
    api.install()
    for method, path in (
        ("POST", f"{URL}/{name}/rollback"),
        ("POST", f"{URL}/{name}/1.0.0/withdraw"),
        ("POST", f"{URL}/threshold/{name}/withdraw"),
        ("GET", f"{URL}/{name}/1.0.0/studies"),
        ("GET", f"{URL}/threshold/{name}/studies"),
    ):
        assert api.request(method, path).status_code in (404, 422), path
    assert_problem(api.post(f"{URL}/threshold/activate", json={"version": "9.0.0"}), 404, "MODEL_UNKNOWN")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "MALFORMED"),
        (b"", 422, "INVALID_REQUEST"),
        (b"[]", 422, "INVALID_REQUEST"),
        (b'{"version": 1}', 422, "INVALID_REQUEST"),
        (b'{"version": "1.0.0", "force": true}', 422, "INVALID_REQUEST"),
        (b'{"version": "' + b"1" * 70_000 + b'"}', 413, "BODY_TOO_LARGE"),
        (b"\xff\xfe", 400, "MALFORMED"),
        (b"[" * 30_000, 400, "MALFORMED"),
    ],
)
def test_a_body_that_makes_no_sense_is_told_so(api: ApiHarness, body: bytes, status: int, code: str) -> None:
    response = api.post(
        f"{URL}/threshold/activate", content=body, headers={"Content-Type": "application/json"}
    )
    assert_problem(response, status, code)


def test_json_must_say_that_it_is_json(api: ApiHarness) -> None:
    response = api.post(
        f"{URL}/threshold/activate", content=b'{"version": "1.0.0"}', headers={"Content-Type": "text/plain"}
    )
    assert_problem(response, 415, "UNSUPPORTED_MEDIA_TYPE")


def test_a_damaged_version_is_listed_with_its_fault(api: ApiHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    api.install()
    api.install(version="1.1.0", thresholds=(50.5, 300.5))
    get = api.registry.get

    def damaged(name: str, version: str) -> Bundle:
        if version == "1.1.0":
            raise BundleError("'student.onnx' was altered.")
        return get(name, version)

    monkeypatch.setattr(api.registry, "get", damaged)
    (document,) = api.get(URL).json()
    assert [v["fault"] for v in document["versions"]] == [None, "'student.onnx' was altered."]


def test_a_recall_finds_every_study_that_a_version_has_touched(api: ApiHarness) -> None:
    api.install()
    api.install(version="1.1.0", thresholds=(50.5, 300.5))
    first = api.enqueue(destinations=["pacs"])
    api.succeed(first, version="1.0.0")
    upload = api.enqueue(owner="uploader", study=None)
    api.succeed(upload, version="1.0.0", dicom=False)
    other = api.enqueue(study=f"{STUDY}.2")
    api.succeed(other, version="1.1.0")
    recalled = api.get(f"{URL}/threshold/1.0.0/studies").json()["items"]
    assert {each["job_id"]: each["study_instance_uid"] for each in recalled} == {first: STUDY, upload: None}
    (delivery,) = next(each for each in recalled if each["job_id"] == first)["deliveries"]
    assert (delivery["destination"], delivery["state"]) == ("pacs", "pending")
    assert delivery["sop_instance_uid"].startswith("2.25.")
    page = api.get(f"{URL}/threshold/1.0.0/studies?limit=1").json()
    rest = api.get(f"{URL}/threshold/1.0.0/studies?limit=1&after={page['next']}").json()
    assert {page["items"][0]["job_id"], rest["items"][0]["job_id"]} == {first, upload}
    assert rest["next"] is None
