"""graphprune: a pruning compiler. A trained network in; a smaller, really faster one out, with proof that the cut was made correctly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.api import Plan, Program, Result, apply, capture, compile, load, plan, recipes, verify

__all__ = ["Plan", "Program", "Result", "apply", "capture", "compile", "load", "plan", "recipes", "verify"]


def __getattr__(name: str) -> Any:
    """The public surface is loaded on first use: torch takes seconds, and `graphprune --help` should not."""
    if name not in __all__:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("graphprune.api"), name)
