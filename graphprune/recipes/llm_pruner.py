"""LLM-Pruner: coupled structures of the layers in the middle go by first-order Taylor, equally many in each; both ends stay whole."""

from graphprune.allocation.curves import Window
from graphprune.importance.gradients import taylor_first
from graphprune.recipes.recipe import Recipe
from graphprune.units import INNER_UNITS

RECIPES = (
    Recipe(
        name="llm_pruner",
        paper="Ma et al. 2023, arXiv 2305.11627",
        formula="sum |w g| (Element^1), g of the mean loss",
        score=taylor_first,
        unit=INNER_UNITS,
        allocation=Window(first=4, last=2, depth=32),
        deviations="the ratio is that of all layers: 0.25 in 26 of 32 layers is 0.203; fewer layers stay whole where there are fewer "
        "than 32; no LoRA afterwards",
    ),
)
