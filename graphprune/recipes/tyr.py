"""Tyr-the-Pruner: how much each layer loses is searched for, over levels whose repaired copies stand ready, by the divergence of outputs.

Around the level that every group has now, copies of its readers are prepared at some levels up and down, each refitted by least squares to
what the dense network gives it. Exchanges of levels between groups of one kind are judged on the masked network with those copies in place.
The next round starts from what was found, with half the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.allocation import BUDGETS, Candidate, Local, allocate, limits_of
from graphprune.allocation.search import Exchange, Ladder, Remembered, State, removed
from graphprune.calibration import Statistics
from graphprune.calibration.statistics import weight_of
from graphprune.costs import CostModel
from graphprune.importance.surgeon import Surgeon
from graphprune.linear_maps import LinearMap, columns
from graphprune.program import Value
from graphprune.recipes.recipe import Recipe
from graphprune.repair.refit import DAMPING
from graphprune.units import INNER_UNITS, Group, Role
from graphprune.verify.candidates import Masked

SLACK = 0.005  # of the parameters: groups of different width cannot exchange exactly the same


@dataclass(frozen=True)
class Levels:
    """A scope that searches for the level of every group under a fixed total.

    Args:
        search_by: the evolutionary search of one round.
        rounds: with half the step from one to the next.
        around: levels prepared on either side of the present one.
        step: between levels, as a fraction of the group, in the first round.
        shares: of the calibration batches that each stage of the search sees; one survivor count of `search_by` for each.
    """

    search_by: Exchange = field(default_factory=lambda: Exchange(15, 32, survivors=(8, 3, 1), patience=4))
    rounds: int = 3
    around: int = 4
    step: float = 0.125
    shares: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 4)

    # units of one group are ranked among themselves; not a `Local` scope, as a group may lose more than the ratio
    rivals, worth = Local.rivals, Local.worth

    def search(self, candidates: Sequence[Candidate], budget: Mapping[str, Any] | None, statistics: Statistics) -> dict[str, np.ndarray]:
        """Units to remove, by group name."""
        analysis = statistics.program.analysis
        model = CostModel(analysis)
        start = allocate(analysis, candidates, Local(), budget)
        counts = [len(start.get(c.group.name, ())) for c in candidates]
        orders = [np.argsort(c.scores, kind="stable") for c in candidates]
        if budget is not None:
            limits = limits_of(budget, model.cost({}))
        else:
            limits = {"params": model.cost(_kept(candidates, counts)).params * (1 + SLACK)}
        copies = Copies(statistics, [c.group for c in candidates])
        whole = Masked(statistics, tensors=copies)
        counts_of_batches = [max(1, round(min(share, 1) * len(whole.batches))) for share in self.shares]
        by_count = {n: Remembered(whole.on_first(n)) for n in set(counts_of_batches)}  # stages of equal data know what the other found
        judges = [by_count[n] for n in counts_of_batches]
        for turn in range(self.rounds):
            ladders, state = [], []
            for c, count, order in zip(candidates, counts, orders):
                rungs = self._rungs(c, count, turn)
                ladders.append(Ladder(c.group.name, tuple(tuple(sorted(order[:n].tolist())) for n in rungs), c.group.kind))
                state.append(rungs.index(count))

            def may(state: State, ladders: Sequence[Ladder] = tuple(ladders)) -> bool:
                cost = model.cost(_kept(candidates, [len(ladder.rungs[level]) for ladder, level in zip(ladders, state)]))
                return all(BUDGETS[name](cost) <= limit * (1 + 1e-12) for name, limit in limits.items())

            found = self.search_by(ladders, tuple(state), judges, statistics.seed + turn, may)
            counts = [len(ladder.rungs[level]) for ladder, level in zip(ladders, found)]
            units = removed(ladders, found)
        return {name: np.array(gone) for name, gone in units.items()}

    def _rungs(self, candidate: Candidate, count: int, turn: int) -> list[int]:
        """Numbers of removed units, ascending: those that constraints allow, nearest to the levels; the present one among them."""
        allowed = np.array(sorted({0, count, *candidate.removals}))
        apart = max(1.0, self.step / 2**turn * candidate.group.size)
        wanted = [count + level * apart for level in range(-self.around, self.around + 1)]
        inside = [w for w in wanted if -1e-9 <= w <= allowed[-1] + 1e-9]
        return sorted({count, *(int(allowed[np.abs(allowed - w).argmin()]) for w in inside)})


def _kept(candidates: Sequence[Candidate], counts: Sequence[int]) -> dict[Any, int]:
    return {c.group.atom: c.group.size - count for c, count in zip(candidates, counts) if count}


class Copies:
    """The weights of readers, refitted for what a candidate removes of their inputs; each worked out once.

    With H the second moments of the inputs (about their mean where there is a bias to take it up), `W_K' = (W H)_K (H_KK)^-1`.
    """

    def __init__(self, statistics: Statistics, groups: Iterable[Group]) -> None:
        self.statistics = statistics
        self.readers: dict[Value, list[tuple[str, np.ndarray]]] = {}  # weight -> (group, columns of each of its units)
        for group in groups:
            for member in group.members:
                linear = statistics.linear.get(member.value)
                if linear is not None and member.role is Role.READER and member.axis == linear.input_axis and linear.groups == 1:
                    index = columns(linear, member.index).reshape(group.size, -1)
                    self.readers.setdefault(member.value, []).append((group.name, index))
        self.known: dict[Any, dict[Value, Tensor]] = {}

    def __call__(self, removed: Mapping[str, Iterable[int]]) -> dict[Value, Tensor]:
        """Tensors in place of the program's own."""
        found: dict[Value, Tensor] = {}
        for weight, parts in self.readers.items():
            gone = {name: tuple(removed[name]) for name, _ in parts if name in removed}
            key = (weight, tuple(gone.items()))
            if gone and key not in self.known:
                lost = np.concatenate([index[list(gone[name])].reshape(-1) for name, index in parts if name in gone])
                self.known[key] = self._refitted(self.statistics.linear[weight], lost)
            found.update(self.known.get(key, {}))
        return found

    def forget(self) -> None:
        """Free them all: copies of the readers of a network are about as large as the network."""
        self.known.clear()

    def _refitted(self, linear: LinearMap, lost: np.ndarray) -> dict[Value, Tensor]:
        gram = self.statistics.observed("gram")[linear.weight]
        second, mean = (gram.square / gram.count[..., None])[0], gram.mean[0]
        matrix = linear.matrix(weight_of(linear.weight))[0].to(second.dtype)
        bias = linear.node.args.get("bias", linear.node.args.get("B"))
        movable = isinstance(bias, Value) and bias.is_weight and linear.node.op != ("", "MatMul") and bias is not linear.weight
        if movable:
            second = second - torch.outer(mean, mean)
        stays = torch.ones(len(second), dtype=torch.bool, device=second.device)
        stays[torch.from_numpy(lost).to(second.device)] = False
        inner = second[stays][:, stays].clone()
        inner.diagonal().add_(DAMPING * inner.diagonal().mean().clamp_min(1e-30))
        new = torch.zeros_like(matrix)
        new[:, stays] = matrix[:, stays] + torch.linalg.solve(inner, second[stays][:, ~stays] @ matrix[:, ~stays].T).T
        out = {linear.weight: linear.tensor(new[None])}
        if movable:
            out[bias] = weight_of(bias) + ((matrix - new) @ mean).to(weight_of(bias).dtype)
        return out


RECIPES = (
    Recipe(
        name="tyr",
        paper="Li et al. 2025, arXiv 2503.09657",
        formula="tr(W_:P G_:P^T) + 1/2 tr(W_:P ([H^-1]_PP)^-1 W_:P^T), G = W H; levels by the divergence of outputs",
        score=Surgeon(first_order=True),
        unit=INNER_UNITS,
        allocation=Levels(),
        repair=("least_squares",),
        deviations="units of a group are ranked once; copies are fitted to the dense network's inputs; 3 rounds of 15 generations of 32 in "
        "place of 4 of 50 of 128, and a round ends early once 4 generations found nothing better; stages see 1/64, 1/16 and 1/4 of the "
        "calibration data; the moments of all readers are held at once",
    ),
)
