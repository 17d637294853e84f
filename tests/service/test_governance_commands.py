"""The commands around models: cases, shadow mode, recall and the gate, as a person at a terminal has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import ApiHarness
from command_line import Segnode, command_line
from governed_node import finish_job
from small_node import make_node
from trial_stand_in import TrialStandIn

from service import gate as gate_module
from service.records.database import Records


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ApiHarness]:
    """A node's own folder, with an active version and another that is worse."""
    made = make_node(tmp_path / "data")
    records = Records(made.settings.records_url)
    api = ApiHarness(tmp_path, records)
    api.install()
    api.install(version="1.1.0", thresholds=(150.5, 300.5), activate=False)
    yield api
    records.close()
    made.records.close()


@pytest.fixture
def segnode(
    node: ApiHarness,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Segnode]:
    stand_in = TrialStandIn.fresh()
    stand_in.thresholds["1.1.0"] = (150.5, 300.5)
    monkeypatch.setattr(gate_module, "Trial", stand_in)
    with command_line(tmp_path, monkeypatch, capfd) as run:
        Path("node.yaml").write_text(f"data_dir: {node.settings.data_dir}\n")
        monkeypatch.setenv("SEGNODE_CONFIG", "node.yaml")
        yield run


def test_a_case_is_approved_listed_and_removed_and_decides_at_the_gate(
    node: ApiHarness, segnode: Segnode
) -> None:
    job_id = finish_job(node)
    assert segnode("models", "cases", "approve", job_id).status == 2  # neither a labelmap nor as produced
    approved = segnode("models", "cases", "approve", job_id, "--as-produced")
    assert approved.status == 0, approved.err
    case_id = approved.out.strip()
    assert case_id in segnode("models", "cases", "list", "threshold").out
    refused = segnode("models", "gate", "threshold", "1.1.0")
    assert refused.status == 4
    assert "FAIL  dice" in refused.out
    assert "low has Dice 0.0000" in refused.out
    not_active = segnode("models", "activate", "threshold", "1.1.0")
    assert (not_active.status, not_active.err.splitlines()[-2].split(":")[0]) == (1, "GATE_NOT_PASSED")
    assert segnode("models", "cases", "remove", case_id).status == 0
    assert segnode("models", "activate", "threshold", "1.1.0").status == 0
    assert node.registry.active_version("threshold") == "1.1.0"


def test_the_gate_is_overridden_with_a_reason(node: ApiHarness, segnode: Segnode) -> None:
    segnode("models", "cases", "approve", finish_job(node), "--as-produced")
    overridden = segnode("models", "activate", "threshold", "1.1.0", "--override-gate", "A known exception.")
    assert overridden.status == 0, overridden.err
    assert node.registry.active_version("threshold") == "1.1.0"


def test_shadow_mode_begins_is_shown_and_ends(node: ApiHarness, segnode: Segnode) -> None:
    assert segnode("models", "shadow", "show", "threshold").status == 1
    assert segnode("models", "shadow", "start", "threshold", "1.1.0").status == 0
    shown = segnode("models", "shadow", "show", "threshold")
    assert shown.err.startswith("threshold 1.1.0 runs beside the active version.")
    assert shown.out.split()[:3] == ["job", "label", "Dice"]
    assert segnode("models", "shadow", "stop", "threshold").status == 0
    assert "ran until" in segnode("models", "shadow", "show", "threshold").err


def test_a_recall_lists_every_delivery(node: ApiHarness, segnode: Segnode) -> None:
    job_id = finish_job(node, destinations=("pacs",), study="1.2.3")
    assert segnode("models", "recall", "threshold").status == 2
    recalled = segnode("models", "recall", "threshold@1.0.0")
    assert recalled.status == 0, recalled.err
    line = recalled.out.splitlines()[1]
    assert line.split() == ["1.2.3", job_id, "pacs", "parked", f"2.25.{int(job_id, 16)}"]
    assert "1 studies in 1 jobs: 0 objects have left the node, 1 were held back" in recalled.err
    assert "is still the active version" in recalled.err
