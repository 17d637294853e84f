"""``/studies``: what was received over DICOM, by its UIDs and states. No patient is named."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import Subquery, case, func, select
from sqlalchemy.orm import Session

from service.api.access import CallerDep
from service.api.paging import Limit, StudyUid, StudyUidAfter, page
from service.api.problem import problem_responses
from service.api.schemas import (
    DeletedDocument,
    Page,
    SeriesDocument,
    StudyDocument,
    StudySummary,
    delivery_document,
    segmentation,
)
from service.api.state import State
from service.deletion import delete_study as delete_study_now
from service.errors import NotFoundError
from service.records.tables import Delivery, Instance, Job, Series, SeriesState

router = APIRouter(tags=["studies"])


@router.get("/studies")
def list_studies(
    state: State, _caller: CallerDep, limit: Limit = 50, after: StudyUidAfter = None
) -> Page[StudySummary]:
    """Studies with at least one series of images, by the time of their last instance."""
    studies = _studies()
    with state.records.read() as session:
        rows = page(
            session,
            select(studies),
            time=studies.c.last_instance_at,
            key=studies.c.study_instance_uid,
            after=after,
            limit=limit,
        )
    items = [_summary(row) for row in rows[:limit]]
    return Page(items=items, next=items[-1].study_instance_uid if len(rows) > limit else None)


def _studies() -> Subquery:
    receiving = func.sum(case((Series.state == SeriesState.RECEIVING, 1), else_=0))
    summaries = select(
        Series.study_instance_uid,
        receiving.label("receiving"),
        func.count().label("series_count"),
        func.sum(Series.instance_count).label("instance_count"),
        func.min(Series.first_instance_at).label("first_instance_at"),
        func.max(Series.last_instance_at).label("last_instance_at"),
    ).group_by(Series.study_instance_uid)
    return summaries.subquery()


def _summary(row: Any) -> StudySummary:
    return StudySummary(
        study_instance_uid=row.study_instance_uid,
        state=SeriesState.RECEIVING if row.receiving else SeriesState.COMPLETE,
        series_count=row.series_count,
        instance_count=row.instance_count,
        first_instance_at=row.first_instance_at,
        last_instance_at=row.last_instance_at,
    )


@router.get("/studies/{study_instance_uid}", responses=problem_responses(404))
def read_study(study_instance_uid: StudyUid, state: State, _caller: CallerDep) -> StudyDocument:
    """All that the node holds of a study."""
    with state.records.read() as session:
        return _study(session, study_instance_uid)


def _study(session: Session, study_instance_uid: str) -> StudyDocument:
    instance_count = session.scalar(
        select(func.count()).select_from(Instance).where(Instance.study_instance_uid == study_instance_uid)
    )
    series = session.scalars(
        select(Series)
        .where(Series.study_instance_uid == study_instance_uid)
        .order_by(Series.first_instance_at, Series.series_instance_uid)
    ).all()
    jobs = session.scalars(
        select(Job).where(Job.study_instance_uid == study_instance_uid).order_by(Job.created_at, Job.job_id)
    ).all()
    if not (instance_count or series or jobs):
        raise NotFoundError(
            f"There is no study {study_instance_uid}.", remedy="List the studies to see which are here."
        )
    deliveries = session.scalars(
        select(Delivery)
        .where(Delivery.job_id.in_([job.job_id for job in jobs]))
        .order_by(Delivery.created_at, Delivery.delivery_id)
    ).all()
    return StudyDocument(
        study_instance_uid=study_instance_uid,
        instance_count=instance_count or 0,
        series=[SeriesDocument.model_validate(each) for each in series],
        jobs=[segmentation(job) for job in jobs],
        deliveries=[delivery_document(delivery) for delivery in deliveries],
    )


@router.delete("/studies/{study_instance_uid}", responses=problem_responses(404, 409))
def delete_study(study_instance_uid: StudyUid, state: State, caller: CallerDep) -> DeletedDocument:
    """Delete everything of a study: what was received, the jobs, their results, deliveries not yet made."""
    deleted = delete_study_now(
        state.records, state.spool, study_instance_uid, actor=caller.name, now=state.clock()
    )
    return DeletedDocument.model_validate(deleted)
