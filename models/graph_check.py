"""Whether an ONNX network is one that the node runs: one plain, closed, deterministic graph.

A network is data from outside. It may not reach for other files (external data), for code that is not in
the runtime (custom operator domains), or loop, branch or recurse (control flow, nested graphs, local
functions), nor draw random numbers, and it must take and give what the manifest says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from models.errors import BundleError
from models.manifest import Manifest

_DOMAINS = ("", "ai.onnx")
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_REMEDY = "Export the model again; a bundle holds one plain network per file."


def check_graph(data: bytes, name: str, manifest: Manifest) -> None:
    """Check one ONNX file of a bundle.

    Parameters
    ----------
    data : bytes
        The file.
    name : str
        Its name, for the message.
    manifest : Manifest
        Says how many channels go in and out, and the patch size in the order of the network's axes.

    Raises
    ------
    BundleError
        If the graph holds what no bundle may hold, or does not take (N, C, Z, Y, X) float32 and give
        (N, K, Z, Y, X) float32.
    """
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise BundleError(f"{name!r} is not an ONNX file.", remedy=_REMEDY) from error
    problem = next(_problems(model, manifest), None)
    if problem is not None:
        raise BundleError(f"{name!r} {problem}.", remedy=_REMEDY)
    try:
        onnx.checker.check_model(data)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        # Besides its own error, the checker's C++ raises what text that is not UTF-8 makes of it.
        first_line = str(error).strip().partition("\n")[0][:300]
        raise BundleError(f"{name!r} is not a valid ONNX graph: {first_line}.", remedy=_REMEDY) from error


def _problems(model: Any, manifest: Manifest) -> Iterator[str]:
    graph = model.graph
    for opset in model.opset_import:
        if opset.domain not in _DOMAINS:
            yield f"imports the operator domain {opset.domain!r}"
    if model.functions:
        yield f"defines functions of its own ({model.functions[0].name!r})"
    if model.training_info:
        yield "holds training information"
    if graph.sparse_initializer:
        yield "holds sparse initializers"
    for tensor in graph.initializer:
        if _is_external(tensor):
            yield f"keeps the tensor {tensor.name!r} in another file"
    for node in graph.node:
        yield from _node_problems(node)
    initialized = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initialized]
    patch = manifest.inference.patch_size
    yield from _port_problems("input", inputs, len(manifest.channels), patch)
    yield from _port_problems("output", list(graph.output), manifest.n_outputs, patch)


def _node_problems(node: Any) -> Iterator[str]:
    if node.domain not in _DOMAINS:
        yield f"uses the operator {node.op_type!r} of the domain {node.domain!r}"
    if node.op_type in _CONTROL_FLOW:
        yield f"uses the control-flow operator {node.op_type!r}"
    if node.op_type in _RANDOM:
        yield f"uses the random operator {node.op_type!r}"
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs:
            yield f"has a nested graph in the attribute {attribute.name!r} of {node.op_type!r}"
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            yield f"has a sparse tensor in the attribute {attribute.name!r} of {node.op_type!r}"
        if any(_is_external(tensor) for tensor in (attribute.t, *attribute.tensors)):
            yield f"keeps the attribute {attribute.name!r} of {node.op_type!r} in another file"


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _port_problems(
    what: str, values: list[Any], n_channels: int, patch: tuple[int, int, int]
) -> Iterator[str]:
    """``what`` is "input" or "output"; a dimension without a number (symbolic) fits any size."""
    if len(values) != 1:
        yield f"has {len(values)} {what}s, where one is needed"
        return
    kind = values[0].type
    if not kind.HasField("tensor_type") or kind.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        yield f"has an {what} that is not float32"
        return
    if not kind.tensor_type.HasField("shape") or len(kind.tensor_type.shape.dim) != 5:
        yield f"has an {what} without the five axes N, C, Z, Y, X"
        return
    batch, channels, *spatial = (
        dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim
    )
    if channels != n_channels:
        stated = "unknown" if channels is None else channels
        yield f"has an {what} of {stated} channels, where model.json says {n_channels}"
    if batch not in (None, 1):
        yield f"has an {what} with a batch of {batch}, where 1 or any is needed"
    if any(size not in (None, expected) for size, expected in zip(spatial, patch, strict=True)):
        yield f"has an {what} of {spatial}, where model.json says a patch of {list(patch)}"
