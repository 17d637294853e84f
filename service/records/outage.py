"""When the database cannot do its part: what that is called, and how long a process waits for it at first."""

from __future__ import annotations

import threading
import time

from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from models.errors import SegnodeError
from service.logs import get_logger
from service.records.database import Records

PATIENCE_S = 60.0
_AGAIN_S = 1.0
_REASON_CHARACTERS = 300
_NO_SUCH_TABLE_OR_COLUMN = frozenset({"42P01", "42703"})  # SQLSTATE, of PostgreSQL

log = get_logger(__name__)


class RecordsUnavailableError(SegnodeError):
    """Raised, or told, when the records cannot be reached or are not those of this release."""

    code = "RECORDS_UNAVAILABLE"
    retryable = True


def outage_of(error: BaseException) -> RecordsUnavailableError | None:
    """What an error of the database means for whoever asked; None for a fault of the program.

    The message tells no value of a row.
    """
    if not isinstance(error, SQLAlchemyError):
        return None
    if isinstance(error, DBAPIError) and _is_of_another_release(error):
        return RecordsUnavailableError(
            "The node's records are not those of this release: a table or a column is missing.",
            remedy="Start the processes of the node again: each brings the database to the tables of its "
            "release. segnode doctor tells at which revision it is.",
        )
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeoutError)):
        return RecordsUnavailableError(
            "The node's records cannot be reached now.",
            remedy="Try again later; whoever runs the node finds the reason in its log.",
        )
    return None


def reason_of(error: BaseException) -> str:
    """Why a connection could not be made, for whoever runs the node; empty for errors of a statement.

    It names hosts and users, never a password, and cannot hold a value of a row.
    """
    if not isinstance(error, DBAPIError) or error.statement is not None:
        return ""
    return " ".join(str(error.orig).split())[:_REASON_CHARACTERS].rstrip(".")


def wait_for_records(url: str, stop: threading.Event) -> bool:
    """Wait, at the start of a process, until the database can be reached; one that is a file always can.

    A database server that starts at the same time is waited for. Then the process ends with one line, and
    whatever has started it (compose, systemd) does so again.

    Returns
    -------
    bool
        False if ``stop`` was set meanwhile.

    Raises
    ------
    RecordsUnavailableError
        If it could not be reached for ``PATIENCE_S``.
    SettingsError
        If it is not one that the records can be kept in.
    """
    records = Records(url)
    try:
        give_up_at = time.monotonic() + PATIENCE_S
        told = False
        while not records.is_sqlite:
            try:
                with records.engine.connect():
                    break
            except OperationalError as error:
                reason = reason_of(error)
            if time.monotonic() >= give_up_at:
                raise RecordsUnavailableError(
                    f"The database {_place(url)} could not be reached for {PATIENCE_S:g} s: {reason}.",
                    remedy="Check the server, database_url and its password; then start this again.",
                )
            if not told:
                log.warning("records.away", database=_place(url), reason=reason, waits_s=PATIENCE_S)
                told = True
            if stop.wait(_AGAIN_S):
                return False
    finally:
        records.close()
    return not stop.is_set()


def _is_of_another_release(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state in _NO_SUCH_TABLE_OR_COLUMN
    said = str(error.orig)
    return said.startswith(("no such table", "no such column")) or (
        said.startswith("table ") and " has no column named " in said
    )


def _place(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)
