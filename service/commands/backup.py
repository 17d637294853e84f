"""``segnode backup`` and ``segnode restore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import note, person, warn
from service.commands.settings import Config, load

if TYPE_CHECKING:
    from service.backup import BackedUp
    from service.settings import Settings

Folder = Annotated[Path, typer.Argument(help="A new folder, or an empty one.", file_okay=False)]
Backup = Annotated[Path, typer.Argument(help="What segnode backup wrote.", exists=True, file_okay=False)]


def backup(folder: Folder, config: Config = None) -> None:
    """Write records, spool and models into a new folder. The node may go on meanwhile."""
    from service.backup import back_up

    settings = load(config)
    done = back_up(settings, folder)
    note(f"{done.rows} rows and {done.files} files of the spool, tables at revision {done.revision}.")
    if done.missing:
        warn(f"{len(done.missing)} files were not there, {done.missing[0]} for one: see backup.json.")
    _record("backup.made", settings, done)


def restore(folder: Backup, config: Config = None) -> None:
    """Put a backup into an empty data folder and an empty database of either engine; then start the node."""
    from service.backup import restore as put_back

    settings = load(config)
    done = put_back(settings, folder)
    _record("backup.restored", settings, done)
    note(f"{done.rows} rows and {done.files} files are back; tables at this release's revision.")


def _record(kind: str, settings: Settings, done: BackedUp) -> None:
    """Write into the audit trail who has taken everything out of the node, or put it there."""
    from service.records.database import Records, utc_now
    from service.records.events import record_event
    from service.records.migrate import current_revision, head_revision

    if current_revision(settings.records_url) != head_revision():
        return  # the trail of an older release, which this one must not write to
    records = Records(settings.records_url)
    try:
        with records.write() as session:
            detail = {"rows": done.rows, "files": done.files, "revision": done.revision}
            record_event(session, kind, actor=person(), at=utc_now(), detail=detail)
    finally:
        records.close()
