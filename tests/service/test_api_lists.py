"""Studies, jobs, deliveries and the audit trail: in pages, filtered, and without a patient."""

from __future__ import annotations

from datetime import timedelta

import pytest
from api_harness import STUDY, ApiHarness, assert_problem
from sqlalchemy import select

from service.records.deliveries import claim_delivery, park
from service.records.instances import complete_series
from service.records.jobs import refuse_job
from service.records.tables import Delivery, Event, Series

pytestmark = pytest.mark.both_engines


def read_all(api: ApiHarness, path: str, key: str) -> list[str]:
    """Every entry of a list, by pages of two."""
    found, after = [], None
    while True:
        separator = "&" if "?" in path else "?"
        page = api.get(f"{path}{separator}limit=2" + (f"&after={after}" if after else "")).json()
        assert len(page["items"]) <= 2
        found += [item[key] for item in page["items"]]
        after = page["next"]
        if after is None:
            return found


def test_jobs_are_read_in_pages_newest_first_and_by_state(api: ApiHarness) -> None:
    jobs = [api.enqueue(age=timedelta(seconds=i // 4)) for i in range(5)]  # pages end among equal ages
    found = read_all(api, "/api/v1/jobs", "job_id")
    assert sorted(found) == sorted(jobs)
    assert found[-1] == jobs[-1]
    api.succeed(jobs[-1])
    assert read_all(api, "/api/v1/jobs?state=succeeded", "job_id") == [jobs[-1]]
    assert len(read_all(api, "/api/v1/jobs?state=queued&model=threshold", "job_id")) == 4
    assert read_all(api, "/api/v1/jobs?model=other", "job_id") == []


def test_a_page_stays_true_while_jobs_are_added(api: ApiHarness) -> None:
    jobs = [api.enqueue(age=timedelta(minutes=i)) for i in range(3)]
    page = api.get("/api/v1/jobs?limit=2").json()
    api.enqueue(age=timedelta(seconds=-5))
    rest = api.get(f"/api/v1/jobs?limit=2&after={page['next']}").json()
    assert [item["job_id"] for item in rest["items"]] == jobs[2:]
    assert_problem(api.get(f"/api/v1/jobs?after={'f' * 32}"), 422, "PAGE_GONE")


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=x", "after=..", "state=unknown", "model=A%00", "after=" + "0" * 33],
)
def test_a_question_that_makes_no_sense_is_told_where(api: ApiHarness, query: str) -> None:
    problem = assert_problem(api.get(f"/api/v1/jobs?{query}"), 422, "INVALID_REQUEST")
    assert problem["errors"][0]["location"] == f"query.{query.partition('=')[0]}"


def test_studies_show_uids_and_states_and_no_patient(api: ApiHarness) -> None:
    first = [api.receive_instance(str(i)) for i in range(2)]
    other = f"{STUDY}.77"
    api.receive_instance(study=other, at=api.now + timedelta(seconds=1))
    with api.records.write() as session:
        series = session.scalars(select(Series).where(Series.study_instance_uid == STUDY)).one()
        complete_series(session, series.series_id, last_instance_at=series.last_instance_at, at=api.now)
    job = api.enqueue(instances=first, destinations=["pacs"])
    api.succeed(job)
    assert read_all(api, "/api/v1/studies", "study_instance_uid") == [other, STUDY]
    listed = api.get("/api/v1/studies", key="operator")
    states = {item["study_instance_uid"]: item["state"] for item in listed.json()["items"]}
    assert states == {STUDY: "complete", other: "receiving"}
    study = api.get(f"/api/v1/studies/{STUDY}", key="operator")
    document = study.json()
    assert document["instance_count"] == 2
    assert document["series"][0]["calling_ae_title"] == "PACS"
    assert document["series"][0]["first_instance_at"] == "2026-03-01T12:00:00Z"
    assert [each["job_id"] for each in document["jobs"]] == [job]
    assert [each["destination"] for each in document["deliveries"]] == ["pacs"]
    assert "SECRET-PATIENT" not in study.text + listed.text


def test_an_unknown_study_is_not_found(api: ApiHarness) -> None:
    assert_problem(api.get("/api/v1/studies/1.2.3"), 404, "NOT_FOUND")
    assert_problem(api.delete("/api/v1/studies/1.2.3"), 404, "NOT_FOUND")
    for trick in ("..", "1.2.3%00", "1.2.3%0a", "%2e%2e%2fetc", "1.2/../x", "' OR 1=1 --", "1" * 65):
        assert api.get(f"/api/v1/studies/{trick}").status_code in (404, 422)


def test_a_study_is_deleted_whole_and_the_trail_keeps_who_did_it(api: ApiHarness) -> None:
    api.receive_instance()
    assert_problem(api.delete(f"/api/v1/studies/{STUDY}"), 409, "CONFLICT")
    with api.records.write() as session:
        series = session.scalars(select(Series)).one()
        complete_series(session, series.series_id, last_instance_at=series.last_instance_at, at=api.now)
    deleted = api.delete(f"/api/v1/studies/{STUDY}")
    assert deleted.json() == {"instances": 1, "jobs": 0, "files": 1, "size_bytes": 8}
    assert_problem(api.get(f"/api/v1/studies/{STUDY}"), 404, "NOT_FOUND")
    event = api.get("/api/v1/audit?kind=study.deleted").json()["items"][0]
    assert (event["actor"], event["subject"]) == ("admin", STUDY)


def test_a_refused_job_is_retried_and_a_waiting_one_is_not(api: ApiHarness) -> None:
    job_id = api.enqueue()
    assert_problem(api.post(f"/api/v1/jobs/{job_id}/retry", key="operator"), 409, "CONFLICT")
    job = api.claim(job_id)
    with api.records.write() as session:
        refuse_job(session, job_id, job.attempt, code="GANTRY_TILT", reason="r", remedy="m", now=api.now)
    retried = api.post(f"/api/v1/jobs/{job_id}/retry", key="operator").json()
    assert (retried["state"], retried["reason"]) == ("queued", None)
    assert_problem(api.post(f"/api/v1/jobs/{'f' * 32}/retry"), 404, "NOT_FOUND")
    with api.records.read() as session:
        event = session.scalars(select(Event).where(Event.kind == "job.retried")).one()
        assert (event.actor, event.subject) == ("operator", job_id)


def test_a_parked_delivery_is_seen_and_retried(api: ApiHarness) -> None:
    api.succeed(api.enqueue(destinations=["pacs", "archive"]))
    with api.records.write() as session:
        delivery = claim_delivery(session, owner="w", lease_s=60, now=api.now)
        assert delivery is not None
        park(session, delivery.delivery_id, delivery.attempt, status=0xA900, error="It refused.")
    where = f"/api/v1/deliveries/{delivery.delivery_id}/retry"
    (parked,) = api.get("/api/v1/deliveries?state=parked", key="operator").json()["items"]
    assert (parked["last_status"], parked["last_error"]) == ("0xA900", "It refused.")
    assert parked["next_attempt_at"] is None
    assert api.post(where, key="operator").json()["state"] == "pending"
    assert_problem(api.post(where, key="operator"), 409, "CONFLICT")
    assert_problem(api.post(f"/api/v1/deliveries/{'f' * 32}/retry"), 404, "NOT_FOUND")
    assert len(read_all(api, "/api/v1/deliveries", "delivery_id")) == 2
    assert len(read_all(api, f"/api/v1/deliveries?destination={delivery.destination}", "delivery_id")) == 1
    with api.records.read() as session:
        assert session.get_one(Delivery, delivery.delivery_id).attempt == 1
        assert (
            session.scalars(select(Event).where(Event.kind == "delivery.retried")).one().actor == "operator"
        )


def test_the_audit_trail_is_read_in_pages_and_by_kind(api: ApiHarness) -> None:
    events = read_all(api, "/api/v1/audit?kind=key.created", "event_id")
    assert events == sorted(events, key=int, reverse=True)
    assert len(events) == 3  # the three keys
    kinds = {item["kind"] for item in api.get("/api/v1/audit?alert=false").json()["items"]}
    assert kinds == {"key.created", "audit.read"}  # to read the trail is an act that stands in it
    assert api.get("/api/v1/audit?alert=true").json() == {"items": [], "next": None}
    assert_problem(api.get(f"/api/v1/audit?after={2**63}"), 422, "INVALID_REQUEST")
