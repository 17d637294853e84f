"""How many studies a minute one worker and two workers segment, on PostgreSQL: figures, not a test.

    PYTHONPATH=tests/support:. python tests/benchmarks/scale_out.py [--studies 40] [--convolutions 0]

Both runs share one database server, one spool and this machine's cores; every worker computes on one thread.
With fewer idle cores than workers two are no faster than one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from fleet import fleet_settings, put_studies, worker_process
from postgresql import PostgresServer
from small_node import make_node, wait_until

from service.records.tables import JobState


def measure(server: PostgresServer, workers: int, studies: int, convolutions: int) -> float:
    """Studies a minute, from the first job's start to the last one's end."""
    with tempfile.TemporaryDirectory() as name, server.database() as url, ExitStack() as running:
        folder = Path(name)
        settings = fleet_settings(url)
        node = make_node(folder / "node", **settings)
        node.add_model(folder / "bundle", slow_convolutions=convolutions)
        for _ in range(workers):
            running.enter_context(worker_process(folder / "node", settings))
        put_studies(node, folder, studies)
        wait_until(
            lambda: sum(job.state is JobState.SUCCEEDED for job in node.jobs()) == studies,
            3600,
            node._describe,
        )
        jobs = node.jobs()
        began = min(job.started_at for job in jobs if job.started_at)
        last = max(job.finished_at for job in jobs if job.finished_at)
        node.records.close()
        return 60 * studies / (last - began).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--convolutions", type=int, default=0, help="makes every job longer")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    with PostgresServer() as server:
        one, two = (measure(server, n, arguments.studies, arguments.convolutions) for n in (1, 2))
    print(f"{arguments.studies} studies each, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"one worker   {one:7.1f} studies a minute")
    print(f"two workers  {two:7.1f} studies a minute, {two / one:.2f} times as many")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
