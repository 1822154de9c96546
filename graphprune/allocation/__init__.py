"""Which units go: who competes, budgets on exact costs, and the constraints on every group."""

from graphprune.allocation.allocate import BUDGETS, SCOPES, Candidate, Global, Isomorphic, Local, allocate, scope_of
from graphprune.allocation.limits import one_per_product, removals, rounding
from graphprune.allocation.selection import Selection

__all__ = [
    "BUDGETS", "SCOPES", "Candidate", "Global", "Isomorphic", "Local", "Selection",
    "allocate", "one_per_product", "removals", "rounding", "scope_of",
]
