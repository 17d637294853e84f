"""Several workers on PostgreSQL: whatever dies, each study gives exactly one result."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import fleet_settings, put_studies, running_of, worker_process
from postgresql import PostgresServer
from redis_server import RedisServer
from small_node import SmallNode, make_node
from sqlalchemy import select
from waiting import wait_until

from service.records.tables import Job, JobState, Result
from service.tasks import make_app, ring_once

STUDIES = 40


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def ended(node: SmallNode) -> int:
    return sum(job.state is JobState.SUCCEEDED for job in node.jobs())


def kill_at_work(node: SmallNode, worker: subprocess.Popen[str]) -> Job:
    """SIGKILL to a worker that holds a job at that moment; the job."""
    deadline = time.monotonic() + 60
    while True:
        worker.send_signal(signal.SIGSTOP)
        if held := running_of(node, worker.pid):
            worker.kill()
            worker.wait()
            return held[0]
        worker.send_signal(signal.SIGCONT)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_one_result_each(node: SmallNode, count: int) -> None:
    jobs = node.jobs()
    assert Counter(job.state for job in jobs) == {JobState.SUCCEEDED: count}
    assert len({job.study_instance_uid for job in jobs}) == count
    with node.records.read() as session:
        results = list(session.scalars(select(Result)))
    attempts = {job.job_id: str(job.attempt) for job in jobs}
    kinds = Counter((result.job_id, result.kind) for result in results)
    assert set(kinds.values()) == {1}
    assert {job_id for job_id, _ in kinds} == attempts.keys()
    paths = {node.spool.absolute(result.path) for result in results}
    folders = {path.parent for path in paths}
    assert {(folder.parent.name, folder.name) for folder in folders} == set(attempts.items())
    assert {path for path in node.spool.results_dir.rglob("*") if path.is_file()} == paths


def test_two_workers_share_forty_studies_and_one_is_killed(
    tmp_path: Path, postgresql: PostgresServer, broker: RedisServer
) -> None:
    with postgresql.database() as url:
        settings = fleet_settings(url, broker.url)
        node = make_node(tmp_path / "node", **settings)
        node.add_model(tmp_path / "bundle")
        put_studies(node, tmp_path, STUDIES)
        app = make_app(broker.url)
        with (
            worker_process(tmp_path / "node", settings) as one,
            worker_process(tmp_path / "node", settings) as two,
        ):
            wait_until(lambda: bool(running_of(node, one.pid)) and bool(running_of(node, two.pid)), 120)
            wait_until(lambda: ended(node) >= 4, 120)
            with broker.client() as client, app.connection_for_write() as connection:
                client.flushall()  # the broker forgets everything,
                for _ in range(20):  # and says the same twice and more
                    ring_once(app, connection)
            lost = kill_at_work(node, two)
            before = ended(node)
            assert before < STUDIES - 4, "killed in the middle, not at the end"
            wait_until(lambda: ended(node) == STUDIES, 240, node._describe)
        jobs = {job.job_id: job for job in node.jobs()}
        assert (jobs[lost.job_id].attempt, jobs[lost.job_id].lapses) == (2, 1)
        assert sum(job.lapses for job in jobs.values()) == 1
        assert sum(job.attempt for job in jobs.values()) == STUDIES + 1
        assert sum(job.failures for job in jobs.values()) == 0
        check_one_result_each(node, STUDIES)
        node.records.close()


def test_jobs_are_done_while_the_broker_is_away_and_at_once_when_it_is_back(
    tmp_path: Path, postgresql: PostgresServer, broker: RedisServer
) -> None:
    with postgresql.database() as url:
        settings = fleet_settings(url, broker.url, idle_poll_interval_s=600.0)
        node = make_node(tmp_path / "node", **settings)
        node.add_model(tmp_path / "bundle")
        with worker_process(tmp_path / "node", settings) as worker:
            put_studies(node, tmp_path / "a", 1)  # enqueued by the worker itself, which rings
            wait_until(lambda: ended(node) == 1, 30, node._describe)
            (child,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            assert b"service.child" in command, "a program of its own, not a fork of one with threads"
            broker.kill()
            (job,) = node.jobs()
            put_again(node, job)
            wait_until(lambda: node.jobs()[0].attempt == 2 and ended(node) == 1, 30, node._describe)
            broker.start()
            os.kill(worker.pid, 0)
        node.records.close()


def test_a_worker_of_its_own_for_a_model(tmp_path: Path, postgresql: PostgresServer) -> None:
    with postgresql.database() as url:
        settings = fleet_settings(url)
        settings["routes"].append(settings["routes"][0] | {"name": "large", "model": "large"})
        node = make_node(tmp_path / "node", **settings)
        for name in ("threshold", "large"):
            node.add_model(tmp_path / name, name=name)
        put_studies(node, tmp_path, 2)

        def states() -> dict[str, set[JobState]]:
            return {
                name: {job.state for job in node.jobs() if job.model_name == name}
                for name in ("threshold", "large")
            }

        def only(name: str) -> dict[str, Any]:
            return {**settings, "worker": {**settings["worker"], "models": [name]}}

        with worker_process(tmp_path / "node", only("large")):
            wait_until(lambda: ended(node) == 2, 60, node._describe)
            assert states() == {"large": {JobState.SUCCEEDED}, "threshold": {JobState.QUEUED}}
        with worker_process(tmp_path / "node", only("threshold")):
            wait_until(lambda: ended(node) == 4, 60, node._describe)
        node.records.close()


def put_again(node: SmallNode, job: Job) -> None:
    """Queue a job once more, without anybody ringing."""
    with node.records.write() as session:
        again = session.get_one(Job, job.job_id)
        session.execute(Result.__table__.delete().where(Result.job_id == job.job_id))
        again.state = JobState.QUEUED
