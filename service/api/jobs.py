"""``/jobs``: everything that waits, runs or has ended; what has not ended well can be retried."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select

from service.api.access import CallerDep
from service.api.paging import AfterIdentifier, Identifier, Limit, page
from service.api.problem import problem_responses
from service.api.schemas import Page, Segmentation, segmentation
from service.api.state import State
from service.records.events import record_event
from service.records.jobs import retry_job as retry_job_now
from service.records.tables import Job, JobState

router = APIRouter(tags=["jobs"])


@router.get("/jobs")
def list_jobs(
    state: State,
    _caller: CallerDep,
    job_state: Annotated[JobState | None, Query(alias="state")] = None,
    model: Annotated[str | None, Query(pattern=r"^[a-z0-9-]{1,64}$")] = None,
    limit: Limit = 50,
    after: AfterIdentifier = None,
) -> Page[Segmentation]:
    """Jobs, newest first."""
    query = select(Job)
    if job_state is not None:
        query = query.where(Job.state == job_state)
    if model is not None:
        query = query.where(Job.model_name == model)
    with state.records.read() as session:
        rows = page(session, query, time=Job.created_at, key=Job.job_id, after=after, limit=limit)
        items = [segmentation(row.Job) for row in rows[:limit]]
    return Page(items=items, next=items[-1].job_id if len(rows) > limit else None)


@router.post("/jobs/{job_id}/retry", responses=problem_responses(404, 409))
def retry_job(job_id: Identifier, state: State, caller: CallerDep) -> Segmentation:
    """Queue a refused or failed job again."""
    with state.records.write(alone=True) as session:
        job = retry_job_now(session, job_id)
        record_event(session, "job.retried", actor=caller.name, at=state.clock(), subject=job_id)
        return segmentation(job)
