"""Received instances and the series they make up: what may happen to them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.records.database import change, lock_name
from service.records.jobs import cancel_jobs_of_instance
from service.records.tables import Instance, InstanceKind, Result, Series, SeriesState


@dataclass(frozen=True)
class ReceivedInstance:
    """What the receiver knows of an object that is safely on the disk.

    ``path`` is relative to the spool; ``identity_digest`` is the SHA-256 of the patient and study
    identifiers, so that a correction can be told from a repetition.
    """

    instance_id: str
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    kind: InstanceKind
    modality: str | None
    patient_id: str | None
    identity_digest: str
    path: str
    size_bytes: int
    sha256: str
    calling_ae_title: str | None
    called_ae_title: str | None
    peer_address: str | None
    received_at: datetime


class Arrival(StrEnum):
    """What an instance turned out to be when it was recorded."""

    NEW = "new"
    REPEATED = "repeated"  # the same object again: the new file is not needed
    CORRECTION = "correction"  # the same UID with another patient or study identity: both are kept


@dataclass(frozen=True)
class Recorded:
    arrival: Arrival
    instance_id: str  # of the row that stands for the object now
    cancelled_job_ids: tuple[str, ...] = ()


def is_own_object(session: Session, sop_instance_uid: str) -> bool:
    """True if this node made the object itself: it came back from a PACS that routes everything."""
    return (
        session.scalar(select(Result.result_id).where(Result.sop_instance_uid == sop_instance_uid))
        is not None
    )


def record_instance(session: Session, received: ReceivedInstance) -> Recorded:
    """Record an object that is on the disk, in the caller's writing transaction.

    An image opens its series, or restarts its quiet time. The same object again changes nothing,
    even where its bytes differ: a PACS transcodes and coerces, and a SOP Instance UID stands for one object.
    The same SOP Instance UID in the same series with another patient or study identity is a correction: the
    old revision is kept, its undelivered results are cancelled, and the series is segmented anew.
    """
    lock_name(session, received.series_instance_uid)  # a modality sends one series over several associations
    known = session.scalar(
        select(Instance).where(
            Instance.series_instance_uid == received.series_instance_uid,
            Instance.sop_instance_uid == received.sop_instance_uid,
            Instance.current,
        )
    )
    if known is not None and known.identity_digest == received.identity_digest:
        return Recorded(Arrival.REPEATED, known.instance_id)

    cancelled: tuple[str, ...] = ()
    revision = 1
    if known is not None:
        known.current = False
        revision = known.revision + 1
        cancelled = cancel_jobs_of_instance(session, known.instance_id, at=received.received_at)

    kind = InstanceKind.OWN if is_own_object(session, received.sop_instance_uid) else received.kind
    series = _open_series(session, received) if kind is InstanceKind.IMAGE else None
    session.add(
        Instance(
            instance_id=received.instance_id,
            series_id=series.series_id if series else None,
            study_instance_uid=received.study_instance_uid,
            series_instance_uid=received.series_instance_uid,
            sop_instance_uid=received.sop_instance_uid,
            sop_class_uid=received.sop_class_uid,
            transfer_syntax_uid=received.transfer_syntax_uid,
            kind=kind,
            identity_digest=received.identity_digest,
            patient_id=received.patient_id,
            revision=revision,
            path=received.path,
            size_bytes=received.size_bytes,
            sha256=received.sha256,
            calling_ae_title=received.calling_ae_title,
            called_ae_title=received.called_ae_title,
            peer_address=received.peer_address,
            received_at=received.received_at,
        )
    )
    if series and (known is None or known.series_id != series.series_id):
        series.instance_count = Series.instance_count + 1  # in SQL: two may arrive at once
    if known is None:
        return Recorded(Arrival.NEW, received.instance_id)
    return Recorded(Arrival.CORRECTION, received.instance_id, cancelled)


def _open_series(session: Session, received: ReceivedInstance) -> Series:
    """The series that an image belongs to, made or opened again, with its quiet time restarted."""
    series = session.scalar(
        select(Series)
        .where(
            Series.study_instance_uid == received.study_instance_uid,
            Series.series_instance_uid == received.series_instance_uid,
        )
        .with_for_update()  # whoever is closing the series now ends first, and is seen
    )
    if series is None:
        series = Series(
            study_instance_uid=received.study_instance_uid,
            series_instance_uid=received.series_instance_uid,
            modality=received.modality,
            state=SeriesState.RECEIVING,
            calling_ae_title=received.calling_ae_title,
            called_ae_title=received.called_ae_title,
            instance_count=0,
            first_instance_at=received.received_at,
            last_instance_at=received.received_at,
        )
        session.add(series)
        session.flush()
    series.state = SeriesState.RECEIVING
    series.last_instance_at = max(series.last_instance_at, received.received_at)
    return series


def quiet_series(session: Session, *, quiet_since: datetime) -> list[Series]:
    """Series that are still open and have received nothing since the given time, oldest first."""
    return list(
        session.scalars(
            select(Series)
            .where(Series.state == SeriesState.RECEIVING, Series.last_instance_at <= quiet_since)
            .order_by(Series.last_instance_at)
        )
    )


def complete_series(session: Session, series_id: str, *, last_instance_at: datetime, at: datetime) -> bool:
    """Close a series, unless another instance has arrived since it was looked at; True if it is closed."""
    changed = change(
        session,
        update(Series)
        .where(
            Series.series_id == series_id,
            Series.state == SeriesState.RECEIVING,
            Series.last_instance_at == last_instance_at,
        )
        .values(state=SeriesState.COMPLETE, completed_at=at),
    )
    return changed > 0


def current_instances(session: Session, series_id: str) -> list[Instance]:
    """The current revision of every image of a series, in the order of their SOP Instance UIDs."""
    return list(
        session.scalars(
            select(Instance)
            .where(Instance.series_id == series_id, Instance.current)
            .order_by(Instance.sop_instance_uid)
        )
    )


def study_is_quiet(session: Session, study_instance_uid: str, *, now: datetime, quiet_time_s: float) -> bool:
    """True if no image of the study has arrived for ``quiet_time_s`` seconds."""
    since = now - timedelta(seconds=quiet_time_s)
    newest = session.scalar(
        select(Series.last_instance_at)
        .where(Series.study_instance_uid == study_instance_uid)
        .order_by(Series.last_instance_at.desc())
        .limit(1)
    )
    return newest is None or newest <= since
