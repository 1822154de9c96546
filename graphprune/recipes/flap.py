"""FLAP: a unit is as good as the variance that its removal leaves once the bias has taken up its mean; one threshold for all layers."""

from graphprune.allocation import Global
from graphprune.importance.activations import standardised_variance
from graphprune.recipes.recipe import Recipe
from graphprune.units import INNER_UNITS

RECIPES = (
    Recipe(
        name="flap",
        paper="An et al. 2023, arXiv 2312.11983",
        formula="Var(x) ||W_:j||^2, in deviations from the layer's mean; heads by their mean",
        score=standardised_variance,
        unit=INNER_UNITS,
        allocation=Global(of="params"),
        repair=("removed_mean",),
        deviations="variance with n - 1 over all tokens; attention is not squared a second time; a ratio removes that fraction of the "
        "parameters of all units, not one unit more; layers without a bias get none, so that their mean is not made up for; of a few large "
        "groups (two of keys and values) each has a score near the layer's mean, though it is half of an attention",
    ),
)
