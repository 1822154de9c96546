"""How bad a cut would be, without making it: the masked network on calibration data, by a loss or against the dense outputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.analysis import Analysis
from graphprune.calibration import Statistics
from graphprune.calibration.batches import Batch, batches
from graphprune.calibration.statistics import structured
from graphprune.calibration.taps import features_last
from graphprune.execute.interpreter import run
from graphprune.program import Value
from graphprune.surgery.cut import Cut
from graphprune.verify.masking import masked, masked_weights, only_weights

log = logging.getLogger("graphprune")

Tensors = Callable[[Mapping[str, Iterable[int]]], Mapping[Value, Tensor]]  # candidate -> weights in place of the program's own


TOGETHER = 8


class Masked:
    """An evaluator of candidates: mean over batches, in float32, lower is better.

    Args:
        statistics: of the program: its data, and its loss where `by` is "loss".
        by: "divergence", see there; or "loss", that of the user, of the model or of the next token, and divergence where there is none.
        limit: at most so many batches.
        tensors: what a candidate's kept weights become.
        together: candidates that one pass of `many` takes; none: 8 on a GPU, where a network this small waits for its launches, else 1.
    """

    def __init__(
        self,
        statistics: Statistics,
        by: str = "divergence",
        limit: int | None = None,
        tensors: Tensors | None = None,
        together: int | None = None,
    ) -> None:
        self.statistics, self.program, self.by, self.tensors = statistics, statistics.program, by, tensors
        self.analysis: Analysis = self.program.analysis
        self.batches: list[Batch] = []
        for batch in batches(self.program, statistics.data):
            if limit is not None and len(self.batches) >= limit:
                break
            self.batches.append(batch)
        self.dense = [run(self.program, inputs, dtype=torch.float32) for inputs, _ in self.batches]
        if by == "loss" and self._loss(self.dense[0], *self.batches[0]) is None:
            self.by = "divergence"
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in self.batches[0][0])
        self.together = together or (TOGETHER if on_gpu else 1)

    def __call__(self, removed: Mapping[str, Iterable[int]]) -> float:
        cut = Cut(self.analysis, removed)
        network = masked(self.program, cut, torch.float32, self.tensors(removed) if self.tensors is not None else None)
        found = []
        with torch.no_grad():
            for i, (inputs, item) in enumerate(self.batches):
                outputs = network(inputs)
                if self.by == "divergence":
                    found.append(divergence(self.dense[i], outputs))
                else:
                    found.append(float(self._loss(outputs, inputs, item)))
        return math.fsum(found) / len(found)

    def many(self, candidates: Sequence[Mapping[str, Iterable[int]]]) -> list[float]:
        """Of each. Candidates that differ in nothing but their weights share passes: every product then has one matrix for each of them."""
        cuts = [Cut(self.analysis, units) for units in candidates]
        alike = [i for i, cut in enumerate(cuts) if self.together > 1 and self.by == "divergence" and only_weights(cut)]
        found: dict[int, float] = {}
        for start in range(0, len(alike) - 1, max(self.together, 1)):  # a single one left over goes alone
            part = alike[start : start + self.together]
            try:
                losses = self._stacked([(cuts[i], candidates[i]) for i in part])
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as why:  # an op that cannot be batched
                log.debug("candidates go one by one: %s", why)
                self.together = 1
                break
            found.update((i, x) for i, x in zip(part, losses) if math.isfinite(x))
        return [found[i] if i in found else self(units) for i, units in enumerate(candidates)]

    def _stacked(self, candidates: Sequence[tuple[Cut, Mapping[str, Iterable[int]]]]) -> list[float]:
        of = self.tensors or (lambda units: {})
        weights = [masked_weights(self.program, cut, of(units)) for cut, units in candidates]
        ours = {v: [w[v].float() for w in weights] for v in weights[0] if any(w[v] is not v.tensor for w in weights)}
        stacked = {v: torch.stack(tensors) for v, tensors in ours.items()}
        total = torch.zeros(len(candidates))
        with torch.no_grad():
            for (inputs, _), dense in zip(self.batches, self.dense):

                def loss(own: dict[Value, Tensor], inputs: Any = inputs, dense: Any = dense) -> Tensor:
                    return _divergence(dense, run(self.program, inputs, tensors=own, dtype=torch.float32))

                total = total + torch.func.vmap(loss)(stacked).double().cpu()
        return (total / len(self.batches)).tolist()

    def on_first(self, count: int) -> Masked:
        """The same evaluator on fewer batches."""
        other = copy(self)
        other.batches, other.dense = self.batches[:count], self.dense[:count]
        return other

    def _loss(self, outputs: list[Any], inputs: list[Any], item: Any) -> Any:
        return self.statistics.task_loss(structured(self.program, outputs), inputs, item)


def divergence(dense: Any, pruned: Any) -> float:
    """How far outputs are from those of the dense network: summed over all floating-point outputs.

    Kullback-Leibler divergence of the softmax over the features, mean over places, where there are features to choose from (logits); the
    squared error relative to the dense output where there is one number per place.
    """
    return float(_divergence(dense, pruned))


def _divergence(dense: Any, pruned: Any) -> Tensor:
    total = torch.zeros(())
    for a, b in zip(pytree.tree_leaves(dense), pytree.tree_leaves(pruned)):
        if not isinstance(a, Tensor) or not a.is_floating_point() or not a.dim() or not a.numel():
            continue
        a, b = features_last(a).float(), features_last(b).float()
        if a.shape[-1] > 1:
            p, q = (x.flatten(0, -2).log_softmax(-1) for x in (a, b)) if a.dim() > 1 else (x[None].log_softmax(-1) for x in (a, b))
            total = total.to(p) + (p.exp() * (p - q)).sum() / len(p)
        else:
            total = total.to(a) + (a - b).square().sum() / a.square().sum().clamp_min(1e-30)
    return total
