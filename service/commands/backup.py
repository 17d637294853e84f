"""``segnode backup`` and ``segnode restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.console import note, warn
from service.commands.settings import Config, load

Folder = Annotated[Path, typer.Argument(file_okay=False)]


def backup(folder: Folder, config: Config = None) -> None:
    """Write records, spool and models into a new folder. The node may go on meanwhile."""
    from service.backup import back_up

    done = back_up(load(config), folder)
    note(f"{done.rows} rows and {done.files} files of the spool, tables at revision {done.revision}.")
    if done.missing:
        warn(f"{len(done.missing)} files were not there, {done.missing[0]} for one: see backup.json.")


def restore(folder: Folder, config: Config = None) -> None:
    """Put a backup into an empty data folder and an empty database of either engine; then start the node."""
    from service.backup import restore as put_back

    done = put_back(load(config), folder)
    note(f"{done.rows} rows and {done.files} files are back; tables at this release's revision.")
