"""From scores to the units that go: one ranking, a ratio or budgets, exact costs.

Every unit has a *turn* in (0, 1]: its rank among the units that it competes with, from the one that goes first to the one that goes last.
The scope says who competes: the units of one group (local), of all groups of one structure (isomorphic), or all (global). A ratio removes
every unit whose turn is not beyond it; a budget removes units by turn until the costs are met, then gives back, best units first, whatever
the budget still has room for. Under a budget of parameters or bytes, what has few MACs per parameter goes later and comes back first: see
`graphprune.allocation.spread`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from graphprune.allocation.measured import MEASURED, Measured
from graphprune.analysis import Analysis
from graphprune.branches import Branch
from graphprune.costs import Cost, CostModel, SizeOf
from graphprune.errors import BudgetNotMet, InvalidInput
from graphprune.units import Group

if TYPE_CHECKING:
    from graphprune.calibration import Statistics

log = logging.getLogger("graphprune")

_SLACK = 1e-9


# ---- who competes


class Scope(Protocol):
    """Says among which units a unit is ranked, and by what."""

    def rivals(self, group: Group) -> Any:
        """A key: groups of equal key compete."""

    def worth(self, group: Group, scores: np.ndarray, unit_cost: Callable[[Group], Cost]) -> np.ndarray:
        """What is ranked."""


class Curve(Protocol):
    """A scope that also says how much each layer loses."""

    def ratios(self, groups: Sequence[Group], ratio: float, statistics: Statistics) -> Mapping[str, float]:
        """Fraction that goes, by group name, `ratio` on average; of groups that are left out, `ratio`."""


@dataclass(frozen=True)
class Local:
    """Every group loses the same fraction.

    Args:
        uneven: not so under a budget of sizes, where groups that are poor in MACs lose less, see `graphprune.allocation.spread`: no group
            loses more than so many times what it would if all lost alike. More buys speed with accuracy; 1 is alike there too.

    Raises:
        InvalidInput: `uneven` is less than 1.
    """

    uneven: float = field(default=1.5, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.uneven, bool) or not isinstance(self.uneven, (int, float)) or not self.uneven >= 1:
            raise InvalidInput(f"uneven is a number from 1 to inf: 1 is every group alike, inf no bound; found {self.uneven!r}")

    def rivals(self, group: Group) -> Any:
        return group.name

    def worth(self, group: Group, scores: np.ndarray, unit_cost: Callable[[Group], Cost]) -> np.ndarray:
        return scores


@dataclass(frozen=True)
class Global:
    """One threshold over all groups.

    Args:
        per: "params", "macs" or "memory_mb" ranks by score per unit of that cost, so that expensive units go first; None by score alone.
        of: a ratio is the fraction of this cost that goes, over all rivals; None counts units.
    """

    per: str | None = None
    of: str | None = None

    def share(self, group: Group, unit_cost: Callable[[Group], Cost]) -> float:
        return 1.0 if self.of is None else float(_measure(self.of)(unit_cost(group)))

    def rivals(self, group: Group) -> Any:
        return "all"

    def worth(self, group: Group, scores: np.ndarray, unit_cost: Callable[[Group], Cost]) -> np.ndarray:
        if self.per is None:
            return scores
        return scores / max(float(_measure(self.per)(unit_cost(group))), 1e-12)


@dataclass(frozen=True)
class Isomorphic:
    """Groups of the same structure compete (Fang et al. 2024, arXiv 2407.04616).

    Equal structure: equal kinds, and members in equal roles, read by equal ops. Widths do not matter.
    """

    def rivals(self, group: Group) -> Any:
        return group.kind, tuple(sorted((m.role.value, m.axis, *sorted({n.op_type for n in m.value.uses})) for m in group.members))

    def worth(self, group: Group, scores: np.ndarray, unit_cost: Callable[[Group], Cost]) -> np.ndarray:
        return scores


SCOPES: dict[str, Scope] = {"local": Local(), "global": Global(), "isomorphic": Isomorphic()}


def scope_of(given: Any) -> Scope:
    """A scope by name, or one of the user's.

    Raises:
        InvalidInput: no scope has this name.
    """
    if isinstance(given, str):
        if given not in SCOPES:
            raise InvalidInput(f"scope {given!r} is not known; known are {', '.join(SCOPES)}")
        return SCOPES[given]
    if not (hasattr(given, "rivals") and hasattr(given, "worth")):
        raise InvalidInput(f"scope is one of {', '.join(SCOPES)} or an object with rivals() and worth(), found {type(given).__name__}")
    return given


# ---- budgets

BUDGETS: dict[str, Callable[[Cost], float]] = {
    "params": lambda cost: cost.params,
    "macs": lambda cost: cost.macs,
    "memory_mb": lambda cost: cost.memory_mb,
}


def _measure(name: str) -> Callable[[Cost], float]:
    if name not in BUDGETS:
        raise InvalidInput(f"no budget is named {name!r}; known are {', '.join((*BUDGETS, *MEASURED))}")
    return BUDGETS[name]


def limits_of(budget: Mapping[str, Any], dense: Cost) -> dict[str, float]:
    """What may be kept, in absolute numbers.

    "60%" is a fraction, and so is a number up to 1 for params and macs; `memory_mb` counts 10**6 bytes.

    Raises:
        InvalidInput: an unknown name, or a value that is no amount.
    """
    if not isinstance(budget, Mapping) or not budget:
        raise InvalidInput(f'budget says what is kept, as in {{"params": "60%", "macs": 2e9}}, found {budget!r}')
    found: dict[str, float] = {}
    for name, value in budget.items():
        total = _measure(name)(dense)
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            raise InvalidInput(f"budget {name}={value!r} is not an amount; write a fraction such as '60%' or a number") from None
        if not 0 < number < float("inf") or (text.endswith("%") and number > 100):
            raise InvalidInput(f"budget {name}={value!r} must be more than zero" + (" and at most 100%" if text.endswith("%") else ""))
        if text.endswith("%"):
            found[name] = total * number / 100
        else:
            found[name] = total * number if number <= 1 and name in ("params", "macs") else number
    return found


# ---- allocation


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may be cut: how many units may go, and which fraction of its rivals."""

    group: Group
    scores: np.ndarray  # (size,) float32
    removals: Sequence[int]  # allowed numbers of removed units, ascending
    ratio: float | None  # turns up to this go, without a budget
    pace: float = 1.0  # its turns come so many times as fast as those of others: curves over the layers, and the spread of a budget
    density: float = 0.0  # MACs per parameter of a unit: of what a budget has room for, units of low density come back first


def allocate(
    analysis: Analysis,
    candidates: Sequence[Candidate],
    scope: Scope,
    budget: Mapping[str, Any] | None = None,
    measured: Measured | None = None,
) -> dict[str, np.ndarray]:
    """Units to remove, by group name, sorted; groups that stay whole are left out. Equal scores go in the order of groups and units.

    Args:
        budget: what sizes answer; measured: what has to be measured.

    Raises:
        BudgetNotMet: the smallest network that the candidates allow costs more.
    """
    model = CostModel(analysis)
    steps = Steps(analysis, candidates, scope, unit_cost(model), all_of_them=budget is not None or measured is not None)
    limits = limits_of(budget, model.cost({})) if budget is not None else {}
    if limits and _met(model.cost({}), limits):
        log.warning("the budget is met by the network as it is; nothing is removed")
    if measured is not None:
        least = shortest(model, steps, limits) if limits else 0
        count = measured.prefix(steps.removed, least, len(steps))
        if count > least or not limits:
            return steps.removed(count)
    return steps.units(within(model, steps, limits)) if limits else steps.removed(len(steps))


def unit_cost(model: CostModel) -> Callable[[Group], Cost]:
    """What one unit of a group costs, all else uncut."""

    def price(group: Group) -> Cost:
        if isinstance(group.atom, Branch):
            return model.cost({}) - model.cost({group.atom: 0})
        return model.part(group.atom, {}) - model.part(group.atom, {group.atom: group.size - 1})

    return price


def _turns(candidates: Sequence[Candidate], scope: Scope, unit_cost: Callable[[Group], Cost]) -> list[np.ndarray]:
    """Per candidate (size,): rank among rivals over their number.

    Branches compete with branches in every scope: their scores cannot be compared with those of slices.
    """
    classes: dict[Any, list[int]] = {}
    for i, c in enumerate(candidates):
        classes.setdefault("layer" if c.group.kind == "layer" else scope.rivals(c.group), []).append(i)
    out: list[np.ndarray] = [np.empty(0)] * len(candidates)
    for members in classes.values():
        worth = np.concatenate([scope.worth(candidates[i].group, candidates[i].scores, unit_cost) for i in members])
        shares = np.concatenate([np.full(candidates[i].group.size, _share(scope, candidates[i].group, unit_cost)) for i in members])
        order = np.argsort(worth, kind="stable")
        turn = np.empty(len(worth))
        turn[order] = np.cumsum(shares[order]) / shares.sum()
        ends = np.cumsum([candidates[i].group.size for i in members])
        for i, part in zip(members, np.split(turn, ends[:-1])):
            out[i] = part / candidates[i].pace
    return out


def _share(scope: Scope, group: Group, unit_cost: Callable[[Group], Cost]) -> float:
    return 1.0 if isinstance(group.atom, Branch) or not hasattr(scope, "share") else scope.share(group, unit_cost)


class Step(NamedTuple):
    """One more removal."""

    turn: float  # of the last unit to go
    candidate: int
    gone: int  # number of units, after it


class Steps:
    """Removals in their order, from the units that go first to those that go last.

    Args:
        all_of_them: those beyond the candidates' ratios too.
    """

    def __init__(
        self,
        analysis: Analysis,
        candidates: Sequence[Candidate],
        scope: Scope,
        price: Callable[[Group], Cost],
        all_of_them: bool = True,
    ) -> None:
        self.candidates = candidates
        self.orders = [np.argsort(c.scores, kind="stable") for c in candidates]
        turns = _turns(candidates, scope, price)
        found = [
            Step(float(turns[i][order[count - 1]]), i, count)
            for i, (c, order) in enumerate(zip(candidates, self.orders))
            for count in c.removals
        ]
        if not all_of_them:
            found = [s for s in found if s.turn <= (candidates[s.candidate].ratio or 0.0) + _SLACK]
        self._steps = _possible(analysis, candidates, sorted(found))

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, i: int) -> Step:
        return self._steps[i]

    def counts(self, length: int) -> list[int]:
        """Units gone after so many steps, by candidate."""
        counts = [0] * len(self.candidates)
        for _, i, count in self._steps[:length]:
            counts[i] = max(counts[i], count)
        return counts

    def kept(self, length: int) -> dict[Any, int]:
        """Units left after so many steps, by atom; as `CostModel` takes it."""
        return kept_of(self.candidates, self.counts(length))

    def units(self, counts: Sequence[int]) -> dict[str, np.ndarray]:
        """The units that go where so many go, by group name."""
        rows = zip(self.candidates, self.orders, counts)
        return {c.group.name: np.sort(order[:count]) for c, order, count in rows if count}

    def removed(self, length: int) -> dict[str, np.ndarray]:
        """The units gone after so many steps, by group name."""
        return self.units(self.counts(length))


def _possible(analysis: Analysis, candidates: Sequence[Candidate], steps: Sequence[Step]) -> list[Step]:
    """Steps, taken in order, that leave every top-k enough to choose from and one branch in place."""
    limits: dict[Any, list[tuple[SizeOf, int]]] = {}
    for axis, least, _ in analysis.engine.limits:
        length = SizeOf.of(axis)
        for factor in length.atoms:
            limits.setdefault(factor, []).append((length, least))
    kept: dict[Any, int] = {}
    blocked: set[int] = set()
    found: list[Step] = []
    branches = sum(isinstance(c.group.atom, Branch) for c in candidates)
    for step in steps:
        _, i, count = step
        atom, size = candidates[i].group.atom, candidates[i].group.size
        if i in blocked:
            continue
        before = kept.get(atom, size)
        kept[atom] = size - count
        if isinstance(atom, Branch):
            branches -= 1
        if any(limit.at(kept) < least for limit, least in limits.get(atom, ())) or (isinstance(atom, Branch) and branches == 0):
            kept[atom] = before
            blocked.add(i)
        else:
            found.append(step)
    return found


def kept_of(candidates: Sequence[Candidate], counts: Sequence[int]) -> dict[Any, int]:
    return {c.group.atom: c.group.size - count for c, count in zip(candidates, counts) if count}


def _met(cost: Cost, limits: Mapping[str, float]) -> bool:
    return all(BUDGETS[name](cost) <= limit * (1 + 1e-12) for name, limit in limits.items())


def can_meet(analysis: Analysis, groups: Sequence[Group], removals: Mapping[str, Sequence[int]], budget: Mapping[str, Any]) -> bool:
    """Is a budget of sizes met where every group loses all that it may?"""
    model = CostModel(analysis)
    return _met(model.cost({g.atom: g.size - max(removals[g.name]) for g in groups}), limits_of(budget, model.cost({})))


def shortest(model: CostModel, steps: Steps, limits: Mapping[str, float]) -> int:
    """How many steps, in order, it takes until every limit holds.

    Raises:
        BudgetNotMet: all of them do not suffice.
    """
    dense = model.cost({})
    if _met(dense, limits):
        return 0
    smallest = model.cost(steps.kept(len(steps)))
    if not _met(smallest, limits):
        worst = "; ".join(
            f"{name} {_amount(limit)} of {_amount(BUDGETS[name](dense))} was asked for, {_amount(BUDGETS[name](smallest))} is the smallest "
            "that units, ratio, round_to, min_keep and ignore allow"
            for name, limit in limits.items()
            if BUDGETS[name](smallest) > limit
        )
        raise BudgetNotMet(f"the budget cannot be met: {worst}")
    low, high = 0, len(steps)  # steps[:high] meets the budget, steps[:low] does not
    while high - low > 1:
        middle = (low + high) // 2
        if _met(model.cost(steps.kept(middle)), limits):
            high = middle
        else:
            low = middle
    return high


def within(model: CostModel, steps: Steps, limits: Mapping[str, float]) -> list[int]:
    """Numbers of removed units under which every limit holds, and would not hold with any one step less."""
    candidates = steps.candidates
    high = shortest(model, steps, limits)
    taken = [steps[i] for i in range(high)]
    counts = steps.counts(high)
    now = kept_of(candidates, counts)
    cost = model.cost(now)
    earlier: dict[tuple[int, int], int] = {}  # (candidate, count) -> count one step before
    last = [0] * len(candidates)
    for _, i, count in taken:
        earlier[i, count] = last[i]
        last[i] = count
    stuck: set[int] = set()  # costs are sums of products of sizes: what does not fit now will not fit once more has come back
    for _, i, count in sorted(reversed(taken), key=lambda step: candidates[step.candidate].density):
        if i in stuck:
            continue
        group, less = candidates[i].group, earlier[i, count]
        price = model.cost if isinstance(group.atom, Branch) else partial(model.part, group.atom)
        before = price(now)
        now[group.atom] = group.size - less
        changed = cost - before + price(now)
        if _met(changed, limits):
            cost, counts[i] = changed, less
        else:
            now[group.atom] = group.size - count
            stuck.add(i)
    return counts


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
