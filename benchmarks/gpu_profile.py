"""What one launch is made of on a GPU: its kernels, how many of them are as short as a kernel can be, and what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

KINDS = {  # of kernels, by what their names hold
    "products": ("gemm", "conv", "cutlass", "xmma", "nvjet", "cudnn", "fmha", "flash", "attention", "wgrad", "fprop", "implicit"),
    "layout": ("nchwtonhwc", "nhwctonchw", "transpose", "permute"),
}


def floor_of_a_kernel() -> float:
    """Milliseconds from one tiny kernel of a CUDA graph to the next that waits for it."""
    from graphprune.backends.timing import time_calls

    x = torch.zeros(32, device="cuda")
    return time_calls([lambda: x.add_(1)], rounds=500).median / 1e3


@dataclass(frozen=True)
class Profile:
    """The kernels of one launch; milliseconds."""

    kernels: int
    short: int  # those that take less than the floor
    busy: float  # sum of what all take by themselves
    by_kind: Mapping[str, float]
    longest: tuple[tuple[str, int, float], ...]  # name, how many, sum


def profile(launch: Callable[[], Any], floor: float, repeats: int = 5) -> Profile:
    """What a launch does on the GPU, whoever launches it."""
    launch()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found, torch.no_grad():
        for _ in range(repeats):
            launch()
        torch.cuda.synchronize()
    events = [e for e in found.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return summary([(e.name, e.time_range.elapsed_us() / 1e3) for e in events], floor, repeats)


def summary(events: Sequence[tuple[str, float]], floor: float, repeats: int) -> Profile:
    by_kind, names = dict.fromkeys((*KINDS, "other"), 0.0), Counter[str]()
    times: dict[str, float] = {}
    for name, ms in events:
        by_kind[kind_of(name)] += ms / repeats
        names[name] += 1
        times[name] = times.get(name, 0.0) + ms / repeats
    longest = tuple((name, round(names[name] / repeats), times[name]) for name in sorted(times, key=lambda it: -times[it])[:6])
    short = sum(ms < floor for _, ms in events)
    return Profile(round(len(events) / repeats), round(short / repeats), sum(times.values()), by_kind, longest)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    layout = any(word in name for word in KINDS["layout"])  # cuDNN names its transposes after itself
    if layout or name.startswith("triton"):  # inductor's are named after all that they fused
        return "layout" if layout and not name.startswith("triton") else "other"
    return "products" if any(word in name for word in KINDS["products"]) else "other"
