"""Small, exact, deterministic model bundles, so that tests of the whole node need no trained model.

The network is one 1x1x1 convolution on the intensity itself (no normalisation), so the label of a voxel
depends on that voxel alone: on no neighbour, no tile position and no orientation. Label k is given where
the intensity is above threshold k and not above threshold k + 1. With thresholds t1 < t2 < ... the logits
are ``k x - (t1 + ... + tk)``: each step from k - 1 to k adds ``x - tk``, so argmax is the number of
thresholds below x. Thresholds at half integers are never met by integer intensities.

``expected_labels`` is the same rule in numpy. Two calls with equal arguments give byte-identical bundles.

Variants, all by arguments of :func:`make_threshold_bundle`:

- other digest, same labels (for a swap): another ``version``, or other ``thresholds``
- changed labels (a swap that needs confirmation): other ``labels``
- two channels: ``channels=2``; the intensity is then the first channel minus the second
- slow (to kill a job under way): ``slow_convolutions=20`` or more
- a golden case that is wrong: ``golden="wrong"``; that proves nothing: ``golden="empty"``; with a value that
  is no label: ``golden="unknown"``; on two grids: ``golden="shifted"``
- a sigmoid head with nested regions, same labelmaps: ``head="sigmoid"``
- int8 weights as well (exact: only the weights are quantized): ``int8=True``
- several folds: ``folds=2``
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.bundle import Bundle, seal
from models.bundle_files import sha256
from models.manifest import Manifest

GOLDEN_SHAPE_ZYX = (20, 22, 24)

_TYPES = (
    ("10200004", "Liver"),
    ("78961009", "Spleen"),
    ("64033007", "Kidney"),
    ("15776009", "Pancreas"),
    ("69695003", "Stomach"),
    ("89837001", "Bladder"),
)
_COLORS = (
    (221, 130, 101),
    (157, 108, 162),
    (185, 102, 83),
    (249, 180, 111),
    (216, 132, 105),
    (222, 154, 132),
)


def make_threshold_bundle(
    folder: Path,
    *,
    name: str = "threshold",
    version: str = "1.0.0",
    orientation: str = "any",
    thresholds: Sequence[float] = (100.5, 300.5),
    labels: Sequence[str] = ("low", "high"),
    channels: int = 1,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    patch_size: tuple[int, int, int] = (16, 16, 16),
    mirror_axes: Sequence[int] = (),
    head: str = "softmax",
    modality: str | None = None,
    input_limits: dict[str, object] | None = None,
    slow_convolutions: int = 0,
    folds: int = 1,
    int8: bool = False,
    golden: str = "right",
    title: str | None = None,
) -> Bundle:
    """Write a bundle into ``folder`` (created, must be empty), seal it and open it.

    ``thresholds`` are ascending, one per label; ``spacing_mm`` and ``patch_size`` are in (Z, Y, X) order.
    """
    assert len(thresholds) == len(labels) <= len(_TYPES)
    assert list(thresholds) == sorted(thresholds)
    (folder / "golden").mkdir(parents=True)
    weights = []
    for fold in range(folds):
        for precision in ("float32", "int8") if int8 else ("float32",):
            file = (
                f"student{f'.fold{fold}' if folds > 1 else ''}{'.int8' if precision == 'int8' else ''}.onnx"
            )
            data = threshold_network(
                thresholds,
                channels=channels,
                sigmoid=head == "sigmoid",
                slow_convolutions=slow_convolutions,
                quantized_weights=precision == "int8",
            ).SerializeToString(deterministic=True)
            (folder / file).write_bytes(data)
            weights.append({"file": file, "sha256": sha256(data), "precision": precision, "fold": fold})

    images = golden_images(channels, thresholds)
    labelmap = expected_labels(images, thresholds)
    assert golden in ("right", "wrong", "empty", "unknown", "shifted")
    if golden == "wrong":
        labelmap = np.roll(labelmap, 3, axis=0)
    elif golden == "empty":
        labelmap[...] = 0
    elif golden == "unknown":
        labelmap[-1, -1, -1] = len(labels) + 1
    image_names = [f"image_{i:04d}.nii.gz" for i in range(channels)]
    for image_name, image in zip(image_names, images, strict=True):
        write_nifti_ras(folder / "golden" / image_name, image, spacing_mm)
    origin_mm = 0.5 if golden == "shifted" else 0.0
    write_nifti_ras(folder / "golden" / "labelmap.nii.gz", labelmap, spacing_mm, origin_mm=origin_mm)

    resampling = {"order": 1, "order_z": 0}
    manifest = Manifest.model_validate(
        {
            "name": name,
            "version": version,
            "title": title or f"Threshold test model {version}",
            "intended_use": "Tests of segnode only.",
            "licence": "Apache-2.0",
            "channels": [
                {"name": f"channel {i}", "modality": modality, "normalization": "NoNormalization"}
                for i in range(channels)
            ],
            "labels": [
                {
                    "value": i + 1,
                    "name": label,
                    "category": {"value": "123037004", "meaning": "Anatomical Structure"},
                    "type": {"value": _TYPES[i][0], "meaning": _TYPES[i][1]},
                    "color_rgb": _COLORS[i],
                }
                for i, label in enumerate(labels)
            ],
            "orientation": orientation,
            "preprocessing": {
                "spacing_mm": spacing_mm,
                "resampling_data": {**resampling, "order": 3},
                "resampling_probabilities": resampling,
            },
            "inference": {
                "head": head,
                "patch_size": patch_size,
                "mirror_axes": mirror_axes,
                "regions_class_order": list(range(1, len(labels) + 1)) if head == "sigmoid" else [],
            },
            "weights": weights,
            "golden": {"images": image_names, "labelmap": "labelmap.nii.gz"},
            "input_limits": input_limits or {},
            "provenance": {"method": "written by hand", "data": "synthetic"},
        }
    )
    (folder / "model.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(
        f"# {name} {version}\n\nIntensity thresholds, for tests.\n", encoding="utf-8"
    )
    return seal(folder)


def threshold_network(
    thresholds: Sequence[float],
    *,
    channels: int = 1,
    sigmoid: bool = False,
    slow_convolutions: int = 0,
    quantized_weights: bool = False,
) -> onnx.ModelProto:
    """The network alone: (N, C, Z, Y, X) float32 to (N, K, Z, Y, X) float32 logits, any patch size."""
    n_labels = len(thresholds)
    if sigmoid:  # one region per threshold: everything above it
        gains = np.ones(n_labels)
        biases = -np.asarray(thresholds)
    else:
        gains = np.arange(n_labels + 1)
        biases = -np.concatenate([[0.0], np.cumsum(thresholds)])
    signs = np.where(np.arange(channels) == 0, 1.0, -1.0)  # the first channel minus the others
    kernel = np.outer(gains, signs).astype(np.float32)[:, :, None, None, None]

    nodes, initializers = [], [numpy_helper.from_array(biases.astype(np.float32), "bias")]
    if quantized_weights:  # small integers: int8 with scale 1 holds them exactly
        initializers += [
            numpy_helper.from_array(kernel.astype(np.int8), "kernel_int8"),
            numpy_helper.from_array(np.float32(1.0), "kernel_scale"),
            numpy_helper.from_array(np.int8(0), "kernel_zero"),
        ]
        nodes.append(
            helper.make_node(
                "DequantizeLinear", ["kernel_int8", "kernel_scale", "kernel_zero"], ["kernel"], name="kernel"
            )
        )
    else:
        initializers.append(numpy_helper.from_array(kernel, "kernel"))
    scores = "scores" if slow_convolutions else "logits"
    nodes.append(helper.make_node("Conv", ["image", "kernel", "bias"], [scores], name="scores"))
    if slow_convolutions:
        nodes += _slow_branch(slow_convolutions, channels, initializers)
        nodes.append(helper.make_node("Add", ["scores", "nothing"], ["logits"], name="logits"))

    n_outputs = len(gains)
    graph = helper.make_graph(
        nodes,
        "threshold",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", channels, "z", "y", "x"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", n_outputs, "z", "y", "x"])],
        initializers,
    )
    return helper.make_model(
        graph, producer_name="segnode tests", ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )


def _slow_branch(n_convolutions: int, channels: int, initializers: list[TensorProto]) -> list[onnx.NodeProto]:
    """Nodes whose output "nothing" is exactly 0, in a way that no optimiser sees.

    After a Relu everything is >= 0; times negative weights it is <= 0; after another Relu it is 0.
    """
    width = 16
    random = np.random.default_rng(0)
    nodes = []
    previous = "image"
    for i in range(n_convolutions):
        shape = (width, channels if i == 0 else width, 3, 3, 3)
        kernel = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        initializers.append(numpy_helper.from_array(kernel, f"slow_kernel_{i}"))
        nodes.append(
            helper.make_node("Conv", [previous, f"slow_kernel_{i}"], [f"slow_conv_{i}"], pads=[1] * 6)
        )
        nodes.append(helper.make_node("Relu", [f"slow_conv_{i}"], [f"slow_{i}"]))
        previous = f"slow_{i}"
    initializers.append(numpy_helper.from_array(np.full((1, width, 1, 1, 1), -1.0, np.float32), "slow_end"))
    nodes.append(helper.make_node("Conv", [previous, "slow_end"], ["slow_negative"]))
    nodes.append(helper.make_node("Relu", ["slow_negative"], ["nothing"]))
    return nodes


def expected_labels(images: NDArray[np.float32], thresholds: Sequence[float]) -> NDArray[np.uint8]:
    """The rule in numpy: (C, Z, Y, X) intensities to a (Z, Y, X) labelmap."""
    intensity = images[0] - images[1:].sum(axis=0)
    return np.sum([intensity > threshold for threshold in thresholds], axis=0).astype(np.uint8)


def golden_images(channels: int, thresholds: Sequence[float]) -> NDArray[np.float32]:
    """(C, Z, Y, X) integer intensities with every label in them and an empty border to be cropped."""
    images = np.zeros((channels, *GOLDEN_SHAPE_ZYX), np.float32)
    random = np.random.default_rng(0)
    size_z, size_y, size_x = GOLDEN_SHAPE_ZYX
    inner = (slice(2, size_z - 3), slice(1, size_y - 2), slice(3, size_x - 1))
    images[:, *inner] = random.integers(1, 20, images[:, *inner].shape)
    edges = np.linspace(2, size_x - 2, len(thresholds) + 2).astype(int)
    for i, threshold in enumerate(thresholds):
        images[0, 5:15, 6:16, edges[i + 1] : edges[i + 2]] += np.ceil(threshold) + 30
    return images


def write_nifti_ras(
    path: Path, array: NDArray, spacing_zyx_mm: Sequence[float], *, origin_mm: float = 0.0
) -> None:
    """Write a (Z, Y, X) array as NIfTI whose voxel axes x, y, z grow towards R, A, S; deterministic."""
    affine = np.diag([*spacing_zyx_mm[::-1], 1.0])
    affine[:3, 3] = origin_mm
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
