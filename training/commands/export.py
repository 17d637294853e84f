"""``segnode-train export``: a results folder becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="export")(export)


def export(
    results: Annotated[
        Path, typer.Argument(help="nnU-Net results folder: plans.json, dataset.json, fold_*.")
    ],
    name: Annotated[str, typer.Option(help="Name of the model: lower case letters, digits, hyphens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle; must not exist.")],
    golden_image: Annotated[
        list[Path], typer.Option(help="Small NIfTI image that may be given on; once per channel, in order.")
    ],
    version: Annotated[str, typer.Option(help="Semantic version.")] = "0.1.0",
    orientation: Annotated[
        str | None, typer.Option(help="Axis code of the training arrays, for example RAS, or 'any'.")
    ] = None,
    training_images: Annotated[
        Path | None, typer.Option(help="Folder of the training images, whose headers tell the orientation.")
    ] = None,
    training_labels: Annotated[
        Path | None, typer.Option(help="Folder of the training labels, for plausible volumes.")
    ] = None,
    labels_file: Annotated[Path | None, typer.Option(help="YAML with codes, colours, limits.")] = None,
    generic_codes: Annotated[
        bool, typer.Option("--generic-codes", help="Code every label as 'Body structure': research only.")
    ] = False,
    card: Annotated[Path | None, typer.Option(help="Model card to use instead of the generated one.")] = None,
    fold: Annotated[str | None, typer.Option(help="'all' folds there are, or numbers such as 0,1.")] = None,
    checkpoint: Annotated[str, typer.Option(help="final, best or latest.")] = "final",
    mirroring: Annotated[
        bool, typer.Option("--mirroring/--no-mirroring", help="Mirror at test time: up to 8 times the work.")
    ] = False,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The teacher's results folder, for the record of where this came from."),
    ] = None,
    method: Annotated[str, typer.Option(help="How it was trained.")] = "nnU-Net training without a teacher",
    recipe: Annotated[str | None, typer.Option(help="Name of the recipe.")] = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(help="Measured figures: teacher=FILE or float32=FILE, of `evaluate`; repeatable."),
    ] = None,
    evaluated_on: Annotated[str, typer.Option(help="What the evaluated cases are.")] = "cases not named",
) -> None:
    """Export a trained model as a bundle, and prove that the bundle does what the model does."""
    from training.environment import configure_nnunet
    from training.evaluate import Evaluation
    from training.export import ExportRequest, export_bundle, metrics_of

    evaluations = {
        model: Evaluation.load(Path(path)) for model, _, path in (e.partition("=") for e in evaluation or ())
    }
    configure_nnunet()
    exported = export_bundle(
        ExportRequest(
            results=results,
            name=name,
            output=output,
            golden_images=tuple(golden_image),
            version=version,
            labels_file=labels_file,
            generic_codes=generic_codes,
            orientation=orientation,
            training_images=training_images,
            training_labels=training_labels,
            card=card,
            folds=None if fold in (None, "all") else tuple(part.strip() for part in fold.split(",")),
            checkpoint=checkpoint,
            mirroring=mirroring,
            teacher=teacher,
            method=method,
            recipe=recipe,
            metrics=metrics_of(evaluations, evaluated_on) if evaluations else None,
        )
    )
    console = Console()
    manifest = exported.bundle.manifest
    console.print(f"{manifest.name} {manifest.version}: {exported.bundle.folder}", soft_wrap=True)
    console.print(f"model digest {exported.bundle.digest}", soft_wrap=True)
    for weights, agreement in zip(manifest.weights, exported.agreements, strict=True):
        console.print(
            f"{weights.file} against PyTorch: logits up to {agreement.max_logit:.3g}, largest difference "
            f"{agreement.max_difference:.2g}, {agreement.argmax_agreement:.4%} of the labels agree",
            soft_wrap=True,
        )
    for label, dice in exported.golden_dice.items():
        console.print(f"golden case, {label}: Dice {dice:.5f}", soft_wrap=True)
