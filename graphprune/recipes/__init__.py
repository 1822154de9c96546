"""Published methods as compositions of unit, score, allocation and repair: a file each, and a row here."""

from __future__ import annotations

import difflib
from typing import Any

from graphprune.errors import InvalidInput
from graphprune.recipes import (
    adapt_pruner,
    amp,
    blockpruner,
    cfsp,
    flap,
    group_norms,
    icbs,
    llm_pruner,
    magnitude,
    mrp,
    obspa,
    prunenet,
    sap,
    shortgpt,
    slice_refit,
    slicegpt,
    sparsegpt,
    taylor,
    tiles,
    tyr,
    tyr_local,
    wanda,
    wanda_sp,
)
from graphprune.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for module in (
        magnitude, wanda, sparsegpt, mrp, tiles, group_norms, taylor, llm_pruner, wanda_sp, flap,
        cfsp, amp, obspa, tyr_local, adapt_pruner, prunenet, shortgpt, blockpruner, tyr, icbs, sap, slicegpt, slice_refit,
    )
    for recipe in module.RECIPES
}


def recipe_of(given: Any) -> Recipe:
    """A recipe by name, or one of the user's.

    Raises:
        InvalidInput: no recipe has this name.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str) and given in RECIPES:
        return RECIPES[given]
    close = difflib.get_close_matches(str(given), RECIPES, 3)
    hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(RECIPES)}"
    raise InvalidInput(f"recipe {given!r} is not known; {hint}")


__all__ = ["RECIPES", "Recipe", "recipe_of"]
