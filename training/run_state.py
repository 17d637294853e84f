"""What a run needs to go on after any stop, and the nnU-Net checkpoint that it ends with."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.ema import MovingAverage
from training.errors import RecipeError, TrainingDataError
from training.lesson import Lesson

STATE_FILE = "run_state.pth"


@dataclass
class RunState:
    """Everything of a run that changes: it is saved after every epoch and loaded before the first."""

    lesson: Lesson
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    best_dice: float = -1.0
    best_epoch: int = -1

    def save(self, folder: Path, recipe_digest: str) -> None:
        """Write the state so that a kill at any moment leaves the old one or the new one."""
        save_atomically(
            {
                "recipe_digest": recipe_digest,
                "lesson": self.lesson.state_dict(),
                "average": self.average.network.state_dict(),
                "average_steps": self.average.steps,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "best_dice": self.best_dice,
                "best_epoch": self.best_epoch,
            },
            folder / STATE_FILE,
        )

    def load(self, folder: Path, recipe_digest: str, device: torch.device) -> bool:
        """Go on from a saved state; False if there is none.

        Raises
        ------
        RecipeError
            If the state was written by another recipe.
        TrainingDataError
            If it is damaged.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            return False
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise TrainingDataError(
                f"The saved state {STATE_FILE} of the run in {folder.name!r} is damaged.",
                remedy="Restore the file from a backup, or delete it to begin the run again.",
            ) from error
        if state["recipe_digest"] != recipe_digest:
            raise RecipeError(
                f"The run in {folder} was begun with another recipe or start.",
                remedy="Choose another output folder, or go back to what it was begun with.",
            )
        self.lesson.load_state_dict(state["lesson"])
        self.average.network.load_state_dict(state["average"])
        self.average.steps = state["average_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_dice = state["epoch"], state["best_dice"]
        self.best_epoch = state["best_epoch"]
        return True


def nnunet_checkpoint(
    network: nn.Module, init_args: dict[str, Any], mirror_axes: tuple[int, ...], epoch: int
) -> dict[str, Any]:
    """A checkpoint that stock nnU-Net predicts with: the student alone, no projections, no optimiser."""
    weights: dict[str, Tensor] = {k: v.detach().cpu() for k, v in network.state_dict().items()}
    return {
        "network_weights": weights,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": None,
        "_best_ema": None,
        "current_epoch": epoch,
        "init_args": init_args,
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": mirror_axes or None,
    }


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """torch.save to a file beside, flushed to the disk, then renamed over ``path``."""
    beside = path.with_suffix(path.suffix + ".part")
    with beside.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
