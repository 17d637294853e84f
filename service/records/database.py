"""Connections and transactions of the records, on SQLite and on PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, Executable, create_engine, event, func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from service.errors import SettingsError

_BUSY_TIMEOUT_S = 30.0

# On PostgreSQL: nobody waits for a lock for longer than on SQLite, a client that stops in the middle of a
# transaction is put out of it, and one whose machine is gone is noticed, so that its locks are free again.
_SESSION_OPTIONS = (
    "-c timezone=UTC -c lock_timeout=30s -c idle_in_transaction_session_timeout=120s "
    "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
)
_CONNECT_TIMEOUT_S = 10
_COMPARE_CLOCKS_EVERY_S = 60.0
LARGEST_CLOCK_OFFSET = timedelta(seconds=2)
"""By how much a host's clock may differ from the database server's before somebody is told."""
_WORK = "segnode work"
_WRITERS_LOCK = 0x5E610DF  # advisory; the migrations' own is one below


def utc_now() -> datetime:
    """The present time, in UTC and naive: this is how every time stands in the records."""
    return datetime.now(UTC).replace(tzinfo=None)


def change(session: Session, statement: Executable) -> int:
    """Run an UPDATE or DELETE and return how many rows it changed: the compare-and-set of the records."""
    result = session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount


def announce_work(session: Session) -> None:
    """Have the bell rung once the transaction is committed: there is something for workers to do."""
    session.info[_WORK] = True


def lock_name(session: Session, name: str) -> None:
    """Wait for everyone else who has locked this name, until the end of their transactions.

    For what has no row yet that could be locked. On SQLite there is one writer at a time anyway.
    """
    if session.get_bind().dialect.name != "sqlite":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


class Records:
    """The database of one node.

    On SQLite: write-ahead log, ``synchronous=FULL`` (a commit is on the disk when it returns), and every
    writing transaction takes the write lock at its beginning, so that two writers wait for each other
    instead of failing in the middle. Never put the file on a network file system.

    On PostgreSQL (``postgresql+psycopg://``): ``READ COMMITTED``, and writers go on side by side. What two
    may do to one row at once is settled by compare-and-set and by row locks; whoever has to look at many
    rows before changing some asks to be :meth:`alone <write>`, as every writer is on SQLite.

    Parameters
    ----------
    url : str
        An SQLAlchemy database URL. The tables are made by :func:`service.records.migrate.upgrade`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = make_url(url).get_backend_name() == "sqlite"
        self._engine = _sqlite_engine(url) if self.is_sqlite else _postgresql_engine(url)
        self._writer = self._engine.execution_options(segnode_write=True)
        self._reader = self._engine
        if not self.is_sqlite:
            self._reader = self._engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        self._clock_offset: timedelta | None = timedelta() if self.is_sqlite else None
        self._clocks_compared_at = float("-inf")
        self.ring: Callable[[], None] = _ring_nothing
        """Called after every transaction that has put something into a queue. It must return at once."""

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Session]:
        """A session in one writing transaction: committed when the block ends, rolled back if it raises.

        With ``alone`` no other writing transaction goes on beside it, on any host.
        """
        with Session(self._writer, expire_on_commit=False) as session:
            with session.begin():
                if self.is_sqlite:
                    session.connection()  # takes the lock now, not at the first statement
                else:
                    lock = func.pg_advisory_xact_lock if alone else func.pg_advisory_xact_lock_shared
                    session.execute(select(lock(_WRITERS_LOCK)))
                yield session
            if session.info.pop(_WORK, False):
                self.ring()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session in one reading transaction: a consistent view, never committed."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def now(self) -> datetime:
        """The present time by the clock that every host of these records shares, UTC and naive.

        Leases, beats and quiet times compare times that different hosts have written. On PostgreSQL this is
        therefore the server's clock, which is asked for its time at first and then once a minute; on SQLite
        there is one host, and its own. A server that is away just now is taken to go on as it went.
        """
        if not self.is_sqlite and time.monotonic() - self._clocks_compared_at > _COMPARE_CLOCKS_EVERY_S:
            try:
                self.compare_clocks()
            except SQLAlchemyError:
                if self._clock_offset is None:
                    raise
        assert self._clock_offset is not None
        return utc_now() + self._clock_offset

    def compare_clocks(self) -> timedelta:
        """Ask the server for its time. Returns by how much its clock is before this host's."""
        if self.is_sqlite:
            return timedelta()
        began = utc_now()
        with self._reader.connect() as connection:
            theirs: datetime = connection.execute(
                select(text("timezone('UTC', clock_timestamp())"))
            ).scalar_one()
        ended = utc_now()
        self._clock_offset = theirs - (began + (ended - began) / 2)
        self._clocks_compared_at = time.monotonic()
        return self._clock_offset

    def close(self) -> None:
        self._engine.dispose()


def _ring_nothing() -> None:
    """Workers that have no bell look by themselves."""


def _postgresql_engine(url: str) -> Engine:
    try:
        engine = create_engine(
            url,
            pool_pre_ping=True,  # a server that was started again is not an error
            connect_args={"options": _SESSION_OPTIONS, "connect_timeout": _CONNECT_TIMEOUT_S},
        )
    except (ArgumentError, ImportError) as error:
        raise SettingsError(
            f"database_url names a database that cannot be used here ({type(error).__name__}).",
            remedy="Write it as postgresql+psycopg://USER@HOST/NAME, and install segnode[postgresql].",
        ) from error
    # Before SQLAlchemy itself asks anything: of a database without an encoding it gets bytes for text.
    event.listen(engine, "connect", _require_unicode, insert=True)
    return engine


def _require_unicode(connection: Any, _record: Any) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise SettingsError(
            f"The database is encoded in {encoding}; the records need UTF8.",
            remedy="Make a new one: CREATE DATABASE segnode TEMPLATE template0 ENCODING 'UTF8'.",
        )


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
