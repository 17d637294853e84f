"""``segnode-train evaluate``: a bundle's metrics on labelled cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="evaluate")(evaluate)


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    data: Annotated[
        Path, typer.Argument(help="Labelled cases: imagesTr and labelsTr, or images and labels.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    split: Annotated[
        Path | None, typer.Option(help="JSON with lists of cases; all cases if left out.")
    ] = None,
    cases_list: Annotated[str, typer.Option("--list", help="Name of the list in the split.")] = "claim",
    name: Annotated[str | None, typer.Option(help="What the evaluation is called in tables.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or int8; the bundle's own if left out.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="auto, openvino, onnxruntime or onnxruntime-cuda.")] = "auto",
    labelmaps: Annotated[Path | None, typer.Option(help="Folder to keep the predicted labelmaps in.")] = None,
    tolerance_mm: Annotated[float, typer.Option(help="Tolerance of the surface Dice, in millimetres.")] = 1.0,
) -> None:
    """Measure Dice, surface Dice and HD95 per label, with the engine that serves the bundle."""
    from models.bundle import Bundle
    from models.manifest import Precision
    from training.evaluate import evaluate as run
    from training.preprocess import TrainingCases, read_split

    opened = Bundle.open(bundle)
    cases = TrainingCases.of_bundle(data, opened.manifest)
    names = read_split(split, cases_list, cases_list)["val"] if split else cases.names()
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=len(names))
        result = run(
            opened,
            cases,
            names,
            name=name or f"{opened.manifest.name} {opened.manifest.version}",
            precision=Precision(precision) if precision else None,
            runtime=runtime,
            tolerance_mm=tolerance_mm,
            labelmaps=labelmaps,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    result.save(output)
    table = Table(title=f"{result.name}: {result.precision} on {result.runtime}, {len(names)} cases")
    for heading in ("label", "Dice", f"NSD at {tolerance_mm:g} mm", "HD95 mm"):
        table.add_column(heading)
    for label in (*result.label_names, None):
        cells = []
        for metric in ("dice", "nsd", "hd95_mm"):
            summary = result.summary(metric, label)
            cells.append(f"{summary.mean:.4f} ± {summary.standard_error:.4f}")
        table.add_row(label or "mean", *cells)
    Console().print(table)
