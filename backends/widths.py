"""How a device runs widths that are no multiples of 8, 16, ...: measured once, kept on disk, and read by plans with round_to="auto".

Measured are layers around the hidden width that a plan would cut, ReLU between them: two linear ones for few rows and for many, two 1 x 1
convolutions where the hidden layer is the wider one, as the stream of a residual network is, and with a 3 x 3 one between them where it is
not; and a 7 x 7 one on images. So a width is judged as what one layer gives and as what the next one takes. What the times say is in
`graphprune.widths`.

A plan measures by itself only for weights on a GPU, once for a device and library, in a few seconds, and says so. For a CPU it takes what
`graphprune bench --widths` measured there, else the rule. `GRAPHPRUNE_WIDTHS=rule` keeps to the rule everywhere.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.backends.onnxruntime import OnnxRuntimeModel, check_device, open_session
from graphprune.backends.timing import time_calls
from graphprune.cache import Cache
from graphprune.errors import GraphPruneError, MissingExtra
from graphprune.measure import interleaved, threads
from graphprune.program import Program
from graphprune.widths import BLOCK, RULE, Costs, Sample, Widths, relative_costs, relative_eighths, widths_of_sample

log = logging.getLogger("graphprune")

VERSION = 3  # of what is measured
SWITCH = "GRAPHPRUNE_WIDTHS"
SECONDS = {"cuda": 5.0, "cpu": 4.0}  # at most, for one backend and type; a network that was begun is finished
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
MEASURED: Mapping[tuple[str, str], tuple[torch.dtype, ...]] = {  # (backend, device) -> types that are measured
    ("torch", "cuda"): tuple(NAMES),
    ("torch", "cpu"): (torch.float32,),
    ("onnxruntime", "cuda"): (torch.float32, torch.float16),
    ("onnxruntime", "cpu"): (torch.float32,),
}
IMAGES = 3  # the width around the hidden one that stands for a 7 x 7 convolution on images
# (width around the hidden one, rows or pixels of a side, hidden width, units wanted): awkward widths, as ratios leave them
LINEAR = {
    "cpu": ((256, 64, 512, 359), (256, 1, 1024, 717), (256, 64, 256, 179), (256, 1, 512, 307)),
    "cuda": (
        (1024, 2048, 2048, 1435), (1024, 16, 3072, 2099), (1024, 2048, 1024, 717), (2048, 4096, 8192, 5735), (1024, 2048, 512, 359),
        (1024, 16, 2048, 1229), (1024, 8192, 3072, 2151),
    ),
}  # fmt: skip
CONVOLUTION = {
    "cpu": ((64, 28, 128, 90), (128, 14, 256, 179), (64, 28, 64, 45), (128, 14, 256, 205)),
    "cuda": (
        (256, 56, 64, 45), (512, 28, 128, 90), (1024, 14, 256, 179), (IMAGES, 112, 64, 45), (2048, 7, 512, 359), (64, 56, 256, 154),
        (256, 14, 1024, 717), (512, 7, 2048, 1435), (128, 28, 512, 308), (64, 56, 64, 45), (128, 28, 128, 90),
    ),
}  # fmt: skip
BATCH = {"cpu": 1, "cuda": 32}  # of images
REPEATED = {"cpu": 1, "cuda": 4}  # how often ONNX Runtime runs them in one call, so that the call itself is a small part

Call = Callable[[], Any]
Times = Callable[[Mapping[int, Call]], dict[int, float]]


# ---- what is measured


def layers(convolution: bool, outer: int, hidden: int, width: int) -> tuple[tuple[int, int, int], ...]:
    """(outputs, inputs, side of the kernel, 0 if linear) of layers around a hidden one, once it is cut to `width`."""
    if not convolution:
        return (width, outer, 0), (outer, width, 0)
    if outer == IMAGES:
        return ((width, outer, 7),)
    inner = ((width, width, 3),) if hidden <= outer else ()
    return (width, outer, 1), *inner, (outer, width, 1)


def torch_call(shapes: Sequence[tuple[int, int, int]], size: int, device: str, dtype: torch.dtype) -> Call:
    """The layers by torch; half precision on a GPU in the layout that convolutions run fastest in."""
    convolution = shapes[0][2] > 0
    last = convolution and device == "cuda" and dtype is not torch.float32
    layout = torch.channels_last if last else torch.contiguous_format

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device, dtype=dtype) / 16).contiguous(memory_format=layout)

    def call() -> Tensor:
        y = x
        for i, (weight, (_, _, kernel)) in enumerate(zip(weights, shapes)):
            y = F.relu(y) if i else y
            y = F.conv2d(y, weight, padding=kernel // 2) if convolution else F.linear(y, weight)
        return y

    x = tensor(BATCH[device], shapes[0][1], size, size) if convolution else tensor(size, shapes[0][1])
    weights = [tensor(out, given, kernel, kernel) if convolution else tensor(out, given) for out, given, kernel in shapes]
    return call


def onnx_call(shapes: Sequence[tuple[int, int, int]], size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    """The same as an ONNX file, by ONNX Runtime: on one thread of the CPU, or as a CUDA graph of several such networks in a row."""
    half = dtype is torch.float16
    convolution, kind = shapes[0][2] > 0, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT

    def array(*shape: int) -> np.ndarray:  # a few random numbers again and again, for millions take longer than the rest
        return np.resize((np.random.default_rng(0).standard_normal(10007) / 16).astype(kind.numpy()), shape)

    def weight(name: str, out: int, given: int, kernel: int) -> ir.Value:
        made = array(out, given, kernel, kernel) if convolution else array(given, out)
        return ir.Value(name=name, const_value=ir.tensor(made, name=name))

    weights = [weight(f"w{i}", *shape) for i, shape in enumerate(shapes)]
    shape: tuple[int, ...] = (BATCH[device], shapes[0][1], size, size) if convolution else (size, shapes[0][1])
    given = out = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(shape))
    nodes: list[ir.Node] = []
    for _ in range(REPEATED[device] if shapes[-1][0] == shapes[0][1] else 1):
        for i, (value, (_, _, kernel)) in enumerate(zip(weights, shapes)):
            if i:
                nodes.append(ir.node("Relu", [out]))
                out = nodes[-1].outputs[0]
            nodes.append(ir.node("Conv" if convolution else "MatMul", [out, value], {"pads": [kernel // 2] * 4} if convolution else {}))
            out = nodes[-1].outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(kind), ir.Shape((shape[0], shapes[-1][0], *shape[2:]))
    model = ir.Model(ir.Graph([given], [out], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="widths"), ir_version=8)
    if device == "cpu":
        session, x = open_session(model), array(*shape)
        return lambda: session.run(None, {"x": x})
    options: dict[str, Any] = {}
    if convolution and half:  # as `OnnxRuntimeModel` runs them, without biases: cuDNN compiles their kernels, a third of a second each
        options["provider_options"] = {"prefer_nhwc": "1"}
    runner = OnnxRuntimeModel(model, device=_current(), cuda_graph=True, **options)
    captured = runner.capture(torch.from_numpy(array(*shape)))
    return lambda: runner.launch(captured)


def _current() -> str:
    return f"cuda:{torch.cuda.current_device()}"


def _cpu_times(calls: Mapping[int, Call]) -> dict[int, float]:
    """In turns, and by the fastest tenth: what other work on the machine slows is no property of a width."""
    with threads(1), torch.no_grad():
        found = interleaved({str(width): call for width, call in calls.items()}, warmup=2, repeats=9, seconds=0.25)
    return {width: found[str(width)].p10 for width in calls}


def _cuda_times(calls: Mapping[int, Call]) -> dict[int, float]:
    return {width: time_calls([call], repeats=9, rounds=4).low for width, call in calls.items()}


def _graph_times(calls: Mapping[int, Call]) -> dict[int, float]:
    """Of calls that launch a CUDA graph themselves, in turns. The GPU is kept busy meanwhile: launching costs every width the same."""
    times: dict[int, list[float]] = {width: [] for width in calls}
    for turn in range(17):
        for width, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(100_000)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[width].append(start.elapsed_time(end))
    return {width: sorted(found)[1] for width, found in times.items()}


def probe(backend: str, dtype: torch.dtype, device: str, times: Times | None = None, seconds: float | None = None) -> Costs:
    """Measure a device, "cpu" or "cuda": what each multiple costs, and which eighths of a size pay."""
    runtime = backend == "onnxruntime"
    clock = times or (_cpu_times if device == "cpu" else _graph_times if runtime else _cuda_times)
    make = partial(onnx_call if runtime else torch_call, device=device, dtype=dtype)
    with torch.no_grad():
        for convolution in (False, True):  # libraries load on their first call
            make(layers(convolution, 16, 16, 16), 16)()
    end = time.perf_counter() + (SECONDS[device] if seconds is None else seconds)
    samples: dict[bool, list[Sample]] = {False: [], True: []}
    for pair in zip_longest(LINEAR[device], CONVOLUTION[device]):
        for convolution, sample in zip((False, True), pair):
            if sample is not None:
                outer, size, hidden, wanted = sample
                calls = {width: make(layers(convolution, outer, hidden, width), size) for width in widths_of_sample(hidden, wanted)}
                samples[convolution].append(Sample(hidden, wanted, clock(calls)))
        if time.perf_counter() > end:
            break
    linear, convolutions = samples[False], samples[True]
    return Costs(relative_costs(linear), relative_costs(convolutions), relative_eighths(linear), relative_eighths(convolutions))


# ---- what is kept


def device_name(device: str) -> str:
    """Of the current GPU, or of the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else _processor()


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def table(backend: str, device: str, root: Path | None = None) -> Cache[Costs]:
    """Where measurements of a device by a backend are kept."""
    if backend == "onnxruntime":
        import onnxruntime

        versions = f"onnxruntime{onnxruntime.__version__}"
    else:
        library = torch.version.cuda or "none"
        versions = f"torch{torch.__version__}-cuda{library}-cudnn{torch.backends.cudnn.version() or 'none'}"
    return Cache(Costs, "widths", f"{device_name(device)}-{versions}", root)


def measured(
    backend: str, dtype: torch.dtype, device: str, again: bool = False, root: Path | None = None, times: Times | None = None
) -> Costs:
    """The costs of a device from the table; measured and kept if they are not in it, or `again`."""
    kept, key = table(backend, device, root), _key(backend, dtype)
    found = None if again else kept.get(key)
    if found is None:
        found = probe(backend, dtype, device, times)
        kept.put(key, found)
    return found


def _key(backend: str, dtype: torch.dtype) -> str:
    return f"{backend} {NAMES[dtype]} {VERSION}"


def widths_of(program: Program, backend: str = "torch", device: Any = None, measure: bool = True, root: Path | None = None) -> Widths:
    """What round_to="auto" means for a program.

    Args:
        backend: that is to run the result. A network that came as ONNX is run by ONNX Runtime.
        device: where the backend is to run it, if not where the weights are.
        measure: a GPU that was not measured yet may be; else only tables on disk count.
    """
    runtime = backend == "onnxruntime" or not hasattr(program.source, "module")
    rule = replace(RULE, narrow=BLOCK if runtime else 1)
    if os.environ.get(SWITCH) == "rule":
        return replace(rule, source=f"by rule ({SWITCH}=rule)")
    tensors = [v.tensor for v in program.weights.values() if v.tensor is not None and v.tensor.is_floating_point()]
    if not tensors:
        return rule
    main = max(tensors, key=lambda tensor: tensor.numel())
    where = torch.device(device or "cpu") if runtime else main.device
    place = where.type
    name = "onnxruntime" if runtime else "torch"
    if main.dtype not in MEASURED.get((name, place), ()):
        return replace(rule, source=f"by rule (nothing is measured for {name} on {place} in {str(main.dtype).removeprefix('torch.')})")
    # float32 weights on a GPU are often run in half precision, by autocast or later on: the plan has to suit both
    types = (main.dtype, torch.float16) if place == "cuda" and main.dtype is torch.float32 else (main.dtype,)
    if not available(name, place):
        return replace(rule, source=f"by rule ({name} does not run on {place} here)")
    with torch.cuda.device(where) if place == "cuda" else nullcontext():
        costs = [_costs(name, dtype, place, measure, root) for dtype in types]
        found = [it for it in costs if it is not None]
        if len(found) < len(costs):
            return replace(rule, source="by rule (graphprune bench --widths measures this device)")
        return Widths.measured(found, f"measured on {device_name(place)}, {name}, {' and '.join(NAMES[dtype] for dtype in types)}")


def available(backend: str, device: str) -> bool:
    """Whether what is installed runs there."""
    if device == "cuda" and not torch.cuda.is_available():
        return False
    if backend == "onnxruntime":
        try:
            check_device(device)
        except MissingExtra:
            return False
    return True


def _costs(backend: str, dtype: torch.dtype, device: str, measure: bool, root: Path | None) -> Costs | None:
    found = table(backend, device, root).get(_key(backend, dtype))
    if found is None and measure and device == "cuda":
        where = table(backend, device, root).folder
        log.warning("measuring once which widths suit %s in %s; kept in %s", device_name(device), NAMES[dtype], where)
        try:
            found = measured(backend, dtype, device, again=True, root=root)
        except (RuntimeError, GraphPruneError) as problem:  # memory is short, or the device is in use by a graph that is being captured
            log.warning("it cannot be measured, the rule is kept: %s", str(problem).strip().splitlines()[0])
    return found
