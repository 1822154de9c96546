"""BlockPruner: one residual branch after the other, each time the one without which the calibration loss is lowest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphprune.allocation import BUDGETS, Candidate, Local, limits_of
from graphprune.allocation.search import Ladder, Remembered, State, greedy, removed
from graphprune.calibration import Statistics
from graphprune.costs import CostModel
from graphprune.recipes.recipe import Recipe
from graphprune.verify.candidates import Masked


@dataclass(frozen=True)
class Greedy(Local):
    """A scope that searches: whole groups go, until the ratio of their number has gone or the budget is met."""

    by: str = "loss"
    batches: int | None = None  # of the calibration data, at most

    def search(
        self, candidates: Sequence[Candidate], budget: Mapping[str, Any] | None, statistics: Statistics
    ) -> dict[str, np.ndarray]:
        """Units to remove, by group name."""
        branches = [c for c in candidates if c.group.kind == "layer"]
        ladders = [Ladder(c.group.name, ((), (0,))) for c in branches]
        atoms = {c.group.name: c.group.atom for c in branches}
        if budget is None:
            wanted = math.floor(len(branches) * max(c.ratio or 0.0 for c in branches) + 1e-9)

            def enough(state: State) -> bool:
                return sum(state) >= wanted
        else:
            model = CostModel(statistics.program.analysis)
            limits = limits_of(budget, model.cost({}))

            def enough(state: State) -> bool:
                cost = model.cost({atoms[name]: 0 for name in removed(ladders, state)})
                return all(BUDGETS[name](cost) <= limit * (1 + 1e-12) for name, limit in limits.items())

        state = greedy(ladders, Remembered(Masked(statistics, self.by, self.batches)), enough, lambda s: sum(s) < len(ladders))
        return {name: np.array(units) for name, units in removed(ladders, state).items()}


@dataclass(frozen=True)
class Alike:
    """Nothing is known of a branch before it is tried."""

    def score(self, group: Any, statistics: Statistics) -> Any:
        return np.zeros(group.size, np.float32)


RECIPES = (
    Recipe(
        name="blockpruner",
        paper="Zhong et al. 2024, arXiv 2406.10594",
        formula="calibration loss without the branch, after those that are gone already",
        score=Alike(),
        unit=("layer",),
        allocation=Greedy(),
        deviations="where there is no loss (the user's, the model's, the next token's), the divergence from the dense outputs",
    ),
)
