"""What a job's objects will replace, looked up in the records and in the files that were sent."""

from __future__ import annotations

from sqlalchemy.orm import Session

from models.errors import Refusal
from service.dicom.predecessors import Predecessor
from service.headers import read_attributes
from service.records.supersession import superseded_results
from service.spool import Spool

_KEYWORDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")


def predecessors_of(session: Session, spool: Spool, job_id: str) -> tuple[Predecessor, ...]:
    """The DICOM objects of the results that a job supersedes, those of the newest first.

    An object whose file was purged is left out: the report's text still names it.
    """
    found = []
    for result in superseded_results(session, job_id):
        try:
            values = read_attributes(spool.absolute(result.path), _KEYWORDS)
        except Refusal:
            continue
        uids = [values[keyword][0] for keyword in _KEYWORDS if values[keyword]]
        if len(uids) == len(_KEYWORDS):
            sop_class, sop_instance, series, study = uids
            found.append(
                Predecessor(
                    sop_class_uid=sop_class,
                    sop_instance_uid=sop_instance,
                    series_instance_uid=series,
                    study_instance_uid=study,
                    profile=result.profile,
                )
            )
    return tuple(found)
