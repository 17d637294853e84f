"""The README's figures are those of a log that is committed."""

from __future__ import annotations

import importlib
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
