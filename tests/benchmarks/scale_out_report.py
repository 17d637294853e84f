"""The table of the throughput of two workers beside one, made of a run's log alone."""

from __future__ import annotations

import statistics
from typing import Any

BEGIN, END = "<!-- scale-out: begin -->", "<!-- scale-out: end -->"
EMPTY = f"{BEGIN}\n{END}"  # before anything was measured


def markdown(log: dict[str, Any]) -> str:
    """The table: medians of the runs, with the machine that they were made on."""
    lines = ["| | studies a minute | beside one | seconds a job |", "|---|---|---|---|"]
    rates = {}
    for workers, words in ((1, "one worker"), (2, "two workers")):
        runs = [run for run in log["runs"] if run["workers"] == workers]
        rates[workers] = 60 * log["studies"] / statistics.median(run["seconds"] for run in runs)
        own = statistics.median(run["seconds_a_job"] for run in runs)
        lines.append(f"| {words} | {rates[workers]:.1f} | {rates[workers] / rates[1]:.2f}x | {own:.2f} |")
    count = len(log["runs"]) // 2
    made = f"{log['studies']} studies, median of {count} run{'s' if count != 1 else ''}, one thread a worker."
    return "\n".join([BEGIN, *lines, "", f"{made} Measured on {log['machine']}.", END])
