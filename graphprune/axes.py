"""The axis algebra: what the axes of a network are made of, and which of them are the same.

Every axis is an ordered list of *factors*, outermost first (`hidden = head * head_dim`). A factor is a union-find node with a size; an
equation between two axes may *refine* it, into a product (a reshape splits it) or into a sum of parts (concat, split, slice). In
normal form a list holds leaves and sums only: products are expanded, size 1 is the empty list, the parts of a sum are lists.

Invariants
1. A refinement has strictly smaller factors, so unification terminates without an occurs check.
2. Both sides of every equation have equal products.
3. Marks (freeze reasons and kind tags) only grow; they are copied to the parts on refinement and pushed down on a merge.
4. An equation holds, or its block is frozen on both sides.

Sizes choose refinements, never identities: two axes of equal size stay different until a rule says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from graphprune.errors import NotPrunable, Reason

Axis = list["Factor"]


class Factor:
    """A union-find node: `parent` when merged, else a leaf (`form` None), a product (`Axis`) or a sum (`list[Axis]`)."""

    __slots__ = ("frozen", "marks", "parent", "product", "size", "total")

    def __init__(self, size: int, marks: dict[str, str] | None = None, frozen: NotPrunable | None = None) -> None:
        self.size = size
        self.parent: Factor | None = None
        self.product: Axis | None = None
        self.total: list[Axis] | None = None
        self.marks: dict[str, str] = dict(marks) if marks else {}  # kind tag -> node that set it
        self.frozen = frozen

    def __repr__(self) -> str:
        root = find(self)
        return f"<{root.size}{'!' if root.frozen else ''}@{id(root) % 9973}>"

    def child(self, size: int) -> Factor:
        """A new, smaller factor that inherits what is known of this one."""
        assert size < self.size
        return Factor(size, self.marks, self.frozen)


def find(factor: Factor) -> Factor:
    """The representative of a factor."""
    root = factor
    while root.parent is not None:
        root = root.parent
    while factor.parent is not None:
        factor.parent, factor = root, factor.parent
    return root


def size(axis: Iterable[Factor]) -> int:
    return prod(factor.size for factor in axis)


def normal(axis: Iterable[Factor]) -> Axis:
    """Normal form: leaves and sums of two or more parts only."""
    out: Axis = []
    stack = list(axis)[::-1]
    while stack:
        factor = find(stack.pop())
        if factor.size == 1:
            continue
        if factor.product is not None:
            stack.extend(reversed(factor.product))
        elif factor.total is not None and len(factor.total) == 1:
            stack.extend(reversed(factor.total[0]))
        else:
            out.append(factor)
    return out


def leaves_of(axis: Iterable[Factor]) -> Iterator[Factor]:
    """All leaves below an axis, in order; a leaf that occurs twice is given twice."""
    for factor in normal(axis):
        if factor.total is None:
            yield factor
        else:
            for part in factor.total:
                yield from leaves_of(part)


def freeze(axis: Iterable[Factor], why: NotPrunable) -> None:
    """No unit of these factors may be removed. The first reason is kept."""
    for leaf in leaves_of(axis):
        if leaf.frozen is None:
            leaf.frozen = why


def mark(axis: Iterable[Factor], tag: str, node: str) -> None:
    """Tag all leaves of an axis; the first node is kept."""
    for leaf in leaves_of(axis):
        leaf.marks.setdefault(tag, node)


DEEPEST = 64  # nested unifications; only an axis that is equal to a shifted copy of itself needs more


def unify(xs: Axis, ys: Axis, node: str, depth: int = 0) -> None:
    """Make two axes of equal size the same axis, refining where sizes divide; what cannot be reconciled is frozen, alone.

    A shape is a mixed-radix number, so two factorisations may be cut only where their suffix products agree. The lists are walked right
    to left; a block between two such cuts that has no common refinement is frozen on both sides, and the walk goes on to its left.
    """
    xs, ys = normal(xs), normal(ys)
    assert size(xs) == size(ys), f"equation between sizes {size(xs)} and {size(ys)} at {node}"
    while xs and ys:
        xs[-1:], ys[-1:] = normal(xs[-1:]), normal(ys[-1:])  # an earlier step may have merged or refined what lies to its left
        a, b = xs[-1], ys[-1]
        if a is b:
            del xs[-1], ys[-1]
        elif a.size == b.size:
            del xs[-1], ys[-1]
            if not _merge(a, b, node, depth):
                _fail([a], [b], node)
        else:
            large, small = (xs, ys) if a.size > b.size else (ys, xs)
            if large[-1].size % small[-1].size == 0 and _refine(large[-1], small[-1].size, node):
                large[-1:] = normal(large[-1:])
                continue
            i, j = _common_suffix(xs, ys)
            _fail(xs[i:], ys[j:], node)
            del xs[i:], ys[j:]
    assert not xs and not ys


def _fail(xs: Axis, ys: Axis, node: str) -> None:
    def sizes(axis: Axis) -> str:
        return "*".join(str(f.size) for f in axis)

    why = NotPrunable(Reason.UNALIGNED, node, f"{sizes(xs)} against {sizes(ys)}")
    freeze(xs, why)
    freeze(ys, why)


def _common_suffix(xs: Axis, ys: Axis) -> tuple[int, int]:
    """Start of the shortest pair of suffixes with equal products."""
    i, j = len(xs) - 1, len(ys) - 1
    p, q = xs[i].size, ys[j].size
    while p != q:
        if p < q:
            i -= 1
            p *= xs[i].size
        else:
            j -= 1
            q *= ys[j].size
    return i, j


def _refine(factor: Factor, tail: int, node: str) -> bool:
    """Write a factor as `head * tail`. A sum distributes: `sum(a_i * t) = (sum a_i) * t`, when t divides every part."""
    if factor.total is None:
        factor.product = [factor.child(factor.size // tail), factor.child(tail)]
        return True
    if any(size(part) % tail for part in factor.total):
        return False
    common = Factor(tail)
    heads = []
    for part in factor.total:
        head = Factor(size(part) // tail)
        unify(part, [head, common], node)
        heads.append([head])
    outer = Factor(factor.size // tail)
    outer.total = heads
    factor.product, factor.total = [outer, common], None
    return True


def _merge(a: Factor, b: Factor, node: str, depth: int) -> bool:
    """Identify two factors of equal size."""
    if depth > DEEPEST:
        return False
    if a.total is not None and b.total is None:
        a, b = b, a
    if a.total is None:  # a leaf joins the other
        a.parent = b
        if a.frozen is not None:
            freeze([b], a.frozen)
        for tag, where in a.marks.items():
            mark([b], tag, where)
        return True
    assert b.total is not None
    if all(leaf.frozen for leaf in leaves_of([a, b])):  # nothing of either may be cut, so which parts are equal is of no matter
        a.parent, a.total = b, None
        return True
    left, right = [list(p) for p in a.total], [list(p) for p in b.total]
    merged: list[Axis] = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if size(x) != size(y):
            longer, rest = (x, left) if size(x) > size(y) else (y, right)
            cut = _split(longer, min(size(x), size(y)), node)
            if cut is None:
                return False
            rest.insert(0, cut[1])
            x, y = (cut[0], y) if longer is x else (x, cut[0])
        unify(x, y, node, depth + 1)
        merged.append(x)
    b.total = merged
    a.parent, a.total = b, None
    return True


def _split(axis: Axis, at: int, node: str) -> tuple[Axis, Axis] | None:
    """Cut an axis into its first `at` positions and the rest, or None where the cut runs through a product."""
    axis = normal(axis)
    head, tail = axis[0], axis[1:]
    if tail:
        step = size(tail)
        if at % step:
            return None
        cut = _split([head], at // step, node)
        return None if cut is None else (cut[0] + tail, cut[1] + tail)
    if head.total is None:
        parts = [head.child(at)], [head.child(head.size - at)]
        head.total = list(parts)
        return parts
    done = 0
    for i, part in enumerate(head.total):
        width = size(part)
        if done + width <= at:
            done += width
            if done == at:
                return [sum_of(head.total[: i + 1])], [sum_of(head.total[i + 1 :])]
            continue
        cut = _split(part, at - done, node)
        if cut is None:
            return None
        head.total[i : i + 1] = [*map(list, cut)]
        return [sum_of(head.total[: i + 1])], [sum_of(head.total[i + 1 :])]
    raise AssertionError("split beyond the end")


def sum_of(parts: Iterable[Axis]) -> Factor:
    """One factor that is the concatenation of the parts."""
    parts = [list(part) for part in parts]
    factor = Factor(sum(size(part) for part in parts))
    if factor.size == 1:
        return factor
    flat: list[Axis] = []
    for part in parts:  # nested sums are flattened, so that boundaries are found in one walk
        inner = normal(part)
        flat.extend(inner[0].total if len(inner) == 1 and inner[0].total is not None else [inner])  # type: ignore[arg-type]
    factor.total = flat
    return factor


def index(axis: Iterable[Factor]) -> dict[Factor, np.ndarray]:
    """For every leaf: the (leaf.size, width) positions of each of its units along the axis, sorted."""
    found: dict[Factor, list[np.ndarray]] = {}

    def walk(axis: Iterable[Factor], at: np.ndarray) -> None:  # at: (size of axis, width)
        factors = normal(axis)
        grid = at.reshape(*(f.size for f in factors), at.shape[1])
        for i, factor in enumerate(factors):
            rows = np.moveaxis(grid, i, 0).reshape(factor.size, -1)
            if factor.total is None:
                found.setdefault(factor, []).append(rows)
                continue
            start = 0
            for part in factor.total:
                stop = start + size(part)
                walk(part, rows[start:stop])
                start = stop

    axis = list(axis)
    walk(axis, np.arange(size(axis))[:, None])
    return {leaf: np.sort(np.concatenate(rows, axis=1), axis=1) for leaf, rows in found.items()}


def mask(axis: Iterable[Factor], kept: Mapping[Factor, np.ndarray]) -> np.ndarray | None:
    """Boolean (size of axis,): which positions stay when leaf `f` keeps the units `kept[f]`; None when all stay."""
    out: Any = None
    factors = normal(axis)
    masks: list[np.ndarray | None] = []
    for factor in factors:
        if factor.total is None:
            masks.append(kept.get(factor))
            continue
        parts = [mask(part, kept) for part in factor.total]
        if all(part is None for part in parts):
            masks.append(None)
        else:
            masks.append(np.concatenate([np.ones(size(p), bool) if m is None else m for p, m in zip(factor.total, parts)]))
    if all(m is None for m in masks):
        return None
    out = np.ones((1,), bool)
    for factor, m in zip(factors, masks):
        m = np.ones(factor.size, bool) if m is None else m
        out = (out[:, None] & m[None, :]).reshape(-1)
    return out
