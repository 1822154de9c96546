"""SparseGPT: columns go from left to right, each time the columns further right make up for what went."""

from graphprune.recipes.recipe import Recipe
from graphprune.sparsity.methods import Weights

RECIPES = (
    Recipe(
        name="sparsegpt",
        paper="Frantar and Alistarh 2023, arXiv 2301.00774",
        formula="w^2 / U_jj^2 with H^-1 = U^T U, in blocks of 128 columns",
        unit="unstructured",
        score=Weights(None, need="gram", update="sequential"),
        deviations="the threshold of a block removes exactly the count asked for, not one more",
    ),
)
