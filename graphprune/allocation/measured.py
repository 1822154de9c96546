"""Budgets that only a built candidate can answer: milliseconds, and a metric of the user's.

Candidates are the prefixes of one sequence of removals, from the units that go first to those that go last. Latency asks for the shortest
prefix that is fast enough, a drop of accuracy alone for the longest that is good enough; both are found by bisection. With several budgets
the shortest prefix that meets sizes and latency is taken, and its accuracy has to be within the drop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphprune.errors import BudgetNotMet, InvalidInput

log = logging.getLogger("graphprune")

Removed = Mapping[str, Any]  # group name -> removed units
Measure = Callable[[str, Removed], tuple[float, float]]  # (budget name, removed units) -> (the candidate's, the dense network's)

MEASURED = ("latency_ms", "accuracy_drop")
BAND = (0.85, 1.05)  # of the target latency: where a candidate is taken without looking further, and where the result must end
AIM = 0.92  # a first candidate between this and the target ends the bisection
FINEST = 0.01  # of all removals: closer than this, accuracies are not told apart
CONFIRMATIONS = 4  # second looks at a latency that was met by luck


def split(budget: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Budgets that sizes answer, and those that have to be measured."""
    given = dict(budget) if isinstance(budget, Mapping) else {}
    return {k: v for k, v in given.items() if k not in MEASURED}, {k: v for k, v in given.items() if k in MEASURED}


@dataclass(frozen=True)
class Target:
    """A latency in ms, or as a fraction of the dense network's."""

    amount: float
    relative: bool

    @classmethod
    def of(cls, value: Any) -> Target:
        """Raises:
        InvalidInput: it is no amount.
        """
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = 0.0
        relative = text.endswith("%")
        if isinstance(value, bool) or not 0 < number < float("inf") or (relative and number > 100):
            raise InvalidInput(f"budget latency_ms={value!r} is milliseconds (5.0), or a part of what the network takes now ('60%')")
        return cls(number / 100 if relative else number, relative)

    def share(self, found: tuple[float, float]) -> float:
        """What a candidate takes, as a multiple of the target."""
        return found[0] / (self.amount * (found[1] if self.relative else 1.0))

    def __str__(self) -> str:
        return f"{self.amount:.0%} of the network as it is" if self.relative else f"{self.amount:.4g} ms"


def drop_of(value: Any) -> float:
    """Raises:
    InvalidInput: it is no drop.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InvalidInput(f"budget accuracy_drop={value!r} is how much the metric may fall, in its own unit, as in 0.01")
    return float(value)


@dataclass
class Measured:
    """The measured budgets of one call.

    Args:
        budget: `latency_ms` and `accuracy_drop`, one or both.
        measure: builds and measures candidates; see `Measure`.
    """

    budget: Mapping[str, Any]
    measure: Measure | None
    found: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the prefix that was taken: (dense, candidate)

    def __post_init__(self) -> None:
        self.target = Target.of(self.budget["latency_ms"]) if "latency_ms" in self.budget else None
        self.drop = drop_of(self.budget["accuracy_drop"]) if "accuracy_drop" in self.budget else None
        if self.measure is None:
            raise InvalidInput(f"budget {next(iter(self.budget))} needs candidates to be built and measured; use graphprune.compile")

    def prefix(self, removed: Callable[[int], Removed], least: int, most: int) -> int:
        """How many removals: between `least` (asked for by other budgets) and `most` (all that constraints allow).

        Raises:
            BudgetNotMet: no such prefix, with what was measured.
        """
        count = self._fast(removed, least, most) if self.target is not None else least
        if self.drop is not None:
            free = self.target is None and least == 0
            count = self._good(removed, most) if free else self._checked(removed, count)
        return count

    # ---- latency

    def _fast(self, removed: Callable[[int], Removed], least: int, most: int) -> int:
        assert self.target is not None
        share = self.share(removed(most))
        if share > BAND[1]:
            dense, fastest = self.found["latency_ms"]
            raise BudgetNotMet(
                f"the budget cannot be met: latency_ms {self.target} was asked for; the network takes {dense:.4g} ms, and {fastest:.4g} ms "
                "once all is gone that units, ratio, round_to, min_keep and ignore allow"
            )
        dense = self.found["latency_ms"][0]
        if (self.share(removed(least)) if least else self.target.share((dense, dense))) <= 1.0:
            met_by = "what other budgets ask for" if least else "the network as it is"
            log.warning("the latency is met by %s; nothing more is removed", met_by)
            self.found["latency_ms"] = self.found["latency_ms"] if least else (dense, dense)
            return least
        low, high = least, most  # prefixes up to `low` are too slow, `high` is fast enough
        while high - low > 1:
            middle = (low + high) // 2
            share = self.share(removed(middle))
            if share > 1.0:
                low = middle
            else:
                high = middle
            if AIM <= share <= 1.0:
                break
        for _ in range(CONFIRMATIONS):  # what was met by luck is not met a second time
            if high == most or self.share(removed(high)) <= 1.0:
                break
            high = min(most, high + max(1, (most - least) // 32))
        self.share(removed(high))
        return high

    def share(self, removed: Removed) -> float:
        """What a candidate takes, as a multiple of the target; `found` says how long both took."""
        assert self.measure is not None and self.target is not None
        candidate, dense = self.measure("latency_ms", removed)
        self.found["latency_ms"] = (dense, candidate)
        log.info("candidate with %d units less: %.4g ms of %.4g", sum(map(len, removed.values())), candidate, dense)
        return self.target.share((candidate, dense))

    # ---- accuracy

    def _good(self, removed: Callable[[int], Removed], most: int) -> int:
        """The longest prefix found whose drop is within the budget; the empty one is."""
        low, high = 0, most + 1
        kept: dict[int, tuple[float, float]] = {}
        while high - low > max(1, round(FINEST * most)):
            middle = (low + high) // 2
            if self._within(removed(middle)):
                low = middle
                kept[low] = self.found["accuracy_drop"]
            else:
                high = middle
        if low == 0:
            dense, candidate = self.found["accuracy_drop"]
            raise BudgetNotMet(
                f"the budget cannot be met: accuracy_drop {self.drop:.4g} was asked for; the metric falls from {dense:.4g} to "
                f"{candidate:.4g} with the smallest cut tried"
            )
        self.found["accuracy_drop"] = kept[low]
        return low

    def _checked(self, removed: Callable[[int], Removed], count: int) -> int:
        if not self._within(removed(count)):
            dense, candidate = self.found["accuracy_drop"]
            raise BudgetNotMet(
                f"the budgets cannot be met together: the smallest cut that meets the others takes the metric from {dense:.4g} to "
                f"{candidate:.4g}, and accuracy_drop {self.drop:.4g} was asked for"
            )
        return count

    def _within(self, removed: Removed) -> bool:
        assert self.measure is not None and self.drop is not None
        candidate, dense = self.measure("accuracy_drop", removed)
        self.found["accuracy_drop"] = (dense, candidate)
        log.info("candidate with %d units less: metric %.4g of %.4g", sum(map(len, removed.values())), candidate, dense)
        return dense - candidate <= self.drop + 1e-12
