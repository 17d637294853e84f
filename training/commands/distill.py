"""``segnode-train distill``: train a student from a teacher by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from training import distill as loop


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="distill")(distill)


def distill(
    teacher: Annotated[
        Path,
        typer.Argument(help="The teacher's nnU-Net results folder; plans alone where nothing is distilled."),
    ],
    data: Annotated[
        Path,
        typer.Argument(help="Training cases (imagesTr and labelsTr, or images and labels), or label maps."),
    ],
    recipe: Annotated[Path, typer.Option(help="YAML file of the run; see training/recipes.")],
    split: Annotated[Path, typer.Option(help="JSON with the lists of cases to train and to validate with.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; one there is continued.")
    ],
    start_from: Annotated[
        Path | None, typer.Option(help="Results folder of a student whose weights this one starts with.")
    ] = None,
    train_list: Annotated[str, typer.Option(help="Name of the training list in the split.")] = "train",
    validation_list: Annotated[str, typer.Option(help="Name of the validation list.")] = "choose",
    fold: Annotated[str | None, typer.Option(help="The teacher's folds, for example 0 or 0,1,2.")] = None,
    checkpoint: Annotated[str, typer.Option(help="final, best or latest.")] = "final",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's seed.")] = None,
) -> None:
    """Train a student; started again in the same folder, the run goes on where it was."""
    from dataclasses import replace

    from training.distill import distill as run
    from training.preprocess import TrainingCases, read_split
    from training.recipe import load_recipe
    from training.synthesis.label_maps import LabelMapFolder
    from training.teacher import ResultsFolder

    parsed = load_recipe(recipe)
    if seed is not None:
        parsed = replace(parsed, training=replace(parsed.training, seed=seed))
    if parsed.distillation or any(teacher.glob("fold_*")):
        opened = ResultsFolder.open(
            teacher, folds=None if fold is None else fold.split(","), checkpoint=checkpoint
        )
    else:  # nothing is distilled: plans are enough
        opened = ResultsFolder.planned(teacher)
    cases: TrainingCases | LabelMapFolder
    if parsed.data.synthesis is None:
        cases = TrainingCases.open(data, opened.dataset_json)
    else:
        cases = LabelMapFolder(data)
    console = Console(stderr=True)
    with _bar(console) as bar:
        task = bar.add_task(parsed.name, total=None, loss=float("nan"))

        def show(progress: loop.Progress) -> None:
            bar.update(
                task,
                total=progress.epochs * progress.iterations,
                completed=progress.epoch * progress.iterations + progress.iteration + 1,
                description=f"{parsed.name}, epoch {progress.epoch + 1}/{progress.epochs}",
                loss=progress.loss,
            )

        results = run(
            opened,
            cases,
            read_split(split, train_list, validation_list),
            parsed,
            output,
            start=None if start_from is None else ResultsFolder.open(start_from),
            device=device,
            progress=show,
        )
    Console().print(str(results), soft_wrap=True, markup=False)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        console=console,
    )
