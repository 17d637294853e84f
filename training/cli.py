"""``segnode-train``: from a teacher to a student, its figures, and its bundle.

Every module of ``training.commands`` that has a ``register`` adds one command. torch and nnU-Net are imported
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import typer
from rich.console import Console

import training.commands
from models.errors import SegnodeError


def build_app() -> typer.Typer:
    """The program with every command that is there."""
    app = typer.Typer(
        name="segnode-train",
        help="Make small nnU-Net students from a large teacher, and bundles from students.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def _several_commands() -> None:
        """Keep the command's name even while there is only one."""

    for module in sorted(info.name for info in pkgutil.iter_modules(training.commands.__path__)):
        register = getattr(importlib.import_module(f"training.commands.{module}"), "register", None)
        if register is not None:
            register(app)
    return app


def main() -> None:
    """Run the program; an error that is meant for a person is a line and exit status 1, never a traceback."""
    try:
        build_app()()
    except SegnodeError as error:
        Console(stderr=True).print(f"{error.code}: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
