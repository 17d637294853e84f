"""The engine against nnU-Net's own predictor, on the same weights and volumes, in one run.

    python tests/benchmarks/engine.py --size full

Weights are random: speed and memory do not depend on them. Every measurement is a fresh process, which
loads, runs and reports its own peak memory; the two sides alternate, and medians are shown. The compiled
model and kernel caches of the engine are warm, as on a node that has started before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
from engine_jobs import EXPORT_SPACING, STAGES, measure  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "full": {"shape": (192, 224, 192), "patch": (128, 128, 128), "stages": 6, "labels": 32, "many": 114},
    "small": {"shape": (96, 112, 96), "patch": (64, 64, 64), "stages": 5, "labels": 12, "many": 40},
}
WIDTHS = {"student": (8, 16, 32, 64, 80, 80), "teacher": (32, 64, 128, 256, 320, 320)}
BLOCKS = (1, 3, 4, 6, 6, 6)


class Bench:
    """Models and volumes in a temporary folder, jobs in fresh processes, every result kept."""

    def __init__(self, size: str, folder: Path) -> None:
        self.size, self.folder = SIZES[size], folder
        self.raw: list[dict[str, Any]] = []

    def model(self, width: str, labels: int, *, int8: bool = False) -> Path:
        import torch
        from nnunet_reference import reference_model

        folder = self.folder / f"{width}-{labels}"
        if not folder.exists():
            folder.mkdir()
            stages = self.size["stages"]
            model = reference_model(
                features=WIDTHS[width][:stages], blocks=BLOCKS[:stages], patch_size=self.size["patch"],
                n_labels=labels,
            )  # fmt: skip
            model.export(folder)
            manifest = model.manifest()
            (folder / "model.json").write_text(manifest.model_dump_json())
            saved = {"plans": model.plans, "dataset": model.dataset, "parameters": model.parameters}
            torch.save(saved, folder / "model.pt")
        if int8 and not (folder / "int8.onnx").exists():
            quantize(folder / "fold0.onnx", folder / "int8.onnx", self.size["patch"])
        return folder

    def volume(self, shape: tuple[int, ...], spacing_zyx: tuple[float, ...]) -> Path:
        import SimpleITK
        from scipy import ndimage

        path = self.folder / f"volume-{'x'.join(map(str, shape))}.nii.gz"
        if not path.exists():
            noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            image = SimpleITK.GetImageFromArray(
                (300 * ndimage.gaussian_filter(noise, 1.5) + 100).astype("i2")
            )
            image.SetSpacing(spacing_zyx[::-1])
            SimpleITK.WriteImage(image, str(path), useCompression=True)
        return path

    def run(self, name: str, **job: Any) -> dict[str, Any]:
        defaults = {"kind": "whole", "threads": 2, "runtime": "auto", "int8": False}
        places = {"out": str(self.folder / "o.nii.gz"), "cache": str(self.folder / "cache")}
        job = {**defaults, **places, **job}
        out = subprocess.run(
            [sys.executable, __file__, "--job", json.dumps(job)],
            stdout=subprocess.PIPE, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "nnUNet_n_proc_DA": "1"},
        )  # fmt: skip
        result = {"name": name, "load_average": os.getloadavg()[0], **json.loads(out.stdout.splitlines()[-1])}
        self.raw.append(result)
        total = sum(result["seconds"].values()) - result["seconds"]["load"]
        print(
            f"  {name:34} {total:8.2f} s {result['peak_bytes'] / 2**20:8.0f} MiB", file=sys.stderr, flush=True
        )
        return result

    def median(self, name: str) -> dict[str, Any]:
        """Median per stage and of the total (without load), and of the peak, of every run of a name."""
        runs = [r for r in self.raw if r["name"] == name]
        middle: dict[str, Any] = {s: statistics.median(r["seconds"][s] for r in runs) for s in STAGES}
        middle["total"] = statistics.median(sum(r["seconds"].values()) - r["seconds"]["load"] for r in runs)
        middle["MiB"] = statistics.median(r["peak_bytes"] for r in runs) / 2**20
        middle["cpu"] = statistics.median(r["cpu_seconds"] for r in runs)
        for key in ("estimate_bytes", "before_bytes"):
            if key in runs[0]:
                middle[key] = statistics.median(r[key] for r in runs) / 2**20
        return middle


def quantize(source: Path, target: Path, patch: tuple[int, ...]) -> None:
    """INT8 by NNCF on noise: no accuracy is meant, only the speed of such a graph."""
    import logging

    import nncf
    import onnx

    nncf.set_log_level(logging.ERROR)
    noise = np.random.default_rng(0).normal(size=(1, 1, *patch)).astype(np.float32)
    with open(os.devnull, "w") as null:
        stdout, sys.stdout = sys.stdout, null
        try:
            quantized = nncf.quantize(onnx.load(source), nncf.Dataset([{"image": noise}]), subset_size=1)
        finally:
            sys.stdout = stdout
    onnx.save(quantized, target)


def sgemm_gflops(threads: int) -> float:
    """float32 matrix product, GFLOP/s, best of five."""
    code = (
        "import numpy as np, time; a = np.ones((2048, 2048), 'f4'); b = a.copy(); a @ b; t = []\n"
        "for _ in range(5):\n s = time.perf_counter(); a @ b; t.append(time.perf_counter() - s)\n"
        "print(2 * 2048**3 / min(t) / 1e9)"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    return float(
        subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True).stdout
    )


def network_gflop(path: Path, patch: tuple[int, ...]) -> float:
    """Multiply-adds of every convolution for one patch, times two, in 10^9."""
    import onnx

    from models.runtimes import fix_shape

    model = onnx.load(path)
    fix_shape(model, (1, 1, *patch))
    graph = onnx.shape_inference.infer_shapes(model).graph
    weights = {t.name: list(t.dims) for t in graph.initializer}
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    flops = 0
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            positions = shapes[node.output[0] if node.op_type == "Conv" else node.input[0]][2:]
            flops += 2 * int(np.prod(weights[node.input[1]])) * int(np.prod(positions))
    return flops / 1e9


def table(bench: Bench, rows: list[str], reference: str) -> list[str]:
    """One line for each name, with its ratios to the reference: wall clock, processor time (of both cores,
    loading included; it says more than the clock where others share the machine), peak memory."""
    columns = (*(s for s in STAGES if s != "load"), "total", "cpu")
    heads = "".join(f"{c:>11}" for c in columns)
    lines = [f"{'':30}{heads}{'peak MiB':>10}{'faster':>8}{'less cpu':>10}{'memory':>8}"]
    base = bench.median(reference)
    for name in rows:
        m = bench.median(name)
        numbers = "".join(f"{m[c]:11.2f}" for c in columns)
        wall, cpu, memory = base["total"] / m["total"], base["cpu"] / m["cpu"], m["MiB"] / base["MiB"]
        lines.append(f"{name:30}{numbers}{m['MiB']:10.0f}{wall:7.2f}x{cpu:9.2f}x{memory:8.2f}")
    return lines


def benchmark(bench: Bench, runs: int, teacher: bool) -> list[str]:
    """Every part in turn; returns the report's lines."""
    size = bench.size
    shape, spacing = size["shape"], (1.0, 1.0, 1.0)
    student, image = bench.model("student", size["labels"], int8=True), bench.volume(shape, spacing)
    common = {"model": str(student), "image": str(image), "spacing_xyz": spacing}
    names = [
        "nnU-Net, student",
        "engine float32, student",
        "engine int8, student",
        "engine float32, onnxruntime",
    ]
    bench.run("warm the caches", side="engine", **common)
    bench.run("warm the caches", side="engine", int8=True, **common)
    for _ in range(runs):
        bench.run(names[0], side="nnunet", **common)
        bench.run(names[1], side="engine", **common)
        bench.run(names[2], side="engine", int8=True, **common)
    bench.run(names[3], side="engine", runtime="onnxruntime", **common)
    lines = [f"Whole volume, {shape} at 1 mm, {size['labels']} labels, patch {size['patch']}, seconds", ""]
    lines += table(bench, names, names[0])
    if teacher:
        large = {**common, "model": str(bench.model("teacher", size["labels"]))}
        bench.run("nnU-Net, teacher", side="nnunet", **large)
        lines += ["", *table(bench, ["nnU-Net, teacher", names[1], names[2]], "nnU-Net, teacher")]
    estimate = bench.median(names[1])
    lines += [
        "",
        f"memory estimated {estimate['estimate_bytes']:.0f} MiB, measured {estimate['MiB']:.0f} MiB",
    ]
    lines += ["", *export_part(bench, runs)]
    lines += ["", "Growth of the engine (float32), seconds and MiB", ""]
    grown: list[tuple[str, dict[str, Any]]] = []
    for factor in (0.5, 1.0, 1.5):
        big = tuple(round(n * factor) for n in shape)
        grown.append((f"volume {big}", {**common, "image": str(bench.volume(big, spacing))}))
    for labels in (2, size["many"]):
        grown.append((f"{labels} labels", {**common, "model": str(bench.model("student", labels))}))
    grown.append(("one thread", {**common, "threads": 1}))
    for name, job in grown:
        bench.run(name, side="engine", **job)
        m = bench.median(name)
        lines.append(f"{name:34}{m['total']:11.2f}{m['MiB']:10.0f}")
    gflop = network_gflop(student / "fold0.onnx", size["patch"])
    from models.sliding_window import Tiling

    tiles = Tiling.of(shape, size["patch"], 0.5).count
    rates = {n: gflop * tiles / bench.median(n)["forward"] for n in names}
    lines += [
        "",
        f"sgemm {sgemm_gflops(2):.0f} GFLOP/s on two threads; convolutions of {gflop:.1f} GFLOP a tile:",
    ]
    lines += [f"{name:34}{rate:8.0f} GFLOP/s" for name, rate in rates.items()]
    return lines


def export_part(bench: Bench, runs: int) -> list[str]:
    """After the last tile, many labels, 1 mm to 1.2 x 0.8 x 0.8 mm."""
    shape, labels = bench.size["shape"], bench.size["many"]
    new = tuple(round(n / s) for n, s in zip(shape, EXPORT_SPACING, strict=True))
    common = {"kind": "export", "shape": shape, "new_shape": new, "labels": labels, "whole_logits": False,
              "model": str(bench.model("student", labels))}  # fmt: skip
    names = ["nnU-Net", "engine, features and head", "engine, whole logits"]
    for index in range(runs):
        if index == 0:
            bench.run("export: " + names[0], side="nnunet", **common)
        bench.run("export: " + names[1], side="engine", **common)
        bench.run("export: " + names[2], side="engine", **{**common, "whole_logits": True})
    base = bench.median("export: " + names[0])
    lines = [f"Export of {labels} labels, {shape} at 1 mm to {new} at 1.2 x 0.8 x 0.8 mm", ""]
    for name in names:
        m = bench.median("export: " + name)
        lines.append(
            f"{name:34}{m['export']:11.2f} s{m['MiB']:8.0f} MiB, {m['MiB'] - m['before_bytes']:.0f} of them "
            f"for the export; {base['export'] / m['export']:.0f}x, memory {m['MiB'] / base['MiB']:.2f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--teacher", action="store_true", help="also nnU-Net on the full-width network")
    parser.add_argument("--log", type=Path, help="write every single measurement here, as JSON lines")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.size, Path(folder))
        load = os.getloadavg()[0]
        lines = benchmark(bench, arguments.runs, arguments.teacher)
    model_name = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    header = [
        f"{platform.platform()}, {model_name}, {os.cpu_count()} cores, load before {load:.2f}",
        f"medians of {arguments.runs} runs, the sides alternating",
        "",
    ]
    print("\n".join(header + lines))
    if arguments.log:
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        arguments.log.write_text(
            "".join(json.dumps(r) + "\n" for r in [{"report": header + lines}, *bench.raw])
        )


if __name__ == "__main__":
    main()
