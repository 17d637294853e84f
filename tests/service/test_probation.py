"""After an activation: a version that fails here goes by itself, and what it spoiled is done again."""

from __future__ import annotations

import threading

import pytest
from api_harness import ApiHarness
from sqlalchemy import select
from trial_stand_in import TrialStandIn

from models.errors import ModelWithdrawnError, RegistryError
from service import probation as probation_module
from service.activation import activate
from service.errors import AttemptError
from service.probation import Probation
from service.records.database import utc_now
from service.records.governance_tables import Activation, ActivationState
from service.records.jobs import bind_model, claim_job, fail_attempt
from service.records.tables import Event, Job, JobState

NEVER = threading.Event()


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> type[TrialStandIn]:
    stand_in = TrialStandIn.fresh()
    monkeypatch.setattr(probation_module, "Trial", stand_in)
    return stand_in


@pytest.fixture
def probation(api: ApiHarness, trial: type[TrialStandIn]) -> Probation:
    """Version 1.1.0 has just taken the place of 1.0.0."""
    api.install()
    api.install(version="1.1.0", title="Another title", activate=False)
    without_gate = api.settings.models.model_copy(update={"require_gate": False})
    api.now = utc_now()
    activate(api.records, api.registry, without_gate, "threshold", "1.1.0", actor="admin", now=api.now)
    return Probation(api.settings, api.records, api.registry)


def states(api: ApiHarness) -> list[ActivationState]:
    with api.records.read() as session:
        return list(session.scalars(select(Activation.state).order_by(Activation.activated_at)))


def alerts(api: ApiHarness) -> list[tuple[str, str]]:
    with api.records.read() as session:
        return [
            (event.kind, event.subject)
            for event in session.scalars(select(Event).where(Event.alert).order_by(Event.event_id))
        ]


def fail(api: ApiHarness, job_id: str) -> None:
    digest = api.registry.active("threshold").digest
    with api.records.write() as session:
        job = claim_job(session, owner="worker", lease_s=60, now=utc_now())
        assert job is not None
        assert job.job_id == job_id
        bind_model(session, job_id, job.attempt, version="1.1.0", digest=digest)
        error = AttemptError("CHILD_DIED", "It died.")
        fail_attempt(session, job_id, job.attempt, error, retry_after_s=0, maximum_failures=1, now=utc_now())


def succeed(api: ApiHarness) -> None:
    job_id = api.enqueue(study=None)
    api.now = utc_now()
    job = api.claim(job_id, version="1.1.0")
    digest = api.registry.active("threshold").digest
    with api.records.write() as session:
        bind_model(session, job_id, job.attempt, version="1.1.0", digest=digest)
        row = session.get_one(Job, job_id)
        row.state, row.finished_at = JobState.SUCCEEDED, utc_now()


def test_a_golden_case_that_comes_out_right_is_run_once_in_a_worker(
    api: ApiHarness, probation: Probation, trial: type[TrialStandIn]
) -> None:
    assert probation.prove_active(NEVER)
    assert not probation.prove_active(NEVER)
    assert trial.runs == [("1.1.0", "golden")]
    assert Probation(api.settings, api.records, api.registry).prove_active(NEVER)  # another worker
    assert states(api) == [ActivationState.ON_PROBATION]


def test_a_golden_case_that_fails_here_rolls_back(
    api: ApiHarness, probation: Probation, trial: type[TrialStandIn]
) -> None:
    trial.thresholds["1.1.0"] = (1e9, 2e9)  # this machine's runtime finds nothing
    assert probation.prove_active(NEVER)
    assert api.registry.active_version("threshold") == "1.0.0"
    assert states(api) == [ActivationState.ROLLED_BACK]
    assert alerts(api) == [("model.rolled_back_by_itself", "threshold@1.1.0")]
    (document,) = api.get("/api/v1/models/threshold/activations").json()
    assert document["reason"].startswith("The bundle's golden case disagrees: ")
    assert not probation.prove_active(NEVER)


def test_too_many_failures_roll_back_and_are_done_again(api: ApiHarness, probation: Probation) -> None:
    for _ in range(3):
        succeed(api)
    failed = [api.enqueue(study=None) for _ in range(1)]
    fail(api, failed[0])
    assert probation.sweep(utc_now()) == 0  # one of four is a quarter, and not more
    failed.append(api.enqueue(study=None))
    fail(api, failed[1])
    assert probation.sweep(utc_now()) == 1
    assert api.registry.active_version("threshold") == "1.0.0"
    assert alerts(api)[-1] == ("model.rolled_back_by_itself", "threshold@1.1.0")
    with api.records.read() as session:
        again = set(session.scalars(select(Job.job_id).where(Job.state == JobState.QUEUED)))
        (event,) = session.scalars(select(Event).where(Event.kind == "model.rolled_back_by_itself"))
    assert again == set(failed)
    assert event.detail == {
        "reason": "2 of 5 jobs failed since it was activated.",
        "back_to": "1.0.0",
        "jobs_queued_again": 2,
    }


def test_a_few_jobs_say_nothing_about_a_rate(api: ApiHarness, probation: Probation) -> None:
    for _ in range(3):
        fail(api, api.enqueue(study=None))
    assert probation.sweep(utc_now()) == 0
    assert api.registry.active_version("threshold") == "1.1.0"


def test_a_version_that_has_stood_the_test_is_confirmed(api: ApiHarness, probation: Probation) -> None:
    for _ in range(api.settings.probation.jobs):
        assert states(api) == [ActivationState.ON_PROBATION]
        assert probation.sweep(utc_now()) == 0
        succeed(api)
    assert probation.sweep(utc_now()) == 1
    assert states(api) == [ActivationState.CONFIRMED]
    assert api.registry.active_version("threshold") == "1.1.0"


def test_with_nothing_to_go_back_to_it_alerts_once(
    api: ApiHarness, probation: Probation, trial: type[TrialStandIn]
) -> None:
    api.registry.withdraw("threshold", "1.0.0")
    trial.thresholds["1.1.0"] = (1e9, 2e9)
    assert probation.prove_active(NEVER)
    assert not probation.prove_active(NEVER)
    assert api.registry.active_version("threshold") == "1.1.0"
    assert states(api) == [ActivationState.FAILED]
    assert alerts(api) == [("model.not_rolled_back", "threshold@1.1.0")]


def test_what_a_person_rolled_back_is_not_watched_any_more(
    api: ApiHarness, probation: Probation, trial: type[TrialStandIn]
) -> None:
    assert api.post("/api/v1/models/threshold/rollback").json()["active_version"] == "1.0.0"
    assert states(api) == [ActivationState.REPLACED]
    assert not probation.prove_active(NEVER)
    assert trial.runs == []


def test_a_withdrawn_version_starts_no_job(api: ApiHarness, probation: Probation) -> None:
    api.registry.withdraw("threshold", "1.1.0")
    with pytest.raises(ModelWithdrawnError):
        api.registry.active("threshold")


def test_what_another_worker_has_put_in_its_place_stays(api: ApiHarness, probation: Probation) -> None:
    api.install(version="1.2.0", title="A third")
    with pytest.raises(RegistryError, match=r"1\.1\.0 of 'threshold' is not the active one"):
        api.registry.rollback("threshold", only_from="1.1.0")
    assert api.registry.active_version("threshold") == "1.2.0"
