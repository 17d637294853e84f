"""``segnode serve``: receiver, HTTP interface and worker as three processes under one supervisor.

A process that dies is started again, after a pause that doubles with every death in a row. The supervisor
holds a pipe to each: when it dies itself, in whatever way, the pipes end and the processes stop. One that
cannot even start the first time stops the whole: that is a wrong configuration, and nobody should have to
look for it in the log of a node that seems to run.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import SegnodeError
from service.logs import get_logger

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_AFTER_S = 60.0  # a process that lived so long starts counting its deaths anew
DRAIN_S = 30.0
_POLL_S = 0.1

log = get_logger(__name__)


class StartError(SegnodeError):
    """Raised when a process of the node ends before it was ready for the first time."""

    code = "START_FAILED"


class AlreadyRunningError(SegnodeError):
    """Raised when another ``segnode serve`` works on the same data folder."""

    code = "ALREADY_RUNNING"


@dataclass(frozen=True)
class Program:
    """How a process is started. ``port_variable`` names the environment variable that fixes its port."""

    name: str
    command: Sequence[str]
    port_variable: str | None = None


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[str]
    started_at: float
    port: int | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    listener: threading.Thread | None = None


class Supervisor:
    """Keeps a set of processes running until it is told to stop.

    Parameters
    ----------
    programs : sequence of Program
        What to run. Each must write one line of JSON, ``{"port": …}``, to standard output when it is ready,
        and stop when its standard input ends.
    on_ready : callable
        Called once, when all of them are ready, with the port of each by name.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        on_ready: Callable[[Mapping[str, int | None]], None],
        first_pause_s: float = FIRST_PAUSE_S,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._programs = programs
        self._on_ready = on_ready
        self._first_pause_s = first_pause_s
        self._drain_s = drain_s
        self._children: dict[str, _Child] = {}
        self._ports: dict[str, int] = {}
        self._deaths: dict[str, int] = {}
        self._due: dict[str, float] = {}

    def run(self, stop: threading.Event) -> None:
        """Start everything, watch it, and stop it all when ``stop`` is set.

        Raises
        ------
        StartError
            If one of the processes ends before it is ready for the first time.
        """
        try:
            for program in self._programs:
                self._start(program)
            if self._wait_until_ready(stop):
                self._on_ready({name: child.port for name, child in self._children.items()})
            while not stop.wait(_POLL_S):
                self._look_after_children()
        finally:
            self._stop_all()

    def _start(self, program: Program) -> None:
        environment = dict(os.environ)
        if program.port_variable and program.name in self._ports:
            environment[program.port_variable] = str(self._ports[program.name])
        process = subprocess.Popen(
            program.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        child = _Child(program, process, time.monotonic())
        self._children[program.name] = child
        child.listener = threading.Thread(target=self._listen, args=(child,), name=program.name, daemon=True)
        child.listener.start()
        log.info("process.started", process=program.name, pid=process.pid)

    def _listen(self, child: _Child) -> None:
        """Read what a process says on standard output: the line that it is ready, and nothing after."""
        assert child.process.stdout is not None
        with child.process.stdout as lines:
            for line in lines:
                if not child.ready.is_set():
                    child.port = json.loads(line)["port"]
                    if child.port is not None:  # a restart takes it again, where any was good at first
                        self._ports[child.program.name] = child.port
                    child.ready.set()

    def _wait_until_ready(self, stop: threading.Event) -> bool:
        while not all(child.ready.is_set() for child in self._children.values()):
            for child in self._children.values():
                status = child.process.poll()
                if status is not None and not child.ready.is_set() and not stop.is_set():
                    raise StartError(
                        f"The node does not start: {child.program.name} ended with status {status}.",
                        remedy="The lines above say why; segnode doctor looks for more.",
                    )
            if stop.wait(_POLL_S):
                return False
        return True

    def _look_after_children(self) -> None:
        now = time.monotonic()
        for name, child in list(self._children.items()):
            if name in self._due:
                if now >= self._due[name]:
                    del self._due[name]
                    self._start(child.program)
                continue
            status = child.process.poll()
            if status is None:
                if now - child.started_at > STEADY_AFTER_S:
                    self._deaths.pop(name, None)
                continue
            self._deaths[name] = self._deaths.get(name, 0) + 1
            pause_s = min(LONGEST_PAUSE_S, self._first_pause_s * 2 ** (self._deaths[name] - 1))
            self._due[name] = now + pause_s
            _close(child)
            log.error("process.died", process=name, status=status, again_in_s=pause_s)

    def _stop_all(self) -> None:
        alive = [c for c in self._children.values() if c.process.poll() is None]
        for child in alive:
            _close(child)
            child.process.terminate()
        deadline = time.monotonic() + self._drain_s
        for child in alive:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("process.killed", process=child.program.name, after_s=self._drain_s)
                child.process.kill()
                child.process.wait()
        for child in self._children.values():
            _close(child)
            assert child.listener is not None
            child.listener.join(1.0)
            log.info("process.ended", process=child.program.name, status=child.process.returncode)


def _close(child: _Child) -> None:
    """Close the pipe that keeps a process running."""
    assert child.process.stdin is not None
    child.process.stdin.close()


def node_programs(config: Path | None, settings_ports: Mapping[str, int]) -> list[Program]:
    """The three processes of a node. ``settings_ports`` are the configured ones; 0 is fixed once known."""
    options = ["--supervised", *(("--config", str(config)) if config else ())]
    variables = {"receive": "SEGNODE_DICOM__PORT", "api": "SEGNODE_HTTP__PORT"}
    return [
        Program(
            name,
            [sys.executable, "-m", "service.cli", name, *options],
            variables.get(name) if settings_ports.get(name) == 0 else None,
        )
        for name in ("receive", "api", "worker")
    ]


@contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data folder for this supervisor alone. Raises AlreadyRunningError."""
    path = data_dir / "serve.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise AlreadyRunningError(
                f"A node runs on {data_dir} already (process {file.read().strip() or 'unknown'}).",
                remedy="Stop it first, or give this one a data_dir of its own.",
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def write_ports(path: Path, ports: Mapping[str, int | None]) -> None:
    """Write which ports the node listens on, as JSON, at once and complete."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(
        json.dumps({"dicom": ports["receive"], "http": ports["api"], "pid": os.getpid()}) + "\n"
    )
    os.replace(unfinished, path)
