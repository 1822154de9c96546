"""What the proof sees inside the network: every node that reads a cut weight, in the masked network and in the pruned one.

An output can hide a cut (behind a gate that is closed, a threshold that is not reached, a branch scaled by 1e-6); the node that reads the
weight cannot, unless nothing but zeros comes to it. So the results of these nodes are compared too, at the kept positions, and groups
with a node to which nothing came are told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graphprune.program import Node, Program, Value
from graphprune.surgery.cut import Cut
from graphprune.verify.masking import Observe

SAMPLES = 4  # positions compared along an axis that is not cut
SMALLEST = 1e-6  # of the largest result: differences in smaller ones are measured against this


@dataclass(frozen=True)
class Sample:
    """All kept positions along the axes of a result that are cut, a few along the others; and the shape that it was taken from."""

    shape: tuple[int, ...]
    tensor: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, keeps: Mapping[int, Any], select: bool) -> Sample:
        """`select`: positions that are not kept are still there."""
        shape = list(x.shape)
        for axis, size in enumerate(x.shape):
            if axis not in keeps and size > SAMPLES:
                x = x.index_select(axis, torch.linspace(0, size - 1, SAMPLES, device=x.device).long())
        for axis, keep in keeps.items() if select else ():
            x = x.index_select(axis, torch.from_numpy(keep).to(x.device))
            shape[axis] = len(keep)
        return cls(tuple(shape), x.detach().clone())

    @property
    def largest(self) -> float:
        return _largest(self.tensor)

    def apart(self, other: Sample) -> float:
        """Largest difference; 0 where sizes are told by data and the analysis did not know that they are cut."""
        if self.shape != other.shape:
            return 0.0
        finite = torch.isfinite(other.tensor)
        if not torch.equal(torch.isfinite(self.tensor), finite):
            return float("inf")
        return _largest((self.tensor - other.tensor)[finite])


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0


@dataclass
class Seen:
    """One run: results of the nodes that are watched, by node of the original, and those to which more than zeros came."""

    results: dict[Node, list[Sample]] = field(default_factory=dict)
    reached: set[Node] = field(default_factory=set)


class Sites:
    """The nodes of both networks that read the same cut weights, in pairs.

    Args:
        weights: those that lose something.
    """

    def __init__(self, program: Program, pruned: Program, cut: Cut, weights: Iterable[Value]) -> None:
        names = {value.name for value in weights}
        mine, theirs = _readers(program, names), _readers(pruned, names)
        self.cut = cut
        both = [key for key in mine if len(mine[key]) == len(theirs.get(key, ()))]  # others go with a layer, or were folded
        self.twins = {b: a for key in both for a, b in zip(mine[key], theirs[key])}  # node of the pruned network -> of the original
        self.weights = {node: key for key in both for node in mine[key]}
        self.idle = set(self.weights)  # those to which nothing but zeros came so far

    def masked(self, seen: Seen) -> Observe:
        """For a run of the original network, masked."""

        def observe(node: Node, args: Mapping[str, Any], results: tuple[Any, ...]) -> None:
            if node not in self.weights:
                return
            seen.results[node] = [Sample.of(x, self.cut.keeps(v), select=True) for v, x in zip(node.outputs, results) if _floats(x)]
            if node not in seen.reached:  # not so in an earlier turn of a loop
                given = [args[name] for name, v in node.args.items() if isinstance(v, Value) and v.tensor is None and _floats(args[name])]
                if not given or any(bool(x.any()) for x in given):
                    seen.reached.add(node)

        return observe

    def pruned(self, seen: Seen) -> Observe:
        """For a run of the pruned network."""

        def observe(node: Node, args: Mapping[str, Any], results: tuple[Any, ...]) -> None:
            if (twin := self.twins.get(node)) is not None:
                seen.results[twin] = [Sample.of(x, self.cut.keeps(v), select=False) for v, x in zip(twin.outputs, results) if _floats(x)]

        return observe

    def errors(self, found: Seen, expected: Seen) -> dict[str, float]:
        """Largest difference at every node, relative to its largest result, by the weights that it reads, in the order of the graph."""
        largest = {node: max((y.largest for y in ys), default=0.0) for node, ys in expected.results.items()}
        least = max(1e-30, SMALLEST * max(largest.values(), default=0.0))
        errors: dict[str, float] = {}
        for node, ys in expected.results.items():
            name = " + ".join(self.weights[node])
            apart = max((x.apart(y) for x, y in zip(found.results.get(node, ()), ys)), default=0.0)
            errors[name] = max(errors.get(name, 0.0), apart / max(largest[node], least))
        return errors

    @property
    def unreached(self) -> list[str]:
        """Groups with a node that was given nothing but zeros so far."""
        idle = {name for node in self.idle for name in self.weights[node]}
        by_name = self.cut.analysis.by_name
        return [name for name in self.cut.removed if any(member.tensor in idle for member in by_name[name].members)]


def _readers(program: Program, names: set[str]) -> dict[tuple[str, ...], list[Node]]:
    """Nodes in the order of the graph, by the names of the cut weights that they read."""
    found: dict[tuple[str, ...], list[Node]] = {}
    for node in program.walk():
        read = tuple(v.name for v in node.inputs if v.is_weight and v.name in names)
        if read:
            found.setdefault(read, []).append(node)
    return found


def _floats(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()
