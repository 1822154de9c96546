"""What can be cut: a `Group` is a set of units that live and die together in every tensor they touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from graphprune.program import Value

UNITS = ("channel", "neuron", "head", "kv_group", "head_dim", "expert", "hidden", "layer", "ssm_head", "ssm_state", "vocab", "token")
DEFAULT_UNITS = ("channel", "neuron", "head", "kv_group", "expert")
INNER_UNITS = ("channel", "neuron", "head", "kv_group", "ssm_head")  # slices of the matrices inside a layer, no whole networks


class Role(Enum):
    """How a weight meets a group's axis."""

    WRITER = "writer"  # the axis is produced: rows of a linear, filters of a conv
    READER = "reader"  # the axis is contracted away
    CARRIER = "carrier"  # norm scales, biases, tables


MADE_BY_CONSTANTS = "no weight makes it, constants in the code do; cut only where targets or pruning_ratio names the group"


class Exactness(Enum):
    """What removing a zeroed unit does to the rest of the network; computed, not declared."""

    EXACT = "exact"
    RENORMALISED = "renormalised"  # a norm's statistics run over the axis: they become those of the kept units
    APPROXIMATE = "approximate"  # a sum runs over the axis where nothing vanishes


@dataclass(eq=False)
class Member:
    """One weight axis of a group. Unpacks as `(tensor, axis, index)`."""

    value: Value
    axis: int
    role: Role
    _index: Callable[[], np.ndarray] = field(repr=False)

    @property
    def tensor(self) -> str:
        return self.value.name

    @cached_property
    def index(self) -> np.ndarray:
        """(group.size, width) int64: the positions along `axis` that belong to each unit."""
        return self._index()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.tensor, self.axis, self.index))


@dataclass(eq=False)
class Group:
    """Units `0 .. size-1` that can be removed, and all that removing one of them touches."""

    name: str  # stable between captures of one network
    kind: str  # one of UNITS
    size: int
    members: tuple[Member, ...]
    exact: Exactness
    min_keep: int = 1  # a top-k over the axis needs at least k units
    atom: Any = field(default=None, repr=False)  # the factor of the axis algebra behind it
    note: str = ""  # the node that makes it renormalised or approximate

    @property
    def spared(self) -> str:
        """Why the group is cut only where it is named; empty for most groups.

        An axis that no weight makes comes from constants in the user's code, such as the angles of a time embedding: cut, it would leave
        a network that this code cannot express.
        """
        return MADE_BY_CONSTANTS if all(m.role is Role.READER for m in self.members) else ""

    @property
    def parameters(self) -> int:
        """Weights entries that one unit owns, other groups uncut."""
        return sum(int(m.value.tensor.numel()) // m.value.shape[m.axis] * m.index.shape[1] for m in self.members)
