"""The supervisor: what dies is started again, what cannot start stops the whole, and nobody is orphaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from service.components import PortInUseError, listen
from service.serve import AlreadyRunningError, Program, StartError, Supervisor, only_one, write_ports

READY = """
    import json, os, sys
    print(json.dumps({"port": int(os.environ.get("FIXED_PORT", 0)) or 4711}), flush=True)
"""


def program(name: str, body: str, *arguments: object, port_variable: str | None = None) -> Program:
    code = textwrap.dedent(READY) + textwrap.dedent(body)
    return Program(name, [sys.executable, "-c", code, *map(str, arguments)], port_variable)


OBEDIENT = "sys.stdin.read()"
LOGS_ITS_STARTS = """
    with open(sys.argv[1], "a") as file:
        print(os.getpid(), os.environ.get("FIXED_PORT", "-"), file=file)
    sys.stdin.read()
    open(sys.argv[1] + ".drained", "w").close()
"""


class Running:
    """A supervisor in a thread of its own."""

    def __init__(self, programs: list[Program], *, drain_s: float = 10.0) -> None:
        self.stop = threading.Event()
        self.ports: list[Mapping[str, int | None]] = []
        self.error: BaseException | None = None
        self._supervisor = Supervisor(
            programs, on_ready=self.ports.append, first_pause_s=0.05, drain_s=drain_s
        )
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._supervisor.run(self.stop)
        except StartError as error:
            self.error = error

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


def starts(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_the_ports_of_all_are_told_once_all_are_ready(tmp_path: Path) -> None:
    with Running([program("a", OBEDIENT), program("b", OBEDIENT)]) as running:
        wait_until(lambda: bool(running.ports))
    assert running.ports == [{"a": 4711, "b": 4711}]
    assert running.error is None


def test_a_killed_process_is_started_again_on_the_port_it_had(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    with Running([program("a", LOGS_ITS_STARTS, log, port_variable="FIXED_PORT")]) as running:
        wait_until(lambda: bool(running.ports) and len(starts(log)) == 1)
        for n in (2, 3):
            os.kill(int(starts(log)[-1][0]), signal.SIGKILL)
            wait_until(lambda n=n: len(starts(log)) == n)
    assert [port for _, port in starts(log)] == ["-", "4711", "4711"]
    assert len(running.ports) == 1


def test_the_pause_doubles_with_every_death_in_a_row(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    dies_when_told = """
        with open(sys.argv[1], "a") as file:
            print(os.getpid(), file=file)
        if sys.stdin.read(1) == "":
            sys.exit(0)
    """
    pauses: list[float] = []

    class Recording(Supervisor):
        def _start(self, wanted: Program) -> None:
            pauses.append(time.monotonic())
            super()._start(wanted)

    stop = threading.Event()
    supervisor = Recording([program("a", dies_when_told, log)], on_ready=lambda _: None, first_pause_s=0.3)
    thread = threading.Thread(target=supervisor.run, args=(stop,))
    thread.start()
    for n in (1, 2, 3):
        wait_until(lambda n=n: len(starts(log)) == n)
        os.kill(int(starts(log)[-1][0]), signal.SIGKILL)
    wait_until(lambda: len(starts(log)) == 4)
    stop.set()
    thread.join(20)
    gaps = [later - earlier for earlier, later in pairwise(pauses)]
    assert [gap >= minimum for gap, minimum in zip(gaps, (0.3, 0.6, 1.2), strict=True)] == [True] * 3


def test_stopping_lets_processes_finish_first(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    with Running(
        [
            program(
                "a",
                "import signal; signal.signal(15, lambda *_: None)" + textwrap.dedent(LOGS_ITS_STARTS),
                log,
            )
        ]
    ) as running:
        wait_until(lambda: bool(running.ports) and bool(starts(log)))
    assert (tmp_path / "starts.drained").exists()


def test_a_process_that_does_not_stop_is_killed_after_the_drain_time(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    stubborn = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open(sys.argv[1], "a") as file:
            print(os.getpid(), file=file)
        time.sleep(600)
    """
    with Running([program("a", stubborn, log)], drain_s=0.3) as running:
        wait_until(lambda: bool(running.ports) and bool(starts(log)))
    assert not psutil.pid_exists(int(starts(log)[0][0]))


def test_a_process_that_cannot_start_stops_the_whole(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    broken = Program("b", [sys.executable, "-c", "raise SystemExit(7)"])
    with Running([program("a", LOGS_ITS_STARTS, log), broken]) as running:
        running.thread.join(20)
    assert isinstance(running.error, StartError)
    assert "b ended with status 7" in running.error.message
    assert running.ports == []
    assert all(not psutil.pid_exists(int(pid)) for pid, _ in starts(log))


def test_processes_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    script = tmp_path / "supervise.py"
    child = program("a", LOGS_ITS_STARTS, log)
    script.write_text(
        "import threading\n"
        "from service.logs import configure_logging\n"
        "from service.serve import Program, Supervisor\n"
        "configure_logging()\n"
        "import sys\n"
        "def ready(ports): print(ports, flush=True)\n"
        "Supervisor([Program('a', sys.argv[1:])], on_ready=ready).run(threading.Event())\n"
    )
    supervisor = subprocess.Popen(
        [sys.executable, str(script), *child.command], stdout=subprocess.PIPE, text=True
    )
    with supervisor:
        assert supervisor.stdout is not None
        assert "4711" in supervisor.stdout.readline()
        wait_until(lambda: bool(starts(log)))
        supervisor.kill()
    wait_until((tmp_path / "starts.drained").exists)
    wait_until(lambda: not psutil.pid_exists(int(starts(log)[0][0])))


def test_one_supervisor_a_data_folder(tmp_path: Path) -> None:
    again = only_one(tmp_path)
    with only_one(tmp_path), pytest.raises(AlreadyRunningError, match=str(os.getpid())):
        again.__enter__()
    with only_one(tmp_path):
        pass


def test_the_file_of_ports_is_whole_json(tmp_path: Path) -> None:
    write_ports(tmp_path / "ports.json", {"receive": 1, "api": 2, "worker": None})
    assert json.loads((tmp_path / "ports.json").read_text()) == {"dicom": 1, "http": 2, "pid": os.getpid()}
    assert [p.name for p in tmp_path.iterdir()] == ["ports.json"]


def test_a_port_in_use_is_an_error_that_says_what_to_do() -> None:
    with listen("HTTP", "127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{port}") as caught:
            listen("HTTP", "127.0.0.1", port)
    assert "configure another port" in caught.value.remedy
