"""Connections and transactions of the records, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, Executable, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from service.errors import SettingsError

_BUSY_TIMEOUT_S = 30.0


def utc_now() -> datetime:
    """The present time, in UTC and naive: this is how every time stands in the records."""
    return datetime.now(UTC).replace(tzinfo=None)


def change(session: Session, statement: Executable) -> int:
    """Run an UPDATE or DELETE and return how many rows it changed: the compare-and-set of the records."""
    result = session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount


class Records:
    """The database of one node.

    On SQLite: write-ahead log, ``synchronous=FULL`` (a commit is on the disk when it returns), and every
    writing transaction takes the write lock at its beginning, so that two writers wait for each other
    instead of failing in the middle. Never put the file on a network file system.

    Parameters
    ----------
    url : str
        An SQLAlchemy database URL. The tables are made by :func:`service.records.migrate.upgrade`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = _sqlite_engine(url) if make_url(url).get_backend_name() == "sqlite" else _engine(url)
        self._writer = self._engine.execution_options(segnode_write=True)

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one writing transaction: committed when the block ends, rolled back if it raises."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            session.connection()  # takes the lock now, not at the first statement
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session in one reading transaction: a consistent view, never committed."""
        with Session(self._engine, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        self._engine.dispose()


def _engine(url: str) -> Engine:
    return create_engine(url, pool_pre_ping=True)


def _sqlite_engine(url: str) -> Engine:
    database = make_url(url).database
    if not database or database == ":memory:":
        raise SettingsError(
            "The records cannot be kept in memory: they must outlive the process.",
            remedy="Give database_url the path of a file, or leave it out.",
        )
    Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("segnode_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine
