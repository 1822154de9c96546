"""The engine that a dim rule talks to: axes of values, equations between them, freezes, marks, and how zeros pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphprune import axes as ax
from graphprune.axes import Axis, Factor
from graphprune.errors import NotPrunable, Reason
from graphprune.program import Kind, Node, Value
from graphprune.rules import notation


@dataclass(eq=False, slots=True)
class Flow:
    """How zeros pass through a node: result = sum over terms of products of operands."""

    node: Node
    out: Value
    terms: tuple[tuple[Value, ...], ...]
    over: tuple[Axis, ...] = ()  # the op neutralises removed positions itself (softmax, norms): the result vanishes along these axes
    summed: tuple[Axis, ...] = ()  # positions are added up: exact only where every term vanishes
    dropped: tuple[Axis, ...] = ()  # left out of the result, not added up
    products: tuple[tuple[Value, ...], ...] = ()  # are summed too, but do not decide where the result vanishes (scores of attention)
    joined: bool = False  # the terms lie side by side (concat): where one vanishes is a matter of the terms that have the axis
    carries: Mapping[Value, frozenset[int]] | None = (
        None  # axes of the result that an operand reaches; asked only where a factor occurs twice
    )


class Engine:
    """What a dim rule talks to: axes of values, equations, freezes, marks. One instance solves one program."""

    def __init__(self, on_unknown: str = "freeze") -> None:
        self.dims: dict[Value, list[Axis]] = {}
        self.constants: dict[tuple[Node, Value], list[Axis]] = {}
        self.indexes: dict[Value, Axis] = {}  # integer values that index an axis
        self.parts: dict[Value, list[list[Axis]]] = {}  # of sequences: the axes of each tensor in it
        self.addressed: set[Value] = set()  # those that the current node uses as addresses, not as numbers
        self.counts: set[Value] = set()  # how often each unit of an axis is indexed, and prefix sums of that
        self.limits: list[tuple[Axis, int, Node]] = []  # at least this many positions must stay
        self.flows: list[Flow] = []
        self.unknown: dict[tuple[str, str], list[Node]] = {}
        self.on_unknown = on_unknown
        self.node: Node = None  # type: ignore[assignment]
        self.from_input: set[Value] = set()  # values that depend on an input: two such operands make an attention-like product

    # ---- values

    def fresh(self, value: Value) -> list[Axis]:
        """New factors for every axis of a value; symbolic axes and empty ones are frozen."""
        assert value.shape is not None
        dims: list[Axis] = []
        for axis, size in enumerate(value.shape):
            dims.append([] if size == 1 else [Factor(size)])
            if axis in value.dynamic:
                ax.freeze(dims[-1], NotPrunable(Reason.DYNAMIC, value.name))
        return dims

    def axes(self, value: Value) -> list[Axis]:
        """The axes of an operand of the current node. Constants are free for each use."""
        if value.kind is Kind.CONSTANT:
            key = (self.node, value)
            if key not in self.constants:
                self.constants[key] = self.fresh(value)
            return self.constants[key]
        if value not in self.dims:
            self.dims[value] = self.fresh(value)
            if value.producer is not None:  # a result that no rule has described
                for axis in self.dims[value]:
                    ax.freeze(axis, NotPrunable(Reason.NO_RULE, value.producer.name))
        return self.dims[value]

    def set(self, value: Value, dims: Sequence[Axis]) -> None:
        """Give a result its axes; sizes must be those of the value, or the axis is frozen on both sides."""
        out: list[Axis] = []
        assert value.shape is not None and len(dims) == len(value.shape), f"{self.node}: rank {len(dims)} for {value}"
        for axis, (dim, size) in enumerate(zip(dims, value.shape)):
            if ax.size(dim) != size:
                self.freeze(dim, Reason.FIXED)
                dim = [] if size == 1 else [Factor(size)]
                self.freeze(dim, Reason.FIXED)
            if axis in value.dynamic:
                self.freeze(dim, Reason.DYNAMIC)
            out.append(list(dim))
        self.dims[value] = out

    def address(self, value: Value) -> Axis | None:
        """The axis that `value` indexes, for an op that uses it as an address."""
        self.addressed.add(value)
        return self.indexes.get(value)

    def seal_indexes(self) -> None:
        """After a rule: an index whose tag goes no further is used as a number, so the axis it numbers may not be cut."""
        for value in self.node.inputs:
            tag = self.indexes.get(value)
            if tag is not None and value not in self.addressed and not any(out in self.indexes for out in self.node.outputs):
                self.freeze(tag, Reason.UNTAGGED_INDEX, "positions on it are used as numbers")
        self.addressed.clear()

    # ---- equations

    def equate(self, a: Axis, b: Axis) -> None:
        """a and b are the same axis."""
        if 0 in (ax.size(a), ax.size(b)):
            return self.freeze([*a, *b], Reason.FIXED)
        if ax.size(a) != ax.size(b) and any(v.dynamic for v in (*self.node.inputs, *self.node.outputs)):
            return self.freeze([*a, *b], Reason.DYNAMIC, "a size is known only when the model runs")
        ax.unify(a, b, self.node.name)

    def broadcast(self, a: Axis, b: Axis) -> Axis:
        """The common axis of two operands, either of which may have size 1."""
        if ax.size(a) == 1:
            return b
        if ax.size(b) != 1:
            self.equate(a, b)
        return a

    def freeze(self, axis: Iterable[Factor], reason: Reason, hint: str = "") -> None:
        ax.freeze(axis, NotPrunable(reason, self.node.name, hint))

    def frozen(self, size: int, reason: Reason = Reason.FIXED) -> Axis:
        """A new axis that may not be cut."""
        axis: Axis = [] if size == 1 else [Factor(size)]
        self.freeze(axis, reason)
        return axis

    def mark(self, axis: Iterable[Factor], tag: str) -> None:
        ax.mark(axis, tag, self.node.name)

    def flow(
        self,
        out: Value,
        *terms: Sequence[Value],
        over: Sequence[Axis] = (),
        summed: Sequence[Axis] = (),
        dropped: Sequence[Axis] = (),
        joined: bool = False,
        carries: Mapping[Value, Iterable[int]] | None = None,
    ) -> None:
        reach = None if carries is None else {value: frozenset(axes) for value, axes in carries.items()}
        self.flows.append(
            Flow(self.node, out, tuple(tuple(t) for t in terms), tuple(over), tuple(summed), tuple(dropped), joined=joined, carries=reach)
        )

    # ---- whole nodes

    def unsupported(self, reason: Reason = Reason.NO_RULE, hint: str = "") -> None:
        """The rule of last resort: everything the node touches is frozen."""
        for value in self.node.inputs:
            if value.shape is not None:
                for axis in self.axes(value):
                    self.freeze(axis, reason, hint)
        for value in self.node.outputs:
            if value.shape is not None:
                self.set(value, [self.frozen(size, reason) for size in value.shape])
                self.flow(value)

    def spec(
        self,
        line: str,
        sizes: Mapping[str, int] | None = None,
        over: str = "",
        marks: Mapping[str, str] | None = None,
        operands: Mapping[str, Value] | None = None,
    ) -> None:
        """Emit the equations of one line of the notation (see `rules/notation.py`) for the current node.

        `sizes` gives the sizes of letters that cannot be inferred; `over` names letters whose removed positions the op neutralises itself;
        `marks` maps letters to kind tags; `operands` replaces the arguments of the node by name.
        """
        spec, node = notation.parse(line), self.node
        letters: dict[str, Axis] = {}
        known: dict[str, int] = dict(sizes or {})
        leading: list[Axis] = []  # of "...", aligned right
        pending: list[tuple[Axis, tuple[str, ...]]] = []

        def bind(axis: Axis, word: tuple[str, ...]) -> bool:
            """Equate an axis with a product of letters; False when a size is still open."""
            open_letters = [w for w in word if w not in known]
            if len(open_letters) > 1:
                return False
            for w in open_letters:
                rest = int(np.prod([known[v] for v in word if v != w]))
                known[w] = max(1, ax.size(axis) // max(rest, 1))
            for w in word:
                if w not in letters:
                    letters[w] = axis if len(word) == 1 else ([] if known[w] == 1 else [Factor(known[w])])
            product = [f for w in word for f in letters[w]]
            if ax.size(product) == ax.size(axis):
                self.equate(axis, product)
            elif ax.size(axis) == 1:
                pass  # a broadcast operand
            elif len(word) == 1 and ax.size(product) == 1:
                letters[word[0]], known[word[0]] = axis, ax.size(axis)
            else:
                self.freeze([*axis, *product], Reason.UNALIGNED)
            return True

        present: dict[notation.Operand, Value] = {}
        for operand in spec.operands:
            value = (node.args if operands is None else operands).get(operand.name)
            if not isinstance(value, Value):
                continue
            present[operand] = value
            dims = self.axes(value)
            fixed = sum(1 for a in operand.axes if a not in ("...", "*"))
            free = len(dims) - fixed
            assert free >= 0, f"{node}: {operand.name} has rank {len(dims)}, rule {line!r}"
            at = 0
            for axis in operand.axes:
                if axis == "...":
                    group, at = dims[at : at + free], at + free
                    while len(leading) < len(group):
                        leading.insert(0, [])
                    for i, dim in enumerate(reversed(group), 1):
                        leading[-i] = self.broadcast(leading[-i], dim)
                elif axis == "*":
                    for dim in dims[at : at + free]:
                        self.freeze(dim, Reason.FIXED)
                    at += free
                elif axis == "_":
                    self.freeze(dims[at], Reason.FIXED)
                    at += 1
                else:
                    assert isinstance(axis, tuple)
                    if len(axis) == 1 and ax.size(dims[at]) > 1:
                        known.setdefault(axis[0], ax.size(dims[at]))
                    pending.append((dims[at], axis))
                    at += 1
        while pending:  # a pass per newly known size; lines are short
            waiting = [(dim, word) for dim, word in pending if not bind(dim, word)]
            if len(waiting) == len(pending):
                for dim, _ in waiting:
                    self.freeze(dim, Reason.UNALIGNED, "a size in the rule is not determined")
                break
            pending = waiting
        for letter, tag in (marks or {}).items():
            if letter in letters:
                self.mark(letters[letter], tag)
        for out, result in zip(node.outputs, spec.results):
            if out.shape is None:
                continue
            fixed = sum(1 for a in result if a not in ("...", "*"))
            free = len(out.shape) - fixed
            dims = []
            for axis in result:
                if axis == "...":
                    dims += leading[len(leading) - free :] if free else []
                elif axis == "*":
                    dims += [self.frozen(out.shape[len(dims) + k]) for k in range(free)]
                elif axis == "_":
                    dims.append(self.frozen(out.shape[len(dims)]))
                else:
                    assert isinstance(axis, tuple)
                    dims.append([f for w in axis for f in letters.get(w, [])])
            self.set(out, dims)
            terms = [[present[o] for o in term if o in present] for term in spec.terms]
            kept = {w for axis in result if isinstance(axis, tuple) for w in axis}
            words = [axis for axis in result for _ in range(free if axis in ("...", "*") else 1)]
            carries: dict[Value, set[int]] = {}
            for operand, value in present.items():
                own = {w for axis in operand.axes for w in (axis if isinstance(axis, tuple) else (axis,))}
                reached = {i for i, word in enumerate(words) if own.intersection(word if isinstance(word, tuple) else (word,))}
                carries[value] = carries.get(value, set()) | reached
            self.flow(
                out,
                *[t for t in terms if t],
                over=[letters[c] for c in over.split() if c in letters],
                summed=[axis for letter, axis in letters.items() if letter not in kept],
                carries=carries,
            )
