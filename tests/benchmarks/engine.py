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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402

STAGES = ("load", "read", "preprocess", "forward", "accumulate", "export")
SIZES: dict[str, dict[str, Any]] = {
    "full": {"shape": (192, 224, 192), "patch": (128, 128, 128), "stages": 6, "labels": 32, "many": 114},
    "small": {"shape": (96, 112, 96), "patch": (64, 64, 64), "stages": 5, "labels": 12, "many": 40},
}
WIDTHS = {"student": (8, 16, 32, 64, 80, 80), "teacher": (32, 64, 128, 256, 320, 320)}
BLOCKS = (1, 3, 4, 6, 6, 6)
EXPORT_SPACING = (1.2, 0.8, 0.8)


class Clock:
    """Seconds per stage, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.on(stage):
                return function(*arguments, **named)

        return timed


# --- one measurement, in a process of its own ---------------------------------------------------------


def measure_nnunet(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Stock nnU-Net from file to file: its reader, preprocessor, predictor and exporter."""
    import contextlib
    import io

    import torch
    from nnunet_reference import ReferenceModel
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

    torch.set_num_threads(job["threads"])
    with clock.on("load"):
        saved = torch.load(Path(job["model"]) / "model.pt", weights_only=False)
        predictor = ReferenceModel(saved["plans"], saved["dataset"], None, saved["parameters"]).predictor()
    predictor._internal_maybe_mirror_and_predict = clock.around(
        "forward", predictor._internal_maybe_mirror_and_predict
    )
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    with contextlib.redirect_stdout(io.StringIO()):
        with clock.on("read"):
            array, properties = plans.image_reader_writer_class().read_images((job["image"],))
        with clock.on("preprocess"):
            preprocessor = configuration.preprocessor_class(verbose=False)
            data, _, properties = preprocessor.run_case_npy(
                array, None, properties, plans, configuration, predictor.dataset_json
            )
            data = torch.from_numpy(data).contiguous()
        with clock.on("accumulate"):
            logits = predictor.predict_logits_from_preprocessed_data(data)
        clock.seconds["accumulate"] -= clock.seconds["forward"]
        with clock.on("export"):
            export_prediction_from_logits(
                logits, properties, configuration, plans, predictor.dataset_json,
                job["out"].removesuffix(".nii.gz"), num_threads_torch=job["threads"],
            )  # fmt: skip
    return {}


def measure_engine(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """The engine from file to file."""
    from models.nifti import read_nifti, write_nifti
    from models.painting import Painter
    from models.segmenter import PREPROCESS, Progress, Segmenter

    with clock.on("load"):
        bundle = SavedModel(Path(job["model"]), job["int8"])
        segmenter = Segmenter(
            bundle, runtime=job["runtime"], threads=job["threads"], cache_dir=Path(job["cache"])
        )
    for index, network in enumerate(segmenter._networks):
        segmenter._networks[index] = clock.around("forward", network)
    Painter.paint = clock.around("export", Painter.paint)
    preprocessed: list[float] = []

    def progress(now: Progress) -> None:
        if now.stage == PREPROCESS and now.done:
            preprocessed.append(time.perf_counter())

    with clock.on("read"):
        volume = read_nifti([Path(job["image"])])
    estimate = segmenter.estimate_peak_bytes(volume.shape_zyx, tuple(job["spacing_xyz"]))
    start = time.perf_counter()
    labelmap = segmenter.segment(volume, progress=progress)
    total = time.perf_counter() - start
    clock.seconds["preprocess"] = preprocessed[0] - start
    clock.seconds["accumulate"] = total - sum(clock.seconds[s] for s in ("preprocess", "forward", "export"))
    with clock.on("export"):
        write_nifti(labelmap, Path(job["out"]))
    return {"estimate_bytes": estimate}


def measure_export(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """What comes after the last tile, from the same logits: nnU-Net's export, or all of our painting."""
    shape, labels = tuple(job["shape"]), job["labels"]
    features = np.random.default_rng(0).normal(size=(8, *(n // 8 for n in shape))).astype(np.float32)
    for axis in (1, 2, 3):
        features = np.repeat(features, 8, axis)
        features = (features + np.roll(features, 4, axis)) / 2
    matrix = np.random.default_rng(1).normal(size=(labels + 1, 8)).astype(np.float32)
    new = tuple(job["new_shape"])
    if job["side"] == "nnunet":
        import torch
        from nnunet_reference import reference_model
        from nnunetv2.inference.export_prediction import (
            convert_predicted_logits_to_segmentation_with_correct_shape as convert,
        )

        predictor = reference_model(n_labels=labels).predictor()
        logits = torch.empty((labels + 1, *shape), dtype=torch.half)
        for row, target in zip(matrix, logits, strict=True):
            target.copy_(torch.from_numpy(np.tensordot(row, features, 1)))
        del features
        properties = {
            "spacing": EXPORT_SPACING, "shape_after_cropping_and_before_resampling": new,
            "shape_before_cropping": new, "bbox_used_for_cropping": [[0, n] for n in new],
        }  # fmt: skip
        before = peak_bytes()
        with clock.on("export"):
            out = convert(
                logits, predictor.plans_manager, predictor.configuration_manager, predictor.label_manager,
                properties, num_threads_torch=job["threads"],
            )  # fmt: skip
        return {"before_bytes": before, "checksum": int(np.asarray(out).astype(np.int64).sum())}

    from models import kernels
    from models.linear_head import LinearHead
    from models.painting import Painter
    from models.preprocessing import Placement
    from models.sliding_window import Planes, Tiling

    kernels.keep_compiled_code_in(Path(job["cache"]) / "kernels")
    manifest = SavedModel(Path(job["model"]), False).manifest
    everything = (slice(0, new[0]), slice(0, new[1]), slice(0, new[2]))
    placement = Placement(new, everything, new, shape, EXPORT_SPACING)
    head = LinearHead(matrix, np.zeros(labels + 1, np.float32))
    if job["whole_logits"]:
        features, head = np.tensordot(matrix, features, 1), None
    sums = np.concatenate((features, np.ones((1, *shape), np.float32)))
    del features
    workers = kernels.Workers(job["threads"])
    warm = Painter(manifest, placement, Tiling.of(shape, (64, 64, 64), 0.5), head, workers)
    warm.paint(Planes(sums, 0, 0, 1))  # load the compiled kernel
    before = peak_bytes()
    with clock.on("export"):
        painter = Painter(manifest, placement, Tiling.of(shape, (64, 64, 64), 0.5), head, workers)
        painter.paint(Planes(sums, 0, 0, shape[painter._axis]))
    return {"before_bytes": before, "checksum": int(painter.labels.astype(np.int64).sum())}


class SavedModel:
    """What the Segmenter asks of a bundle."""

    def __init__(self, folder: Path, int8: bool) -> None:
        from models.manifest import Manifest

        self.manifest = Manifest.model_validate_json((folder / "model.json").read_bytes())
        self._path = folder / ("int8.onnx" if int8 else "fold0.onnx")

    def weight_paths(self, precision: Any) -> tuple[Path, ...]:
        return (self._path,)


def peak_bytes() -> int:
    """The most memory this process has held. (ru_maxrss starts at what the parent held when it forked.)"""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in this process."""
    clock = Clock()
    cpu = time.process_time()
    how = {"nnunet": measure_nnunet, "engine": measure_engine}[job["side"]]
    if job["kind"] == "export":
        how = measure_export
    extra = how(job, clock)
    cpu = time.process_time() - cpu
    return {"seconds": clock.seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes(), **extra}


# --- the whole run -------------------------------------------------------------------------------------


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
