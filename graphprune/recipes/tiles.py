"""Block-structured pruning: whole tiles of least norm go, so that a block-sparse kernel skips them."""

from graphprune.recipes.recipe import Recipe
from graphprune.sparsity import methods
from graphprune.sparsity.methods import Weights

RECIPES = (
    Recipe(
        name="tiles",
        paper="Li et al. 2020, Findings of EMNLP (block-structured pruning of BERT)",
        formula="||tile||_2",
        unit="block:32x32",
        score=Weights(methods.squares),
        data=False,
        deviations="the final cut by group norms; the reweighted group lasso before it needs training",
    ),
)
