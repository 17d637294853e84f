"""The inference process as the worker sees it: started, spoken to, listened to, killed."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from typing import IO

from service.errors import AttemptError
from service.protocol import (
    MAXIMUM_LINE_BYTES,
    Advance,
    Failed,
    OpenModel,
    Ready,
    Refused,
    RunJob,
    Succeeded,
    parse_answer,
)

_END_WAIT_S = 10.0
COMMAND = (sys.executable, "-m", "service.child")


class InferenceProcess:
    """A running ``service.child``. A new interpreter is started, never a fork of the worker's threads.

    Parameters
    ----------
    model : OpenModel
        What it loads; loading goes on after this returns, and ends with ``Ready`` or ``Failed``.
    """

    def __init__(self, model: OpenModel) -> None:
        self.digest = model.digest
        self.jobs_given = 0
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for the worker, which then ends this
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(
            target=_pump, args=(self._stdout, self._lines), name="inference", daemon=True
        ).start()
        self._say(model.to_line())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def give(self, job: RunJob) -> None:
        """Give it a job. If it is dead, :meth:`next_answer` says so."""
        self.jobs_given += 1
        self._say(job.to_line())

    def _say(self, line: bytes) -> None:
        """Write a line from a thread of its own: a process that hangs must not make the worker hang too."""

        def write() -> None:
            # If it is dead, its end of the other pipe says so, after its last words.
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._stdin.write(line)
                self._stdin.flush()

        threading.Thread(target=write, name="inference-stdin", daemon=True).start()

    def next_answer(self, *, timeout_s: float) -> Ready | Advance | Succeeded | Refused | Failed | None:
        """The next thing it says; None if it says nothing in time.

        Raises
        ------
        AttemptError
            CHILD_DIED if it has ended, PROTOCOL if it says what it should not.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
            raise self._death()
        return parse_answer(line)

    def _death(self) -> AttemptError:
        """Why it ended, in a sentence."""
        status = self._process.wait(_END_WAIT_S)
        if status == -signal.SIGKILL:
            return AttemptError(
                "OUT_OF_MEMORY",
                "The inference process was killed (signal 9), most probably because memory ran out.",
                remedy="Look for 'Out of memory' in the host's kernel log; give the node more memory.",
            )
        how = f"with exit status {status}"
        if status < 0:
            how = f"by signal {-status} ({signal.Signals(-status).name})"
        return AttemptError(
            "CHILD_DIED",
            f"The inference process ended {how} in the middle of the job.",
            remedy="Report this with the log of the worker.",
        )

    def kill(self) -> None:
        """End it now, whatever it does, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self._close()

    def end(self) -> None:
        """Let it end by itself, which an idle process does at once; kill it if it does not."""
        try:
            self._stdin.close()
            self._process.wait(_END_WAIT_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # of what was not read any more
            self._stdin.close()


def _pump(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    """Pass on every line, then None: the process has closed its end."""
    with stream:
        while line := stream.readline(MAXIMUM_LINE_BYTES):
            lines.put(line)
    lines.put(None)
