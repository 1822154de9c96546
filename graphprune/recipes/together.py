"""A scope that cuts the residual stream and the insides of the layers together, by measured loss: what `slice_refit` allocates with.

Whole candidates, refitted, are measured by the divergence of their outputs on calibration batches that nothing was fitted to. Under a
budget of latency the time of a cut is predicted from a few that are timed, and what is found is timed at the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from graphprune.allocation import BUDGETS, Candidate, Local, Measured, Removed, allocate, limits_of
from graphprune.allocation.search import cheapest
from graphprune.calibration import Statistics, batches
from graphprune.costs import Cost, CostModel
from graphprune.errors import BudgetNotMet
from graphprune.program import Value
from graphprune.recipes.tyr import Copies
from graphprune.repair.rotation import stream_of
from graphprune.verify.candidates import Masked

log = logging.getLogger("graphprune")

LOWER, NEAR = 0.985, 0.95  # of a latency: what is aimed at, as what is met by a hair is missed another time; what is near enough
ROUNDS = 4  # cuts that are timed until one meets it
PATIENCE = 3  # widths that are worse than the best, one after the other, before no more are tried


@dataclass(frozen=True)
class Together:
    """A scope that tries widths of the stream, the insides making up the rest of the budget, and keeps what is measured to be best.

    For a width two ways to cut the insides are measured, whole candidates with their refits: by an integer program on what each group alone
    loses, within a band about the even level, as losses of groups that are cut together do not add up far from it; and, where that is best,
    evenly. Under a budget of latency a few cuts are timed first, see `_Clock`, and what is found is timed at the end.

    Args:
        steps: widths tried are multiples of 2 / steps of the stream, and then halfway to both neighbours of the best one, twice.
        levels: fractions of a group at which it is measured alone; in between, losses are interpolated.
        band: levels may be so far from the even one.
        moves: how often levels then move, by what each alone changes about the cut that was found.
        step: by so much of a group at most, half of it after a move that did not help.
        share: of the calibration batches that measure; the others fit.
        most: levels of one group that the integer program chooses among.
    """

    steps: int = 24
    levels: tuple[float, ...] = (1 / 8, 3 / 8, 3 / 4)
    band: float = 0.2
    moves: int = 3
    step: float = 1 / 8
    share: float = 1 / 4
    most: int = 32

    # units of one group are ranked among themselves; not a `Local` scope, as a group may lose more than the ratio
    rivals, worth = Local.rivals, Local.worth
    timed = True  # takes budgets of latency

    def search(
        self,
        candidates: Sequence[Candidate],
        budget: Mapping[str, Any] | None,
        statistics: Statistics,
        measured: Measured | None = None,
    ) -> dict[str, np.ndarray]:
        """Units to remove, by group name; `measured` times candidates, where there is a budget of latency."""
        items = [item for _, item in batches(statistics.program, statistics.data)]
        held = math.ceil(self.share * len(items)) if len(items) > 1 else 0  # what copies are fitted to does not judge them
        fitted = Statistics(statistics.program, items[held:])
        copies = Copies(fitted, [c.group for c in candidates])
        judge = Masked(Statistics(statistics.program, items[:held] or items), tensors=_Widened(fitted, copies))
        alone = judge.on_first(math.ceil(len(judge.batches) / 2))  # most of the runs
        orders = [np.argsort(c.scores, kind="stable") for c in candidates]
        room = _Room(statistics, candidates, budget, measured is not None)
        curves: dict[int, list[float]] = {}

        def units(counts: Mapping[int, int]) -> dict[str, list[int]]:
            return {candidates[i].group.name: sorted(orders[i][:n].tolist()) for i, n in counts.items() if n}

        if measured is not None:
            room.clock = _Clock(room, measured, units)

        def curve(i: int) -> tuple[list[int], list[float]]:
            allowed = np.array(room.allowed(i))
            tried = sorted({int(allowed[np.abs(allowed - x * candidates[i].group.size).argmin()]) for x in self.levels} - {0})
            if i not in curves:
                losses = alone.many([units({i: n}) for n in tried])
                curves[i] = np.maximum.accumulate([0.0, *losses]).tolist()
            return [0, *tried], curves[i]

        def cheap(width: int, reach: Sequence[Sequence[int]], known: Sequence[tuple[list[int], list[float]]]) -> dict[int, int] | None:
            """Levels of least loss that the budget allows, of those in reach; losses are known at some levels."""
            levels = [
                [row[k] for k in sorted(set(np.linspace(0, len(row) - 1, min(len(row), self.most)).round().astype(int)))] for row in reach
            ]
            losses = [np.interp(row, *curve).tolist() for row, curve in zip(levels, known)]
            try:
                state = cheapest(losses, *room.left(width, levels))
            except BudgetNotMet:
                return None
            return room.stream(width) | {i: levels[k][state[k]] for k, i in enumerate(room.inner)}

        def paced(width: int, even: float) -> dict[int, int] | None:
            reach = []
            for i in room.inner:
                allowed, size = room.allowed(i), candidates[i].group.size
                band = max(self.band * size, *np.diff(allowed))  # a few heads leave the choice of the next level to either side
                reach.append([n for n in allowed if abs(n - even * size) <= band + 1e-9])
            return cheap(width, reach, [curve(i) for i in room.inner])

        def moved(width: int, way: dict[int, int], step: float) -> dict[int, int] | None:
            """Levels close to those of a cut, by what changing each of them there does to the loss."""
            tried = {}
            for i in room.inner:
                allowed, apart = np.array(room.allowed(i)), max(1.0, step * candidates[i].group.size)
                tried[i] = sorted({int(allowed[np.abs(allowed - way[i] - sign * apart).argmin()]) for sign in (-1, 0, 1)} | {way[i]})
            others = [(i, n) for i in room.inner for n in tried[i] if n != way[i]]
            base, *losses = alone.many([units(way), *(units(way | {i: n}) for i, n in others)])
            loss = dict(zip(others, losses))
            known = [(tried[i], [loss.get((i, n), base) for n in tried[i]]) for i in room.inner]
            reach = [[n for n in room.allowed(i) if tried[i][0] <= n <= tried[i][-1]] for i in room.inner]
            copies.forget()
            return cheap(width, reach, known)

        found: dict[int, tuple[float, dict[int, int]]] = {}

        def measure(width: int, way: dict[int, int]) -> None:
            loss = judge(units(way))
            found[width] = min(found.get(width, (math.inf, way)), (loss, way), key=lambda x: x[0])
            copies.forget()  # candidates share next to none
            log.debug("%d of the stream, %s of the insides: %.5f", width, [n for i, n in way.items() if i in room.inner], loss)

        def best(widths: Iterable[float]) -> int:
            since = 0
            for width in map(room.width, widths):
                even = room.even(width)
                if even is not None and width not in found:
                    measure(width, (paced(width, even) if even else None) or room.counts(width, even))
                    since = since + 1 if found[width][0] > min(loss for loss, _ in found.values()) else 0
                if since == PATIENCE:
                    break
            return min(found, key=lambda w: found[w][0], default=0)

        def chosen(widths: Iterable[float], closer: Sequence[int] = (1, 2)) -> tuple[float, dict[int, int]]:
            width = best(widths)
            for part in closer:
                width = best(width + sign * room.size / self.steps / part for sign in (-1, 1))
            if not found:
                raise BudgetNotMet("the budget cannot be met: the smallest network that units, ratio, round_to and ignore allow costs more")
            if even := room.even(width):
                measure(width, room.counts(width, even))
                step = self.step
                for _ in range(self.moves):
                    before = found[width]
                    if (way := moved(width, before[1], step)) is not None and way != before[1]:
                        measure(width, way)
                    if found[width] is before:
                        if all(step * candidates[i].group.size <= 1 for i in room.inner):
                            break  # single units were tried
                        step /= 2
            return found[width]

        loss, way = chosen(room.widths(self.steps // 2))
        clock, met = room.clock, []
        for turn in range(ROUNDS if clock is not None else 0):
            assert clock is not None and measured is not None
            time = clock.time(units(way))
            if time <= clock.amount:
                met.append((loss, turn, way, measured.found["latency_ms"]))
            if NEAR * clock.amount <= time <= clock.amount or turn == ROUNDS - 1:
                break
            clock.limit += LOWER * clock.amount - time
            width = sum(way.get(i, 0) for i in room.streams)
            found.clear()
            loss, way = chosen([width, width - room.size / self.steps, width + room.size / self.steps], ())
        if clock is not None and measured is not None:
            if not met:
                raise BudgetNotMet(f"latency_ms {measured.target} was asked for; what was found takes {time:.0%} of the network as it is")
            _, _, way, measured.found["latency_ms"] = min(met)
        return {name: np.array(gone) for name, gone in units(way).items()}


class _Clock:
    """Predicts the time of a cut, as a part of the dense network's, from a few that are timed: each kind of group with about half of its
    units gone, and all kinds at once, as insides save less in a narrower stream. Groups of a kind share what they save by their MACs.

    Args:
        units: counts by place -> units by group name.
    """

    def __init__(self, room: _Room, measured: Measured, units: Callable[[Mapping[int, int]], Removed]) -> None:
        assert measured.target is not None
        self.measured = measured
        half = {i: max((n for n in c.removals if n <= c.group.size / 2), default=0) for i, c in enumerate(room.candidates)}
        self.parts: dict[int, float] = {}  # by place: what one unit saves
        self.narrow, together = 0.0, self.time(units(half))
        dense = room.model.cost({}).macs

        def alone(places: Sequence[int]) -> float:
            saved = max(0.0, 1 - self.time(units({i: half[i] for i in places})))
            work = {i: dense - room.cost({i: half[i]}).macs or half[i] for i in places}
            self.parts.update({i: saved * work[i] / max(sum(work.values()), 1) / max(half[i], 1) for i in places})
            return saved

        stream = alone(room.streams) if room.streams else 0.0
        kinds = dict.fromkeys(room.candidates[i].group.kind for i in room.inner)
        inner = sum(alone([i for i in room.inner if room.candidates[i].group.kind == kind]) for kind in kinds)
        if stream > 0 and inner > 0:  # together = 1 - stream - inner (1 - narrow x), x the part of the stream that is gone
            gone = half[room.streams[0]] / room.size
            self.narrow = min(1.0, max(0.0, (together - 1 + stream + inner) / (inner * gone)))
        self.amount = measured.target.amount / (1.0 if measured.target.relative else measured.found["latency_ms"][0])
        self.limit = LOWER * self.amount

    def time(self, removed: Removed) -> float:
        """Measured, as a part of the dense network's."""
        self.measured.share(removed)
        dense, candidate = self.measured.found["latency_ms"]
        return candidate / dense

    def saved(self, place: int, count: int, gone: float) -> float:
        """What units save where the part `gone` of the stream is gone."""
        return self.parts[place] * count * (1 - self.narrow * gone)


class _Room:
    """What a budget leaves for the insides of the layers at a width of the stream; candidates by their place in the list."""

    clock: _Clock | None = None

    def __init__(self, statistics: Statistics, candidates: Sequence[Candidate], budget: Mapping[str, Any] | None, timed: bool) -> None:
        self.model, self.candidates = CostModel(statistics.program.analysis), candidates
        streams = [i for i, c in enumerate(candidates) if c.group.kind == "hidden"]
        self.streams = streams[:1]
        self.inner = [i for i in range(len(candidates)) if i not in streams]
        self.size = candidates[streams[0]].group.size if streams else 0
        if budget is None and not timed:  # as if every group lost the ratio
            even = allocate(statistics.program.analysis, candidates, Local())
            counts = {i: len(even.get(c.group.name, ())) for i, c in enumerate(candidates)}
            self.limits = {"params": float(self.cost(counts).params)}
        else:
            self.limits = limits_of(budget, self.model.cost({})) if budget else {}

    def cost(self, counts: Mapping[int, int]) -> Cost:
        return self.model.cost({self.candidates[i].group.atom: self.candidates[i].group.size - n for i, n in counts.items() if n})

    def fits(self, counts: Mapping[int, int]) -> bool:
        cost = self.cost(counts)
        if not all(BUDGETS[name](cost) <= limit * (1 + 1e-12) for name, limit in self.limits.items()):
            return False
        return self.clock is None or sum(self.saved(i, n, counts) for i, n in counts.items()) >= 1 - self.clock.limit - 1e-12

    def saved(self, i: int, count: int, counts: Mapping[int, int]) -> float:
        """The part of the time that units of one group save."""
        assert self.clock is not None
        gone = sum(counts.get(k, 0) for k in self.streams) / max(self.size, 1)
        return self.clock.saved(i, count, 0.0 if i in self.streams else gone)

    def allowed(self, i: int) -> list[int]:
        """How many units may go, none included."""
        return [0, *self.candidates[i].removals]

    def level(self, i: int, part: float) -> int:
        """The largest allowed number of removed units up to a part of the group."""
        return max(n for n in self.allowed(i) if n <= part * self.candidates[i].group.size + 1e-9)

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
            if self.clock is not None:
                costs.setdefault("latency_ms", []).append([-self.saved(i, n, self.stream(width)) for n in row])
        rest = {name: limit - float(BUDGETS[name](base)) for name, limit in self.limits.items()}
        if self.clock is not None:
            rest["latency_ms"] = self.clock.limit - 1 + sum(self.saved(i, n, {}) for i, n in self.stream(width).items())
        return costs, rest


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
