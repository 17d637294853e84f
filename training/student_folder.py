"""The results folder that a run leaves: what stock nnU-Net predicts with, and what the run was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.preprocess import write_json
from training.recipe import Recipe
from training.run_state import RunState, nnunet_checkpoint, save_atomically
from training.teacher import ResultsFolder
from training.toolbox import Toolbox

FINAL_CHECKPOINT = "checkpoint_final.pth"
BEST_CHECKPOINT = "checkpoint_best.pth"


def write_checkpoint(path: Path, state: RunState, toolbox: Toolbox) -> None:
    """The averaged student as a checkpoint of nnU-Net."""
    network = state.average.network
    save_atomically(nnunet_checkpoint(network, toolbox.init_args, toolbox.mirror_axes, state.epoch), path)


def write_results_folder(
    folder: Path,
    state: RunState,
    toolbox: Toolbox,
    teacher: ResultsFolder,
    recipe: Recipe,
    start: ResultsFolder | None,
) -> None:
    """What the run was, then the final checkpoint, which says "finished"."""
    write_json(
        folder.parent / "distillation.json",
        {
            "recipe": recipe.name,
            "recipe_digest": recipe.digest,
            "method": recipe.method,
            "width": str(recipe.student),
            "teacher_digest": teacher.digest,
            "start_digest": None if start is None else start.digest,
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
        },
    )
    write_checkpoint(folder / FINAL_CHECKPOINT, state, toolbox)


def describe_results(folder: Path, teacher: ResultsFolder, plans: dict[str, Any]) -> None:
    """The files beside the checkpoints: with them the best one so far can be used while the run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder.parent / "plans.json", plans)
    write_json(folder.parent / "dataset.json", teacher.dataset_json)
    if teacher.fingerprint is not None:
        (folder.parent / "dataset_fingerprint.json").write_bytes(teacher.fingerprint.read_bytes())
