"""Whatever dies, each study gives exactly one result: the real worker, the real inference process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
import pytest
import small_node
from bundle_factory import expected_labels
from small_node import SmallNode, image_array, make_node
from sqlalchemy import select
from waiting import wait_until

from models.nifti import read_labelmap
from service.records.tables import Delivery, Job, JobState, Result, Series

_WORKER = """
import json, signal, sys, threading
from pathlib import Path
import service.watch
from small_node import make_node
service.watch._RENEW_AT_LEAST_EVERY_S = 0.05  # a job of a second or two shall be seen at work
from service.logs import configure_logging
configure_logging(component="worker")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
node = make_node(Path(sys.argv[1]), **json.loads(sys.argv[2]))
node.worker().run(stop)
node.records.close()
"""
_SETTINGS = {
    "worker": {
        "poll_interval_s": 0.02,
        "threads": 1,
        "runtime": "onnxruntime",
        "first_retry_s": 0.0,
        "lease_s": 3600.0,  # what is taken back at once was proven dead, and has not just lapsed
    },
    "destinations": [],
    "routes": [{"name": "mr", "model": "threshold", "match": {"Modality": "MR"}, "quiet_time_s": 1.0}],
}


@pytest.fixture
def node(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallNode]:
    made = make_node(tmp_path / "node", **_SETTINGS)
    shared_cache = tmp_path_factory.getbasetemp() / "segnode-cache"
    shared_cache.mkdir(exist_ok=True)
    made.settings.cache_dir.symlink_to(shared_cache)  # what one process has compiled, the next need not
    yield made
    made.records.close()


@contextmanager
def worker_process(node: SmallNode) -> Iterator[subprocess.Popen[bytes]]:
    """``segnode worker``, but without seeding the models that ship."""
    support = str(Path(small_node.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": support}
    command = [sys.executable, "-c", _WORKER, str(node.settings.data_dir), json.dumps(_SETTINGS)]
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGKILL)


def inference_pid(worker: subprocess.Popen[bytes]) -> int | None:
    """The worker's child, if it has one now."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    return pids[0] if pids else None


def wait_for_tiles(node: SmallNode) -> Job:
    """Wait until the network is at work on some job."""

    def at_work() -> list[Job]:
        return [
            job for job in node.jobs() if job.state is JobState.RUNNING and job.progress_stage == "forward"
        ]

    wait_until(lambda: bool(at_work()), 120, node._describe)
    return at_work()[0]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def check_only_result(node: SmallNode, job: Job, array: np.ndarray) -> None:
    """Exactly one result, from the winning attempt, right in every voxel, and nothing beside it."""
    with node.records.read() as session:
        results = list(session.scalars(select(Result).where(Result.job_id == job.job_id)))
        assert session.scalars(select(Delivery)).all() == []
    kinds = ["labelmap", "measurements", "preview", "report", "segmentation"]
    assert sorted(result.kind for result in results) == kinds
    paths = {result.kind.value: node.spool.absolute(result.path) for result in results}
    assert {path.parent.name for path in paths.values()} == {str(job.attempt)}
    files = {path for path in (node.spool.results_dir / job.job_id).rglob("*") if path.is_file()}
    assert files == set(paths.values())
    expected = expected_labels(array[None].astype(np.float32), (100.5, 300.5))
    np.testing.assert_array_equal(read_labelmap(paths["labelmap"]).array, expected)
    segmentation = pydicom.dcmread(paths["segmentation"])
    equipment = {item.SoftwareVersions for item in segmentation.ContributingEquipmentSequence}
    assert job.model_digest in equipment
    measured = json.loads(paths["measurements"].read_text())
    assert measured["model"]["digest"] == job.model_digest


SLOW = {"slow_convolutions": 60, "patch_size": (32, 32, 32)}
LARGE = (40, 48, 56)


def test_an_inference_process_killed_in_the_middle_of_a_job(node: SmallNode, tmp_path: Path) -> None:
    node.add_model(tmp_path / "bundle", **SLOW)
    array = image_array(LARGE)
    with worker_process(node) as worker:
        node.receive_phantom(tmp_path / "s", array)
        wait_for_tiles(node)
        pid = inference_pid(worker)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        (job,) = node.wait_for_jobs(JobState.SUCCEEDED, within_s=180)
    assert (job.attempt, job.failures, job.lapses) == (2, 1, 0)
    check_only_result(node, job, array)


def test_a_worker_killed_in_the_middle_of_a_job(node: SmallNode, tmp_path: Path) -> None:
    node.add_model(tmp_path / "bundle", **SLOW)
    array = image_array(LARGE)
    with worker_process(node) as worker:
        node.receive_phantom(tmp_path / "s", array)
        wait_for_tiles(node)
        pid = inference_pid(worker)
        assert pid is not None
        worker.kill()
        worker.wait()
        wait_until(lambda: not is_running(pid), 30)
    (job,) = node.jobs()
    assert (job.state, job.attempt) == (JobState.RUNNING, 1)
    with worker_process(node):
        (job,) = node.wait_for_jobs(JobState.SUCCEEDED, within_s=180)
    assert (job.attempt, job.failures, job.lapses) == (2, 0, 1)
    check_only_result(node, job, array)


def test_a_model_swapped_while_jobs_wait_and_run(node: SmallNode, tmp_path: Path) -> None:
    first = node.add_model(tmp_path / "first", **SLOW)
    arrays = [image_array(LARGE, seed) for seed in range(2)]
    with worker_process(node):
        for seed, array in enumerate(arrays):
            node.receive_phantom(
                tmp_path / f"s{seed}", array, series_instance_uid=f"2.25.{seed}", ago_s=50 - seed
            )
        running = wait_for_tiles(node)
        second = node.add_model(tmp_path / "second", version="1.1.0")
        jobs = node.wait_for_jobs(JobState.SUCCEEDED, JobState.SUCCEEDED, within_s=180)
    assert running.model_digest == first
    assert {job.job_id: job.model_digest for job in jobs} == {
        job.job_id: first if job.job_id == running.job_id else second for job in jobs
    }
    assert first != second
    with node.records.read() as session:
        uids = [session.get_one(Series, job.series_id).series_instance_uid for job in jobs]
    for job, uid in zip(jobs, uids, strict=True):
        check_only_result(node, job, arrays[int(uid.rpartition(".")[2])])
