"""Rewrites that leave a network what it is, before units are chosen: what recipes and plans name as `prepare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from graphprune.program import Program
from graphprune.repair import replace_weight
from graphprune.repair.rotation import rotation
from graphprune.surgery import Cut, apply_cut


def rotated(program: Program, data: Any = None, basis: Tensor | None = None) -> Program:
    """The same network with its residual stream in another basis, see `graphprune.repair.rotation`; the program given stays as it is.

    Raises:
        InvalidInput: the stream cannot be rotated, and what is in the way.
    """
    new = rotation(program, data, basis)
    out = apply_cut(program, Cut(program.analysis, {}))
    for name, tensor in new.items():
        replace_weight(out, name, tensor)
    return out


PREPARATIONS: dict[str, Callable[[Program, Any], Program]] = {"rotate": rotated}
