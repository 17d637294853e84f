"""A version on trial in a real process: what it gives, what it takes, and that nothing of it stays."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from api_harness import ApiHarness
from governed_node import finish_job, image, labels_of
from sqlalchemy import select

from service.gate import golden_figures, run_gate
from service.gate_checks import judge_golden
from service.orders import order_of_job
from service.protocol import RunJob
from service.records.database import utc_now
from service.records.governance_tables import Comparison
from service.settings import Settings
from service.shadow import ShadowRunner, start_shadow
from service.site_cases import approve_case
from service.trial import Trial, peak_memory_bytes
from service.watch import StoppingError

NEVER = threading.Event()


@pytest.fixture
def settings(api: ApiHarness) -> Settings:
    worker = api.settings.worker.model_copy(update={"runtime": "onnxruntime", "threads": 1})
    return api.settings.model_copy(update={"worker": worker})


def order(api: ApiHarness, settings: Settings, job_id: str) -> RunJob:
    with api.records.read() as session:
        return order_of_job(session, settings, api.spool, job_id, attempt=0, output_dir=Path("unused"))


def test_a_version_runs_its_golden_case_and_a_job_and_leaves_nothing(
    api: ApiHarness, settings: Settings
) -> None:
    api.install()
    job_id = finish_job(api)
    before = api.spool_files()
    with Trial(settings, api.registry.active("threshold"), NEVER) as trial:
        assert judge_golden(golden_figures(trial, api.registry.active("threshold"))).passed
        run = trial.run(order(api, settings, job_id))
        assert run.labelmap is not None
        assert np.array_equal(run.labelmap.array, labels_of(image()))
        assert (run.runtime, run.precision) == ("onnxruntime", "float32")
        assert run.seconds > 0
        assert (run.peak_bytes or 0) > 30 * 1024**2
        (api.spool.root / order(api, settings, job_id).job.channels[0][0]).write_bytes(b"damaged")
        refused = trial.run(order(api, settings, job_id))
        assert (refused.code, refused.labelmap) == ("UNREADABLE", None)
    assert api.spool_files() == before
    assert list((settings.data_dir / "trials").iterdir()) == []


def test_a_model_that_cannot_be_loaded_is_a_sentence(api: ApiHarness, settings: Settings) -> None:
    api.install()
    bundle = api.registry.active("threshold")
    (bundle.folder / "student.onnx").write_bytes(b"damaged")
    with Trial(settings, bundle, NEVER) as trial:
        run = trial.run_golden_case()
    assert run.code == "BUNDLE_INVALID"
    assert "student.onnx" in (run.sentence or "")


def test_a_stop_ends_it(api: ApiHarness, settings: Settings) -> None:
    api.install()
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppingError), Trial(settings, api.registry.active("threshold"), stop) as trial:
        trial.run_golden_case()


def test_gate_and_shadow_agree_with_the_processes(api: ApiHarness, settings: Settings) -> None:
    api.install()
    worse = api.install(version="1.1.0", thresholds=(150.5, 300.5), activate=False)
    start_shadow(api.records, api.registry, "threshold", worse, actor="admin", now=api.now)
    job_id = finish_job(api)
    approve_case(api.records, api.spool, api.registry, job_id, None, actor="operator", now=utc_now())
    report = run_gate(
        settings,
        api.records,
        api.spool,
        api.registry,
        "threshold",
        worse,
        accept_changed_labels=False,
        stop=NEVER,
    )
    assert not report.passed
    assert any("low has Dice 0.0000" in sentence for sentence in report.failed_sentences)
    assert ShadowRunner(settings, api.records, api.spool, api.registry).run_one(NEVER)
    with api.records.read() as session:
        (row,) = session.scalars(select(Comparison))
    assert (row.labels["low"]["dice"], row.labels["high"]["dice"]) == (0.0, 1.0)
    assert row.peak_bytes is not None


def test_memory_is_told_of_processes_that_are_there() -> None:
    assert (peak_memory_bytes(os.getpid()) or 0) > 1024**2
    assert peak_memory_bytes(2**22 + 1) is None
