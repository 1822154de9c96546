"""Depth units: residual branches, found where an addition joins a value with something computed from it.

In `y = x + f(x)` the region f is every node that is reached from x and reaches the addition. It may read values from elsewhere (masks,
rotary tables); nothing outside may read what it computes. Removing the unit replaces y by x, which is exactly the network whose branch
gives zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graphprune.program import Node, Program, Value

ADDITIONS = {("aten", "add"): ("self", "other"), ("", "Add"): ("A", "B")}  # op -> names of its two operands


@dataclass(frozen=True, eq=False)
class Branch:
    """`join` adds `skip` and the output of `region`; without the branch it is `skip`."""

    join: Node
    skip: Value
    end: Value
    region: tuple[Node, ...]

    @property
    def weights(self) -> list[Value]:
        """Weights that only this branch reads."""
        inside = {*self.region}
        read = dict.fromkeys(v for node in self.region for v in node.inputs if v.is_weight)
        return [v for v in read if all(use in inside for use in v.uses)]


def branches(program: Program) -> Iterator[Branch]:
    """All residual branches that hold weights of their own, in topological order."""
    order = {node: i for i, node in enumerate(program.nodes)}
    leaving = set(program.outputs)
    for join in program.nodes:
        names = ADDITIONS.get(join.op)
        if names is None:
            continue
        pair: list[Any] = [join.args.get(name) for name in names]
        if not all(isinstance(v, Value) and v.shape == join.outputs[0].shape for v in pair):
            continue
        for skip, end in (pair, pair[::-1]):
            region = _region(program, order, leaving, join, skip, end)
            if region and (branch := Branch(join, skip, end, region)).weights:
                yield branch
                break


def _region(program: Program, order: dict[Node, int], leaving: set[Value], join: Node, skip: Value, end: Value) -> tuple[Node, ...] | None:
    """Nodes between `skip` and `end`, or None when `end` does not depend on `skip` or something outside reads one of them."""
    start = order[skip.producer] + 1 if skip.producer in order else 0
    window = program.nodes[start : order[join]]
    if end.producer is None or order.get(end.producer, -1) < start:
        return None
    reached = {skip}
    for node in window:
        if any(v in reached for v in node.inputs):
            reached.update(node.outputs)
    if end not in reached:
        return None
    wanted, region = {end}, []
    for node in reversed(window):
        if any(v in wanted for v in node.outputs):
            region.append(node)
            wanted.update(v for v in node.inputs if v in reached and v is not skip)
    inside = {*region, join}
    for node in region:
        if node.blocks or any(v in leaving or any(use not in inside for use in v.uses) for v in node.outputs):
            return None
    return tuple(reversed(region))
