"""Runs a result by PyTorch: its module as it is, or compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphprune.measure import Stats, interleaved, threads


class TorchModel:
    """Callable like the model, with gradients where they are enabled.

    Args:
        result: a result with a `module`, or a module.
        compiler: "eager", or a backend of torch.compile such as "inductor".
        mode: of `torch.compile`, such as "max-autotune".
    """

    def __init__(self, result: Any, *, compiler: str = "eager", mode: str | None = None) -> None:
        self.module: nn.Module = result if isinstance(result, nn.Module) else result.module
        self._call: Any = self.module if compiler == "eager" else torch.compile(self.module, backend=compiler, mode=mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def measure(self, *args: Any, repeats: int = 20, cpu_threads: int = 1, **kwargs: Any) -> Stats:
        """Latency without gradients, on one CPU thread by default."""
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        device = next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu"))
        with threads(cpu_threads), torch.no_grad():
            return interleaved({"call": lambda: self(*args, **kwargs)}, repeats=repeats, device=device)["call"]
