"""``segnode-train plan``: what a student of a width costs, and its plans file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from training.commands.arguments import fraction


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="plan")(plan)


def plan(
    teacher: Annotated[Path, typer.Argument(help="The teacher: an nnU-Net results folder.")],
    width: Annotated[
        list[str], typer.Option(help="Width of a student, for example 1/4; may be repeated.")
    ] = ["1/4"],  # noqa: B006
    round_to: Annotated[
        int | None, typer.Option(help="Round channels up to a multiple, for example 16.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Batch size of the student's training; the teacher's by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for one plans file per width.")
    ] = None,
) -> None:
    """Show what students of a teacher would cost, and write their nnU-Net plans files."""
    import torch

    from training.student import build_network, count_gflops, count_parameters, scaled_plans
    from training.teacher import ResultsFolder

    results = ResultsFolder.open(teacher)
    z, y, x = results.settings["patch_size"]
    table = Table("network", "channels", "parameters", f"GFLOPs a {z}x{y}x{x} patch")

    def add(name: str, settings: dict[str, object], features: list[int]) -> None:
        with torch.device("meta"):
            network = build_network(settings, results.n_channels, results.classes.n_outputs)
        cost = count_gflops(network, results.n_channels, (z, y, x))
        table.add_row(name, ", ".join(map(str, features)), f"{count_parameters(network):,}", f"{cost:.2f}")

    add(results.plans["plans_name"], results.settings, results.features)
    for one in width:
        plans = scaled_plans(
            results.plans, fraction(one), round_to, batch_size=batch_size, configuration=results.configuration
        )
        settings = plans["configurations"][results.configuration]
        add(plans["plans_name"], settings, settings["architecture"]["arch_kwargs"]["features_per_stage"])
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{plans['plans_name']}.json").write_text(json.dumps(plans, indent=4) + "\n")
    Console().print(table)
