"""Whole units go: plan and cut in one pass, or the cut of a saved plan. One step per group, in the order of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from graphprune.pass_manager import Pass, State, Step
from graphprune.plan import Plan
from graphprune.planning import make_plan
from graphprune.surgery import Cut, apply_cut
from graphprune.units import DEFAULT_UNITS


class _CutPass(Pass):
    """Applies a plan group by group."""

    def plan(self, state: State) -> Plan:
        raise NotImplementedError

    def steps(self, state: State) -> Sequence[Step]:
        removed = self.plan(state).resolve(state.program)
        return [Step(group.name, removed[group.name]) for group in state.program.groups if group.name in removed]

    def apply(self, state: State, steps: Sequence[Step]) -> State:
        if not steps:
            return state
        removed = {step.name: step.what for step in steps}
        cut = Cut(state.program.analysis, removed)
        plan = Plan.of(state.program, removed)
        return State(apply_cut(state.program, cut), state.program, cut, (*state.plans, plan))


@dataclass(frozen=True)
class StructuredPass(_CutPass):
    """Decide which units go, and cut them: the planning arguments of `graphprune.compile` that need no data."""

    name: ClassVar[str] = "prune"
    ratio: float | Mapping[str, float] | None = None  # fraction of units removed per group, or by pattern
    budget: Mapping[str, Any] | None = None  # what is kept
    units: tuple[str, ...] = DEFAULT_UNITS
    importance: str = "magnitude"
    scope: str = "local"
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    round_to: int | str = "auto"
    min_keep: int = 1
    seed: int = 0

    def plan(self, state: State) -> Plan:
        return make_plan(
            state.program,
            pruning_ratio=self.ratio,
            budget=self.budget,
            units=(self.units,) if isinstance(self.units, str) else self.units,
            importance=self.importance,
            scope=self.scope,
            ignore=self.ignore,
            targets=self.targets,
            round_to=self.round_to,
            min_keep=self.min_keep,
            seed=self.seed,
        )


@dataclass(frozen=True)
class ApplyPlanPass(_CutPass):
    """Cut what a saved plan says."""

    name: ClassVar[str] = "apply"
    path: str = "plan.json"

    def plan(self, state: State) -> Plan:
        return Plan.load(Path(self.path))
