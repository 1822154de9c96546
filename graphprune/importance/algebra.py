"""The score algebra: elementwise map -> sum over other axes -> units -> sum over members -> normalise. Higher means keep.

A criterion is an `Expression` of a few lines and sees neither op types nor positions. Scores are float32 and cost one pass over the
weights, however many groups share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from graphprune.program import Kind
from graphprune.units import Group, Member, Role

if TYPE_CHECKING:
    from graphprune.calibration import Statistics


@runtime_checkable
class Importance(Protocol):
    """Scores the units of a group."""

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        """(group.size,) float32; higher means keep."""


def identity(x: Tensor) -> Tensor:
    return x


def by_mean(scores: Tensor) -> Tensor:
    """Relative to the group's mean, so that groups of other scales can be compared."""
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)


def _gaussian(scores: Tensor) -> Tensor:
    """In deviations from the mean; all zero where all are equal."""
    spread = scores.std(correction=0)
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def _over(total: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda scores: scores / total(scores).clamp_min(torch.finfo(scores.dtype).tiny)


# How the scores of several members become one, and how those of a group are made comparable with other groups'.
AGGREGATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda rows: rows.sum(0), "mean": lambda rows: rows.mean(0), "max": lambda rows: rows.amax(0), "prod": lambda rows: rows.prod(0),
}  # fmt: skip
NORMALISERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": identity, "sum": _over(torch.sum), "mean": by_mean, "max": _over(torch.max), "gaussian": _gaussian,
}  # fmt: skip


def maps(group: Group) -> Sequence[Member]:
    """Members that produce or contract the axis; a group without any (recurrent cells, branches) is judged by all its parameters."""
    return [m for m in group.members if m.role is not Role.CARRIER] or [m for m in group.members if m.value.kind is Kind.PARAMETER]


@dataclass(frozen=True)
class Expression:
    """`normalise(outer(aggregate over members(inner(sum over the positions of each unit(along)))))`."""

    along: Callable[[Member, Statistics], Tensor]  # (..., length of the member's axis)
    inner: Callable[[Tensor], Tensor] = identity  # (..., size) -> (size,)
    outer: Callable[[Tensor], Tensor] = identity
    normalise: Callable[[Tensor], Tensor] = identity
    members: Callable[[Group], Sequence[Member]] = maps
    aggregate: str = "sum"  # over members, of `AGGREGATES`

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        rows: list[Tensor] = []
        for member in self.members(group):
            positions = self.along(member, statistics)
            index = torch.from_numpy(member.index).to(positions.device)
            rows.append(self.inner(positions[..., index].sum(-1)).cpu())
        if not rows:
            return torch.zeros(group.size)
        scores = self.outer(AGGREGATES[self.aggregate](torch.stack(rows)))
        # one branch is compared with others, never with itself
        return (scores if group.kind == "layer" else self.normalise(scores)).to(torch.float32)


def entries(entry: Callable[[Tensor], Tensor]) -> Callable[[Member, Statistics], Tensor]:
    """Sums of an elementwise map of the weights."""
    return lambda member, statistics: statistics.along(entry, member.value, member.axis)


def units_of(member: Member, weight: Tensor) -> Tensor:
    """(size, entries of one unit): the slices of a weight, flattened."""
    index = torch.from_numpy(member.index).to(weight.device)
    rows = weight.movedim(member.axis, 0)[index.reshape(-1)]
    return rows.reshape(index.shape[0], -1)
