"""``segnode-train study``: several runs under one budget, measured alike, and the best made bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="study")(study)


def study(
    description: Annotated[Path, typer.Argument(help="YAML file of the study; see training/studies.")],
    teacher: Annotated[Path, typer.Argument(help="The teacher's nnU-Net results folder.")],
    data: Annotated[Path, typer.Argument(help="Cases: imagesTr and labelsTr, or images and labels.")],
    golden_image: Annotated[Path, typer.Option(help="Small NIfTI image that may be given on.")],
    work: Annotated[Path, typer.Option("--work", "-w", help="Folder of the runs; those there go on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for figures, logs and the report.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train, export, measure, quantize and report every run; started again, it goes on where it was."""
    from training.study import load_study
    from training.study_steps import StudyFolder

    errors = Console(stderr=True)
    report = StudyFolder(
        load_study(description),
        teacher,
        data,
        golden_image,
        work,
        device=device,
        tell=lambda text: errors.print(text, markup=False, highlight=False, soft_wrap=True),
    ).complete(output)
    Console().print(str(report), markup=False, soft_wrap=True)
