"""How commands talk: results on standard output, everything else on standard error."""

from __future__ import annotations

import getpass
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress


def show_error(code: str, message: str, remedy: str) -> None:
    """One red line with the code first, then what to do about it."""
    typer.secho(f"{code}: {message}", fg=typer.colors.RED, err=True)
    if remedy:
        typer.echo(remedy.strip("\n"), err=True)


def person() -> str:
    """Who gives the command, for the audit trail."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"cli:{os.getuid()}"


def note(text: str) -> None:
    """A line for a person, on standard error, so that what is piped on stays clean."""
    typer.echo(text, err=True)


def warn(text: str) -> None:
    typer.secho(f"warning: {text}", fg=typer.colors.YELLOW, err=True)


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on standard output, the same on a terminal and in a pipe."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def progress_bar() -> Progress:
    """A progress bar on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
