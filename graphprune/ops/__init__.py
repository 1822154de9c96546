"""Ops of our own, registered with torch under `graphprune::` on import. Each file holds formula, shapes, reference, dim rule and cost."""

from graphprune.ops import delta_rule, selective_scan, ssd

__all__ = ["delta_rule", "selective_scan", "ssd"]
