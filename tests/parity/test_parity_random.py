"""Gate (a) on random weights: every way that plans can differ, on every CPU runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nnunet_reference import PLAIN, FolderOfWeights, ReferenceModel, reference_model
from numpy.typing import NDArray

from models import lanes, runtimes
from models.runtimes import available_runtimes
from models.segmenter import Segmenter
from models.volume import Volume

CASES: dict[str, dict[str, Any]] = {
    "one tile": {"shape": (16, 16, 16)},
    "several tiles": {"shape": (40, 37, 29)},
    "smaller than the patch": {"shape": (9, 30, 12)},
    "odd patch": {"shape": (31, 25, 20), "patch_size": (12, 20, 16)},
    "cropping": {"shape": (30, 34, 36), "border": 5},
    "mask for the norm": {"shape": (30, 34, 36), "border": 5, "use_mask": True},
    "cubic up and down": {"shape": (26, 30, 22), "at": (1.3, 0.8, 1.0), "border": 2},
    "separate z of the image": {"shape": (9, 34, 30), "at": (4.0, 0.8, 0.8), "spacing": (3.2, 1.0, 1.0)},
    "separate z of the model": {"shape": (24, 30, 28), "at": (2.0, 1.0, 1.2), "spacing": (4.0, 1.0, 1.0)},
    "separate y": {"shape": (30, 9, 28), "at": (1.0, 5.0, 1.1), "spacing": (1.2, 1.2, 1.2)},
    "separate x": {"shape": (30, 28, 9), "at": (1.0, 1.0, 5.0), "spacing": (1.0, 1.0, 4.0)},
    "two coarse axes": {"shape": (12, 12, 40), "at": (4.0, 4.0, 1.0), "spacing": (2.0, 2.0, 1.0)},
    "forced separate z": {
        "shape": (20, 26, 26), "at": (1.5, 1.0, 1.0), "spacing": (1.2, 1.1, 1.1), "force_separate_z": True,
    },
    "transposes": {"shape": (28, 22, 34), "at": (0.9, 1.4, 1.1), "transpose_forward": (2, 0, 1), "seed": 3},
    "two channels": {
        "shape": (22, 26, 24), "at": (1.0, 1.2, 0.9), "border": 3,
        "schemes": ("CTNormalization", "ZScoreNormalization"),
    },
    "other norms": {"shape": (20, 22, 24), "schemes": ("RescaleTo01Normalization", "NoNormalization")},
    "regions": {
        "shape": (24, 26, 22), "at": (1.2, 1.0, 1.0),
        "regions": {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}, "regions_class_order": (1, 2, 3),
    },
    "regions, head taken off": {
        "shape": (24, 26, 22), "features": (2, 4),
        "regions": {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}, "regions_class_order": (3, 1, 2),
    },
    "mirroring": {"shape": (20, 24, 18), "mirror_axes": (0, 1, 2), "seed": 3},
    "mirroring two axes": {"shape": (20, 24, 18), "mirror_axes": (0, 2), "n_labels": 7},
    "several folds": {"shape": (20, 24, 26), "folds": 3, "at": (1.1, 1.0, 0.9)},
    "several folds, heads taken off": {"shape": (20, 24, 26), "folds": 2, "n_labels": 14},
    "folds and mirroring": {"shape": (18, 20, 16), "folds": 2, "mirror_axes": (1,), "n_labels": 11},
    "many labels": {"shape": (24, 40, 22), "at": (1.0, 0.8, 1.2), "n_labels": 60},
    "more than 255 labels": {"shape": (18, 17, 19), "n_labels": 300},
    "plain network": {"shape": (24, 20, 24), "architecture": PLAIN, "features": (4, 8, 8), "n_labels": 2},
    "anisotropic strides": {
        "shape": (20, 30, 30), "features": (4, 8, 8), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    },
    "long third axis": {"shape": (18, 16, 70), "at": (1.0, 1.0, 0.7), "n_labels": 5},
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_image: Callable[..., NDArray[np.float32]],
) -> tuple[FolderOfWeights, NDArray[np.float32], tuple[float, ...], NDArray[Any]]:
    options = dict(CASES[request.param])
    shape, spacing = options.pop("shape"), options.pop("at", (1.0, 1.0, 1.0))
    image = make_image(shape, channels=len(options.get("schemes", "1")), border=options.pop("border", 0))
    model: ReferenceModel = reference_model(**options)
    reference = model.predict(image, spacing, float32=True)
    return model.export(tmp_path_factory.mktemp("parity")), image, spacing, reference


@pytest.fixture(params=["openvino", "openvino, widened", "onnxruntime"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A runtime; also one whose narrow layers are widened, as they are in networks of a real size."""
    name, _, widened = str(request.param).partition(", ")
    if name not in available_runtimes():
        pytest.skip(f"{name} is not installed")
    if widened:
        monkeypatch.setattr(lanes, "_LEAST_VOXELS", 1)
        monkeypatch.setattr(runtimes, "vector_lanes", lambda: 16)
    return name


def test_equal_to_nnunet_with_float32_sums(
    case: tuple[FolderOfWeights, NDArray[np.float32], tuple[float, ...], NDArray[Any]],
    runtime: str,
    gate_a: Callable[[NDArray[Any], NDArray[Any]], float],
) -> None:
    model, image, spacing, reference = case
    assert len(np.unique(reference)) > 1, "a case with one label proves nothing"
    segmenter = Segmenter(model, runtime=runtime, threads=2)
    labels = segmenter.segment(Volume(image, np.diag([*spacing[::-1], 1.0])))
    segmenter.close()
    gate_a(reference, labels.array)
    assert labels.array.dtype == (np.uint8 if reference.max() < 256 else np.uint16)
