"""The same network, cut to the width of the processor's vectors, and with sums that stay exact.

A student of eight features fills half of a vector of sixteen floats: at full resolution, where most of the
time goes, its convolutions reach half of the speed that those of sixteen features do, and its norms less.
OpenVINO keeps channels innermost, so two neighbours along x are sixteen numbers side by side. Here such
layers are written so that they work on both at once:

- A convolution computes two neighbours in one stride of two, with the weights twice, shifted by one, and
  zeros where a neighbour does not look. Of 3x3x3 weights it multiplies a third more, in half the time.
- A norm takes its statistics of whole rows along x, then of the row, and leaves one multiply and one add,
  which the runtime does together with what follows: activation, and the addition of a residual block.
  So it does for any number of features where there are many voxels: the runtime's own norm adds them all up
  in one float32. In a patch of 80 x 96 x 80 voxels, half of them air, that made the normalised values wrong
  by 1e-3 of themselves, and logits by 0.01; sums of sums are right to 1e-6.
- An average pooling in front of a 1x1x1 convolution becomes part of it.

Between such layers a tensor is held as rows, (Z, Y, X * C), which is the same memory. What else reads it
gets it back as (N, C, Z, Y, X) by a transposition that moves nothing. The products are those of the network
as it was; only the order of sums changes, as it does from one runtime to the next.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

_LEAST_VOXELS = 32**3
"""Where a layer has fewer, what is around the arithmetic costs more than the arithmetic."""

_OPSET = 18
"""The first whose reductions take their axes as an input."""

_ELEMENTWISE = frozenset({"Add", "LeakyRelu", "Relu"})


def widen(model: onnx.ModelProto, lanes: int) -> onnx.ModelProto:
    """An equal network whose narrow layers fill vectors of ``lanes`` floats, and whose large norms are exact.

    Parameters
    ----------
    model : onnx.ModelProto
        With a fixed input shape of one patch (`models.runtimes.fix_shape`); it is not changed.
    lanes : int
        Floats in a vector of the processor (`models.resources.vector_lanes`).

    Returns
    -------
    onnx.ModelProto
        Where the last layer was widened, its output is (Z, Y, X, C) instead of (N, C, Z, Y, X). Where there
        is nothing to widen, weights are quantized, or the opset is below 18, ``model`` itself.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantized or opset < _OPSET:
        return model
    return _Widening(model, lanes).run()


class _Widening:
    """One pass over the nodes in their order."""

    def __init__(self, model: onnx.ModelProto, lanes: int) -> None:
        self._given = model
        self._model = onnx.shape_inference.infer_shapes(model)
        self._graph = self._model.graph
        self._lanes = lanes
        self._weights = {t.name: numpy_helper.to_array(t) for t in self._graph.initializer}
        self._shapes = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*self._graph.input, *self._graph.value_info, *self._graph.output)
        }
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self._graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._nodes: list[NodeProto] = []
        self._rows: dict[str, str] = {}
        self._read_as_volume: set[str] = set()
        self._pooled: dict[str, tuple[str, list[int]]] = {}
        self._norms = 0

    def run(self) -> onnx.ModelProto:
        for node in list(self._graph.node):
            if node.op_type == "Conv":
                done = self._convolve_pooled(node) or self._convolve_pairs(node)
            elif node.op_type == "InstanceNormalization":
                done = self._normalise_rows(node)
            elif node.op_type == "AveragePool":
                done = self._pool_later(node)
            else:
                done = node.op_type in _ELEMENTWISE and self._do_on_rows(node)
            if not done:
                for name in node.input:
                    self._give_as_volume(name)
                self._nodes.append(node)
        if not self._rows:
            return self._given
        self._finish_output()
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        del self._graph.value_info[:]
        return self._model

    def _convolve_pairs(self, conv: NodeProto) -> bool:
        """A stride-1 convolution with so few features that those of two voxels fit in a vector."""
        weights = self._weights.get(conv.input[1])
        bias = self._weights.get(conv.input[2]) if len(conv.input) > 2 else None
        shape = self._shape(conv.output[0])
        how = _attributes(conv)
        if (
            weights is None
            or weights.ndim != 5
            or weights.shape[4] < 3
            or 2 * weights.shape[0] > self._lanes
            or (bias is None and len(conv.input) > 2)
            or shape is None
            or shape[4] % 2
            or math.prod(shape[2:]) < _LEAST_VOXELS
            or how.get("auto_pad", b"NOTSET") != b"NOTSET"
            or how.get("group", 1) != 1
            or math.prod(how.get("dilations", [1])) != 1
            or how.get("strides", [1, 1, 1])[2] != 1
        ):
            return False
        features, channels, *kernel = weights.shape
        both = np.zeros((2, features, channels, *kernel[:2], kernel[2] + 1), np.float32)
        both[0, ..., :-1] = weights
        both[1, ..., 1:] = weights
        self._give_as_volume(conv.input[0])
        inputs = [conv.input[0], self._constant(both.reshape(2 * features, *both.shape[2:]))]
        if bias is not None:
            inputs.append(self._constant(np.tile(bias, 2)))
        pairs = self._node(
            "Conv",
            *inputs,
            kernel_shape=both.shape[3:],
            strides=[*how.get("strides", [1, 1, 1])[:2], 2],
            pads=how.get("pads", [0] * 6),
        )
        self._keep_as_rows(conv.output[0], pairs)
        return True

    def _pool_later(self, pool: NodeProto) -> bool:
        """Leave an average over blocks to the 1x1x1 convolution that alone reads it."""
        how = _attributes(pool)
        readers = self._readers[pool.output[0]]
        if (
            pool.input[0] not in self._rows
            or len(readers) != 1
            or readers[0].op_type != "Conv"
            or how["kernel_shape"] != how.get("strides")
            or any(how.get("pads", [0]))
            or how.get("auto_pad", b"NOTSET") != b"NOTSET"
            or how.get("ceil_mode", 0)
        ):
            return False
        weights, conv = self._weights.get(readers[0].input[1]), _attributes(readers[0])
        if (
            weights is None
            or weights.shape[2:] != (1, 1, 1)
            or conv.get("group", 1) != 1
            or any(conv.get("pads", [0]))
            or math.prod(conv.get("strides", [1])) != 1
        ):
            return False
        self._pooled[pool.output[0]] = pool.input[0], list(how["kernel_shape"])
        return True

    def _convolve_pooled(self, conv: NodeProto) -> bool:
        if conv.input[0] not in self._pooled:
            return False
        source, block = self._pooled[conv.input[0]]
        weights = np.tile(self._weights[conv.input[1]] / math.prod(block), (1, 1, *block))
        self._give_as_volume(source)
        inputs = [source, self._constant(weights.astype(np.float32)), *conv.input[2:]]
        self._nodes.append(
            helper.make_node("Conv", inputs, list(conv.output), kernel_shape=block, strides=block)
        )
        return True

    def _normalise_rows(self, norm: NodeProto) -> bool:
        """Mean and variance of each channel over all voxels, as one factor and one summand for each row.

        The variance is the mean of the squares less the square of the mean, which loses digits only where the
        mean is many times larger than the deviation. That can be so in the first norm alone, which sees the
        image as it is; there the mean is taken off before squaring.
        """
        shape = self._shape(norm.output[0])
        scale, bias = (self._weights.get(name) for name in norm.input[1:])
        first, self._norms = self._norms == 0, self._norms + 1
        if shape is None or scale is None or bias is None:
            return False
        if norm.input[0] not in self._rows:
            if math.prod(shape[2:]) < _LEAST_VOXELS:
                return False
            self._keep_as_rows(norm.input[0], norm.input[0])
            self._read_as_volume.add(norm.input[0])  # which it still is
        _, channels, _, height, width = shape
        rows = self._rows[norm.input[0]]
        mean = self._mean_of_rows(self._node("ReduceMean", rows, self._axes(1), keepdims=1), width, channels)
        if first:
            rows = self._node("Sub", rows, self._as_row(mean, width, channels))
        length = self._node("ReduceL2", rows, self._axes(1), keepdims=1)
        squares = self._node("Mul", self._node("Mul", length, length), self._constant(np.float32(1 / height)))
        variance = self._mean_of_rows(squares, width, channels)
        if not first:
            square = self._node("Mul", mean, mean)
            variance = self._node("Relu", self._node("Sub", variance, square))  # rounding may pass zero
        epsilon = self._constant(np.float32(_attributes(norm).get("epsilon", 1e-5)))
        deviation = self._node("Sqrt", self._node("Add", variance, epsilon))
        factor = self._node("Div", self._constant(scale.reshape(1, channels)), deviation)
        summand = self._constant(bias.reshape(1, channels))
        if not first:
            summand = self._node("Sub", summand, self._node("Mul", mean, factor))
        factor, summand = (self._as_row(name, width, channels) for name in (factor, summand))
        self._rows[norm.output[0]] = self._node("Add", self._node("Mul", rows, factor), summand)
        return True

    def _do_on_rows(self, node: NodeProto) -> bool:
        if any(name not in self._rows for name in node.input):
            return False
        rows = [self._rows[name] for name in node.input]
        self._rows[node.output[0]] = self._node(node.op_type, *rows, **_attributes(node))
        return True

    def _finish_output(self) -> None:
        """Give the output as rows, cut into voxels, if that is how it is held."""
        output = self._graph.output[0]
        if output.name not in self._rows:
            return
        _, channels, *shape = self._shapes[output.name]
        kind = onnx.TensorProto.FLOAT
        last = self._node("Reshape", self._rows[output.name], self._axes(*shape, channels))
        del self._graph.output[:]
        self._graph.output.append(helper.make_tensor_value_info(last, kind, [*shape, channels]))

    def _keep_as_rows(self, name: str, source: str) -> None:
        """``source`` is (1, C, Z, Y, X), or in pairs (1, 2 * C, Z, Y, X / 2).

        Either is with channels innermost the memory of (Z, Y, X * C).
        """
        _, channels, depth, height, width = self._shapes[name]
        last = self._node("Transpose", source, perm=[0, 2, 3, 4, 1])
        self._rows[name] = self._node("Reshape", last, self._axes(depth, height, width * channels))

    def _give_as_volume(self, name: str) -> None:
        """Make (N, C, Z, Y, X) of rows, under the name that the network has for it."""
        if name not in self._rows or name in self._read_as_volume:
            return
        self._read_as_volume.add(name)
        _, channels, *shape = self._shapes[name]
        last = self._node("Reshape", self._rows[name], self._axes(1, *shape, channels))
        self._nodes.append(helper.make_node("Transpose", [last], [name], perm=[0, 4, 1, 2, 3]))

    def _mean_of_rows(self, rows: str, width: int, channels: int) -> str:
        """(Z, 1, X * C) to the mean of each channel, (1, C).

        The reshaping keeps the runtime from making one long sum of two means in a row.
        """
        planes = self._node("Reshape", rows, self._axes(-1, width * channels))
        row = self._node("ReduceMean", planes, self._axes(0), keepdims=1)
        voxels = self._node("Reshape", row, self._axes(width, channels))
        return self._node("ReduceMean", voxels, self._axes(0), keepdims=1)

    def _as_row(self, values: str, width: int, channels: int) -> str:
        """(1, C) to (1, 1, X * C)."""
        return self._node(
            "Reshape", self._node("Tile", values, self._axes(1, width)), self._axes(1, 1, width * channels)
        )

    def _shape(self, name: str) -> list[int] | None:
        """(N, C, Z, Y, X) of one patch, or None where it is something else."""
        shape = self._shapes.get(name, [])
        return shape if len(shape) == 5 and shape[0] == 1 and all(shape) else None

    def _axes(self, *numbers: int) -> str:
        return self._constant(np.array(numbers, np.int64))

    def _constant(self, value: NDArray[Any] | np.generic) -> str:
        name = f"widened_constant_{len(self._graph.initializer)}"
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"widened_{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
