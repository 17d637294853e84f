"""A model version on trial: run over cases in an inference process of its own, and nothing of it leaves.

The process is the one that runs live jobs, with the worker's runtime and threads, from the files to the
labelmap; only no DICOM object is made. Its time counts from the moment that the model is loaded, its memory
is the peak of the whole process.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from models.bundle import Bundle
from models.errors import SegnodeError
from models.nifti import read_labelmap
from models.volume import Labelmap
from service.errors import AttemptError
from service.guard_rules import GuardRules
from service.inference import InferenceProcess
from service.pipeline_job import LABELMAP, PipelineJob
from service.protocol import Failed, OpenModel, Refused, RunJob, Succeeded
from service.settings import Settings
from service.watch import Stop, watch

_LEFT_BEHIND_S = 24 * 3600.0
_ANY_INPUT = GuardRules(modality="warn", spacing="warn", field_of_view="warn", slices="warn")
_NO_TIME = datetime(2000, 1, 1, tzinfo=UTC).replace(tzinfo=None)


@dataclass(frozen=True)
class TrialRun:
    """How one case came out: a labelmap, or a code and a sentence that say why there is none."""

    seconds: float
    peak_bytes: int | None
    runtime: str | None = None
    precision: str | None = None
    labelmap: Labelmap | None = None
    code: str | None = None
    sentence: str | None = None


class Trial:
    """One version in its own process, from ``with`` to its end; the process starts with the first case.

    Parameters
    ----------
    settings : Settings
        The node's.
    bundle : Bundle
        The version.
    stop : Stop
        Ends the run that is under way: it raises StoppingError.
    deadline_s : float, optional
        The longest that one case may take; a job's unless given.
    renew : callable
        Called now and then while a case is under way.
    niceness : int
        By how much its process steps back where others want the processor, from 0 to 19.
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        stop: Stop,
        *,
        deadline_s: float | None = None,
        renew: Callable[[], None] = lambda: None,
        niceness: int = 0,
    ) -> None:
        self._niceness = niceness
        self._settings = settings
        self._bundle = bundle
        self._stop = stop
        self._renew = renew
        limits = settings.worker
        self._limits = limits.model_copy(update={"job_deadline_s": deadline_s or limits.job_deadline_s})
        self._folder = settings.data_dir / "trials" / f"{os.getpid()}-{bundle.digest[:16]}"
        self._process: _TimedProcess | None = None
        self._count = 0

    def __enter__(self) -> Self:
        _clear_left_behind(self._folder.parent)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill() if kind is not None else self._process.end()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def run_golden_case(self) -> TrialRun:
        """Run the bundle's own golden case."""
        images = tuple((path,) for path in self._bundle.golden_image_paths)
        return self.run(
            RunJob(
                job_id="golden",
                attempt=0,
                job=PipelineJob(images, _NO_TIME, self._folder, guard=_ANY_INPUT),
            )
        )

    def run(self, order: RunJob) -> TrialRun:
        """Run a case; what goes wrong with it is part of the answer. Raises StoppingError."""
        self._count += 1
        output_dir = self._folder / str(self._count)
        job = replace(order.job, output_dir=output_dir, profiles=(), supersedes=())
        try:
            return self._attempt(RunJob(job_id=order.job_id, attempt=self._count, job=job))
        except SegnodeError as error:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
            return TrialRun(0.0, None, code=error.code, sentence=error.message)
        finally:
            shutil.rmtree(output_dir, ignore_errors=True)

    def _attempt(self, order: RunJob) -> TrialRun:
        process = self._process or self._start()
        answer = watch(process, order, self._limits, self._stop, lambda *_: self._renew())
        seconds, peak = process.seconds_since_given(), process.peak_bytes()
        if isinstance(answer, Refused):
            return TrialRun(seconds, peak, code=answer.code, sentence=answer.message)
        if isinstance(answer, Failed):
            raise AttemptError(answer.code, answer.message)
        assert isinstance(answer, Succeeded)
        labelmap = read_labelmap(order.job.output_dir / LABELMAP)
        return TrialRun(seconds, peak, answer.runtime, answer.precision, labelmap)

    def _start(self) -> _TimedProcess:
        worker = self._settings.worker
        self._process = _TimedProcess(
            OpenModel(
                bundle=self._bundle.folder,
                digest=self._bundle.digest,
                runtime=worker.runtime,
                threads=worker.threads,
                cache_dir=self._settings.cache_dir,
                log_level=self._settings.log_level,
            )
        )
        if self._niceness:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, self._niceness)
        return self._process


class _TimedProcess(InferenceProcess):
    """An inference process that knows when it was given its last job, and how much memory it took."""

    _given_at = 0.0

    def give(self, job: RunJob) -> None:
        self._given_at = time.monotonic()
        super().give(job)

    def seconds_since_given(self) -> float:
        return time.monotonic() - self._given_at

    def peak_bytes(self) -> int | None:
        return peak_memory_bytes(self.pid)


def peak_memory_bytes(pid: int) -> int | None:
    """The most memory that a process has had at once (VmHWM of proc(5)); None where that is not told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _clear_left_behind(folder: Path) -> None:
    """Remove what trials of dead processes have left, once it is certain that nobody uses it."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        try:
            if time.time() - entry.stat().st_mtime > _LEFT_BEHIND_S:
                shutil.rmtree(entry, ignore_errors=True)
        except FileNotFoundError:
            continue  # another worker was faster
