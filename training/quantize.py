"""INT8 weights for a bundle: QDQ ONNX by NNCF, behind a gate on every label.

The first and the last convolution stay in float32: both are cheap, the first reads the image itself, and the
engine takes the last off the network anyway. A bundle whose INT8 student loses more than the gate allows is
not written.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from models import preprocessing
from models.bundle import Bundle, seal
from models.bundle_files import sha256
from models.golden import check_golden_case
from models.manifest import Manifest, Precision, Weights
from models.nifti import read_nifti
from models.sliding_window import Tiling, pad
from models.volume import reorient, spacing_xyz_mm
from training.errors import ExportError, QuantizationGateError, TrainingDataError
from training.evaluate import Evaluation, evaluate
from training.preprocess import TrainingCases


@dataclass(frozen=True)
class Gate:
    """The largest mean loss of any label that INT8 may cost against float32."""

    dice: float = 0.005
    nsd: float = 0.01


@dataclass(frozen=True)
class Quantized:
    """The new bundle, and both evaluations on the gate's cases."""

    bundle: Bundle
    float32: Evaluation
    int8: Evaluation


def quantize_bundle(
    bundle: Bundle,
    output: Path,
    cases: TrainingCases,
    *,
    calibration_cases: Sequence[str],
    gate_cases: Sequence[str],
    version: str,
    gate: Gate = Gate(),
    prefer: bool = False,
    maximum_patches: int = 64,
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """A copy of a bundle with INT8 weights beside its float32 ones, written only if it passes the gate.

    Parameters
    ----------
    bundle : Bundle
        The float32 bundle.
    output : Path
        Where the new bundle goes; it must not exist.
    cases : TrainingCases
        Real cases, for calibration and for the gate.
    calibration_cases, gate_cases : sequence of str
        Their names. Calibrate on training cases, judge on cases that were not trained on.
    version : str
        The new bundle's version.
    prefer : bool
        Make INT8 what the node runs unless told otherwise.
    maximum_patches : int
        Patches to calibrate with, spread evenly over the cases.

    Raises
    ------
    QuantizationGateError
        If a label loses more than the gate allows; the message names each.
    ExportError
        If the output exists, or the bundle has INT8 weights already.
    """
    if output.exists():
        raise ExportError(
            f"{output.name!r} exists already.", remedy="A version is never changed: give another one."
        )
    if bundle.manifest.weights_of(Precision.INT8):
        raise ExportError("The bundle has INT8 weights already.", remedy="Quantize the float32 bundle.")
    tell = progress or (lambda _: None)
    patches = list(calibration_patches(bundle.manifest, cases, calibration_cases, maximum_patches))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".quantize-") as unfinished:
        folder = Path(unfinished) / output.name
        shutil.copytree(bundle.folder, folder)
        added = []
        for weights in bundle.manifest.weights_of(Precision.FLOAT32):
            tell(f"quantizing {weights.file} with {len(patches)} patches")
            name = weights.file.removesuffix(".onnx") + ".int8.onnx"
            quantize_network(folder / weights.file, folder / name, patches)
            digest = sha256((folder / name).read_bytes())
            added.append(Weights(file=name, sha256=digest, precision=Precision.INT8, fold=weights.fold))
        manifest = bundle.manifest.model_copy(
            update={
                "version": version,
                "weights": (*bundle.manifest.weights, *added),
                "precision": Precision.INT8 if prefer else Precision.FLOAT32,
            }
        )
        manifest = Manifest.model_validate_json(manifest.model_dump_json())  # model_copy checks nothing
        (folder / "model.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        sealed = seal(folder)
        tell("comparing with float32")
        before, after = (
            evaluate(sealed, cases, gate_cases, name=str(precision), precision=precision)
            for precision in (Precision.FLOAT32, Precision.INT8)
        )
        check_gate(before, after, gate)
        check_golden_case(sealed, precision=Precision.INT8)
        shutil.move(folder, output)
    return Quantized(Bundle.open(output), before, after)


def check_gate(before: Evaluation, after: Evaluation, gate: Gate) -> None:
    """Raise QuantizationGateError if a label's mean Dice or NSD falls by more than the gate allows."""
    failed = []
    for label in before.label_names:
        for metric, allowed in (("dice", gate.dice), ("nsd", gate.nsd)):
            loss = before.summary(metric, label).mean - after.summary(metric, label).mean
            if loss > allowed:
                failed.append(f"{label}: {metric} falls by {loss:.4f} (allowed {allowed})")
    if failed:
        raise QuantizationGateError(
            f"INT8 loses too much on {len(before.cases)} cases: {'; '.join(failed)}.",
            remedy="Calibrate with more patches, or ship float32 alone.",
        )


def calibration_patches(
    manifest: Manifest, cases: TrainingCases, names: Sequence[str], maximum: int
) -> Iterator[NDArray[np.float32]]:
    """Patches (1, C, Z, Y, X) as the network sees them, evenly spread over the cases.

    Raises
    ------
    TrainingDataError
        If no case is named.
    """
    if not names:
        raise TrainingDataError("There is no case to calibrate with.", remedy="Name at least one.")
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(maximum, len(names))).round().astype(int)]
    per_case = math.ceil(maximum / len(chosen))
    given = 0
    for name in chosen:
        tiles = list(_tiles(manifest, cases.image_paths(name)))
        for i in np.unique(np.linspace(0, len(tiles) - 1, min(per_case, len(tiles))).round().astype(int)):
            if given == maximum:
                return
            given += 1
            yield tiles[i]


def _tiles(manifest: Manifest, images: Sequence[Path]) -> Iterator[NDArray[np.float32]]:
    """The tiles of one case, preprocessed by the engine."""
    volume, how = read_nifti(images), manifest.preprocessing
    if manifest.orientation != "any":
        volume, _ = reorient(volume, manifest.orientation)
    array = preprocessing.transpose(volume.array, how)
    placement = preprocessing.place(array, spacing_xyz_mm(volume.affine)[::-1], how)
    image = preprocessing.preprocess(array, placement, manifest)
    tiling = Tiling.of(
        placement.shape_network, manifest.inference.patch_size, manifest.inference.tile_step_size
    )
    padded = pad(image, tiling)
    for _, _, starts in tiling.layers():
        for start in starts:
            where = tuple(slice(s, s + p) for s, p in zip(start, tiling.patch, strict=True))
            yield np.ascontiguousarray(padded[(slice(None), *where)][None])


def quantize_network(source: Path, target: Path, patches: Sequence[NDArray[np.float32]]) -> None:
    """Post-training quantisation of one ONNX file to QDQ INT8, its first and last convolution left alone."""
    os.environ.setdefault("NNCF_TELEMETRY", "0")
    import nncf  # imports slowly, and calls home unless told not to

    model = onnx.load(source)
    feed = model.graph.input[0].name
    fixed = _with_fixed_shape(model, patches[0].shape)
    convolutions = [node.name for node in fixed.graph.node if node.op_type == "Conv"]
    quantized: Any = nncf.quantize(
        fixed,
        nncf.Dataset(patches, lambda patch: {feed: patch}),
        subset_size=len(patches),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=[convolutions[0], convolutions[-1]]),
    )
    onnx.save(quantized, target)


def _with_fixed_shape(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """A copy whose input has a fixed shape, and whose nodes all have names: NNCF needs both."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for dimension, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dimension.dim_value = size
    for i, node in enumerate(fixed.graph.node):
        node.name = node.name or f"node_{i}"
    return fixed
