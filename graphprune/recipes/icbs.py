"""iCBS: Wanda's mask, then pruned weights come back in exchange for kept ones, block after block, by a quadratic model of the loss."""

from graphprune.recipes.recipe import Recipe
from graphprune.sparsity import methods
from graphprune.sparsity.swaps import Swaps

RECIPES = (
    Recipe(
        name="icbs",
        paper="Rosenberg et al. 2024, arXiv 2411.17796",
        formula="x^T Q x over a block, x = 1 where pruned, Q from per-sample gradients",
        unit="unstructured",
        score=Swaps(methods.wanda, need="moments", compare="row"),
        deviations="small entries of Q are dropped by magnitude (the code drops negative ones); 4 visits of every layer in blocks of 512; "
        "a step that does not lower the loss on its samples is taken back; candidates rest for one visit, none is frozen for good",
    ),
)
