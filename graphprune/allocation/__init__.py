"""Which units go: who competes, budgets on exact costs, and the constraints on every group."""

from graphprune.allocation.allocate import BUDGETS, SCOPES, Candidate, Global, Isomorphic, Local, allocate, can_meet, limits_of, scope_of
from graphprune.allocation.limits import choices, one_per_product, removals, rounding
from graphprune.allocation.measured import MEASURED, Measure, Measured, Removed, split
from graphprune.allocation.selection import Selection
from graphprune.allocation.spread import block_of, fastest, whole_blocks

__all__ = [
    "BUDGETS", "MEASURED", "SCOPES", "Candidate", "Global", "Isomorphic", "Local", "Measure", "Measured", "Removed", "Selection",
    "allocate", "block_of", "can_meet", "choices", "fastest", "limits_of", "one_per_product", "removals", "rounding", "scope_of", "split",
    "whole_blocks",
]
