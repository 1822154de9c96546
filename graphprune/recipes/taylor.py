"""Groups judged by what the loss would do if they went: Taylor expansions of first and second order at the trained weights."""

from graphprune.importance import IMPORTANCES
from graphprune.importance.gradients import obd, taylor_second
from graphprune.recipes.recipe import Recipe
from graphprune.units import INNER_UNITS

RECIPES = (
    Recipe(
        name="taylor",
        paper="Molchanov et al. 2019, arXiv 1906.10771",
        formula="mean over batches of (sum w g)^2",
        score=IMPORTANCES["taylor"],
        repair=("bn",),
        deviations="every weight of the group takes part; the square is per batch; one shot, all groups at one ratio: the paper's one "
        "threshold for all layers empties some without the fine-tuning between its rounds; running statistics are estimated again",
    ),
    Recipe(
        name="obd",
        paper="LeCun et al. 1989, NIPS (optimal brain damage)",
        formula="sum w^2 E[g^2]",
        score=obd,
        repair=("bn",),
        deviations="units in place of single weights, every group at the same ratio; no retraining, running statistics are estimated again "
        "instead; the diagonal of the Hessian is that of the Fisher matrix, sample by sample",
    ),
    Recipe(
        name="taylor_second",
        paper="Ma et al. 2023, arXiv 2305.11627 (Element^2)",
        formula="sum |w g - w^2 E[g^2] / 2|",
        score=taylor_second,
        unit=INNER_UNITS,
        deviations="no window and no LoRA afterwards: see llm_pruner",
    ),
)
