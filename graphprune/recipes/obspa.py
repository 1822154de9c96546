"""OBSPA: optimal brain surgeon on coupled channels of any graph. What reads a channel is refitted; data may be noise."""

from graphprune.importance.surgeon import Surgeon
from graphprune.recipes.recipe import Recipe

RECIPES = (
    Recipe(
        name="obspa",
        paper="Wang et al. 2024, arXiv 2403.18955",
        formula="sum over readers of 1/2 tr(W_:P ([H^-1]_PP)^-1 W_:P^T)",
        score=Surgeon(),
        repair=("least_squares", "bn"),
        data=False,
        noise=16,
        deviations="units are judged one by one on the dense network, then refitted together; every group loses the same ratio, as one "
        "threshold for losses of all layers empties some; without calibration_data inputs are normal numbers",
    ),
)
