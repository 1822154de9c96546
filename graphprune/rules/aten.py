"""Dim rules of the ATen op set (the training IR of torch.export, with or without functionalisation), keyed by base name without overload.

Most ops are a line of the notation or a row of a family; elementwise ops that are not listed get their rule from `torch.Tag.pointwise`.
An in-place spelling (`add_`) has the rule of its functional one.
"""

from __future__ import annotations

from graphprune.rules.aten_contractions import CONTRACTIONS, SPATIAL
from graphprune.rules.aten_elementwise import ELEMENTWISE, NORMS, REDUCTIONS, Rule, opaque
from graphprune.rules.aten_indices import INDICES
from graphprune.rules.aten_shapes import SHAPES

ATEN: dict[str, Rule] = {**CONTRACTIONS, **SPATIAL, **ELEMENTWISE, **REDUCTIONS, **NORMS, **SHAPES, **INDICES}

__all__ = ["ATEN", "Rule", "opaque"]
