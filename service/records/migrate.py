"""Bring the database to the version of the tables that this release works on, with its data kept."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text

from service.errors import SettingsError
from service.records.database import Records

_ADVISORY_LOCK = 0x5E610DE  # any number that nobody else uses on this database


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def head_revision() -> str:
    """The newest revision that this release knows."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "the release holds no migrations"
    return head


def current_revision(url: str) -> str | None:
    """The revision that a database is at; None for an empty one."""
    records = Records(url)
    try:
        with records.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        records.close()


def upgrade(url: str, revision: str = "head") -> None:
    """Upgrade a database, or make a new one. Several processes may call this at once: one does the work.

    Raises
    ------
    SettingsError
        If the database is at a revision that this release does not know: it was written by a newer one.
    """
    with _migrating(url) as connection:
        known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
        present = MigrationContext.configure(connection).get_current_revision()
        if present is not None and present not in known:
            raise SettingsError(
                f"The database is at revision {present}, which this release does not know.",
                remedy="Start the newer release that wrote it, or restore the backup made before it.",
            )
        command.upgrade(_config(connection), revision)


def downgrade(url: str, revision: str) -> None:
    """Take a database back to an older revision, for a roll back of the release."""
    with _migrating(url) as connection:
        command.downgrade(_config(connection), revision)


@contextmanager
def _migrating(url: str) -> Iterator[Connection]:
    """A connection that no other process migrates through at the same time, committed at the end."""
    records = Records(url)
    try:
        if records.engine.dialect.name == "sqlite":
            lock_path = Path(f"{records.engine.url.database}.migrating")
            with lock_path.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # SQLite alters a table by copying it and dropping the old one, which rows of other tables
                # refer to: references are looked at once, at the end.
                event.listen(records.engine, "connect", _without_references)
                with records.engine.begin() as connection:
                    yield connection
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                    assert not broken, f"{len(broken)} references of the records lead nowhere"
        else:
            with records.engine.begin() as connection:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                yield connection
    finally:
        records.close()


def _without_references(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=OFF").close()
