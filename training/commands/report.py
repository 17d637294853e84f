"""``segnode-train report``: one report of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="report")(report)


def report(
    description: Annotated[Path, typer.Argument(help="YAML file that names the runs and their evaluations.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
) -> None:
    """Write tables, paired tests, curves and pictures as Markdown and HTML."""
    from training.environment import configure_nnunet
    from training.report import write_report

    configure_nnunet()
    for path in write_report(description, output):
        Console().print(str(path), markup=False, soft_wrap=True)
