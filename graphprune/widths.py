"""Of what the kept width of a layer is to be a multiple: the rule, and what times of a device say in its place.

A plan that keeps multiples of m instead of single units keeps up to m - 1 units more. That pays where the device runs the width asked for
slower than the larger one. So a multiple is judged by the time of the widths that it leads to: those of `samples` networks cut to awkward
widths, each rounded up to the multiple. The smallest multiple within `TOLERANCE` of the fastest is taken, for each size that was measured;
a layer follows the size next to its own, for tiles that are a small part of a wide layer are a large one of a narrow layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
ALIGNED = 8  # the rule's multiple
BLOCK = 4  # ONNX Runtime's convolutions on a CPU fall back to slow ones for channels that are no multiple of this
COARSEST = 4  # a multiple is at most one part in so many of the width, or small cuts would remove nothing
TOLERANCE = 1.03
NEIGHBOUR = 1 / 2  # the weight of a sample of twice or half the size

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A network with a hidden layer of `size`, to be cut to `wanted` units; times by kept width, in any unit."""

    size: int
    wanted: int
    times: Mapping[int, float]


BySize = Sequence[tuple[int, Sequence[float]]]  # size of the hidden layer, and by multiple how long its widths take
Steps = int | tuple[tuple[int, int], ...]  # one multiple for all, or (size, multiple) of the sizes that were measured


@dataclass(frozen=True)
class Costs:
    """Times of the widths that each of `MULTIPLES` leads to, relative to the fastest: for each size, geometric means over samples."""

    linear: BySize
    convolution: BySize

    def __post_init__(self) -> None:
        for found in (self.linear, self.convolution):
            if not found:
                raise ValueError("costs of one size at least are needed")
            for size, costs in found:
                if len(costs) != len(MULTIPLES) or not all(isinstance(it, (int, float)) and 0 < it < math.inf for it in (size, *costs)):
                    raise ValueError(f"{len(MULTIPLES)} positive numbers are needed for a size, found {costs!r} for {size!r}")


@dataclass(frozen=True)
class Widths:
    """The multiples by kind of layer, and where they are from."""

    linear: Steps = ALIGNED
    convolution: Steps = ALIGNED
    source: str = "by rule"
    narrow: int = 1  # the most for convolutions that are narrower than those that the others are for
    most: int = MULTIPLES[-1]

    @classmethod
    def measured(cls, found: Sequence[Costs], source: str) -> Widths:
        """What costs measured at one place say; of several types of numbers, the coarsest."""

        def steps(tables: Sequence[BySize]) -> Steps:
            sizes = sorted({size for table in tables for size, _ in table})
            return tuple((size, max(smallest(_nearest(table, size)) for table in tables)) for size in sizes)

        return cls(steps([it.linear for it in found]), steps([it.convolution for it in found]), source, ALIGNED)

    def multiple(self, convolution: bool, width: int) -> int:
        """What layers of about this width keep multiples of."""
        steps = self.convolution if convolution else self.linear
        return min(self.most, steps if isinstance(steps, int) else _nearest(steps, width))

    @property
    def coarsest(self) -> int:
        return min(self.most, max(max(_multiples(it)) for it in (self.linear, self.convolution)))

    def finer(self) -> Widths:
        """Half of what is coarsest, down to the rule."""
        return replace(self, most=max(ALIGNED, self.coarsest // 2))

    def __str__(self) -> str:
        linear, convolution = (_text(it) for it in (self.linear, self.convolution))
        what = linear if linear == convolution else f"{linear} (linear) and {convolution} (convolutions)"
        return f"multiples of {what}, {self.source}"


def _nearest(table: Sequence[tuple[int, T]], width: int) -> T:
    """The entry of the size next to a width, by their ratio."""
    return min(table, key=lambda it: abs(math.log(it[0] / width)))[1]


def _multiples(steps: Steps) -> tuple[int, ...]:
    return (steps,) if isinstance(steps, int) else tuple(multiple for _, multiple in steps)


def _text(steps: Steps) -> str:
    if isinstance(steps, int) or len(set(_multiples(steps))) == 1:
        return str(_multiples(steps)[0])
    return ", ".join(f"{multiple} at {size}" for size, multiple in steps)


RULE = Widths()


def fitted(multiple: int, width: int) -> int:
    """The multiple, halved while it is a large part of the width."""
    while multiple > 1 and multiple * COARSEST > width:
        multiple //= 2
    return multiple


def kept(size: int, wanted: int, multiple: int) -> int:
    """The width that a plan keeps of `size` where `wanted` units are asked for."""
    step = fitted(multiple, size)
    return min(size, -(-wanted // step) * step)


def widths_of_sample(size: int, wanted: int) -> tuple[int, ...]:
    """All widths that the multiples lead to: what has to be timed."""
    return tuple(dict.fromkeys(kept(size, wanted, multiple) for multiple in MULTIPLES))


def relative_costs(samples: Sequence[Sample]) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """By size and multiple: the time of the width that it leads to over that of the fastest.

    Geometric means over samples; one of another size counts the less the further off it is, and decides where those of a size cannot tell
    (two multiples often lead to one width).
    """
    logs = [[math.log(it.times[kept(it.size, it.wanted, multiple)] / min(it.times.values())) for multiple in MULTIPLES] for it in samples]
    found = []
    for size in sorted({sample.size for sample in samples}):
        weights = [NEIGHBOUR ** abs(math.log2(it.size / size)) for it in samples]
        means = (sum(w * row[i] for w, row in zip(weights, logs)) / sum(weights) for i in range(len(MULTIPLES)))
        found.append((size, tuple(math.exp(it) for it in means)))
    return tuple(found)


def smallest(costs: Sequence[float]) -> int:
    """The smallest multiple whose cost is within the tolerance of the best."""
    return next(multiple for multiple, cost in zip(MULTIPLES, costs) if cost <= TOLERANCE * min(costs))
