"""All dim rules, in one dictionary keyed by (domain, op_type). Adding a rule is adding a row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from graphprune.rules import aten, onnx, scans


class _Rules(dict):
    """A plain dict; an ATen op without a row gets the elementwise rule when torch tags it so."""

    def get(self, op: tuple[str, str], default=None):  # type: ignore[override]
        found = super().get(op)
        if found is None and op[0] == "aten" and _is_pointwise(op[1]):
            return aten.opaque
        return found if found is not None else default


@cache
def _is_pointwise(op_type: str) -> bool:
    packet = getattr(torch.ops.aten, op_type, None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def _tables() -> Iterator[tuple[tuple[str, str], aten.Rule]]:
    for name, rule in aten.ATEN.items():
        yield ("aten", name), rule
    for name, rule in onnx.ONNX.items():
        yield ("", name), rule
    for name, rule in scans.SCANS.items():
        yield ("graphprune", name), rule
    yield ("transformers", "grouped_mm_fallback"), aten.ATEN["_grouped_mm"]


RULES: dict[tuple[str, str], aten.Rule] = _Rules(_tables())
