"""A whole head, DICOM in to SEG out as the node's process does it, beside stock nnU-Net on the same weights.

    python tests/benchmarks/whole_head.py BUNDLE RESULTS_FOLDER --head SCAN --runs 3 \
        --log tests/benchmarks/results/whole-head.jsonl --markdown README.md

The scan (NIfTI, or a folder of a DICOM series; the ICBM152 template if none is given) is resampled onto
256 x 256 x 256 voxels of 1 mm around its middle, and written as an axial MR series and as NIfTI. The node's
side reads the series, checks, segments, and writes and proves SEG, SR, labelmap and preview; nnU-Net's reads,
preprocesses, predicts and writes a NIfTI file. Each run is a fresh process; the two alternate, and medians
are shown. Loading is told apart: a node loads a model once. ``--size`` makes the head small, for a try.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
from engine import machine  # noqa: E402
from engine_jobs import Clock, predict_file  # noqa: E402
from engine_report import MIB, Log, into  # noqa: E402

BEGIN, END = "<!-- whole head: begin -->", "<!-- whole head: end -->"
NODE, NNUNET = "segnode, DICOM to SEG", "nnU-Net's predictor, NIfTI to NIfTI"
FIELD_OF_VIEW_MM = 256.0
_WHEN = datetime(2026, 1, 1)  # noqa: DTZ001  # times in the records are naive


def write_head(scan: Path | None, size: int, folder: Path) -> dict[str, Any]:
    """The head as ``series/*.dcm`` and ``head.nii.gz``, both on one grid of size³ voxels and 256³ mm.

    Whole numbers of 0 to 4095, as a scanner stores them.
    """
    import SimpleITK as sitk
    from phantom import write_classic_series

    from training.golden_files import write_image
    from training.synthesis.real_scans import icbm_files, read_scan

    volume = read_scan(scan or icbm_files()["t1"])
    image = sitk.GetImageFromArray(volume.array[0])
    axes = volume.affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    image.SetSpacing(lengths.tolist())
    image.SetDirection((axes / lengths).ravel().tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    spacing = FIELD_OF_VIEW_MM / size
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    corner = [m - spacing * (size - 1) / 2 for m in middle]
    moved = sitk.Resample(
        image,
        [size] * 3,
        sitk.Transform(),
        sitk.sitkLinear,
        corner,
        [spacing] * 3,
        np.eye(3).ravel().tolist(),
    )
    array = np.maximum(sitk.GetArrayFromImage(moved), 0)
    stored = np.minimum(np.round(array * 4095 / np.percentile(array, 99.99)), 4095).astype(np.int16)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = corner
    write_classic_series(folder / "series", stored, affine)
    write_image(stored.astype(np.float32), affine, folder / "head.nii.gz")
    return {"series": str(folder / "series"), "image": str(folder / "head.nii.gz"), "size": size}


def run_node(job: dict[str, Any]) -> dict[str, Any]:
    """What the node's inference process does for one job: `service.pipeline.run` on a loaded model."""
    from models.bundle import Bundle
    from models.resources import peak_resident_bytes
    from models.segmenter import Progress, Segmenter
    from service.pipeline import run
    from service.pipeline_job import LABELMAP, PipelineJob

    start = time.perf_counter()
    bundle = Bundle.open(Path(job["bundle"]))
    segmenter = Segmenter(bundle, threads=job["threads"], cache_dir=Path(job["cache"]))
    loaded = time.perf_counter()
    began: dict[str, float] = {}

    def progress(now: Progress) -> None:
        began.setdefault(now.stage, time.perf_counter())

    order = PipelineJob(
        channels=((Path(job["series"]),),), created_at=_WHEN, output_dir=Path(job["out"]) / "results"
    )
    outcome = run(order, segmenter, bundle.manifest, bundle.digest, progress=progress)
    done = time.perf_counter()
    kinds = sorted(file.kind for file in outcome.files)
    if "segmentation" not in kinds:
        raise SystemExit(f"There is no SEG: {outcome.summary['sentence']}")
    return {
        "seconds": {
            "load": loaded - start,
            "read": began["preprocess"] - loaded,
            "segment": began["write"] - began["preprocess"],
            "write and prove": done - began["write"],
        },
        "peak_bytes": peak_resident_bytes(),
        "estimate_bytes": segmenter.estimate_peak_bytes(
            (job["size"],) * 3, (FIELD_OF_VIEW_MM / job["size"],) * 3
        ),
        "labelmap": str(order.output_dir / LABELMAP),
        "files": kinds,
        "runtime": outcome.runtime,
        "warnings": len(outcome.summary["warnings"]),
    }


def run_nnunet(job: dict[str, Any]) -> dict[str, Any]:
    """Stock nnU-Net from file to file, with its sums in float16 as they are."""
    from training.environment import configure_nnunet

    configure_nnunet()
    import torch

    from models.resources import peak_resident_bytes
    from training.reference import make_predictor
    from training.teacher import ResultsFolder

    torch.set_num_threads(job["threads"])
    clock = Clock()
    with clock.on("load"):
        results = ResultsFolder.open(Path(job["results"]), checkpoint=job["checkpoint"])
        predictor = make_predictor(results, mirroring=job["mirroring"], stock=True)
    out = Path(job["out"]) / "nnunet.nii.gz"
    predict_file(predictor, {**job, "out": str(out)}, clock)
    took = clock.seconds
    return {
        "seconds": {
            "load": took["load"],
            "read": took["read"],
            "segment": took["preprocess"] + took["forward"] + took["accumulate"],
            "write and prove": took["export"],
        },
        "peak_bytes": peak_resident_bytes(),
        "labelmap": str(out),
    }


SIDES = {NODE: run_node, NNUNET: run_nnunet}


def agreement(one: Path, other: Path) -> dict[str, float]:
    """Share of equal voxels, and the smallest Dice of a label that is in either, of two files on one grid."""
    from models.nifti import read_labelmap

    a, b = read_labelmap(one).array, read_labelmap(other).array
    dice = []
    for value in sorted({*np.unique(a).tolist(), *np.unique(b).tolist()} - {0}):
        in_a, in_b = a == value, b == value
        dice.append(2 * int((in_a & in_b).sum()) / (int(in_a.sum()) + int(in_b.sum())))
    return {"equal": float((a == b).mean()), "smallest_dice": min(dice, default=1.0)}


def measure(job: dict[str, Any], side: str) -> dict[str, Any]:
    """One run in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps({**job, "side": side})],
        stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "nnUNet_n_proc_DA": "1"},
    )  # fmt: skip
    record = {"name": side, "load_average": os.getloadavg()[0], **json.loads(done.stdout.splitlines()[-1])}
    told = {stage: round(seconds, 2) for stage, seconds in record["seconds"].items()}
    print(f"  {side:38} {record['peak_bytes'] / MIB:6.0f} MiB {told}", file=sys.stderr, flush=True)
    return record


def benchmark(
    bundle: Path,
    results: Path,
    log: Log,
    *,
    scan: Path | None,
    size: int,
    runs: int,
    threads: int,
    checkpoint: str,
) -> None:
    """Both sides in turn until the log has so many runs of each, then how far their labels agree."""
    from models.bundle import Bundle

    opened = Bundle.open(bundle)
    mirroring = bool(opened.manifest.inference.mirror_axes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {
            **write_head(scan, size, folder), "bundle": str(bundle), "results": str(results),
            "checkpoint": checkpoint, "mirroring": mirroring, "threads": threads,
            "cache": str(folder / "cache"),
        }  # fmt: skip
        last: dict[str, str] = {}
        measure({**job, "out": str(folder / "warm")}, NODE)  # compiled models and kernels, as on a node
        for number in range(len(log.runs(NNUNET)), runs):
            for side in SIDES:
                out = folder / f"{side}-{number}"
                out.mkdir()
                record = measure({**job, "out": str(out)}, side)
                last[side] = record.pop("labelmap")
                log.add({**record, "size": size, "threads": threads, "bundle_digest": opened.digest})
        if last:
            labels = agreement(*(Path(path) for path in last.values()))
            postprocessed = opened.manifest.postprocessing is not None
            log.add({"name": "agreement", "postprocessed": postprocessed, **labels})


def markdown(log: Log) -> str:
    """The README's rows; nothing but the log is in them."""
    lines = [BEGIN]
    if log.runs(NODE) and log.runs(NNUNET):
        node, size = log.runs(NODE)[-1], log.runs(NODE)[-1]["size"]
        lines += [
            "`python tests/benchmarks/whole_head.py BUNDLE RESULTS_FOLDER --log LOG --markdown README.md`: "
            f"a whole head of {size}³ voxels of {FIELD_OF_VIEW_MM / size:g} mm through the bundle "
            f"`brain-structures`, on {node['threads']} threads, the model loaded: a DICOM series in; SEG and "
            "SR, each proven, labelmap and preview out; beside nnU-Net's predictor with the same weights, "
            f"which writes a NIfTI file. Medians of {len(log.runs(NODE))} runs.",
            "",
            "| | read | segment | write and prove | in all | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for side in SIDES:
            runs = log.runs(side)
            middle = [
                statistics.median(run["seconds"][stage] for run in runs)
                for stage in ("read", "segment", "write and prove")
            ]
            whole = statistics.median(sum(run["seconds"].values()) - run["seconds"]["load"] for run in runs)
            peak = statistics.median(run["peak_bytes"] for run in runs) / MIB
            cells = " | ".join(f"{seconds:.1f} s" for seconds in (*middle, whole))
            lines.append(f"| {side} | {cells} | {peak:.0f} MiB |")
        for last in log.runs("agreement")[-1:]:
            after = ", ours after its post-processing" if last["postprocessed"] else ""
            lines += ["", f"{last['equal']:.3%} of the voxels have the same label{after}. On {log.machine}."]
    return "\n".join([*lines, END])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument(
        "results", type=Path, nargs="?", help="the results folder that the bundle was made of"
    )
    parser.add_argument("--head", type=Path, help="NIfTI, or a folder of a DICOM series; ICBM152 if left out")
    parser.add_argument("--size", type=int, default=256, help="voxels along each axis, of 256 mm")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", default="final", help="of the results folder: final or best")
    parser.add_argument("--log", type=Path, help="every measurement, as JSON lines; what it holds is not run")
    parser.add_argument("--markdown", type=Path, help="a document whose marked table is made from the log")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps(SIDES[job["side"]](job)))
        return 0
    log = Log(arguments.log)
    if arguments.bundle and arguments.results:
        log.begin(machine())
        benchmark(
            arguments.bundle, arguments.results, log, scan=arguments.head, size=arguments.size,
            runs=arguments.runs, threads=arguments.threads, checkpoint=arguments.checkpoint,
        )  # fmt: skip
    print(markdown(log))
    if arguments.markdown:
        arguments.markdown.write_text(into(arguments.markdown.read_text(), markdown(log)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
