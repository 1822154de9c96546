"""Whole blocks that turn the stream least go: one by one (ShortGPT), or as a run of neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphprune.allocation import BUDGETS, Candidate, Local, limits_of
from graphprune.blocks import Stage, stages
from graphprune.calibration import Similarity, Statistics, batches
from graphprune.calibration.taps import features_last
from graphprune.costs import CostModel
from graphprune.errors import BudgetNotMet
from graphprune.execute.interpreter import run
from graphprune.importance.depth import angular_distance, block_influence
from graphprune.program import Value
from graphprune.recipes.recipe import Recipe

Blocks = list[list[Candidate]]  # the branches of every block, in topological order


@dataclass(frozen=True)
class Whole(Local):
    """A scope that searches: blocks of least influence go, all their branches at once; a branch in no block is one by itself."""

    needs: tuple[str, ...] = ("similarity", "stages")

    def search(self, candidates: Sequence[Candidate], budget: Mapping[str, Any] | None, statistics: Statistics) -> dict[str, np.ndarray]:
        """Units to remove, by group name."""
        blocks, ends = _blocks(candidates, statistics)
        if len(blocks) < 2:  # the last one stays
            return {}
        turned = [_influence(statistics, block, end) for block, end in zip(blocks, ends)]
        order = sorted(range(len(blocks)), key=lambda i: turned[i])
        return _first_enough(statistics, blocks, budget, lambda n: order[:n])


@dataclass(frozen=True)
class Run(Local):
    """A scope that searches: neighbours go, those n in a row between whose two ends the stream turns least."""

    def search(self, candidates: Sequence[Candidate], budget: Mapping[str, Any] | None, statistics: Statistics) -> dict[str, np.ndarray]:
        """Units to remove, by group name."""
        blocks, ends = _blocks(candidates, statistics)
        entries = [block[0].group.atom.skip for block in blocks]
        after = [end.join.outputs[0] for end in ends]
        angles: dict[tuple[int, int], Similarity] = {
            (i, j): Similarity() for i in range(len(blocks)) for j in range(i, len(blocks)) if entries[i].shape == after[j].shape
        }
        wanted = {*entries, *after}
        for inputs, _ in batches(statistics.program, statistics.data):
            held: dict[Value, torch.Tensor] = {v: x for v, x in zip(statistics.program.inputs, inputs) if v in wanted}

            def keep(node: Any, args: Any, compute: Any, held: dict[Value, torch.Tensor] = held) -> Any:
                results = compute(args)
                held.update((v, x) for v, x in zip(node.outputs, results) if v in wanted)
                return results

            run(statistics.program, inputs, intercept=keep)
            for (i, j), found in angles.items():
                found.update(features_last(held[entries[i]]), features_last(held[after[j]]))

        def chosen(n: int) -> Sequence[int]:
            runs = [(found.angle, i) for (i, j), found in angles.items() if j - i + 1 == n]
            return range(min(runs)[1], min(runs)[1] + n) if runs else range(n)

        return _first_enough(statistics, blocks, budget, chosen)


def _blocks(candidates: Sequence[Candidate], statistics: Statistics) -> tuple[Blocks, list[Any]]:
    """The candidates by block, and the last branch of each block."""
    by_atom = {c.group.atom.join: c for c in candidates if c.group.kind == "layer"}
    found: Blocks = []
    ends: list[Any] = []
    known: list[Stage] = stages(statistics.program)
    inside = {branch.join for stage in known for branch in stage.branches}
    runs = [list(stage.branches) for stage in known] + [[c.group.atom] for join, c in by_atom.items() if join not in inside]
    place = {node: i for i, node in enumerate(statistics.program.nodes)}
    for branches in sorted(runs, key=lambda part: place[part[0].join]):
        if all(branch.join in by_atom for branch in branches):  # a block of which something must stay is no candidate
            found.append([by_atom[branch.join] for branch in branches])
            ends.append(branches[-1])
    return found, ends


def _influence(statistics: Statistics, block: Sequence[Candidate], end: Any) -> float:
    found = statistics.observed("stages").get(end.join) or statistics.observed("similarity")[end.join]
    return 1 - found.cosine


def _first_enough(
    statistics: Statistics, blocks: Blocks, budget: Mapping[str, Any] | None, chosen: Callable[[int], Sequence[int]]
) -> dict[str, np.ndarray]:
    """As many blocks as the ratio says, or as few as the budget needs; one always stays."""

    def removed(n: int) -> list[Candidate]:
        return [c for i in chosen(n) for c in blocks[i]]

    if budget is None:
        ratio = max(c.ratio or 0.0 for block in blocks for c in block)
        count = min(math.floor(len(blocks) * ratio + 1e-9), len(blocks) - 1)
    else:
        model = CostModel(statistics.program.analysis)
        limits = limits_of(budget, model.cost({}))
        costs = [model.cost({c.group.atom: 0 for c in removed(n)}) for n in range(len(blocks))]
        met = [all(BUDGETS[name](cost) <= limit * (1 + 1e-12) for name, limit in limits.items()) for cost in costs]
        if not any(met):
            raise BudgetNotMet(f"the budget cannot be met: of {len(blocks)} blocks one has to stay, and that costs more")
        count = met.index(True)
    return {c.group.name: np.zeros(1, int) for c in removed(count)}


RECIPES = (
    Recipe(
        name="shortgpt",
        paper="Men et al. 2024, arXiv 2403.03853",
        formula="1 - cos(x_in, x_out) of a block, mean over tokens",
        score=block_influence,
        unit=("layer",),
        allocation=Whole(),
    ),
    Recipe(
        name="angular",
        paper="Gromov et al. 2024, arXiv 2403.17887",
        formula="arccos(cos(x_in, x_out)) / pi over a run of blocks, mean over tokens",
        score=angular_distance,
        unit=("layer",),
        allocation=Run(),
        deviations="all tokens in place of the last one; no fine-tuning",
    ),
)
