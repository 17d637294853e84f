"""A network is one plain, closed, deterministic graph that takes and gives what the manifest says."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_factory import make_threshold_bundle, threshold_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.bundle import seal
from models.errors import BundleError
from models.graph_check import check_graph
from models.manifest import Manifest

THRESHOLDS = (100.5, 300.5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Says one channel, two labels, a patch of 16 x 16 x 16."""
    return make_threshold_bundle(tmp_path_factory.mktemp("graph") / "bundle").manifest


def _check(model: onnx.ModelProto, manifest: Manifest) -> None:
    check_graph(model.SerializeToString(), "student.onnx", manifest)


def _set_shape(value: onnx.ValueInfoProto, shape: list[int | str]) -> None:
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))


@pytest.mark.parametrize(
    "shape", [["n", 1, "z", "y", "x"], [1, 1, 16, 16, 16], [None, 1, None, None, None], [1, 1, "z", 16, "x"]]
)
def test_symbolic_and_fitting_sizes_are_accepted(manifest: Manifest, shape: list[int | str]) -> None:
    model = threshold_network(THRESHOLDS)
    _set_shape(model.graph.input[0], shape)
    _check(model, manifest)


def test_an_input_that_is_an_initializer_too_is_no_input(manifest: Manifest) -> None:
    """As ONNX files of IR version 3 have it."""
    model = threshold_network(THRESHOLDS)
    model.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, [3]))
    _check(model, manifest)


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def _external_without_flag(model: onnx.ModelProto) -> None:
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "weights.bin"


def _external_constant(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _custom_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Run", ["image"], ["run"], domain="com.example"))


def _custom_import(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _branch(name: str) -> onnx.GraphProto:
    constant = helper.make_node("Constant", [], [name], value_float=1.0)
    return helper.make_graph(
        [constant], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [])]
    )


def _if(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    node = helper.make_node("If", ["yes"], ["if"], then_branch=_branch("a"), else_branch=_branch("b"))
    model.graph.node.append(node)


def _hidden_subgraph(model: onnx.ModelProto) -> None:
    """A nested graph in an operator that has no such attribute."""
    model.graph.node[0].attribute.append(helper.make_attribute("body", _branch("a")))


def _hidden_subgraphs(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("bodies", [_branch("a"), _branch("b")]))


def _function(model: onnx.ModelProto) -> None:
    opset = helper.make_opsetid("", 17)
    node = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(helper.make_function("", "Quiet", ["a"], ["b"], [node], [opset]))


def _sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))


def _training(model: onnx.ModelProto) -> None:
    model.training_info.append(onnx.TrainingInfoProto())


def _random(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("RandomNormalLike", ["image"], ["noise"]))


def _second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def _second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, None))


def _no_output(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def _float16(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _sequence(model: onnx.ModelProto) -> None:
    model.graph.output[0].CopyFrom(
        helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, [1, 3, 4, 4, 4])
    )


def _input(*shape: int | str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: _set_shape(model.graph.input[0], list(shape))


def _output(*shape: int | str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: _set_shape(model.graph.output[0], list(shape))


def _unknown_rank(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def _dangling(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Convoluted"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_external, "in another file"),
        (_external_without_flag, "in another file"),
        (_external_constant, "'value' of 'Constant' in another file"),
        (_custom_node, "'Run' of the domain 'com.example'"),
        (_custom_import, "operator domain 'com.microsoft'"),
        (_if, "control-flow operator 'If'"),
        (_hidden_subgraph, "nested graph in the attribute 'body' of 'Conv'"),
        (_hidden_subgraphs, "nested graph in the attribute 'bodies' of 'Conv'"),
        (_function, "functions of its own .'Quiet'"),
        (_sparse, "sparse initializers"),
        (_training, "training information"),
        (_random, "random operator 'RandomNormalLike'"),
        (_second_input, "2 inputs, where one"),
        (_second_output, "2 outputs, where one"),
        (_no_output, "0 outputs, where one"),
        (_float16, "an input that is not float32"),
        (_sequence, "an output that is not float32"),
        (_unknown_rank, "an input without the five axes"),
        (_input("n", 1, "y", "x"), "an input without the five axes"),
        (_input("n", 2, "z", "y", "x"), "an input of 2 channels, where model.json says 1"),
        (_input("n", "c", "z", "y", "x"), "an input of unknown channels"),
        (_input("n", 0, "z", "y", "x"), "an input of 0 channels"),
        (_input(2, 1, "z", "y", "x"), "an input with a batch of 2"),
        (
            _input(1, 1, 16, 16, 32),
            r"an input of \[16, 16, 32\], where model.json says a patch of \[16, 16, 16\]",
        ),
        (_output("n", 2, "z", "y", "x"), "an output of 2 channels, where model.json says 3"),
        (_output(1, 3, 8, 16, 16), r"an output of \[8, 16, 16\]"),
        (_dangling, "not a valid ONNX graph"),
        (_unknown_operator, "not a valid ONNX graph"),
    ],
)
def test_what_no_bundle_may_hold_is_refused(
    manifest: Manifest, change: Callable[[onnx.ModelProto], None], says: str
) -> None:
    model = threshold_network(THRESHOLDS)
    change(model)
    with pytest.raises(BundleError, match=says) as caught:
        _check(model, manifest)
    assert "'student.onnx'" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_well_sealed_bundle_with_such_a_network_does_not_open(tmp_path: Path) -> None:
    folder = make_threshold_bundle(tmp_path / "bundle").folder
    model = onnx.load(folder / "student.onnx")
    _custom_node(model)
    data = model.SerializeToString()
    manifest = json.loads((folder / "model.json").read_text())
    manifest["weights"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "student.onnx").write_bytes(data)
    (folder / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"'Run' of the domain 'com\.example'"):
        seal(folder)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\x0a\xff\xff\xff\xff\x0f" * 10])
def test_what_is_no_network_is_refused(manifest: Manifest, data: bytes) -> None:
    with pytest.raises(BundleError):
        check_graph(data, "student.onnx", manifest)


def test_every_operator_with_a_nested_graph_is_named(manifest: Manifest) -> None:
    """No operator of ONNX that takes a graph gets past, also one that a later ONNX adds."""
    with_graphs = {
        schema.name
        for schema in onnx.defs.get_all_schemas()
        if schema.domain == ""
        and any(
            a.type in (onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS)
            for a in schema.attributes.values()
        )
    }
    assert with_graphs >= {"If", "Loop", "Scan", "SequenceMap"}
    for operator in with_graphs:
        model = threshold_network(THRESHOLDS)
        model.graph.node.append(helper.make_node(operator, ["image"], ["out"], body=_branch("a")))
        with pytest.raises(BundleError, match=r"control-flow operator|nested graph"):
            _check(model, manifest)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_network_gives_a_bundle_error_or_passes(manifest: Manifest, data: st.DataObject) -> None:
    """The digests come first in a bundle; this is about a maker who means harm and seals it well."""
    serialized = bytearray(threshold_network(THRESHOLDS).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(serialized) - 1))
        serialized[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BundleError):
        check_graph(bytes(serialized), "student.onnx", manifest)


def test_the_slow_and_the_quantized_networks_of_the_factory_pass(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", slow_convolutions=3, int8=True, channels=2)
    assert len(bundle.manifest.weights) == 2
