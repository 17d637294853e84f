"""INT8 weights: what stays in float32, and what they cost on real cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nnunet_reference import PLAIN, reference_model

from models.bundle import Bundle
from models.errors import GoldenCaseError
from models.manifest import Precision
from training import quantize
from training.preprocess import TrainingCases
from training.quantize import Gate, quantize_bundle, quantize_network

ROOT = Path(__file__).resolve().parents[2]

# NNCF and what it stands on warn of their own future; none of it is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def quantized_convolutions(path: Path) -> list[bool]:
    """For each convolution, in order, whether its weights are codes."""
    graph = onnx.load(path).graph
    codes = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [node.input[1] in codes for node in graph.node if node.op_type == "Conv"]


def test_the_finest_levels_stay_in_float32(tmp_path: Path) -> None:
    """A U-Net of three levels with one convolution each, down and up again, and the last one."""
    reference_model(architecture=PLAIN, features=(4, 8, 8), n_labels=2).export(tmp_path)
    patches = [np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16)).astype(np.float32)]
    found = {}
    for levels in (0, 1):
        quantize_network(tmp_path / "fold0.onnx", tmp_path / "int8.onnx", patches, float_levels=levels)
        found[levels] = quantized_convolutions(tmp_path / "int8.onnx")
    assert found[0] == [False, True, True, True, True, False]
    assert found[1] == [False, True, True, True, False, False]


@pytest.fixture(scope="module")
def hippocampus(shared_data: Path) -> dict[str, Any]:
    """The bundle that ships, cases of the study it comes from, and which of them were trained on."""
    folder = shared_data / "hippocampus"
    if not folder.is_dir():
        pytest.skip("no hippocampus cases in the test data")
    versions = (ROOT / "models" / "bundles" / "hippocampus").iterdir()
    bundle = max((Bundle.open(version) for version in versions), key=lambda b: b.manifest.version)
    split = json.loads((ROOT / "training" / "results" / "hippocampus-split.json").read_text())
    return {
        "bundle": bundle,
        "cases": TrainingCases.of_bundle(folder, bundle.manifest),
        "calibration_cases": split["train"][::12],
        "gate_cases": split["choose"][:6],
        "version": "99.0.0",
        "maximum_patches": 12,
    }


def test_int8_costs_no_label_of_real_cases_more_than_a_two_hundredth(
    hippocampus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the golden case does not agree at first, more is kept in float32 until it does."""
    if hippocampus["bundle"].manifest.weights_of(Precision.INT8):
        pytest.skip("the bundle that ships has INT8 weights, which its own golden case guards")
    check: Callable[..., Any] = quantize.check_golden_case
    calls: list[int] = []

    def disagree_at_first(bundle: Bundle, **how: Any) -> dict[str, float]:
        calls.append(len(calls))
        if len(calls) == 1:
            raise GoldenCaseError("It disagrees.")
        return dict(check(bundle, **how))

    monkeypatch.setattr(quantize, "check_golden_case", disagree_at_first)
    told: list[str] = []
    made = quantize_bundle(output=tmp_path / "int8", gate=Gate(), progress=told.append, **hippocampus)
    assert made.float_levels == len(calls) - 1 >= 1
    assert "It disagrees." in told
    assert made.bundle.manifest.weights_of(Precision.INT8)
    for label in made.float32.label_names:
        before, after = (e.summary("dice", label).mean for e in (made.float32, made.int8))
        assert after >= before - 0.005
    assert made.int8 != made.float32
