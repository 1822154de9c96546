"""SliceGPT: the residual stream is turned into its principal directions, and the weakest of them go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphprune.recipes.recipe import Recipe
from graphprune.units import Group

if TYPE_CHECKING:
    from graphprune.calibration import Statistics


@dataclass(frozen=True)
class InOrder:
    """Units are sorted already, the most important first."""

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        return torch.arange(group.size, 0, -1, dtype=torch.float32)


RECIPES = (
    Recipe(
        name="slicegpt",
        paper="Ashkboos et al. 2024, arXiv 2401.15024",
        formula="variance of the stream along its principal directions, where norms put it out",
        score=InOrder(),
        unit=("hidden",),
        prepare="rotate",
        repair=("norm_width",),
        deviations="one rotation for the whole stream, so no matrices on the shortcuts; RMS norms only, untied embeddings",
    ),
)
