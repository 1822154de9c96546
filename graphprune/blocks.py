"""Repeated blocks, found from structure: which residual branches form one layer of a deep network, and which groups lie in it.

A new block begins where a branch holds the same kinds of groups as one that the block already has: attention, then a feed-forward part,
then attention again. A network without branches has no blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from graphprune.branches import Branch, branches
from graphprune.program import Node, Program, Value
from graphprune.units import Group, Role

ACROSS = ("hidden", "layer", "vocab", "token")  # kinds that no branch has for itself


@dataclass(frozen=True, eq=False)
class Stage:
    """A run of residual branches: reads `entry`, and ends with the addition `end`."""

    branches: tuple[Branch, ...]

    @property
    def entry(self) -> Value:
        return self.branches[0].skip

    @property
    def start(self) -> Node:
        """The addition that reads `entry`."""
        return self.branches[0].join

    @property
    def end(self) -> Node:
        return self.branches[-1].join

    @property
    def name(self) -> str:
        """The dotted path that all its weights have in common, up to its last number: as a rule that of a module."""
        paths = [value.name.split(".")[:-1] for branch in self.branches for value in branch.weights]
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))]
        end = max((i for i, part in enumerate(shared, 1) if part.isdigit()), default=len(shared))
        return ".".join(shared[:end])


def stages(program: Program) -> list[Stage]:
    """The blocks of a network, in topological order."""
    kinds: dict[Value, set[str]] = {}
    for group in program.analysis.groups:
        if group.kind not in ACROSS:
            for value in _maps(group):
                kinds.setdefault(value, set()).add(group.kind)
    found: list[list[Branch]] = []
    seen: set[frozenset[str]] = set()
    for branch in branches(program):
        signature = frozenset().union(*(kinds.get(v, ()) for v in branch.weights))
        if not signature:
            continue
        if not found or signature in seen or branch.skip.shape != found[-1][0].skip.shape:
            found.append([])
            seen = set()
        found[-1].append(branch)
        seen.add(signature)
    return [Stage(tuple(part)) for part in found]


def named_blocks(program: Program) -> dict[str, list[str]]:
    """Name of a block -> its groups of kind layer; blocks without a name of their own are left out.

    Without these branches the block passes its input on; what lies between them, as the norms behind the additions of an encoder, stays.
    """
    groups = {group.atom.join: group.name for group in program.analysis.groups if group.kind == "layer"}
    found = stages(program)
    times = Counter(stage.name for stage in found)
    return {stage.name: [groups[b.join] for b in stage.branches] for stage in found if stage.name and times[stage.name] == 1}


def stage_of(program: Program, groups: Sequence[Group]) -> dict[str, Stage]:
    """The block that each group lies in, by group name; groups outside of all blocks, or in several, are left out."""
    home = {value: stage for stage in stages(program) for branch in stage.branches for value in branch.weights}
    out: dict[str, Stage] = {}
    for group in groups:
        places = {home.get(value) for value in _maps(group)} if group.kind not in ACROSS else set()
        if len(places) == 1 and (stage := places.pop()) is not None:
            out[group.name] = stage
    return out


def _maps(group: Group) -> list[Value]:
    return [m.value for m in group.members if m.role is not Role.CARRIER]
