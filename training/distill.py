"""Distillation, from top to bottom: a frozen teacher, a student, nnU-Net's data and loss, and extra terms.

prepare the data with the teacher's preprocessing
build student, average, methods, optimiser; go on where a stopped run was
for every epoch:
    for every iteration: batch -> teacher -> student -> losses -> step -> average
    validate the average; log; save
write an nnU-Net results folder with the averaged student
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from training.distillation.base import Channels
from training.ema import MovingAverage
from training.environment import configure_nnunet, seed_everything
from training.errors import RecipeError, TrainingDataError
from training.hardware import barrier, device_of, join_process_group, place, precision_of
from training.lesson import Lesson, Teacher, encode_decode, labels_of
from training.preprocess import Split, TrainingCases, prepare_dataset
from training.recipe import Recipe, TrainingRecipe
from training.run_log import RunLog
from training.run_state import RunState
from training.start import start_from
from training.student import build_network, scaled_plans
from training.student_folder import (
    BEST_CHECKPOINT,
    FINAL_CHECKPOINT,
    describe_results,
    write_checkpoint,
    write_results_folder,
)
from training.synthesis.label_maps import LabelMapFolder
from training.synthesis.source import SyntheticToolbox
from training.teacher import ResultsFolder
from training.toolbox import Batch, Toolbox, dice_of, seed_iteration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run is: told after every iteration. ``loss`` is the total of the last one."""

    epoch: int
    epochs: int
    iteration: int
    iterations: int
    loss: float


def distill(
    teacher: ResultsFolder,
    cases: TrainingCases | LabelMapFolder,
    split: Split,
    recipe: Recipe,
    work_folder: Path,
    *,
    start: ResultsFolder | None = None,
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train a student, or go on training it, and return its results folder.

    Parameters
    ----------
    teacher : ResultsFolder
        One or several folds of a trained nnU-Net; its plans, dataset.json and fingerprint are used too.
        Plans without weights will do where the recipe distils nothing.
    cases : TrainingCases or LabelMapFolder
        Images and labels to train and validate on; or the label maps that a recipe with ``data: synthesis``
        draws images from.
    split : dict
        Which of them for what. Nothing else is read.
    recipe : Recipe
        Student, budget and distillation terms.
    work_folder : Path
        Where preprocessed data and results go. A run in it of the same recipe is continued.
    start : ResultsFolder or None
        A trained student to start from, see `training.start`; None draws the weights from the seed.
    device : str
        "auto" (CUDA where there is one), "cpu" or "cuda".

    Returns
    -------
    Path
        A results folder that stock nnU-Net predicts with; log.jsonl is in its fold.

    Raises
    ------
    TrainingDataError
        If the data do not fit the split, or the teacher's fingerprint is missing.
    RecipeError
        If a run of another recipe is in the folder, a term does not fit the networks, or there is no teacher
        for it.
    StudentError
        If the student cannot start from ``start``.
    """
    if recipe.distillation and not teacher.checkpoints:
        raise RecipeError(
            f"Recipe {recipe.name!r} distils, and the teacher's folder holds plans without weights.",
            remedy="Give a trained results folder, or a recipe without distillation terms.",
        )
    training = recipe.training
    where = device_of(device)
    rank, world = join_process_group(where)
    configure_nnunet(work_folder, augmentation_processes=training.loader_processes)
    seed_everything(training.seed, threads=training.threads)
    torch.use_deterministic_algorithms(training.deterministic, warn_only=True)

    plans = scaled_plans(
        teacher.plans,
        recipe.student.width,
        recipe.student.round_to,
        channels=recipe.student.channels,
        batch_size=training.batch_size,
        configuration=teacher.configuration,
    )
    toolbox = _toolbox(teacher, cases, split, plans, recipe, work_folder, where, rank, world)
    folder = toolbox.output_folder
    if (folder / FINAL_CHECKPOINT).is_file():
        log.info("this run is finished already")
        return folder.parent

    autocast, scaler = precision_of(training.precision, where)
    lesson, state = _build(teacher, plans, recipe, toolbox, scaler, start)
    run_digest = recipe.digest if start is None else f"{recipe.digest}+{start.digest}"
    resumed = state.load(folder, run_digest, where)
    trained: nn.Module = lesson
    if world > 1:
        trained = DistributedDataParallel(
            lesson, device_ids=[where.index] if where.type == "cuda" else None, find_unused_parameters=True
        )
    if training.compile:
        for half in lesson.student.children():  # encoder and decoder; in place, the names of weights stay
            half.compile()
    frozen = None
    if recipe.distillation:
        frozen = Teacher([teacher.network(i, deep_supervision=True) for i in range(len(teacher.checkpoints))])
        for network in frozen.networks:
            place(network, where)

    train_loader, validation_loader = toolbox.loaders(state.epoch * training.iterations_per_epoch)
    if frozen is not None and not resumed:
        seed_iteration(training.seed, rank, 0, 0)
        images = (toolbox.to_device(batch).images for batch in train_loader)
        for method in lesson.method_list():
            method.prepare(frozen.networks[0], images, lesson.activation)
        barrier(world)
    if rank == 0:
        describe_results(folder, teacher, plans)
    run_log = RunLog(folder, resumed_epoch=state.epoch if resumed else 0) if rank == 0 else None

    for epoch in range(state.epoch, training.epochs):
        started = time.monotonic()
        # nnU-Net's polynomial schedule, which reaches zero at the end of the budget.
        learning_rate = training.learning_rate * (1 - epoch / training.epochs) ** 0.9
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        weights = [term.weight_at(epoch) for term in recipe.distillation]
        sums: dict[str, float] = {}
        lesson.train()
        for iteration in range(training.iterations_per_epoch):
            if training.deterministic:
                seed_iteration(training.seed, rank, epoch, iteration)
            batch = toolbox.to_device(next(train_loader))
            labels = labels_of(
                batch.targets[0], regions=toolbox.has_regions, ignore_label=toolbox.ignore_label
            )
            with autocast():
                taught = frozen(batch.images) if frozen is not None and any(weights) else None
                loss, parts = trained(batch.images, batch.targets, labels, taught, weights)
            state.optimizer.zero_grad(set_to_none=True)
            state.scaler.scale(loss).backward()
            state.scaler.unscale_(state.optimizer)
            clip_grad_norm_(lesson.parameters(), training.gradient_clip)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.average.update(lesson.student)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if progress is not None:
                progress(
                    Progress(
                        epoch, training.epochs, iteration, training.iterations_per_epoch, float(loss.detach())
                    )
                )
        means = {name: value / training.iterations_per_epoch for name, value in sums.items()}
        if not math.isfinite(means["segmentation"]):
            raise TrainingDataError(
                f"The loss of epoch {epoch} is not a number.",
                remedy="Lower the learning rate or the distillation weights, then start in a new folder.",
            )

        dice = _validate(state.average.network, toolbox, validation_loader, recipe, autocast, rank, world)
        mean_dice = _nan_mean(dice)
        state.epoch = epoch + 1
        improved = mean_dice > state.best_dice
        if improved:
            state.best_dice, state.best_epoch = mean_dice, epoch
        if run_log is not None:
            run_log.write(
                epoch=epoch,
                learning_rate=learning_rate,
                losses=means,
                weights={t.method: w for t, w in zip(recipe.distillation, weights, strict=True)},
                dice=dict(zip(toolbox.label_names, dice, strict=True)),
                mean_dice=mean_dice,
                seconds=time.monotonic() - started,
            )
            if improved:
                write_checkpoint(folder / BEST_CHECKPOINT, state, toolbox)
            state.save(folder, run_digest)
        barrier(world)
        patience = training.early_stop_epochs
        if patience is not None and epoch - state.best_epoch >= patience:
            log.info("no better validation Dice for %d epochs: stopping", patience)
            break

    if rank == 0:
        write_results_folder(folder, state, toolbox, teacher, recipe, start)
    barrier(world)
    return folder.parent


def _toolbox(
    teacher: ResultsFolder,
    cases: TrainingCases | LabelMapFolder,
    split: Split,
    plans: dict[str, Any],
    recipe: Recipe,
    work_folder: Path,
    device: torch.device,
    rank: int,
    world: int,
) -> Toolbox:
    """nnU-Net's parts, over preprocessed cases or over images that are drawn from label maps."""
    synthesis = recipe.data.synthesis
    if isinstance(cases, LabelMapFolder) != (synthesis is not None):
        raise TrainingDataError(
            "Label maps go with a recipe that says 'data: synthesis', and only with such a one.",
            remedy="Give the other kind of data, or another recipe.",
        )
    if isinstance(cases, TrainingCases):
        if recipe.training.balance:
            raise RecipeError(
                "Only runs on synthetic data can balance the classes' cross-entropy.",
                remedy="Leave 'balance' out: the loss is nnU-Net's own.",
            )
        if rank == 0:
            _prepare(teacher, cases, split, plans, work_folder)
        barrier(world)
        return Toolbox(plans, teacher.dataset_json, teacher.configuration, device)
    assert synthesis is not None
    return SyntheticToolbox(
        plans,
        teacher.dataset_json,
        teacher.configuration,
        device,
        maps=cases,
        split=split,
        synthesis=synthesis,
        seed=recipe.training.seed,
        rank=rank,
        validation_iterations=recipe.training.validation_iterations,
        balance=recipe.training.balance,
    )


def _prepare(
    teacher: ResultsFolder, cases: TrainingCases, split: Split, plans: dict[str, Any], work_folder: Path
) -> None:
    if teacher.fingerprint is None:
        raise TrainingDataError(
            "The teacher's folder holds no dataset_fingerprint.json.",
            remedy="Copy it there from nnU-Net's preprocessed folder of the dataset.",
        )
    prepare_dataset(
        cases,
        split,
        plans,
        teacher.dataset_json,
        teacher.fingerprint,
        work_folder / "preprocessed",
        configuration=teacher.configuration,
    )


def _build(
    teacher: ResultsFolder,
    plans: dict[str, Any],
    recipe: Recipe,
    toolbox: Toolbox,
    scaler: torch.amp.GradScaler,
    start: ResultsFolder | None,
) -> tuple[Lesson, RunState]:
    """Student, methods, average and optimiser, freshly drawn from the recipe's seed but for the start."""
    training = recipe.training
    settings = plans["configurations"][teacher.configuration]
    student_features = list(settings["architecture"]["arch_kwargs"]["features_per_stage"])
    torch.manual_seed(training.seed)
    student = build_network(settings, teacher.n_channels, teacher.classes.n_outputs, deep_supervision=True)
    if start is not None:

        def images() -> Iterator[torch.Tensor]:  # most starts need none, and loaders start processes
            for batch in toolbox.loaders()[1]:
                yield toolbox.to_device(batch).images.cpu()

        start_from(student, plans, teacher.dataset_json, teacher.configuration, start, images())
    activation: Literal["softmax", "sigmoid"] = "sigmoid" if toolbox.has_regions else "softmax"
    channels = Channels(tuple(student_features), tuple(teacher.features))
    lesson = Lesson(student, recipe.distillation, channels, toolbox.loss(), activation)
    place(lesson, toolbox.device)
    optimizer = _optimizer([p for p in lesson.parameters() if p.requires_grad], training)
    average = MovingAverage(lesson.student, training.ema_decay)
    return lesson, RunState(lesson, average, optimizer, scaler)


def _optimizer(parameters: list[nn.Parameter], training: TrainingRecipe) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=True,
    )


@torch.no_grad()
def _validate(
    network: nn.Module,
    toolbox: Toolbox,
    loader: Iterator[dict[str, Any]],
    recipe: Recipe,
    autocast: Callable[[], AbstractContextManager[Any]],
    rank: int,
    world: int,
) -> list[float]:
    """Dice per label over patches of the validation cases, the same patches every epoch if deterministic."""
    hits = torch.zeros(len(toolbox.label_names), 3, dtype=torch.float64)
    for iteration in range(recipe.training.validation_iterations):
        if recipe.training.deterministic:
            # Epochs count from 0, so a key of its own keeps these seeds apart from the training's.
            seed_iteration(recipe.training.seed, rank, 1 << 31, iteration)
        batch: Batch = toolbox.to_device(next(loader))
        with autocast():
            _, logits = encode_decode(network, batch.images)
        hits += toolbox.count_hits(logits[0], batch.targets[0])
    if world > 1:
        summed = hits.to(toolbox.device)
        dist.all_reduce(summed)
        hits = summed.cpu()
    return dice_of(hits)


def _nan_mean(values: list[float]) -> float:
    """Mean of what is a number; a label that never occurred in the patches says nothing. NaN if none is."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
