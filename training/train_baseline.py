"""Train a student without a teacher: nnU-Net's own trainer at the student's plans.

It is the line that every gain of distillation is measured from. A run is resumed after any stop, from the
last finished epoch; the augmentation's random numbers are drawn anew then, so a resumed run is not the
uninterrupted one bit for bit.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from training.environment import configure_nnunet, seed_everything
from training.preprocess import TrainingCases, prepare_dataset, read_split
from training.student import scaled_plans

log = logging.getLogger(__name__)

CONFIGURATION = "3d_fullres"


@dataclass(frozen=True)
class BaselineSettings:
    """What a baseline run is made of. The learning rate decays to zero over exactly ``epochs``."""

    width: Fraction = Fraction(1, 4)
    round_to: int | None = None
    batch_size: int | None = None
    epochs: int = 1000
    iterations: int = 250
    validation_iterations: int = 50
    seed: int = 20240229
    threads: int = 2
    device: str = "cpu"


def train_baseline(
    teacher: Path, data: Path, split_file: Path, work_folder: Path, settings: BaselineSettings
) -> Path:
    """Train, or go on training, and return the results folder.

    Parameters
    ----------
    teacher : Path
        nnU-Net results folder whose plans, dataset.json and fingerprint are used; its weights are not.
    data : Path
        Folder of the training cases.
    split_file : Path
        JSON with the lists ``train`` and ``choose``; nothing else is read from the data.
    work_folder : Path
        Where nnU-Net's ``preprocessed`` and ``results`` go.

    Returns
    -------
    Path
        ``.../nnUNetTrainer__<plans>__3d_fullres``, a results folder that stock nnU-Net predicts with.
    """
    configure_nnunet(work_folder)
    plans: dict[str, Any] = json.loads((teacher / "plans.json").read_text())
    dataset_json: dict[str, Any] = json.loads((teacher / "dataset.json").read_text())
    student = scaled_plans(plans, settings.width, settings.round_to, batch_size=settings.batch_size)
    prepare_dataset(
        TrainingCases.open(data, dataset_json),
        read_split(split_file),
        student,
        dataset_json,
        teacher / "dataset_fingerprint.json",
        work_folder / "preprocessed",
    )
    latest = _fold_folder(work_folder, student) / "checkpoint_latest.pth"
    if (latest.parent / "checkpoint_final.pth").is_file():
        log.info("this run is finished already")
        return latest.parent.parent
    seed_everything(settings.seed, threads=settings.threads)
    # nnU-Net's command adds this key to the plans, and its trainer takes it out again.
    student["continue_training"] = latest.is_file()
    trainer = nnUNetTrainer(student, CONFIGURATION, 0, dataset_json, torch.device(settings.device))
    trainer.num_epochs = settings.epochs
    trainer.num_iterations_per_epoch = settings.iterations
    trainer.num_val_iterations_per_epoch = settings.validation_iterations
    trainer.save_every = 1
    trainer.initialize()
    if settings.device == "cpu":  # two thirds of the time a step, measured at 8 to 64 channels
        trainer.network.to(memory_format=torch.channels_last_3d)
    if latest.is_file():
        trainer.load_checkpoint(str(latest))
        # Another stretch of the same random numbers would repeat the first epoch's augmentation.
        seed_everything(settings.seed + trainer.current_epoch, threads=settings.threads)
    trainer.run_training()
    return latest.parent.parent


def _fold_folder(work_folder: Path, plans: dict[str, Any]) -> Path:
    """Where nnU-Net's trainer puts fold 0 of these plans."""
    name = f"{nnUNetTrainer.__name__}__{plans['plans_name']}__{CONFIGURATION}"
    return work_folder.resolve() / "results" / str(plans["dataset_name"]) / name / "fold_0"


def main() -> None:
    """Command line of this module: ``python -m training.train_baseline TEACHER DATA SPLIT WORK_FOLDER``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path, help="nnU-Net results folder of the teacher")
    parser.add_argument("data", type=Path, help="folder of the training cases")
    parser.add_argument("split", type=Path, help="split file with the lists train and choose")
    parser.add_argument("work_folder", type=Path, help="where preprocessed data and results go")
    parser.add_argument("--width", type=Fraction, default=BaselineSettings.width)
    parser.add_argument("--round-to", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=int, default=BaselineSettings.epochs)
    parser.add_argument("--iterations", type=int, default=BaselineSettings.iterations)
    parser.add_argument("--validation-iterations", type=int, default=BaselineSettings.validation_iterations)
    parser.add_argument("--seed", type=int, default=BaselineSettings.seed)
    parser.add_argument("--threads", type=int, default=BaselineSettings.threads)
    parser.add_argument("--device", default=BaselineSettings.device)
    arguments = vars(parser.parse_args())
    teacher, data, split, work = (arguments.pop(name) for name in ("teacher", "data", "split", "work_folder"))
    settings = BaselineSettings(**arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("results folder: %s", train_baseline(teacher, data, split, work, settings))


if __name__ == "__main__":
    main()
