"""Nobody without the role does what the role guards, and uploaders see their own jobs alone."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta

import pytest
from api_harness import STUDY, ApiHarness, assert_problem, nifti
from fastapi.routing import APIRoute
from sqlalchemy import text

from service.api.access import MINIMUM_ROLE
from service.api.app import NOUNS
from service.keys import create_key, revoke
from service.logs import configure_logging
from service.records.tables import Role

JOB = "0" * 32

# (operation, method, path, lowest role): written out again on purpose, so that the table cannot change alone.
OPERATIONS = [
    ("create_segmentation", "POST", "/api/v1/segmentations", "uploader"),
    ("read_segmentation", "GET", f"/api/v1/segmentations/{JOB}", "uploader"),
    ("read_labelmap", "GET", f"/api/v1/segmentations/{JOB}/labelmap", "uploader"),
    ("read_segmentation_object", "GET", f"/api/v1/segmentations/{JOB}/segmentation", "uploader"),
    ("read_measurements", "GET", f"/api/v1/segmentations/{JOB}/measurements", "uploader"),
    ("read_report", "GET", f"/api/v1/segmentations/{JOB}/report", "uploader"),
    ("read_capture", "GET", f"/api/v1/segmentations/{JOB}/capture", "uploader"),
    ("list_results", "GET", f"/api/v1/segmentations/{JOB}/results", "uploader"),
    ("read_result", "GET", f"/api/v1/segmentations/{JOB}/results/{JOB}", "uploader"),
    ("read_preview", "GET", f"/api/v1/segmentations/{JOB}/preview.png", "uploader"),
    ("delete_segmentation", "DELETE", f"/api/v1/segmentations/{JOB}", "uploader"),
    ("list_studies", "GET", "/api/v1/studies", "operator"),
    ("read_study", "GET", f"/api/v1/studies/{STUDY}", "operator"),
    ("delete_study", "DELETE", f"/api/v1/studies/{STUDY}", "admin"),
    ("list_jobs", "GET", "/api/v1/jobs", "operator"),
    ("retry_job", "POST", f"/api/v1/jobs/{JOB}/retry", "operator"),
    ("list_deliveries", "GET", "/api/v1/deliveries", "operator"),
    ("retry_delivery", "POST", f"/api/v1/deliveries/{JOB}/retry", "operator"),
    ("list_destinations", "GET", "/api/v1/destinations", "operator"),
    ("echo_destination", "POST", "/api/v1/destinations/pacs/echo", "operator"),
    ("list_cases", "GET", "/api/v1/cases", "operator"),
    ("approve_case", "POST", "/api/v1/cases", "operator"),
    ("remove_case", "DELETE", f"/api/v1/cases/{JOB}", "operator"),
    ("list_models", "GET", "/api/v1/models", "admin"),
    ("add_model", "POST", "/api/v1/models", "admin"),
    ("activate_model", "POST", "/api/v1/models/threshold/activate", "admin"),
    ("roll_back_model", "POST", "/api/v1/models/threshold/rollback", "admin"),
    ("withdraw_model", "POST", "/api/v1/models/threshold/1.0.0/withdraw", "admin"),
    ("list_activations", "GET", "/api/v1/models/threshold/activations", "admin"),
    ("read_gate", "GET", "/api/v1/models/threshold/1.0.0/gate", "admin"),
    ("run_gate", "POST", "/api/v1/models/threshold/1.0.0/gate", "admin"),
    ("read_shadow", "GET", "/api/v1/models/threshold/shadow", "admin"),
    ("start_shadow", "POST", "/api/v1/models/threshold/shadow", "admin"),
    ("stop_shadow", "DELETE", "/api/v1/models/threshold/shadow", "admin"),
    ("recall_model", "POST", "/api/v1/models/threshold/1.0.0/recall", "admin"),
    ("list_studies_of_model", "GET", "/api/v1/models/threshold/1.0.0/studies", "admin"),
    ("list_events", "GET", "/api/v1/audit", "admin"),
]
RANK = ["uploader", "operator", "admin"]


def test_every_operation_is_in_this_table() -> None:
    served = {
        (route.name, method)
        for noun in NOUNS
        for route in noun.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert served == {(name, method) for name, method, _, _ in OPERATIONS}
    assert set(MINIMUM_ROLE) == {name for name, _, _, _ in OPERATIONS}


@pytest.mark.parametrize(("operation", "method", "path", "lowest"), OPERATIONS)
def test_each_role_may_do_what_the_table_says(
    api: ApiHarness, operation: str, method: str, path: str, lowest: str
) -> None:
    body = {"json": {"version": "1.0.0"}} if operation in ("activate_model", "start_shadow") else {}
    body = {"json": {}} if operation == "run_gate" else body
    anonymous = api.request(method, path, key=None, **body)
    assert_problem(anonymous, 401, "KEY_MISSING")
    assert anonymous.headers["www-authenticate"].startswith("Bearer")
    for role in RANK:
        response = api.request(method, path, key=role, **body)
        if RANK.index(role) < RANK.index(lowest):
            problem = assert_problem(response, 403, "ROLE_TOO_LOW")
            assert lowest in problem["detail"]
        else:
            assert response.status_code not in (401, 403), response.text
            assert response.status_code < 500


def test_a_key_that_is_no_longer_good_opens_nothing(api: ApiHarness) -> None:
    api.make_key("second", Role.ADMIN)
    with api.records.write() as session:
        revoke(session, api.key_ids["second"], now=api.now)
        _, api.secrets["third"] = create_key(
            session, "third", Role.ADMIN, api.now + timedelta(hours=1), now=api.now
        )
    assert_problem(api.get("/api/v1/jobs", key="second"), 401, "KEY_INVALID")
    assert api.get("/api/v1/jobs", key="third").status_code == 200
    api.now += timedelta(hours=1)
    assert_problem(api.get("/api/v1/jobs", key="third"), 401, "KEY_INVALID")


@pytest.mark.parametrize(
    "header",
    ["Basic YTpi", "Bearer", "Bearer ", "sgn_x", "Bearer a b", "Bearer \xff\xfe", "Bearer " + "A" * 9000],
)
def test_what_is_no_key_opens_nothing(api: ApiHarness, header: str) -> None:
    headers = {"Authorization": header.encode("latin-1")}
    response = api.get("/api/v1/jobs", key=None, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json()["code"] in ("KEY_MISSING", "KEY_INVALID")


def test_an_uploader_sees_their_own_jobs_alone(api: ApiHarness) -> None:
    api.make_key("other", Role.UPLOADER)
    own = api.enqueue(owner="uploader")
    api.succeed(own)
    for path in ("", "/labelmap", "/segmentation", "/measurements"):
        where = f"/api/v1/segmentations/{own}{path}"
        assert api.get(where, key="uploader").status_code == 200
        assert api.get(where, key="operator").status_code == 200
        stranger = api.get(where, key="other")
        missing = api.get(where.replace(own, "f" * 32), key="other")
        # the same answer as for a job that does not exist
        assert_problem(stranger, 404, "NOT_FOUND")
        assert stranger.text.replace(own, "") == missing.text.replace("f" * 32, "")
    assert_problem(api.delete(f"/api/v1/segmentations/{own}", key="other"), 404, "NOT_FOUND")
    dicom = api.enqueue()
    assert_problem(api.get(f"/api/v1/segmentations/{dicom}", key="uploader"), 404, "NOT_FOUND")


def test_deleting_anothers_job_takes_an_admin(api: ApiHarness) -> None:
    first, second = api.enqueue(owner="uploader"), api.enqueue(owner="uploader")
    assert_problem(api.delete(f"/api/v1/segmentations/{first}", key="operator"), 403, "ROLE_TOO_LOW")
    assert api.delete(f"/api/v1/segmentations/{first}", key="uploader").status_code == 200
    assert api.delete(f"/api/v1/segmentations/{second}", key="admin").status_code == 200


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level, hook, show = root.handlers[:], root.level, sys.excepthook, warnings.showwarning
    stream = io.StringIO()
    configure_logging("DEBUG", stream=stream, as_json=True)
    yield stream
    root.handlers[:], sys.excepthook, warnings.showwarning = handlers, hook, show
    root.setLevel(level)


def test_no_secret_and_no_patient_reaches_the_log(api: ApiHarness, log: io.StringIO) -> None:
    api.install()
    api.receive_instance()
    api.upload(nifti(api.folder))
    api.upload(b"no image")
    api.get("/api/v1/jobs", key=None, headers={"Authorization": "Bearer sgn_" + "x" * 43})
    api.get(f"/api/v1/studies/{STUDY}")
    with api.records.write() as session:
        session.execute(text("ALTER TABLE api_key RENAME TO gone"))
    assert_problem(api.get("/api/v1/jobs"), 503, "RECORDS_UNAVAILABLE")
    assert "http.records_unavailable" in log.getvalue()
    for secret in (*api.secrets.values(), "x" * 43, "SECRET-PATIENT"):
        assert secret not in log.getvalue()
        assert secret.removeprefix("sgn_") not in log.getvalue()
