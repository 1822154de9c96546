"""The criteria. A new one is an expression and a row of `IMPORTANCES`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.errors import InvalidInput
from graphprune.importance.algebra import Expression, Importance, by_mean, entries, maps, units_of
from graphprune.units import Group, Member, Role

if TYPE_CHECKING:
    from graphprune.calibration import Statistics

log = logging.getLogger("graphprune")

# op -> the argument that holds a batch norm's scale
BATCH_NORM_SCALE = {
    **{("aten", op): "weight" for op in ("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")},
    ("", "BatchNormalization"): "scale",
}


def lamp_tail(squares: Tensor) -> Tensor:
    """Each square over the sum of itself and all larger ones."""
    order = torch.argsort(squares, stable=True)
    tail = squares[order].flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).scatter_(0, order, squares[order] / tail.clamp_min(torch.finfo(squares.dtype).tiny))


def batch_norm_scales(group: Group) -> Sequence[Member]:
    """Members that are the scale of a batch norm."""
    return [m for m in group.members if any(node.args.get(BATCH_NORM_SCALE.get(node.op, "")) is m.value for node in m.value.uses)]


# Norm of all weights that produce or read a unit (Fang et al. 2023, arXiv 2301.12900, without its sparsity-inducing training).
magnitude = Expression(entries(torch.square), outer=torch.sqrt, normalise=by_mean)
magnitude_l1 = Expression(entries(torch.abs), normalise=by_mean)
# Layer-adaptive magnitude (Lee et al. 2021, arXiv 2010.07611), with units in place of weights.
lamp = Expression(entries(torch.square), normalise=lamp_tail)
# First-order Taylor: the squared change of the loss when a unit goes, mean over batches (Molchanov et al. 2019, arXiv 1906.10771,
# equation 8; here every weight of the group takes part, and the square is per batch, not per sample).
taylor = Expression(
    lambda member, statistics: statistics.first_order(member.value, member.axis),
    inner=lambda change: change.square().mean(0),
)


scales = Expression(entries(torch.abs), members=batch_norm_scales)


@dataclass(frozen=True)
class BatchNormScale:
    """|scale| of the batch norms that a unit passes through (Liu et al. 2017, arXiv 1708.06519).

    A group without one is scored by relative magnitude; a warning says so.
    """

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        if batch_norm_scales(group):
            return scales.score(group, statistics)
        if statistics.once("bn_scale"):
            log.warning("bn_scale: group %s (and perhaps more) has no batch norm and is scored by its relative magnitude", group.name)
        return magnitude.score(group, statistics)


@dataclass(frozen=True)
class Random:
    """Uniform numbers that depend on the seed and the group's name only."""

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        return torch.rand(group.size, generator=statistics.generator(group.name))


@dataclass(frozen=True)
class GeometricMedian:
    """Sum of distances to all other units: what is near the geometric median is replaceable (He et al. 2019, arXiv 1811.00250).

    Distances are between the weights that produce a unit. They cost size * entries of the weights, where every other criterion is linear.
    """

    block: int = 1024  # rows of the distance matrix that exist at once

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        writers = [m for m in group.members if m.role is Role.WRITER] or maps(group)
        units = torch.cat([units_of(m, statistics.weight(m.value)) for m in writers], 1)
        sums = torch.cat([torch.cdist(rows, units).sum(1) for rows in units.split(self.block)]).cpu()
        return by_mean(sums)


IMPORTANCES: dict[str, Importance] = {
    "magnitude": magnitude,
    "magnitude_l1": magnitude_l1,
    "bn_scale": BatchNormScale(),
    "random": Random(),
    "fpgm": GeometricMedian(),
    "lamp": lamp,
    "taylor": taylor,
}


def importance_of(given: Any) -> Importance:
    """A criterion by name, or the user's own: an `Importance`, or a callable `group -> scores`.

    Raises:
        InvalidInput: no criterion has this name.
    """
    if isinstance(given, str):
        if given not in IMPORTANCES:
            raise InvalidInput(f"importance {given!r} is not known; known are {', '.join(IMPORTANCES)}, or pass a callable group -> scores")
        return IMPORTANCES[given]
    if isinstance(given, Importance):
        return given
    if callable(given):
        return _UserScore(given)
    raise InvalidInput(f"importance is a name, an Importance or a callable group -> scores, found {type(given).__name__}")


@dataclass(frozen=True)
class _UserScore:
    function: Callable[[Group], Any]

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        return torch.as_tensor(self.function(group))


def scores_of(importance: Importance, group: Group, statistics: Statistics) -> Tensor:
    """(group.size,) float32 on the CPU, checked.

    Raises:
        InvalidInput: another shape, or a score that is no number.
    """
    scores = torch.as_tensor(importance.score(group, statistics)).detach().to("cpu", torch.float32)
    if scores.shape != (group.size,):
        raise InvalidInput(f"importance gave group {group.name!r} scores of shape {tuple(scores.shape)}, expected ({group.size},)")
    if torch.isnan(scores).any():
        unit = int(torch.isnan(scores).nonzero()[0])
        raise InvalidInput(f"importance gave unit {unit} of group {group.name!r} the score nan; are its weights finite?")
    return scores
