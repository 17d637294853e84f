"""The doorbell wakes workers, comes back after every kind of loss, and never decides anything."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import scripted_child
from redis_server import RedisServer
from small_node import make_node
from waiting import wait_until

from service import inference
from service.records.database import utc_now
from service.records.jobs import enqueue
from service.records.tables import JobOrigin, JobState
from service.records.work import NewInput, NewJob
from service.tasks import RING, Listener, Ringer, make_app, ring_once
from service.worker import Worker


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as running:
        yield running


def listener(server: RedisServer, owner: str = "w") -> Listener:
    return Listener(make_app(server.url), owner, check_every_s=0.1, silent_after_s=1.0)


def ring(server: RedisServer) -> None:
    app = make_app(server.url)
    with app.connection_for_write() as connection:
        ring_once(app, connection)


def test_everyone_who_listens_hears_a_ring(server: RedisServer) -> None:
    with listener(server, "a") as a, listener(server, "b") as b:
        wait_until(lambda: a.is_proven and b.is_proven)
        before = a.rings, b.rings
        ring(server)
        assert a.wait(before[0], 10)
        assert b.wait(before[1], 10)
        assert not a.wait(a.rings, 0.3)  # its own checks are no rings


def test_a_ringer_rings_from_a_thread_of_its_own(server: RedisServer) -> None:
    ringer = Ringer(make_app(server.url))
    with listener(server) as bell:
        wait_until(lambda: bell.is_proven)
        before = bell.rings
        ringer.ring()
        assert bell.wait(before, 10)
    ringer.close()


def test_a_listener_hears_again_after_the_broker_was_killed_and_came_back(server: RedisServer) -> None:
    with listener(server) as bell:
        wait_until(lambda: bell.is_proven)
        server.kill()
        wait_until(lambda: not bell.is_proven)
        server.start()
        wait_until(lambda: bell.is_proven)
        before = bell.rings
        ring(server)
        assert bell.wait(before, 10)


class DeafAtFirst(Listener):
    """Its first connection is open and brings nothing, as after some reconnects of Celery's own consumer."""

    connections = 0

    def _listening(self) -> AbstractContextManager[Any]:
        self.connections += 1
        return super()._listening()

    def _on_ring(self, body: Any, message: Any) -> None:
        if self.connections > 1:
            super()._on_ring(body, message)


def test_a_connection_that_is_open_and_brings_nothing_is_made_anew(server: RedisServer) -> None:
    with DeafAtFirst(make_app(server.url), "w", check_every_s=0.1, silent_after_s=0.5) as bell:
        wait_until(lambda: bell.connections == 1)
        assert not bell.is_proven  # so the worker goes on looking by itself
        wait_until(lambda: bell.is_proven)
        assert bell.connections == 2
        before = bell.rings
        ring(server)
        assert bell.wait(before, 10)


def test_losing_and_flushing_the_broker_is_no_error_for_who_rings(server: RedisServer) -> None:
    ringer = Ringer(make_app(server.url))
    server.kill()
    ringer.ring()
    time.sleep(0.1)
    server.start()
    with listener(server) as bell, server.client() as client:
        wait_until(lambda: bell.is_proven)
        client.flushall()
        before = bell.rings
        ringer.ring()
        assert bell.wait(before, 10)
    ringer.close()


def test_nothing_is_stored_in_the_broker_and_nothing_comes_back(server: RedisServer) -> None:
    """No message waits for an acknowledgement: a visibility time-out has none to deliver again."""
    with listener(server) as bell, server.client() as client:
        wait_until(lambda: bell.is_proven)
        for _ in range(20):
            ring(server)
        kept = {key.decode() for key in client.keys("*")}
        assert kept <= {f"_kombu.binding.{RING}", f"_kombu.binding_permanent.{RING}"}


def test_rings_that_come_twice_or_late_run_nothing_twice(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As brokers deliver again what was not acknowledged in time: the records say what there is to do."""
    (tmp_path / "script.json").write_text(json.dumps(["succeed_after 0.5", "succeed"]))
    monkeypatch.setattr(inference, "COMMAND", (sys.executable, scripted_child.__file__, str(tmp_path)))
    node = make_node(tmp_path / "node", worker={"idle_poll_interval_s": 600.0, "runtime": "onnxruntime"})
    node.add_model(tmp_path / "bundle")
    stop = threading.Event()
    with listener(server) as bell:
        wait_until(lambda: bell.is_proven)
        worker = Worker(node.settings, node.records, node.spool, node.registry, bell=bell)
        thread = threading.Thread(target=worker.run, args=(stop,))
        thread.start()
        with node.records.write() as session:
            new = NewJob(JobOrigin.UPLOAD, "threshold", "k", [NewInput("uploads/x.nii")])
            enqueue(session, new, at=utc_now())
        for _ in range(5):
            ring(server)
        wait_until((tmp_path / "0.given").exists)
        for _ in range(5):
            ring(server)
        wait_until(lambda: node.jobs()[0].state is JobState.SUCCEEDED)
        before = bell.rings
        ring(server)  # much later
        assert bell.wait(before, 10)
        time.sleep(0.2)  # in which a worker that believed the ring would begin
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    assert [job.attempt for job in node.jobs()] == [1]
    assert len(list(tmp_path.glob("*.given"))) == 1
    node.records.close()


@pytest.mark.parametrize("message", [b"", b"garbage", b"{}", b"[1, 2", b"\xff\xfe", b'{"body": "x"}'])
def test_a_message_that_nobody_can_read_silences_no_one(server: RedisServer, message: bytes) -> None:
    with listener(server) as bell, server.client() as client:
        wait_until(lambda: bell.is_proven)
        (channel,) = [name for name in (c.decode() for c in _channels(server)) if RING in name]
        client.publish(channel, message)
        time.sleep(0.2)
        before = bell.rings
        wait_until(lambda: bell.is_proven)
        ring(server)
        assert bell.wait(before, 10)


def _channels(server: RedisServer) -> list[bytes]:
    with server.client() as client:
        return list(client.pubsub_channels()) or [f"/0.{RING}".encode()]
