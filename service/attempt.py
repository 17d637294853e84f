"""One attempt at one job: from the claim to the commit.

The attempt holds a lease. It is renewed while the inference process makes progress; when that process
stands still for ``stall_timeout_s`` it is killed, the attempt has failed, and nothing is renewed any more.
Results lie in a folder of the attempt's own and become results by the commit alone, which fails if anyone
else holds the job by then: what this attempt has written is then thrown away.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from models.bundle import Bundle
from models.errors import (
    ModelUnknownError,
    ModelWithdrawnError,
    OutOfMemoryError,
    ReasonCode,
    Refusal,
    SegnodeError,
)
from models.registry import Registry
from models.resources import available_memory_bytes
from service.errors import AttemptError, LostClaimError
from service.inference import InferenceProcess
from service.logs import get_logger
from service.orders import order_of_job
from service.protocol import Failed, OpenModel, Refused, Succeeded
from service.records.database import Records
from service.records.events import record_event
from service.records.fleet import live_workers, note_need
from service.records.jobs import bind_model, fail_attempt, refuse_job, release_job, renew_lease, succeed_job
from service.records.refusals import cancel_refusal_deliveries
from service.records.supersession import supersede
from service.records.tables import Job, JobState, ResultKind
from service.records.work import NewResult, Outcome
from service.settings import Settings
from service.spool import Spool
from service.watch import StoppingError, watch

_ACTOR = "worker"
_REPORT_AGAIN_S = 0.5
_RETRY_FACTOR = 4.0

log = get_logger(__name__)


@dataclass(frozen=True)
class _Claim:
    """What an attempt knows of its job."""

    job_id: str
    attempt: int
    failures: int
    supersedes_job_id: str | None
    output_dir: Path


class JobRunner:
    """Runs claimed jobs, one at a time, in an inference process that it keeps between jobs.

    Parameters
    ----------
    settings, records, spool, registry
        The node's.
    """

    def __init__(self, settings: Settings, records: Records, spool: Spool, registry: Registry) -> None:
        self._settings = settings
        self._worker = settings.worker
        self._records = records
        self._spool = spool
        self._registry = registry
        self._process: InferenceProcess | None = None
        self._memory_bytes = self._worker.memory_bytes or available_memory_bytes()

    @property
    def inference_pid(self) -> int | None:
        """The process identifier of the inference process, while there is one."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the inference process."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def run(self, job: Job, stop: threading.Event) -> None:
        """Take a job that was just claimed to an end, or give it back when ``stop`` is set.

        Whatever goes wrong ends as a refusal or as a failure in the records. Only an error of the records
        themselves is raised; the lease then lapses.
        """
        claim = _Claim(
            job.job_id,
            job.attempt,
            job.failures,
            job.supersedes_job_id,
            self._spool.results_dir / job.job_id / str(job.attempt),
        )
        self._clear(claim.output_dir.parent)  # of earlier attempts; none of them can commit any more
        keep = False
        try:
            keep = self._try(claim, job.model_name, job.requested_version, stop)
        except LostClaimError:
            self._kill()
            log.warning("job.claim_lost", job_id=claim.job_id, attempt=claim.attempt)
        except BaseException:
            self._kill()  # it may still be at work on what nobody waits for any more
            raise
        finally:
            if not keep:
                self._clear(claim.output_dir)

    def _try(self, claim: _Claim, model: str, version: str | None, stop: threading.Event) -> bool:
        """Make an attempt and report how it ended; True if it has left results. Raises LostClaimError."""
        try:
            bundle = self._find_bundle(model, version)
            outcome = self._attempt(claim, bundle, stop)
        except StoppingError:
            self._kill()
            self._report(lambda session: release_job(session, claim.job_id, claim.attempt))
        except (ModelUnknownError, ModelWithdrawnError) as error:
            withdrawn = isinstance(error, ModelWithdrawnError)
            reason = ReasonCode.MODEL_WITHDRAWN if withdrawn else ReasonCode.MODEL_UNKNOWN
            self._refuse(claim, Refusal(reason, error.message, remedy=error.remedy))
        except Refusal as refusal:
            if refusal.reason is ReasonCode.TOO_LARGE and self._a_larger_worker_takes(model):
                self._fail(claim, OutOfMemoryError(refusal.message, remedy=refusal.remedy))
            else:
                self._refuse(claim, refusal)
        except LostClaimError:
            raise
        except SegnodeError as error:
            self._kill()
            self._fail(claim, error)
        else:
            self._report(lambda session: self._succeed(session, claim, outcome, bundle))
            return True
        return False

    def _attempt(self, claim: _Claim, bundle: Bundle, stop: threading.Event) -> Outcome:
        with self._records.write() as session:
            version = bundle.manifest.version
            bind_model(session, claim.job_id, claim.attempt, version=version, digest=bundle.digest)
            order = order_of_job(
                session,
                self._settings,
                self._spool,
                claim.job_id,
                attempt=claim.attempt,
                output_dir=claim.output_dir,
            )
        process = self._process_for(bundle)
        answer = watch(process, order, self._worker, stop, lambda *reached: self._renew(claim, *reached))
        if isinstance(answer, Refused):
            raise Refusal(ReasonCode(answer.code), answer.message, remedy=answer.remedy)
        if isinstance(answer, Failed):
            raise AttemptError(answer.code, answer.message, remedy=answer.remedy, retryable=answer.retryable)
        return self._outcome(claim, answer)

    def _find_bundle(self, model: str, version: str | None) -> Bundle:
        """The weights for a job that starts now. Raises ModelUnknownError, ModelWithdrawnError."""
        if version is None:
            return self._registry.active(model)
        if self._registry.is_withdrawn(model, version):
            raise ModelWithdrawnError(
                f"Version {version} of {model} is withdrawn.", remedy="Retry the job with another version."
            )
        return self._registry.get(model, version)

    def _process_for(self, bundle: Bundle) -> InferenceProcess:
        """The process that holds this model: the one that runs, or a fresh one."""
        current = self._process
        if current is not None:
            worn = current.jobs_given >= self._worker.jobs_per_child
            if current.digest == bundle.digest and current.is_alive and not worn:
                return current
            self.close()
        self._process = InferenceProcess(
            OpenModel(
                bundle=bundle.folder,
                digest=bundle.digest,
                runtime=self._worker.runtime,
                threads=self._worker.threads,
                cache_dir=self._settings.cache_dir,
                memory_bytes=self._worker.memory_bytes,
                log_level=self._settings.log_level,
            )
        )
        return self._process

    def _outcome(self, claim: _Claim, answer: Succeeded) -> Outcome:
        """What the process has made, looked for on the disk before anyone is told of it."""
        results = []
        for file in answer.files:
            path = claim.output_dir / file.name
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                raise AttemptError(
                    "PROTOCOL",
                    f"The inference process reported {file.name}, which is not there.",
                    remedy="Report this with the log of the worker.",
                )
            results.append(
                NewResult(
                    kind=ResultKind(file.kind),
                    path=self._spool.relative(path),
                    size_bytes=file.size_bytes,
                    sha256=file.sha256,
                    sop_class_uid=file.sop_class_uid,
                    sop_instance_uid=file.sop_instance_uid,
                    profile=file.profile,
                    withheld=file.withheld,
                )
            )
        summary = answer.summary
        if claim.supersedes_job_id is not None:
            summary = summary | {"supersedes_job_id": claim.supersedes_job_id}
        return Outcome(results, answer.runtime, answer.precision, summary)

    def _succeed(self, session: Session, claim: _Claim, outcome: Outcome, bundle: Bundle) -> None:
        now = self._records.now()
        profile_keys = self._settings.profile_keys
        succeed_job(session, claim.job_id, claim.attempt, outcome, now=now, profile_keys=profile_keys)
        cancel_refusal_deliveries(session, claim.job_id, now=now)
        detail: dict[str, object] = {"version": bundle.manifest.version, "digest": bundle.digest}
        if claim.supersedes_job_id is not None:
            cancelled = supersede(session, claim.job_id, now=now)
            detail |= {"supersedes": claim.supersedes_job_id, "deliveries_cancelled": cancelled}
        _tell(session, "job.succeeded", claim, now, detail)
        if warnings := outcome.summary.get("warnings"):
            _tell(session, "job.warned", claim, now, {"warnings": warnings})
            log.warning("job.warned", job_id=claim.job_id, attempt=claim.attempt, warnings=warnings)
        log.info("job.succeeded", job_id=claim.job_id, attempt=claim.attempt)

    def _refuse(self, claim: _Claim, refusal: Refusal) -> None:
        def refuse(session: Session) -> None:
            now = self._records.now()
            code = refusal.reason.value
            refuse_job(
                session,
                claim.job_id,
                claim.attempt,
                code=code,
                reason=refusal.message,
                remedy=refusal.remedy,
                now=now,
            )
            _tell(session, "job.refused", claim, now, {"code": code})

        self._report(refuse)

    def _fail(self, claim: _Claim, error: SegnodeError) -> None:
        """Count a failure. What trying again cannot help fails at once, and so does the last try."""

        def fail(session: Session) -> None:
            now = self._records.now()
            state = fail_attempt(
                session,
                claim.job_id,
                claim.attempt,
                error,
                retry_after_s=self._worker.first_retry_s * _RETRY_FACTOR**claim.failures,
                maximum_failures=self._worker.maximum_failures if error.retryable else 1,
                now=now,
            )
            final = state is JobState.FAILED
            if error.code == OutOfMemoryError.code and not final:
                note_need(session, claim.job_id, more_than_bytes=self._memory_bytes)
            kind = "job.failed" if final else "job.attempt_failed"
            _tell(session, kind, claim, now, {"code": error.code}, alert=final)

        log.warning("job.attempt_failed", job_id=claim.job_id, attempt=claim.attempt, code=error.code)
        self._report(fail)

    def _a_larger_worker_takes(self, model: str) -> bool:
        """Whether a worker that is alive has more memory than this one, and takes jobs of this model."""
        with self._records.read() as session:
            return any(
                worker.memory_bytes > self._memory_bytes and (not worker.models or model in worker.models)
                for worker in live_workers(session, now=self._records.now())
            )

    def _renew(self, claim: _Claim, stage: str, fraction: float) -> None:
        """Keep the lease. Raises LostClaimError. A database that is away is tried again at the next call."""
        try:
            with self._records.write() as session:
                renew_lease(
                    session,
                    claim.job_id,
                    claim.attempt,
                    lease_s=self._worker.lease_s,
                    now=self._records.now(),
                    stage=stage,
                    fraction=fraction,
                )
        except OperationalError:
            log.exception("job.lease_not_renewed", job_id=claim.job_id, attempt=claim.attempt)

    def _report(self, transition: Callable[[Session], None]) -> None:
        """Write down how an attempt ended. A database that is away is waited for as long as a lease lasts.

        Raises LostClaimError.
        """
        give_up_at = time.monotonic() + self._worker.lease_s
        while True:
            try:
                with self._records.write() as session:
                    transition(session)
                return
            except OperationalError:
                if time.monotonic() > give_up_at:
                    raise
                log.exception("job.report_waits")
                time.sleep(_REPORT_AGAIN_S)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _clear(self, folder: Path) -> None:
        """Remove results that are nobody's, and what was being written beside them."""
        for path in (folder, folder.with_name(f".{folder.name}.unfinished")):
            if path.exists():
                shutil.rmtree(path)


def _tell(
    session: Session,
    kind: str,
    claim: _Claim,
    now: datetime,
    detail: dict[str, object],
    *,
    alert: bool = False,
) -> None:
    detail = {"attempt": claim.attempt} | detail
    record_event(session, kind, actor=_ACTOR, at=now, subject=claim.job_id, alert=alert, detail=detail)
