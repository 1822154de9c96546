"""A policy learned from weights alone: which units to keep so that the spectrum of the matrix that writes them changes least.

For a matrix W: (units, inputs), the probability that a unit stays is alpha = sigmoid((W P^T + b) s), with P, b, s shared by all layers of
one shape. An episode passes the layers once: units are drawn without replacement with relaxed Bernoulli weights q around alpha, the reward
is 1 / KS(singular values of W, of the rows kept), and REINFORCE moves the policy (Sengupta et al. 2025, arXiv 2501.15296).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphprune.importance.algebra import maps, units_of
from graphprune.units import Group, Member, Role

if TYPE_CHECKING:
    from graphprune.calibration import Statistics

NO_CHANGE = 1e5  # the reward where the spectra are equal


def spectral_distance(a: Tensor, b: Tensor) -> float:
    """Two-sample Kolmogorov-Smirnov statistic: the largest distance between the distributions of two sets of numbers."""
    a, b = a.sort().values, b.sort().values
    both = torch.cat([a, b])
    return float((torch.searchsorted(a, both, right=True) / len(a) - torch.searchsorted(b, both, right=True) / len(b)).abs().max())


@dataclass(frozen=True)
class SpectrumPolicy:
    """The probabilities of the policy after a few episodes; the best episode counts.

    Args:
        ratio: fraction of units that goes while the policy learns; it serves other ratios as well.
        discount: of the rewards, from layer to layer.
    """

    episodes: int = 20
    ratio: float = 0.25
    rate: float = 1e-3
    discount: float = 0.99

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        shape = self._shape(group, statistics)
        alike = [g for g in statistics.program.analysis.groups if g.kind == group.kind and self._shape(g, statistics) == shape]
        return statistics.remembered((self, group.kind, shape), lambda: self._learn(alike, shape, statistics))[group.name]

    def _writer(self, group: Group, statistics: Statistics) -> Member:
        """The first matrix of the network that writes the units."""
        order = {value: i for i, value in enumerate(statistics.program.weights.values())}
        writers: Sequence[Member] = [m for m in group.members if m.role is Role.WRITER and len(m.value.shape or ()) > 1] or maps(group)
        return min(writers, key=lambda m: order[m.value])

    def _shape(self, group: Group, statistics: Statistics) -> tuple[int, int]:
        writer = self._writer(group, statistics)
        return group.size, writer.index.shape[1] * prod(writer.value.shape) // writer.value.shape[writer.axis]

    def _state(self, group: Group, statistics: Statistics) -> Tensor:
        """(units, inputs)."""
        writer = self._writer(group, statistics)
        return units_of(writer, statistics.weight(writer.value)).float().cpu()

    def _learn(self, groups: Sequence[Group], shape: tuple[int, int], statistics: Statistics) -> dict[str, Tensor]:
        units, inputs = shape
        kept = max(1, int((1 - self.ratio) * units))
        random = statistics.generator(f"policy {units} {inputs}")

        def fresh(*shape: int, bound: float) -> Tensor:
            return ((2 * torch.rand(shape, generator=random) - 1) * bound).requires_grad_()

        policy = [fresh(units, inputs, bound=inputs**-0.5), fresh(units, bound=inputs**-0.5), fresh(units, bound=units**-0.5)]
        spectra = [torch.linalg.svdvals(self._state(group, statistics)) for group in groups]

        def logits(state: Tensor) -> Tensor:
            return (state @ policy[0].T + policy[1]) @ policy[2]

        def probabilities() -> dict[str, Tensor]:
            with torch.no_grad():
                return {group.name: logits(self._state(group, statistics)).sigmoid() for group in groups}

        best, found = -1.0, probabilities()
        with torch.inference_mode(False), torch.enable_grad():
            optimiser = torch.optim.AdamW(policy, lr=self.rate)
            for _ in range(self.episodes):
                total = 0.0
                for i, group in enumerate(groups):
                    state = self._state(group, statistics)
                    noise = torch.rand(units, generator=random).clamp(1e-6, 1 - 1e-6).logit()
                    q = (logits(state) + noise).sigmoid().clamp_min(1e-9)
                    chosen = torch.multinomial(q.detach(), kept, generator=random).sort().values
                    distance = spectral_distance(spectra[i], torch.linalg.svdvals(state[chosen]))
                    reward = self.discount**i * (1 / distance if distance > 0 else NO_CHANGE)
                    optimiser.zero_grad()
                    (-reward * q[chosen].log().sum()).backward()
                    optimiser.step()
                    total += reward
                if total > best:
                    best, found = total, probabilities()
        return found
