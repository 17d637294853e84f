"""Whoever asks too often is told how long to wait; others are not held up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_harness import ApiHarness, assert_problem
from sqlalchemy import select
from structlog.testing import capture_logs

from service.api.rates import Buckets
from service.records.database import Records
from service.records.tables import Event, Role
from service.security_rules import RateRule

RULE = RateRule(per_s=2, burst=3)
NONE = {"address": None, "key": None}
Make = Callable[..., ApiHarness]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def make(tmp_path: Path, records: Records) -> Make:
    def begin(**rates: Any) -> ApiHarness:
        with capture_logs():
            return ApiHarness(
                tmp_path,
                records,
                storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
                http={"rates": {**NONE, **rates}},
            )

    return begin


def test_a_bucket_empties_and_fills_again() -> None:
    clock = Clock()
    buckets = Buckets(RULE, clock=clock)
    assert [buckets.take("a") for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert buckets.take("b") == 0  # another's is another's
    clock.now_s = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    clock.now_s = 100.0  # it holds no more than its burst
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_no_rule_sets_no_limit() -> None:
    assert not any(Buckets(None).take("a") for _ in range(1000))


def test_the_oldest_bucket_is_forgotten_first() -> None:
    buckets = Buckets(RULE, capacity=2, clock=Clock())
    for name in ("a", "a", "a", "b", "a", "c"):
        buckets.take(name)
    assert buckets.take("a") > 0
    assert buckets.take("c") == 0
    assert set(buckets._buckets) == {"a", "c"}


def test_a_key_that_asks_too_often_waits_and_another_does_not(make: Make) -> None:
    api = make(key={"per_s": 0.01, "burst": 2})
    api.make_key("second", Role.OPERATOR)
    assert [api.get("/api/v1/jobs", key="operator").status_code for _ in range(2)] == [200, 200]
    response = api.get("/api/v1/jobs", key="operator")
    problem = assert_problem(response, 429, "TOO_MANY_REQUESTS")
    assert problem["retryable"]
    assert 1 <= int(response.headers["retry-after"]) <= 100
    assert api.get("/api/v1/jobs", key="second").status_code == 200
    with api.records.read() as session:
        (event,) = session.scalars(select(Event).where(Event.kind == "access.refused"))
    assert (event.actor, event.outcome, event.detail["status"]) == ("operator", "refused", 429)


def test_an_address_that_asks_too_often_waits_whatever_its_key(make: Make) -> None:
    api = make(address={"per_s": 0.01, "burst": 2})
    assert_problem(api.get("/api/v1/jobs", key=None), 401, "KEY_MISSING")
    assert api.get("/api/v1/jobs", key="operator").status_code == 200
    for key in (None, "operator", "admin"):
        response = api.get("/api/v1/jobs", key=key)
        assert_problem(response, 429, "TOO_MANY_REQUESTS")
        assert response.headers["x-content-type-options"] == "nosniff"
    assert api.get("/healthz", key=None).status_code == 200  # whoever watches is never told to wait


def test_every_answer_has_the_headers_that_protect(make: Make) -> None:
    api = make()
    for response in (api.get("/api/v1/jobs"), api.get("/api/v1/jobs", key=None), api.get("/nowhere")):
        headers = response.headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "strict-transport-security" not in headers


def test_a_browser_is_told_to_stay_with_tls_where_there_is_tls(tmp_path: Path, records: Records) -> None:
    api = ApiHarness(
        tmp_path,
        records,
        storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
        http={"behind_tls_proxy": True},
    )
    headers = api.get("/healthz").headers
    assert int(headers["strict-transport-security"].partition("max-age=")[2].partition(";")[0]) >= 31536000
