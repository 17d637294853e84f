"""The README's figures are those of a log that is committed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    return importlib.import_module("engine_report")


def test_the_table_is_made_of_a_committed_log(report: Any) -> None:
    readme = (ROOT / "README.md").read_text()
    logs = sorted((ROOT / "tests" / "benchmarks" / "results").glob("engine-*.jsonl"))
    assert any(report.into(readme, report.markdown(report.Log(None, (log,)))) == readme for log in logs)


def test_the_throughput_of_two_workers_is_that_of_the_committed_log(report: Any) -> None:
    scale_out = importlib.import_module("scale_out_report")
    paper = (ROOT / "deploy" / "SCALE-OUT.md").read_text()
    log = ROOT / "tests" / "benchmarks" / "results" / "scale-out.json"
    table = scale_out.markdown(json.loads(log.read_text())) if log.exists() else scale_out.EMPTY
    assert report.into(paper, table) == paper


def test_two_workers_stand_beside_one(report: Any) -> None:
    scale_out = importlib.import_module("scale_out_report")
    runs = [
        {"workers": workers, "seconds": seconds, "seconds_a_job": 1.5, "load_before": 0.0}
        for workers, seconds in ((1, 60.0), (2, 30.0), (1, 90.0), (2, 40.0), (1, 80.0), (2, 50.0))
    ]
    table = scale_out.markdown({"machine": "a machine", "studies": 40, "runs": runs})
    assert "| one worker | 30.0 | 1.00x | 1.50 |" in table
    assert "| two workers | 60.0 | 2.00x | 1.50 |" in table
    assert "40 studies, median of 3 runs, one thread a worker. Measured on a machine." in table


def test_a_log_is_taken_up_where_it_ended(report: Any, tmp_path: Path) -> None:
    first = report.Log(tmp_path / "log.jsonl")
    first.begin("a machine")
    run = {"name": report.FLOAT32, "seconds": dict.fromkeys(report.STAGES, 1.0), "peak_bytes": 2**30}
    first.add(run | {"cpu_seconds": 3.0, "estimate_bytes": 2**30})
    second = report.Log(tmp_path / "log.jsonl")
    second.begin("another machine")
    assert second.machine == "a machine"
    assert second.records == first.records
    assert second.median(report.FLOAT32)["total"] == len(report.STAGES) - 1  # loading is not counted
    assert "memory estimated 1024 MiB, measured 1024 MiB" in report.text(second)


def test_a_document_without_a_place_for_the_table_is_refused(report: Any) -> None:
    with pytest.raises(ValueError, match="has no"):
        report.into("nothing marked", report.markdown(report.Log()))
