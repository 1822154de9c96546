"""Scores from what reads a unit: the columns of the weights that it is multiplied with, and the activations that come in there.

A reader of a group is a member whose weight is a linear map along its contracted axis; a unit scores the sum (or mean) over its columns,
and over all its readers. Groups without such a reader (recurrent cells, tables) are scored by their relative magnitude; a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.importance.algebra import AGGREGATES, NORMALISERS
from graphprune.importance.criteria import magnitude
from graphprune.units import Group, Member, Role

if TYPE_CHECKING:
    from graphprune.calibration import Statistics

log = logging.getLogger("graphprune")

Column = Callable[[Tensor, Any], Tensor]  # (matrix (groups, outputs, columns), statistic of its inputs) -> (groups, columns)


# ---- elementary scores of columns


def wanda(matrix: Tensor, moments: Any) -> Tensor:
    """Sum over outputs of |w| ||x||."""
    return matrix.abs().sum(1) * moments.norm


def weighted_variance(matrix: Tensor, moments: Any) -> Tensor:
    """Variance of the input times the squared norm of its column: the error left when the input is replaced by its mean."""
    return moments.variance * matrix.square().sum(1)


def input_norm(matrix: Tensor, moments: Any) -> Tensor:
    return moments.norm


def mean_absolute(matrix: Tensor, moments: Any) -> Tensor:
    return moments.mean_absolute


# ---- units


def readers(group: Group, statistics: Statistics) -> Sequence[Member]:
    """Members that contract the axis in a linear map; of groups that number stacked matrices (experts), those matrices."""
    linear = statistics.linear
    found = [m for m in group.members if m.role is Role.READER and m.value in linear and linear[m.value].input_axis == m.axis]
    if found:
        return found
    stacked = [m for m in group.members if m.axis == 0 and m.value in linear and linear[m.value].groups == group.size > 1]
    return [m for m in stacked if m.index.shape[1] == 1 and len(m.value.shape) == 3 and not linear[m.value].window_axes]


def positions(member: Member, statistics: Statistics, column: Column, need: str) -> Tensor:
    """(length of the member's axis,): the score of every position, summed over the groups and the window of the map."""
    value = member.value
    linear = statistics.linear[value]

    def work() -> Tensor:
        return column(linear.matrix(statistics.weight(value)), statistics.observed(need)[value])

    found = statistics.remembered((column, need, value), work)
    return linear.along_input(found) if member.axis == linear.input_axis else found.sum(1)


def per_unit(member: Member, along: Tensor, pool: str) -> Tensor:
    """(size,): sum or mean over the positions of each unit."""
    return AGGREGATES[pool](along[torch.from_numpy(member.index).to(along.device)].T).cpu()


def without_readers(group: Group, statistics: Statistics, method: str) -> Tensor:
    """The score of a group that no linear map reads."""
    if statistics.once(f"{method} without readers"):
        log.warning("%s: group %s (and perhaps more) is read by no linear map and is scored by its relative magnitude", method, group.name)
    return magnitude.score(group, statistics)


@dataclass(frozen=True)
class Readers:
    """Scores of columns, pooled to units and summed over readers.

    Args:
        need: the statistic of activations that `column` takes.
        standardise: scores of one reader in deviations from their mean, before pooling; readers are then averaged.
        pool: "sum" or "mean" over the columns of a unit.
    """

    column: Column
    need: str = "moments"
    standardise: bool = False
    pool: str = "sum"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.need,)

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        found = readers(group, statistics)
        if not found:
            scores = without_readers(group, statistics, getattr(self.column, "__name__", "readers"))
            return NORMALISERS["gaussian"](scores) if self.standardise else scores
        rows = []
        for member in found:
            along = positions(member, statistics, self.column, self.need)
            if self.standardise:
                used = torch.from_numpy(member.index).to(along.device)
                along = along.clone()
                along[used] = NORMALISERS["gaussian"](along[used])
            rows.append(per_unit(member, along, self.pool))
        return torch.stack(rows).mean(0) if self.standardise else torch.stack(rows).sum(0)


@dataclass(frozen=True)
class ProjectedLength:
    """Mean over tokens of what a unit adds to the result of its readers, in the 1-norm; of units of one column, the mean of |x| alone.

    Accumulated in float32 at least.
    """

    needs = ("moments", "projected")

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        found = readers(group, statistics)
        if not found:
            return without_readers(group, statistics, "projected length")
        projected = statistics.observed("projected")
        rows = []
        for member in found:
            known = projected.get((member.value, group.name))
            if known is not None:
                rows.append(known.mean.cpu())
            else:
                rows.append(per_unit(member, positions(member, statistics, mean_absolute, "moments"), "sum"))
        return torch.stack(rows).sum(0)


@dataclass(frozen=True)
class RelativeActivation:
    """||x|| times the relative weights of the unit: of its readers (scaled by ||x||) and of its writers, each averaged over the other axis.

    Args:
        over: weights are relative to the sum over the "model" axis (that of the layer's other end), or over the "units".
            Relative to the model axis each term sums to one over what it is averaged over, so that weights cancel and the score is
            (number of weights) / (length of that axis) * ||x||: the ranking is by the norm of the activation alone.
    """

    over: str = "model"
    needs = ("moments",)

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        found = readers(group, statistics)
        if not found:
            return without_readers(group, statistics, "relative activation")
        norm = torch.stack([per_unit(m, positions(m, statistics, input_norm, "moments"), "sum") for m in found]).sum(0)
        writers = [m for m in group.members if m.role is Role.WRITER and m.value in statistics.linear]
        scale = [positions(m, statistics, input_norm, "moments").to(torch.float32) for m in found]
        terms = [self._relative(m, statistics, s) for m, s in zip(found, scale)]
        terms += [self._relative(m, statistics, None) for m in writers]
        return torch.stack(terms).sum(0) * norm

    def _relative(self, member: Member, statistics: Statistics, scale: Tensor | None) -> Tensor:
        weight = statistics.weight(member.value).abs().movedim(member.axis, 0).flatten(1)  # (units' axis, the rest)
        weight = weight if scale is None else weight * scale[:, None]
        total = weight.sum(1 if self.over == "model" else 0, keepdim=True)
        return per_unit(member, (weight / total.clamp_min(torch.finfo(weight.dtype).tiny)).mean(1), "mean")


wanda_columns = Readers(wanda)
standardised_variance = Readers(weighted_variance, standardise=True, pool="mean")
projected_length = ProjectedLength()
relative_activation = RelativeActivation()

