"""Swapping single weights under a fixed count: a quadratic model of the loss on a block of candidates, minimised by annealing.

With w0 the original weights of the block, w the present ones, dw = w - w0, and x_i = 1 where weight i is pruned, the weights move by
delta = -(dw + x * w0). A loss g^T delta (times `first`) + 1/2 delta^T H delta + rho |delta|^2 is then

    E(x) = x^T Q x + const
    Q     = diag(w0 * (H dw)) + 1/2 (w0 w0^T) * H - first diag(w0 * g) + rho diag(w0 * (2 dw + w0))
    const = 1/2 dw^T H dw - first dw^T g + rho |dw|^2

where x^2 = x. H is the mean outer product of per-sample gradients. As many weights are pruned afterwards as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.allocation.search import Annealing, Quadratic
from graphprune.calibration import Statistics, samples
from graphprune.calibration.statistics import structured, weight_of
from graphprune.execute.interpreter import run
from graphprune.program import Program, Value
from graphprune.sparsity.methods import Weights

CUTOFF = 1e-9  # entries of Q whose magnitude is below it, where the mean magnitude is one, are zero


def model(
    original: np.ndarray, present: np.ndarray, hessian: np.ndarray, gradient: np.ndarray, first: float = 1.0, ridge: float = 0.0
) -> tuple[np.ndarray, float]:
    """(Q, const), see above.

    Args:
        original, present, gradient: (n,).
        hessian: (n, n).
    """
    moved = present - original
    pull = hessian @ moved
    matrix = np.outer(original, original) * hessian / 2
    matrix[np.diag_indices_from(matrix)] += original * pull - first * original * gradient + ridge * original * (2 * moved + original)
    return matrix, float(moved @ pull / 2 - first * moved @ gradient + ridge * moved @ moved)


@dataclass(frozen=True)
class Swaps(Weights):
    """A method that starts from the masks of its score and goes on by swaps.

    Args:
        block: candidates of one step: half of them pruned weights of largest |w0 g|, half kept ones of smallest.
        sweeps: visits of every layer.
        samples: whose gradients are taken, at most.
        first, ridge: of the model.
        anneal: how the model is minimised.
    """

    block: int = 512
    sweeps: int = 4
    samples: int = 16
    first: float = 0.75
    ridge: float = 1e-3
    anneal: Annealing = field(default_factory=Annealing)

    def refine(
        self, program: Program, masks: Mapping[str, Tensor], data: Any, loss: Callable[..., Any] | None, seed: int
    ) -> dict[str, Tensor]:
        """Masks with as many zeros per weight, and a loss on the samples that is no larger."""
        objective = Objective(program, masks, data, loss, self.samples)
        recent: dict[str, np.ndarray] = {name: np.empty(0, int) for name in masks}
        now = objective.value()
        for sweep in range(self.sweeps):
            for place, name in enumerate(masks):
                per_sample = objective.gradients(name)  # (samples, entries)
                keep = objective.masks[name].flatten().numpy()
                original = weight_of(program.weights[name]).flatten().double().cpu().numpy()
                gain = np.abs(original * per_sample.mean(0))
                gain[recent[name]] = np.nan  # what was a candidate in the last visit rests
                chosen = self._candidates(gain, keep)
                if len(chosen) < 2:
                    continue
                g, w0, pruned = per_sample[:, chosen], original[chosen], ~keep[chosen]
                matrix, _ = model(w0, np.where(pruned, 0.0, w0), g.T @ g / len(g), g.mean(0), self.first, self.ridge)
                matrix /= max(float(np.abs(matrix).mean()), 1e-300)
                matrix[np.abs(matrix) <= CUTOFF] = 0.0
                after = self.anneal(Quadratic(matrix, pruned), pruned, seed + 7919 * sweep + place)
                if (after != pruned).any():
                    changed = keep.copy()
                    changed[chosen] = ~after
                    before = objective.masks[name]
                    objective.masks[name] = torch.from_numpy(changed).reshape(before.shape)
                    found = objective.value()
                    if found < now:
                        now = found
                    else:  # the model does not hold that far
                        objective.masks[name] = before
                recent[name] = chosen
        return objective.masks

    def _candidates(self, gain: np.ndarray, keep: np.ndarray) -> np.ndarray:
        half = self.block // 2
        gone, kept = np.flatnonzero(~keep & ~np.isnan(gain)), np.flatnonzero(keep & ~np.isnan(gain))
        if not len(gone) or not len(kept):
            return np.empty(0, int)
        gone, kept = gone[np.argsort(-gain[gone], kind="stable")[:half]], kept[np.argsort(gain[kept], kind="stable")[:half]]
        return np.concatenate([gone, kept])


class Objective:
    """The loss of a program under masks: the user's, the model's own, the next token's, or else the squared distance to dense outputs."""

    def __init__(self, program: Program, masks: Mapping[str, Tensor], data: Any, loss: Callable[..., Any] | None, limit: int) -> None:
        self.program, self.masks = program, {name: mask.cpu() for name, mask in masks.items()}
        self.statistics = Statistics(program, data, loss)
        self.items: list[tuple[list[Any], Any]] = []
        for inputs, item in samples(program, self.statistics.data):
            if len(self.items) == limit:
                break
            self.items.append((inputs, item))
        self.dense = [self._outputs(inputs, {}) for inputs, _ in self.items]

    def value(self) -> float:
        """Mean over samples."""
        with torch.no_grad():
            tensors = self._tensors()
            return float(np.mean([float(self._loss(i, tensors)) for i in range(len(self.items))]))

    def gradients(self, name: str) -> np.ndarray:
        """(samples, entries of the weight), float64: of every sample's loss, pruned entries included."""
        value, rows = self.program.weights[name], []
        tensors = self._tensors()
        leaf = tensors[value].clone().requires_grad_()
        for i in range(len(self.items)):
            with torch.inference_mode(False), torch.enable_grad():
                (gradient,) = torch.autograd.grad(self._loss(i, {**tensors, value: leaf}), [leaf], allow_unused=True)
            rows.append((torch.zeros_like(leaf) if gradient is None else gradient).flatten().double().cpu())
        return torch.stack(rows).numpy()

    def _tensors(self) -> dict[Value, Tensor]:
        weights = self.program.weights
        return {weights[name]: weight_of(weights[name]) * mask.to(weights[name].tensor.device) for name, mask in self.masks.items()}  # type: ignore[union-attr]

    def _outputs(self, inputs: list[Any], tensors: Mapping[Value, Tensor]) -> list[Any]:
        return run(self.program, inputs, tensors=tensors, dtype=torch.float32)

    def _loss(self, i: int, tensors: Mapping[Value, Tensor]) -> Tensor:
        inputs, item = self.items[i]
        outputs = self._outputs(inputs, tensors)
        found = self.statistics.task_loss(structured(self.program, outputs), inputs, item)
        if found is not None:
            return found
        pairs = zip(pytree.tree_leaves(self.dense[i]), pytree.tree_leaves(outputs))
        return torch.stack([(a - b).square().mean() for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]).sum()
