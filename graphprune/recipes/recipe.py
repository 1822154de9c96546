"""A published method as the composition of its four parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphprune.importance import Importance
from graphprune.sparsity.methods import Weights
from graphprune.units import DEFAULT_UNITS


@dataclass(frozen=True)
class Recipe:
    """UNIT x SCORE x ALLOCATION x REPAIR.

    A recipe names no architecture: it works wherever its unit exists. What a user passes besides (`ignore`, `round_to`, budgets, other
    `units`) goes on top of it.
    """

    name: str
    paper: str  # authors, year, arXiv id
    formula: str  # the score, for people
    score: Importance | Weights
    unit: tuple[str, ...] | str = DEFAULT_UNITS  # kinds of groups; for weights the pattern
    allocation: Any = "local"  # a scope, by name or as an object
    repair: tuple[str, ...] = ()
    prepare: str = ""  # of `graphprune.prepare.PREPARATIONS`: what is done to the network before units are chosen
    data: bool = True  # takes calibration data
    noise: int = 0  # batches of random inputs that stand for calibration data where none are given
    deviations: str = ""  # from the paper

    @property
    def sparse(self) -> bool:
        """Does it put zeros into tensors, in place of removing units?"""
        return isinstance(self.score, Weights)

    def describe(self) -> dict[str, str]:
        """The parts as text, for tables."""
        allocation = self.allocation if isinstance(self.allocation, str) else type(self.allocation).__name__.lower()
        if isinstance(self.score, Weights):
            allocation = f"same for every {self.score.compare}"
        return {
            "unit": self.unit if isinstance(self.unit, str) else ", ".join(self.unit),
            "score": self.formula,
            "allocation": allocation,
            "prepare": self.prepare or "-",
            "repair": self.score.update or "-" if isinstance(self.score, Weights) else ", ".join(self.repair) or "-",
            "data": "yes" if self.data else "no",
            "amount": "sparsity, pattern" if self.sparse else "pruning_ratio, budget",  # arguments that say how much goes
            "paper": self.paper,
            "deviations": self.deviations or "-",
        }
