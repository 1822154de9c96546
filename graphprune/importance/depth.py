"""How much a residual branch or block turns what passes it. One that turns nothing is not missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.errors import InvalidInput
from graphprune.units import Group

if TYPE_CHECKING:
    from graphprune.calibration import Statistics


@dataclass(frozen=True)
class Turn:
    """Of what enters beside a unit against what leaves it, mean over tokens; for `layer` units only.

    Args:
        by: "influence", 1 - cosine (Men et al. 2024, arXiv 2403.03853); "angle", the angle as a fraction of half a turn (Gromov et al.
            2024, arXiv 2403.17887).
    """

    by: str = "influence"
    needs: tuple[str, ...] = ("similarity",)

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        join: Any = getattr(group.atom, "join", None)
        if join is None:
            raise InvalidInput(f"group {group.name!r} is of kind {group.kind}; block influence is of whole branches: units=('layer',)")
        found = statistics.observed("similarity")[join]
        return torch.tensor([1 - found.cosine if self.by == "influence" else found.angle], dtype=torch.float32)


block_influence, angular_distance = Turn(), Turn("angle")
