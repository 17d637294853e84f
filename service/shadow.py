"""Shadow mode: a candidate runs on live studies beside the active version, and nothing of it leaves.

A study is compared after its result is out, when no job waits, at the lowest priority; a job that comes in
meanwhile ends the comparison at once, which is made anew later. What grows is a table in the records: Dice
and volumes per label and study, time, memory, and what went wrong.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta

from sqlalchemy import exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models.agreement import agreement, same_labels
from models.bundle import Bundle
from models.errors import ModelWithdrawnError, Refusal, SegnodeError
from models.nifti import read_labelmap
from models.registry import Registry
from models.volume import Labelmap
from service.errors import ConflictError, NotFoundError
from service.logs import get_logger
from service.orders import order_of_job
from service.records.database import Records, change, utc_now
from service.records.events import record_event
from service.records.governance_tables import Comparison, ComparisonState, Purge, Shadow
from service.records.tables import Job, JobState, ResultKind
from service.settings import Settings
from service.spool import Spool
from service.trial import Trial, TrialRun
from service.watch import Stop, StoppingError

_ACTOR = "shadow"
_NICENESS = 10  # at 19 a busy machine would never get to it
_CANDIDATES = 16  # to choose one of, so that workers side by side seldom choose the same

log = get_logger(__name__)


def start_shadow(
    records: Records, registry: Registry, name: str, version: str, *, actor: str, now: datetime
) -> Shadow:
    """Begin to run a version beside the active one.

    Raises
    ------
    ConflictError
        If it is the active one, or another version of the model is in shadow mode.
    ModelWithdrawnError
        If it is withdrawn.
    ModelUnknownError, RegistryError, SignatureError
        If it is not installed, or no longer what was.
    """
    bundle = registry.get(name, version)
    if registry.is_withdrawn(name, version):
        raise ModelWithdrawnError(
            f"Version {version} of {name!r} is withdrawn.", remedy="Run another version in shadow mode."
        )
    if registry.active_version(name) == version:
        raise ConflictError(
            f"Version {version} of {name!r} is the active one.", remedy="Give another version of the model."
        )
    with records.write(alone=True) as session:
        running = running_shadow(session, name)
        if running is not None:
            raise ConflictError(
                f"Version {running.model_version} of {name!r} is in shadow mode already.",
                remedy="Stop that one first.",
            )
        shadow = Shadow(
            model_name=name,
            model_version=version,
            model_digest=bundle.digest,
            started_by=actor,
            started_at=now,
        )
        session.add(shadow)
        session.flush()
        record_event(session, "shadow.started", actor=actor, at=now, subject=f"{name}@{version}")
    return shadow


def stop_shadow(records: Records, name: str, *, actor: str, now: datetime) -> Shadow:
    """End the shadow mode of a model; its table stays.

    Raises
    ------
    NotFoundError
        If no version of the model is in shadow mode.
    """
    with records.write() as session:
        shadow = running_shadow(session, name)
        if shadow is None:
            raise NotFoundError(f"No version of {name[:64]!r} is in shadow mode.")
        _stop(session, shadow, actor=actor, now=now)
        session.refresh(shadow)
    return shadow


def running_shadow(session: Session, name: str) -> Shadow | None:
    """What is in shadow mode of a model; None where nothing is."""
    return session.scalar(select(Shadow).where(Shadow.model_name == name, Shadow.stopped_at.is_(None)))


def latest_shadow(session: Session, name: str) -> Shadow | None:
    """What is, or was last, in shadow mode of a model."""
    query = select(Shadow).where(Shadow.model_name == name).order_by(Shadow.started_at.desc()).limit(1)
    return session.scalar(query)


class ShadowRunner:
    """Compares one study at a time. Several of them may work on the same records.

    Parameters
    ----------
    settings, records, spool, registry
        The node's.
    """

    def __init__(self, settings: Settings, records: Records, spool: Spool, registry: Registry) -> None:
        self._settings = settings
        self._records = records
        self._spool = spool
        self._registry = registry
        self._choice = random.Random()

    def run_one(self, stop: Stop) -> bool:
        """Compare one study; False if there is none, or it had to make way."""
        now = utc_now()
        with self._records.read() as session:
            shadows = session.scalars(select(Shadow).where(Shadow.stopped_at.is_(None))).all()
        for shadow in shadows:
            bundle = self._candidate(shadow, now)
            job_id = self._next_job(shadow, now) if bundle is not None else None
            if bundle is not None and job_id is not None:
                try:
                    self._compare(shadow, bundle, job_id, stop)
                except StoppingError:
                    return False
                return True
        return False

    def _candidate(self, shadow: Shadow, now: datetime) -> Bundle | None:
        """The version in shadow mode; ends the mode where it makes no sense any more."""
        name, version = shadow.model_name, shadow.model_version
        try:
            bundle = self._registry.get(name, version)
        except SegnodeError as error:
            log.error("shadow.candidate_unusable", model=f"{name}@{version}", reason=error.message)
            bundle = None
        over = self._registry.is_withdrawn(name, version) or self._registry.active_version(name) == version
        if bundle is None or bundle.digest != shadow.model_digest or over:
            with self._records.write() as session:
                _stop(session, shadow, actor=_ACTOR, now=now)
            return None
        return bundle

    def _next_job(self, shadow: Shadow, now: datetime) -> str | None:
        since = max(shadow.started_at, now - timedelta(hours=self._settings.shadow.maximum_age_hours))
        compared = exists().where(Comparison.shadow_id == shadow.shadow_id, Comparison.job_id == Job.job_id)
        with self._records.read() as session:
            jobs = session.scalars(
                select(Job.job_id)
                .where(
                    Job.model_name == shadow.model_name,
                    Job.state == JobState.SUCCEEDED,
                    Job.finished_at >= since,
                    Job.model_digest != shadow.model_digest,
                    ~compared,
                    ~exists().where(Purge.job_id == Job.job_id),
                )
                .order_by(Job.finished_at)
                .limit(_CANDIDATES)
            ).all()
        return self._choice.choice(jobs) if jobs else None

    def _compare(self, shadow: Shadow, bundle: Bundle, job_id: str, stop: Stop) -> None:
        with self._records.read() as session:
            job = session.get_one(Job, job_id)
            produced = next((r.path for r in job.results if r.kind is ResultKind.LABELMAP), None)
            # Only its inputs and rules are used: the folder is the trial's own.
            order = order_of_job(
                session, self._settings, self._spool, job_id, attempt=0, output_dir=self._spool.root
            )
        comparison = Comparison(
            shadow_id=shadow.shadow_id,
            job_id=job_id,
            study_instance_uid=job.study_instance_uid,
            active_version=job.model_version,
            state=ComparisonState.DONE,
            active_seconds=_seconds(job),
            created_at=utc_now(),
        )
        try:
            active = read_labelmap(self._spool.absolute(produced or ""))
            made_by = self._registry.get(job.model_name, job.model_version or "")
        except (Refusal, SegnodeError) as error:
            _fail(comparison, error.code, "The active version's labelmap cannot be compared with.")
        else:
            deadline_s = self._settings.shadow.deadline_s
            with Trial(self._settings, bundle, stop, deadline_s=deadline_s, niceness=_NICENESS) as trial:
                run = trial.run(order)
            _fill(comparison, run, bundle, active, made_by)
        try:
            with self._records.write() as session:
                session.add(comparison)
        except IntegrityError:
            log.info("shadow.compared_already", job_id=job_id)  # by another worker; or the job was deleted
        else:
            log.info("shadow.compared", job_id=job_id, state=comparison.state.value, code=comparison.code)


def _fill(comparison: Comparison, run: TrialRun, bundle: Bundle, active: Labelmap, made_by: Bundle) -> None:
    comparison.seconds, comparison.peak_bytes = run.seconds, run.peak_bytes
    if run.labelmap is None:
        _fail(comparison, run.code or "FAILED", run.sentence or "")
    elif run.labelmap.array.shape != active.array.shape:
        _fail(comparison, "GRIDS_DIFFER", "The candidate's labelmap lies on another grid.")
    else:
        pairs = same_labels(bundle.manifest.labels, made_by.manifest.labels)
        voxel_ml = active.voxel_volume_ml
        comparison.labels = {
            name: {
                "dice": round(each.dice, 5),
                "candidate_ml": round(each.voxels * voxel_ml, 4),
                "active_ml": round(each.expected_voxels * voxel_ml, 4),
                "difference_ml": round((each.voxels - each.expected_voxels) * voxel_ml, 4),
            }
            for name, each in agreement(run.labelmap.array, active.array, pairs).items()
        }


def _fail(comparison: Comparison, code: str, reason: str) -> None:
    comparison.state = ComparisonState.FAILED
    comparison.code, comparison.reason = code, reason


def _seconds(job: Job) -> float | None:
    """How long the attempt took that succeeded, loading the model included where it had to be."""
    if job.started_at is None or job.finished_at is None:
        return None
    return (job.finished_at - job.started_at).total_seconds()


def _stop(session: Session, shadow: Shadow, *, actor: str, now: datetime) -> None:
    stopped = change(
        session,
        update(Shadow)
        .where(Shadow.shadow_id == shadow.shadow_id, Shadow.stopped_at.is_(None))
        .values(stopped_at=now, stopped_by=actor),
    )
    if stopped:
        subject = f"{shadow.model_name}@{shadow.model_version}"
        record_event(session, "shadow.stopped", actor=actor, at=now, subject=subject)
