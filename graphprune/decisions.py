"""From the arguments of `compile` and `plan` to a plan: a recipe filled in, data made ready, and the program prepared."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from graphprune.allocation import Local, scope_of
from graphprune.calibration import noise, reread
from graphprune.errors import InvalidInput
from graphprune.plan import Plan
from graphprune.planning import make_masks, make_plan
from graphprune.prepare import PREPARATIONS
from graphprune.program import Program
from graphprune.recipes import recipe_of
from graphprune.repair import DATA_FREE, check_repairs
from graphprune.units import DEFAULT_UNITS
from graphprune.widths import RULE, Widths

Clock = Callable[[str], AbstractContextManager[Any]]  # times a stage


@dataclass(frozen=True)
class Decision:
    """A plan, and what it was decided on."""

    program: Program  # prepared as the recipe says
    plan: Plan
    data: Any  # calibration data that can be read again; None without
    solved: Mapping[str, Tensor] | None  # weights that the masks' own repair came to
    trials: Any  # what measured budgets were tried on: `Trials`, or a `measure` of the caller


def decide(
    captured: Callable[[], Program],
    trials: Callable[..., Any],
    clock: Clock = lambda stage: nullcontext(),
    widths: Callable[[Program], Widths] = lambda program: RULE,
    *,
    recipe: Any = None,
    pruning_ratio: float | Mapping[str, float] | None = None,
    budget: Mapping[str, Any] | None = None,
    units: Sequence[str] = DEFAULT_UNITS,
    sparsity: float | None = None,
    pattern: str | None = None,
    importance: Any = "magnitude",
    scope: Any = "local",
    ignore: Sequence[str] = (),
    targets: Sequence[str] = (),
    round_to: int | str = "auto",
    min_keep: int = 1,
    repair: Sequence[str] = (),
    calibration_data: Any = None,
    num_samples: int | None = None,
    loss: Callable | None = None,
    metric: Callable | None = None,
    seed: int = 0,
) -> Decision:
    """Decide what goes. What the arguments alone show to be wrong is said before anything is captured.

    Args:
        captured: gives the program.
        trials: `trials(program, metric=, repair=, calibration_data=)` gives the candidates that measured budgets are tried on.
        widths: gives what round_to="auto" means for the program where it is to run.
        The others: see `graphprune.compile`.

    Raises:
        InvalidInput, NothingToPrune, BudgetNotMet: as `graphprune.compile`.
    """
    units, ignore, targets, repair = ((names,) if isinstance(names, str) else names for names in (units, ignore, targets, repair))
    method = recipe_of(recipe) if recipe is not None else None
    sparse = method.sparse if method is not None else sparsity is not None or pattern is not None
    if method is not None:
        for name, value, usual in (("importance", importance, "magnitude"), ("scope", scope, "local")):
            if value != usual:
                raise InvalidInput(f"{name}={value!r} and recipe={method.name!r} both say what goes; leave one out")
        if method.data and calibration_data is None:
            raise InvalidInput(f"recipe {method.name!r} needs calibration_data: an iterable of inputs such as the network gets in use")
        if not sparse:
            scope = scope_of(method.allocation)
            scope = replace(scope, uneven=1.0) if isinstance(scope, Local) else scope  # a published method stays what it is
            importance, repair = method.score, (*method.repair, *(r for r in repair if r not in method.repair))
            units = method.unit if tuple(units) == DEFAULT_UNITS else units  # type: ignore[assignment]
            if sparsity is not None or pattern is not None:
                raise InvalidInput(f"recipe {method.name!r} removes units; it takes a pruning_ratio, no sparsity or pattern")
    if sparse and (pruning_ratio is not None or budget is not None):
        who = "sparsity= and pattern=" if method is None else f"recipe {method.name!r}, sparsity= and pattern="
        raise InvalidInput(f"{who} put zeros into weights and take no pruning_ratio or budget; cut units in a second call")
    if pruning_ratio is None and budget is None and not repair and not sparse:
        repair = DATA_FREE
    noisy = method.noise if method is not None and calibration_data is None else 0
    check_repairs(repair, () if noisy else calibration_data)
    program = captured()
    if calibration_data is not None and num_samples is not None:
        calibration_data = list(itertools.islice(calibration_data, num_samples))
    data = noise(program, noisy, seed) if noisy else reread(calibration_data)
    prepared = method.prepare if method is not None else None
    if prepared:
        with clock("prepare"):
            program = PREPARATIONS[prepared](program, data)
    tried = trials(program, metric=metric, repair=repair, calibration_data=data)
    with clock("plan"):
        if sparse:
            plan, solved = make_masks(
                program, method, sparsity=sparsity, pattern=pattern, calibration_data=data, ignore=ignore, targets=targets, repair=repair,
                loss=loss, seed=seed,
            )  # fmt: skip
            return Decision(program, plan, data, solved, tried)
        plan = make_plan(
            program, pruning_ratio=pruning_ratio, budget=budget, units=units, importance=importance, scope=scope, ignore=ignore,
            targets=targets, round_to=round_to, min_keep=min_keep, repair=repair, calibration_data=data, loss=loss, seed=seed,
            measure=tried, widths=widths(program) if round_to == "auto" else RULE,
        )  # fmt: skip
    if prepared:
        plan = replace(plan, settings={**plan.settings, "prepare": prepared})
    return Decision(program, plan, data, None, tried)


def known_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given to `decide` by name, or an error that lists what it takes."""
    known = {name for name, it in inspect.signature(decide).parameters.items() if it.kind is it.KEYWORD_ONLY}
    if unknown := sorted(set(given) - known):
        raise InvalidInput(f"unknown argument {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return dict(given)
