"""What one process of the engine's benchmark does: load, run once, report seconds and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from models.resources import peak_resident_bytes

STAGES = ("load", "read", "preprocess", "forward", "accumulate", "export")
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


def measure_nnunet(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Stock nnU-Net on the random weights of `engine.Bench.model`."""
    import torch
    from nnunet_reference import ReferenceModel

    torch.set_num_threads(job["threads"])
    with clock.on("load"):
        saved = torch.load(Path(job["model"]) / "model.pt", weights_only=False)
        predictor = ReferenceModel(saved["plans"], saved["dataset"], None, saved["parameters"]).predictor()
    predict_file(predictor, job, clock)
    return {}


def predict_file(predictor: Any, job: dict[str, Any], clock: Clock) -> None:
    """Stock nnU-Net from ``image`` to ``out``: its reader, preprocessor, predictor and exporter."""
    import contextlib
    import io

    import torch
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

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
        before = peak_resident_bytes()
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
    before = peak_resident_bytes()
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


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in this process."""
    clock = Clock()
    cpu = time.process_time()
    how = {"nnunet": measure_nnunet, "engine": measure_engine}[job["side"]]
    if job["kind"] == "export":
        how = measure_export
    extra = how(job, clock)
    cpu = time.process_time() - cpu
    return {"seconds": clock.seconds, "cpu_seconds": cpu, "peak_bytes": peak_resident_bytes(), **extra}
