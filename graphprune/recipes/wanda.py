"""Wanda: a weight counts as much as the activations that it multiplies. Weights compete within the row that computes one output."""

from graphprune.recipes.recipe import Recipe
from graphprune.sparsity import methods
from graphprune.sparsity.methods import Weights

RECIPES = (
    Recipe(
        name="wanda",
        paper="Sun et al. 2023, arXiv 2306.11695",
        formula="|w| * ||x||",
        unit="unstructured",
        score=Weights(methods.wanda, need="moments", compare="row"),
        deviations="a layer sees what the pruned layers before it give, inside a block too; the paper's code refreshes block by block",
    ),
)
