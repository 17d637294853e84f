"""OpenVINO and ONNX Runtime behind one small Protocol.

OpenVINO is the CPU runtime where it is installed: its blocked 3D convolutions take half the time of ONNX
Runtime's. ONNX Runtime runs everywhere else, and on CUDA. All compute in float32: OpenVINO would pick
bfloat16 by itself where the processor has it, and CUDA would pick TF32; both are told not to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from models.errors import RuntimeUnavailableError, UnsupportedModelError
from models.lanes import widen
from models.resources import usable_cores, vector_lanes

OPENVINO = "openvino"
ONNXRUNTIME = "onnxruntime"
ONNXRUNTIME_CUDA = "onnxruntime-cuda"
AUTO = "auto"


class Network(Protocol):
    """A network of fixed input shape, ready to run. Not for use by several threads at once.

    ``name`` is the runtime's. Calling it takes a (N, C, Z, Y, X) float32 array and returns
    (N, K, Z, Y, X) float32, in any order in memory, which is valid until the next call.
    """

    name: str

    def __call__(self, patch: NDArray[np.float32]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


def available_runtimes() -> tuple[str, ...]:
    """The runtimes that are installed here, the preferred one first."""
    found = []
    if importlib.util.find_spec("openvino") is not None:
        found.append(OPENVINO)
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        found.append(ONNXRUNTIME)
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            found.append(ONNXRUNTIME_CUDA)
    return tuple(found)


def choose_runtime(runtime: str = AUTO) -> str:
    """The runtime that a request stands for; ``"auto"`` is the preferred one of those installed.

    Raises
    ------
    RuntimeUnavailableError
        If it is unknown or not installed.
    """
    found = available_runtimes()
    if runtime == AUTO and found:
        return found[0]
    if runtime not in found:
        raise RuntimeUnavailableError(
            f"The runtime {runtime!r} is not available; here are: {', '.join(found) or 'none'}.",
            remedy="Install it, or choose one that is there.",
        )
    return runtime


def open_network(
    path: Path,
    *,
    runtime: str = AUTO,
    patch_shape: tuple[int, ...],
    threads: int | None = None,
    cache_dir: Path | None = None,
) -> Network:
    """Load an ONNX file for one input shape.

    Parameters
    ----------
    path : Path
        A graph with one input (N, C, Z, Y, X) and one output, both float32.
    runtime : str
        One of `available_runtimes`, or ``"auto"``.
    patch_shape : five ints
        (N, C, Z, Y, X) of every array that it will be called with.
    threads : int, optional
        Cores to keep busy; all that the control group allows if None.
    cache_dir : Path, optional
        Where OpenVINO keeps compiled models, so that the next start is fast.

    Raises
    ------
    RuntimeUnavailableError
        If the runtime is not installed or does not start.
    UnsupportedModelError
        If the runtime cannot run this graph at this shape.
    """
    model = onnx.load(path, load_external_data=False)
    return open_model(model, runtime=runtime, patch_shape=patch_shape, threads=threads, cache_dir=cache_dir)


def open_model(
    model: onnx.ModelProto,
    *,
    runtime: str = AUTO,
    patch_shape: tuple[int, ...],
    threads: int | None = None,
    cache_dir: Path | None = None,
) -> Network:
    """`open_network` for a graph in memory, which `prepare` may have seen already."""
    runtime = choose_runtime(runtime)
    threads = usable_cores() if threads is None else threads
    serialized = prepare(model, runtime=runtime, patch_shape=patch_shape).SerializeToString()
    if runtime == OPENVINO:
        return _OpenVino(serialized, threads, cache_dir)
    return _OnnxRuntime(serialized, threads, cuda=runtime == ONNXRUNTIME_CUDA)


def prepare(model: onnx.ModelProto, *, runtime: str, patch_shape: tuple[int, ...]) -> onnx.ModelProto:
    """The graph as a runtime will be given it. Its input gets the fixed shape, in place.

    Raises
    ------
    UnsupportedModelError
        If the graph's own fixed dimensions say otherwise.
    """
    fix_shape(model, patch_shape)
    return widen(model, vector_lanes()) if runtime == OPENVINO else model


def fix_shape(model: onnx.ModelProto, shape: Sequence[int]) -> None:
    """Give the graph's input a fixed shape, and forget the shapes that were stored for another one.

    Raises
    ------
    UnsupportedModelError
        If the graph's own fixed dimensions say otherwise.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != len(shape):
        raise UnsupportedModelError(
            f"The network has {len(inputs)} inputs; one of (N, C, Z, Y, X) is supported.",
            remedy="Export the 3D network with a single image input.",
        )
    dimensions = inputs[0].type.tensor_type.shape.dim
    for index, (dimension, size) in enumerate(zip(dimensions, shape, strict=True)):
        if index == 1 and dimension.HasField("dim_value") and dimension.dim_value != size:
            raise UnsupportedModelError(
                f"The network takes {dimension.dim_value} channels, not {size}.",
                remedy="Export the model again; its manifest and its network do not belong together.",
            )
        dimension.dim_value = size
    del model.graph.value_info[:]
    for output in model.graph.output:
        for index, free in enumerate(output.type.tensor_type.shape.dim):
            free.dim_param = f"output_{index}"


class _OpenVino:
    """One request on the CPU plugin, all threads in one stream: one volume is what there is to do."""

    name = OPENVINO

    def __init__(self, serialized: bytes, threads: int, cache_dir: Path | None) -> None:
        import openvino
        from openvino import properties
        from openvino.properties import hint

        core = openvino.Core()
        options: dict[Any, Any] = {
            hint.inference_precision(): openvino.Type.f32,
            hint.performance_mode(): hint.PerformanceMode.LATENCY,
            hint.enable_cpu_pinning(): False,
            properties.inference_num_threads(): threads,
            properties.num_streams(): 1,
        }
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            options[properties.cache_dir()] = str(cache_dir)
        try:
            model = core.read_model(serialized)
            self._compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"OpenVINO cannot run this network: {_first_line(error)}",
                remedy="Run it on onnxruntime, or export it with standard operators.",
            ) from error
        self._request = self._compiled.create_infer_request()

    def __call__(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        results = self._request.infer([patch], share_inputs=True, share_outputs=True)
        output = np.asarray(results[0])
        if output.ndim == 4:  # a widened network gives channels innermost
            return np.moveaxis(output, -1, 0)[None]
        return output

    def close(self) -> None:
        del self._request, self._compiled


class _OnnxRuntime:
    """A session on the CPU or, with its input and output bound, on CUDA."""

    def __init__(self, serialized: bytes, threads: int, *, cuda: bool) -> None:
        import onnxruntime

        self.name = ONNXRUNTIME_CUDA if cuda else ONNXRUNTIME
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if cuda:
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
            # CUDA and cuDNN may lie in NVIDIA's wheels, where the system's loader does not look.
            with contextlib.redirect_stdout(sys.stderr):  # it prints, and standard output is for results
                onnxruntime.preload_dlls()
        try:
            self._session = onnxruntime.InferenceSession(serialized, options, providers=providers)
        except Exception as error:  # its errors share no base class but Exception
            raise UnsupportedModelError(
                f"ONNX Runtime cannot run this network: {_first_line(error)}",
                remedy="Export it with standard operators of an opset that this ONNX Runtime knows.",
            ) from error
        if cuda and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeUnavailableError(
                "ONNX Runtime has CUDA, but could not start it.",
                remedy="Check the driver, and that the CUDA and cuDNN of this onnxruntime-gpu are installed.",
            )
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name

    def __call__(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.name == ONNXRUNTIME:
            return np.asarray(self._session.run([self._output], {self._input: patch})[0])
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._input, patch)
        binding.bind_output(self._output, "cpu")
        self._session.run_with_iobinding(binding)
        return np.asarray(binding.copy_outputs_to_cpu()[0])

    def close(self) -> None:
        del self._session


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]
