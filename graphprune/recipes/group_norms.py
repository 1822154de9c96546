"""Groups judged by the weights they consist of: norms, ranks of norms, distances, and scales of batch norms. No data."""

import torch

from graphprune.allocation import Global
from graphprune.importance import IMPORTANCES, Expression, entries
from graphprune.importance.algebra import NORMALISERS
from graphprune.recipes.recipe import Recipe


def l1(aggregate: str = "sum", normalise: str = "mean") -> Expression:
    """Sum of |w| over the slice of every member, aggregated over members and normalised within the group.

    Args:
        aggregate: of `graphprune.importance.algebra.AGGREGATES`: sum, mean, max, prod.
        normalise: of `graphprune.importance.algebra.NORMALISERS`: none, sum, mean, max, gaussian.
    """
    return Expression(entries(torch.abs), aggregate=aggregate, normalise=NORMALISERS[normalise])


RECIPES = (
    Recipe(
        name="group_l2",
        paper="Fang et al. 2023, arXiv 2301.12900",
        formula="||w of the group||_2, over the group's mean",
        score=IMPORTANCES["magnitude"],
        repair=("bn",),
        data=False,
        deviations="the final cut, without sparsity-inducing training before it and fine-tuning after it; running statistics are estimated "
        "again instead",
    ),
    Recipe(
        name="spa_l1",
        paper="Wang et al. 2024, arXiv 2403.18955 (SPA)",
        formula="sum over members of sum |w|, over the group's mean",
        score=l1(),
        allocation=Global(of="params"),
        repair=("bn",),
        data=False,
        deviations="no fine-tuning, running statistics are estimated again instead; a ratio counts parameters; inside a "
        "member entries are summed, whatever aggregates the members",
    ),
    Recipe(
        name="lamp",
        paper="Lee et al. 2021, arXiv 2010.07611",
        formula="||w||^2 / sum of all not smaller ones in the group",
        score=IMPORTANCES["lamp"],
        allocation=Global(),
        repair=("bn",),
        data=False,
        deviations="units in place of single weights; no fine-tuning, running statistics are estimated again instead",
    ),
    Recipe(
        name="fpgm",
        paper="He et al. 2019, arXiv 1811.00250",
        formula="sum of distances to the weights of all other units",
        score=IMPORTANCES["fpgm"],
        repair=("bn",),
        data=False,
        deviations="distances between what writes a unit, over all writers; no fine-tuning, running statistics are estimated again instead",
    ),
    Recipe(
        name="bn_scale",
        paper="Liu et al. 2017, arXiv 1708.06519",
        formula="|scale of the batch norm|",
        score=IMPORTANCES["bn_scale"],
        allocation=Global(),
        repair=("bn",),
        data=False,
        deviations="no sparsity-inducing training; groups without a batch norm count by relative magnitude; running statistics are "
        "estimated again",
    ),
)
