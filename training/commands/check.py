"""``segnode-train check``: parse recipes, and check their networks against their papers, without data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(name="check")(check)


def check(
    recipes: Annotated[list[Path], typer.Argument(help="Recipe files.")],
) -> None:
    """Check recipes without their data."""
    from training.dry_run import dry_run
    from training.recipe import load_recipe

    table = Table("recipe", "method", "width", "teacher, M parameters", "student, M parameters")
    for path in recipes:
        recipe = load_recipe(path)
        counts = ("", "")
        if recipe.published is not None:
            checked = dry_run(recipe)
            counts = (checked.teacher_millions, checked.student_millions)
        table.add_row(recipe.name, recipe.method, str(recipe.student), *counts)
    Console().print(table)
