"""Candidates of a plan, built as the result will be, and measured: what budgets of latency and accuracy ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from graphprune.errors import InvalidInput
from graphprune.execute.module import ProgramModule
from graphprune.measure import interleaved
from graphprune.program import Program
from graphprune.repair import DATA_FREE, repaired
from graphprune.surgery import Cut, apply_cut

SECONDS = 0.8  # for one candidate


def paired(calls: Sequence[Callable[[], Any]], device: str, where: str, backend: str) -> tuple[float, float]:
    """(dense, candidate) in ms, called in turns: the candidate's median, and as the dense network's time what the median of the ratios of
    neighbouring calls makes of it. Other work on the machine slows both of a pair.
    """
    found = interleaved(dict(zip(("dense", "candidate"), calls)), warmup=2, repeats=7, device=device, seconds=SECONDS)
    dense, candidate = (np.array(found[name].times) for name in ("dense", "candidate"))
    middle = float(np.median(candidate))
    return middle / float(np.median(candidate / dense)), middle


@dataclass
class Trials:
    """The `measure` of planning.

    Args:
        latency: (program, pruned program, its module or None for ONNX) -> ms of the dense network and of the candidate, measured in turns;
            None where nothing runs them.
        metric: of a module in evaluation mode, higher is better.
        repair: names of repairs that the result will get; a candidate's accuracy is that after them.
    """

    program: Program
    latency: Callable[[Program, Program, nn.Module | None], tuple[float, float] | None]
    metric: Callable[[nn.Module], Any] | None = None
    repair: Sequence[str] = ()
    calibration_data: Any = None

    def __call__(self, name: str, removed: Mapping[str, Sequence[int]]) -> tuple[float, float]:
        """The candidate's and the dense network's.

        Raises:
            InvalidInput: it cannot be measured.
        """
        if name == "latency_ms":
            found = self.latency(self.program, *self._built(removed, ()))
            if found is None:
                raise InvalidInput("budget latency_ms: the network cannot be run here to be timed; give a budget of params or macs")
            return found[1], found[0]
        pruned, module = self._built(removed, self.repair)
        return self.quality(module if module is not None else ProgramModule(pruned)), self.dense

    @cached_property
    def dense(self) -> float:
        """The metric of the network as it is."""
        source = self.program.source
        return self.quality(source.module if hasattr(source, "module") else ProgramModule(self.program))

    def quality(self, module: nn.Module) -> float:
        """The metric of a module, its mode left as it was.

        Raises:
            InvalidInput: there is no metric, or it gives no number.
        """
        from graphprune.capture.torch_export import evaluating

        if self.metric is None:
            raise InvalidInput("budget accuracy_drop needs metric=: a callable that takes a module and returns a number, higher is better")
        with evaluating(module):
            value = self.metric(module)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number != number:
            raise InvalidInput(f"metric(module) must return a number, higher is better, found {value!r}")
        return number

    def _built(self, removed: Mapping[str, Sequence[int]], repair: Sequence[str]) -> tuple[Program, nn.Module | None]:
        from graphprune.capture.torch_export import TorchSource

        cut = Cut(self.program.analysis, removed)
        pruned = apply_cut(self.program, cut)
        names = [name for name in repair if self.calibration_data is not None or name in DATA_FREE]
        pruned = repaired(self.program, cut, pruned, names, self.calibration_data)
        if not isinstance(self.program.source, TorchSource):
            return pruned, None
        from graphprune.surgery.write_back import write_back

        return pruned, write_back(self.program, cut, pruned).module
