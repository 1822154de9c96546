"""SAP: layers whose units differ much in norm lose more than those whose units are alike."""

from graphprune.allocation.capacity import Capacity
from graphprune.importance import IMPORTANCES
from graphprune.recipes.recipe import Recipe

RECIPES = (
    Recipe(
        name="sap",
        paper="Diao et al. 2023, arXiv 2302.05601",
        formula="norm of all weights of a unit; layers by the PQ index of these norms, p = 0.5, q = 1",
        score=IMPORTANCES["magnitude"],
        allocation=Capacity(),
        data=False,
        deviations="units in place of weights (for those: sparsity=graphprune.allocation.capacity.sparsities(program, 0.5)); the bound "
        "says how layers compare, the ratio how much goes; one cut, without rewinding and training",
    ),
)
