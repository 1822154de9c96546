"""How fast two models are, measured fairly: in turns on the same inputs, so that a busy machine slows both."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import ConsoleRenderable
from rich.text import Text

from graphprune.backends.onnxruntime import open_session
from graphprune.errors import InvalidInput
from graphprune.files import PathLike
from graphprune.measure import interleaved, threads
from graphprune.report import Latency, tables
from graphprune.widths import MULTIPLES, best_multiple, poor, worth_it


@dataclass(frozen=True)
class Comparison:
    """Times of two models, and how many times faster the second is."""

    names: tuple[str, str]
    before: Latency
    after: Latency
    speedup: float  # median over rounds of (time of the first / time of the second)
    low: float  # quartiles of the same
    high: float
    rounds: int

    def __rich__(self) -> ConsoleRenderable:
        rows = [
            (tables.tail(name, 36), f"{it.median_ms:.3g} ms", f"{it.low_ms:.3g} to {it.high_ms:.3g}")
            for name, it in zip(self.names, (self.before, self.after))
        ]
        line = f"{self.speedup:.2f}x faster (half of {self.rounds} rounds: {self.low:.2f} to {self.high:.2f}); "
        where = f"{self.before.backend} on {self.before.device}"
        return tables.stack([tables.grid(("model", "median", "half of the runs"), rows), Text(line + where)])


@dataclass(frozen=True)
class Crossover:
    """Where on a device a sparse kernel begins to beat the dense product."""

    size: str  # rows x columns
    device: str
    rows: tuple[dict[str, Any], ...]

    def __rich__(self) -> ConsoleRenderable:
        cells = [
            (
                row["kernel"], f"{row['kept']:.0%}", str(row["tokens"]), _number(row["dense_us"]), _number(row["sparse_us"]),
                f"{row['dense_us'] / row['sparse_us']:.2f}x" if row["sparse_us"] else "-", "sparse" if row["sparse"] else "dense",
            )
            for row in self.rows
        ]  # fmt: skip
        table = tables.grid(("kernel", "kept", "tokens", "dense us", "sparse us", "speed-up", "gate"), cells)
        how = f"weight {self.size}, bfloat16, on {self.device}; weights not in the cache, launched by CUDA graphs"
        return tables.stack([table, Text(how)])


def _number(time: float | None) -> str:
    return "-" if time is None else f"{time:.1f}"


def crossover(size: str, tokens: Sequence[int], gate: Any = None) -> Crossover:
    """Measure sparse kernels against dense for weights of "ROWSxCOLUMNS", by format, density and number of tokens.

    Raises:
        InvalidInput: the size cannot be read, or there is no CUDA device.
    """
    from graphprune.backends.crossover import crossover as measured
    from graphprune.backends.gate import Gate

    rows, cross, columns = size.partition("x")
    if not (cross and rows.isdigit() and columns.isdigit()):
        raise InvalidInput(f"the size of a weight is rows x columns, as in 14336x4096, found {size!r}")
    gate = gate or Gate()
    found = [
        {
            "kernel": layer.name, "kept": layer.density, "tokens": it.tokens, "sparse": it.sparse,
            "dense_us": it.dense_us, "sparse_us": it.sparse_us, "modelled": it.modelled, "reason": it.reason,
        }
        for layer in measured(int(rows), int(columns), tokens=tokens, gate=gate)
        for it in layer.decisions
    ]  # fmt: skip
    return Crossover(size, gate.name, tuple(found))


@dataclass(frozen=True)
class WidthTable:
    """What multiples of kept widths cost on a device, and which round_to="auto" takes from now on."""

    device: str
    rows: tuple[dict[str, Any], ...]

    def __rich__(self) -> ConsoleRenderable:
        cells = [
            (
                f"{it['backend']} {it['dtype']}", f"{it['layers']} {it['size']}", *(f"{100 * (cost - 1):.0f}%" for cost in it["costs"]),
                str(it["multiple"]),
            )
            for it in self.rows
        ]  # fmt: skip
        table = tables.grid(("by", "layers", *map(str, MULTIPLES), "auto"), cells)
        how = (
            f"how much slower than the fastest are widths rounded up to multiples of 1 to 64, on {self.device};\n"
            "auto: of those that cost no more than the smallest within 3 %, the coarsest"
        )
        slow = [
            f"{it['backend']} {it['dtype']}, {it['layers']} {it['size']}: {', '.join(map(str, it['not']))}" for it in self.rows if it["not"]
        ]  # fmt: skip
        if slow:
            how += "\nauto keeps none of these eighths of a size, which are hardly faster than wider ones, or slower:\n" + "\n".join(slow)
        return tables.stack([table, Text(how)])


def widths(device: str) -> WidthTable:
    """Measure which widths a device runs well, and keep that for round_to="auto": torch and ONNX Runtime in the types usual there.

    Raises:
        InvalidInput: there is no such device.
    """
    from graphprune.backends.widths import MEASURED, NAMES, available, device_name, measured

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InvalidInput(f"widths are measured on cpu or cuda, where torch finds one, found device {device!r}")
    rows = []
    for backend, dtype in ((name, dtype) for (name, place), types in MEASURED.items() if place == device for dtype in types):
        if not available(backend, device):
            continue
        table = measured(backend, dtype, device, again=True)
        by_layers = (("linear", table.linear, table.linear_eighths), ("conv", table.convolution, table.convolution_eighths))
        for layers, size, costs, eighths in ((it, *row, times) for it, found, parts in by_layers for row, (_, times) in zip(found, parts)):
            rounded = {"costs": [round(it, 4) for it in costs], "multiple": best_multiple(costs)}
            paying = {"eighths": [round(it, 4) for it in eighths], "not": poor(size, worth_it(eighths))}
            rows.append({"backend": backend, "dtype": NAMES[dtype], "layers": layers, "size": size, **rounded, **paying})
    return WidthTable(device_name(device), tuple(rows))


def compare(calls: Sequence[Callable[[], Any]], names: tuple[str, str], device: str, backend: str, seconds: float = 5.0) -> Comparison:
    """Run two models in turns for about `seconds`, at least 5 rounds.

    Raises:
        InvalidInput: if `seconds` is not positive.
    """
    if seconds <= 0:
        raise InvalidInput(f"the time to measure must be positive, found {seconds} s")
    found = interleaved(dict(zip(("before", "after"), calls)), warmup=1, repeats=5, seconds=seconds)
    before, after = (np.array(found[name].times) for name in ("before", "after"))
    middle, low, high = _quartiles(before / after)
    times = [Latency(*_quartiles(ms), device, backend) for ms in (before, after)]
    return Comparison(names, times[0], times[1], middle, low, high, len(before))


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    middle, low, high = (float(q) for q in np.quantile(values, (0.5, 0.25, 0.75)))
    return middle, low, high


def onnx_call(path: PathLike, feeds: Mapping[str, np.ndarray], threads: int = 1) -> Callable[[], Any]:
    """A call of an ONNX file by ONNX Runtime on the CPU.

    Raises:
        InvalidInput: if ONNX Runtime refuses the file or the inputs.
        MissingExtra: if ONNX Runtime is not installed.
    """
    session = open_session(path, threads=threads)
    wanted = {it.name for it in session.get_inputs()}
    if set(feeds) != wanted:
        raise InvalidInput(f"{path} takes inputs {', '.join(sorted(wanted))}; found {', '.join(sorted(feeds)) or 'none'}")

    def call() -> Any:
        try:
            return session.run(None, dict(feeds))
        except Exception as error:  # its exceptions share no base of their own
            raise InvalidInput(f"ONNX Runtime cannot run {Path(path).name} on these inputs: {str(error).strip().splitlines()[0]}") from None

    return call


def module_call(module: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Callable[[], Any]:
    """A call of a torch module without gradients; on an accelerator it ends when the device is done."""
    tensors = [it for it in (*args, *(kwargs or {}).values()) if isinstance(it, torch.Tensor)]
    wait = torch.cuda.synchronize if any(it.is_cuda for it in tensors) else lambda: None

    def call() -> None:
        with torch.no_grad():
            module(*args, **(kwargs or {}))
        wait()

    return call


def compare_models(a: Any, b: Any, names: tuple[str, str], count: int = 1, seconds: float = 5.0) -> Comparison:
    """Time two ONNX files by ONNX Runtime, or two modules by PyTorch, on `count` threads and the example inputs of the first."""
    from graphprune.api import capture

    program = capture(a)
    if isinstance(a, os.PathLike):
        feeds = {value.name: np.asarray(x) for value, x in zip(program.inputs, program.example_inputs)}
        calls, backend = [onnx_call(path, feeds, count) for path in (a, b)], "onnxruntime"
        return compare(calls, names, f"cpu, {_threads(count)}", backend, seconds)
    source, device = program.source, str(next(a.parameters()).device)
    where = f"cpu, {_threads(count)}" if device == "cpu" else device
    with threads(count):
        return compare([module_call(m, source.args, source.kwargs) for m in (a, b)], names, where, "torch", seconds)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"
