"""Adapt-Pruner: layers that change what passes them little lose more, in small steps; which units, first-order Taylor says."""

from graphprune.allocation.curves import Increments
from graphprune.importance.gradients import taylor_first
from graphprune.recipes.recipe import Recipe
from graphprune.units import INNER_UNITS

RECIPES = (
    Recipe(
        name="adapt_pruner",
        paper="Pan et al. 2025, arXiv 2502.03460",
        formula="sum |w g|; layers by minus the mean cosine of input and output",
        score=taylor_first,
        unit=INNER_UNITS,
        allocation=Increments(steps=50, strength=0.02),
        deviations="all micro-steps on the statistics of the dense network, none refreshed; no training between stages",
    ),
)
