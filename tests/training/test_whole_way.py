"""The whole way at smoke scale: plan, distill, export, evaluate, quantize, report, add to a node, segment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nnunet_reference import PLAIN, reference_model
from training_data import N_CASES, SPLIT, write_cases, write_results_folder
from typer.testing import CliRunner

from models.bundle import Bundle
from models.manifest import Precision
from models.nifti import read_labelmap, read_nifti
from training.cli import build_app
from training.errors import QuantizationGateError
from training.evaluate import Evaluation
from training.metrics import dice
from training.quantize import Gate, check_gate

LABELS = {
    "title": "Two balls",
    "intended_use": "Tests.",
    "licence": "CC0",
    "data": "Random numbers",
    "channels": [{"name": "MR"}],
    "labels": [
        {"value": 1, "name": "label1", "type": {"value": "5366008", "meaning": "Hippocampus"}},
        {"value": 2, "name": "label2", "type": {"value": "4958002", "meaning": "Amygdala"}},
    ],
}


# nnU-Net and what it stands on warn of their own future; none of it is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def train(*arguments: object) -> str:
    """Run a command of segnode-train in this process, which has torch loaded already; what it prints."""
    done = CliRunner().invoke(build_app(), [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def node(*arguments: object, folder: Path) -> None:
    """Run a command of segnode as a person would."""
    executable = Path(sys.executable).with_name("segnode")
    environment = {**os.environ, "SEGNODE_DATA_DIR": str(folder / "node")}
    done = subprocess.run(
        [executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr


def recipe(folder: Path, name: str, width: str, epochs: int, terms: list[dict[str, object]]) -> Path:
    path = folder / f"{name}.yaml"
    training = {
        "epochs": epochs,
        "iterations_per_epoch": 12,
        "validation_iterations": 1,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "ema_decay": 0.9,
    }
    content = {"name": name, "student": {"width": width}, "training": training, "distillation": terms}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the sequence has been run."""
    folder = tmp_path_factory.mktemp("way")
    data = write_cases(folder / "Dataset001_Parity")
    model = reference_model(architecture=PLAIN, features=(8, 16, 16), n_labels=2, patch_size=(16, 16, 16))
    untrained = write_results_folder(folder / "nnUNetTrainer__nnUNetPlans__3d_fullres", model)
    split, labels = folder / "split.json", folder / "labels.yaml"
    split.write_text(json.dumps({"train": SPLIT["train"], "choose": SPLIT["val"], "claim": SPLIT["val"]}))
    labels.write_text(yaml.safe_dump(LABELS))
    golden = data / "imagesTr" / "case_000_0000.nii.gz"

    train("plan", untrained, "--width", "1/2", "-o", folder / "plans")
    folders = {}
    for name, width, terms in (
        ("teacher", "1", []),
        ("student", "1/2", [{"method": "dcd", "weight": 0.05}, {"method": "logits", "weight": 1.0}]),
    ):
        where = folders["teacher"] if terms else untrained
        made = recipe(folder, name, width, 6, terms)
        printed = train("distill", where, data, "--recipe", made, "--split", split, "-o", folder / name)
        folders[name] = Path(printed.strip().splitlines()[-1])
        train(
            "export", folders[name], "--name", name, "--orientation", "RAS", "--golden-image", golden,
            "--labels-file", labels, "--version", "0.1.0", "-o", folder / "bundles" / name,
        )  # fmt: skip
        train(
            "evaluate", folder / "bundles" / name, data, "--split", split, "--name", name,
            "--labelmaps", folder / "labelmaps" / name, "-o", folder / f"{name}.json",
        )  # fmt: skip
    train(
        "quantize", folder / "bundles" / "student", data, "--split", split, "--version", "0.2.0",
        "--maximum-dice-loss", 0.05, "--maximum-nsd-loss", 0.1,
        "-o", folder / "bundles" / "int8",
    )  # fmt: skip
    description = {
        "title": "Smoke",
        "cases": "synthetic",
        "baseline": "teacher",
        "teacher": "teacher",
        "images": str(data / "imagesTr"),
        "references": str(data / "labelsTr"),
        "pictured_cases": SPLIT["val"][:1],
        "runs": [
            {
                "name": name,
                "evaluations": [f"{name}.json"],
                "results": str(folders[name]),
                "labelmaps": f"labelmaps/{name}",
            }
            for name in ("teacher", "student")
        ],
    }
    (folder / "report.yaml").write_text(yaml.safe_dump(description))
    train("report", folder / "report.yaml", "-o", folder / "report")
    return folder


def test_the_student_was_measured_with_the_engine_that_serves_it(way: Path) -> None:
    evaluation = Evaluation.load(way / "student.json")
    assert evaluation.case_names == tuple(SPLIT["val"])
    assert evaluation.label_names == ("label1", "label2")
    for result in evaluation.cases:
        predicted = read_labelmap(way / "labelmaps" / "student" / f"{result.case}.nii.gz").array
        reference = read_labelmap(way / "Dataset001_Parity" / "labelsTr" / f"{result.case}.nii.gz").array
        for value, agreement in enumerate(result.labels.values(), start=1):
            assert agreement.dice == dice(predicted == value, reference == value)
    # Chance is about 0.05: a ball is a twentieth of the volume at most.
    assert Evaluation.load(way / "teacher.json").summary("dice").mean > 0.5


def test_the_quantized_bundle_has_both_precisions_and_stays_close(way: Path) -> None:
    bundle = Bundle.open(way / "bundles" / "int8")
    assert bundle.manifest.version == "0.2.0"
    assert bundle.manifest.weights_of(Precision.INT8)
    assert bundle.manifest.precision is Precision.FLOAT32


def test_the_gate_refuses_what_loses_too_much(way: Path) -> None:
    good, bad = Evaluation.load(way / "teacher.json"), Evaluation.load(way / "student.json")
    if good.summary("dice").mean < bad.summary("dice").mean:
        good, bad = bad, good
    check_gate(good, good, Gate(0.0, 0.0))
    with pytest.raises(QuantizationGateError, match="falls by"):
        check_gate(good, bad, Gate(-1.0, -1.0))


def test_the_report_says_what_was_measured(way: Path) -> None:
    text = (way / "report" / "report.md").read_text()
    student = Evaluation.load(way / "student.json")
    assert f"{student.summary('dice').mean:.4f} ± {student.summary('dice').standard_error:.4f}" in text
    assert "dcd + logits" in text
    assert "| 1/2 |" in text
    html = (way / "report" / "report.html").read_text()
    for picture in ("dice.png", "curves.png", f"{SPLIT['val'][0]}.png"):
        assert (way / "report" / picture).stat().st_size > 1000
        assert picture in html


def test_a_node_takes_the_bundle_and_segments_with_it(way: Path) -> None:
    node("models", "add", way / "bundles" / "student", "--activate", folder=way)
    image = way / "Dataset001_Parity" / "imagesTr" / f"case_{N_CASES - 1:03d}_0000.nii.gz"
    output = way / "labels.nii.gz"
    node("segment", image, "--model", "student", "-o", output, folder=way)
    labelmap = read_labelmap(output)
    assert labelmap.array.shape == read_nifti([image]).shape_zyx
    assert set(labelmap.volumes_ml()) <= {1, 2}
    evaluated = read_labelmap(way / "labelmaps" / "student" / f"case_{N_CASES - 1:03d}.nii.gz")
    assert (labelmap.array == evaluated.array).all()
