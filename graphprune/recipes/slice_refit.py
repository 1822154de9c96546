"""Our own composition: the residual stream and the insides of the layers are cut together, by measured loss, and refitted.

    unit        directions of the residual stream after a rotation to its principal ones (as SliceGPT); heads, groups of keys and values,
                and neurons (as Tyr-the-Pruner, OBSPA)
    score       directions by their variance; the rest by the block loss of optimal brain surgery with its first-order term
    allocation  the width of the stream by trying: whole candidates, refitted, are measured by the divergence of their outputs; the insides
                evenly or by an integer program on what each alone loses, whichever is measured to be better
    repair      an exact refit of all that reads a cut stream or a cut inside

No paper composes these; each part is somebody's, see the recipes named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from graphprune.allocation import BUDGETS, Candidate, Local, allocate, limits_of
from graphprune.allocation.search import cheapest
from graphprune.calibration import Statistics, batches
from graphprune.costs import Cost, CostModel
from graphprune.errors import BudgetNotMet
from graphprune.importance.surgeon import Surgeon
from graphprune.program import Value
from graphprune.recipes.recipe import Recipe
from graphprune.recipes.slicegpt import InOrder
from graphprune.recipes.tyr import Copies
from graphprune.repair.rotation import stream_of
from graphprune.units import INNER_UNITS, Group
from graphprune.verify.candidates import Masked

INNER = Surgeon(first_order=True)


@dataclass(frozen=True)
class ByKind:
    """Directions of the stream stand in order already; the rest by optimal brain surgery."""

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        return (InOrder() if group.kind == "hidden" else INNER).score(group, statistics)


@dataclass(frozen=True)
class Together:
    """A scope that tries widths of the stream, the insides making up the rest of the budget, and keeps what is measured to be best.

    For every width two ways to cut the insides are measured, whole candidates with their refits: evenly, and by an integer program on what
    each group alone loses, within a band about the even level, as losses of groups that are cut together do not add up far from it.

    Args:
        steps: widths tried are multiples of 1 / steps of the stream; then halfway to both neighbours of the best one.
        levels: fractions of a group at which it is measured alone; in between, losses are interpolated.
        band: levels may be so far from the even one.
        share: of the calibration batches that measure; the others fit.
        most: levels of one group that the integer program chooses among.
    """

    steps: int = 24
    levels: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
    band: float = 0.2
    share: float = 1 / 4
    most: int = 32

    # units of one group are ranked among themselves; not a `Local` scope, as a group may lose more than the ratio
    rivals, worth = Local.rivals, Local.worth

    def search(self, candidates: Sequence[Candidate], budget: Mapping[str, Any] | None, statistics: Statistics) -> dict[str, np.ndarray]:
        """Units to remove, by group name."""
        items = [item for _, item in batches(statistics.program, statistics.data)]
        held = math.ceil(self.share * len(items)) if len(items) > 1 else 0  # what copies are fitted to does not judge them
        fitted = Statistics(statistics.program, items[held:])
        copies = Copies(fitted, [c.group for c in candidates])
        judge = Masked(Statistics(statistics.program, items[:held] or items), tensors=_Widened(fitted, copies))
        room = _Room(statistics, candidates, budget)
        orders = [np.argsort(c.scores, kind="stable") for c in candidates]
        curves: dict[int, list[float]] = {}

        def units(counts: Mapping[int, int]) -> dict[str, list[int]]:
            return {candidates[i].group.name: sorted(orders[i][:n].tolist()) for i, n in counts.items() if n}

        def curve(i: int) -> tuple[list[int], list[float]]:
            allowed = np.array([0, *candidates[i].removals])
            tried = sorted({int(allowed[np.abs(allowed - x * candidates[i].group.size).argmin()]) for x in self.levels} - {0})
            if i not in curves:
                losses = judge.many([units({i: n}) for n in tried])
                curves[i] = np.maximum.accumulate([0.0, *losses]).tolist()
            return [0, *tried], curves[i]

        def paced(width: int, even: float) -> dict[int, int] | None:
            levels, losses = [], []
            for i in room.inner:
                size, allowed = candidates[i].group.size, [0, *candidates[i].removals]
                near = [n for n in allowed if abs(n / size - even) <= self.band] or [room.level(i, even)]
                chosen = [near[k] for k in sorted(set(np.linspace(0, len(near) - 1, min(len(near), self.most)).round().astype(int)))]
                levels.append(chosen)
                losses.append(np.interp(chosen, *curve(i)).tolist())
            try:
                state = cheapest(losses, *room.left(width, levels))
            except BudgetNotMet:
                return None
            return room.stream(width) | {i: levels[k][state[k]] for k, i in enumerate(room.inner)}

        found: dict[int, tuple[float, dict[int, int]]] = {}

        def try_widths(widths: Sequence[int]) -> int:
            for width in widths:
                even = room.even(width)
                if even is None or width in found:
                    continue
                ways = [room.counts(width, even), paced(width, even) if even else None]
                found[width] = min(((judge(units(way)), way) for way in ways if way is not None), key=lambda x: x[0])
                copies.forget()  # candidates of other widths share next to none
            return min(found, key=lambda w: found[w][0], default=0)

        best = try_widths(room.widths(self.steps))
        apart = room.size / self.steps
        best = try_widths([room.width(best + sign * apart / 2) for sign in (-1, 1)])
        if not found:
            raise BudgetNotMet("the budget cannot be met: the smallest network that units, ratio, round_to and ignore allow costs more")
        return {name: np.array(gone) for name, gone in units(found[best][1]).items()}


class _Room:
    """What a budget leaves for the insides of the layers at a width of the stream; candidates by their place in the list."""

    def __init__(self, statistics: Statistics, candidates: Sequence[Candidate], budget: Mapping[str, Any] | None) -> None:
        self.model, self.candidates = CostModel(statistics.program.analysis), candidates
        streams = [i for i, c in enumerate(candidates) if c.group.kind == "hidden"]
        self.streams = streams[:1]
        self.inner = [i for i in range(len(candidates)) if i not in streams]
        self.size = candidates[streams[0]].group.size if streams else 0
        if budget is None:  # as if every group lost the ratio
            even = allocate(statistics.program.analysis, candidates, Local())
            counts = {i: len(even.get(c.group.name, ())) for i, c in enumerate(candidates)}
            self.limits = {"params": float(self.cost(counts).params)}
        else:
            self.limits = limits_of(budget, self.model.cost({}))

    def cost(self, counts: Mapping[int, int]) -> Cost:
        return self.model.cost({self.candidates[i].group.atom: self.candidates[i].group.size - n for i, n in counts.items() if n})

    def fits(self, counts: Mapping[int, int]) -> bool:
        cost = self.cost(counts)
        return all(BUDGETS[name](cost) <= limit * (1 + 1e-12) for name, limit in self.limits.items())

    def level(self, i: int, part: float) -> int:
        """The largest allowed number of removed units up to a part of the group."""
        return max((n for n in self.candidates[i].removals if n <= part * self.candidates[i].group.size + 1e-9), default=0)

    def stream(self, width: int) -> dict[int, int]:
        return dict.fromkeys(self.streams, width)

    def counts(self, width: int, even: float) -> dict[int, int]:
        return self.stream(width) | {i: self.level(i, even) for i in self.inner}

    def even(self, width: int) -> float | None:
        """The smallest part that all insides have to lose; None where all of them do not suffice."""
        low, high = 0.0, 1.0
        if self.fits(self.counts(width, 0.0)):
            return 0.0
        if not self.fits(self.counts(width, 1.0)):
            return None
        while high - low > 1 / 1024:
            middle = (low + high) / 2
            low, high = (low, middle) if self.fits(self.counts(width, middle)) else (middle, high)
        return high

    def width(self, wanted: float) -> int:
        """The nearest number of directions that may go."""
        return min([0, *self.candidates[self.streams[0]].removals], key=lambda n: abs(n - wanted)) if self.streams else 0

    def widths(self, steps: int) -> list[int]:
        """From none to the first that meets the budget by itself."""
        out: list[int] = []
        for k in range(steps):
            width = self.width(k * self.size / steps)
            if width not in out:
                out.append(width)
                if self.fits(self.counts(width, 0.0)):
                    break
        return out

    def left(self, width: int, levels: Sequence[Sequence[int]]) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
        """By budget: what each level of each inside costs, against none removed, and how much all may cost."""
        kept = {self.candidates[i].group.atom: self.size - n for i, n in self.stream(width).items() if n}
        base = self.model.cost(kept)
        costs: dict[str, list[list[float]]] = {name: [] for name in self.limits}
        for i, row in zip(self.inner, levels):
            group = self.candidates[i].group
            whole = self.model.part(group.atom, kept)
            parts = [self.model.part(group.atom, {**kept, group.atom: group.size - n}) - whole for n in row]
            for name in self.limits:
                costs[name].append([float(BUDGETS[name](part)) for part in parts])
        return costs, {name: limit - float(BUDGETS[name](base)) for name, limit in self.limits.items()}


class _Widened:
    """Refitted readers, and norms over the stream that go on dividing by its old width (`norm_width`)."""

    def __init__(self, statistics: Statistics, copies: Copies) -> None:
        self.copies = copies
        self.stream = stream_of(statistics.program) if any(g.kind == "hidden" for g in statistics.program.analysis.groups) else None

    def __call__(self, removed: Mapping[str, Any]) -> dict[Value, Tensor]:
        found = dict(self.copies(removed))
        if self.stream is not None and (gone := len(removed.get(self.stream.group.name, ()))):
            size = self.stream.group.size
            for _, scale in self.stream.norms.values():
                assert scale.tensor is not None
                found[scale] = scale.tensor.detach() * math.sqrt(size / (size - gone))
        return found


RECIPES = (
    Recipe(
        name="slice_refit",
        paper="none: graphprune's own composition of SliceGPT (arXiv 2401.15024) and Tyr-the-Pruner (arXiv 2503.09657)",
        formula="directions: variance; units: tr(W_:P G_:P^T) + 1/2 tr(W_:P ([H^-1]_PP)^-1 W_:P^T), G = W H; levels by measured divergence",
        score=ByKind(),
        unit=("hidden", *INNER_UNITS),
        allocation=Together(),
        prepare="rotate",
        repair=("norm_width", "least_squares"),
    ),
)
