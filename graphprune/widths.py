"""Of what the kept width of a layer is to be a multiple: the rule, and what times of a device say in its place.

A plan that keeps multiples of m instead of single units keeps up to m - 1 units more. That pays where the device runs the width asked for
slower than the larger one. So a multiple is judged by the time of the widths that it leads to: those of `samples` networks cut to awkward
widths, each rounded up to the multiple. Of the multiples that cost no more than the smallest within `TOLERANCE` of the fastest the coarsest
is taken, for each size that was measured: units that cost no time are worth keeping. A layer follows the size next to its own, for tiles
that are a small part of a wide layer are a large one of a narrow layer.

A multiple does not say whether a cut pays at all: libraries have fast kernels for some widths only, and 48 channels can take longer than
the 64 that they were cut from. So eighths of each size are timed beside the whole. A width is kept only where the eighth that it fits into
lies on the lower envelope of these times, clearly below the larger ones and the whole. Else the next wider one that does is kept, or all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
ALIGNED = 8  # the rule's multiple
BLOCK = 4  # ONNX Runtime's convolutions on a CPU fall back to slow ones for channels that are no multiple of this
COARSEST = 4  # a multiple is at most one part in so many of the width, or small cuts would remove nothing
TOLERANCE = 1.03
NEIGHBOUR = 1 / 2  # the weight of a sample of twice or half the size
EIGHTHS = (4, 5, 6, 7)  # of a size, timed beside the whole

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A network with a hidden layer of `size`, to be cut to `wanted` units; times by kept width, in any unit."""

    size: int
    wanted: int
    times: Mapping[int, float]


BySize = Sequence[tuple[int, Sequence[float]]]  # size of the hidden layer, and how long its widths take: by multiple, or by eighth
Steps = int | tuple[tuple[int, int], ...]  # one multiple for all, or (size, multiple) of the sizes that were measured
Paying = tuple[tuple[int, tuple[int, ...]], ...]  # (size, those of `EIGHTHS` that are worth a cut) of the sizes that were measured


@dataclass(frozen=True)
class Costs:
    """What was measured, for each size geometric means over samples.

    Attributes:
        linear, convolution: times of the widths that each of `MULTIPLES` leads to, relative to the fastest.
        linear_eighths, convolution_eighths: times of `EIGHTHS` of the size, relative to the whole.
    """

    linear: BySize
    convolution: BySize
    linear_eighths: BySize = ()
    convolution_eighths: BySize = ()

    def __post_init__(self) -> None:
        if not self.linear or not self.convolution:
            raise ValueError("costs of one size at least are needed")
        for found, wanted in (
            (self.linear, MULTIPLES), (self.convolution, MULTIPLES), (self.linear_eighths, EIGHTHS), (self.convolution_eighths, EIGHTHS),
        ):  # fmt: skip
            for size, costs in found:
                if len(costs) != len(wanted) or not all(isinstance(it, (int, float)) and 0 < it < math.inf for it in (size, *costs)):
                    raise ValueError(f"{len(wanted)} positive numbers are needed for a size, found {costs!r} for {size!r}")


@dataclass(frozen=True)
class Widths:
    """The multiples by kind of layer, and where they are from."""

    linear: Steps = ALIGNED
    convolution: Steps = ALIGNED
    source: str = "by rule"
    narrow: int = 1  # the most for convolutions that are narrower than those that the others are for
    most: int = MULTIPLES[-1]
    linear_paying: Paying = ()
    convolution_paying: Paying = ()

    @classmethod
    def measured(cls, found: Sequence[Costs], source: str) -> Widths:
        """What costs measured at one place say; of several types of numbers, the coarsest, and what pays in all of them."""

        def steps(tables: Sequence[BySize]) -> Steps:
            sizes = sorted({size for table in tables for size, _ in table})
            return tuple((size, max(best_multiple(_nearest(table, size)) for table in tables)) for size in sizes)

        def paying(tables: Sequence[BySize]) -> Paying:
            sizes = sorted({size for table in tables for size, _ in table})
            return tuple((size, worth_it([max(it) for it in zip(*(_nearest(table, size) for table in tables if table))])) for size in sizes)

        return cls(
            steps([it.linear for it in found]), steps([it.convolution for it in found]), source, ALIGNED,
            linear_paying=paying([it.linear_eighths for it in found]), convolution_paying=paying([it.convolution_eighths for it in found]),
        )  # fmt: skip

    def multiple(self, convolution: bool, width: int) -> int:
        """What layers of about this width keep multiples of."""
        steps = self.convolution if convolution else self.linear
        return min(self.most, steps if isinstance(steps, int) else _nearest(steps, width))

    def pays(self, convolution: bool, size: int, width: int) -> bool:
        """Whether a layer of `size` is clearly faster at this width than at the larger ones that were measured.

        It counts as the eighth that it fits into, outside the measured ones as that next to it.
        """
        measured = self.convolution_paying if convolution else self.linear_paying
        eighth = min(max(EIGHTHS[0], -(-8 * width // size)), EIGHTHS[-1])
        return not measured or eighth in _nearest(measured, size)

    @property
    def coarsest(self) -> int:
        return min(self.most, max(max(_multiples(it)) for it in (self.linear, self.convolution)))

    def finer(self) -> Widths:
        """Half of what is coarsest, down to the rule."""
        return replace(self, most=max(ALIGNED, self.coarsest // 2))

    def __str__(self) -> str:
        linear, convolution = (_text(it) for it in (self.linear, self.convolution))
        what = linear if linear == convolution else f"{linear} (linear) and {convolution} (convolutions)"
        tables = (("linear", self.linear_paying), ("convolutions", self.convolution_paying))
        found = [(poor(size, paying), size, kind) for kind, table in tables for size, paying in table]
        without = "".join(f", not {', '.join(map(str, them))} of {size} ({kind})" for them, size, kind in found if them)
        return f"multiples of {what}{without}, {self.source}"


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
    """All widths that the multiples lead to, the eighths and the whole: what has to be timed."""
    return tuple(dict.fromkeys((*(kept(size, wanted, multiple) for multiple in MULTIPLES), *(size * it // 8 for it in EIGHTHS), size)))


def relative_costs(samples: Sequence[Sample]) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """By size and multiple: the time of the width that it leads to over that of the fastest.

    Geometric means over samples; one of another size counts the less the further off it is, and decides where those of a size cannot tell
    (two multiples often lead to one width).
    """
    widths = [[kept(it.size, it.wanted, multiple) for multiple in MULTIPLES] for it in samples]
    logs = [[math.log(it.times[w] / min(it.times[v] for v in row)) for w in row] for it, row in zip(samples, widths)]
    found = []
    for size in sorted({sample.size for sample in samples}):
        weights = [NEIGHBOUR ** abs(math.log2(it.size / size)) for it in samples]
        means = (sum(w * row[i] for w, row in zip(weights, logs)) / sum(weights) for i in range(len(MULTIPLES)))
        found.append((size, tuple(math.exp(it) for it in means)))
    return tuple(found)


def best_multiple(costs: Sequence[float]) -> int:
    """The coarsest multiple that costs no more than the smallest one within the tolerance of the best."""
    enough = next(cost for cost in costs if cost <= TOLERANCE * min(costs))
    return max(multiple for multiple, cost in zip(MULTIPLES, costs) if cost <= enough)


def relative_eighths(samples: Sequence[Sample]) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """By size and eighth: its time over that of the whole; geometric means over the samples of the size."""
    found = []
    for size in sorted({sample.size for sample in samples}):
        times = [it.times for it in samples if it.size == size]
        found.append((size, tuple(math.prod(it[size * part // 8] / it[size] for it in times) ** (1 / len(times)) for part in EIGHTHS)))
    return tuple(found)


def worth_it(times: Sequence[float]) -> tuple[int, ...]:
    """Those of `EIGHTHS` that take no longer than any larger one, and clearly less than the whole and the larger ones that pay."""
    paying: list[int] = []
    best = fastest = 1.0  # of the whole
    for part, spent in reversed(list(zip(EIGHTHS, times))):
        if spent <= best and spent * TOLERANCE <= fastest:
            paying.append(part)
            fastest = spent
        best = min(best, spent)
    return tuple(reversed(paying))


def poor(size: int, paying: Collection[int]) -> tuple[int, ...]:
    """The eighths of a size that are not worth a cut, as widths."""
    return tuple(size * part // 8 for part in reversed(EIGHTHS) if part not in paying)
