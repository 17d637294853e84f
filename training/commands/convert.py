"""``segnode-train convert``: a public dataset becomes nnU-Net's raw format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="convert")(convert)


def convert(
    dataset: Annotated[str, typer.Argument(help="BraTS2024, ISLES2022, BTCV or Mindboggle101.")],
    source: Annotated[Path, typer.Argument(help="The dataset as it was unpacked.")],
    raw: Annotated[Path, typer.Argument(help="nnU-Net's nnUNet_raw folder.")],
) -> None:
    """Convert a dataset that you hold; then plan and train a teacher with nnU-Net's own commands."""
    from training.datasets import LAYOUTS
    from training.datasets import convert as run
    from training.errors import TrainingDataError

    if dataset not in LAYOUTS:
        raise TrainingDataError(
            f"There is no layout {dataset!r}.", remedy=f"Use one of {', '.join(LAYOUTS)}."
        )
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(dataset, total=None)
        target = run(
            LAYOUTS[dataset],
            source,
            raw,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    Console().print(str(target), markup=False, soft_wrap=True)
