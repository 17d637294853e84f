"""Who is let in at the DICOM listener: the handshake of TLS, then the request for an association."""

from __future__ import annotations

import threading
from ssl import SSLSocket
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

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
from service.dicom.commitment import commitment_contexts
from service.dicom.contexts import acceptable_contexts
from service.dicom.secure_connection import secure, shut_out
from service.dicom.throttle import Throttle
from service.logs import get_logger
from service.records.database import Records, utc_now
from service.records.events import record_event
from service.settings import DicomSettings
from service.spool import Spool
from service.tls import PeerCertificate

_HANDSHAKE_TIMEOUT_S = 10.0
_UNKNOWN_PEER = (CALLING_AE_TITLE_UNKNOWN, ADDRESS_UNKNOWN, CERTIFICATE_UNKNOWN)

_log = get_logger(__name__)


class Doorkeeper:
    """Lets peers in or turns them away, and records whom it has turned away."""

    def __init__(self, settings: DicomSettings, records: Records, spool: Spool) -> None:
        self._settings = settings
        self._records = records
        self._admission = Admission(settings, spool)
        self._throttle = Throttle()
        # Connections that have not shaken hands yet are no associations, and need a bound of their own.
        self._handshakes = threading.BoundedSemaphore(settings.maximum_associations)

    def shake_hands(self, association: Any) -> None:
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

    def on_request(self, event: Any) -> None:
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
