"""What becomes of an object that a peer sends: a file and a row, both durable before the answer, or nothing.

The order of one C-STORE: the file's bytes are forced to the disk, its name is, its row is committed, and only
then is the response sent. Whatever goes wrong before that gets a failure status and leaves nothing behind.
"""

from __future__ import annotations

from typing import Any

from pydicom.dataset import Dataset
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from service.dicom.element_scan import UnreadableDataSetError
from service.dicom.incoming import IncomingFile, StoreRefusedError
from service.dicom.received_header import ReceivedHeader, is_uid, read_received_header
from service.dicom.throttle import Throttle
from service.logs import get_logger
from service.records.database import Records, utc_now
from service.records.events import record_event
from service.records.instances import Arrival, ReceivedInstance, Recorded, record_instance
from service.records.tables import Delivery, DeliveryState, Instance, new_identifier
from service.spool import Spool, is_older

_RECORD_TRIES = 3
_ERROR_COMMENT_CHARACTERS = 64  # VR LO

_log = get_logger(__name__)


class ObjectStore:
    """Takes objects into the spool and the records, and records which it has refused."""

    def __init__(self, records: Records, spool: Spool) -> None:
        self._records = records
        self._spool = spool
        self._throttle = Throttle()

    def on_store(self, event: Any) -> Dataset:
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

    def clear_unrecorded(self, older_than_s: float) -> int:
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
