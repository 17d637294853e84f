"""Makes the refusal objects of refused jobs whose route asks for them.

Patient and study are read from every image that can be read, and have to be whole and one; otherwise nothing
leaves, and the refusal stands in the records alone, with an alert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from models.errors import SegnodeError
from service.dicom.derived import Making, write_object
from service.dicom.identifiers import derived_uid
from service.dicom.refusal import RefusedImages, build_refusal
from service.dicom.report_proof import prove_refusal
from service.errors import ProofError, StorageFullError
from service.logs import get_logger
from service.records.database import Records
from service.records.events import record_event
from service.records.refusals import WantedRefusal, refusal_made, refusal_withheld, wanted_refusals
from service.records.tables import ResultKind
from service.records.work import NewResult
from service.spool import Spool

_ACTOR = "refusals"

log = get_logger(__name__)


class RefusalObjects:
    """Turns refusals in the records into objects for the destinations.

    Parameters
    ----------
    records, spool
        The node's.
    profile_keys : mapping of str to str
        The key of every destination's profile, by the destination's name.
    """

    def __init__(self, records: Records, spool: Spool, profile_keys: Mapping[str, str]) -> None:
        self._records = records
        self._spool = spool
        self._profile_keys = profile_keys

    def sweep(self, now: datetime) -> int:
        """Make what is wanted while the disk has room; return how many objects were made."""
        try:
            self._spool.check_reserve()
        except StorageFullError:
            return 0  # the worker has alerted
        with self._records.read() as session:
            wanted = wanted_refusals(session)
        return sum(self._settle(refusal, now) for refusal in wanted)

    def _settle(self, refusal: WantedRefusal, now: datetime) -> bool:
        """Make one object and queue it, or record why nothing leaves. True if one was made."""
        try:
            new = self._make(refusal)
        except SegnodeError as error:
            self._withhold(refusal, error, now)
            return False
        except OSError as error:  # the disk's fault: tried again at the next sweep
            log.error("refusal.waits", job_id=refusal.job_id, error=error.strerror)
            return False
        except Exception as error:  # one that cannot be made must not keep the others waiting
            log.exception("refusal.not_made", job_id=refusal.job_id)
            self._withhold(
                refusal, SegnodeError(f"The object could not be made ({type(error).__name__})."), now
            )
            return False
        with self._records.write(alone=True) as session:
            if not refusal_made(session, refusal, new, self._profile_keys, at=now):
                return False
            detail = {"code": refusal.code, "sop_instance_uid": new.sop_instance_uid}
            record_event(
                session, "refusal.object_made", actor=_ACTOR, at=now, subject=refusal.job_id, detail=detail
            )
        return True

    def _make(self, refusal: WantedRefusal) -> NewResult:
        """Write and prove the object. Raises Refusal where it may not leave, and ProofError."""
        if not refusal.one_identity:
            raise ProofError("The images are not of one patient and study, or were corrected meanwhile.")
        images = RefusedImages([self._spool.absolute(path) for path in refusal.paths])
        sop_instance_uids = sorted({reference.sop_instance_uid for reference in images.references})
        sop_instance_uid, series_instance_uid = (
            derived_uid(
                kind,
                sop_instance_uids=sop_instance_uids,
                study_instance_uid=images.identity.study_instance_uid,
                patient_id=images.identity.patient_id,
                issuer_of_patient_id=images.identity.elements["IssuerOfPatientID"],
                model=refusal.model_name,
                code=refusal.code,
                reason=refusal.reason,
                remedy=refusal.remedy,
                pipeline_version=version("segnode"),
            )
            for kind in ("refusal", "refusal-series")
        )
        making = Making(sop_instance_uid, series_instance_uid, refusal.created_at)
        dataset = build_refusal(
            images, making, code=refusal.code, reason=refusal.reason, remedy=refusal.remedy
        )
        path = self._place(refusal, sop_instance_uid)
        write_object(dataset, path)
        prove_refusal(path, images.identity, sop_instance_uids, code=refusal.code, reason=refusal.reason)
        data = path.read_bytes()
        return NewResult(
            kind=ResultKind.REFUSAL,
            path=self._spool.relative(path),
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            sop_class_uid=str(dataset.SOPClassUID),
            sop_instance_uid=sop_instance_uid,
        )

    def _place(self, refusal: WantedRefusal, sop_instance_uid: str) -> Path:
        """Apart from the folders of attempts, which are cleared when a job is tried again."""
        folder = self._spool.results_dir / "refusals" / refusal.job_id
        self._spool.make_folder(folder)
        return folder / f"{sop_instance_uid}.dcm"

    def _withhold(self, refusal: WantedRefusal, error: SegnodeError, now: datetime) -> None:
        log.warning("refusal.withheld", job_id=refusal.job_id, code=error.code)
        with self._records.write(alone=True) as session:
            if refusal_withheld(session, refusal):
                detail = {"code": error.code, "reason": error.message}
                record_event(
                    session,
                    "refusal.object_withheld",
                    actor=_ACTOR,
                    at=now,
                    subject=refusal.job_id,
                    alert=True,
                    detail=detail,
                )
