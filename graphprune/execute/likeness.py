"""Inputs like the example, and how far apart two answers to them are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphprune.program import Program


def random_inputs(program: Program, seed: int, scale: float = 1.0) -> list[Any]:
    """Inputs like the example: normal numbers for floating tensors, the example's own values (in another order) for integers.

    Args:
        scale: deviation of the normal numbers, in deviations of the example.
    """
    generator = torch.Generator().manual_seed(seed)
    out: list[Any] = []
    for x in program.example_inputs:
        if not isinstance(x, torch.Tensor) or x.numel() == 0:
            out.append(x)
        elif x.is_floating_point():
            deviation = scale * float(x.double().std(correction=0).clamp_min(0.1))
            out.append((torch.randn(x.shape, generator=generator, dtype=torch.float64) * deviation).to(x.device))
        elif x.dtype == torch.bool or x.dim() == 0:
            out.append(x)
        else:
            order = torch.randperm(x.numel(), generator=generator).to(x.device)
            out.append(x.reshape(-1)[order].reshape(x.shape) if int(x.max()) > 1 else x)
    return out


def floating(outputs: Sequence[Any]) -> list[torch.Tensor]:
    return [o.detach().double() for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point() and o.numel()]


def distance(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Largest difference relative to the largest entry of `b`, output by output; infinite where shapes or finiteness differ."""
    worst = 0.0
    pairs = list(zip(floating(a), floating(b)))
    for x, y in pairs:
        if x.shape != y.shape:
            return float("inf")
        finite = torch.isfinite(y)
        if not torch.equal(torch.isfinite(x), finite):
            return float("inf")
        if finite.any():
            scale = y[finite].abs().max().clamp_min(1e-30)
            worst = max(worst, float((x[finite] - y[finite]).abs().max() / scale))
    return worst if pairs else float("nan")
