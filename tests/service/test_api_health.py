"""Health, readiness and metrics: who may ask, and what they are told."""

from __future__ import annotations

from pathlib import Path

from api_harness import ApiHarness, assert_problem
from sqlalchemy import text
from structlog.testing import capture_logs

from service.records.database import Records


def test_health_is_open_and_says_nothing_else(api: ApiHarness) -> None:
    response = api.get("/healthz", key=None)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_a_node_without_an_active_model_is_not_ready(api: ApiHarness) -> None:
    response = api.get("/readyz", key=None)
    assert response.status_code == 503
    assert response.json() == {"ready": False, "records": True, "spool": True, "model": False}
    api.install()
    response = api.get("/readyz", key=None)
    assert response.status_code == 200
    assert response.json() == {"ready": True, "records": True, "spool": True, "model": True}
    api.registry.withdraw("threshold", "1.0.0")
    assert api.get("/readyz", key=None).json()["model"] is False


def test_a_full_disk_and_lost_records_make_it_not_ready(tmp_path: Path, records: Records) -> None:
    api = ApiHarness(tmp_path, records, storage={"low_watermark_bytes": 1 << 60, "reserve_bytes": 0})
    api.install()
    with capture_logs():
        response = api.get("/readyz", key=None)
    assert (response.status_code, response.json()["spool"]) == (503, False)
    records.close()
    (tmp_path / "records.sqlite").unlink()
    (tmp_path / "records.sqlite").mkdir()
    with capture_logs() as logs:
        response = api.get("/readyz", key=None)
    assert [line["event"] for line in logs] == ["readiness.records", "readiness.spool"]
    assert (response.status_code, response.json()["records"]) == (503, False)
    assert "sqlite" not in response.text
    assert api.get("/healthz", key=None).status_code == 200


def test_metrics_are_open_on_loopback(api: ApiHarness) -> None:
    response = api.get("/metrics", key=None)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "segnode_jobs{" in response.text


def test_metrics_take_an_operator_where_others_can_reach_them(tmp_path: Path, records: Records) -> None:
    api = ApiHarness(tmp_path, records, http={"host": "0.0.0.0", "behind_tls_proxy": True})
    assert_problem(api.get("/metrics", key=None), 401, "KEY_MISSING")
    assert_problem(api.get("/metrics", key="uploader"), 403, "ROLE_TOO_LOW")
    assert api.get("/metrics", key="operator").status_code == 200


def test_a_proxy_on_the_same_machine_does_not_open_metrics(tmp_path: Path, records: Records) -> None:
    api = ApiHarness(tmp_path, records, http={"host": "127.0.0.1", "behind_tls_proxy": True})
    assert_problem(api.get("/metrics", key=None), 401, "KEY_MISSING")


def test_lost_records_are_a_problem_that_may_pass(api: ApiHarness) -> None:
    with api.records.write() as session:
        session.execute(text("ALTER TABLE job RENAME TO gone"))
    response = api.get("/metrics", key=None)
    problem = assert_problem(response, 503, "RECORDS_UNAVAILABLE")
    assert problem["retryable"] is True
    assert response.headers["retry-after"]
    assert "job" not in response.text
