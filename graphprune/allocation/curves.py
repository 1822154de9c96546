"""Curves in closed form: how much each layer loses, from its place in the network or from how much it changes what passes it.

Each is a local scope (units compete within their group) with `ratios(groups, ratio, statistics)`: the fraction that goes by group name,
`ratio` on average over groups of one structure. Layers are found from structure (`graphprune.blocks`), never from names; groups outside of
all layers lose `ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphprune.allocation.allocate import Isomorphic, Local
from graphprune.blocks import stage_of
from graphprune.units import Group

if TYPE_CHECKING:
    from graphprune.calibration import Statistics

MOST = 0.99  # of a layer's units go at most


@dataclass(frozen=True)
class Window(Local):
    """The first and the last layers stay whole, and the others lose correspondingly more, all the same.

    Layers are numbered among the groups of equal structure, in topological order. At least one of them is cut.

    Args:
        first, last: layers that stay whole.
        depth: the number of layers that this is meant for; with fewer, both numbers shrink in proportion. None: never.
    """

    first: int = 4
    last: int = 2
    depth: int | None = 32

    def ratios(self, groups: Sequence[Group], ratio: float, statistics: Statistics) -> Mapping[str, float]:
        rivals = Isomorphic()
        alike: dict[Any, list[Group]] = {}
        for group in groups:
            alike.setdefault(rivals.rivals(group), []).append(group)
        out: dict[str, float] = {}
        for layers in alike.values():
            first, last = self._protected(len(layers))
            left = len(layers) - first - last
            for i, group in enumerate(layers):
                out[group.name] = min(ratio * len(layers) / left, MOST) if first <= i < first + left else 0.0
        return out

    def _protected(self, layers: int) -> tuple[int, int]:
        part = 1.0 if self.depth is None else min(1.0, layers / self.depth)
        first, last = round(self.first * part), round(self.last * part)
        if layers > first + last:
            return first, last
        return first * (layers - 1) // (first + last), last * (layers - 1) // (first + last)


@dataclass(frozen=True)
class Sigmoid(Local):
    """Layers keep in proportion to the sigmoid of how far they turn what passes them (angle between input and output of the layer).

    Args:
        sharpness: factor of the angle's distance from the mean.
        scale: the angle, as a fraction of half a turn, times this; 13.1 is what sums over 131072 tokens divided by 10000 amount to.
    """

    sharpness: float = 1.0
    scale: float = 13.1
    needs = ("stages",)

    def ratios(self, groups: Sequence[Group], ratio: float, statistics: Statistics) -> Mapping[str, float]:
        places = stage_of(statistics.program, groups)
        ends = list(dict.fromkeys(stage.end for stage in places.values()))
        if not ends:
            return {}
        similarity = statistics.observed("stages")
        keep = dict(zip(ends, self.kept([similarity[end].angle for end in ends], ratio)))
        return {name: 1 - keep[stage.end] for name, stage in places.items()}

    def kept(self, angles: Sequence[float], ratio: float) -> list[float]:
        """What each layer keeps; the spread shrinks where one would keep more than all."""
        mean = sum(angles) / len(angles)
        p = [1 / (1 + math.exp(-self.sharpness * self.scale * (angle - mean))) for angle in angles]
        middle = sum(p) / len(p)
        if max(p) / middle * (1 - ratio) >= 1:
            shrink = middle * (1 / (1 - ratio) - 1) / (max(p) - middle) / 1.05 if max(p) > middle else 0.0
            p = [middle + shrink * (found - middle) for found in p]
        return [found / middle * (1 - ratio) for found in p]


@dataclass(frozen=True)
class Increments(Local):
    """Micro-steps in which layers that change what passes them little (cosine of input and output) lose more than others.

    Each step adds 1 / steps - strength * I to what a layer has lost, with I the importance of the layer in [-1, 1], until the mean is the
    ratio asked for; the last step is a part of one.
    """

    steps: int = 50
    strength: float = 0.02
    needs = ("stages",)

    def ratios(self, groups: Sequence[Group], ratio: float, statistics: Statistics) -> Mapping[str, float]:
        places = stage_of(statistics.program, groups)
        ends = list(dict.fromkeys(stage.end for stage in places.values()))
        if not ends:
            return {}
        similarity = statistics.observed("stages")
        lost = dict(zip(ends, self.removed([similarity[end].cosine for end in ends], ratio)))
        return {name: lost[stage.end] for name, stage in places.items()}

    def importance(self, cosines: Sequence[float]) -> list[float]:
        """In [-1, 1]: minus the cosine about its mean, over the largest magnitude."""
        mean = sum(cosines) / len(cosines)
        most = max(abs(mean - c) for c in cosines)
        return [(mean - c) / most if most else 0.0 for c in cosines]

    def step(self, lost: Sequence[float], importance: Sequence[float]) -> list[float]:
        return [min(max(s + 1 / self.steps - self.strength * i, 0.0), MOST) for s, i in zip(lost, importance)]

    def removed(self, cosines: Sequence[float], ratio: float) -> list[float]:
        """What each layer loses, `ratio` on average."""
        importance, lost, target = self.importance(cosines), [0.0] * len(cosines), min(ratio, MOST) * len(cosines)
        while sum(lost) < target - 1e-12:
            after = self.step(lost, importance)
            gained = sum(after) - sum(lost)
            if gained <= 1e-12:  # what may lose more has lost all: the rest is shared among those that the steps leave whole
                rest = [MOST - s for s in lost]
                return [s + r * (target - sum(lost)) / sum(rest) for s, r in zip(lost, rest)]
            part = min(1.0, (target - sum(lost)) / gained)
            lost = [s + part * (a - s) for s, a in zip(lost, after)]
        return lost
