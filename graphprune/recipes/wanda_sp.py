"""Wanda-sp: Wanda's score summed over the columns of a unit, as FLAP's authors define it for comparison."""

from graphprune.importance.activations import wanda_columns
from graphprune.recipes.recipe import Recipe
from graphprune.units import INNER_UNITS

RECIPES = (
    Recipe(
        name="wanda_sp",
        paper="Sun et al. 2023, arXiv 2306.11695; structured by An et al. 2023, arXiv 2312.11983",
        formula="sum over outputs of |w| * ||x||",
        score=wanda_columns,
        unit=INNER_UNITS,
        deviations="all readers of a unit count; inputs are those of the dense network",
    ),
)
