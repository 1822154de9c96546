"""How long calls take, measured fairly: in turns, so that a busy machine slows all of them, and by the median."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphprune.errors import InvalidInput


@dataclass(frozen=True)
class Stats:
    """Times of one call."""

    median_ms: float
    p10: float  # ms
    p90: float  # ms
    n: int
    times: tuple[float, ...] = ()  # ms, in the order of the rounds: pairs of calls can be compared round by round

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.p10:.3g} to {self.p90:.3g}, {self.n} runs)"


def interleaved(
    calls: Mapping[str, Callable[[], Any]], warmup: int = 3, repeats: int = 20, device: str | torch.device = "cpu", seconds: float = 0.0
) -> dict[str, Stats]:
    """Time some calls in turns: every round runs each once, and each comes first equally often.

    Args:
        warmup: rounds that do not count (caches, allocators, autotuning).
        repeats: rounds that count.
        device: of the work; on "cuda" the time is that between two events on the stream.
        seconds: go on with rounds until this much time has passed.

    Raises:
        InvalidInput: nothing to call, or no round.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise InvalidInput(f"at least one call and one round are needed, found {len(calls)} calls, {repeats} rounds, {warmup} to warm up")
    clock = _cuda_ms if torch.device(device).type == "cuda" else _wall_ms
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            clock(calls[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    done = 0
    while done < repeats or time.perf_counter() < end:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(calls[name]))
        done += 1
    return {name: _stats(times[name]) for name in names}


def _stats(times: list[float]) -> Stats:
    low, middle, high = (float(q) for q in np.quantile(times, (0.1, 0.5, 0.9)))
    return Stats(middle, low, high, len(times), tuple(times))


def _wall_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch keeps to this many CPU threads for the duration."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
