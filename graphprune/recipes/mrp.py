"""MRP: the removed weights of a row are made up for together; N:M cells are judged as sets, by the loss that the best repair leaves."""

from graphprune.recipes.recipe import Recipe
from graphprune.sparsity.methods import Weights

RECIPES = (
    Recipe(
        name="mrp",
        paper="Zhao et al. 2024, arXiv 2410.15567",
        formula="w^2 / [H^-1]_jj; in N:M cells 1/2 w_P ([H^-1]_PP)^-1 w_P^T",
        unit="unstructured",
        score=Weights(None, need="gram", update="joint", sets=True),
        deviations="jointly within blocks of 128 columns (N:M: within a cell), then on to the columns further right",
    ),
)
