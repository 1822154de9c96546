"""graphprune: a pruning compiler. A trained network in; a smaller, really faster one out, with proof that the cut was made correctly."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphprune.api import Plan, Program, Result, apply, capture, compile, load, plan, recipes, verify

__all__ = ["Plan", "Program", "Result", "apply", "capture", "compile", "load", "plan", "recipes", "verify"]


class _Package(ModuleType):
    """Loads the public surface on first use: torch takes seconds, and `graphprune --help` should not.

    Properties, because some functions share their name with a sub-package (`verify`, `recipes`, `plan`), which the import system would
    put in their place.
    """


def _public(name: str) -> property:
    return property(lambda package: getattr(import_module("graphprune.api"), name), lambda package, submodule: None)


for _name in __all__:
    setattr(_Package, _name, _public(_name))
sys.modules[__name__].__class__ = _Package
