"""Single weights of least magnitude go, per matrix or in N:M cells: the baseline of every paper."""

from graphprune.recipes.recipe import Recipe
from graphprune.sparsity import methods
from graphprune.sparsity.methods import Weights

RECIPES = (
    Recipe(
        name="magnitude",
        paper="Han et al. 2015, arXiv 1506.02626",
        formula="|w|",
        unit="unstructured",
        score=Weights(methods.magnitude, compare="layer"),
        data=False,
        deviations="one threshold per matrix; no retraining",
    ),
)
