"""OBSPA: optimal brain surgeon on coupled channels of any graph. What reads a channel is refitted; data may be noise."""

from graphprune.allocation import Global
from graphprune.importance.surgeon import Surgeon
from graphprune.recipes.recipe import Recipe

RECIPES = (
    Recipe(
        name="obspa",
        paper="Wang et al. 2024, arXiv 2403.18955",
        formula="sum over readers of 1/2 tr(W_:P ([H^-1]_PP)^-1 W_:P^T), over the group's mean",
        score=Surgeon(normalise="mean"),
        allocation=Global(of="params"),
        repair=("least_squares", "bn"),
        data=False,
        noise=16,
        deviations="units of a group are judged one by one on the dense network, then refitted together; without calibration_data inputs "
        "are normal numbers",
    ),
)
