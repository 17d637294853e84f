"""An inference process at work, watched: it must go on, end in time, and speak of its own job alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from service.errors import AttemptError
from service.inference import InferenceProcess
from service.protocol import Advance, Failed, Ready, Refused, RunJob, Succeeded
from service.settings import WorkerSettings

_LISTEN_S = 0.2  # how soon a stop is noticed
_RENEW_AT_LEAST_EVERY_S = 5.0  # how old the progress in the records may be, and a cancellation unnoticed


class Stop(Protocol):
    """What says that an attempt is to be given back; a ``threading.Event`` for one."""

    def is_set(self) -> bool: ...


class StoppingError(Exception):
    """Raised when the node is stopping: the attempt is given back."""


def watch(
    process: InferenceProcess,
    order: RunJob,
    settings: WorkerSettings,
    stop: Stop,
    renew: Callable[[str, float], None],
) -> Succeeded | Refused | Failed:
    """Have a process run an attempt, and return its last word on it.

    Parameters
    ----------
    process : InferenceProcess
        Loaded or loading, and without another job.
    renew : callable
        Called with the stage and the fraction reached, often enough to keep the lease.

    Raises
    ------
    AttemptError
        If the process dies, stands still, takes too long, or says what it should not.
    StoppingError
        If ``stop`` is set.
    """
    given = process.jobs_given > 0
    if given:
        process.give(order)
    last: tuple[str, float] = ("load", 0.0)
    began = advanced = renewed = time.monotonic()
    renew_every_s = min(settings.lease_s / 3, _RENEW_AT_LEAST_EVERY_S)
    while True:
        if stop.is_set():
            raise StoppingError
        answer = process.next_answer(timeout_s=_LISTEN_S)
        now = time.monotonic()
        if isinstance(answer, Ready):
            if given:
                raise _unexpected()
            given, advanced = True, now
            process.give(order)
        elif answer is not None:
            if isinstance(answer, Failed) and answer.job_id is None:
                return answer  # the model could not be loaded
            if (answer.job_id, answer.attempt) != (order.job_id, order.attempt):
                raise _unexpected()  # what is said of another attempt is never taken for this one's
            if not isinstance(answer, Advance):
                return answer
            if (answer.stage, answer.fraction) != last:
                last, advanced = (answer.stage, answer.fraction), now
        if now - advanced > settings.stall_timeout_s:
            raise AttemptError(
                "CHILD_STALLED",
                f"The inference process made no progress for {now - advanced:.0f} s (stage {last[0]}).",
                remedy="Look at the load of the machine; raise worker.stall_timeout_s if it is so slow.",
            )
        if now - began > settings.job_deadline_s:
            raise AttemptError(
                "DEADLINE_EXCEEDED",
                f"The attempt took longer than {settings.job_deadline_s:g} s (stage {last[0]}).",
                remedy="Use a faster machine or model, or raise worker.job_deadline_s.",
            )
        if now - renewed >= renew_every_s:
            renew(*last)
            renewed = now


def _unexpected() -> AttemptError:
    return AttemptError(
        "PROTOCOL",
        "The inference process spoke of another attempt than the one it was given.",
        remedy="Report this with the log of the worker.",
    )
