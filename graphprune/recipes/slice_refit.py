"""Our own composition: the residual stream and the insides of the layers are cut together, by measured loss, and refitted.

    unit        directions of the residual stream after a rotation to its principal ones (as SliceGPT); heads, groups of keys and values,
                and neurons (as Tyr-the-Pruner, OBSPA)
    score       directions by their variance; the rest by the block loss of optimal brain surgery with its first-order term
    allocation  the width of the stream by trying: whole candidates, refitted, are measured by the divergence of their outputs; the insides
                evenly or by an integer program on what each alone loses, whichever is measured to be better
    repair      an exact refit of all that reads a cut stream or a cut inside

No paper composes these; each part is somebody's, see the recipes named.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphprune.calibration import Statistics
from graphprune.importance.surgeon import Surgeon
from graphprune.recipes.recipe import Recipe
from graphprune.recipes.slicegpt import InOrder
from graphprune.recipes.together import Together
from graphprune.units import INNER_UNITS, Group

INNER = Surgeon(first_order=True)


@dataclass(frozen=True)
class ByKind:
    """Directions of the stream stand in order already; the rest by optimal brain surgery."""

    def score(self, group: Group, statistics: Statistics) -> Tensor:
        return (InOrder() if group.kind == "hidden" else INNER).score(group, statistics)


RECIPES = (
    Recipe(
        name="slice_refit",
        paper="none: graphprune's own composition of SliceGPT (arXiv 2401.15024) and Tyr-the-Pruner (arXiv 2503.09657)",
        formula="directions: variance; units: tr(W_:P G_:P^T) + 1/2 tr(W_:P ([H^-1]_PP)^-1 W_:P^T), G = W H; levels by measured divergence",
        score=ByKind(),
        unit=("hidden", *INNER_UNITS),
        allocation=Together(),
        prepare="rotate",
        repair=("norm_width", "least_squares"),
    ),
)
