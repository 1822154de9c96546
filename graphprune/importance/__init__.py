"""Scores of units: one algebra, and the criteria written in it."""

from graphprune.importance.algebra import Expression, Importance, by_mean, entries, maps
from graphprune.importance.criteria import IMPORTANCES, importance_of, scores_of

__all__ = ["IMPORTANCES", "Expression", "Importance", "by_mean", "entries", "importance_of", "maps", "scores_of"]
