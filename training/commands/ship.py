"""``segnode-train ship``: a measured bundle becomes the one that is given out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="ship")(ship)


def ship(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle that was measured.")],
    version: Annotated[str, typer.Option(help="Semantic version of the bundle that ships.")],
    figures: Annotated[
        list[str],
        typer.Option(
            help="float32=FILE, int8=FILE or teacher=FILE, as `segnode-train evaluate` wrote it; repeat."
        ),
    ],
    evaluated_on: Annotated[str, typer.Option(help="What the evaluated cases are, for a person to read.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle; must not exist.")],
    name: Annotated[str | None, typer.Option(help="A new name; by default the bundle's.")] = None,
    labels_file: Annotated[
        Path | None, typer.Option(help="The labels file of the export; its notes end the card.")
    ] = None,
) -> None:
    """Put figures into a bundle's manifest and card, seal it, and prove its golden case again."""
    from training.description import parse_description
    from training.evaluate import Evaluation
    from training.shipping import ship_bundle

    evaluations = {}
    for words in figures:
        key, equals, path = words.partition("=")
        if not (key and equals and path):
            raise typer.BadParameter(f"{words!r} is not of the form float32=FILE", param_hint="--figures")
        evaluations[key] = Evaluation.load(Path(path))
    shipped = ship_bundle(
        bundle,
        output,
        version=version,
        evaluations=evaluations,
        evaluated_on=evaluated_on,
        name=name,
        notes="" if labels_file is None else parse_description(labels_file).notes,
    )
    Console().print(f"{shipped.folder} ({shipped.digest})", markup=False, soft_wrap=True)
