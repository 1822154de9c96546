"""A plan seen from the graph: which positions of which axis stay. The one place where decisions become positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from graphprune import axes as ax
from graphprune.analysis import Analysis, axis_key
from graphprune.axes import Axis, Factor
from graphprune.branches import Branch
from graphprune.errors import InvalidInput
from graphprune.program import Kind, Node, Value


class Cut:
    """Kept positions of every axis of every value under a choice of removed units.

    Args:
        analysis: the solved program.
        removed: group name -> units to remove.

    Raises:
        InvalidInput: an unknown group, a unit out of range, or a group left with too few units.
    """

    def __init__(self, analysis: Analysis, removed: Mapping[str, Iterable[int]]) -> None:
        self.analysis = analysis
        self.removed = {name: tuple(sorted(set(map(int, units)))) for name, units in removed.items()}
        self.removed = {name: units for name, units in self.removed.items() if units}
        self.kept: dict[Factor, np.ndarray] = {}
        self.bypassed: dict[Node, Branch] = {}  # additions whose branch goes
        self._masks: dict[tuple, np.ndarray | None] = {}
        for name, units in self.removed.items():
            if name not in analysis.by_name:
                raise InvalidInput(f"the plan removes units of group {name!r}, which this network does not have")
            group = analysis.by_name[name]
            if units[0] < 0 or units[-1] >= group.size:
                raise InvalidInput(
                    f"group {name!r} has units 0..{group.size - 1}, the plan removes {units[-1] if units[0] >= 0 else units[0]}"
                )
            if group.size - len(units) < group.min_keep:
                raise InvalidInput(
                    f"group {name!r} must keep {group.min_keep} of {group.size} units, the plan keeps {group.size - len(units)}"
                )
            if isinstance(group.atom, Branch):
                self.bypassed[group.atom.join] = group.atom
                continue
            stays = np.ones(group.size, bool)
            stays[list(units)] = False
            self.kept[group.atom] = stays
        for axis, least, node in analysis.engine.limits:
            mask = self.mask(axis)
            if mask is not None and mask.sum() < least:
                raise InvalidInput(f"{node.op_type} at {node.name} takes {least} of its axis, the plan leaves {int(mask.sum())}")

    def mask(self, axis: Axis) -> np.ndarray | None:
        """Boolean (size,): which positions of an axis stay; None when all do."""
        key = axis_key(axis)
        if key not in self._masks:
            self._masks[key] = ax.mask(axis, self.kept)
        return self._masks[key]

    def keep(self, value: Value, axis: int, node: Node | None = None) -> np.ndarray | None:
        """Kept positions (int64, sorted) of one axis, or None when nothing is removed. A constant is cut per use: name the `node` that
        reads it.
        """
        dims = self.analysis.axes(value, node)
        if not dims:
            return None
        mask = self.mask(dims[axis])
        return None if mask is None else np.flatnonzero(mask)

    def keeps(self, value: Value, node: Node | None = None) -> dict[int, np.ndarray]:
        """Axis -> kept positions, for the axes that lose some."""
        found = {axis: self.keep(value, axis, node) for axis in range(len(value.shape or ()))}
        return {axis: keep for axis, keep in found.items() if keep is not None}

    def shape(self, value: Value, node: Node | None = None) -> tuple[int, ...]:
        """The shape after the cut, at the example sizes."""
        assert value.shape is not None
        new = list(value.shape)
        for axis, keep in self.keeps(value, node).items():
            new[axis] = len(keep)
        return tuple(new)

    def touches(self, node: Node) -> bool:
        """Does any operand or result of the node change shape?"""
        return any(self.keeps(v, node) for v in (*node.inputs, *node.outputs) if v.shape is not None)

    @property
    def weights(self) -> dict[Value, dict[int, np.ndarray]]:
        """Every weight that loses something: axis -> kept positions."""
        found = {v: self.keeps(v) for v in self.analysis.program.weights.values() if v.kind is not Kind.CONSTANT}
        return {v: keeps for v, keeps in found.items() if keeps}
