"""The local step of Tyr-the-Pruner: optimal brain surgeon with a first-order term, block by block, and an exact refit."""

from graphprune.importance.surgeon import Surgeon
from graphprune.recipes.recipe import Recipe
from graphprune.units import INNER_UNITS

RECIPES = (
    Recipe(
        name="tyr_local",
        paper="Li et al. 2025, arXiv 2503.09657",
        formula="tr(W_:P G_:P^T) + 1/2 tr(W_:P ([H^-1]_PP)^-1 W_:P^T), G = W H",
        score=Surgeon(first_order=True),
        unit=INNER_UNITS,
        repair=("least_squares",),
        deviations="the signed form; units go at once, not in rounds; one level for all layers, no search",
    ),
)
