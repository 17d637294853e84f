"""The engine against nnU-Net's own predictor, on the same weights and volumes, in one run.

    python tests/benchmarks/engine.py --size full --teacher --log full.jsonl --markdown README.md

Weights are random: speed and memory do not depend on them. Every measurement is a fresh process, which
loads, runs and reports its own peak memory; the two sides alternate, and medians are shown. The compiled
model and kernel caches of the engine are warm, as on a node that has started before.

Every measurement is in the log as soon as it is made. Started again with the same log, the benchmark does
what is missing; ``--parts`` with no name only reports. On two quiet cores of a recent Xeon the parts take
about: whole 3 min, teacher 6, export 4, growth 2, dicom 1, peak 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402
from dicom_jobs import measure_dicom  # noqa: E402
from engine_jobs import EXPORT_SPACING, measure  # noqa: E402
from engine_report import (  # noqa: E402
    DICOM,
    EXPORT,
    EXPORT_NNUNET,
    EXPORT_WHOLE,
    FLOAT32,
    INT8,
    NNUNET,
    ONNXRUNTIME,
    TEACHER,
    Log,
    into,
    markdown,
    text,
)

SIZES: dict[str, dict[str, Any]] = {
    "full": {"shape": (192, 224, 192), "patch": (128, 128, 128), "stages": 6, "labels": 32, "many": 114},
    "small": {"shape": (96, 112, 96), "patch": (64, 64, 64), "stages": 5, "labels": 12, "many": 40},
}
WIDTHS = {"student": (8, 16, 32, 64, 80, 80), "teacher": (32, 64, 128, 256, 320, 320)}
BLOCKS = (1, 3, 4, 6, 6, 6)


class Bench:
    """Models and volumes in a temporary folder, jobs in fresh processes, every result in the log."""

    def __init__(self, size: str, folder: Path, log: Log) -> None:
        self.name, self.size, self.folder, self.log = size, SIZES[size], folder, log
        self.failed: list[str] = []
        self.warmed: set[str] = set()

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

    def run(self, name: str, *, number: int = 1, **job: Any) -> None:
        """The ``number``-th run of a name, unless the log has so many already. A failure is told and left."""
        if len(self.log.runs(name)) >= number:
            return
        defaults = {"kind": "whole", "threads": 2, "runtime": "auto", "int8": False, "size": self.name}
        places = {"out": str(self.folder / "o.nii.gz"), "cache": str(self.folder / "cache")}
        job = {**defaults, **places, **job}
        out = subprocess.run(
            [sys.executable, __file__, "--job", json.dumps(job)],
            stdout=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "nnUNet_n_proc_DA": "1"},
        )  # fmt: skip
        if out.returncode != 0:
            self.failed.append(name)
            print(f"  {name:34} ended with status {out.returncode}", file=sys.stderr, flush=True)
            return
        result = {"name": name, "load_average": os.getloadavg()[0], **json.loads(out.stdout.splitlines()[-1])}
        self.log.add(result)
        told = {k: round(v, 2) for k, v in result["seconds"].items() if v}
        print(
            f"  {name:34} {result.get('peak_bytes', 0) / 2**20:6.0f} MiB {told}", file=sys.stderr, flush=True
        )


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


def whole_part(bench: Bench, runs: int) -> None:
    """One volume from file to labelmap: nnU-Net's predictor, and the engine in each precision."""
    student = bench.model("student", bench.size["labels"], int8=True)
    common = _common(bench, student)
    _warm(bench, common)
    _warm(bench, common, int8=True)
    for number in range(1, runs + 1):
        bench.run(NNUNET, number=number, side="nnunet", **common)
        bench.run(FLOAT32, number=number, side="engine", **common)
        bench.run(INT8, number=number, side="engine", int8=True, **common)
    bench.run(ONNXRUNTIME, side="engine", runtime="onnxruntime", **common)


def teacher_part(bench: Bench, runs: int) -> None:
    """nnU-Net's predictor on the network of full width."""
    common = _common(bench, bench.model("teacher", bench.size["labels"]))
    for number in range(1, runs + 1):
        bench.run(TEACHER, number=number, side="nnunet", **common)


def export_part(bench: Bench, runs: int) -> None:
    """After the last tile, many labels, 1 mm to 1.2 x 0.8 x 0.8 mm."""
    shape, labels = bench.size["shape"], bench.size["many"]
    new = tuple(round(n / s) for n, s in zip(shape, EXPORT_SPACING, strict=True))
    common = {"kind": "export", "shape": shape, "new_shape": new, "labels": labels, "whole_logits": False,
              "model": str(bench.model("student", labels))}  # fmt: skip
    for number in range(1, runs + 1):
        bench.run(EXPORT_NNUNET, number=number, side="nnunet", **common)
        bench.run(EXPORT, number=number, side="engine", **common)
        bench.run(EXPORT_WHOLE, number=number, side="engine", **{**common, "whole_logits": True})


def growth_part(bench: Bench, runs: int) -> None:
    """How the cost of the engine grows: with the volume, the labels, and fewer threads."""
    shape = bench.size["shape"]
    common = _common(bench, bench.model("student", bench.size["labels"]))
    _warm(bench, common)
    for factor in (0.5, 1.0, 1.5):
        big = tuple(round(n * factor) for n in shape)
        image = str(bench.volume(big, (1.0, 1.0, 1.0)))
        bench.run(f"growth: volume {big}", side="engine", **{**common, "image": image})
    for labels in (2, bench.size["many"]):
        model = str(bench.model("student", labels))
        bench.run(f"growth: {labels} labels", side="engine", **{**common, "model": model})
    bench.run("growth: one thread", side="engine", **{**common, "threads": 1})


def dicom_part(bench: Bench, runs: int) -> None:
    """Reading a series, writing a Segmentation, and all objects of a result."""
    for name in DICOM:
        bench.run(name, kind="dicom", part=name.removeprefix("dicom: "))


def peak_part(bench: Bench, runs: int) -> None:
    """What the machine does in a matrix product, and what the convolutions of one volume are."""
    from models.sliding_window import Tiling

    if bench.log.runs("peak"):
        return
    size = bench.size
    path = bench.model("student", size["labels"]) / "fold0.onnx"
    figures = {
        "sgemm_gflops": sgemm_gflops(2),
        "gflop": network_gflop(path, size["patch"]),
        "tiles": Tiling.of(size["shape"], size["patch"], 0.5).count,
    }
    bench.log.add({"name": "peak", **figures})


PARTS = {
    "whole": whole_part,
    "teacher": teacher_part,
    "export": export_part,
    "growth": growth_part,
    "dicom": dicom_part,
    "peak": peak_part,
}


def _common(bench: Bench, model: Path) -> dict[str, Any]:
    spacing = (1.0, 1.0, 1.0)
    image = bench.volume(bench.size["shape"], spacing)
    return {"model": str(model), "image": str(image), "spacing_xyz": spacing}


def _warm(bench: Bench, common: dict[str, Any], *, int8: bool = False) -> None:
    """Fill the caches of compiled models and kernels, once in each sitting."""
    name = "warm int8" if int8 else "warm"
    if name not in bench.warmed:
        bench.warmed.add(name)
        bench.run(name, number=len(bench.log.runs(name)) + 1, side="engine", int8=int8, **common)


def machine() -> str:
    """Processor, cores and system, for the log."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {platform.platform()}, load before {os.getloadavg()[0]:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--teacher", action="store_true", help="also nnU-Net on the full-width network")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="all but the teacher if not given")
    parser.add_argument("--log", type=Path, help="every measurement, as JSON lines; what it holds is not run")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="further logs to report with")
    parser.add_argument("--markdown", type=Path, help="a document whose marked table is made from the log")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps(measure_dicom(job) if job["kind"] == "dicom" else measure(job)))
        return 0
    log = Log(arguments.log, tuple(arguments.merge))
    parts = arguments.parts
    if parts is None:
        parts = [name for name in PARTS if name != "teacher" or arguments.teacher]
    failed = []
    if parts:
        log.begin(machine())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.size, Path(folder), log)
        for name in parts:
            print(f"{name}: {(PARTS[name].__doc__ or '').strip()}", file=sys.stderr, flush=True)
            PARTS[name](bench, arguments.runs)
        failed = bench.failed
    print("\n".join(text(log)))
    if arguments.markdown:
        arguments.markdown.write_text(into(arguments.markdown.read_text(), markdown(log)))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
