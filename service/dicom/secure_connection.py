"""TLS under an association: the handshake, and reading what a record layer lets through.

pynetdicom asks ``select`` whether bytes have come and then waits for a whole PDU. Under TLS bytes may come
that are nobody's data (session tickets of TLS 1.3, key updates): it would wait on them, and send nothing,
until its time-out. So one byte ahead is decrypted first, and only then is a PDU said to have come.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import Any

from pynetdicom.transport import AssociationSocket

from service.tls import explain


class SecureAssociationSocket(AssociationSocket):  # type: ignore[misc]
    """An association's socket over TLS. ``failure`` says in a few words why TLS ended, where it did."""

    failure: str | None = None
    _ahead: bytes = b""

    @property
    def ready(self) -> bool:
        """True if a byte of a PDU is there, or the connection has ended."""
        if self.failure is not None and self.socket is not None:
            self.event_queue.put("Evt17")  # transport connection closed
            return False
        return bool(self._ahead) or (bool(super().ready) and self._look_ahead())

    def recv_into(self, buffer: memoryview) -> int:
        """As that of a socket."""
        if self.failure is not None:
            raise ConnectionAbortedError(self.failure)
        if self._ahead and len(buffer):
            buffer[:1], self._ahead = self._ahead, b""
            return 1
        try:
            return int(self.socket.recv_into(buffer))
        except OSError as error:
            self.failure = explain(error)
            raise

    def _look_ahead(self) -> bool:
        connection = self.socket
        timeout_s = connection.gettimeout()
        connection.settimeout(0.0)
        try:
            self._ahead = connection.recv(1)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            self.failure = explain(error)
            self.event_queue.put("Evt17")
            return False
        finally:
            connection.settimeout(timeout_s)
        return True  # an empty one is the end, which the read to come finds too


def secure(association: Any, timeout_s: float) -> str | None:
    """Do the handshake of a new connection, in the thread of the association.

    Returns
    -------
    str or None
        Why it failed, in a few words; the connection is shut down then.
    """
    connection = association.dul.socket.socket
    try:
        connection.settimeout(timeout_s)
        connection.do_handshake()
    except OSError as error:
        return shut_out(association, explain(error))
    association.dul.socket.__class__ = SecureAssociationSocket  # pynetdicom makes it itself
    return None


def shut_out(association: Any, failure: str) -> str:
    """End a connection that is not secure, so that not a byte of it is taken for a PDU."""
    association_socket = association.dul.socket
    association_socket.__class__ = SecureAssociationSocket
    association_socket.failure = failure
    with suppress(OSError):
        # Not that of SSLSocket, which turns TLS off and would let what comes through as plain text.
        socket.socket.shutdown(association_socket.socket, socket.SHUT_RDWR)
    return failure
