"""AMP: heads go by the length of what they add to the residual stream, neurons by their mean magnitude; every layer loses equally many."""

from graphprune.importance.activations import projected_length
from graphprune.recipes.recipe import Recipe
from graphprune.units import INNER_UNITS

RECIPES = (
    Recipe(
        name="amp",
        paper="Mugnaini et al. 2025, arXiv 2504.21174",
        formula="heads: mean over tokens of ||W_:h x_h||_1; neurons: mean |x|",
        score=projected_length,
        unit=INNER_UNITS,
        deviations="all tokens weigh the same, whatever prompt they are in; neurons do not make up for the rounding of heads (a budget "
        "does); no LoRA afterwards",
    ),
)
