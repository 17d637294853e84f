"""The inference process: ``python -m service.child``, started and watched by the worker.

It holds one model for as long as it lives, and runs one job at a time. The worker may kill it at any
moment; whatever it had begun to write is then incomplete and under a name that nobody reads. It ends when
its standard input does, so it never outlives its worker.

Standard output belongs to the protocol: what libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from models.bundle import Bundle
from models.errors import BundleError, Refusal, SegnodeError
from models.segmenter import Progress, Segmenter
from service import pipeline
from service.lifetime import standard_input
from service.logs import configure_logging, get_logger
from service.protocol import (
    Advance,
    Failed,
    OpenModel,
    Ready,
    Refused,
    RunJob,
    Succeeded,
    WrittenFile,
)

log = get_logger(__name__)

Say = Callable[[Ready | Advance | Succeeded | Refused | Failed], None]


def main() -> int:
    """Load the model that the first line names, then run the jobs of the lines that follow."""
    answers = _take_standard_output()
    configure_logging(component="inference")
    _be_first_when_memory_runs_out()
    lines = _read_lines(standard_input())

    def say(answer: Ready | Advance | Succeeded | Refused | Failed) -> None:
        answers.write(answer.to_line())
        answers.flush()

    try:
        opening = OpenModel.model_validate_json(lines.get())
        logging.getLogger().setLevel(opening.log_level)
        bundle, segmenter = open_model(opening)
    except Exception as error:
        log.exception("inference.model_not_loaded")
        say(describe_failure(error))
        return 1
    say(Ready())
    while True:
        run_job(RunJob.model_validate_json(lines.get()), bundle, segmenter, say)


def open_model(opening: OpenModel) -> tuple[Bundle, Segmenter]:
    """Open and load a bundle.

    Raises
    ------
    BundleError
        If it is not the one whose digest was named.
    SegnodeError
        If it cannot be opened, or not run here.
    """
    bundle = Bundle.open(opening.bundle)
    if bundle.digest != opening.digest:
        raise BundleError(
            f"The model on the disk has the digest {bundle.digest}, not {opening.digest}.",
            remedy="Look for who changes files in the models folder; add the model again.",
        )
    return bundle, Segmenter(
        bundle,
        runtime=opening.runtime,
        threads=opening.threads,
        cache_dir=opening.cache_dir,
        memory_limit=opening.memory_bytes,
    )


def run_job(order: RunJob, bundle: Bundle, segmenter: pipeline.SegmentsVolumes, say: Say) -> None:
    """Run one attempt and say how it ended; nothing that it raises is lost, and nothing else is said."""

    def advance(progress: Progress) -> None:
        say(
            Advance(
                job_id=order.job_id,
                attempt=order.attempt,
                stage=progress.stage,
                fraction=pipeline.overall_fraction(progress),
            )
        )

    try:
        outcome = pipeline.run(order.job, segmenter, bundle.manifest, bundle.digest, progress=advance)
    except Refusal as refusal:
        say(
            Refused(
                job_id=order.job_id,
                attempt=order.attempt,
                code=refusal.reason.value,
                message=refusal.message,
                remedy=refusal.remedy,
            )
        )
    except Exception as error:
        log.exception("inference.attempt_failed", job_id=order.job_id, attempt=order.attempt)
        failure = describe_failure(error)
        say(failure.model_copy(update={"job_id": order.job_id, "attempt": order.attempt}))
    else:
        say(
            Succeeded(
                job_id=order.job_id,
                attempt=order.attempt,
                files=tuple(WrittenFile(**vars(file)) for file in outcome.files),
                runtime=outcome.runtime,
                precision=outcome.precision,
                summary=outcome.summary,
            )
        )


def describe_failure(error: Exception) -> Failed:
    """A failure as the records keep it: of a foreign exception, whose text may quote a patient, the type."""
    if isinstance(error, SegnodeError):
        return Failed(code=error.code, message=error.message, remedy=error.remedy, retryable=error.retryable)
    if isinstance(error, MemoryError):
        return Failed(
            code="OUT_OF_MEMORY",
            message="There was not enough memory to segment this volume.",
            remedy="Give the node more memory, or crop the volume.",
            retryable=True,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed(
            code="STORAGE_FULL",
            message="The disk was full before the results were written.",
            remedy="Free space on the disk of the data folder.",
            retryable=True,
        )
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {place[0].name}, line {place[0].lineno}" if place else ""
    return Failed(
        code="INTERNAL_ERROR",
        message=f"An unexpected {type(error).__name__} ended the attempt{where}.",
        remedy="Report this with the log of the worker.",
        retryable=True,
    )


def _take_standard_output() -> BinaryIO:
    """Keep standard output for the protocol, and send what anyone else writes there to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _be_first_when_memory_runs_out() -> None:
    """Have the kernel kill this process before the worker or the receiver: its job can be run again."""
    with contextlib.suppress(OSError):  # where there is no such file, the kernel decides by size
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def _read_lines(stream: BinaryIO) -> queue.Queue[bytes]:
    """The lines of a stream, read by a thread that ends the process when the stream ends."""
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)  # the worker is gone or wants no more: at once, whatever is being run

    threading.Thread(target=read, name="stdin", daemon=True).start()
    return lines


if __name__ == "__main__":
    sys.exit(main())
