"""Backup and restore of a node: its records, the files that they speak of, and its models.

A backup is a folder that any engine can be restored from, so it also takes a node from SQLite to PostgreSQL:

    backup.json          when, of which revision of the tables, how many rows and files, and what was missing
    records/TABLE.jsonl  one row a line; times are ISO 8601
    spool/ models/       files, by their places in the data folder
    SHA256SUMS           of every other file

The node may go on while it is backed up: the rows are those of one moment, files never change once a row
speaks of them, and one that was deleted meanwhile is listed as missing. A restore wants an empty database and
an empty data folder, puts the files there first, and the rows in one transaction after them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, DateTime, MetaData, Table, bindparam, func, select, text

from models.errors import SegnodeError
from service.records.database import Records, utc_now
from service.records.migrate import current_revision, upgrade
from service.settings import Settings

_VERSION_TABLE = "alembic_version"
_WITH_FILES = ("instance", "job_input", "result", "site_case")  # their column path says where in the spool
_BATCH_ROWS = 500
_FORMAT = 1


class BackupError(SegnodeError):
    """Raised when a backup cannot be made, or is not fit to be restored here."""

    code = "BACKUP"


@dataclass(frozen=True)
class BackedUp:
    """What is in a backup. ``missing`` are files that rows speak of and that should have been there."""

    revision: str
    rows: int
    files: int
    missing: tuple[str, ...]


def back_up(settings: Settings, target: Path) -> BackedUp:
    """Write a backup into a new folder.

    Raises
    ------
    BackupError
        If the folder holds something already, or the node has no records yet.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise BackupError(f"{target} is not empty.", remedy="Name a new folder.")
    revision = current_revision(settings.records_url)
    if revision is None:
        raise BackupError("There are no records to back up.", remedy="Check data_dir and database_url.")
    sums: dict[str, str] = {}
    records = Records(settings.records_url)
    try:
        with records.read() as session:
            rows, wanted = _write_tables(session.connection(), target, sums)
    finally:
        records.close()
    files, missing = 0, []
    for relative in sorted(wanted):
        try:
            sums[f"spool/{relative}"] = _copy(settings.spool_dir / relative, target / "spool" / relative)
            files += 1
        except FileNotFoundError:
            if wanted[relative]:
                missing.append(relative)
    for path in _files_in(settings.registry_dir):
        relative = path.relative_to(settings.registry_dir).as_posix()
        sums[f"models/{relative}"] = _copy(path, target / "models" / relative)
    done = BackedUp(revision, rows, files, tuple(missing))
    description = {
        "format": _FORMAT,
        "made_at": utc_now().isoformat(),
        "revision": revision,
        "rows": done.rows,
        "files": done.files,
        "missing": missing,
    }
    sums["backup.json"] = _write(target / "backup.json", json.dumps(description, indent=1) + "\n")
    _write(target / "SHA256SUMS", "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    return done


def restore(settings: Settings, source: Path) -> BackedUp:
    """Put a backup into an empty data folder and an empty database, and upgrade it to this release.

    Raises
    ------
    BackupError
        If the backup is not whole, or there is something already where it would go.
    """
    description = _verify(source)
    for folder in (settings.spool_dir, settings.registry_dir):
        if any(True for _ in _files_in(folder)):
            raise BackupError(f"{folder} holds files already.", remedy="Restore into an empty data_dir.")
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if current_revision(settings.records_url) is not None:
        raise BackupError("The database holds records already.", remedy="Restore into an empty database.")
    for name, folder in (("spool", settings.spool_dir), ("models", settings.registry_dir)):
        for path in _files_in(source / name):
            _copy(path, folder / path.relative_to(source / name))
    upgrade(settings.records_url, description["revision"])
    records = Records(settings.records_url)
    try:
        with records.write(alone=True) as session:
            _read_tables(session.connection(), source)
    finally:
        records.close()
    upgrade(settings.records_url)
    return BackedUp(
        description["revision"], description["rows"], description["files"], tuple(description["missing"])
    )


def _tables(connection: Connection) -> list[Table]:
    """Every table but the migrations' own, each after those that it refers to."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != _VERSION_TABLE]


def _write_tables(connection: Connection, target: Path, sums: dict[str, str]) -> tuple[int, dict[str, bool]]:
    """Write every table; how many rows there are, and the files that they speak of.

    With each file: whether it must be there. It need not be where the retention has purged its job.
    """
    count = 0
    paths: dict[str, bool] = {}
    tables = _tables(connection)
    purge = next((table for table in tables if table.name == "purge"), None)  # older revisions have none
    purged = set(connection.scalars(select(purge.c.job_id))) if purge is not None else set()
    for table in tables:
        lines = []
        for row in connection.execute(select(table).order_by(*table.primary_key.columns)).mappings():
            lines.append(json.dumps({name: _as_json(value) for name, value in row.items()}))
            if table.name in _WITH_FILES:
                paths[row["path"]] = paths.get(row["path"], False) or row.get("job_id") not in purged
        name = f"records/{table.name}.jsonl"
        sums[name] = _write(target / name, "".join(f"{line}\n" for line in lines))
        count += len(lines)
    return count, paths


def _read_tables(connection: Connection, source: Path) -> None:
    tables = {table.name: table for table in _tables(connection)}
    written = {path.stem for path in (source / "records").iterdir()}
    if written != tables.keys():
        raise BackupError(
            f"Tables that are not of the backup's revision: {', '.join(sorted(written ^ tables.keys()))}."
        )
    for table in tables.values():
        with (source / "records" / f"{table.name}.jsonl").open(encoding="utf-8") as lines:
            rows = [_as_row(table, line) for line in lines]
        # A row may refer to another of its table that comes later: these references are made at the end.
        own = [c for c in table.columns if any(key.column.table is table for key in c.foreign_keys)]
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            connection.execute(table.insert(), [row | {c.name: None for c in own} for row in batch])
        for column in own:
            _refer(connection, table, column, rows)
        _go_on_counting(connection, table)


def _refer(connection: Connection, table: Table, column: Column[Any], rows: list[dict[str, Any]]) -> None:
    (key,) = table.primary_key.columns
    references = [
        {"row_key": row[key.name], "refers_to": row[column.name]}
        for row in rows
        if row[column.name] is not None
    ]
    if references:
        values: dict[str, Any] = {column.name: bindparam("refers_to")}
        connection.execute(table.update().where(key == bindparam("row_key")).values(values), references)


def _go_on_counting(connection: Connection, table: Table) -> None:
    """Let a column that counts by itself go on behind the rows that were put in with their numbers."""
    counter = table.autoincrement_column
    if counter is None or connection.dialect.name != "postgresql" or counter.foreign_keys:
        return
    last = connection.scalar(select(func.max(counter)))
    if last is not None:
        sequence = func.pg_get_serial_sequence(table.name, counter.name)
        connection.execute(select(func.setval(sequence.op("::")(text("regclass")), last)))


def _as_json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _as_row(table: Table, line: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    for column in table.columns:
        if isinstance(column.type, DateTime) and row[column.name] is not None:
            row[column.name] = datetime.fromisoformat(row[column.name])
    return row


def _verify(source: Path) -> dict[str, Any]:
    """The description of a backup of which every file is what it was, and none is beside them."""
    try:
        lines = (source / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        present = {path.relative_to(source).as_posix() for path in _files_in(source)} - {"SHA256SUMS"}
        wrong = present ^ sums.keys()
        wrong |= {name for name in present & sums.keys() if _digest(source / name) != sums[name]}
        description: dict[str, Any] = json.loads((source / "backup.json").read_text())
    except (OSError, ValueError) as error:
        raise BackupError(
            f"{source} is no backup: its SHA256SUMS or backup.json is missing or cannot be read.",
            remedy="Name a folder that 'segnode backup' has written, whole and as it was.",
        ) from error
    if wrong:
        raise BackupError(
            f"{len(wrong)} file(s) of the backup are damaged, missing or foreign, {min(wrong)} for one.",
            remedy="Take another backup.",
        )
    if description["format"] != _FORMAT:
        raise BackupError(f"The backup has format {description['format']}; this release reads {_FORMAT}.")
    return description


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())


def _copy(source: Path, target: Path) -> str:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("xb") as written:
        shutil.copyfileobj(read, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())
    return _digest(target)


def _write(path: Path, content: str) -> str:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as written:
        written.write(content)
        written.flush()
        os.fsync(written.fileno())
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
