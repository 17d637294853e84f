"""The storage SCU: send a file as it lies on the disk, and say what is to be done next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from ssl import SSLSocket
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pynetdicom import AE, _config, evt
from pynetdicom.presentation import PresentationContext, build_context

from service.dicom.contexts import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    verification_context,
)
from service.dicom.incoming import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    MAXIMUM_PDU_BYTES,
    arm_connection,
    close_connection,
)
from service.dicom.secure_connection import SecureAssociationSocket, secure
from service.settings import Destination
from service.tls import DeferredContext, TlsError, client_context

# A file in one of these can be rewritten in another without touching a sample.
_CONVERTIBLE = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
_OFFERED = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN)

_MAXIMUM_CONTEXTS = 128  # odd numbers of one byte (PS3.8 section 9.3.2.2)
_SLOWEST_BYTES_PER_S = 256 * 1024

_DELIVERED = (0x0000, 0x0111)  # success; the peer has this very instance already
_PARKED = (0x0122, 0x0124)  # SOP class not supported; not authorised
_WARNINGS = (0x0001, 0x0107, 0x0116)  # PS3.7 annex C; the storage service's own are 0xBxxx


class OutcomeKind(StrEnum):
    """What to do next."""

    DELIVERED = "delivered"
    WARNING = "warning"  # delivered, with a remark worth recording
    RETRY = "retry"  # time-out, abort, no connection, out of resources
    RETRY_FAILURE_STATUS = "retry_failure_status"  # the peer failed on this object: not for ever
    PARK = "park"  # the same object would be refused again


@dataclass(frozen=True)
class SendOutcome:
    """What became of one object. ``status`` is the DIMSE status, None where the peer gave none."""

    kind: OutcomeKind
    status: int | None = None
    error: str | None = None


def judge_status(status: int) -> SendOutcome:
    """What a C-STORE status means for a delivery; see PS3.4 table B.2-1 and PS3.7 annex C.

    A failure that no table explains is tried again like 0xCxxx: neither lost nor repeated for ever. The
    peer's Error Comment is left out: it is free text, and may name the patient.
    """
    error: str | None = f"The peer answered 0x{status:04X}."
    group = status >> 8
    if status in _DELIVERED:
        kind, error = OutcomeKind.DELIVERED, None if status == 0 else error
    elif status in _WARNINGS or status >> 12 == 0xB:
        kind = OutcomeKind.WARNING
    elif status in _PARKED or group == 0xA9:
        kind = OutcomeKind.PARK
    elif group == 0xA7 or status == 0x0213:  # out of resources; resource limitation
        kind = OutcomeKind.RETRY
    else:
        kind = OutcomeKind.RETRY_FAILURE_STATUS
    return SendOutcome(kind, status, error)


def send_file(path: Path, destination: Destination, *, calling_ae_title: str) -> SendOutcome:
    """Send one DICOM file over an association of its own.

    The bytes of the data set are sent as they are wherever the peer takes the file's transfer syntax. A
    file without compression is rewritten in explicit or implicit VR little endian for a peer that wants it.
    Never raises for what the peer or the network does.
    """
    ((_, outcome),) = send_files([path], destination, calling_ae_title=calling_ae_title)
    return outcome


def send_files(
    paths: Sequence[Path], destination: Destination, *, calling_ae_title: str
) -> Iterator[tuple[Path, SendOutcome]]:
    """Send DICOM files in the given order, over as few associations as it takes; one outcome for each."""
    batch: list[_File] = []
    contexts: set[tuple[str, str]] = set()
    for path in paths:
        file = _describe(path)
        if isinstance(file, SendOutcome):
            yield path, file
            continue
        if len(contexts | file.contexts) > _MAXIMUM_CONTEXTS:
            yield from _send_batch(batch, destination, calling_ae_title)
            batch, contexts = [], set()
        batch.append(file)
        contexts |= file.contexts
    yield from _send_batch(batch, destination, calling_ae_title)


def echo(destination: Destination, *, calling_ae_title: str) -> SendOutcome:
    """Ask the peer with C-ECHO whether it is there; the outcome is DELIVERED if it is."""
    with OutgoingAssociation(destination, calling_ae_title, [verification_context()]) as association:
        if association.failure is not None:
            return association.failure
        return association.echo()


@dataclass(frozen=True)
class _File:
    path: Path
    sop_class_uid: str
    transfer_syntax_uid: str

    @property
    def contexts(self) -> frozenset[tuple[str, str]]:
        """(SOP class, transfer syntax) to propose: its own, and what it can be rewritten in."""
        syntaxes = {self.transfer_syntax_uid}
        if self.transfer_syntax_uid in _CONVERTIBLE:
            syntaxes.update(_OFFERED)
        return frozenset((self.sop_class_uid, syntax) for syntax in syntaxes)


def _describe(path: Path) -> _File | SendOutcome:
    try:
        meta = read_file_meta_info(path)
        return _File(path, str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID))
    except FileNotFoundError:
        return SendOutcome(OutcomeKind.PARK, error="The file is not there.")
    except (InvalidDicomError, AttributeError, ValueError, EOFError):
        return SendOutcome(OutcomeKind.PARK, error="The file is not a DICOM file with File Meta Information.")
    except OSError as error:
        return SendOutcome(OutcomeKind.RETRY, error=f"The file cannot be read: {error.strerror}.")


def _send_batch(
    files: Sequence[_File], destination: Destination, calling_ae_title: str
) -> Iterator[tuple[Path, SendOutcome]]:
    proposed = sorted(set().union(*(file.contexts for file in files)))
    contexts = [build_context(sop_class, syntax) for sop_class, syntax in proposed]
    waiting = list(files)
    while waiting:  # a new association after one that was lost, with what is left
        with OutgoingAssociation(destination, calling_ae_title, contexts) as association:
            if association.failure is not None:
                yield from ((file.path, association.failure) for file in waiting)
                return
            while waiting:
                file = waiting.pop(0)
                yield file.path, association.store(file)
                if not association.alive:
                    break


class OutgoingAssociation:
    """One association as requestor. ``failure`` says why it was not established."""

    def __init__(
        self,
        destination: Destination,
        calling_ae_title: str,
        contexts: list[PresentationContext],
        *,
        on_event_report: Callable[[Any], Any] | None = None,
    ) -> None:
        self.failure: SendOutcome | None = None
        self._timeout_s = destination.timeout_s
        self._silent = False
        self._tls_failure: str | None = None
        self._association: Any = None
        tls = destination.tls
        try:
            context = None if tls is None else client_context(tls.trusted, tls.certificate, tls.key)
        except TlsError as error:
            self.failure = SendOutcome(OutcomeKind.RETRY, error=error.message)
            return
        _config.LOG_HANDLER_LEVEL = "none"  # pynetdicom's own handlers log what is sent
        _config.STORE_SEND_CHUNKED_DATASET = True  # a path is sent byte by byte, not decoded and encoded
        entity = AE(ae_title=destination.calling_ae_title or calling_ae_title)
        entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.connection_timeout = self._timeout_s
        entity.acse_timeout = self._timeout_s
        entity.dimse_timeout = self._timeout_s
        entity.network_timeout = self._timeout_s
        where = f"{destination.ae_title}@{destination.host}:{destination.port}"
        try:
            self._association = entity.associate(
                destination.host,
                destination.port,
                contexts=contexts,
                ae_title=destination.ae_title,
                max_pdu=MAXIMUM_PDU_BYTES,
                tls_args=(DeferredContext(context), tls.server_name or destination.host)
                if tls is not None and context is not None
                else None,
                evt_handlers=[
                    (evt.EVT_CONN_OPEN, self._on_connection),
                    (evt.EVT_CONN_CLOSE, close_connection),
                    *([(evt.EVT_N_EVENT_REPORT, on_event_report)] if on_event_report is not None else []),
                ],
            )
        except OSError as error:  # the host name is not known
            self.failure = SendOutcome(OutcomeKind.RETRY, error=f"{where}: {error.strerror or 'no address'}.")
            return
        if not self._association.is_established:
            self.failure = self._why_not(where)

    def __enter__(self) -> OutgoingAssociation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._silent and self._association is not None:
            self._association.abort()
        elif self.alive:
            self._association.release()

    @property
    def alive(self) -> bool:
        """True while another object can be sent: pynetdicom notices an abort of the peer late."""
        established = self._association is not None and self._association.is_established
        return established and not self._silent

    def _on_connection(self, event: Any) -> None:
        if isinstance(event.assoc.dul.socket.socket, SSLSocket):
            self._tls_failure = secure(event.assoc, self._timeout_s)
        arm_connection(event.assoc.dul.socket, self._timeout_s)

    def _why_not(self, where: str) -> SendOutcome:
        answer = self._association.acceptor.primitive
        if self._tls_failure is None and isinstance(self._association.dul.socket, SecureAssociationSocket):
            self._tls_failure = self._association.dul.socket.failure  # a server's verdict on our certificate
        if answer is None and self._tls_failure is not None:
            return SendOutcome(OutcomeKind.RETRY, error=f"{where}: TLS failed: {self._tls_failure}.")
        if answer is None:
            return SendOutcome(OutcomeKind.RETRY, error=f"{where}: no connection, or no answer.")
        if answer.result == 0x00:
            return SendOutcome(OutcomeKind.PARK, error=f"{where} accepts no presentation context for this.")
        return SendOutcome(
            OutcomeKind.RETRY,
            error=f"{where} rejects the association: {answer.result_str}, {answer.reason_str}.",
        )

    def echo(self) -> SendOutcome:
        response = self._association.send_c_echo()
        if "Status" not in response:
            return self._silence()
        return judge_status(response.Status)

    def act(
        self, dataset: Dataset, *, action_type: int, sop_class_uid: str, sop_instance_uid: str
    ) -> SendOutcome:
        """An N-ACTION; only success is DELIVERED, and nothing is parked: it can be asked for again."""
        try:
            response, _ = self._association.send_n_action(
                dataset, action_type, sop_class_uid, sop_instance_uid
            )
        except RuntimeError:  # the association ended before the request
            return self._silence()
        except ValueError:
            return SendOutcome(OutcomeKind.PARK, error="The peer accepts no presentation context for this.")
        if "Status" not in response:
            return self._silence()
        if response.Status == 0x0000:
            return SendOutcome(OutcomeKind.DELIVERED, 0x0000)
        return SendOutcome(
            OutcomeKind.RETRY_FAILURE_STATUS,
            response.Status,
            f"The peer answered 0x{response.Status:04X}.",
        )

    def store(self, file: _File) -> SendOutcome:
        accepted = {
            str(context.transfer_syntax[0])
            for context in self._association.accepted_contexts
            if context.abstract_syntax == file.sop_class_uid
        }
        what: Any = file.path
        try:
            if file.transfer_syntax_uid not in accepted:
                if file.transfer_syntax_uid not in _CONVERTIBLE or not accepted.intersection(_OFFERED):
                    return SendOutcome(
                        OutcomeKind.PARK, error="The peer accepts no presentation context for this object."
                    )
                what = dcmread(file.path)
            # The wait begins when the first byte goes out, so a large object needs a longer one.
            size_bytes = file.path.stat().st_size
            self._association.dimse_timeout = self._timeout_s + size_bytes / _SLOWEST_BYTES_PER_S
            response = self._association.send_c_store(what)
        except RuntimeError:  # the association ended before the request
            return self._silence()
        except OSError as error:
            return SendOutcome(OutcomeKind.RETRY, error=f"The file cannot be read: {error.strerror}.")
        except (ValueError, TypeError, AttributeError, KeyError):
            return SendOutcome(OutcomeKind.PARK, error="The object cannot be encoded as the peer wants it.")
        if "Status" not in response:
            return self._silence()
        return judge_status(response.Status)

    def _silence(self) -> SendOutcome:
        self._silent = True
        return SendOutcome(
            OutcomeKind.RETRY, error="The peer gave no answer: a time-out, an abort, or a lost connection."
        )
