"""Runs a result, or an ONNX model, by ONNX Runtime: on the CPU, or on CUDA where that is asked for. Nothing falls back silently.

On CUDA, inputs and outputs stay on the device (I/O binding). A CUDA graph replays one launch for one set of sizes: each set that comes gets
a graph and buffers of its own, which inputs are copied into.

Float32 models can be fused, fixed to sizes and run in 16 bits (`onnx_tuning`); what that changes is measured against the model as it was.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from graphprune.capture.onnx_file import capture_onnx
from graphprune.errors import InvalidInput, MissingExtra, VerificationFailed
from graphprune.execute.likeness import distance, random_inputs
from graphprune.measure import Stats, interleaved
from graphprune.program import Program

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
}
BINDING_TYPES: Mapping[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64, torch.int64: np.int64, torch.int32: np.int32,
    torch.bool: np.bool_, torch.uint8: np.uint8, torch.int8: np.int8, torch.bfloat16: int(onnx.TensorProto.BFLOAT16),
}  # fmt: skip
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # largest difference over the largest entry, output by output
NO_KERNEL = re.compile(r"Could not find an implementation for (?:[\w.]+:)?(\w+)\(\d+\)")
log = logging.getLogger("graphprune")


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
    model: Any, device: str = "cpu", threads: int | None = 1, cuda_graph: bool = False, optimize: bool = True,
    provider_options: Mapping[str, str] | None = None,
) -> Any:  # fmt: skip
    """An ONNX Runtime session.

    Args:
        model: a path, an `onnx_ir.Model`, a program captured from ONNX, or a result (which is saved as ONNX for it).
        device: "cpu", "cuda" or "cuda:1".
        threads: CPU threads of one operator; None leaves that to ONNX Runtime.
        cuda_graph: launches can be captured and replayed.
        optimize: let ONNX Runtime fuse and fold.
        provider_options: of the CUDA provider, e.g. {"cudnn_conv_algo_search": "HEURISTIC"}.

    Raises:
        MissingExtra: ONNX Runtime, or its CUDA provider, is not installed or does not start.
        InvalidInput: the device is unknown, or ONNX Runtime refuses the model.
    """
    onnxruntime = check_device(device)
    kind, _, index = device.partition(":")
    for name, given in (("cuda_graph=True", cuda_graph), ("provider_options", provider_options)):
        if given and kind != "cuda":
            raise InvalidInput(f"{name} needs device='cuda', found {device!r}")
    if kind == "cuda" and hasattr(onnxruntime, "preload_dlls"):  # the CUDA and cuDNN libraries that torch came with
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings = {"device_id": index or "0", "enable_cuda_graph": str(int(cuda_graph)), **(provider_options or {})} if kind == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder:
        source = os.fspath(_file(model, Path(folder)))
        try:
            session = onnxruntime.InferenceSession(source, options, providers=[(PROVIDERS[kind], settings)])
        except Exception as error:  # its exceptions share no base of their own
            name = Path(model).name if isinstance(model, (str, os.PathLike)) else "the model"
            raise InvalidInput(f"ONNX Runtime refuses {name}: {_first_line(error)}") from None
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDERS[kind]:
        raise MissingExtra(f'{PROVIDERS[kind]} is installed but does not start (CUDA or cuDNN libraries?): see "graphprune[gpu]"')
    return session


def _file(model: Any, folder: Path) -> Path:
    """A file that ONNX Runtime can read: the model's own, or one in `folder`."""
    file = folder / "model.onnx"
    if isinstance(model, (str, os.PathLike)):
        if not Path(model).is_file():
            raise InvalidInput(f"no ONNX file at {model}")
        return Path(model)
    if isinstance(model, ir.Model) or hasattr(getattr(model, "source", None), "model"):
        ir.save(model if isinstance(model, ir.Model) else model.source.model, file, external_data="model.onnx.data")
    else:
        model.save(file)
    return file


def convolutional(file: Path) -> bool:
    """Whether most products of a model are convolutions."""
    ops = [node.op_type for node in ir.load(file).graph.all_nodes()]
    return ops.count("Conv") > ops.count("MatMul") + ops.count("Gemm")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# For convolutions in float16 (ONNX Runtime has no others in 16 bits for this): channels last, and the bias added by cuDNN. ResNet-50 on an
# H200, batch 64: 6.87 ms without, 4.01 with.
# ReLU and addition stay kernels of their own: the CUDA provider has `FusedConv` in float32 alone (as of ONNX Runtime 1.30). Images keep
# their three channels, whose convolution takes 0.84 ms of that: the Pad that would add channels of zeros takes 2.2 ms.
CHANNELS_LAST = {"prefer_nhwc": "1", "fuse_conv_bias": "1"}


@dataclass(frozen=True)
class Captured:
    """A CUDA graph for one set of sizes, and the buffers that it reads and writes."""

    inputs: Mapping[str, torch.Tensor]
    outputs: list[torch.Tensor]
    binding: Any
    options: Any  # names the graph to ONNX Runtime, which replays it without waiting


class OnnxRuntimeModel:
    """Callable like the model: tensors or arrays in, by position or by input name; one tensor or a tuple of them out.

    Takes the options of `open_session` besides these; on CUDA, convolutional networks in float16 run channels last if `provider_options`
    does not say otherwise. With I/O binding (always on CUDA) the memory of tensors is used as it is, and outputs are tensors on the device.

    Args:
        cuda_graph: capture the launches once for each set of input sizes, and replay them.
        precision: "float32", "float16" or "bfloat16": the arithmetic of what is float32 in the model.
        keep_io_types: float32 inputs and outputs stay float32 in 16-bit precision.
        wide: op types that stay in float32, beside those that always do.
        fuse: replace attention, skip-norm and GELU by ONNX Runtime's own operators, where the outputs stay the same.
        sizes: open axes that get fixed sizes, by the axis' name or (for the first axis) the input's: masks and positions become constants.
        check: compare with the float32 model on the CPU: True on random inputs like the example, or the inputs to use; False does not.
        tolerance: the largest relative difference that `check` lets pass, by default that of `TOLERANCE`.

    Attributes:
        fused: operators of ONNX Runtime that were put in, and how many of each.
        error: the relative difference that was found; None where nothing was changed or checked.

    Raises:
        VerificationFailed: 16-bit arithmetic moves the outputs by more than `tolerance`.
    """

    def __init__(
        self, model: Any, *, device: str = "cpu", io_binding: bool = False, cuda_graph: bool = False, precision: str = "float32",
        keep_io_types: bool = True, wide: Sequence[str] = (), fuse: bool = False, sizes: Mapping[str, int] | None = None,
        check: bool | Sequence[Any] = True, tolerance: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        check_device(device)
        if precision not in TOLERANCE:
            raise InvalidInput(f"precision is one of {', '.join(TOLERANCE)}, found {precision!r}")
        self.device = torch.device(device)
        self.cuda_graph, self.precision = cuda_graph, precision
        self.fused: dict[str, int] = {}
        self.error: float | None = None
        self.stream: Any = None
        session_options = {**options, "device": device, "cuda_graph": cuda_graph}
        if self.device.type == "cuda":  # one stream for torch and for the session, so that neither waits for the other
            self.stream = torch.cuda.Stream(self.device)
            own = {"user_compute_stream": str(self.stream.cuda_stream)}
            session_options["provider_options"] = {**own, **(options.get("provider_options") or {})}
        if precision == "float32" and not fuse and not sizes:
            self._take(open_session(model, **session_options), io_binding)
            return
        with tempfile.TemporaryDirectory() as folder:
            file = _file(model, Path(folder))
            if self.device.type == "cuda" and precision == "float16" and convolutional(file):
                session_options["provider_options"] = {**CHANNELS_LAST, **session_options["provider_options"]}
            examples = _examples(model, file) if check is True else check or None
            tuning = _Tuning(file, Path(folder), sizes or {}, examples, session_options, options.get("threads", 1))
            if fuse:
                self.fused, self.error = tuning.fuse()
            if precision != "float32":
                session = tuning.narrow(precision, keep_io_types, wide)
            else:
                session = tuning.open()
            self._take(session, io_binding)
            if examples is not None:
                self.error = self._error(tuning, TOLERANCE[precision] if tolerance is None else tolerance)

    def _take(self, session: Any, io_binding: bool) -> None:
        self.session = session
        self.inputs = {it.name: it for it in session.get_inputs()}
        self.outputs = [it.name for it in session.get_outputs()]
        binds = any(it.type == "tensor(bfloat16)" for it in (*self.inputs.values(), *session.get_outputs()))  # numpy has no such type
        self.io_binding = io_binding or binds or self.device.type == "cuda"
        self._captured: dict[tuple, Captured] = {}

    def _error(self, tuning: _Tuning, tolerance: float) -> float:
        found = self(*tuning.examples)
        error = _distance(found if isinstance(found, tuple) else (found,), tuning.expected)
        if not error <= tolerance:
            raise VerificationFailed(
                f"{self.precision} moves the outputs by {error:.1e} of their largest entry, more than tolerance={tolerance:g} allows; "
                "name op types that stay in float32 with wide=, or take another precision="
            )
        return error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        feeds = self._feeds(args, kwargs)
        if not self.io_binding:
            found = self.session.run(self.outputs, {name: self._array(name, value) for name, value in feeds.items()})
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

    def capture(self, *args: Any, **kwargs: Any) -> Captured:
        """The CUDA graph for the sizes of these inputs, which are in its buffers now; it is captured where there is none yet."""
        feeds = self._feeds(args, kwargs)
        tensors = {name: self._placed(name, value) for name, value in feeds.items()}
        key = tuple(tuple(tensor.shape) for tensor in tensors.values())
        if key not in self._captured:
            buffers = {name: tensor.clone() for name, tensor in tensors.items()}
            outputs = self._empty_outputs(buffers)
            binding = self._bind(buffers)
            for name, out in zip(self.outputs, outputs):
                binding.bind_output(name, *self._place(), BINDING_TYPES[out.dtype], tuple(out.shape), out.data_ptr())
            self._captured[key] = Captured(buffers, outputs, binding, _run_options(len(self._captured) + 1))
            self.launch(self._captured[key])  # the first run captures
        captured = self._captured[key]
        for name, tensor in tensors.items():
            captured.inputs[name].copy_(tensor)
        return captured

    def launch(self, captured: Captured) -> None:
        """Run a captured graph on what its buffers hold, in the order of the current stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        self.session.run_with_iobinding(captured.binding, captured.options)
        current.wait_stream(self.stream)

    def _feeds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        feeds = {**dict(zip(self.inputs, args)), **kwargs}
        if len(args) > len(self.inputs) or set(feeds) != set(self.inputs):
            found = f"{len(args)} by position and {', '.join(kwargs) or 'none'} by name"
            raise InvalidInput(f"the model takes {', '.join(self.inputs)}; found {found}")
        return {name: feeds[name] for name in self.inputs}

    def _placed(self, name: str, value: Any) -> torch.Tensor:
        """An input on the device, laid out and typed as the model wants it."""
        tensor = value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(value)
        wanted = TORCH_TYPES.get(self.inputs[name].type)
        if wanted is None:
            raise InvalidInput(f"input {name!r} is of type {self.inputs[name].type}, which cannot be placed on a device here")
        return tensor.to(self.device, wanted).contiguous()

    def _array(self, name: str, value: Any) -> np.ndarray:
        array = _array(value)
        wanted = TORCH_TYPES.get(self.inputs[name].type)
        floats = wanted is not None and wanted.is_floating_point and np.issubdtype(array.dtype, np.floating)
        return array.astype(BINDING_TYPES[wanted], copy=False) if floats and wanted is not None else array

    def _place(self) -> tuple[str, int]:
        return self.device.type, self.device.index or 0

    def _bind(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        binding = self.session.io_binding()
        for name, tensor in tensors.items():
            binding.bind_input(name, *self._place(), BINDING_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        return binding

    def _bound(self, feeds: Mapping[str, Any], options: Any = None) -> list[torch.Tensor]:
        tensors = {name: self._placed(name, value) for name, value in feeds.items()}
        binding = self._bind(tensors)
        for name in self.outputs:
            binding.bind_output(name, *self._place())
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.session.run_with_iobinding(binding, options)  # waits for its stream
        return [_tensor(value, self.device) for value in binding.get_outputs()]

    def _replay(self, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
        captured = self.capture(**feeds)
        self.launch(captured)
        return [out.clone() for out in captured.outputs]

    def _empty_outputs(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Buffers of the outputs' sizes, which open axes are only known for after a run."""
        outputs = self.session.get_outputs()
        if all(isinstance(size, int) for it in outputs for size in it.shape):
            return [torch.empty(it.shape, dtype=TORCH_TYPES[it.type], device=self.device) for it in outputs]
        return [torch.empty_like(it) for it in self._bound(tensors, _run_options(-1))]


def _run_options(graph: int) -> Any:
    """Options of a run that captures, or replays, the CUDA graph of this number; -1 for none."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    if graph >= 0:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


class _Tuning:
    """A model on its way to a session: each step is tried on a copy, and compared with what the float32 model gives on the CPU."""

    def __init__(
        self, file: Path, folder: Path, sizes: Mapping[str, int], examples: Sequence[Any] | None, options: Mapping[str, Any],
        threads: int | None,
    ) -> None:  # fmt: skip
        from graphprune.backends import onnx_tuning

        self.steps, self.file, self.folder, self.sizes = onnx_tuning, file, folder, sizes
        self.options, self.threads, self.fused = options, threads, False
        self.made: ir.Model | None = None  # after the steps so far, and not changed since
        self.examples: Sequence[Any] = ()
        if examples is not None:
            self.examples = [_resized(it, value.shape) for it, value in zip(examples, self._model().graph.inputs)]
            self.expected = self._on_cpu(file)

    def _model(self) -> ir.Model:
        """The model after the steps so far, to be changed; its large weights stay on disk until they are converted."""
        if self.made is not None:
            made, self.made = self.made, None
            return made
        model = ir.load(self.file)
        if self.sizes:
            self.steps.fix_sizes(model, self.sizes)
        if self.fused:
            self.steps.fuse(model)
        return model

    def _on_cpu(self, model: Any) -> list[torch.Tensor]:
        found = OnnxRuntimeModel(model, threads=self.threads)(*self.examples)
        return list(found) if isinstance(found, tuple) else [found]

    def fuse(self) -> tuple[dict[str, int], float | None]:
        """The operators that came in, and by how much they move the outputs; none where that is too much or they do not run."""
        model, error = self._model(), None
        fused = self.steps.fuse(model)
        if self.examples:
            try:
                error = _distance(self._on_cpu(model), self.expected)
            except Exception as problem:  # of the session or of its run: its exceptions share no base of their own
                log.warning("fusions for ONNX Runtime are left out: %s", _first_line(problem))
                return {}, None
            if not error <= TOLERANCE["float32"]:
                log.warning("fusions for ONNX Runtime are left out: they move the outputs by %.1e of their largest entry", error)
                return {}, None
        self.fused, self.made = True, model
        return fused, error

    def narrow(self, precision: str, keep_io: bool, wide: Sequence[str]) -> Any:
        """A session in 16 bits. An operator that ONNX Runtime has no 16-bit kernel for stays in float32."""
        stays = set(wide)
        while True:
            model = self._model()
            self.steps.narrow(model, precision, keep_io, stays)
            try:
                return open_session(model, **self.options)
            except InvalidInput as problem:
                missing = NO_KERNEL.search(str(problem))
                if missing is None or missing[1] in stays:
                    raise
                log.info("%s has no %s kernel here and stays in float32", missing[1], precision)
                stays.add(missing[1])

    def open(self) -> Any:
        return open_session(self._model(), **self.options)


def _examples(model: Any, file: Path) -> list[Any]:
    """Random inputs like those that the model was captured with; made up where it was not."""
    program = model if isinstance(model, Program) else getattr(model, "program", None) or capture_onnx(file)
    return [x for x in random_inputs(program, seed=1) if isinstance(x, torch.Tensor)]


def _resized(example: Any, shape: Any) -> torch.Tensor:
    """An example at the model's fixed sizes: repeated or cut, axis by axis."""
    tensor = torch.as_tensor(example)
    for axis, size in enumerate(shape or ()):
        if isinstance(size, int) and size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return tensor


def _distance(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """That of the floating outputs; without any (labels, say) the share of entries that differ."""
    pairs = [(a.cpu(), b.cpu()) for a, b in zip(found, expected)]
    if any(b.is_floating_point() for _, b in pairs):
        return distance([a for a, _ in pairs], [b for _, b in pairs])
    same = [a == b if a.shape == b.shape else torch.zeros(b.shape, dtype=torch.bool) for a, b in pairs]
    return 1.0 - sum(int(it.sum()) for it in same) / max(1, sum(it.numel() for it in same))


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _tensor(value: Any, device: torch.device) -> torch.Tensor:
    """An ORT value as a tensor; without DLPack in the installed build, by way of the CPU."""
    inner = getattr(value, "_ortvalue", value)
    if hasattr(inner, "to_dlpack"):
        return torch.from_dlpack(inner.to_dlpack())
    return torch.from_numpy(value.numpy()).to(device)
