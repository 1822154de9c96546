"""What a method of weight sparsity is: a score of single weights, what it is compared with, and what the kept weights do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration import Gram, Moments
from graphprune.repair import obs
from graphprune.sparsity.patterns import NOfM, Pattern, Tiles

UPDATES = {"obs_sequential": "sequential", "obs_joint": "joint"}  # names in a plan's repairs
BLOCK = 128  # columns that are chosen and made up for together
DAMPING = 0.01
ON_HOST = 1 << 21  # entries of a matrix up to which steps of N:M go through on the processor


@dataclass(frozen=True)
class Weights:
    """The score and the update of a method, on matrices (groups, outputs, inputs).

    Args:
        score: (matrix, statistic of its inputs) -> scores of the same shape; higher stays. None: judged inside the sweep, by the loss of
            optimal brain surgery on the weights as earlier columns left them.
        need: the statistic, "moments" or "gram"; None for methods without data.
        compare: a weight competes with its "row" (one output) or its "layer".
        update: "sequential" or "joint" repair of the kept weights (`graphprune.repair.obs`), or None.
        sets: for N:M, judge every set of weights that may go by its joint loss instead of single weights.
    """

    score: Callable[[Tensor, Any], Tensor] | None
    need: str | None = None
    compare: str = "layer"
    update: str | None = None
    sets: bool = False

    @property
    def make(self) -> Callable[[], Any] | None:
        """What gathers the statistic of one layer."""
        return {"moments": Moments, "gram": Gram, None: None}[self.need]

    def masked(
        self, matrix: Tensor, statistic: Any, pattern: Pattern, sparsity: float, keep: Tensor | None = None, window: int = 1
    ) -> tuple[Tensor, Tensor]:
        """New weights and mask of one layer; with `keep` given, only the weights are new. `window`: positions of a convolution's window."""
        if self.update is None:
            if keep is None:
                assert self.score is not None
                keep = pattern.keep(self.score(matrix, statistic), sparsity, self.compare, window)
            return matrix * keep, keep
        hessian = statistic.hessian(DAMPING)
        matrix = matrix.to(hessian.dtype).masked_fill(statistic.dead[:, None], 0.0)
        if keep is None and self.score is not None:
            keep = pattern.keep(self.score(matrix, statistic), sparsity, self.compare, window)
        if isinstance(pattern, Tiles) and window > 1:  # position after position of the window, so that a step holds whole tiles
            order = torch.arange(matrix.shape[-1], device=matrix.device).reshape(-1, window).T.flatten()
            back, keep = order.argsort(), keep[..., order] if keep is not None else None
            new, mask = self._swept(matrix[..., order], hessian[:, order][..., order], pattern, sparsity, keep)
            return new[..., back], mask[..., back]
        return self._swept(matrix, hessian, pattern, sparsity, keep)

    def _swept(
        self, matrix: Tensor, hessian: Tensor, pattern: Pattern, sparsity: float, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """New weights and mask, by a sweep over the columns."""
        step = pattern.of if isinstance(pattern, NOfM) else BLOCK
        device, small = matrix.device, step <= obs.SMALL and matrix.numel() <= ON_HOST
        if small:  # steps of a few columns, one after the other: launching them takes longer than a processor does
            matrix, hessian, keep = matrix.cpu(), hessian.cpu(), keep.cpu() if keep is not None else None

        def choose(start: int, weight: Tensor, inner: Tensor) -> Tensor:
            if keep is not None:
                return keep[..., start : start + weight.shape[-1]]
            if self.sets and isinstance(pattern, NOfM) and weight.shape[-1] == pattern.of:
                return best_sets(weight, inner, pattern)
            # what a column costs: alone, or after all columns left of it in the step are gone
            scale = inner if self.update == "joint" else torch.linalg.cholesky(inner).square()
            return pattern.keep(weight.square() / scale.diagonal(dim1=-2, dim2=-1)[:, None], sparsity, self.compare)

        new, mask = obs.sweep(matrix, hessian, choose, step, self.update == "joint")
        return new.to(device), mask.to(device)


def best_sets(weight: Tensor, inner: Tensor, pattern: NOfM) -> Tensor:
    """Per row the set of least joint loss `w_P (inner_PP)^-1 w_P^T`; all sets at once, since there are few and each is small."""
    gone, members = pattern.sets(weight.device)
    inverses = torch.linalg.inv_ex(inner[:, members[:, :, None], members[:, None]])[0]  # (groups, sets, members, members)
    parts = weight[..., members].movedim(2, 1)  # (groups, sets, outputs, members)
    losses = ((parts @ inverses) * parts).sum(-1)
    return ~gone[losses.argmin(1)]


def magnitude(matrix: Tensor, statistic: Any) -> Tensor:
    return matrix.abs()


def wanda(matrix: Tensor, moments: Moments) -> Tensor:
    return matrix.abs() * moments.norm[:, None].to(matrix)


def squares(matrix: Tensor, statistic: Any) -> Tensor:
    return matrix.square()
