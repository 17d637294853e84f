"""Objects on their way from an association to the spool's disk.

pynetdicom collects a data set in memory, or, in its chunked mode, in a temporary file that it writes without
asking; there, a full disk or a message it does not understand ends its thread and leaves the peer waiting.
:class:`ReceivingDimse` takes the place of an association's DIMSE provider: it streams each data set into an
:class:`IncomingFile` of the spool, which never raises. What goes wrong is kept until the data set has
passed, so that the peer gets an answer that says why, and the association lives on for the other objects.
"""

from __future__ import annotations

import hashlib
import queue
import socket
import tempfile
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dsutils import create_file_meta
from pynetdicom.pdu_primitives import P_DATA

from models.errors import SegnodeError
from service.dicom.received_header import is_uid
from service.dicom.secure_connection import SecureAssociationSocket
from service.errors import StorageFullError
from service.logs import get_logger
from service.spool import Spool

IMPLEMENTATION_CLASS_UID = UID("2.25.211363158937129713546541329870113428371")
IMPLEMENTATION_VERSION_NAME = "SEGNODE"
MAXIMUM_PDU_BYTES = 128 * 1024

_PREAMBLE = b"\x00" * 128 + b"DICM"
_CHECK_EVERY_BYTES = 8 * 1024**2
_MAXIMUM_COMMAND_BYTES = 64 * 1024
_MAXIMUM_PDU_READ_BYTES = 1024**2  # an A-ASSOCIATE-RQ with 128 contexts is a fraction of it

_QUICK_ACKNOWLEDGEMENT: int | None = getattr(socket, "TCP_QUICKACK", None)
_MANDATORY = ("MessageID", "Priority", "AffectedSOPClassUID", "AffectedSOPInstanceUID")  # PS3.7 table 9.3-1

_log = get_logger(__name__)


class StoreRefusedError(SegnodeError):
    """Raised when a C-STORE is answered with a failure. ``status`` is of PS3.4 table B.2-1."""

    code = "STORE_REFUSED"
    OUT_OF_RESOURCES: ClassVar[int] = 0xA700
    DATA_SET_DOES_NOT_MATCH: ClassVar[int] = 0xA900
    CANNOT_UNDERSTAND: ClassVar[int] = 0xC000

    def __init__(self, status: int, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.status = status

    @property
    def transient(self) -> bool:
        """True if the peer should send the very same object again later."""
        return self.status == self.OUT_OF_RESOURCES


class IncomingFile:
    """A DICOM file under a temporary name of the spool, written as its data set arrives.

    It has the methods that pynetdicom calls on the temporary files of its chunked mode. After
    :meth:`finish`, ``sha256`` and ``size_bytes`` are of the whole file, and ``data_set_offset`` is where the
    data set, whose bytes are exactly those received, begins in it.
    """

    def __init__(self, spool: Spool, *, limit_bytes: int) -> None:
        self.problem: StoreRefusedError | None = None
        self.size_bytes = 0
        self.sha256 = ""
        self.data_set_offset = 0
        self.name = ""
        self._spool = spool
        self._limit_bytes = limit_bytes
        self._unchecked_bytes = 0
        self._hash = hashlib.sha256()
        self._stream: IO[bytes] | None = None

    @classmethod
    def open(
        cls,
        spool: Spool,
        *,
        limit_bytes: int,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> Self:
        """Begin a file with preamble and File Meta Information of the C-STORE command; never raises."""
        incoming = cls(spool, limit_bytes=limit_bytes)
        if not (is_uid(sop_class_uid) and is_uid(sop_instance_uid)):
            incoming._give_up(
                StoreRefusedError(
                    StoreRefusedError.CANNOT_UNDERSTAND, "The command's Affected SOP UIDs are not UIDs."
                )
            )
            return incoming
        try:
            spool.check_space()
            stream = tempfile.NamedTemporaryFile(  # noqa: SIM115 - it outlives this function by design
                dir=spool.incoming_dir, suffix=".dcm", delete=False, buffering=256 * 1024
            )
        except (OSError, StorageFullError) as error:
            incoming._give_up(_out_of_resources(error))
            return incoming
        incoming._stream, incoming.name = stream, stream.name
        head = BytesIO()
        head.write(_PREAMBLE)
        meta = create_file_meta(
            sop_class_uid=UID(sop_class_uid),
            sop_instance_uid=UID(sop_instance_uid),
            transfer_syntax=UID(transfer_syntax_uid),
            implementation_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version=IMPLEMENTATION_VERSION_NAME,
        )
        write_file_meta_info(head, meta)
        incoming.write(head.getvalue())
        incoming.data_set_offset = incoming.size_bytes
        return incoming

    @property
    def path(self) -> Path:
        return Path(self.name)

    def write(self, data: bytes) -> None:
        """Append a fragment; after a problem, let it pass."""
        if self.problem is not None or self._stream is None:
            return
        self.size_bytes += len(data)
        self._unchecked_bytes += len(data)
        if self.size_bytes > self._limit_bytes:
            self._give_up(
                StoreRefusedError(
                    StoreRefusedError.CANNOT_UNDERSTAND,
                    f"The object is larger than the limit of {self._limit_bytes} bytes.",
                    remedy="Raise dicom.maximum_object_bytes if objects of this size are wanted.",
                )
            )
            return
        try:
            if self._unchecked_bytes >= _CHECK_EVERY_BYTES:
                self._unchecked_bytes = 0
                self._spool.check_reserve()
            self._stream.write(data)
        except (OSError, StorageFullError) as error:
            self._give_up(_out_of_resources(error))
            return
        self._hash.update(data)

    @property
    def file(self) -> IncomingFile:
        return self

    def flush(self) -> None:
        """pynetdicom asks for this after every fragment; one flush at the end is enough."""

    def finish(self) -> None:
        """Hand the last bytes to the operating system.

        Raises
        ------
        StoreRefusedError
            If anything went wrong since the file was opened; nothing of it is left on the disk.
        """
        if self.problem is None and self._stream is not None:
            try:
                self._stream.close()
            except OSError as error:
                self._give_up(_out_of_resources(error))
        if self.problem is not None:
            raise self.problem
        self.sha256 = self._hash.hexdigest()

    def close(self) -> None:
        """Close, whatever has become of the file."""
        if self._stream is not None and not self._stream.closed:
            try:
                self._stream.close()
            except OSError as error:
                _log.warning("receive.close_failed", errno=error.errno)

    def discard(self) -> None:
        """Close and remove the file, if it is still under its temporary name."""
        self.close()
        if self.name:
            self.path.unlink(missing_ok=True)

    def _give_up(self, problem: StoreRefusedError) -> None:
        self.problem = problem
        self.discard()  # give its room back at once


def _out_of_resources(error: OSError | StorageFullError) -> StoreRefusedError:
    return StoreRefusedError(
        StoreRefusedError.OUT_OF_RESOURCES,
        error.message if isinstance(error, StorageFullError) else "The spool cannot be written.",
        remedy="Free space on the disk of the data folder; the sender tries again by itself.",
    )


class ReceivingDimse(DIMSEServiceProvider):  # type: ignore[misc] # pynetdicom is not typed for us
    """The DIMSE provider of one association to the node. Its methods run in the association's threads."""

    def __init__(self, assoc: Any, spool: Spool, *, limit_bytes: int) -> None:
        super().__init__(assoc)
        self._spool = spool
        self._limit_bytes = limit_bytes

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Take a P-DATA primitive apart, so that a file is there before the first byte of a data set."""
        try:
            for value in primitive.presentation_data_value_list:
                single = P_DATA()
                single.presentation_data_value_list.append(value)
                super().receive_primitive(single)
                self._guard_message(value[0])
        except Exception as error:  # noqa: BLE001 - any exception here would end pynetdicom's thread
            _log.warning("receive.message_not_understood", error_type=type(error).__name__)
            self.discard()
            self.dul.event_queue.put("Evt19")  # invalid PDU: pynetdicom answers with A-ABORT

    def _guard_message(self, context_id: int) -> None:
        message: Any = self.message
        if message is None:
            return
        if isinstance(message, C_STORE_RQ):
            if message._data_set_file is None:
                message._data_set_file = self._open(message.command_set, context_id)
        elif message.encoded_command_set.tell() + message.data_set.tell() > _MAXIMUM_COMMAND_BYTES:
            raise ValueError("a message without an object, and without an end")

    def _open(self, command: Any, context_id: int) -> IncomingFile:
        if any(keyword not in command for keyword in _MANDATORY):
            raise ValueError("a C-STORE-RQ without a mandatory parameter; pynetdicom would never answer it")
        (transfer_syntax_uid,) = self.assoc._accepted_cx[context_id].transfer_syntax
        return IncomingFile.open(
            self._spool,
            limit_bytes=self._limit_bytes,
            sop_class_uid=str(command.get("AffectedSOPClassUID", "")),
            sop_instance_uid=str(command.get("AffectedSOPInstanceUID", "")),
            transfer_syntax_uid=str(transfer_syntax_uid),
        )

    def discard(self) -> None:
        """Remove the file of an object that will not come to its end."""
        incoming = getattr(self.message, "_data_set_file", None)
        self.message: Any = None
        if isinstance(incoming, IncomingFile):
            incoming.discard()

    def discard_unserved(self) -> None:
        """Remove the files of whole objects of an association that ended before they were served."""
        while True:
            try:
                _, primitive = self.msg_queue.get(block=False)
            except queue.Empty:
                return
            incoming = getattr(primitive, "_dataset_file", None)
            if isinstance(incoming, IncomingFile):
                incoming.discard()


def arm_connection(association_socket: Any, timeout_s: float) -> None:
    """Make the connection of an association fit for peers that stall, lie, or send in small pieces.

    pynetdicom leaves it without a time-out, so that a peer that stops in the middle of a PDU holds a thread
    for ever; it believes a PDU's length field, which may claim 4 GiB of memory; it reads and writes in a
    way in which Nagle's algorithm and delayed acknowledgements cost 40 ms an object; and it leaves a socket
    open that it fails to shut down, because the peer has gone first.
    """
    connection: socket.socket = association_socket.socket
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    source = association_socket if isinstance(association_socket, SecureAssociationSocket) else connection
    association_socket.recv = partial(_receive, connection, source)
    association_socket._shutdown_socket = partial(_shut_down, connection)


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def close_connection(event: Any) -> None:
    """Close the socket of a connection that has ended, as a handler of EVT_CONN_CLOSE.

    Where the peer has gone first, pynetdicom fails to shut the socket down and leaves it open.
    """
    connection = event.assoc.dul.socket.socket
    if connection is not None:
        connection.close()


def _receive(
    connection: socket.socket, source: socket.socket | SecureAssociationSocket, count: int
) -> bytearray:
    """Up to ``count`` bytes, fewer only at the end of the stream; an OSError closes the connection."""
    if count > _MAXIMUM_PDU_READ_BYTES:
        raise ConnectionAbortedError(f"the peer announced a PDU of {count} bytes")
    data = bytearray(count)
    done = 0
    with memoryview(data) as view:
        while done < count and (read := source.recv_into(view[done:])):
            done += read
    if _QUICK_ACKNOWLEDGEMENT is not None:  # Linux forgets it, so it is set every time
        connection.setsockopt(socket.IPPROTO_TCP, _QUICK_ACKNOWLEDGEMENT, 1)
    del data[done:]
    return data
