"""INT8 weights for a bundle: QDQ ONNX by NNCF, behind a gate on every label.

The first and the last convolution stay in float32: both are cheap, the first reads the image itself, and the
engine takes the last off the network anyway. What 8 bits cost lies at the surfaces of structures and comes
from the finest layers. Where the gate or the golden case says that it is too much, the convolutions of the
finest resolution stay in float32 too, then those of the next. (Of the hippocampus student, over ten cases,
the Dice of INT8 with float32 rises from 0.997 to 0.999 with two levels kept; other ranges, bias correction
and transposed convolutions in float32 change nothing.) A bundle whose INT8 student still loses more than the
gate allows is not written.
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
from models.errors import GoldenCaseError
from models.golden import check_golden_case
from models.manifest import Manifest, Precision, Weights
from models.nifti import read_nifti
from models.sliding_window import Tiling, tiles
from training.errors import ExportError, QuantizationGateError, TrainingDataError
from training.evaluate import Evaluation, evaluate
from training.preprocess import TrainingCases

_MOST_FLOAT_LEVELS = 2


@dataclass(frozen=True)
class Gate:
    """The largest mean loss of any label that INT8 may cost against float32."""

    dice: float = 0.005
    nsd: float = 0.01


@dataclass(frozen=True)
class Quantized:
    """The new bundle, both evaluations on the gate's cases, and how many resolutions stayed in float32."""

    bundle: Bundle
    float32: Evaluation
    int8: Evaluation
    float_levels: int = 0


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
    GoldenCaseError
        If the gate is passed, and the golden case is not.
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
    before = evaluate(bundle, cases, gate_cases, name=str(Precision.FLOAT32), precision=Precision.FLOAT32)
    for float_levels in range(_MOST_FLOAT_LEVELS + 1):
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".quantize-") as unfinished:
            folder = Path(unfinished) / output.name
            kept = f", {float_levels} finest levels in float32" if float_levels else ""
            tell(f"quantizing with {len(patches)} patches{kept}")
            sealed = _with_int8(bundle, folder, patches, float_levels, version=version, prefer=prefer)
            tell("comparing with float32")
            after = evaluate(sealed, cases, gate_cases, name=str(Precision.INT8), precision=Precision.INT8)
            try:
                check_gate(before, after, gate)
                check_golden_case(sealed, precision=Precision.INT8)
            except (QuantizationGateError, GoldenCaseError) as error:
                tell(error.message)
                if float_levels == _MOST_FLOAT_LEVELS:
                    raise
                continue
            shutil.move(folder, output)
            break
    return Quantized(Bundle.open(output), before, after, float_levels)


def _with_int8(
    bundle: Bundle,
    folder: Path,
    patches: Sequence[NDArray[np.float32]],
    float_levels: int,
    *,
    version: str,
    prefer: bool,
) -> Bundle:
    """A sealed copy of a bundle with INT8 weights beside its own."""
    shutil.copytree(bundle.folder, folder)
    added = []
    for weights in bundle.manifest.weights_of(Precision.FLOAT32):
        name = weights.file.removesuffix(".onnx") + ".int8.onnx"
        quantize_network(folder / weights.file, folder / name, patches, float_levels=float_levels)
        digest = sha256((folder / name).read_bytes())
        added.append(Weights(file=name, sha256=digest, precision=Precision.INT8, fold=weights.fold))
    manifest = bundle.manifest.changed(
        version=version,
        weights=(*bundle.manifest.weights, *added),
        precision=Precision.INT8 if prefer else Precision.FLOAT32,
    )
    (folder / "model.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return seal(folder)


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
        cut = list(_tiles_of(manifest, cases.image_paths(name)))
        for i in np.unique(np.linspace(0, len(cut) - 1, min(per_case, len(cut))).round().astype(int)):
            if given == maximum:
                return
            given += 1
            yield cut[i]


def _tiles_of(manifest: Manifest, images: Sequence[Path]) -> Iterator[NDArray[np.float32]]:
    """The tiles of one case, (1, C, Z, Y, X), preprocessed by the engine."""
    array, placement, _ = preprocessing.locate(read_nifti(images), manifest)
    image = preprocessing.preprocess(array, placement, manifest)
    inference = manifest.inference
    tiling = Tiling.of(placement.shape_network, inference.patch_size, inference.tile_step_size)
    return (tile[None] for tile in tiles(image, tiling))


def quantize_network(
    source: Path, target: Path, patches: Sequence[NDArray[np.float32]], *, float_levels: int = 0
) -> None:
    """Post-training quantisation of one ONNX file to QDQ INT8.

    Parameters
    ----------
    patches : sequence of (1, C, Z, Y, X) arrays
        What to calibrate with.
    float_levels : int
        Of how many resolutions, from the finest, the convolutions stay in float32. The first and the last
        always do.
    """
    os.environ.setdefault("NNCF_TELEMETRY", "0")
    import nncf  # imports slowly, and calls home unless told not to

    model = onnx.load(source)
    feed = model.graph.input[0].name
    fixed = _with_fixed_shape(model, patches[0].shape)
    voxels = _voxels_of_convolutions(fixed)
    fine = sorted(set(voxels.values()), reverse=True)[:float_levels]
    first, *_, last = voxels
    kept = [name for name, count in voxels.items() if name in (first, last) or count in fine]
    quantized: Any = nncf.quantize(
        fixed,
        nncf.Dataset(patches, lambda patch: {feed: patch}),
        subset_size=len(patches),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=kept),
    )
    onnx.save(quantized, target)


def _voxels_of_convolutions(model: onnx.ModelProto) -> dict[str, int]:
    """How many voxels each convolution writes, by the node's name, in the graph's order."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    voxels = {
        value.name: math.prod(d.dim_value for d in value.type.tensor_type.shape.dim[2:])
        for value in (*graph.value_info, *graph.output)
    }
    return {node.name: voxels[node.output[0]] for node in graph.node if node.op_type == "Conv"}


def _with_fixed_shape(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """A copy whose input has a fixed shape, and whose nodes all have names: NNCF needs both."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for dimension, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dimension.dim_value = size
    for i, node in enumerate(fixed.graph.node):
        node.name = node.name or f"node_{i}"
    return fixed
