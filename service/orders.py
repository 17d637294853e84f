"""What an inference process is told to do for a job: its files, and the rules of its route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sqlalchemy.orm import Session

from service.pipeline_job import PipelineJob
from service.predecessors import predecessors_of
from service.protocol import RunJob
from service.records.supersession import superseded_objects
from service.records.tables import Job, JobOrigin
from service.settings import Settings
from service.spool import Spool


def order_of_job(
    session: Session, settings: Settings, spool: Spool, job_id: str, *, attempt: int, output_dir: Path
) -> RunJob:
    """The order for one attempt at a job.

    Parameters
    ----------
    output_dir : Path
        The folder that will hold the results; it must not exist.
    """
    job = session.get_one(Job, job_id)
    channels: list[list[Path]] = [[] for _ in range(max((i.channel for i in job.inputs), default=0) + 1)]
    names: dict[int, str] = {}
    for each in job.inputs:
        channels[each.channel].append(spool.absolute(each.path))
        if each.channel_name is not None:
            names[each.channel] = each.channel_name
    # Of an upload of several channels: as the first route to the model has them.
    is_upload = job.origin is JobOrigin.UPLOAD
    route = (
        settings.route_with_channels(job.model_name) if is_upload else settings.route(job.route_name or "")
    )
    wanted = PipelineJob(
        channels=tuple(tuple(paths) for paths in channels),
        created_at=job.created_at,
        output_dir=output_dir,
        settings_digest=settings.results_digest,
        supersedes=tuple(superseded_objects(session, job_id)),
        predecessors=predecessors_of(session, spool, job_id),
        profiles=settings.profiles_for(job.model_name, job.destinations),
        channel_names=tuple(names[number] for number in sorted(names)),
        told_apart_by=route if is_upload else None,
    )
    if route is not None:
        wanted = replace(wanted, reading=route.reading, alignment=route.alignment, guard=route.guard)
    return RunJob(job_id=job_id, attempt=attempt, job=wanted)
