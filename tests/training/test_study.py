"""A study: what it refuses, how it chooses, and the whole of it at smoke scale, twice."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from nnunet_reference import PLAIN, reference_model
from training_data import SPLIT, write_cases, write_results_folder
from typer.testing import CliRunner

from models.bundle import Bundle
from models.golden import check_golden_case
from training import study_steps
from training.cli import build_app
from training.errors import RecipeError, TrainingDataError
from training.evaluate import CaseResult, Evaluation
from training.metrics import Agreement
from training.report import write_report
from training.study import best_run, load_study
from training.teacher import ResultsFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TRAINING = {
    "epochs": 6, "iterations_per_epoch": 12, "validation_iterations": 1,
    "learning_rate": 0.1, "momentum": 0.9, "ema_decay": 0.9,
}  # fmt: skip


def write_study(folder: Path, **changes: Any) -> Path:
    for name, width, terms in (
        ("none-1of2", "1/2", []),
        ("logits-1of2", "1/2", [{"method": "logits", "weight": 1.0}]),
    ):
        recipe = {"name": name, "student": {"width": width}, "training": TRAINING, "distillation": terms}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    content = {
        "name": "balls",
        "split": "split.json",
        "labels": "labels.yaml",
        "recipes": ["none-1of2.yaml", "logits-1of2.yaml"],
        "seeds": [1],
        "ships": [{"width": "1/2", "name": "balls-half", "version": "0.3.0"}],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def evaluation(name: str, dice: float) -> Evaluation:
    agreement = Agreement(dice=dice, nsd=1.0, hd95_mm=0.0, reference_ml=1.0, predicted_ml=1.0)
    return Evaluation(name, "", "float32", "openvino", 1.0, 0, (CaseResult("a", 0.0, {"ball": agreement}),))


def test_a_study_whose_runs_differ_in_their_budget_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    recipe = yaml.safe_load((tmp_path / "logits-1of2.yaml").read_text())
    recipe["training"]["epochs"] = 3
    (tmp_path / "logits-1of2.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"'none-1of2' and 'logits-1of2' differ in their training"):
        load_study(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": []}, "has no run"),
        ({"recipes": ["none-1of2.yaml", "none-1of2.yaml"]}, "the same name"),
        (
            {"ships": [{"width": "1/8", "name": "x", "version": "1.0.0"}]},
            "No run of the study has the width",
        ),
        ({"sedes": [1]}, "sedes"),
        ({"recipes": ["nowhere.yaml"]}, "nowhere.yaml cannot be read"),
        ({"starts": {"1/8": "start"}}, "No run of the study has the width 1/8 that 'starts' names"),
        ({"ships": [{"width": "wide", "name": "x", "version": "1.0.0"}]}, "not understood"),
    ],
)
def test_a_study_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(write_study(tmp_path, **changes))


def test_the_best_recipe_over_its_seeds_is_chosen_and_of_it_the_best_seed(tmp_path: Path) -> None:
    runs = list(load_study(write_study(tmp_path, seeds=[1, 2])).runs)
    dice = {
        "none-1of2-seed1": 0.99,
        "none-1of2-seed2": 0.10,
        "logits-1of2-seed1": 0.70,
        "logits-1of2-seed2": 0.71,
    }
    chosen = best_run(runs, {key: evaluation(key, value) for key, value in dice.items()})
    assert chosen.key == "logits-1of2-seed2"  # one lucky seed of "none" does not win


def test_two_runs_of_one_name_cannot_be_told_apart_in_a_report(tmp_path: Path) -> None:
    run = {"name": "none", "evaluations": ["none.json"]}
    (tmp_path / "report.yaml").write_text(yaml.safe_dump({"title": "t", "cases": "c", "runs": [run, run]}))
    with pytest.raises(RecipeError, match="Two runs of the report are called none"):
        write_report(tmp_path / "report.yaml", tmp_path / "report")


def test_a_run_is_compared_with_none_of_its_own_width_and_seed(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, seeds=[1, 2]))
    logits = next(run for run in study.runs if run.key == "logits-1of2-seed2")
    baseline = study.baseline_of(logits)
    assert baseline is not None
    assert baseline.key == "none-1of2-seed2"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the steps in this process, which has torch loaded already; lists the commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "training"]
        commands.append(command[3:])
        done = CliRunner().invoke(build_app(), command[3:])
        said = "" if done.exception is None else f"{getattr(done.exception, 'code', '')}: {done.exception}"
        return subprocess.CompletedProcess(command, done.exit_code, done.stdout, said)

    monkeypatch.setattr(study_steps, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    return commands


def test_the_whole_study_and_that_it_goes_on_where_it_was(
    tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    data = write_cases(tmp_path / "Dataset001_Parity")
    model = reference_model(architecture=PLAIN, features=(8, 16, 16), n_labels=2, patch_size=(16, 16, 16))
    untrained = write_results_folder(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres", model)
    lists = {"train": SPLIT["train"], "choose": SPLIT["val"], "claim": SPLIT["val"]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    labels = {
        "title": "Balls", "intended_use": "Tests.", "licence": "CC0", "data": "Random numbers",
        "channels": [{"name": "MR"}],
        "labels": [
            {"value": 1, "name": "one", "type": {"value": "5366008", "meaning": "Hippocampus"}},
            {"value": 2, "name": "two", "type": {"value": "4958002", "meaning": "Amygdala"}},
        ],
    }  # fmt: skip
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(labels))
    half = reference_model(architecture=PLAIN, features=(4, 8, 8), n_labels=2, patch_size=(16, 16, 16))
    start = write_results_folder(tmp_path / "start", half)
    path = write_study(tmp_path, pictured_cases=SPLIT["val"][:1], starts={"1/2": "start"})
    taught = yaml.safe_load((tmp_path / "none-1of2.yaml").read_text()) | {
        "name": "teacher",
        "student": {"width": 1},
    }
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(taught))
    words = [
        "distill",
        untrained,
        data,
        "--recipe",
        tmp_path / "teacher.yaml",
        "--split",
        tmp_path / "split.json",
    ]
    done = CliRunner().invoke(build_app(), [*map(str, words), "-o", str(tmp_path / "teacher")])
    teacher = Path(done.stdout.strip().splitlines()[-1])
    told: list[str] = []
    folder = study_steps.StudyFolder(
        load_study(path),
        teacher, data, data / "imagesTr" / "case_000_0000.nii.gz", tmp_path / "work",
        device="cpu", tell=told.append,
    )  # fmt: skip
    report = folder.complete(tmp_path / "results").read_text()

    shipped = Bundle.open(tmp_path / "work" / "ships" / "balls-half" / "0.3.0")
    assert (shipped.manifest.name, shipped.manifest.version) == ("balls-half", "0.3.0")
    figures = shipped.manifest.metrics
    assert figures is not None
    assert {"teacher", "float32"} <= set(figures.dice)
    quoted = json.loads((tmp_path / "results" / "teacher.claim.json").read_text())
    dice = [case["labels"]["one"]["dice"] for case in quoted["cases"]]
    assert figures.dice["teacher"]["one"] == pytest.approx(sum(dice) / len(dice), abs=5e-5)
    assert f"{figures.dice['float32']['one']:.4f}" in (shipped.folder / "card.md").read_text()
    check_golden_case(shipped)
    assert "ships as balls-half 0.3.0" in report
    assert "| start-1of2 |" in report
    told_of = list((tmp_path / "work" / "runs").glob("*/results/*/*/distillation.json"))
    starts = {json.loads(path.read_text())["start_digest"] for path in told_of}
    assert (len(told_of), starts) == (2, {ResultsFolder.open(start).digest})
    assert "| logits-1of2, seed 1 | none-1of2, seed 1 |" in report
    assert (tmp_path / "results" / "commands.log").read_text().count("segnode-train distill") == 2
    assert {p.name for p in (tmp_path / "results").glob("*.log.jsonl")} == {
        "none-1of2-seed1.log.jsonl", "logits-1of2-seed1.log.jsonl",
    }  # fmt: skip

    # Started again, it repeats nothing but the report; what was lost is made again, alone.
    in_this_process.clear()
    shutil.rmtree(tmp_path / "work" / "bundles" / "logits-1of2-seed1")
    folder.complete(tmp_path / "results")
    assert [command[0] for command in in_this_process] == ["export", "report"]

    (tmp_path / "split.json").write_text("{}")
    (tmp_path / "work" / "evaluations" / "teacher.claim.json").unlink()
    with pytest.raises(TrainingDataError, match="A step of the study failed"):
        folder.complete(tmp_path / "results")
