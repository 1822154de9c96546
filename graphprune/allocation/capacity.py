"""How much a layer can lose, read off its weights: the PQ index of Diao et al. (2023, arXiv 2302.05601).

For d numbers w and p < q,

    I(w) = 1 - d^(1/q - 1/p) |w|_p / |w|_q        r = d (1 + eta)^(-q / (q - p)) (1 - I)^(q p / (q - p))

I is 0 where all magnitudes are equal and grows as few of them carry the rest; r is a lower bound on how many have to stay. Layers lose in
proportion to 1 - r / d. The loop of pruning, rewinding and training around it (SAP) is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.allocation.allocate import Local
from graphprune.errors import InvalidInput
from graphprune.linear_maps import LinearMap, linear_maps
from graphprune.program import Program, Value
from graphprune.units import Group, Role

if TYPE_CHECKING:
    from graphprune.calibration import Statistics

MOST = 0.99  # of a layer goes at most


def pq_index(weights: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """In [0, 1]; 0 where all magnitudes are equal.

    Raises:
        InvalidInput: not 0 < p < q, or nothing to measure.
    """
    if not 0 < p < q:
        raise InvalidInput(f"the PQ index needs 0 < p < q, found p={p!r}, q={q!r}")
    w = weights.detach().flatten().double().abs()
    if not w.numel():
        raise InvalidInput("the PQ index of no numbers is not defined")
    if not w.any():
        return 0.0
    w = w / w.max()
    norms = [float(w.pow(power).sum()) ** (1 / power) for power in (p, q)]
    return max(0.0, 1 - w.numel() ** (1 / q - 1 / p) * norms[0] / norms[1])


def removable(weights: Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> float:
    """1 - r / d: the fraction that may go by the bound."""
    share = (1 + eta) ** (-q / (q - p)) * (1 - pq_index(weights, p, q)) ** (q * p / (q - p))
    return max(0.0, 1 - share)


def spread(fractions: Sequence[float], sizes: Sequence[float], ratio: float) -> list[float]:
    """In proportion to the fractions, `ratio` on average over the sizes; what passes `MOST` is shared among the others."""
    found, free, left = [0.0] * len(fractions), set(range(len(fractions))), min(ratio, MOST) * sum(sizes)
    while free and left > 1e-12:
        total = sum(fractions[i] * sizes[i] for i in free)
        shares = {i: left * (fractions[i] / total) if total > 0 else left / sum(sizes[j] for j in free) for i in free}
        full = {i for i in free if shares[i] >= MOST}
        for i in full or free:
            found[i] = min(shares[i], MOST)
        if not full:
            break
        left -= sum(MOST * sizes[i] for i in full)
        free -= full
    return found


@dataclass(frozen=True)
class Capacity(Local):
    """A curve: a group loses in proportion to what the norms of its units say it can, `ratio` on average over units of its kind."""

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0

    def ratios(self, groups: Sequence[Group], ratio: float, statistics: Statistics) -> Mapping[str, float]:
        kinds: dict[str, list[Group]] = {}
        for group in groups:
            if group.size > 1:
                kinds.setdefault(group.kind, []).append(group)
        out: dict[str, float] = {}
        for alike in kinds.values():
            fractions = [removable(self._norms(group, statistics), self.p, self.q, self.eta) for group in alike]
            out.update(zip((g.name for g in alike), spread(fractions, [g.size for g in alike], ratio)))
        return out

    def _norms(self, group: Group, statistics: Statistics) -> Tensor:
        squares = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            if member.role is not Role.CARRIER:
                along = statistics.along(torch.square, member.value, member.axis).double().cpu()
                squares += along[torch.from_numpy(member.index)].sum(-1)
        return squares.sqrt()


def sparsities(program: Program, sparsity: float, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> dict[str, float]:
    """Fraction of zeros by weight name, for `sparsity=`: matrices lose in proportion to what they can, `sparsity` of all their entries."""
    found: dict[Value, LinearMap] = {}
    for linear in linear_maps(program).values():
        found.setdefault(linear.weight, linear)
    tensors: list[Any] = [value.tensor for value in found]
    fractions = [removable(tensor.float(), p, q, eta) for tensor in tensors]
    return dict(zip((value.name for value in found), spread(fractions, [tensor.numel() for tensor in tensors], sparsity)))
