"""How much memory a network will take, told from its graph before it has run."""

from __future__ import annotations

import math
from collections import Counter

import onnx

from models.runtimes import OPENVINO

_IN_PLACE = frozenset(
    {"LeakyRelu", "Relu", "Add", "InstanceNormalization", "QuantizeLinear", "DequantizeLinear"}
)
_VIEWS = frozenset({"Reshape", "Transpose"})  # as `models.lanes` uses them, the same memory seen otherwise
_BYTES = {onnx.TensorProto.INT8: 1, onnx.TensorProto.UINT8: 1}


def activation_bytes(model: onnx.ModelProto, runtime: str = OPENVINO) -> int:
    """The most memory in bytes that the tensors of one run hold at the same time.

    Nodes run in the graph's order; a tensor lives from the node that writes it to the last that reads it;
    what runtimes do in place or fuse takes no tensor of its own. They compute with the channels innermost, so
    the output is there twice, once in each order.

    Parameters
    ----------
    model : onnx.ModelProto
        With a fixed input shape (`models.runtimes.fix_shape`).
    runtime : str
        ONNX Runtime fuses nothing around the norms and rounds its blocks up: it was measured to take 1.7 to
        1.85 times as much, on networks of 8 to 32 features and patches of 48 to 128 voxels.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    size: dict[str, int] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        shape = [d.dim_value for d in tensor.shape.dim]
        size[value.name] = math.prod(shape) * _BYTES.get(tensor.elem_type, 4)
    for node in graph.node:  # a convolution reads the codes themselves
        if node.op_type == "DequantizeLinear":
            size[node.output[0]] = size.get(node.input[0], 0)
    for stored in graph.initializer:  # weights are in memory anyway
        size[stored.name] = 0
    source: dict[str, str] = {}  # of what is only seen otherwise: the tensor that it is
    for node in graph.node:
        if node.op_type in _VIEWS:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
    nodes = [node for node in graph.node if node.op_type not in _VIEWS]
    inputs = [[source.get(name, name) for name in node.input] for node in nodes]
    readers: Counter[str] = Counter(name for names in inputs for name in names)
    readers.update(source.get(output.name, output.name) for output in graph.output)
    live = {value.name: size[value.name] for value in graph.input if value.name in size}
    most = sum(live.values())
    for node, names in zip(nodes, inputs, strict=True):
        reads = [name for name in names if name in live]
        free = [name for name in reads if readers[name] == 1]
        reused = max((live[name] for name in free), default=0) if node.op_type in _IN_PLACE else 0
        written = sum(size.get(name, 0) for name in node.output)
        most = max(most, sum(live.values()) + max(0, written - reused))
        for name in reads:
            readers[name] -= 1
            if readers[name] <= 0:
                live.pop(name, None)
        live.update({name: size.get(name, 0) for name in node.output if readers[name] > 0})
    total = most + sum(size.get(output.name, 0) for output in graph.output)
    return total if runtime == OPENVINO else total * 9 // 5
