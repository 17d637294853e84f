"""What is answered with success is on the disk: the order of the system calls, and what a kill leaves.

The first test reads a trace of the kernel's. Where tracing is not permitted (in many containers), the second
says the same from inside the process. Both follow each C-STORE from its temporary file to its response.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dicom_peer import associated, data_set_of, encode, make_object, node_settings
from sqlalchemy import event

from service.dicom.receive import Receiver
from service.records.database import Records
from service.records.migrate import upgrade
from service.spool import Spool

_ROOT = Path(__file__).parents[2]
_OBJECTS = 3


@contextmanager
def receiver_process(data_dir: Path, *prefix: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A receiver of its own process, optionally under another program; and its port."""
    support = _ROOT / "tests" / "support"
    process = subprocess.Popen(
        [*prefix, sys.executable, str(support / "receiver_process.py"), str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(_ROOT), str(support)))},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.strip():
            raise RuntimeError(f"the receiver did not start: exit status {process.wait(20)}")
        yield process, int(line)
        process.stdin.close()
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdin.close()
        process.stdout.close()


def _can_trace(strace: Path) -> bool:
    attempt = subprocess.run([strace, "-e", "trace=none", "true"], capture_output=True, check=False)
    return attempt.returncode == 0


_CALL = re.compile(r"^(?P<pid>\d+) +(?P<name>\w+)\((?P<fd>\d+)<(?P<path>[^>]*)>(?P<rest>.*)$")
_RENAME = re.compile(r"^\d+ +rename(?:at2?)?\(.*?\"(?P<old>[^\"]*)\".*?\"(?P<new>[^\"]*)\"")


def _steps(trace: str, data_dir: Path) -> list[str]:
    """The trace as words: what was synced, renamed, or answered, in the order in which it was done.

    A call that another thread interrupted stands twice in a trace; its end is what counts for a sync.
    """
    steps = []
    unfinished: dict[str, str] = {}
    for line in trace.splitlines():
        pid = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            unfinished[pid] = line.removesuffix("<unfinished ...>")
            if "TCP:[" in line and "send" in line:  # a response is out as soon as its call begins
                steps.append("send")
            continue
        resumed = re.match(r"^\d+ +<\.\.\. \w+ resumed>(.*)$", line)
        if resumed:
            line = unfinished.pop(pid, "") + resumed[1]
            if "TCP:[" in line:
                continue
        if rename := _RENAME.match(line):
            if "/instances/" in rename["new"]:
                steps.append("rename")
            continue
        call = _CALL.match(line)
        if call is None:
            continue
        path = call["path"]
        if call["name"] in ("sendto", "sendmsg", "write") and "TCP:[" in line:
            steps.append("send")
        elif call["name"] in ("fsync", "fdatasync"):
            assert line.rstrip().endswith("= 0"), line
            if "/incoming/" in path:
                steps.append("fsync file")
            elif "/instances/" in path:
                steps.append("fsync folder")
            elif path.endswith("-wal"):
                steps.append("fsync records")
    return steps


_EVERY_STEP = ["fsync file", "rename", "fsync folder", "fsync records", "send"]


def _one_store(steps: list[str]) -> list[str]:
    """Drop the syncs that happen once (a checkpoint, a new folder) and keep the order of the rest."""
    return [step for step, following in zip(steps, [*steps[1:], ""], strict=True) if step != following]


@pytest.mark.skipif(sys.platform != "linux", reason="strace traces Linux")
def test_the_kernel_saw_every_sync_before_the_response(
    tmp_path: Path, require_tool: Callable[[str], Path]
) -> None:
    strace = require_tool("strace")
    if not _can_trace(strace):
        pytest.skip("this machine does not permit tracing; the test below looks from inside")
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg"
    prefix = (str(strace), "-f", "-yy", "-s", "256", "-e", calls, "-o", str(trace))
    data_dir = tmp_path / "node"
    with receiver_process(data_dir, *prefix) as (_, port), associated(port, timeout_s=60) as sender:
        for number in range(_OBJECTS):
            assert sender.store(make_object(number)) == 0x0000
    steps = _steps(trace.read_text(), data_dir)
    accept, *stores = _split_at_files(steps)
    assert accept[-1] == "send"  # the A-ASSOCIATE-AC
    assert len(stores) == _OBJECTS
    for store in stores[:-1]:
        assert _one_store(store) == _EVERY_STEP
    assert _one_store(stores[-1])[:5] == _EVERY_STEP  # the release and the last checkpoint follow


def _split_at_files(steps: list[str]) -> list[list[str]]:
    """Cut the steps where the file of the next object is synced; what its new folder needs goes before."""
    parts: list[list[str]] = [[]]
    for at, step in enumerate(steps):
        if step == "fsync file":
            parts.append([])
        elif step == "fsync folder" and steps[at + 1 : at + 2] == ["fsync file"]:
            continue
        parts[-1].append(step)
    return parts


def test_the_process_saw_every_sync_before_the_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = node_settings(tmp_path / "node")
    upgrade(settings.records_url)
    records = Records(settings.records_url)
    spool = Spool(settings.spool_dir)
    for prefix in range(256):  # so that no new folder is in the way
        spool.make_folder(spool.instances_dir / f"{prefix:02x}")
    receiver = Receiver(settings, records, spool)
    receiver.start()
    steps: list[str] = []
    fsync, rename, send = os.fsync, Path.rename, socket.socket.send

    def traced_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append("fsync file" if "/incoming/" in path else "fsync folder")

    def traced_rename(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        steps.append("rename")
        return renamed

    def traced_send(self: socket.socket, data: bytes, *flags: int) -> int:
        if self.getsockname()[1] == receiver.port:
            steps.append("send")
        return send(self, data, *flags)

    def traced_commit(_connection: object) -> None:
        steps.append("fsync records")

    try:
        with associated(receiver.port) as sender:
            monkeypatch.setattr(os, "fsync", traced_fsync)
            monkeypatch.setattr(Path, "rename", traced_rename)
            monkeypatch.setattr(socket.socket, "send", traced_send, raising=False)
            event.listen(records.engine, "commit", traced_commit)
            with records.read() as session:  # a commit is a sync only with these
                driver = session.connection().connection.driver_connection
                assert isinstance(driver, sqlite3.Connection)
                assert driver.execute("PRAGMA journal_mode").fetchone() == ("wal",)
                assert driver.execute("PRAGMA synchronous").fetchone() == (2,)
            for number in range(_OBJECTS):
                assert sender.store(make_object(number)) == 0x0000
            monkeypatch.undo()
    finally:
        receiver.stop()
        records.close()
    assert steps == _EVERY_STEP * _OBJECTS


@pytest.mark.parametrize("after", [1, 7])
def test_a_kill_in_the_middle_loses_nothing_that_was_acknowledged(tmp_path: Path, after: int) -> None:
    data_dir = tmp_path / "node"
    settings = node_settings(data_dir)
    acknowledged: dict[str, bytes] = {}
    with receiver_process(data_dir) as (process, port), associated(port) as sender:
        for number in range(after):
            dataset = make_object(number)
            assert sender.store(dataset) == 0x0000
            acknowledged[dataset.SOPInstanceUID] = encode(dataset)
        # The next object is on its way, and the process dies at whatever point of it.
        killer = threading.Timer(0.005 * after, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        number = after
        while True:
            dataset = make_object(number, PixelData=b"\0" * 400_000)
            try:
                status = sender.store(dataset)
            except (AssertionError, RuntimeError):
                break
            if status is None:
                break
            assert status == 0x0000
            acknowledged[dataset.SOPInstanceUID] = encode(dataset)
            number += 1
        killer.join()
        process.wait(20)

    # A new receiver starts on what is there; every acknowledged object is in the records and on the disk.
    records = Records(settings.records_url)
    spool = Spool(settings.spool_dir)
    receiver = Receiver(settings, records, spool)
    receiver.start()
    receiver.stop()
    with sqlite3.connect(data_dir / "segnode.sqlite") as database:
        rows = dict(database.execute("SELECT sop_instance_uid, path FROM instance"))
    database.close()
    records.close()
    assert acknowledged.keys() <= rows.keys()
    assert len(rows) <= len(acknowledged) + 1  # one may have been kept whose answer did not get out
    for sop_instance_uid, data_set in acknowledged.items():
        assert data_set_of(spool.absolute(rows[sop_instance_uid]).read_bytes()) == data_set
    on_disk = set(spool.instances_dir.rglob("*.dcm"))
    assert on_disk == {spool.absolute(path) for path in rows.values()}
    assert list(spool.incoming_dir.iterdir()) == []
