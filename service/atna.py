"""The audit trail on its way to an audit repository: syslog over TLS (RFC 5425), in order, and nothing lost.

The trail itself is the spool: its lines stay in the records, and a small file says how far the repository has
been told. Syslog has no acknowledgement; so each batch goes over a connection of its own, and counts as taken
when the repository has ended the connection after the node did, and in order. A batch that did not come that
far is sent again: the repository may get a message twice, and never too few.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from models.errors import SegnodeError
from service.atna_messages import audit_message, syslog_frame
from service.audit_trail import read_head
from service.logs import get_logger
from service.records.database import Records
from service.records.tables import Event
from service.security_rules import AtnaRules
from service.tls import client_context, explain

POSITION_FILE = "atna-position.json"
_BATCH = 200

log = get_logger(__name__)


class RepositoryError(SegnodeError):
    """Raised when the repository has not taken a batch of messages."""

    code = "AUDIT_REPOSITORY_UNAVAILABLE"
    retryable = True


class Forwarder:
    """Sends what is new in the audit trail.

    Parameters
    ----------
    rules : AtnaRules
        Where to.
    records : Records
        Whose audit trail.
    position : path
        The file that says how far the repository has been told. Without it, what is new from now on is sent.
    """

    def __init__(self, rules: AtnaRules, records: Records, position: Path) -> None:
        self._rules = rules
        self._records = records
        self._position = position

    def run(self, stop: threading.Event) -> None:
        """Send until ``stop`` is set. Of several processes of a node, one does so at a time."""
        wait_s = self._rules.interval_s
        while not stop.wait(wait_s):
            try:
                with self._alone() as alone:
                    while alone and not stop.is_set() and self.send_batch():
                        pass
                wait_s = self._rules.interval_s
            except (SegnodeError, SQLAlchemyError, OSError) as error:
                log.warning("atna.waiting", exc_info=error, again_in_s=wait_s)
                wait_s = min(self._rules.longest_wait_s, wait_s * 2)

    def send_batch(self) -> int:
        """Send the lines that come next. Returns how many there were.

        Raises
        ------
        RepositoryError
            If the repository has not taken them; they are sent again.
        """
        position = self._read_position()
        with self._records.read() as session:
            if position is None:
                position = read_head(session).chain_index
                self._write_position(position)
            rows = session.scalars(
                select(Event).where(Event.chain_index > position).order_by(Event.chain_index).limit(_BATCH)
            ).all()
        if not rows:
            return 0
        here = socket.gethostname()
        frames = []
        for row in rows:
            message = audit_message(
                row, source_id=self._rules.source_id, site_id=self._rules.site_id, node_address=here
            )
            if message is not None:
                frames.append(syslog_frame(message, at=row.at, host=here, process=os.getpid()))
        if frames:
            self._send(b"".join(frames))
        last = rows[-1].chain_index
        assert last is not None
        self._write_position(last)
        log.info("atna.sent", messages=len(frames), chain_index=last)
        return len(rows)

    def _send(self, content: bytes) -> None:
        rules = self._rules
        where = f"{rules.host}:{rules.port}"
        try:
            with closing(self._connect()) as connection:
                connection.sendall(content)
                _end(connection)
        except OSError as error:
            raise RepositoryError(
                f"The audit repository {where} has not taken the messages: {explain(error)}.",
                remedy="They are sent again; check the repository, its certificate and the section atna.",
            ) from error

    def _connect(self) -> socket.socket:
        rules = self._rules
        plain = socket.create_connection((rules.host, rules.port), timeout=rules.timeout_s)
        if rules.tls is None:
            return plain
        try:
            context = client_context(rules.tls.trusted, rules.tls.certificate, rules.tls.key)
            return context.wrap_socket(plain, server_hostname=rules.tls.server_name or rules.host)
        except BaseException:
            plain.close()
            raise

    def _read_position(self) -> int | None:
        try:
            return int(json.loads(self._position.read_text(encoding="ascii"))["chain_index"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RepositoryError(
                f"{self._position} does not say how far the repository was told.",
                remedy='Write {"chain_index": N} into it, where N is the last line that the repository has.',
            ) from error

    def _write_position(self, chain_index: int) -> None:
        unfinished = self._position.with_suffix(".part")
        with unfinished.open("w", encoding="ascii") as file:
            file.write(json.dumps({"chain_index": chain_index}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._position)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """True for one process at a time."""
        with self._position.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _end(connection: socket.socket) -> None:
    """Say that nothing more comes, and wait for the other side to have read it all and say the same."""
    if isinstance(connection, ssl.SSLSocket):
        try:
            connection.unwrap()
            return
        except ssl.SSLEOFError:
            return  # it has closed without the alert that should come first, as many do
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(4096):
        pass
