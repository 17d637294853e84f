"""One network to one ONNX file, and the proof that both compute the same."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from training.errors import ExportError

OPSET = 18
INPUT, OUTPUT = "image", "logits"

# Float32 sums in another order: 1e-6 of the logits' scale a layer at most, and there are some dozens.
LOGIT_TOLERANCE = 1e-3
ARGMAX_AGREEMENT = 0.9999


@dataclass(frozen=True)
class Agreement:
    """How far ONNX Runtime and PyTorch are apart on one input.

    ``max_difference`` is the largest absolute difference of a logit, ``max_logit`` the largest absolute
    logit, ``argmax_agreement`` the share of voxels with the same largest output (for a sigmoid head, of
    voxels and outputs on the same side of zero).
    """

    max_difference: float
    max_logit: float
    argmax_agreement: float


def export_onnx(network: nn.Module, n_channels: int, patch_size: tuple[int, int, int], path: Path) -> None:
    """Write a network as ONNX: input ``image`` (N, C, Z, Y, X), output ``logits`` (N, K, Z, Y, X), float32.

    The batch N is symbolic, the patch is fixed. What the exporter notes of the machine that it ran on
    (source lines, paths, versions) is taken out, so the same weights give the same bytes.

    Parameters
    ----------
    network : Module
        In evaluation mode, without deep supervision.

    Raises
    ------
    ExportError
        If torch cannot export it, or the graph is not plain ONNX.
    """
    example = torch.zeros(2, n_channels, *patch_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about its own internals
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        raise ExportError(f"torch cannot write this network as ONNX ({type(error).__name__}).") from error
    if program is None:
        raise ExportError("torch gave no ONNX program for this network.")
    model = program.model_proto
    _anonymise(model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def compare_with_torch(
    network: nn.Module, path: Path, patch: NDArray[np.float32], *, sigmoid: bool
) -> Agreement:
    """Run one patch (C, Z, Y, X) through PyTorch and through ONNX Runtime, alone and in a batch of two.

    Raises
    ------
    ExportError
        If the logits or the labels differ by more than float32 explains.
    """
    batch = np.ascontiguousarray(np.stack([patch, patch[:, ::-1, ::-1, ::-1]]))
    with torch.inference_mode():
        expected = network(torch.from_numpy(batch)).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run([OUTPUT], {INPUT: batch})[0]
    alone = session.run([OUTPUT], {INPUT: batch[:1]})[0]
    if found.shape != expected.shape:
        raise ExportError(f"The ONNX network gives {found.shape}, PyTorch {expected.shape}.")
    difference = max(float(np.abs(found - expected).max()), float(np.abs(alone - expected[:1]).max()))
    same = (found > 0) == (expected > 0) if sigmoid else found.argmax(1) == expected.argmax(1)
    agreement = Agreement(difference, float(np.abs(expected).max()), float(same.mean()))
    limit = LOGIT_TOLERANCE * max(1.0, agreement.max_logit)
    if not difference <= limit or agreement.argmax_agreement < ARGMAX_AGREEMENT:
        raise ExportError(
            f"The ONNX network is not the trained one: logits differ by up to {difference:.2g} "
            f"(limit {limit:.2g}), {agreement.argmax_agreement:.4%} of the labels agree."
        )
    return agreement


def _anonymise(model: onnx.ModelProto) -> None:
    model.producer_name, model.producer_version, model.doc_string = "segnode", "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "student", ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
