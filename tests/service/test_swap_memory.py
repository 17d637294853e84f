"""Runtimes do not give back what a model has taken: after a swap it is freed by the end of its process."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import scripted_child
from bundle_factory import write_nifti_ras
from small_node import SmallNode, make_node
from waiting import wait_until

from service import inference
from service.records.jobs import enqueue
from service.records.tables import JobOrigin, JobState
from service.records.work import NewInput, NewJob
from service.worker import Worker

NEVER = threading.Event()
VERSIONS = ("1.0.0", "1.1.0")
UPLOAD = "uploads/image.nii.gz"
MEBIBYTE = 1 << 20


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SmallNode]:
    """A node with two versions of a model."""
    made = make_node(tmp_path / "node")
    for version in VERSIONS:
        made.add_model(tmp_path / version, version=version)
    yield made
    made.records.close()


@pytest.fixture
def worker(node: SmallNode) -> Iterator[Worker]:
    made = node.worker()
    yield made
    made.runner.close()


def swap(node: SmallNode, worker: Worker, number: int) -> int:
    """Run a job on the version that the one before has not run on; the process that did."""
    version = VERSIONS[number % len(VERSIONS)]
    new = NewJob(JobOrigin.UPLOAD, "threshold", f"{number}", [NewInput(UPLOAD)], requested_version=version)
    with node.records.write() as session:
        job, _ = enqueue(session, new, at=node.records.now())
    assert worker.run_one(NEVER)
    (ended,) = [each for each in node.jobs() if each.job_id == job.job_id]
    assert (ended.state, ended.model_version) == (JobState.SUCCEEDED, version), ended.reason
    assert worker.runner.inference_pid is not None
    return worker.runner.inference_pid


def held() -> dict[str, int]:
    """What this process, as the worker, holds besides memory."""
    return {
        "children": len(psutil.Process().children(recursive=True)),
        "threads": sum(each.name.startswith("inference") for each in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
    }


def test_a_worker_that_swaps_again_and_again_does_not_grow(
    node: SmallNode, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, count = 4, 12
    (tmp_path / "script.json").write_text(json.dumps(["succeed"] * (warm + count)))
    command = (sys.executable, "-S", "-E", scripted_child.__file__, str(tmp_path))
    monkeypatch.setattr(inference, "COMMAND", command)
    pids = [swap(node, worker, number) for number in range(warm)]
    before = held()
    tracemalloc.start()
    try:
        pids += [swap(node, worker, number) for number in range(warm, warm + count // 2)]
        gc.collect()
        first, _ = tracemalloc.get_traced_memory()
        pids += [swap(node, worker, number) for number in range(warm + count // 2, warm + count)]
        gc.collect()
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(pids)) == warm + count
    wait_until(lambda: held() == before, 20)  # of the last one but one, a thread may still be reading
    assert (last - first) / (count // 2) < MEBIBYTE / 8, "bytes that each swap has left in the worker"


def test_what_a_model_has_taken_is_free_after_the_swap(
    node: SmallNode, worker: Worker, tmp_path: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 400, (8, 12, 14)).astype(np.float32)
    node.spool.make_folder(node.spool.absolute(UPLOAD).parent)
    write_nifti_ras(node.spool.absolute(UPLOAD), image, (1.5, 1.25, 2.0))
    # A server that other tests have started is a child of this process too.
    others = {each.pid for each in psutil.Process().children(recursive=True)}
    taken = []
    for number in range(3):
        pid = swap(node, worker, number)
        processes = [each for each in psutil.Process().children(recursive=True) if each.pid not in others]
        assert [each.pid for each in processes] == [pid], "one process, and none of a model before"
        taken.append(processes[0].memory_info().rss)
    assert max(taken) < 1.25 * taken[0] + 32 * MEBIBYTE, taken
