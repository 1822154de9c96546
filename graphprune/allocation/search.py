"""Search over discrete levels: which removal each group takes, by any evaluator of whole candidates.

A `Ladder` lists what one group may lose, least first; a state is one index per ladder. An evaluator gets the removed units by group name
and returns a number, lower is better. Four searches: greedy removal, exchange of levels under a fixed total (evolutionary), annealing of a
set of fixed size, and an exact answer where losses and costs are sums over the groups. The same seed gives the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from graphprune.errors import BudgetNotMet, InvalidInput

Removed = Mapping[str, Sequence[int]]  # group name -> removed units
Evaluate = Callable[[Removed], float]
State = tuple[int, ...]


@dataclass(frozen=True)
class Ladder:
    """What one group may lose: removed units, rung by rung."""

    name: str
    rungs: tuple[tuple[int, ...], ...]
    rivals: Any = ""  # levels are exchanged between ladders of equal key


def removed(ladders: Sequence[Ladder], state: State) -> dict[str, tuple[int, ...]]:
    """The candidate that a state stands for; groups that stay whole are left out."""
    return {ladder.name: ladder.rungs[level] for ladder, level in zip(ladders, state) if ladder.rungs[level]}


@dataclass
class Remembered:
    """An evaluator that works out every candidate once. A candidate that is no number is as bad as can be."""

    evaluate: Evaluate
    seen: dict[Any, float] = field(default_factory=dict)

    def __call__(self, units: Removed) -> float:
        key = _key(units)
        if key not in self.seen:
            found = float(self.evaluate(units))
            self.seen[key] = math.inf if math.isnan(found) else found
        return self.seen[key]

    def many(self, candidates: Sequence[Removed]) -> list[float]:
        """Of each; those not seen before are handed over together where the evaluator takes many."""
        new = {_key(units): units for units in candidates if _key(units) not in self.seen}
        if new and hasattr(self.evaluate, "many"):
            for key, found in zip(new, self.evaluate.many(list(new.values()))):
                self.seen[key] = math.inf if math.isnan(found) else float(found)
        return [self(units) for units in candidates]


def _key(units: Removed) -> Any:
    return tuple((name, tuple(units[name])) for name in sorted(units))


def _all(evaluate: Evaluate, candidates: Sequence[Removed]) -> list[float]:
    return evaluate.many(candidates) if hasattr(evaluate, "many") else [evaluate(units) for units in candidates]


# ---- greedy


def greedy(
    ladders: Sequence[Ladder], evaluate: Evaluate, enough: Callable[[State], bool], may: Callable[[State], bool] = lambda state: True
) -> State:
    """From nothing removed, each step climbs the one rung after which the evaluation is lowest, until `enough`.

    Args:
        may: a state that it refuses is never entered.

    Raises:
        BudgetNotMet: no rung is left.
    """
    state: State = (0,) * len(ladders)
    while not enough(state):
        nexts = [_moved(state, i, 1) for i, ladder in enumerate(ladders) if state[i] + 1 < len(ladder.rungs)]
        nexts = [s for s in nexts if may(s)]
        if not nexts:
            raise BudgetNotMet("the budget cannot be met: everything that units, ratio and ignore allow is gone already")
        state = min(nexts, key=lambda s: (evaluate(removed(ladders, s)), s))
    return state


def _moved(state: State, i: int, by: int) -> State:
    return (*state[:i], state[i] + by, *state[i + 1 :])


# ---- evolutionary: exchange of levels


@dataclass(frozen=True)
class Exchange:
    """Evolutionary search under a fixed total (Li et al. 2025, arXiv 2503.09657).

    A mutation is a few exchanges: one group goes down a level, another of its rivals goes up one. Children pass through the stages, each
    with its own evaluator (more data from stage to stage), and the best of each go on; a parent that no child beats stays.
    """

    generations: int = 50
    offspring: int = 128
    exchanges: int = 4  # at most so many in one child: the smaller of two uniform draws
    survivors: tuple[int, ...] = (16, 4, 1)  # of each stage
    patience: int | None = None  # generations in a row without a better child, after which it ends

    def __call__(
        self,
        ladders: Sequence[Ladder],
        start: State,
        stages: Sequence[Evaluate],
        seed: int = 0,
        may: Callable[[State], bool] = lambda state: True,
    ) -> State:
        """The best state found; `stages[-1]` judges."""
        classes: dict[Any, list[int]] = {}
        for i, ladder in enumerate(ladders):
            classes.setdefault(ladder.rivals, []).append(i)
        pools = [members for members in classes.values() if len(members) > 1]
        if not pools or not stages:
            return start
        random = np.random.default_rng(seed)
        keep = (*self.survivors[: len(stages) - 1], 1)  # the last stage names the best
        best, tried, idle = start, {start}, 0
        for _ in range(self.generations):
            children: list[State] = []
            for _ in range(8 * self.offspring):  # small spaces run out of children
                if len(children) == self.offspring:
                    break
                child = self._child(ladders, best, pools, random)
                if child not in tried and may(child):
                    tried.add(child)
                    children.append(child)
            if not children:
                break
            for stage, count in enumerate(keep):
                pool = [best, *children] if stage == len(stages) - 1 else children
                losses = _all(stages[stage], [removed(ladders, state) for state in pool])
                children = [pool[i] for _, i in sorted(zip(losses, range(len(pool))))[:count]]
            idle = idle + 1 if children[0] == best else 0
            best = children[0]
            if self.patience is not None and idle >= self.patience:
                break
        return best

    def _child(self, ladders: Sequence[Ladder], parent: State, pools: Sequence[Sequence[int]], random: np.random.Generator) -> State:
        state = list(parent)
        shares = np.array([len(pool) for pool in pools], float)
        for _ in range(int(random.integers(1, self.exchanges + 1, 2).min())):
            pool = pools[int(random.choice(len(pools), p=shares / shares.sum()))]
            down = [i for i in pool if state[i] > 0]
            if not down:
                continue
            i = int(random.choice(down))
            up = [j for j in pool if j != i and state[j] + 1 < len(ladders[j].rungs)]
            if up:
                j = int(random.choice(up))
                state[i] -= 1
                state[j] += 1
        return tuple(state)


# ---- annealing of a set of fixed size


class Energy(Protocol):
    """What annealing minimises, as changes of it: one member of the set leaves, one comes in."""

    def change(self, leaves: int, comes: int) -> float: ...

    def exchange(self, leaves: int, comes: int) -> None:
        """Carry it out."""
        ...


class Quadratic:
    """E(x) = x^T Q x over x in {0, 1}^n, Q symmetric; changes cost O(1), exchanges O(n)."""

    def __init__(self, matrix: np.ndarray, chosen: np.ndarray) -> None:
        self.matrix, self.chosen = matrix, chosen.astype(bool).copy()
        self.field = 2 * matrix @ self.chosen.astype(matrix.dtype) - matrix.diagonal() * (2 * self.chosen - 1)
        # energy gained when i comes in (or lost when it leaves): Q_ii + 2 sum over the other members of Q_ij

    def change(self, leaves: int, comes: int) -> float:
        return float(self.field[comes] - self.field[leaves] - 2 * self.matrix[leaves, comes])

    def exchange(self, leaves: int, comes: int) -> None:
        self.field += 2 * (self.matrix[:, comes] - self.matrix[:, leaves])
        self.field[comes] -= 2 * self.matrix[comes, comes]
        self.field[leaves] += 2 * self.matrix[leaves, leaves]
        self.chosen[leaves], self.chosen[comes] = False, True


class Evaluated:
    """Any evaluator of sets."""

    def __init__(self, evaluate: Callable[[np.ndarray], float], chosen: np.ndarray) -> None:
        self.evaluate, self.chosen = evaluate, chosen.astype(bool).copy()
        self.now = evaluate(self.chosen)

    def _after(self, leaves: int, comes: int) -> np.ndarray:
        after = self.chosen.copy()
        after[leaves], after[comes] = False, True
        return after

    def change(self, leaves: int, comes: int) -> float:
        return self.evaluate(self._after(leaves, comes)) - self.now

    def exchange(self, leaves: int, comes: int) -> None:
        self.chosen = self._after(leaves, comes)
        self.now = self.evaluate(self.chosen)


@dataclass(frozen=True)
class Annealing:
    """Simulated annealing that exchanges one member of a set for one from outside, so that its size never changes.

    The inverse temperature grows from `cold[0]` to `cold[1]` by `factor`; a sweep proposes one exchange per member.
    """

    cold: tuple[float, float] = (1e-3, 100.0)
    factor: float = 1.1
    sweeps: int = 1  # per temperature

    def __call__(self, energy: Energy, chosen: np.ndarray, seed: int = 0) -> np.ndarray:
        """Boolean, like `chosen`: the best set met."""
        random = np.random.default_rng(seed)
        inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen.astype(bool))
        if not len(inside) or not len(outside):
            return chosen.astype(bool)
        total = lowest = 0.0
        best = chosen.astype(bool).copy()
        steps = int(math.log(self.cold[1] / self.cold[0], self.factor) + 1e-9) + 1
        for beta in self.cold[0] * self.factor ** np.arange(steps):
            for _ in range(self.sweeps):
                here = random.integers(0, len(inside), len(inside))
                there = random.integers(0, len(outside), len(inside))
                luck = np.log(1 - random.random(len(inside)))
                for a, b, least in zip(here.tolist(), there.tolist(), luck.tolist()):
                    i, j = int(inside[a]), int(outside[b])
                    change = energy.change(i, j)
                    if -beta * change < least:
                        continue
                    energy.exchange(i, j)
                    inside[a], outside[b] = j, i
                    total += change
                    if total < lowest - 1e-12:
                        lowest = total
                        best[:] = False
                        best[inside] = True
        return best


# ---- separable


def cheapest(losses: Sequence[Sequence[float]], costs: Mapping[str, Sequence[Sequence[float]]], limits: Mapping[str, float]) -> State:
    """One level per group, the sum of losses least, the sum of every cost within its limit: an integer program, solved exactly.

    Args:
        losses: per group, per level.
        costs: by name, of the same shape.
        limits: by name, the largest sum.

    Raises:
        BudgetNotMet: no choice meets all limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(row) for row in losses]
    if not sizes or min(sizes) < 1:
        raise InvalidInput("every group needs at least one level to choose")
    ends = np.cumsum([0, *sizes])
    flat = np.concatenate([np.asarray(row, float) for row in losses])
    one = np.zeros((len(sizes), len(flat)))
    for i, (a, b) in enumerate(pairwise(ends)):
        one[i, a:b] = 1
    rules = [LinearConstraint(one, 1, 1)]
    for name, limit in limits.items():
        row = np.concatenate([np.asarray(part, float) for part in costs[name]])
        scale = max(abs(float(limit)), 1e-12)  # parameters count in millions, milliseconds in ones
        rules.append(LinearConstraint(row[None] / scale, -np.inf, limit / scale))
    found = milp(flat / max(float(np.abs(flat).max()), 1e-300), constraints=rules, integrality=np.ones(len(flat)), bounds=Bounds(0, 1))
    if found.x is None:
        least = {name: sum(min(part) for part in costs[name]) for name in limits}
        worst = ", ".join(f"{name} {limits[name]:.6g} (at least {least[name]:.6g} alone)" for name in limits)
        raise BudgetNotMet(f"no choice of levels keeps within {worst}")
    return tuple(int(found.x[a:b].argmax()) for a, b in pairwise(ends))


__all__ = ["Annealing", "Energy", "Evaluate", "Evaluated", "Exchange", "Ladder", "Quadratic", "Remembered", "cheapest", "greedy", "removed"]
