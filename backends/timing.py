"""How long a call takes on a GPU, as it would in a network: launched by a CUDA graph, with its weights not in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLD_BYTES = 3  # how many times the L2 cache the rotated copies of an operand fill


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over graph replays."""

    median: float
    low: float
    high: float


def copies(bytes_each: int, device: torch.device, at_most: int = 64) -> int:
    """How many copies of an operand to rotate so that none is found in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(at_most, -(-COLD_BYTES * cache // max(1, bytes_each))))


def capture(calls: Sequence[Callable[[], Any]], rounds: int = 1) -> torch.cuda.CUDAGraph:
    """One CUDA graph that makes all calls `rounds` times; each is called once outside it first, so that it is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, calls: int, repeats: int = 30) -> Timing:
    """Times replays of a graph that holds `calls` calls."""
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1000 / calls for start, end in events)
    quarter = len(times) // 4
    return Timing(statistics.median(times), times[quarter], times[-1 - quarter])


def time_calls(calls: Sequence[Callable[[], Any]], repeats: int = 30, rounds: int = 1) -> Timing:
    """Time of one of `calls`, which do the same work on different memory."""
    return time_graph(capture(calls, rounds), len(calls) * rounds, repeats)


def dense_calls(
    weight: Tensor, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.linear
) -> list[Callable[[], Tensor]]:
    """y = x W^T by the vendor's library, on rotated copies of `weight`."""
    weights = [weight.clone() for _ in range(copies(weight.numel() * weight.element_size(), weight.device))]
    return [lambda w=w: product(x, w) for w in weights]  # type: ignore[misc, call-arg]
