"""Every error a user can meet, each with the exit code the command line returns for it.

An error says what is wrong, where, what was found against what was expected, and the way out. "Does not apply" is not an error: it
is a `NotPrunable` value, collected by the analysis and shown by `program.explain` and `graphprune inspect`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class GraphPruneError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InvalidInput(GraphPruneError, ValueError):
    """An argument, file or name is not what it must be."""

    exit_code = 2


class CaptureError(GraphPruneError):
    """The model could not be turned into a graph."""

    exit_code = 2


class UnsupportedOp(GraphPruneError):
    """An op has no rule or no lowering, and the caller asked not to freeze it."""

    exit_code = 2


class MissingExtra(GraphPruneError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""

    exit_code = 2


class NothingToPrune(GraphPruneError):
    """No group is left to cut; the message says why the candidates are frozen."""

    exit_code = 3


class BudgetNotMet(GraphPruneError):
    """The budget asks for less than the smallest network the constraints allow."""

    exit_code = 4


class VerificationFailed(GraphPruneError):
    """The pruned network is not the masked network."""

    exit_code = 5


class Reason(Enum):
    """Why an axis may not be cut."""

    INPUT = "it is an axis of a model input"
    OUTPUT = "it is an axis of a model output"
    DYNAMIC = "its size is symbolic"
    NO_RULE = "an op has no dim rule"
    FIXED = "the op fixes the size or the order of this axis"
    UNALIGNED = "two shapes of this axis have no common refinement"
    UNTAGGED_INDEX = "it is indexed by values that are not known to index it"
    CONTROL_FLOW = "it crosses a control-flow border"
    QUANTIZED = "it is quantized"
    NO_PARAMETER = "no floating-point parameter lies along it"
    SHARED_STORAGE = "parameters overlap in memory without being equal"
    PARAMETRIZED = "the parameter is recomputed by a parametrization"


@dataclass(frozen=True)
class NotPrunable:
    """One reason why something cannot be cut: what, at which node, and what the user can do about it."""

    reason: Reason
    node: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} (at {self.node})" + (f"; {self.hint}" if self.hint else "")
