"""``segnode-train quantize``: INT8 weights for a bundle, behind a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="quantize")(quantize)


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Folder of the float32 bundle.")],
    data: Annotated[
        Path, typer.Argument(help="Labelled cases: imagesTr and labelsTr, or images and labels.")
    ],
    split: Annotated[Path, typer.Option(help="JSON with the lists of cases.")],
    version: Annotated[str, typer.Option(help="Semantic version of the new bundle.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle; must not exist.")],
    calibration_list: Annotated[str, typer.Option(help="List to calibrate with.")] = "train",
    gate_list: Annotated[str, typer.Option(help="List to judge on.")] = "choose",
    maximum_dice_loss: Annotated[float, typer.Option(help="Allowed per label.")] = 0.005,
    maximum_nsd_loss: Annotated[float, typer.Option(help="Allowed per label.")] = 0.01,
    prefer: Annotated[bool, typer.Option("--prefer", help="Make INT8 what the node runs.")] = False,
) -> None:
    """Quantize a bundle; nothing is written if a label loses more than is allowed."""
    from models.bundle import Bundle
    from training.preprocess import TrainingCases, read_split
    from training.quantize import Gate, quantize_bundle

    opened = Bundle.open(bundle)
    cases = TrainingCases.of_bundle(data, opened.manifest)
    lists = read_split(split, calibration_list, gate_list)
    errors = Console(stderr=True)
    result = quantize_bundle(
        opened,
        output,
        cases,
        calibration_cases=lists["train"],
        gate_cases=lists["val"],
        version=version,
        gate=Gate(maximum_dice_loss, maximum_nsd_loss),
        prefer=prefer,
        progress=lambda text: errors.print(text, markup=False),
    )
    console = Console()
    for label in result.float32.label_names:
        before, after = (e.summary("dice", label).mean for e in (result.float32, result.int8))
        console.print(f"{label}: Dice {before:.4f} in float32, {after:.4f} in int8", markup=False)
    console.print(f"{result.bundle.folder} ({result.bundle.digest})", markup=False, soft_wrap=True)
