"""The storage SCP: what it answers with 0x0000 is on the disk and in the records.

Who is let in is decided in :mod:`service.dicom.doorkeeper`, what becomes of an object in
:mod:`service.dicom.object_store`.
"""

from __future__ import annotations

from typing import Any

from pynetdicom import AE, _config, evt
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation

from service.commitment import ReportDesk
from service.dicom.commitment import answer_report
from service.dicom.contexts import STORAGE_SERVICE_CLASS, is_storage_class, verification_context
from service.dicom.doorkeeper import Doorkeeper
from service.dicom.incoming import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    MAXIMUM_PDU_BYTES,
    ReceivingDimse,
    arm_connection,
    close_connection,
)
from service.dicom.object_store import ObjectStore
from service.logs import get_logger
from service.records.database import Records
from service.settings import Settings
from service.spool import Spool
from service.tls import ReloadingContext

_OTHERS_ARE_DONE_AFTER_S = 3600.0
_STOP_TIMEOUT_S = 30.0

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
        self._door = Doorkeeper(settings.dicom, records, spool)
        self._objects = ObjectStore(records, spool)
        self._reports = ReportDesk(records, settings.commitment)
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
        removed = self._spool.clear_orphans(older_than_s=spare_s) + self._objects.clear_unrecorded(spare_s)
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
                (evt.EVT_REQUESTED, self._door.on_request),
                (evt.EVT_SOP_COMMON, _name_storage_classes),
                (evt.EVT_C_ECHO, _on_echo),
                (evt.EVT_C_STORE, self._objects.on_store),
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

    def _on_connection(self, event: Any) -> None:
        """Arm a new connection before its threads start: time-outs, bounds, and files of the spool."""
        association = event.assoc
        if self._settings.tls is not None:
            self._door.shake_hands(association)
        arm_connection(association.dul.socket, self._settings.network_timeout_s)
        association.dimse = ReceivingDimse(
            association, self._spool, limit_bytes=self._settings.maximum_object_bytes
        )

    def _on_event_report(self, event: Any) -> tuple[int, None]:
        """Take a destination's report on what it keeps; runs in the association's thread."""
        return answer_report(event, self._reports.take), None


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
