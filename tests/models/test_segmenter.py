"""From volume to labelmap: grids, orientations, refusals, progress, memory, and every voxel's decision."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import expected_labels, golden_images, make_threshold_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_reference import FolderOfWeights, reference_model
from numpy.typing import NDArray

from models import kernels, segmenter
from models.bundle import Bundle
from models.errors import (
    NonFiniteLogitsError,
    OutOfMemoryError,
    ReasonCode,
    Refusal,
    RuntimeUnavailableError,
    UnsupportedModelError,
)
from models.linear_head import LinearHead
from models.manifest import Manifest, Precision
from models.painting import Painter
from models.preprocessing import Placement
from models.resampling import Taps, logits_taps
from models.segmenter import Progress, Segmenter
from models.sliding_window import Planes, Tiling
from models.volume import Volume, reorient

THRESHOLDS = (100.5, 300.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_threshold_bundle(tmp_path_factory.mktemp("bundles") / "one", orientation="RAS")


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[Segmenter]:
    opened = Segmenter(bundle, threads=2)
    yield opened
    opened.close()


@pytest.fixture
def volume() -> Volume:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = (3, 4, 5)
    return Volume(golden_images(1, THRESHOLDS), affine, "1.2.840.1")


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"head": "sigmoid"},
        {"channels": 2},
        {"folds": 2},
        {"mirror_axes": (0, 2)},
        {"slow_convolutions": 2},
    ],
    ids=str,
)
def test_the_labelmap_is_what_the_thresholds_say(
    variant: dict[str, Any], runtime: str, tmp_path: Path, volume: Volume
) -> None:
    bundle = make_threshold_bundle(tmp_path / "b", **variant)
    images = golden_images(variant.get("channels", 1), THRESHOLDS)
    opened = Segmenter(bundle, runtime=runtime, threads=2)
    labelmap = opened.segment(replace(volume, array=images))
    opened.close()
    assert opened.runtime_name == runtime
    assert np.array_equal(labelmap.array, expected_labels(images, THRESHOLDS))
    assert np.array_equal(labelmap.affine, volume.affine)
    assert labelmap.frame_of_reference_uid == "1.2.840.1"


CODES = ["".join(letters) for pairs in permutations(["LR", "PA", "SI"]) for letters in product(*pairs)]


def test_every_orientation_gives_the_same_labels_in_the_patient(tmp_path: Path) -> None:
    """A network that is not symmetric sees the same array whatever the axes of the volume that came."""
    reference = reference_model(n_labels=6, spacing=(1.2, 1.0, 0.9), patch_size=(8, 16, 8), seed=3)
    opened = Segmenter(reference.export(tmp_path, orientation="RAS"), threads=1)
    rng = np.random.default_rng(0)
    volume = Volume(rng.normal(size=(1, 9, 14, 11)).astype(np.float32), np.diag([-0.8, -1.1, 1.3, 1.0]))
    expected = opened.segment(volume).array
    assert len(np.unique(expected)) > 2
    for code in CODES:
        turned, change = reorient(volume, code)
        labelmap = opened.segment(turned)
        assert np.array_equal(labelmap.array, change.apply(expected)), code
        assert labelmap.array.flags.c_contiguous
    opened.close()


def test_int8_weights_are_run_where_asked_for(tmp_path: Path, volume: Volume) -> None:
    opened = Segmenter(make_threshold_bundle(tmp_path / "b", int8=True), precision=Precision.INT8, threads=1)
    assert opened.precision is Precision.INT8
    assert np.array_equal(opened.segment(volume).array, expected_labels(volume.array, THRESHOLDS))


def test_weights_that_are_not_there_are_named(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedModelError, match="has no int8 weights"):
        Segmenter(bundle, precision=Precision.INT8)


def test_a_runtime_that_is_not_there_is_named(bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match="onnxruntime-cuda"):
        Segmenter(bundle, runtime="onnxruntime-cuda")


def test_spline_resampling_of_probabilities_is_refused_before_any_volume(tmp_path: Path) -> None:
    folder = reference_model().export(tmp_path)
    manifest = folder.manifest.model_dump(mode="json")
    manifest["preprocessing"]["resampling_probabilities"]["order"] = 3
    with pytest.raises(UnsupportedModelError, match="order 3"):
        Segmenter(replace(folder, manifest=Manifest.model_validate_json(json.dumps(manifest))))


def test_progress_goes_forward_and_arrives(model: Segmenter, volume: Volume) -> None:
    seen: list[Progress] = []
    model.segment(volume, progress=seen.append)
    assert [p.stage for p in seen] == sorted(
        (p.stage for p in seen), key=["preprocess", "forward", "export"].index
    )
    for stage in ("preprocess", "forward", "export"):
        steps = [p for p in seen if p.stage == stage]
        assert [p.done for p in steps] == list(range(steps[0].total + 1))
    assert sum(p.stage == "forward" for p in seen) > 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(model: Segmenter, volume: Volume, value: float) -> None:
    volume.array[0, 3, 3, 3:5] = value
    with pytest.raises(Refusal, match="2 voxels") as caught:
        model.segment(volume)
    assert caught.value.reason is ReasonCode.INVALID_VALUES


def test_a_constant_volume_is_refused(model: Segmenter, volume: Volume) -> None:
    with pytest.raises(Refusal, match="is 7 in every voxel") as caught:
        model.segment(replace(volume, array=np.full_like(volume.array, 7)))
    assert caught.value.reason is ReasonCode.INVALID_VALUES


def test_another_number_of_channels_is_refused(model: Segmenter, volume: Volume) -> None:
    with pytest.raises(Refusal, match="takes 1 channels") as caught:
        model.segment(replace(volume, array=np.concatenate([volume.array] * 2)))
    assert caught.value.reason is ReasonCode.MISSING_CHANNEL


def test_a_network_that_overflows_is_an_error_and_not_background(tmp_path: Path, volume: Volume) -> None:
    opened = Segmenter(make_threshold_bundle(tmp_path / "b"), threads=1)
    with np.errstate(over="ignore"), pytest.raises(NonFiniteLogitsError):
        opened.segment(replace(volume, array=volume.array * np.float32(9e35)))


def test_a_volume_that_will_not_fit_is_refused_with_its_figures(
    model: Segmenter, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenter, "available_memory_bytes", lambda: -(10**9))
    with pytest.raises(OutOfMemoryError, match=r"needs about -?\d+\.\d GB, but -1\.0 GB are free"):
        model.segment(volume)


def test_a_volume_that_could_never_fit_is_refused_for_good(
    tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the limit that is configured, or by the machine's: neither can be mended by waiting."""
    folder = reference_model().export(tmp_path)
    estimate = Segmenter(folder, threads=1).estimate_peak_bytes(volume.shape_zyx, (1, 1, 1))
    Segmenter(folder, threads=1, memory_limit=2 * estimate).segment(volume)
    sentence = rf"takes up to \d+\.\d GB of memory, but the limit is {estimate / 1e9:.1f} GB"
    with pytest.raises(Refusal, match=sentence) as refusal:
        Segmenter(folder, threads=1, memory_limit=estimate).segment(volume)
    assert refusal.value.reason is ReasonCode.TOO_LARGE
    monkeypatch.setattr(segmenter, "memory_limit_bytes", lambda: estimate)
    with pytest.raises(Refusal, match=sentence):
        Segmenter(folder, threads=1).segment(volume)


JOBS = """
import json, sys
import numpy as np
from pathlib import Path
from models.manifest import Manifest
from models.resources import resident_bytes
from models.segmenter import Segmenter
from models.volume import Volume

class Folder:
    manifest = Manifest.model_validate_json(Path(sys.argv[1], "model.json").read_bytes())
    def weight_paths(self, precision):
        return (Path(sys.argv[1], "fold0.onnx"),)

segmenter, random, resident = Segmenter(Folder(), threads=1), np.random.default_rng(0), []
for job in range(200):
    shape = random.integers(10, 30, 3)
    segmenter.segment(Volume(random.random((1, *shape), np.float32), np.diag([1.0, 0.9, 1.1, 1.0])))
    resident.append(resident_bytes())
print(json.dumps(resident))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_stays_flat_over_two_hundred_jobs(tmp_path: Path) -> None:
    """Volumes of all sizes; the last hundred jobs may add no more than noise to what the first have taken."""
    folder = reference_model(features=(4, 8), n_labels=20).export(tmp_path)
    (tmp_path / "model.json").write_text(folder.manifest.model_dump_json())
    out = subprocess.run(
        [sys.executable, "-c", JOBS, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        check=True,
    )
    resident = np.array(json.loads(out.stdout))
    assert len(resident) == 200
    slope_bytes = np.polyfit(np.arange(100), resident[100:], 1)[0]
    assert slope_bytes < 20_000  # one small volume kept for each job would be 30,000; its logits a million
    assert resident[100:].max() < resident[50:100].max() + 4 * 2**20


def test_the_estimate_grows_with_what_is_held_and_not_with_labels_times_volume(
    tmp_path: Path,
) -> None:
    opened = Segmenter(reference_model(n_labels=60).export(tmp_path), threads=1)
    small, long = (opened.estimate_peak_bytes((60, 60, z), (1, 1, 1)) for z in (60, 600))
    per_voxel = (long - small) / (60 * 60 * 540)
    assert 0 < per_voxel < 30  # 61 logits alone would be 244 bytes


MEASURE = """
import json, sys
import numpy as np
from pathlib import Path
from models.manifest import Manifest
from models.segmenter import Segmenter
from models.volume import Volume

class Folder:
    manifest = Manifest.model_validate_json(Path(sys.argv[1], "model.json").read_bytes())
    def weight_paths(self, precision):
        return (Path(sys.argv[1], "fold0.onnx"),)

shape, spacing, runtime = json.loads(sys.argv[2])
segmenter = Segmenter(Folder(), runtime=runtime, threads=1)
volume = Volume(np.random.default_rng(0).random((1, *shape), np.float32), np.diag([*spacing, 1.0]))
segmenter.segment(volume)
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([segmenter.estimate_peak_bytes(tuple(shape), tuple(spacing)), peak]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(("shape", "spacing"), [((64, 64, 64), (1, 1, 1)), ((48, 60, 260), (1.3, 0.9, 0.8))])
def test_the_memory_estimate_is_right_within_a_fifth(
    runtime: str, shape: tuple[int, ...], spacing: tuple[float, ...], tmp_path: Path
) -> None:
    reference = reference_model(features=(8, 16), patch_size=(48, 48, 48), n_labels=20)
    folder: FolderOfWeights = reference.export(tmp_path)
    (tmp_path / "model.json").write_text(folder.manifest.model_dump_json())
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), json.dumps([shape, spacing, runtime])],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        check=True,
    )
    estimate, measured = json.loads(out.stdout)
    assert estimate == pytest.approx(measured, rel=0.2)


# --- painting: interpolation, head and decision, against the same in plain numpy -------------------------


def plain_paint(
    features: NDArray[np.float32],
    taps: tuple[Taps, Taps, Taps],
    head: LinearHead | None,
    regions: tuple[int, ...],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The slow reference: all logits of the whole volume; the labels, and how clear each decision is."""
    logits = features.astype(np.float64)
    if head is not None:
        logits = np.tensordot(head.matrix, logits, 1) + head.bias[:, None, None, None]
    for axis, tap in enumerate(taps, 1):
        part = tap.part.astype(np.float64).reshape([-1 if a == axis else 1 for a in range(4)])
        logits = logits.take(tap.low, axis) * (1 - part) + logits.take(tap.high, axis) * part
    if not regions:
        top = np.sort(logits, axis=0)
        return logits.argmax(0), top[-1] - top[-2]
    labels = np.zeros(logits.shape[1:], np.int64)
    for value, logit in zip(regions, logits, strict=True):
        labels[logit > 0] = value
    return labels, np.abs(logits).min(axis=0)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 11)] * 3),
    st.booleans(),
    st.sampled_from([(), (3, 1, 2, 9)]),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_painting_is_interpolation_then_head_then_decision(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    with_head: bool,
    regions: tuple[int, ...],
    threads: int,
    cut: int,
) -> None:
    rng = np.random.default_rng(0)
    classes = 4
    head = None
    if with_head:
        head = LinearHead(rng.normal(size=(classes, 3)).astype("f4"), rng.normal(size=classes).astype("f4"))
    channels = 3 if with_head else classes
    sums = rng.normal(size=(channels + 1, *shape)).astype(np.float32)
    manifest = reference_model(
        n_labels=classes - 1,
        regions={f"r{v}": [v] for v in regions} or None,
        regions_class_order=regions or None,
    ).manifest()
    how = manifest.preprocessing
    everything = (slice(0, new_shape[0]), slice(0, new_shape[1]), slice(0, new_shape[2]))
    placement = Placement(new_shape, everything, new_shape, shape, (1.0, 1.0, 1.0))
    workers = kernels.Workers(threads)
    painter = Painter(manifest, placement, Tiling.of(shape, (1, 1, 1), 1.0), head, workers)
    axis = painter._axis
    edges = sorted({0, min(cut, shape[axis]), shape[axis]})
    for first, last in pairwise(edges):
        painter.paint(Planes(sums, 0, first, last))
    workers.close()
    taps = logits_taps(shape, new_shape, how.spacing_mm, (1, 1, 1), how.resampling_probabilities)
    expected, margin = plain_paint(sums[:-1], taps, head, regions)
    clear = margin > 1e-5
    assert np.array_equal(painter.labels[clear], expected[clear])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_noticed(value: float) -> None:
    manifest = reference_model(n_labels=2).manifest()
    shape = (3, 4, 5)
    placement = Placement(shape, (slice(0, 3), slice(0, 4), slice(0, 5)), shape, shape, (1.0, 1.0, 1.0))
    sums = np.ones((4, *shape), np.float32)
    sums[1, 2, 3, 4] = value
    workers = kernels.Workers(2)
    painter = Painter(manifest, placement, Tiling.of(shape, (1, 1, 1), 1.0), None, workers)
    with pytest.raises(NonFiniteLogitsError):
        painter.paint(Planes(sums, 0, 0, shape[painter._axis]))
    workers.close()
