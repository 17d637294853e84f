"""Shadow mode: a candidate on live studies makes a table, and nothing else."""

from __future__ import annotations

import threading
from datetime import timedelta

import numpy as np
import pytest
from api_harness import ApiHarness, assert_problem
from governed_node import finish_job, image, labels_of
from sqlalchemy import func, select
from trial_stand_in import TrialStandIn

from models.errors import ModelWithdrawnError
from service import shadow as shadow_module
from service.errors import ConflictError, NotFoundError
from service.governance import MakingWay
from service.records.database import utc_now
from service.records.governance_tables import Comparison, ComparisonState, Purge
from service.records.tables import Delivery, Result
from service.shadow import ShadowRunner, start_shadow, stop_shadow

NEVER = threading.Event()
URL = "/api/v1/models/threshold/shadow"


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> type[TrialStandIn]:
    stand_in = TrialStandIn.fresh()
    monkeypatch.setattr(shadow_module, "Trial", stand_in)
    return stand_in


@pytest.fixture
def runner(api: ApiHarness, trial: type[TrialStandIn]) -> ShadowRunner:
    """An active version, a candidate that loses the first label, and who compares them."""
    api.install()
    candidate = api.install(version="1.1.0", thresholds=(150.5, 300.5), activate=False)
    trial.thresholds[candidate] = (150.5, 300.5)
    return ShadowRunner(api.settings, api.records, api.spool, api.registry)


def start(api: ApiHarness, version: str = "1.1.0") -> None:
    start_shadow(
        api.records,
        api.registry,
        "threshold",
        version,
        actor="admin",
        now=utc_now() - timedelta(minutes=1),
    )


def table(api: ApiHarness) -> list[Comparison]:
    with api.records.read() as session:
        return list(session.scalars(select(Comparison).order_by(Comparison.created_at)))


def counts(api: ApiHarness) -> tuple[int, int]:
    with api.records.read() as session:
        return tuple(session.scalar(select(func.count()).select_from(t)) or 0 for t in (Result, Delivery))  # type: ignore[return-value]


def test_the_table_grows_with_every_study_and_nothing_leaves(api: ApiHarness, runner: ShadowRunner) -> None:
    before = finish_job(api, destinations=("pacs",))
    assert api.post(URL, json={"version": "1.1.0"}).status_code == 201
    start_again = api.post(URL, json={"version": "1.1.0"})
    assert_problem(start_again, 409, "CONFLICT")
    stop_shadow(api.records, "threshold", actor="admin", now=api.now)
    start(api)
    jobs = [finish_job(api, seed=seed, destinations=("pacs",)) for seed in (1, 2)]
    files, rows = api.spool_files(), counts(api)
    while runner.run_one(NEVER):
        pass
    assert counts(api) == rows
    assert api.spool_files() == files
    document = api.get(URL).json()
    assert (document["version"], document["running"], document["failed"]) == ("1.1.0", True, 0)
    assert {each["job_id"] for each in document["comparisons"]} == {before, *jobs}
    low, high = document["labels"]["low"], document["labels"]["high"]
    lost = int(np.count_nonzero(labels_of(image(1)) == 1))
    assert (low["mean_dice"], high["mean_dice"]) == (0.0, 1.0)
    assert low["largest_difference_ml"] == pytest.approx(-lost / 1000)
    assert high["mean_difference_ml"] == 0.0
    assert document["peak_bytes"] > 0
    assert document["mean_seconds"] == 1.0
    assert document["mean_active_seconds"] == pytest.approx(2.0, abs=0.5)


def test_a_study_is_compared_once_and_only_if_it_ended_after_the_start(
    api: ApiHarness, runner: ShadowRunner, trial: type[TrialStandIn]
) -> None:
    start_shadow(
        api.records, api.registry, "threshold", "1.1.0", actor="a", now=utc_now() + timedelta(hours=1)
    )
    finish_job(api)
    assert not runner.run_one(NEVER)
    stop_shadow(api.records, "threshold", actor="admin", now=api.now)
    start(api)
    assert runner.run_one(NEVER)
    assert not runner.run_one(NEVER)
    assert len(trial.runs) == 1


def test_what_goes_wrong_stands_in_the_table(
    api: ApiHarness, runner: ShadowRunner, trial: type[TrialStandIn]
) -> None:
    start(api)
    finish_job(api)
    trial.refuses.add("1.1.0")
    assert runner.run_one(NEVER)
    (row,) = table(api)
    assert (row.state, row.code, row.reason) == (
        ComparisonState.FAILED,
        "OUT_OF_LIMITS",
        "It takes other images.",
    )
    document = api.get(URL).json()
    assert (document["compared"], document["failed"]) == (0, 1)


def test_a_comparison_makes_way_for_a_job(
    api: ApiHarness, runner: ShadowRunner, trial: type[TrialStandIn]
) -> None:
    start(api)
    finish_job(api)
    stop = threading.Event()
    trial.before = staticmethod(stop.set)  # type: ignore[method-assign]
    assert not runner.run_one(stop)
    assert table(api) == []
    trial.before = staticmethod(lambda: None)  # type: ignore[method-assign]
    assert runner.run_one(NEVER)
    assert len(table(api)) == 1


def test_a_job_that_comes_in_is_noticed(api: ApiHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.governance._LOOK_EVERY_S", 0.0)
    way = MakingWay(NEVER, api.records)
    assert not way.is_set()
    api.enqueue()
    assert way.is_set()
    stopped = threading.Event()
    stopped.set()
    assert MakingWay(stopped, api.records).is_set()


def test_only_another_usable_version_runs_in_shadow(api: ApiHarness, runner: ShadowRunner) -> None:
    with pytest.raises(ConflictError, match="is the active one"):
        start(api, "1.0.0")
    api.registry.withdraw("threshold", "1.1.0")
    with pytest.raises(ModelWithdrawnError):
        start(api)
    with pytest.raises(NotFoundError):
        stop_shadow(api.records, "threshold", actor="admin", now=api.now)
    assert_problem(api.get(URL), 404, "NOT_FOUND")
    assert_problem(api.post(URL, json={"version": "9.9.9"}), 404, "MODEL_UNKNOWN")


def test_it_ends_when_the_candidate_is_withdrawn_or_becomes_active(
    api: ApiHarness, runner: ShadowRunner
) -> None:
    start(api)
    finish_job(api)
    api.registry.activate("threshold", "1.1.0")
    assert not runner.run_one(NEVER)
    assert api.get(URL).json()["stopped_by"] == "shadow"
    assert table(api) == []


def test_a_purged_study_is_not_compared(api: ApiHarness, runner: ShadowRunner) -> None:
    start(api)
    job_id = finish_job(api)
    with api.records.write() as session:
        session.add(Purge(job_id=job_id, purged_at=api.now))
    assert not runner.run_one(NEVER)


def test_a_result_that_cannot_be_read_is_said(api: ApiHarness, runner: ShadowRunner) -> None:
    start(api)
    job_id = finish_job(api)
    (api.spool.results_dir / job_id / "labelmap.nii.gz").write_bytes(b"damaged")
    assert runner.run_one(NEVER)
    (row,) = table(api)
    assert row.reason == "The active version's labelmap cannot be compared with."
