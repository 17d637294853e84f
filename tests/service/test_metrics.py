"""Metrics: what the records say now, and nothing that comes from a study."""

from __future__ import annotations

from datetime import timedelta

import pytest
from api_harness import STUDY, ApiHarness
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from service.metrics import render_metrics
from service.records.deliveries import claim_delivery, park
from service.records.events import record_event
from service.records.fleet import beat, sign_off
from service.records.jobs import refuse_job
from service.records.tables import Job

pytestmark = pytest.mark.both_engines

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(api: ApiHarness) -> Samples:
    text = render_metrics(api.records, api.spool, api.registry, now=api.now).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, metric: str, /, **labels: str) -> float:
    return samples[metric, frozenset(labels.items())]


def test_a_new_node_has_every_state_at_zero(api: ApiHarness) -> None:
    samples = read(api)
    for state in ("queued", "running", "succeeded", "refused", "failed", "cancelled"):
        assert value(samples, "segnode_jobs", state=state) == 0
    assert value(samples, "segnode_oldest_queued_job_age_seconds") == 0
    assert value(samples, "segnode_parked_deliveries") == 0
    assert value(samples, "segnode_spool_free_bytes") == pytest.approx(api.spool.free_bytes(), rel=0.2)
    assert "segnode_last_success_age_seconds" not in {name for name, _ in samples}
    assert "segnode_active_model" not in {name for name, _ in samples}


def test_jobs_and_deliveries_are_counted_as_they_stand(api: ApiHarness) -> None:
    done = api.enqueue(destinations=["pacs", "archive"])
    api.succeed(done)
    refused = api.enqueue()
    job = api.claim(refused)
    with api.records.write() as session:
        refuse_job(session, refused, job.attempt, code="GANTRY_TILT", reason="r", remedy="", now=api.now)
        delivery = claim_delivery(session, owner="w", lease_s=60, now=api.now)
        assert delivery is not None
        park(session, delivery.delivery_id, delivery.attempt, status=0x0122, error="e")
        record_event(session, "delivery.parked", actor="worker", at=api.now, alert=True)
        record_event(session, "delivery.sent", actor="worker", at=api.now)
    api.enqueue(age=timedelta(seconds=90))
    api.enqueue(age=timedelta(seconds=30))
    parked_at = delivery.destination
    (pending_at,) = {"pacs", "archive"} - {parked_at}
    api.now += timedelta(seconds=10)

    samples = read(api)
    assert value(samples, "segnode_jobs", state="succeeded") == 1
    assert value(samples, "segnode_jobs", state="refused") == 1
    assert value(samples, "segnode_jobs", state="queued") == 2
    assert value(samples, "segnode_jobs_without_result", state="refused", reason_code="GANTRY_TILT") == 1
    assert value(samples, "segnode_oldest_queued_job_age_seconds") == 100
    assert value(samples, "segnode_last_success_age_seconds") == 10
    assert value(samples, "segnode_deliveries", state="parked", destination=parked_at) == 1
    assert value(samples, "segnode_deliveries", state="pending", destination=pending_at) == 1
    assert value(samples, "segnode_parked_deliveries") == 1
    assert value(samples, "segnode_oldest_pending_delivery_age_seconds") == 10
    assert value(samples, "segnode_alerts", kind="delivery.parked") == 1
    assert "delivery.sent" not in str(samples)


def test_jobs_that_no_living_worker_takes_are_counted(api: ApiHarness) -> None:
    api.enqueue()
    with api.records.read() as session:
        model_name = str(session.scalar(select(Job.model_name)))

    def tell(owner: str, *models: str) -> None:
        with api.records.write() as session:
            beat(
                session, owner=owner, host="h", models=models, memory_bytes=1, bell_heard_at=None, now=api.now
            )

    for owner, models, workers, left in (
        (None, (), 0, 1),
        ("gpu", ("other",), 1, 1),
        ("cpu", (model_name,), 2, 0),
    ):
        if owner:
            tell(owner, *models)
        samples = read(api)
        assert value(samples, "segnode_workers") == workers
        assert value(samples, "segnode_jobs_no_worker_takes") == left
    with api.records.write() as session:
        sign_off(session, "cpu")
    assert value(read(api), "segnode_jobs_no_worker_takes") == 1
    tell("any")
    assert value(read(api), "segnode_jobs_no_worker_takes") == 0


def test_the_active_model_is_named_with_its_digest_while_it_can_run(api: ApiHarness) -> None:
    api.install()
    digest = api.registry.get("threshold", "1.0.0").digest
    labels = {"name": "threshold", "version": "1.0.0"}
    assert value(read(api), "segnode_active_model", **labels, digest=digest) == 1
    api.registry.withdraw("threshold", "1.0.0")
    assert value(read(api), "segnode_active_model", **labels, digest="") == 0


def test_nothing_of_a_study_is_in_a_metric(api: ApiHarness) -> None:
    instance = api.receive_instance()
    job = api.enqueue(instances=[instance], destinations=["pacs"])
    api.succeed(job)
    text = render_metrics(api.records, api.spool, api.registry, now=api.now).decode()
    for secret in (STUDY, "SECRET-PATIENT", job, instance):
        assert secret not in text
