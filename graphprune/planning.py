"""Importance x allocation x budgets -> `Plan`: the glue between scores, constraints and the decision."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from graphprune.allocation import (
    Candidate,
    Local,
    Measure,
    Measured,
    Selection,
    allocate,
    block_of,
    can_meet,
    choices,
    fastest,
    one_per_product,
    scope_of,
    split,
    whole_blocks,
)  # fmt: skip
from graphprune.analysis import Analysis
from graphprune.calibration import Statistics
from graphprune.errors import InvalidInput, NothingToPrune
from graphprune.importance import importance_of, scores_of
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.recipes import RECIPES, Recipe
from graphprune.sparsity import UPDATES, NOfM, Pattern, Swaps, Unstructured, Weights, pattern_of, solve_masks
from graphprune.surgery.cut import Cut
from graphprune.units import DEFAULT_UNITS, MADE_BY_CONSTANTS, UNITS, Group
from graphprune.widths import RULE, Widths

log = logging.getLogger("graphprune")

DEFAULT_RATIO = 0.25
DEFAULT_SPARSITY = 0.5
NOT_CUT_YET = {"token": "token axes are found, but cutting them is not implemented yet", "kv": "the key-value cache cannot be cut yet"}


def make_plan(
    program: Program,
    *,
    pruning_ratio: float | Mapping[str, float] | None = None,
    budget: Mapping[str, Any] | None = None,
    units: Sequence[str] = DEFAULT_UNITS,
    importance: Any = "magnitude",
    scope: Any = "local",
    ignore: Sequence[str] = (),
    targets: Sequence[str] = (),
    round_to: int | str = "auto",
    min_keep: int = 1,
    repair: Sequence[str] = (),
    calibration_data: Any = None,
    loss: Callable[..., Any] | None = None,
    remove: Mapping[str, Iterable[int]] | None = None,
    seed: int = 0,
    measure: Measure | None = None,
    widths: Widths = RULE,
) -> Plan:
    """Decide which units go.

    Args:
        pruning_ratio: fraction of units removed per group, or `{pattern: fraction}`, where the last pattern that matches counts, "*"
            stands for all others and a group that no pattern matches stays whole. In [0, 1); rounding keeps more, never less.
        budget: what is kept: `{"params": "60%", "macs": 2e9, "memory_mb": "50%"}`, one or several. With a ratio too, the budget binds and
            the ratio is the most that any group loses. Under a budget of parameters or bytes alone, with scope "local", groups that are
            poor in MACs lose less, so that the network is fast: see `graphprune.allocation.spread`. Measured: `latency_ms` (5.0, or "60%")
            and `accuracy_drop` (0.01, of the metric).
        units: kinds that may go; where a network has none of the default ones, they give way to `ssm_head`, then `hidden`. Of groups that
            multiply in one axis, such as kv_group and head, one is cut: see `one_per_product`.
        importance: a name of `IMPORTANCES`, an `Importance`, or a callable `group -> scores`.
        scope: "local", "global", "isomorphic", or a scope object such as `Global(per="macs")`.
        ignore: what stays as it is; targets: the only things to cut, by what they produce. See `Selection`. Axes that constants of the
            code make are cut only where `targets` or `pruning_ratio` names them: see `Group.spared`.
        remove: explicit units by group name, or `{"model.layers.3": [0]}` for a whole block; then nothing else decides.
        loss: `loss(output)` or `loss(output, batch)`, for gradient scores.
        measure: builds candidates and measures them, for the budgets `latency_ms` and `accuracy_drop`; `compile` brings it.
        widths: what round_to="auto" keeps multiples of; `compile` brings what was measured on the device.

    Raises:
        InvalidInput: an argument is not what it must be.
        NothingToPrune: no group is left to cut.
        BudgetNotMet: the budget asks for less than the constraints allow.
    """
    analysis = program.analysis
    if remove is not None:
        plan = Plan.of(program, remove, repair)
        Cut(analysis, plan.removed)
        return plan
    if pruning_ratio is None and budget is None:
        pruning_ratio = DEFAULT_RATIO
        notice = "no pruning_ratio or budget is given: %d%% of every group go, by %s; quality is not measured"
        log.warning(notice, 100 * DEFAULT_RATIO, importance)
    kinds = _kinds(units)
    if tuple(units) == DEFAULT_UNITS:
        kinds = _or_the_next(kinds, {g.kind for g in analysis.groups})
    if not isinstance(min_keep, int) or isinstance(min_keep, bool) or min_keep < 1:
        raise InvalidInput(f"min_keep is a number of units, at least 1, found {min_keep!r}")
    criterion, rivals = importance_of(importance), scope_of(scope)
    selection = Selection(analysis)
    ratios = _ratios(selection, analysis.groups, pruning_ratio)
    left_out = selection.touched(ignore)
    wanted = selection.produced(targets) if targets else None
    capped = budget is not None or isinstance(rivals, Local)  # elsewhere the ratio is that of all rivals together
    statistics = Statistics(program, calibration_data, loss, seed, (*getattr(criterion, "needs", ()), *getattr(rivals, "needs", ())))
    named = selection.produced([pattern for pattern in pruning_ratio if pattern != "*"]) if isinstance(pruning_ratio, Mapping) else set()
    spared = {g.name for g in analysis.groups if g.spared} - (wanted or set()) - named
    meant = [
        g for g in analysis.groups
        if g.kind in kinds and g.name not in left_out | spared and (wanted is None or g.name in wanted) and ratios[g.name] != 0
    ]  # fmt: skip
    pace = _paces(rivals, meant, ratios, statistics)
    sizes, timed = split(budget)
    block = block_of(program) if sizes and round_to == "auto" else 1
    steps: dict[str, list[int]] = {}
    for group in meant:
        ratio = ratios[group.name]
        most = None if ratio is None or not capped else min(ratio * pace[group.name], 1.0)
        steps[group.name] = choices(group, round_to, widths, min_keep, most)
    allowed = one_per_product(analysis, [g for g in analysis.groups if steps.get(g.name)])
    if block > 1:
        whole = {g.name: whole_blocks(g, steps[g.name], block) for g in allowed}
        if can_meet(analysis, allowed, whole, sizes):
            steps |= whole
        else:  # so deep a cut leaves some convolutions less than one
            block = 1
    candidates = [
        Candidate(g, scores_of(criterion, g, statistics).numpy(), steps[g.name], ratios[g.name], pace[g.name]) for g in allowed
    ]
    asks_for_nothing = budget is None and all(not ratio for ratio in ratios.values()) and bool(ratios)
    if not candidates and not asks_for_nothing:
        raise NothingToPrune(_why(analysis, kinds, left_out, wanted, spared, steps, str(widths) if round_to == "auto" else ""))
    measured = Measured(timed, measure) if timed else None
    spread = ""
    if hasattr(rivals, "search"):
        if unfit := [name for name in timed if name != "latency_ms" or not getattr(rivals, "timed", False)]:
            raise InvalidInput(f"budget {unfit[0]}: this recipe searches by itself; give it a pruning_ratio or a budget of sizes")
        removed = rivals.search(candidates, budget, statistics) if not timed else rivals.search(candidates, sizes, statistics, measured)
    else:
        if measured is None:
            candidates, spread = fastest(analysis, candidates, rivals, budget)
        removed = allocate(analysis, candidates, rivals, sizes or (budget if measured is None else None), measured)
    if not removed and budget is None and not asks_for_nothing:
        raise NothingToPrune(_why(analysis, kinds, left_out, wanted, spared, steps, str(widths) if round_to == "auto" else ""))
    rounding = f"multiples of {round_to}, as asked" if round_to != "auto" else str(widths)
    if block > 1:
        rounding += f"; of {block} for convolutions under a budget"
    settings = _settings(locals()) | {"rounding": rounding}
    if spread:
        settings["spread"] = spread
    if measured is not None:
        settings["measured"] = {k: list(v) for k, v in measured.found.items()}
    plan = Plan.of(program, removed, repair, settings)
    Cut(analysis, plan.removed)  # states the constraints a second time, by its own code
    log.debug("%s", plan)
    return plan


def make_masks(
    program: Program,
    recipe: Recipe | None = None,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: str | Pattern | None = None,
    calibration_data: Any = None,
    ignore: Sequence[str] = (),
    targets: Sequence[str] = (),
    repair: Sequence[str] = (),
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
) -> tuple[Plan, Mapping[str, Tensor]]:
    """Decide which single weights become zero: the plan, and the weights that the method's own update came to.

    Args:
        recipe: a recipe for weights; magnitude when absent.
        sparsity: fraction of zeros in every matrix, one half when absent; N:M patterns bring their own.
        pattern: see `graphprune.sparsity.pattern_of`; the recipe's when absent.
        loss, seed: for recipes that swap weights (`graphprune.sparsity.swaps`).

    Raises:
        InvalidInput: an argument is not what it must be.
        NothingToPrune: no weight is left.
    """
    recipe = recipe or RECIPES["magnitude"]
    assert isinstance(recipe.score, Weights)
    shape = pattern_of(pattern if pattern is not None else str(recipe.unit))
    if isinstance(shape, NOfM) and isinstance(sparsity, float) and abs(sparsity - shape.sparsity) > 1e-6:
        raise InvalidInput(f"pattern {shape} has the sparsity {shape.sparsity:g}, found sparsity={sparsity!r}; leave it out")
    level = DEFAULT_SPARSITY if sparsity is None else sparsity
    if isinstance(recipe.score, Swaps) and not isinstance(shape, Unstructured):
        raise InvalidInput(f"recipe {recipe.name!r} swaps single weights; it takes the pattern 'unstructured', found {shape}")
    masks, weights = solve_masks(program, recipe.score, shape, level, data=calibration_data, ignore=ignore, targets=targets)
    if isinstance(recipe.score, Swaps):
        masks = recipe.score.refine(program, masks, calibration_data, loss, seed)
    own = tuple(name for name, update in UPDATES.items() if update == recipe.score.update)
    settings = {"recipe": recipe.name, "pattern": str(shape), "sparsity": dict(level) if isinstance(level, Mapping) else level}
    return replace(Plan.of(program, {}, (*own, *repair), settings), masks=masks), weights


def _kinds(units: Sequence[str]) -> set[str]:
    names = (units,) if isinstance(units, str) else tuple(units)
    for name in names:
        if name in NOT_CUT_YET:
            raise InvalidInput(f"units={name!r}: {NOT_CUT_YET[name]}")
        if name not in UNITS:
            raise InvalidInput(f"units holds {name!r}; known kinds are {', '.join(u for u in UNITS if u not in NOT_CUT_YET)}")
    if not names:
        raise InvalidInput(f"units is empty; choose among {', '.join(u for u in UNITS if u not in NOT_CUT_YET)}")
    return set(names)


def _or_the_next(kinds: set[str], found: set[str]) -> set[str]:
    """The default kinds; a network that has none of them, such as a stack of state-space layers, is cut at the next kind that it has."""
    for kind in ("ssm_head", "hidden"):
        if kind in found and not kinds & found:
            log.warning("the network has no group of the default units; those of kind %s are cut, or name others in units", kind)
            return {kind}
    return kinds


def _ratios(selection: Selection, groups: Sequence[Group], given: float | Mapping[str, float] | None) -> dict[str, float | None]:
    """Fraction that goes, by group name; None where only a budget says."""
    rows: dict[str, float | None] = dict(given) if isinstance(given, Mapping) else {"*": given}
    for pattern, ratio in rows.items():
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1):
            whose = "" if pattern == "*" else f" of {pattern!r}"
            raise InvalidInput(f"pruning_ratio{whose} is the fraction that goes, at least 0 and less than 1, found {ratio!r}")
    out: dict[str, float | None] = dict.fromkeys((g.name for g in groups), rows.get("*", 0.0))
    for pattern, ratio in rows.items():
        if pattern != "*":
            out.update(dict.fromkeys(selection.produced((pattern,)), ratio))
    return out


def _paces(rivals: Any, groups: Sequence[Group], ratios: Mapping[str, float | None], statistics: Statistics) -> dict[str, float]:
    """How many times the ratio asked for each group loses: what a curve over the layers says, else one."""
    pace = dict.fromkeys((g.name for g in groups), 1.0)
    if hasattr(rivals, "ratios"):
        for ratio in {ratios[g.name] for g in groups}:
            asked = DEFAULT_RATIO if ratio is None else ratio  # a budget alone: the shape of the curve at the default
            alike = [g for g in groups if ratios[g.name] == ratio]
            pace.update({name: max(found, 1e-9) / asked for name, found in rivals.ratios(alike, asked, statistics).items()})
    return pace


def _why(
    analysis: Analysis,
    kinds: set[str],
    left_out: set[str],
    wanted: set[str] | None,
    spared: set[str],
    steps: Mapping[str, list[int]],
    auto: str,
) -> str:
    """Why nothing can go: what the filters left, what `auto` widths keep, and what froze the rest."""
    groups = analysis.groups
    parts = []
    if groups:
        found = Counter(g.kind for g in groups)
        parts.append("groups found: " + ", ".join(f"{n} {kind}" for kind, n in found.most_common()))
        of_kind = [g for g in groups if g.kind in kinds]
        if not of_kind:
            parts.append(f"none is of the kinds in units ({', '.join(sorted(kinds))})")
        elif all(g.name in left_out for g in of_kind):
            parts.append("ignore covers all that units allows")
        elif wanted is not None and not any(g.name in wanted and g.name not in left_out for g in of_kind):
            parts.append("targets names none that units allows")
        elif all(g.name in left_out | spared for g in of_kind):
            parts.append(f"of those that units allows: {MADE_BY_CONSTANTS}")
        elif steps:
            parts.append("ratio, round_to and min_keep leave no unit to remove in any of them")
            if auto:
                parts.append(f'round_to="auto" keeps {auto}; round_to=1 keeps any number')
    frozen = Counter(why.reason.value for _, _, why in analysis.frozen_axes())
    if frozen and not steps:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in frozen.most_common(3))
        parts.append(f"{sum(frozen.values())} weight axes are frozen: {reasons}")
    elif not groups:
        parts.append("the network has no floating-point weights")
    return "nothing can be pruned: " + "; ".join(parts)


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How the plan was made, as JSON can hold it."""
    names = ("pruning_ratio", "budget", "units", "importance", "scope", "ignore", "targets", "round_to", "min_keep", "seed")

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(v) for v in value]
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        return getattr(value, "__name__", None) or type(value).__name__

    return {name: plain(arguments[name]) for name in names}
