"""How far each group may shrink, and in which steps: rounding, what must stay, and groups that are factors of one axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from graphprune import axes as ax
from graphprune.analysis import Analysis
from graphprune.axes import Axis, Factor
from graphprune.errors import InvalidInput
from graphprune.program import Value
from graphprune.units import Group, Member, Role
from graphprune.widths import ALIGNED, RULE, Widths, fitted

WIDE = 64  # from this width on, "auto" keeps multiples

_SLACK = 1e-9  # 0.7 * 10 is a little less than 7


def rounding(group: Group, round_to: int | str, widths: Widths = RULE) -> int:
    """Kept units come in multiples of this.

    With a number, every axis that the group runs along gets a multiple of so many positions: a head of 64 positions satisfies 8 as it
    is. "auto" is what `widths` says (8 by rule) where the group is at least 64 positions wide, less for narrower convolutions, and 1 inside
    grouped convolutions, for other narrow layers, and where a multiple would leave no choice.

    Raises:
        InvalidInput: `round_to` is neither "auto" nor a positive number.
    """
    if round_to != "auto" and (not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1):
        raise InvalidInput(f"round_to is 'auto' or a positive number, found {round_to!r}")
    if group.kind == "layer":
        return 1
    step = 1
    for member in group.members:
        width = member.index.shape[1]
        if round_to == "auto":
            if in_grouped_convolution(member.value):
                return 1
            multiple = _multiple(member, group.size * width, widths)
            step = math.lcm(step, multiple // math.gcd(multiple, width))
        else:
            assert isinstance(round_to, int)
            step = math.lcm(step, round_to // math.gcd(round_to, width))
    if round_to == "auto" and step >= group.size:
        return 1
    return step


def _multiple(member: Member, width: int, widths: Widths) -> int:
    convolution = _convolves(member)
    if width < WIDE:
        return fitted(min(widths.multiple(True, width), widths.narrow), width) if convolution else 1
    if member.role is Role.CARRIER:  # norms and tables take any width; what they stand beside decides
        return fitted(min(widths.multiple(kind, width) for kind in (False, True)), width)
    return fitted(widths.multiple(convolution, width), width)


def choices(group: Group, round_to: int | str, widths: Widths, min_keep: int, most: float | None) -> list[int]:
    """`removals` in steps of `rounding`; by "auto" only what pays, and where coarse steps leave nothing, finer ones down to the rule's."""
    while True:
        found = removals(group, rounding(group, round_to, widths), min_keep, most)
        if round_to != "auto":
            return found
        found = _paying(group, widths, found)
        if found or widths.coarsest <= ALIGNED:
            return found
        widths = widths.finer()


def _paying(group: Group, widths: Widths, found: list[int]) -> list[int]:
    """Those that leave a width at which every layer of the group was measured to be faster; narrow layers have no say."""
    if group.kind in APART or any(in_grouped_convolution(it.value) for it in group.members):
        return found
    layers = {(_convolves(it), it.index.shape[1]) for it in group.members if it.role is not Role.CARRIER}
    layers = {(convolution, unit) for convolution, unit in layers if group.size * unit >= WIDE}
    return [n for n in found if all(widths.pays(kind, group.size * unit, (group.size - n) * unit) for kind, unit in layers)]


def _convolves(member: Member) -> bool:
    return any("onv" in node.op_type for node in member.value.uses)


def in_grouped_convolution(weight: Value) -> bool:
    """Is it the weight of a convolution with several groups of more than one channel?"""
    shape: tuple[int, ...] = weight.shape or ()
    if len(shape) < 3 or shape[1] == 1:
        return False
    return any(int(node.args.get("groups") or node.args.get("group") or 1) > 1 for node in weight.uses)


def removals(group: Group, step: int, min_keep: int, most: float | None) -> list[int]:
    """The numbers of units that may go, ascending, zero left out.

    Args:
        step: kept units are a multiple of this.
        most: the largest fraction that may go, or None for no such limit.
    """
    least = group.min_keep if group.kind == "layer" else max(1, min_keep, group.min_keep)
    limit = group.size - least
    if most is not None and group.kind != "layer":
        limit = min(limit, math.floor(group.size * most + _SLACK))
    largest = (group.size - 1) // step * step  # the largest multiple below the size
    return [group.size - kept for kept in range(largest, -1, -step) if 0 < group.size - kept <= limit]


# Of two groups that multiply in one axis only one is cut: a nominal ratio of 0.5 must not leave a quarter of the axis. The first kind of
# this list takes it, as cutting whole key-value groups shrinks all four projections and the cache; of one kind the inner factor does
# (channels inside the groups of a convolution, not whole groups), as that narrows the convolution itself on both sides.
PREFERENCE = ("kv_group", "head", "ssm_head", "neuron", "channel", "hidden", "vocab", "head_dim", "ssm_state")
APART = ("expert", "layer")  # whole networks inside the network: they are cut beside what they hold


def one_per_product(analysis: Analysis, groups: Sequence[Group]) -> list[Group]:
    """The groups without those that multiply with a preferred one in an axis of some weight."""
    atoms = {g.atom: g for g in groups if g.kind not in APART}
    rivals: dict[Factor, set[Factor]] = {}
    depth: dict[Factor, int] = {}
    for value in dict.fromkeys(m.value for g in groups for m in g.members):
        for axis in analysis.axes(value) or ():
            for left, right in _pairs(axis, atoms.__contains__):
                rivals.setdefault(left, set()).add(right)
                rivals.setdefault(right, set()).add(left)
                depth[right] = max(depth.get(right, 0), depth.get(left, 0) + 1)
    place = {g.atom: i for i, g in enumerate(groups)}
    order = sorted(rivals, key=lambda atom: (PREFERENCE.index(atoms[atom].kind), -depth.get(atom, 0), place[atom]))
    dropped: set[Factor] = set()
    for atom in order:
        if atom not in dropped:
            dropped.update(rivals[atom])
    return [g for g in groups if g.atom not in dropped]


def _pairs(axis: Axis, wanted: Callable[[Factor], bool]) -> Iterator[tuple[Factor, Factor]]:
    """Leaves that multiply, the outer one first."""
    outer: list[Factor] = []
    for factor in ax.normal(axis):
        leaves = [leaf for leaf in dict.fromkeys(ax.leaves_of([factor])) if wanted(leaf)]
        yield from ((left, right) for left in outer for right in leaves if left is not right)
        outer += leaves
        for part in factor.total or ():
            yield from _pairs(part, wanted)
