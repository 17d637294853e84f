"""A recall: the version stops, what has not left is held back, and whatever has is named."""

from __future__ import annotations

import pytest
from api_harness import STUDY, ApiHarness, assert_problem
from sqlalchemy import select

from models.errors import ModelWithdrawnError
from service.errors import LostClaimError
from service.recall import recall
from service.records.deliveries import claim_delivery, mark_sent, retry_delivery
from service.records.jobs import release_job
from service.records.tables import Delivery, DeliveryState, Event, Job, JobState

URL = "/api/v1/models/threshold/1.0.0/recall"


@pytest.fixture
def touched(api: ApiHarness) -> dict[str, str]:
    """One study delivered, one whose delivery waits, one that runs, and one of another version."""
    api.install()
    api.install(version="1.1.0", title="Another title")
    delivered = api.enqueue(destinations=["pacs"])
    api.succeed(delivered)
    with api.records.write() as session:
        delivery = claim_delivery(session, owner="w", lease_s=60, now=api.now)
        assert delivery is not None
        mark_sent(session, delivery.delivery_id, delivery.attempt, status=0, note=None, now=api.now)
    waiting = api.enqueue(destinations=["pacs"], study=f"{STUDY}.2")
    api.succeed(waiting)
    other = api.enqueue(destinations=["pacs"], study=f"{STUDY}.3")
    api.succeed(other, version="1.1.0")
    running = api.enqueue(destinations=["pacs"], study=f"{STUDY}.4")
    api.claim(running)
    return {"delivered": delivered, "waiting": waiting, "running": running, "other": other}


def delivery_states(api: ApiHarness) -> dict[str, DeliveryState]:
    with api.records.read() as session:
        return {each.job_id: each.state for each in session.scalars(select(Delivery))}


def test_a_recall_names_what_left_and_holds_back_the_rest(api: ApiHarness, touched: dict[str, str]) -> None:
    document = api.post(URL).json()
    assert (document["studies"], document["jobs"]) == (3, 3)
    assert (document["deliveries_held_back"], document["deliveries_that_left"]) == (1, 1)
    assert document["jobs_taken_back"] == 1
    listed = {each["job_id"]: each for each in document["deliveries"]}
    assert set(listed) == {touched["delivered"], touched["waiting"]}
    left = listed[touched["delivered"]]
    assert (left["study_instance_uid"], left["destination"], left["state"]) == (STUDY, "pacs", "sent")
    assert left["sop_instance_uid"] == f"2.25.{int(touched['delivered'], 16)}"
    assert delivery_states(api) == {
        touched["delivered"]: DeliveryState.SENT,
        touched["waiting"]: DeliveryState.PARKED,
        touched["other"]: DeliveryState.PENDING,
    }
    with api.records.read() as session:
        (alert,) = session.scalars(select(Event).where(Event.kind == "model.recalled"))
        (line,) = session.scalars(select(Event).where(Event.kind == "result.recalled"))
    assert (alert.alert, alert.actor, alert.subject) == (True, "admin", "threshold@1.0.0")
    assert alert.detail["deliveries_that_left"] == 1
    assert line.subject == touched["delivered"]
    assert line.detail["delivered"] == [{"destination": "pacs", "sop_instance_uid": left["sop_instance_uid"]}]


def test_a_job_that_runs_on_it_is_taken_from_its_worker(api: ApiHarness, touched: dict[str, str]) -> None:
    api.post(URL)
    with api.records.read() as session:
        job = session.get_one(Job, touched["running"])
    assert (job.state, job.lease_owner) == (JobState.QUEUED, None)
    with pytest.raises(LostClaimError), api.records.write() as session:
        release_job(session, job.job_id, job.attempt)


def test_a_recalled_version_starts_no_job_and_is_not_activated(
    api: ApiHarness, touched: dict[str, str]
) -> None:
    api.post(URL)
    assert api.registry.is_withdrawn("threshold", "1.0.0")
    with pytest.raises(ModelWithdrawnError):
        api.registry.activate("threshold", "1.0.0")
    response = api.post("/api/v1/models/threshold/activate", json={"version": "1.0.0"})
    assert_problem(response, 409, "MODEL_WITHDRAWN")


def test_a_person_lets_go_what_was_held_back(api: ApiHarness, touched: dict[str, str]) -> None:
    api.post(URL)
    with api.records.write() as session:
        held = session.scalars(select(Delivery).where(Delivery.job_id == touched["waiting"])).one()
        assert "was recalled" in (held.last_error or "")
        retry_delivery(session, held.delivery_id, now=api.now)
    assert delivery_states(api)[touched["waiting"]] is DeliveryState.PENDING


def test_a_recall_can_be_made_again(api: ApiHarness, touched: dict[str, str]) -> None:
    api.post(URL)
    again = recall(api.records, api.registry, "threshold", "1.0.0", actor="admin", now=api.now)
    assert (again.jobs, again.held_back, again.jobs_taken_back) == (3, 0, 0)


def test_an_unknown_version_is_not_recalled(api: ApiHarness, touched: dict[str, str]) -> None:
    assert_problem(api.post("/api/v1/models/threshold/9.9.9/recall"), 404, "MODEL_UNKNOWN")
