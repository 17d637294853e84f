"""How many studies a minute one worker and two workers segment, on PostgreSQL: figures, not a test.

    python tests/benchmarks/scale_out.py [--studies 40] [--runs 3] [--convolutions 8] \
        [--log tests/benchmarks/results/scale-out.json] [--markdown deploy/SCALE-OUT.md]

All runs share one database server, one spool and this machine's cores; every worker computes on one thread,
one and two workers alternate, and the medians are told. With fewer idle cores than workers two are no faster
than one: the load before each run stands in the log. ``--convolutions`` says how long a job computes, beside
what it costs to be a job.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from engine import machine  # noqa: E402
from engine_report import into  # noqa: E402
from fleet import fleet_settings, put_studies, worker_process  # noqa: E402
from postgresql import PostgresServer  # noqa: E402
from scale_out_report import markdown  # noqa: E402
from small_node import make_node  # noqa: E402
from sqlalchemy import func, select  # noqa: E402

from service.records.tables import Job, JobState  # noqa: E402

_LOOK_EVERY_S = 0.5  # seldom: whoever looks takes time from those who work
_GIVE_UP_AFTER_S = 3600.0


def measure(server: PostgresServer, workers: int, studies: int, convolutions: int) -> dict[str, Any]:
    """One run: seconds from the first job's start to the last one's end, as the records have them."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, server.database() as url, ExitStack() as running:
        folder = Path(name)
        settings = fleet_settings(url)
        node = make_node(folder / "node", **settings)
        node.add_model(folder / "bundle", slow_convolutions=convolutions)
        for _ in range(workers):
            running.enter_context(worker_process(folder / "node", settings))
        put_studies(node, folder, studies)
        deadline = time.monotonic() + _GIVE_UP_AFTER_S
        ended = select(func.count()).where(Job.state == JobState.SUCCEEDED)
        while True:
            with node.records.read() as session:
                if session.scalar(ended) == studies:
                    break
            if time.monotonic() > deadline:
                raise TimeoutError(node._describe())
            time.sleep(_LOOK_EVERY_S)
        jobs = node.jobs()
        node.records.close()
    began = min(job.started_at for job in jobs if job.started_at)
    last = max(job.finished_at for job in jobs if job.finished_at)
    own = sum((j.finished_at - j.started_at).total_seconds() for j in jobs if j.finished_at and j.started_at)
    return {
        "workers": workers,
        "seconds": (last - began).total_seconds(),
        "seconds_a_job": own / studies,
        "load_before": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3, help="of one worker and of two, each")
    parser.add_argument("--convolutions", type=int, default=8, help="makes every job longer")
    parser.add_argument("--log", type=Path, help="JSON: the machine and every run")
    parser.add_argument("--markdown", type=Path, help="a document with a place for the table")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    log: dict[str, Any] = {
        "machine": machine(),
        "studies": arguments.studies,
        "convolutions": arguments.convolutions,
        "runs": [],
    }
    began = time.monotonic()
    with PostgresServer() as server:
        for _ in range(arguments.runs):
            for workers in (1, 2):
                run = measure(server, workers, arguments.studies, arguments.convolutions)
                log["runs"].append(run)
                print(json.dumps(run), file=sys.stderr, flush=True)
                if arguments.log:
                    arguments.log.write_text(json.dumps(log, indent=1) + "\n")
    table = markdown(log)
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(into(arguments.markdown.read_text(), table))
    medians = [statistics.median(r["seconds"] for r in log["runs"] if r["workers"] == n) for n in (1, 2)]
    print(f"{medians[0] / medians[1]:.2f} times as many by two; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
