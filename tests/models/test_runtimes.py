"""Runtimes: the same numbers as PyTorch in float32, fixed shapes, refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nnunet_reference import ReferenceModel, reference_model
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from models import runtimes
from models.errors import RuntimeUnavailableError, UnsupportedModelError
from models.linear_head import find_head, remove_head
from models.memory import activation_bytes
from models.runtimes import available_runtimes, choose_runtime, fix_shape, open_model, open_network

SHAPE = (1, 1, 16, 16, 16)
CPU = [runtime for runtime in ("openvino", "onnxruntime") if runtime in available_runtimes()]


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return reference_model(features=(16, 32), blocks=(2, 2), n_labels=20)


@pytest.fixture(scope="module")
def path(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    model.export(folder)
    return folder / "fold0.onnx"


@pytest.fixture(scope="module")
def patch() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def expected(model: ReferenceModel, patch: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return model.network()(torch.from_numpy(patch)).numpy()


def test_openvino_is_preferred_and_auto_is_the_first() -> None:
    assert available_runtimes()[0] == "openvino"
    assert choose_runtime() == "openvino"
    assert choose_runtime("onnxruntime") == "onnxruntime"


def test_without_openvino_onnx_runtime_is_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else object())
    assert available_runtimes()[0] == "onnxruntime"
    assert choose_runtime() == "onnxruntime"
    with pytest.raises(RuntimeUnavailableError, match="'openvino' is not available"):
        choose_runtime("openvino")


@pytest.mark.parametrize("name", ["", "tensorrt", "OpenVINO"])
def test_an_unknown_runtime_is_named(name: str, path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=repr(name)):
        open_network(path, runtime=name, patch_shape=SHAPE)


@pytest.mark.parametrize("runtime", CPU)
def test_float32_and_nothing_less(
    runtime: str, path: Path, patch: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    """bfloat16, which newer Xeons would be given, is off by a hundredth; float32 by a millionth."""
    network = open_network(path, runtime=runtime, patch_shape=SHAPE, threads=1)
    logits = network(patch)
    assert network.name == runtime
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=2e-5 * float(np.abs(expected).max()))
    network.close()


def test_openvino_says_that_it_computes_in_float32(path: Path) -> None:
    import openvino
    from openvino.properties import hint

    network: Any = open_network(path, runtime="openvino", patch_shape=SHAPE, threads=1)
    assert network._compiled.get_property(hint.inference_precision()) == openvino.Type.f32


@pytest.mark.skipif(
    not {"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()),
    reason="this processor has no bfloat16, so nothing could be told apart",
)
def test_the_float32_test_would_notice_bfloat16(
    path: Path, patch: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    import openvino
    from openvino.properties import hint

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(path), "CPU", {hint.inference_precision(): openvino.Type.bf16}
    )
    off = np.abs(compiled([patch])[0] - expected).max() / np.abs(expected).max()
    assert off > 1e-3


@pytest.mark.parametrize("runtime", CPU)
def test_a_result_is_the_same_each_time(runtime: str, path: Path, patch: NDArray[np.float32]) -> None:
    network = open_network(path, runtime=runtime, patch_shape=SHAPE, threads=2)
    first = network(patch).copy()
    network(patch + 1)
    assert np.array_equal(network(patch), first)


def test_compiled_models_are_kept(
    path: Path, tmp_path: Path, patch: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    for _ in range(2):
        network = open_network(
            path, runtime="openvino", patch_shape=SHAPE, threads=1, cache_dir=tmp_path / "cache"
        )
        np.testing.assert_allclose(network(patch), expected, atol=2e-5 * float(np.abs(expected).max()))
    assert any((tmp_path / "cache").glob("*.blob"))


@pytest.mark.parametrize("runtime", CPU)
def test_the_shape_is_the_callers(runtime: str, path: Path) -> None:
    network = open_network(path, runtime=runtime, patch_shape=(1, 1, 8, 24, 16), threads=1)
    assert network(np.zeros((1, 1, 8, 24, 16), np.float32)).shape == (1, 21, 8, 24, 16)


def test_another_number_of_channels_is_refused(path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="takes 1 channels, not 2"):
        open_network(path, patch_shape=(1, 2, 16, 16, 16))


@pytest.mark.parametrize("runtime", CPU)
def test_a_shape_that_the_network_cannot_take_is_refused(runtime: str, path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        open_network(path, runtime=runtime, patch_shape=(1, 1, 15, 16, 16))(
            np.zeros((1, 1, 15, 16, 16), np.float32)
        )


def test_two_inputs_are_refused(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input.append(model.graph.input[0])
    with pytest.raises(UnsupportedModelError, match="2 inputs"):
        fix_shape(model, SHAPE)


def test_features_and_head_make_the_logits(
    path: Path, patch: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    model = onnx.load(path)
    head = find_head(model)
    assert head is not None
    assert head.matrix.shape == (21, 16)
    remove_head(model)
    onnx.checker.check_model(model)
    features = runtimes.open_model(model, patch_shape=SHAPE, threads=1)(patch)[0]
    logits = np.tensordot(head.matrix, features, 1) + head.bias[:, None, None, None]
    np.testing.assert_allclose(logits, expected[0], atol=2e-5 * float(np.abs(expected).max()))


def conv_model(**attributes: Any) -> onnx.ModelProto:
    kernel = attributes.pop("kernel", (1, 1, 1))
    outputs = attributes.pop("outputs", 9)
    source = attributes.pop("source", "f")
    before = onnx.helper.make_node("Relu", ["x"], ["f"])
    node = onnx.helper.make_node("Conv", [source, "w"], ["y"], kernel_shape=kernel, **attributes)
    weights = np.ones((outputs, 4 // attributes.get("group", 1), *kernel), np.float32)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [before, node],
        "conv",
        [value("x", 1, [1, 4, 8, 8, 8])],
        [value("y", 1, ["n", "c", "z", "y", "x"])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    return onnx.helper.make_model(graph)


def test_a_convolution_without_bias_is_a_head() -> None:
    head = find_head(conv_model())
    assert head is not None
    assert head.bias.tolist() == [0] * 9


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel": (1, 3, 1)},
        {"strides": (1, 2, 1)},
        {"pads": (0, 0, 0, 1, 0, 0)},
        {"group": 2, "outputs": 10},
        {"outputs": 4},
        {"auto_pad": "SAME_UPPER"},
        {"source": "x"},
    ],
)
def test_what_is_no_head(attributes: dict[str, Any]) -> None:
    assert find_head(conv_model(**attributes)) is None


def test_a_quantized_head_is_dequantized() -> None:
    model = conv_model()
    graph = model.graph
    codes = np.arange(36, dtype=np.int8).reshape(9, 4, 1, 1, 1)
    scale, zero = np.linspace(0.1, 0.9, 9).astype(np.float32), np.arange(9, dtype=np.int8)
    del graph.initializer[:]
    for name, array in (("q", codes), ("s", scale), ("z", zero)):
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0))
    head = find_head(model)
    assert head is not None
    wanted = (codes[..., 0, 0, 0].astype(float) - zero[:, None]) * scale[:, None]
    np.testing.assert_allclose(head.matrix, wanted, rtol=1e-6)
    remove_head(model)
    assert [node.op_type for node in graph.node] == ["Relu"]
    assert not graph.initializer


def test_activations_of_a_chain_are_the_largest_pair() -> None:
    """4 channels to 9, LeakyRelu in place, and the 9 once more in the caller's order."""
    model = conv_model()
    model.graph.node.append(onnx.helper.make_node("LeakyRelu", ["y"], ["z"]))
    model.graph.output[0].name = "z"
    fix_shape(model, (1, 4, 8, 8, 8))
    voxels = 8**3 * 4
    assert activation_bytes(model) == (4 + 9) * voxels + 9 * voxels


@pytest.mark.skipif("openvino" not in CPU, reason="openvino is not installed")
def test_a_norm_over_many_voxels_is_as_exact_as_one_over_few() -> None:
    """One float32 that takes up every voxel, most of them equal, is off by 1e-3: OpenVINO's own norm.

    There are two in a row, since the first is written otherwise than the rest.
    """
    channels, shape = 16, (1, 1, 48, 64, 49)
    random = np.random.default_rng(0)
    patch = np.full(shape, -0.7, np.float32)
    patch[:, :, 12:36, 16:48, 12:38] = random.gamma(2.0, 1.0, (24, 32, 26))
    scale = random.normal(size=channels).astype(np.float32)
    stored = {
        "weights_0": random.normal(size=(channels, 1, 1, 1, 1)).astype(np.float32),
        "weights_1": np.eye(channels, dtype=np.float32).reshape(channels, channels, 1, 1, 1),
        "scale": scale,
        "bias": 2 * scale,
    }
    nodes, source = [], "image"
    for step in range(2):
        inputs = [source, f"weights_{step}"]
        nodes.append(helper.make_node("Conv", inputs, [f"conv_{step}"], kernel_shape=[1, 1, 1]))
        inputs, source = [f"conv_{step}", "scale", "bias"], f"norm_{step}"
        nodes.append(helper.make_node("InstanceNormalization", inputs, [source]))
    graph = helper.make_graph(
        nodes,
        "norms",
        [helper.make_tensor_value_info("image", 1, shape)],
        [helper.make_tensor_value_info(source, 1, (1, channels, *shape[2:]))],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    expected = patch.reshape(1, -1).astype(np.float64)
    for step in range(2):
        expected = stored[f"weights_{step}"][..., 0, 0, 0].astype(np.float64) @ expected
        expected -= expected.mean(axis=1, keepdims=True)
        expected *= scale[:, None] / np.sqrt(np.square(expected).mean(axis=1, keepdims=True) + 1e-5)
        expected += 2 * scale[:, None]
    network = open_model(model, runtime="openvino", patch_shape=shape, threads=1)
    found = network(patch).reshape(channels, -1)
    network.close()
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


def test_cuda_is_looked_for_in_the_wheels_before_it_is_started(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def preload_dlls() -> None:
        done.append("preload")
        print("Failed to load libcudart.so")

    class Session:
        def __init__(self, _model: bytes, _options: object, *, providers: list[object]) -> None:
            done.append(str(providers[0]))

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="could not start"):
        open_network(path, runtime="onnxruntime-cuda", patch_shape=SHAPE)
    assert done == ["preload", "('CUDAExecutionProvider', {'use_tf32': '0'})"]
    assert capsys.readouterr().out == ""
