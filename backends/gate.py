"""The gate: a sparse kernel runs only where it was measured to beat the dense product, on this device, for this many tokens.

Three steps, each of which can end it with "dense" and the reason:
    accepts     the format takes the weight (2:4 is not for any zeros), and the kernel takes that many tokens
    roofline    the bytes and operations that are left promise at least the margin; no time is spent on what cannot win
    measurement every tile of the kernel against the dense product, in CUDA graphs with cold caches; kept in a table on disk

Decode (few tokens, weights are traffic) and prefill (many, arithmetic) are two questions with two answers.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graphprune.backends.kernels.base import TOLERANCE, Kernel, Packed
from graphprune.backends.timing import copies, dense_calls, time_calls
from graphprune.cache import Cache

MARGIN = 1.10  # a sparse path must beat the dense one by this factor
DECODE_TOKENS, PREFILL_TOKENS = 1, 2048
log = logging.getLogger("graphprune")


@dataclass(frozen=True)
class Roof:
    """What a device can do at best: bytes per second, 16-bit matrix operations per second, seconds to start a kernel inside a graph.

    Activations of so many bytes as the `cache` holds may be there from the layer before, and need not cross memory.
    """

    bandwidth: float
    operations: float
    start: float = 2e-6
    cache: float = 0.0

    def seconds(self, bytes_moved: float, operations: float) -> float:
        return max(bytes_moved / self.bandwidth, operations / self.operations) + self.start


ROOFS: Mapping[str, Roof] = {  # by a part of the device's name; vendors' numbers, reached to about nine tenths
    "B200": Roof(8.0e12, 2.25e15, cache=126e6),
    "H200": Roof(4.8e12, 9.9e14, cache=50e6),
    "H100": Roof(3.35e12, 9.9e14, cache=50e6),
    "A100": Roof(2.0e12, 3.1e14, cache=40e6),
    "L40": Roof(0.86e12, 1.8e14, cache=96e6),
    "4090": Roof(1.0e12, 1.65e14, cache=72e6),
}
ANY_ROOF = Roof(1.0e12, 2.0e14)  # an unknown device: its ratio decides nothing near the margin, so the measurement does


@dataclass(frozen=True)
class Measurement:
    """Median microseconds of the dense product and of the best tile of the kernel; `config` is empty where no tile ran."""

    dense_us: float
    sparse_us: float
    config: str

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us


@dataclass(frozen=True)
class Decision:
    """What the gate says about one weight and number of tokens: `path` is "dense" or the name of a kernel."""

    path: str
    tokens: int
    reason: str
    config: str = ""
    dense_us: float | None = None  # measured; None where it was not
    sparse_us: float | None = None
    modelled: float | None = None  # speed-up that the roofline allows

    @property
    def sparse(self) -> bool:
        return self.path != "dense"


class Table(Cache[Measurement]):
    """Measurements of one device by these versions of the libraries; see `Cache`."""

    def __init__(self, root: Path | None = None, device: str = "cpu") -> None:
        triton = sys.modules.get("triton")
        versions = f"torch{torch.__version__}-triton{getattr(triton, '__version__', 'none')}-cuda{torch.version.cuda or 'none'}"
        super().__init__(Measurement, "gate", f"{device}-{versions}", root)


Choice: TypeAlias = Kernel | tuple[Kernel, Mapping[str, Any]]  # the latter with options of its `pack`
Measure = Callable[[Kernel, Packed, Tensor, int], Measurement]


class Gate:
    """Decides between dense and sparse paths on one device, and remembers.

    `measure` and `roof` are for tests; by default the device is measured and its roof looked up.
    """

    def __init__(
        self, device: torch.device | str | None = None, table: Table | None = None, margin: float = MARGIN, measure: Measure | None = None,
        roof: Roof | None = None,
    ) -> None:  # fmt: skip
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.device.type == "cuda" and torch.cuda.is_available()
        self.name = torch.cuda.get_device_name(self.device) if on_gpu else self.device.type
        self.can_measure = measure is not None or on_gpu
        self.table = table or Table(device=self.name)
        self.margin = margin
        self.measure = measure or measure_kernel
        self.roof = roof or next((r for part, r in ROOFS.items() if part in self.name), ANY_ROOF)

    def decide(self, kernels: Iterable[Choice], weight: Tensor, tokens: int, **options: Any) -> Decision:
        """The fastest path for y = x W^T with `tokens` rows of x; `options` go to every `pack`, beside a kernel's own.

        A measurement is shared by all weights of the same shape, type, density (to a hundredth) and kernel.
        """
        pairs = [choice if isinstance(choice, tuple) else (choice, {}) for choice in kernels]
        decisions = [self._ask(kernel, weight, tokens, {**options, **own}) for kernel, own in pairs]
        sparse = [d for d in decisions if d.sparse]
        if sparse:
            return min(sparse, key=lambda d: d.sparse_us or 0.0)
        if len(decisions) == 1:
            return decisions[0]
        measured = [d.dense_us for d in decisions if d.dense_us is not None]
        why = "; ".join(d.reason for d in decisions) or "no kernel is given"
        return Decision("dense", tokens, why, dense_us=min(measured, default=None))

    def decide_both(
        self, kernels: Iterable[Choice], weight: Tensor, decode: int = DECODE_TOKENS, prefill: int = PREFILL_TOKENS, **options: Any
    ) -> tuple[Decision, Decision]:
        """The paths of a layer that generates: (for `decode` tokens, for `prefill` tokens)."""
        kernels = tuple(kernels)
        return self.decide(kernels, weight, decode, **options), self.decide(kernels, weight, prefill, **options)

    def _ask(self, kernel: Kernel, weight: Tensor, tokens: int, options: Mapping[str, Any]) -> Decision:
        def dense(reason: str, **numbers: Any) -> Decision:
            return Decision("dense", tokens, f"{kernel.name}: {reason}", **numbers)

        if not self.can_measure:
            return dense("no CUDA device: nothing to gain")
        if (reason := kernel.accepts(weight)) is not None:
            return dense(reason)
        if kernel.most_tokens is not None and tokens > kernel.most_tokens:
            return dense(f"made for at most {kernel.most_tokens} tokens, not {tokens}")
        density = float((weight != 0).float().mean()) if weight.numel() else 1.0
        named = " ".join(f"{name}={value}" for name, value in sorted(options.items()))
        key = f"{kernel.name}@{_source(kernel)} {tuple(weight.shape)} {weight.dtype} density={density:.2f} tokens={tokens} {named}".strip()
        packed = None
        if (found := self.table.get(key)) is None:
            try:
                packed = kernel.pack(weight, **options)
            except RuntimeError as problem:  # a library that does not know the device, or no memory
                return dense(f"the weight cannot be packed: {_line(problem)}")
            allowed = self.model(packed, tokens, weight.element_size())
            if allowed < self.margin:
                return dense(f"the roofline allows {allowed:.2f}x, {self.margin:.2f}x is asked for", modelled=allowed)
            try:
                found = self.measure(kernel, packed, weight, tokens)
            except RuntimeError as problem:
                return dense(f"it cannot be measured: {_line(problem)}", modelled=allowed)
            self.table.put(key, found)
        numbers = {"dense_us": found.dense_us, "sparse_us": found.sparse_us}
        if not found.config:
            return dense("no tile of it runs on this device", dense_us=found.dense_us)
        if found.speedup < self.margin:
            return dense(f"measured {found.speedup:.2f}x of dense, {self.margin:.2f}x is asked for", **numbers)
        return Decision(kernel.name, tokens, f"measured {found.speedup:.2f}x of dense", found.config, **numbers)

    def model(self, packed: Packed, tokens: int, element_size: int) -> float:
        """How many times faster than dense the roofline lets a packed weight be."""
        rows, columns = packed.shape
        operations = 2.0 * rows * columns * tokens

        def moved(width: int) -> float:  # of x and y, either way
            return max(0.0, tokens * width * element_size - self.roof.cache)

        dense = self.roof.seconds(rows * columns * element_size + moved(packed.width), operations)
        return dense / self.roof.seconds(packed.bytes + moved(packed.width - packed.unread), operations * packed.work)

    def crossover(
        self, kernel: Kernel, make: Callable[[float], Tensor], densities: Iterable[float], tokens: Iterable[int]
    ) -> list[Decision]:
        """Decisions over densities and tokens for weights that `make(density)` draws: where on this device sparse begins to pay."""
        tokens = tuple(tokens)
        decisions = []
        for density in densities:
            weight = make(density)
            decisions += [self._ask(kernel, weight, count, {}) for count in tokens]
        return decisions


def measure_kernel(kernel: Kernel, packed: Packed, weight: Tensor, tokens: int) -> Measurement:
    """Times dense and every tile of `kernel`; a tile whose result is off, or that does not fit the device, is left out."""
    x = packed.example(tokens, weight)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    dense_us = time_calls(dense_calls(weight, x, packed.dense)).median
    few = x[: 64 if x.dim() == 2 else 1]  # rows, or an image
    expected = packed.dense(few.double(), weight.double())
    clones = [packed.clone() for _ in range(copies(packed.bytes, weight.device))]

    def calls(config: str) -> list[Callable[[], Tensor]]:
        return [functools.partial(kernel.linear, x, clone, config=config) for clone in clones]

    best = (float("inf"), "")
    for config in kernel.configs(packed, tokens):
        try:
            error = (kernel.linear(x, packed, config=config)[: len(few)].double() - expected).norm() / expected.norm()
            if not error < 2 * TOLERANCE[x.dtype]:
                log.warning("gate: %s with '%s' is off by %.1e and is left out", kernel.name, config, float(error))
                continue
            best = min(best, (time_calls(calls(config), repeats=9).median, config))
        except RuntimeError as problem:  # out of shared memory, registers or memory; Triton's errors derive from it
            log.debug("gate: %s with '%s' does not run: %s", kernel.name, config, problem)
    if not best[1]:
        return Measurement(dense_us, float("inf"), "")
    return Measurement(dense_us, time_calls(calls(best[1])).median, best[1])


def _line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _source(kernel: Kernel) -> str:
    """A short hash of the kernel's files: a changed kernel is measured again."""
    if (file := inspect.getsourcefile(kernel.pack)) is None:
        return "unknown"
    files = sorted(Path(file).parent.glob(f"{Path(file).stem}.*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
