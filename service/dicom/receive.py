"""The storage SCP: what it answers with 0x0000 is on the disk and in the records.

The order of one C-STORE: the file's bytes are forced to the disk, its name is, its row is committed, and only
then is the response sent. Whatever goes wrong before that gets a failure status and leaves nothing behind.
"""

from __future__ import annotations

import threading
from ssl import SSLSocket
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, _config, evt
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from service.commitment import ReportDesk
from service.dicom.admission import (
    ADDRESS_UNKNOWN,
    CALLING_AE_TITLE_UNKNOWN,
    CERTIFICATE_UNKNOWN,
    NOT_NOW,
    STORAGE_FULL,
    Admission,
    Rejection,
    is_loopback,
)
from service.dicom.commitment import answer_report, commitment_contexts
from service.dicom.contexts import (
    STORAGE_SERVICE_CLASS,
    acceptable_contexts,
    is_storage_class,
    verification_context,
)
from service.dicom.element_scan import UnreadableDataSetError
from service.dicom.incoming import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    MAXIMUM_PDU_BYTES,
    IncomingFile,
    ReceivingDimse,
    StoreRefusedError,
    arm_connection,
    close_connection,
)
from service.dicom.received_header import ReceivedHeader, is_uid, read_received_header
from service.dicom.secure_connection import secure, shut_out
from service.dicom.throttle import Throttle
from service.logs import get_logger
from service.records.database import Records, utc_now
from service.records.events import record_event
from service.records.instances import Arrival, ReceivedInstance, Recorded, record_instance
from service.records.tables import Delivery, DeliveryState, Instance, new_identifier
from service.settings import Settings
from service.spool import Spool, is_older
from service.tls import PeerCertificate, ReloadingContext

_OTHERS_ARE_DONE_AFTER_S = 3600.0
_STOP_TIMEOUT_S = 30.0
_RECORD_TRIES = 3
_HANDSHAKE_TIMEOUT_S = 10.0
_UNKNOWN_PEER = (CALLING_AE_TITLE_UNKNOWN, ADDRESS_UNKNOWN, CERTIFICATE_UNKNOWN)
_ERROR_COMMENT_CHARACTERS = 64  # VR LO

_log = get_logger(__name__)


class Receiver:
    """The node's DICOM listener. There is at most one on a spool.

    Parameters
    ----------
    settings : Settings
        The ``dicom`` section says where to listen and whom to let in.
    records : Records
        Gets a row for every object that is kept, and an event for every one that is refused.
    spool : Spool
        Gets the files.
    """

    def __init__(self, settings: Settings, records: Records, spool: Spool) -> None:
        self._settings = settings.dicom
        self._records = records
        self._spool = spool
        self._admission = Admission(settings.dicom, spool)
        self._throttle = Throttle()
        self._reports = ReportDesk(records, settings.commitment)
        # Connections that have not shaken hands yet are no associations, and need a bound of their own.
        self._handshakes = threading.BoundedSemaphore(settings.dicom.maximum_associations)
        self._server: Any = None

    @property
    def port(self) -> int:
        """The TCP port that is listened on; of use where the settings say 0."""
        assert self._server is not None, "the receiver is not started"
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Clear what a receiver that died has left, and listen; returns at once."""
        # Records on a server may be those of several receivers, which are at work already.
        spare_s = 0.0 if self._records.is_sqlite else _OTHERS_ARE_DONE_AFTER_S
        removed = self._spool.clear_orphans(older_than_s=spare_s) + self._clear_unrecorded(spare_s)
        _config.LOG_HANDLER_LEVEL = "none"  # pynetdicom's own handlers log what they are sent
        entity = AE(ae_title=self._settings.ae_title)
        entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.maximum_associations = self._settings.maximum_associations
        entity.maximum_pdu_size = MAXIMUM_PDU_BYTES
        entity.network_timeout = self._settings.network_timeout_s
        entity.acse_timeout = min(30.0, self._settings.network_timeout_s)
        entity.dimse_timeout = self._settings.dimse_timeout_s
        # If admission ever failed, an association could do no more than C-ECHO.
        entity.supported_contexts = [verification_context()]
        tls = self._settings.tls
        self._server = entity.start_server(
            (self._settings.host, self._settings.port),
            block=False,
            ssl_context=ReloadingContext(tls.certificate, tls.key, tls.clients_signed_by) if tls else None,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, self._on_connection),
                (evt.EVT_REQUESTED, self._on_request),
                (evt.EVT_SOP_COMMON, _name_storage_classes),
                (evt.EVT_C_ECHO, _on_echo),
                (evt.EVT_C_STORE, self._on_store),
                (evt.EVT_N_EVENT_REPORT, self._on_event_report),
                (evt.EVT_CONN_CLOSE, close_connection),
                (evt.EVT_CONN_CLOSE, _on_connection_closed),
            ],
        )
        _log.info("receive.listening", host=self._settings.host, port=self.port, files_cleared=removed)

    def stop(self) -> None:
        """Stop listening and end every association; an object that is being stored is finished first."""
        if self._server is None:
            return
        self._server.shutdown()
        associations = self._server.active_associations
        for association in associations:
            association.abort()
        for association in associations:
            association.join(_STOP_TIMEOUT_S)
        self._server = None
        _log.info("receive.stopped")

    # --- Associations

    def _on_connection(self, event: Any) -> None:
        """Arm a new connection before its threads start: time-outs, bounds, and files of the spool."""
        association = event.assoc
        if self._settings.tls is not None:
            self._secure(association)
        arm_connection(association.dul.socket, self._settings.network_timeout_s)
        association.dimse = ReceivingDimse(
            association, self._spool, limit_bytes=self._settings.maximum_object_bytes
        )

    def _secure(self, association: Any) -> None:
        """Shake hands; a peer that cannot is shut out before it can ask for an association."""
        if self._handshakes.acquire(blocking=False):
            try:
                failure = secure(association, min(_HANDSHAKE_TIMEOUT_S, self._settings.network_timeout_s))
            finally:
                self._handshakes.release()
        else:
            failure = shut_out(association, "too many handshakes at once")
        if failure is None:
            return
        address = association.requestor.address
        _log.warning("receive.tls_failed", reason=failure, peer_address=address)
        if not self._throttle.passes((failure, address)):
            return
        try:
            with self._records.write() as session:
                record_event(
                    session,
                    "association_rejected",
                    actor="",  # nobody has said a name yet
                    at=utc_now(),
                    alert=not is_loopback(address),  # the health check's certificate may not do
                    outcome="refused",
                    origin=address,
                    detail={"reason": "tls-failed", "tls": failure, "peer_address": address},
                )
        except SQLAlchemyError as error:
            _log.error("receive.rejection_not_recorded", error_type=type(error).__name__)

    def _on_request(self, event: Any) -> None:
        """Let the peer in or turn it away, before pynetdicom negotiates."""
        association = event.assoc
        request = association.requestor.primitive
        connection = association.dul.socket.socket
        try:
            rejection = self._admission.judge(
                calling_ae_title=request.calling_ae_title,
                called_ae_title=request.called_ae_title,
                address=association.requestor.address,
                certificate=PeerCertificate.of(connection) if isinstance(connection, SSLSocket) else None,
            )
            if rejection is None:
                proposed = request.presentation_context_definition_list
                reports = commitment_contexts(association.requestor.role_selection)
                association.acceptor.supported_contexts = [*acceptable_contexts(proposed), *reports]
                return
            self._record_rejection(rejection, request.calling_ae_title, association.requestor.address)
        except Exception:  # noqa: BLE001 - pynetdicom swallows what a handler raises, and would let the peer in
            _log.exception("receive.admission_failed")
            rejection = NOT_NOW
        association.acse.send_reject(rejection.result, rejection.source, rejection.reason)
        association.kill()

    def _record_rejection(self, rejection: Rejection, calling_ae_title: str, address: str) -> None:
        _log.warning(
            "receive.association_rejected",
            reason=rejection.word,
            calling_ae_title=calling_ae_title,
            peer_address=address,
        )
        if rejection is STORAGE_FULL or self._is_health_check(calling_ae_title, address):
            return  # on a full disk a row would only take more of it
        if not self._throttle.passes((rejection, calling_ae_title, address)):
            return
        with self._records.write() as session:
            record_event(
                session,
                "association_rejected",
                actor=calling_ae_title.strip(),
                at=utc_now(),
                alert=rejection in _UNKNOWN_PEER,
                outcome="refused",
                origin=address,
                detail={"reason": rejection.word, "peer_address": address},
            )

    def _is_health_check(self, calling_ae_title: str, address: str) -> bool:
        """True if this node itself asks whether it listens: see :func:`service.liveness.check_receive`."""
        return calling_ae_title.strip() == self._settings.ae_title and is_loopback(address)

    # --- Objects

    def _on_event_report(self, event: Any) -> tuple[int, None]:
        """Take a destination's report on what it keeps; runs in the association's thread."""
        return answer_report(event, self._reports.take), None

    def _on_store(self, event: Any) -> Dataset:
        """Answer a C-STORE; runs in the association's thread."""
        incoming = event.request._dataset_file
        if not isinstance(incoming, IncomingFile):
            return _response(StoreRefusedError.CANNOT_UNDERSTAND, "The C-STORE has no data set.")
        try:
            self._store(event, incoming)
        except StoreRefusedError as refusal:
            self._record_refusal(event, refusal)
            return _response(refusal.status, refusal.message)
        except (OSError, SQLAlchemyError) as error:
            _log.error("receive.not_stored", error_type=type(error).__name__, exc_info=True)
            return _response(StoreRefusedError.OUT_OF_RESOURCES, "The object cannot be stored now.")
        finally:
            incoming.discard()
        return _response(0x0000)

    def _store(self, event: Any, incoming: IncomingFile) -> None:
        incoming.finish()
        transfer_syntax_uid = str(event.context.transfer_syntax)
        header = _read_header(incoming, transfer_syntax_uid)
        for name, commanded, found in (
            ("SOP Class", event.request.AffectedSOPClassUID, header.sop_class_uid),
            ("SOP Instance", event.request.AffectedSOPInstanceUID, header.sop_instance_uid),
        ):
            if commanded != found:
                raise StoreRefusedError(
                    StoreRefusedError.DATA_SET_DOES_NOT_MATCH,
                    f"The {name} UID of the command is not that of the data set.",
                )
        instance_id = new_identifier()
        path = self._spool.instance_path(instance_id)
        received = ReceivedInstance(
            instance_id=instance_id,
            study_instance_uid=header.study_instance_uid,
            series_instance_uid=header.series_instance_uid,
            sop_instance_uid=header.sop_instance_uid,
            sop_class_uid=header.sop_class_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            kind=header.kind,
            modality=header.modality,
            patient_id=header.patient_id,
            identity_digest=header.identity_digest,
            path=self._spool.relative(path),
            size_bytes=incoming.size_bytes,
            sha256=incoming.sha256,
            calling_ae_title=event.assoc.requestor.ae_title,
            called_ae_title=event.assoc.acceptor.ae_title,
            peer_address=event.assoc.requestor.address,
            received_at=self._records.now(),
        )
        self._spool.adopt(incoming.path, path)
        try:
            recorded = self._record(received)
        except SQLAlchemyError:
            if self._is_certainly_unrecorded(instance_id):
                path.unlink()
            raise
        if recorded.arrival is Arrival.REPEATED:
            path.unlink()
        _log.debug("receive.stored", instance_id=recorded.instance_id, arrival=recorded.arrival.value)

    def _record(self, received: ReceivedInstance) -> Recorded:
        """Commit the row, and the alert of a correction with it."""
        for tries_left in reversed(range(_RECORD_TRIES)):
            try:
                with self._records.write() as session:
                    recorded = record_instance(session, received)
                    if recorded.arrival is Arrival.CORRECTION:
                        _record_correction(session, received, recorded)
                    return recorded
            except IntegrityError:
                # Where writers run side by side (PostgreSQL), another association has just recorded the
                # same object, or opened the same series; by now this one sees it.
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    def _is_certainly_unrecorded(self, instance_id: str) -> bool:
        """After a failed commit: may the file go? A commit whose answer was lost may have happened."""
        try:
            with self._records.read() as session:
                return session.get(Instance, instance_id) is None
        except SQLAlchemyError:
            return False  # the next start looks again

    def _record_refusal(self, event: Any, refusal: StoreRefusedError) -> None:
        actor = event.assoc.requestor.ae_title
        _log.warning("receive.refused", status=f"0x{refusal.status:04X}", reason=refusal.message)
        if refusal.transient:
            return  # the peer sends it again; where the disk is full, rows would fill it further
        named = str(event.request.AffectedSOPInstanceUID)
        if not self._throttle.passes((actor, refusal.message, named)):
            return
        try:
            with self._records.write() as session:
                record_event(
                    session,
                    "instance_refused",
                    actor=actor,
                    at=utc_now(),
                    alert=True,
                    outcome="refused",
                    origin=event.assoc.requestor.address,
                    detail={
                        "status": f"0x{refusal.status:04X}",
                        "reason": refusal.message,
                        "sop_instance_uid": named if is_uid(named) else None,
                    },
                )
        except SQLAlchemyError as error:
            _log.error("receive.refusal_not_recorded", error_type=type(error).__name__)

    def _clear_unrecorded(self, older_than_s: float) -> int:
        """Remove files that were named but never recorded: the receiver died between the two."""
        removed = 0
        for folder in self._spool.instances_dir.iterdir():
            files = {path.stem: path for path in folder.iterdir()}
            with self._records.read() as session:
                first, last = folder.name, folder.name + "g"  # beyond every hexadecimal letter
                recorded = session.scalars(
                    select(Instance.instance_id).where(Instance.instance_id.between(first, last))
                )
                unrecorded = files.keys() - set(recorded)
            for path in [files[name] for name in unrecorded if is_older(files[name], older_than_s)]:
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def _record_correction(session: Any, received: ReceivedInstance, recorded: Recorded) -> None:
    """Raise an alert that names what of the old revision has left: it cannot be called back."""
    delivered = session.execute(
        select(Delivery.delivery_id, Delivery.destination)
        .where(
            Delivery.job_id.in_(recorded.cancelled_job_ids),
            Delivery.state.in_((DeliveryState.SENT, DeliveryState.COMMITTED)),
        )
        .order_by(Delivery.sent_at)
    ).all()
    record_event(
        session,
        "instance_corrected",
        actor=received.calling_ae_title or "",
        at=received.received_at,
        subject=recorded.instance_id,
        alert=True,
        detail={
            "jobs": list(recorded.cancelled_job_ids),
            "delivered": [{"delivery_id": d, "destination": to} for d, to in delivered],
        },
    )


def _read_header(incoming: IncomingFile, transfer_syntax_uid: str) -> ReceivedHeader:
    try:
        with incoming.path.open("rb") as stream:
            stream.seek(incoming.data_set_offset)
            return read_received_header(stream, transfer_syntax_uid)
    except UnreadableDataSetError as error:
        raise StoreRefusedError(
            StoreRefusedError.CANNOT_UNDERSTAND, error.message, remedy=error.remedy
        ) from error


def _response(status: int, comment: str = "") -> Dataset:
    response = Dataset()
    response.Status = status
    if comment:
        response.ErrorComment = comment[:_ERROR_COMMENT_CHARACTERS]
    return response


def _on_echo(_event: Any) -> int:
    return 0x0000


def _name_storage_classes(event: Any) -> dict[str, SOPClassCommonExtendedNegotiation]:
    """Tell pynetdicom that the storage classes it has never heard of are storage classes.

    A negotiation item says which service a private SOP class belongs to (PS3.7 section D.3.3.6); most
    peers send none, so the node makes it up for each class that it accepts.
    """
    named = {}
    for context in event.assoc.requestor.primitive.presentation_context_definition_list:
        if is_storage_class(str(context.abstract_syntax)):
            item = SOPClassCommonExtendedNegotiation()
            item.sop_class_uid = context.abstract_syntax
            item.service_class_uid = STORAGE_SERVICE_CLASS
            named[context.abstract_syntax] = item
    return named


def _on_connection_closed(event: Any) -> None:
    association = event.assoc
    if association.requestor.primitive is None:
        # pynetdicom would wait on for an A-ASSOCIATE-RQ: every probe of the port would hold one of the
        # associations that are allowed.
        association.dul.to_user_queue.put(None)
    if isinstance(association.dimse, ReceivingDimse):
        association.dimse.discard()
        association.dimse.discard_unserved()
