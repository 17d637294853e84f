"""Workers in processes of their own, over one node's records: as on several hosts, but on this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import small_node
from phantom import test_uid as make_uid
from small_node import SmallNode, image_array

from service.lease import LeaseOwner
from service.records.tables import Job, JobState

SHAPE = (6, 10, 12)
_WORKER = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from small_node import make_node
from service.lease import LeaseOwner
from service.lifetime import stop_on_signals
from service.logs import configure_logging
from service.tasks import Listener, Ringer, make_app
from service.worker import Worker
configure_logging("WARNING", component="worker")
stop = stop_on_signals()
settings = json.loads(sys.argv[2])
node = make_node(Path(sys.argv[1]), **settings)
with ExitStack() as ending:
    bell = None
    if settings.get("broker_url"):
        app = make_app(settings["broker_url"])
        ringer = Ringer(app)
        ending.callback(ringer.close)
        node.records.ring = ringer.ring
        owner = str(LeaseOwner.of_this_process())
        bell = ending.enter_context(Listener(app, owner, check_every_s=0.2, silent_after_s=2.0))
    print("ready", flush=True)
    Worker(node.settings, node.records, node.spool, node.registry, bell=bell).run(stop)
node.records.close()
"""


def fleet_settings(url: str, broker_url: str | None = None, **worker: Any) -> dict[str, Any]:
    """Settings of a node whose results stay in it, as JSON can carry them."""
    return {
        "database_url": url,
        "broker_url": broker_url,
        "worker": {
            "poll_interval_s": 0.05,
            "threads": 1,
            "runtime": "onnxruntime",
            "first_retry_s": 0.0,
            "lease_s": 3600.0,  # what is taken back at once was proven dead, and has not just lapsed
            **worker,
        },
        "destinations": [],
        "routes": [{"name": "mr", "model": "threshold", "match": {"Modality": "MR"}, "quiet_time_s": 1.0}],
    }


@contextmanager
def worker_process(folder: Path, settings: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A worker that is ready; it is told to end, or found killed, when the block ends."""
    environment = {**os.environ, "PYTHONPATH": str(Path(small_node.__file__).parent)}
    command = [sys.executable, "-c", _WORKER, str(folder), json.dumps(settings)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        process.stdout.close()
        assert status in (0, -signal.SIGKILL)


def put_studies(node: SmallNode, folder: Path, count: int) -> None:
    """Studies of one small series each, on the spool and in the records, complete at the next sweep."""
    for seed in range(count):
        node.receive_phantom(
            folder / str(seed),
            image_array(SHAPE, seed),
            patient_id=f"P{seed}",
            study_instance_uid=make_uid("study", seed),
            series_instance_uid=make_uid("series", seed),
        )


def running_of(node: SmallNode, pid: int) -> list[Job]:
    """The jobs that a worker of this host holds."""
    owners = [(job, LeaseOwner.parse(job.lease_owner or "")) for job in node.jobs()]
    return [job for job, owner in owners if job.state is JobState.RUNNING and owner and owner.pid == pid]
