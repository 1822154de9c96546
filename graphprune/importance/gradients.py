"""Scores from the gradients of the loss: how much it changes, to first or second order, when the weights of a unit become zero.

With the mean gradient g of a weight w and F = E[g^2], sample by sample (the diagonal of the Fisher matrix); sums run over every weight that
writes or reads the unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from graphprune.importance.algebra import Expression
from graphprune.units import Member

if TYPE_CHECKING:
    from graphprune.calibration import Gradients, Statistics


def first(weight: Tensor, gradients: Gradients) -> Tensor:
    return (weight * gradients.mean).abs()


def fisher(weight: Tensor, gradients: Gradients) -> Tensor:
    return weight.square() * gradients.mean_square


def second(weight: Tensor, gradients: Gradients) -> Tensor:
    return (weight * gradients.mean - 0.5 * weight.square() * gradients.mean_square).abs()


def of_loss(entry: Callable[[Tensor, Gradients], Tensor]) -> Callable[[Member, Statistics], Tensor]:
    """Sums of an elementwise map of weights and gradients."""
    return lambda member, statistics: statistics.saliency(entry, member.value, member.axis)


taylor_first = Expression(of_loss(first))  # sum |w g|
taylor_second = Expression(of_loss(second))  # sum |w g - w^2 F / 2|
obd = Expression(of_loss(fisher))  # sum w^2 F
