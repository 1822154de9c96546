"""Runs a result, or an ONNX model, by ONNX Runtime: on the CPU, or on CUDA where that is asked for. Nothing falls back silently.

On CUDA, inputs and outputs stay on the device (I/O binding). A CUDA graph replays one launch for fixed sizes: inputs are copied into the
buffers that it was captured with.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphprune.errors import InvalidInput, MissingExtra
from graphprune.measure import Stats, interleaved

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
}
NUMPY_TYPES = {
    torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64, torch.int64: np.int64,
    torch.int32: np.int32, torch.bool: np.bool_, torch.uint8: np.uint8, torch.int8: np.int8,
}  # fmt: skip


def check_device(device: str) -> Any:
    """The `onnxruntime` module, after making sure that it can run on a device.

    Raises:
        MissingExtra: ONNX Runtime, or its CUDA provider, is not installed.
        InvalidInput: the device is unknown.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(f'ONNX files are run by ONNX Runtime: pip install "graphprune[onnxruntime]" ({error})') from None
    kind, _, index = device.partition(":")
    if kind not in PROVIDERS or (index and not index.isdigit()):
        raise InvalidInput(f"ONNX Runtime runs on {', '.join(PROVIDERS)} (or cuda:N) here, found device {device!r}")
    available = onnxruntime.get_available_providers()
    if PROVIDERS[kind] not in available:
        raise MissingExtra(
            f'device={device!r} needs ONNX Runtime built for CUDA: pip uninstall onnxruntime, then pip install "graphprune[gpu]"; '
            f"the installed build has {', '.join(available)}"
        )
    return onnxruntime


def open_session(
    model: Any, device: str = "cpu", threads: int | None = 1, cuda_graph: bool = False, optimize: bool = True, float16: bool = False
) -> Any:
    """An ONNX Runtime session.

    Args:
        model: a path, an `onnx_ir.Model`, a program captured from ONNX, or a result (which is saved as ONNX for it).
        device: "cpu", "cuda" or "cuda:1".
        threads: CPU threads of one operator; None leaves that to ONNX Runtime.
        cuda_graph: capture the launches once and replay them; sizes are fixed then.
        optimize: let ONNX Runtime fuse and fold.
        float16: convert weights and arithmetic; inputs and outputs keep their types.

    Raises:
        MissingExtra: ONNX Runtime, or its CUDA provider, is not installed or does not start.
        InvalidInput: the device is unknown, or ONNX Runtime refuses the model.
    """
    onnxruntime = check_device(device)
    kind, _, index = device.partition(":")
    if cuda_graph and kind != "cuda":
        raise InvalidInput(f"cuda_graph=True needs device='cuda', found {device!r}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings = {"device_id": index or "0", "enable_cuda_graph": str(int(cuda_graph))} if kind == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder:
        source = _source(model, Path(folder), float16)
        try:
            session = onnxruntime.InferenceSession(source, options, providers=[(PROVIDERS[kind], settings)])
        except Exception as error:  # its exceptions share no base of their own
            name = Path(model).name if isinstance(model, (str, os.PathLike)) else "the model"
            raise InvalidInput(f"ONNX Runtime refuses {name}: {_first_line(error)}") from None
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDERS[kind]:
        raise MissingExtra(f'{PROVIDERS[kind]} is installed but does not start (CUDA or cuDNN libraries?): see "graphprune[gpu]"')
    return session


def _source(model: Any, folder: Path, float16: bool) -> str:
    """A file that ONNX Runtime can read."""
    file = folder / "model.onnx"
    if isinstance(model, (str, os.PathLike)):
        if not Path(model).is_file():
            raise InvalidInput(f"no ONNX file at {model}")
        file = Path(model)
    elif isinstance(model, ir.Model) or hasattr(getattr(model, "source", None), "model"):
        ir.save(model if isinstance(model, ir.Model) else model.source.model, file, external_data="model.onnx.data")
    else:
        model.save(file)
    if float16:
        file = _half(file, folder / "half.onnx")
    return os.fspath(file)


def _half(file: Path, target: Path) -> Path:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True, disable_shape_infer=True), target)
    return target


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class OnnxRuntimeModel:
    """Callable like the model: tensors or arrays in, by position or by input name; one tensor or a tuple of them out.

    Takes the options of `open_session`. With I/O binding (always on CUDA) the memory of tensors is used as it is, and outputs are tensors
    on the device.
    """

    def __init__(self, model: Any, *, device: str = "cpu", io_binding: bool = False, cuda_graph: bool = False, **options: Any) -> None:
        self.session = open_session(model, device, cuda_graph=cuda_graph, **options)
        self.device = torch.device(device)
        self.io_binding = io_binding or self.device.type == "cuda"
        self.cuda_graph = cuda_graph
        self.inputs = {it.name: it for it in self.session.get_inputs()}
        self.outputs = [it.name for it in self.session.get_outputs()]
        self._captured: tuple[Any, dict[str, torch.Tensor], list[torch.Tensor]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        feeds = self._feeds(args, kwargs)
        if not self.io_binding:
            found = self.session.run(self.outputs, {name: _array(value) for name, value in feeds.items()})
            outputs = [torch.from_numpy(it) if isinstance(it, np.ndarray) else it for it in found]
        elif self.cuda_graph:
            outputs = self._replay(feeds)
        else:
            outputs = self._bound(feeds)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def measure(self, *args: Any, repeats: int = 20, **kwargs: Any) -> Stats:
        """Latency of a call with these inputs, which lie on the device already."""
        feeds = {name: self._placed(name, value) for name, value in self._feeds(args, kwargs).items()}
        return interleaved({"call": lambda: self(**feeds)}, repeats=repeats, device=self.device)["call"]

    def _feeds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        feeds = {**dict(zip(self.inputs, args)), **kwargs}
        if len(args) > len(self.inputs) or set(feeds) != set(self.inputs):
            found = f"{len(args)} by position and {', '.join(kwargs) or 'none'} by name"
            raise InvalidInput(f"the model takes {', '.join(self.inputs)}; found {found}")
        return feeds

    def _placed(self, name: str, value: Any) -> torch.Tensor:
        """An input on the device, laid out and typed as the model wants it."""
        tensor = value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(value)
        wanted = TORCH_TYPES.get(self.inputs[name].type)
        if wanted is None:
            raise InvalidInput(f"input {name!r} is of type {self.inputs[name].type}, which cannot be placed on a device here")
        return tensor.to(self.device, wanted).contiguous()

    def _bind(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        binding = self.session.io_binding()
        for name, tensor in tensors.items():
            place = (self.device.type, self.device.index or 0)
            binding.bind_input(name, *place, NUMPY_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        return binding

    def _bound(self, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
        tensors = {name: self._placed(name, value) for name, value in feeds.items()}
        binding = self._bind(tensors)
        for name in self.outputs:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        self._run(binding)
        return [_tensor(value, self.device) for value in binding.get_outputs()]

    def _run(self, binding: Any) -> None:
        if self.device.type == "cuda":  # ONNX Runtime works on a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)

    def _replay(self, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
        """Copy the inputs into the captured buffers and launch the graph; the first call finds the outputs' sizes and captures."""
        if self._captured is None:
            tensors = {name: self._placed(name, value).clone() for name, value in feeds.items()}
            outputs = self._empty_outputs()
            binding = self._bind(tensors)
            for name, out in zip(self.outputs, outputs):
                place = (self.device.type, self.device.index or 0)
                binding.bind_output(name, *place, NUMPY_TYPES[out.dtype], tuple(out.shape), out.data_ptr())
            self._captured = binding, tensors, outputs
        binding, tensors, outputs = self._captured
        for name, value in feeds.items():
            if tuple(value.shape) != tuple(tensors[name].shape):
                was = list(tensors[name].shape)
                raise InvalidInput(f"a CUDA graph has fixed sizes: input {name!r} was {was}, found {list(value.shape)}")
            tensors[name].copy_(self._placed(name, value))
        self._run(binding)
        return [out.clone() for out in outputs]

    def _empty_outputs(self) -> list[torch.Tensor]:
        found = []
        for it in self.session.get_outputs():
            if not all(isinstance(size, int) for size in it.shape) or it.type not in TORCH_TYPES:
                found_type = f"{it.type} of {it.shape}"
                raise InvalidInput(f"a CUDA graph needs fixed sizes, but output {it.name!r} is {found_type}; export without dynamic axes")
            found.append(torch.empty(it.shape, dtype=TORCH_TYPES[it.type], device=self.device))
        return found


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _tensor(value: Any, device: torch.device) -> torch.Tensor:
    """An ORT value as a tensor; without DLPack in the installed build, by way of the CPU."""
    inner = getattr(value, "_ortvalue", value)
    if hasattr(inner, "to_dlpack"):
        return torch.from_dlpack(inner.to_dlpack())
    return torch.from_numpy(value.numpy()).to(device)
