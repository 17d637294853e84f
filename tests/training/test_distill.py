"""The loop is alive, goes on where it was killed, and leaves what stock nnU-Net can use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnunet_reference import PLAIN, ReferenceModel, reference_model
from torch import Tensor
from training_data import SPLIT, write_cases, write_results_folder

from training.distill import Progress, distill
from training.distillation.base import IGNORED
from training.distillation.registry import METHODS
from training.errors import RecipeError, TrainingDataError
from training.lesson import Lesson, labels_of
from training.preprocess import TrainingCases
from training.recipe import Recipe, parse_recipe
from training.run_log import read_log
from training.run_state import STATE_FILE
from training.teacher import ResultsFolder
from training.toolbox import dice_of

# nnU-Net and what it stands on warn of their own future; none of it is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def tiny_model(**changes: object) -> ReferenceModel:
    values = {"architecture": PLAIN, "features": (8, 16, 16), "n_labels": 2, "patch_size": (16, 16, 16)}
    return reference_model(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("data") / "Dataset001_Parity")


@pytest.fixture(scope="module")
def teacher_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows the task a little: trained by the same loop, at full width and without terms."""
    work = tmp_path_factory.mktemp("teacher")
    untrained = write_results_folder(work / "nnUNetTrainer__nnUNetPlans__3d_fullres", tiny_model())
    recipe = parse_recipe(
        {
            "name": "teacher",
            "student": {"width": 1},
            "training": {"epochs": 5, "iterations_per_epoch": 12, "validation_iterations": 1, "threads": 1},
        }
    )
    opened = ResultsFolder.open(untrained)
    return distill(opened, cases_of(data, opened), SPLIT, recipe, work / "work", device="cpu")


@pytest.fixture
def teacher(teacher_folder: Path) -> ResultsFolder:
    return ResultsFolder.open(teacher_folder)


def cases_of(data: Path, teacher: ResultsFolder) -> TrainingCases:
    return TrainingCases.open(data, teacher.dataset_json)


def tiny_recipe(*terms: dict[str, object], **training: object) -> Recipe:
    budget = {
        "epochs": 2,
        "iterations_per_epoch": 3,
        "validation_iterations": 1,
        "deterministic": True,
        "threads": 1,
        "ema_decay": 0.5,
    }
    return parse_recipe(
        {
            "name": "tiny",
            "student": {"width": "1/2"},
            "training": {**budget, **training},
            "distillation": list(terms),
        }
    )


def losses(results: Path) -> list[dict[str, float]]:
    return [entry["losses"] for entry in read_log(results / "fold_0" / "log.jsonl")]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_its_own_term_and_the_segmentation_loss(
    method: str, data: Path, teacher: ResultsFolder, tmp_path: Path
) -> None:
    options = {"prompt_iterations": 2} if method == "freekd" else {}
    term = {"method": method, "weight": 1.0 if method != "fitnets" else 0.5, "options": options}
    recipe = tiny_recipe(term, epochs=4, iterations_per_epoch=6, learning_rate=0.02, batch_size=2)
    history = losses(distill(teacher, cases_of(data, teacher), SPLIT, recipe, tmp_path, device="cpu"))
    name = f"0:{method}"
    assert history[-1]["segmentation"] < history[0]["segmentation"]
    assert history[-1][name] < history[0][name]


class StopHereError(Exception):
    """Stands for a kill."""


def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one_bit_for_bit(
    data: Path, teacher: ResultsFolder, tmp_path: Path
) -> None:
    recipe = tiny_recipe({"method": "dcd", "weight": 0.5}, {"method": "logits", "weight": 1.0}, epochs=3)
    cases = cases_of(data, teacher)
    whole = distill(teacher, cases, SPLIT, recipe, tmp_path / "whole", device="cpu")

    def stop_in_the_second_epoch(progress: Progress) -> None:
        if (progress.epoch, progress.iteration) == (1, 1):
            raise StopHereError

    with pytest.raises(StopHereError):
        distill(
            teacher, cases, SPLIT, recipe, tmp_path / "cut", device="cpu", progress=stop_in_the_second_epoch
        )
    resumed = distill(teacher, cases, SPLIT, recipe, tmp_path / "cut", device="cpu")
    assert losses(resumed) == losses(whole)
    one, other = (
        torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        for folder in (whole, resumed)
    )
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_kill_9_leaves_a_state_that_goes_on(data: Path, teacher_folder: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from training.distill import distill
from training.preprocess import TrainingCases
from training.recipe import parse_recipe
from training.teacher import ResultsFolder
recipe = parse_recipe({{"name": "killed", "student": {{"width": "1/2"}}, "training": {{"epochs": 500,
    "iterations_per_epoch": 1, "validation_iterations": 1, "deterministic": True, "threads": 1}}}})
teacher = ResultsFolder.open(Path({str(teacher_folder)!r}))
cases = TrainingCases.open(Path({str(data)!r}), teacher.dataset_json)
split = {SPLIT!r}
distill(teacher, cases, split, recipe, Path({str(tmp_path)!r}), device="cpu",
        progress=lambda p: print("epoch", p.epoch, flush=True))
"""

    def run_until(epoch: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:1] == ["epoch"] and int(line.split()[1]) >= epoch:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL

    run_until(2)
    (log_file,) = tmp_path.rglob("log.jsonl")
    before = [entry["epoch"] for entry in read_log(log_file)]
    run_until(max(before) + 3)
    after = [entry["epoch"] for entry in read_log(log_file)]
    assert after == list(range(len(after)))
    assert len(after) > len(before)


def test_a_finished_run_is_not_trained_again_and_another_recipe_is_refused(
    data: Path, teacher: ResultsFolder, tmp_path: Path
) -> None:
    cases, recipe = cases_of(data, teacher), tiny_recipe(epochs=1)
    results = distill(teacher, cases, SPLIT, recipe, tmp_path, device="cpu")
    final = results / "fold_0" / "checkpoint_final.pth"
    written = final.stat().st_mtime_ns
    distill(teacher, cases, SPLIT, recipe, tmp_path, device="cpu")
    assert final.stat().st_mtime_ns == written
    final.unlink()
    with pytest.raises(RecipeError, match="another recipe"):
        distill(teacher, cases, SPLIT, tiny_recipe(epochs=2), tmp_path, device="cpu")


def test_a_damaged_state_is_refused_before_training_goes_on(
    data: Path, teacher: ResultsFolder, tmp_path: Path
) -> None:
    folder = distill(teacher, cases_of(data, teacher), SPLIT, tiny_recipe(epochs=1), tmp_path, device="cpu")
    (folder / "fold_0" / "checkpoint_final.pth").unlink()
    state = folder / "fold_0" / STATE_FILE
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    with pytest.raises(TrainingDataError, match=r"run_state\.pth .* is damaged"):
        distill(teacher, cases_of(data, teacher), SPLIT, tiny_recipe(epochs=1), tmp_path, device="cpu")


def test_what_leaves_is_the_averaged_student_alone(
    data: Path, teacher: ResultsFolder, tmp_path: Path
) -> None:
    recipe = tiny_recipe({"method": "dcd", "weight": 0.5})
    results = distill(teacher, cases_of(data, teacher), SPLIT, recipe, tmp_path, device="cpu")
    opened = ResultsFolder.open(results)
    assert opened.features == [4, 8, 8]
    weights = opened.checkpoints[0].weights
    assert not any("projection" in name or "methods" in name for name in weights)
    assert opened.checkpoints[0].trainer_name == "nnUNetTrainer"
    state = torch.load(results / "fold_0" / STATE_FILE, weights_only=True)
    assert any(name.startswith("methods.0.projections") for name in state["lesson"])
    for name, value in weights.items():
        assert torch.equal(value, state["average"][name])
    described = json.loads((results / "distillation.json").read_text())
    assert (described["method"], described["width"]) == ("dcd", "1/2")
    assert described["teacher_digest"] == teacher.digest


def test_projections_are_trained(data: Path, teacher: ResultsFolder, tmp_path: Path) -> None:
    results = []
    for epochs in (1, 2):
        recipe = tiny_recipe({"method": "dcd", "weight": 0.5}, epochs=epochs)
        folder = distill(
            teacher, cases_of(data, teacher), SPLIT, recipe, tmp_path / str(epochs), device="cpu"
        )
        state: dict[str, Tensor] = torch.load(folder / "fold_0" / STATE_FILE, weights_only=True)["lesson"]
        results.append(state["methods.0.projections.0.weight"])
    assert not torch.equal(*results)


def test_a_teacher_of_two_folds_and_regions_and_an_ignore_label(tmp_path: Path) -> None:
    model = tiny_model(
        regions={"whole": [1, 2], "core": [2], "ignore": 3}, regions_class_order=[1, 2], folds=2
    )
    teacher = ResultsFolder.open(write_results_folder(tmp_path / "t__p__3d_fullres", model))
    assert len(teacher.checkpoints) == 2
    cases = TrainingCases.open(write_cases(tmp_path / "data"), teacher.dataset_json)
    recipe = tiny_recipe({"method": "logits", "weight": 1.0}, {"method": "ifvd", "weight": 1.0}, epochs=1)
    results = distill(teacher, cases, SPLIT, recipe, tmp_path / "work", device="cpu")
    (entry,) = read_log(results / "fold_0" / "log.jsonl")
    assert set(entry["dice"]) == {"whole", "core"}
    assert set(entry["losses"]) == {"segmentation", "0:logits", "1:ifvd"}


def test_a_term_whose_time_has_not_come_costs_nothing(
    data: Path, teacher: ResultsFolder, tmp_path: Path
) -> None:
    recipe = tiny_recipe({"method": "dcd", "weight": 1.0, "start_epoch": 1}, epochs=2)
    history = losses(distill(teacher, cases_of(data, teacher), SPLIT, recipe, tmp_path, device="cpu"))
    assert "0:dcd" not in history[0]
    assert "0:dcd" in history[1]


def test_early_stop_ends_a_run_that_gets_no_better(
    data: Path, teacher: ResultsFolder, tmp_path: Path
) -> None:
    recipe = tiny_recipe(epochs=50, iterations_per_epoch=1, learning_rate=1e-12, early_stop_epochs=2)
    results = distill(teacher, cases_of(data, teacher), SPLIT, recipe, tmp_path, device="cpu")
    assert len(read_log(results / "fold_0" / "log.jsonl")) < 10
    assert (results / "fold_0" / "checkpoint_final.pth").is_file()


def test_bfloat16_and_parallel_loading_train_too(data: Path, teacher: ResultsFolder, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        {"method": "dcd", "weight": 0.5}, precision="bfloat16", deterministic=False, epochs=1
    )
    history = losses(distill(teacher, cases_of(data, teacher), SPLIT, recipe, tmp_path, device="cpu"))
    assert history[0]["segmentation"] < 5


def test_a_loss_that_is_no_number_stops_the_run(data: Path, teacher: ResultsFolder, tmp_path: Path) -> None:
    recipe = tiny_recipe(epochs=20, learning_rate=1e38)
    with pytest.raises(TrainingDataError, match="not a number"):
        distill(teacher, cases_of(data, teacher), SPLIT, recipe, tmp_path, device="cpu")


def test_two_processes_train_one_student(data: Path, teacher_folder: Path, tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from training.distill import distill
from training.preprocess import TrainingCases
from training.recipe import parse_recipe
from training.teacher import ResultsFolder
recipe = parse_recipe({{"name": "two", "student": {{"width": "1/2"}}, "training": {{"epochs": 1,
    "batch_size": 2, "iterations_per_epoch": 2, "validation_iterations": 1, "deterministic": True,
    "threads": 1}}, "distillation": [{{"method": "dcd", "weight": 0.5}}]}})
teacher = ResultsFolder.open(Path({str(teacher_folder)!r}))
cases = TrainingCases.open(Path({str(data)!r}), teacher.dataset_json)
distill(teacher, cases, {SPLIT!r}, recipe, Path({str(tmp_path)!r}), device="cpu")
"""
    script = tmp_path / "two.py"
    script.write_text(program)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--local-addr=127.0.0.1", str(script)],
        check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    (checkpoint,) = tmp_path.rglob("checkpoint_final.pth")
    assert ResultsFolder.open(checkpoint.parent.parent).features == [4, 8, 8]


# --- the pieces ---------------------------------------------------------------------------------------


def test_labels_of_softmax_and_region_targets() -> None:
    softmax = torch.tensor([0, 1, 2, 3]).view(1, 1, 1, 1, 4)
    assert labels_of(softmax, regions=False, ignore_label=3).flatten().tolist() == [0, 1, 2, IGNORED]
    whole, core, ignored = [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]
    regions = torch.tensor([whole, core, ignored]).view(1, 3, 1, 1, 4)
    assert labels_of(regions, regions=True, ignore_label=9).flatten().tolist() == [0, 1, 2, IGNORED]
    assert labels_of(regions[:, :2], regions=True, ignore_label=None).flatten().tolist() == [0, 1, 2, 0]


def test_dice_of_counts_and_of_nothing() -> None:
    first, second = dice_of(torch.tensor([[3.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert first == pytest.approx(0.75)
    assert second != second  # NaN: there was nothing to find and nothing was found


def test_a_lesson_without_terms_is_the_segmentation_loss_alone(teacher: ResultsFolder) -> None:
    from training.distillation.base import Channels

    student = teacher.network(deep_supervision=True)
    lesson = Lesson(
        student, (), Channels((8, 16, 16), (8, 16, 16)), lambda o, t: o[0].mean() * 0 + 7.0, "softmax"
    )
    images = torch.zeros(1, 1, 16, 16, 16)
    total, parts = lesson(images, [images], images[:, 0].long(), None, [])
    assert total.item() == 7.0
    assert set(parts) == {"segmentation"}
