"""``segnode doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from service.commands.settings import Config, load

if TYPE_CHECKING:
    from service.settings import Destination

_COLORS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}


def doctor(config: Config = None) -> None:
    """Look for what would keep the node from working, and say what to do about it.

    Exit status 1 if there is a problem; warnings alone give 0.
    """
    from service.diagnosis import Health
    from service.dicom.send import OutcomeKind, echo
    from service.doctor import examine
    from service.node import open_registry

    settings = load(config)

    def ask(destination: Destination) -> str | None:
        outcome = echo(destination, calling_ae_title=settings.dicom.ae_title)
        return None if outcome.kind is OutcomeKind.DELIVERED else outcome.error

    problems = 0
    for finding in examine(settings, open_registry(settings), echo=ask):
        problems += finding.health is Health.PROBLEM
        mark = typer.style(f"{finding.health.value:<8}", fg=_COLORS[finding.health.value])
        typer.echo(f"{mark} {finding.what}: {finding.message}")
        if finding.remedy:
            typer.echo(f"{'':<8} {finding.remedy}")
    if problems:
        raise typer.Exit(1)
