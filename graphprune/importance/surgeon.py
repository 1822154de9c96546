"""Optimal brain surgeon for whole units: the error that stays in what reads a unit after the best repair of all other columns.

For a reader y = W x with H = E[x x^T], and P the columns of the unit (several for heads, for the window of a convolution),

    loss(P) = 1/2 tr(W_:P ([H^-1]_PP)^-1 W_:P^T)

summed over readers (Hassibi and Stork 1993). What writes the unit adds nothing: once every reader drops the columns it is dead code. Layers
pass one at a time, so that one matrix H is held at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.calibration import Gram, layerwise, working_dtype
from graphprune.importance.activations import readers, without_readers
from graphprune.importance.algebra import NORMALISERS
from graphprune.linear_maps import LinearMap, columns
from graphprune.program import Value
from graphprune.repair.obs import inverse
from graphprune.units import DEFAULT_UNITS, Group, Member

if TYPE_CHECKING:
    from graphprune.calibration import Statistics

CHUNK = 1 << 24  # entries of the block systems that are solved at once
USUAL = (*DEFAULT_UNITS, "ssm_head")  # kinds that are scored in one pass; others in one of their own


def losses(weight: Tensor, hessian: Tensor, index: Tensor, first_order: bool = False) -> Tensor:
    """(units,): the loss of every unit, summed over groups.

    Args:
        weight: (groups, outputs, columns).
        hessian: (groups, columns, columns), invertible.
        index: (units, width): the columns of each unit.
        first_order: add tr(W_:P G_:P^T) with G = W H, signed.
    """
    weight = weight.to(hessian.dtype)
    spread = inverse(hessian)
    total = torch.zeros(len(index), dtype=hessian.dtype, device=hessian.device)
    width = index.shape[1]
    for group in range(weight.shape[0]):
        gradient = weight[group] @ hessian[group] if first_order else None
        if width == 1:
            flat = index[:, 0]
            total += weight[group].square().sum(0)[flat] / spread[group].diagonal()[flat] / 2
        else:
            size = max(1, CHUNK // (width * max(width, weight.shape[1])))
            parts = []
            for units in index.split(size):
                block = spread[group][units[:, :, None], units[:, None, :]]  # (units, width, width)
                removed = weight[group].T[units]  # (units, width, outputs)
                parts.append((torch.cholesky_solve(removed, torch.linalg.cholesky(block)) * removed).sum((1, 2)) / 2)
            total += torch.cat(parts)
        if gradient is not None:
            total += (weight[group] * gradient).sum(0)[index].sum(1)
    return total


@dataclass(frozen=True)
class Surgeon:
    """Sum over readers of the block loss of optimal brain surgeon.

    Args:
        first_order: add the first-order term that stays without the layer's own fit, see `losses`.
        damping: of the mean diagonal of H, added to it.
        normalise: of `NORMALISERS`, over the units of a group.
    """

    first_order: bool = False
    damping: float = 0.01
    normalise: str = "none"

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        if not readers(group, statistics):
            return without_readers(group, statistics, "optimal brain surgeon")
        kinds = USUAL if group.kind in USUAL else (group.kind,)
        found = statistics.remembered((self, kinds), lambda: self._pass(statistics, kinds))
        return NORMALISERS[self.normalise](torch.stack([found[member.value, group.name] for member in readers(group, statistics)]).sum(0))

    def _pass(self, statistics: Statistics, kinds: Sequence[str]) -> Mapping[tuple[Value, str], Tensor]:
        program = statistics.program
        wanted: dict[Value, list[tuple[Group, Member]]] = {}
        for group in program.analysis.groups:
            if group.kind in kinds:
                for member in readers(group, statistics):
                    wanted.setdefault(member.value, []).append((group, member))
        found: dict[tuple[Value, str], Tensor] = {}

        def decide(linear: LinearMap, weight: Tensor, gram: Any) -> None:
            matrix, hessian = linear.matrix(weight), gram.hessian(self.damping)
            for group, member in wanted[linear.weight]:
                found[linear.weight, group.name] = self._units(linear, member, matrix, hessian).cpu()

        layerwise(program, statistics.data, decide, make=Gram, only=wanted, inputs="dense", dtype=working_dtype(program))
        return found

    def _units(self, linear: LinearMap, member: Member, matrix: Tensor, hessian: Tensor) -> Tensor:
        if member.axis != linear.input_axis:  # whole matrices go: all that they compute is lost
            weight = matrix.to(hessian.dtype)
            return ((weight @ hessian) * weight).sum((1, 2)) / 2
        index = torch.from_numpy(columns(linear, member.index)).flatten(1).to(matrix.device)
        return losses(matrix, hessian, index, self.first_order)
