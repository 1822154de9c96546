"""Of what the kept width of a layer is to be a multiple: the rule, and what times of a device say in its place.

A plan that keeps multiples of m instead of single units keeps up to m - 1 units more. That pays where the device runs the width asked for
slower than the larger one. So a multiple is judged by the time of the widths that it leads to: those of `samples` networks cut to awkward
widths, each rounded up to the multiple. The smallest multiple within `TOLERANCE` of the fastest is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
ALIGNED = 8  # the rule's multiple
BLOCK = 4  # ONNX Runtime's convolutions on a CPU fall back to slow ones for channels that are no multiple of this
COARSEST = 4  # a multiple is at most one part in so many of the width, or small cuts would remove nothing
TOLERANCE = 1.03


@dataclass(frozen=True)
class Sample:
    """A network with a hidden layer of `size`, to be cut to `wanted` units; times by kept width, in any unit."""

    size: int
    wanted: int
    times: Mapping[int, float]


@dataclass(frozen=True)
class Costs:
    """Times of the widths that each of `MULTIPLES` leads to, relative to the fastest: geometric means over samples."""

    linear: Sequence[float]
    convolution: Sequence[float]

    def __post_init__(self) -> None:
        for found in (self.linear, self.convolution):
            if len(found) != len(MULTIPLES) or not all(isinstance(it, (int, float)) and 0 < it < math.inf for it in found):
                raise ValueError(f"{len(MULTIPLES)} positive numbers are needed, found {found!r}")


@dataclass(frozen=True)
class Widths:
    """The multiples by kind of layer, and where they are from."""

    linear: int = ALIGNED
    convolution: int = ALIGNED
    source: str = "by rule"
    narrow: int = 1  # the most for convolutions that are narrower than those that the others are for

    @classmethod
    def measured(cls, found: Sequence[Costs], source: str) -> Widths:
        """What costs measured at one place say; of several types of numbers, the coarsest."""
        return cls(max(smallest(it.linear) for it in found), max(smallest(it.convolution) for it in found), source, ALIGNED)

    def finer(self) -> Widths:
        """Half of what is coarser than the rule."""
        linear, convolution = (it // 2 if it > ALIGNED else it for it in (self.linear, self.convolution))
        return Widths(linear, convolution, self.source, self.narrow)

    def __str__(self) -> str:
        same = self.linear == self.convolution
        what = f"multiples of {self.linear}" if same else f"multiples of {self.linear} (linear) and {self.convolution} (convolutions)"
        return f"{what}, {self.source}"


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


def relative_costs(samples: Sequence[Sample]) -> tuple[float, ...]:
    """By multiple: the time of the width that it leads to over that of the fastest, geometric mean over samples."""
    logs = [0.0] * len(MULTIPLES)
    for sample in samples:
        fastest = min(sample.times.values())
        for i, multiple in enumerate(MULTIPLES):
            logs[i] += math.log(sample.times[kept(sample.size, sample.wanted, multiple)] / fastest)
    return tuple(math.exp(it / len(samples)) for it in logs)


def smallest(costs: Sequence[float]) -> int:
    """The smallest multiple whose cost is within the tolerance of the best."""
    return next(multiple for multiple, cost in zip(MULTIPLES, costs) if cost <= TOLERANCE * min(costs))
