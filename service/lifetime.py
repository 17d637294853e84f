"""When a process of the node ends: on a signal, or when the process that started it is gone."""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any, BinaryIO, TextIO


def stop_on_signals(*, supervised: bool = False) -> threading.Event:
    """An event that SIGTERM sets, and SIGINT too unless a supervisor answers it for this process."""
    stop = threading.Event()

    def _stop(_number: int, _frame: Any) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN if supervised else _stop)
    return stop


def standard_input() -> BinaryIO:
    """Standard input for a thread to wait in, until the process ends.

    Not ``sys.stdin``: who waits in that keeps its buffer's lock, and the interpreter cannot end.
    """
    return open(sys.stdin.fileno(), "rb", closefd=False)


def stop_on_end_of(stream: BinaryIO, stop: threading.Event) -> None:
    """Set ``stop`` when a stream ends: the pipe from a parent does so however the parent dies."""

    def _watch() -> None:
        while stream.read(1):
            pass
        stop.set()

    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def announce(component: str, port: int | None, stream: TextIO | None = None) -> None:
    """Tell the supervisor, by a line on standard output, that a part is ready."""
    print(json.dumps({"component": component, "port": port}), file=stream or sys.stdout, flush=True)
