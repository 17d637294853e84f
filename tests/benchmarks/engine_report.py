"""The benchmark's log, and what is told from it: text for a person, and the README's table.

A log is JSON lines: the machine first, then every single measurement. Both forms of the report are made of
the log alone, so neither can say what was not measured.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from engine_jobs import STAGES

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"

NNUNET, FLOAT32, INT8, ONNXRUNTIME, TEACHER = (
    "nnU-Net, student",
    "engine float32, student",
    "engine int8, student",
    "engine float32, onnxruntime",
    "nnU-Net, teacher",
)
EXPORT_NNUNET, EXPORT, EXPORT_WHOLE = (
    "export: nnU-Net",
    "export: engine, features and head",
    "export: engine, whole logits",
)
DICOM = {
    "dicom: read": ("pydicom", "a series read into a volume, over decoding its pixels alone"),
    "dicom: segmentation": ("highdicom", "a BINARY SEG of many labels, over highdicom's own"),
    "dicom: report": ("highdicom", "SEG, SR and their proofs, over highdicom's SEG alone"),
}
MIB = 2**20


class Log:
    """Measurements by name, in memory and, if there is a path, on the disk as soon as they are made."""

    def __init__(self, path: Path | None = None, further: tuple[Path, ...] = ()) -> None:
        self._path = path
        self.machine = ""
        self.records: list[dict[str, Any]] = []
        for each in (*further, *([path] if path is not None else [])):
            if each.exists():
                self._load(each)

    def _load(self, path: Path) -> None:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "report" in record:  # as logs of a single sitting began
                record = {"machine": record["report"][0]}
            if "machine" in record:
                self.machine = self.machine or record["machine"]
            else:
                self.records.append(record)

    def begin(self, machine: str) -> None:
        """Name the machine, unless the log does already."""
        if not self.machine:
            self.machine = machine
            self._write({"machine": machine})

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def runs(self, name: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["name"] == name]

    def median(self, name: str) -> dict[str, Any]:
        """Median per stage and of the total (without load), of processor time, and of the peak."""
        runs = self.runs(name)
        middle: dict[str, Any] = {s: statistics.median(r["seconds"][s] for r in runs) for s in STAGES}
        middle["total"] = statistics.median(sum(r["seconds"].values()) - r["seconds"]["load"] for r in runs)
        middle["MiB"] = statistics.median(r["peak_bytes"] for r in runs) / MIB
        middle["cpu"] = statistics.median(r["cpu_seconds"] for r in runs)
        for key in ("estimate_bytes", "before_bytes"):
            if key in runs[0]:
                middle[key] = statistics.median(r[key] for r in runs) / MIB
        return middle


def text(log: Log) -> list[str]:
    """Every part of the log, as lines for a person."""
    lines = [log.machine, f"medians of {len(log.runs(FLOAT32))} runs, the sides alternating", ""]
    lines += _table(log, [NNUNET, FLOAT32, INT8, ONNXRUNTIME], NNUNET)
    lines += _table(log, [TEACHER, FLOAT32, INT8], TEACHER)
    if log.runs(FLOAT32):
        m = log.median(FLOAT32)
        lines += [f"memory estimated {m['estimate_bytes']:.0f} MiB, measured {m['MiB']:.0f} MiB", ""]
    if log.runs(EXPORT_NNUNET):
        base = log.median(EXPORT_NNUNET)
        lines += ["Export of many labels, resampled from 1 mm to 1.2 x 0.8 x 0.8 mm", ""]
        for name in (n for n in (EXPORT_NNUNET, EXPORT, EXPORT_WHOLE) if log.runs(n)):
            m = log.median(name)
            own, ratio = m["MiB"] - m["before_bytes"], m["MiB"] / base["MiB"]
            lines.append(
                f"{name:34}{m['export']:11.2f} s{m['MiB']:8.0f} MiB, {own:.0f} of them for the export; "
                f"{base['export'] / m['export']:.0f}x, memory {ratio:.2f}"
            )
        lines.append("")
    grown = list(dict.fromkeys(r["name"] for r in log.records if r["name"].startswith("growth: ")))
    if grown:
        lines += ["Growth of the engine (float32), seconds and MiB", ""]
        for name in grown:
            m = log.median(name)
            lines.append(f"{name:40}{m['total']:11.2f}{m['MiB']:10.0f}")
        lines.append("")
    for name, (other, what) in DICOM.items():
        for run in log.runs(name)[-1:]:
            ours, theirs = run["seconds"]["segnode"], run["seconds"][other]
            cpu = run["cpu_seconds"]["segnode"] / run["cpu_seconds"][other]
            lines.append(
                f"{name:24} segnode {ours:.2f} s, {other} {theirs:.2f} s: {ours / theirs:.2f} of the time, "
                f"{cpu:.2f} of the processor time; {what}"
            )
    for peak in log.runs("peak")[-1:]:
        lines += [
            "",
            f"sgemm {peak['sgemm_gflops']:.0f} GFLOP/s; convolutions of {peak['gflop']:.1f} GFLOP a tile, "
            f"{peak['tiles']} tiles, over the whole forward pass:",
        ]
        for name in (n for n in (NNUNET, FLOAT32, INT8, ONNXRUNTIME) if log.runs(n)):
            rate = peak["gflop"] * peak["tiles"] / log.median(name)["forward"]
            lines.append(f"{name:34}{rate:8.0f} GFLOP/s")
    return lines


def _table(log: Log, names: list[str], reference: str) -> list[str]:
    """One line for each name, with its ratios to the reference: wall clock, processor time (of both cores,
    loading included; it says more than the clock where others share the machine), peak memory."""
    names = [name for name in names if log.runs(name)]
    if not log.runs(reference):
        return []
    columns = (*(s for s in STAGES if s != "load"), "total", "cpu")
    heads = "".join(f"{c:>11}" for c in columns)
    lines = [f"{'':30}{heads}{'peak MiB':>10}{'faster':>8}{'less cpu':>10}{'memory':>8}"]
    base = log.median(reference)
    for name in names:
        m = log.median(name)
        numbers = "".join(f"{m[c]:11.2f}" for c in columns)
        wall, cpu, memory = base["total"] / m["total"], base["cpu"] / m["cpu"], m["MiB"] / base["MiB"]
        lines.append(f"{name:30}{numbers}{m['MiB']:10.0f}{wall:7.2f}x{cpu:9.2f}x{memory:8.2f}")
    return [*lines, ""]


def markdown(log: Log) -> str:
    """The README's table."""
    lines = ["| | seconds | faster | peak memory |", "|---|---|---|---|"]

    def row(what: str, name: str, reference: str, stage: str = "total") -> None:
        if log.runs(name) and log.runs(reference):
            m, base = log.median(name), log.median(reference)
            faster = f"{base[stage] / m[stage]:.1f}x"
            lines.append(f"| {what} | {m[stage]:.2f} | {faster} | {m['MiB']:.0f} MiB |")

    row("nnU-Net's predictor, same weights", NNUNET, NNUNET)
    row("segnode, float32", FLOAT32, NNUNET)
    row("segnode, int8", INT8, NNUNET)
    row("segnode, float32, on ONNX Runtime", ONNXRUNTIME, NNUNET)
    row("nnU-Net's predictor, the teacher of full width", TEACHER, TEACHER)
    row("segnode, int8 student, over that teacher", INT8, TEACHER)
    row("many labels resampled to 0.8x0.8x1.2 mm: nnU-Net's export", EXPORT_NNUNET, EXPORT_NNUNET, "export")
    row("the same, segnode", EXPORT, EXPORT_NNUNET, "export")
    for name, (other, what) in DICOM.items():
        for run in log.runs(name)[-1:]:
            ours, theirs = run["seconds"]["segnode"], run["seconds"][other]
            lines.append(f"| {what} ({theirs:.2f} s) | {ours:.2f} | {theirs / ours:.1f}x | |")
    return "\n".join([BEGIN, *lines, "", f"Measured on {log.machine}.", END])


def into(document: str, table: str) -> str:
    """A document with its table replaced: the one between the same first and last line as the new one has.

    Raises
    ------
    ValueError
        If the document has no place marked for it.
    """
    first, *_, last = table.splitlines()
    before, begin, rest = document.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"The document has no {first} ... {last}.")
    return before + table + after
