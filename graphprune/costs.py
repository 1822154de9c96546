"""What a network costs: parameters, bytes of weights and multiply-accumulates (MACs), exactly, before a cut and under one.

MACs are those of contractions (linear maps, convolutions, attention, recurrences, scans) at the example inputs; elementwise work, norms
and look-ups count zero. A FLOP counter that counts multiply and add gives twice the number. One row per op, both dialects in one table; a
row sees shapes only, so the same row prices the network before a cut, under a cut, and after surgery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from graphprune import axes as ax
from graphprune.analysis import Analysis, axis_key
from graphprune.axes import Axis, Factor
from graphprune.branches import Branch
from graphprune.ops import delta_rule, selective_scan, ssd
from graphprune.program import Kind, Node, Program, Value, leaves
from graphprune.report import Footprint

if TYPE_CHECKING:
    from graphprune.surgery.cut import Cut

Shape = tuple[int, ...]
ShapeOf = Callable[[Value], Shape]
Macs = Callable[[Node, ShapeOf], int]

BYTES_PER_MB = 10**6


@dataclass(frozen=True)
class Cost:
    """Sums over a network."""

    params: int  # entries of parameters; buffers do not count
    bytes: int  # of parameters and floating-point buffers
    macs: int  # at the example inputs

    @property
    def memory_mb(self) -> float:
        """Megabytes (10**6 bytes) of weights."""
        return self.bytes / BYTES_PER_MB

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.bytes + other.bytes, self.macs + other.macs)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.bytes - other.bytes, self.macs - other.macs)


@dataclass(frozen=True)
class NodeCost:
    """One node's share: its MACs, and the weights that it is the first to read."""

    name: str
    op_type: str
    scope: str
    cost: Cost


# ---- rows: MACs of one node from shapes


def contraction(operand: str, axis: int = -1) -> Macs:
    """Every element of the result sums over one axis of an operand."""
    return lambda node, shape: prod(shape(node.outputs[0])) * (shape(node[operand]) or (1,))[axis]


def _convolution(data: str, weight: str) -> Macs:
    return lambda node, shape: prod(shape(node.outputs[0])) * prod(shape(node[weight])[1:])


def _transposed(data: str, weight: str) -> Macs:
    return lambda node, shape: prod(shape(node[data])) * prod(shape(node[weight])[1:])


def _aten_convolution(node: Node, shape: ShapeOf) -> int:
    return (_transposed if node["transposed"] else _convolution)("input", "weight")(node, shape)


def _attention(query: str, key: str, value: str) -> Macs:
    """Scores and weighted sum, of every query head, without credit for a causal mask."""

    def row(node: Node, shape: ShapeOf) -> int:
        q, k, v, out = shape(node[query]), shape(node[key]), shape(node[value]), shape(node.outputs[0])
        return prod(out[:-1]) * k[-2] * (q[-1] + v[-1])

    return row


def _grouped_mm(node: Node, shape: ShapeOf) -> int:
    a, b, out = shape(node["self"]), shape(node["mat2"]), shape(node.outputs[0])
    if len(a) == len(b) == 2:  # the contracted axis is what is grouped
        return prod(out[1:]) * a[-1]
    return prod(out) * a[-1]


def _recurrent(node: Node, shape: ShapeOf) -> int:
    """Every weight matrix is used once per position of every sequence."""
    weights = [shape(v) for v in leaves([node["params"]])]
    x = shape(node["input"])
    return prod(x[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


def _onnx_recurrent(node: Node, shape: ShapeOf) -> int:
    return prod(shape(node["X"])[:-1]) * (prod(shape(node["W"])) + prod(shape(node["R"])))


def _gemm(node: Node, shape: ShapeOf) -> int:
    return prod(shape(node.outputs[0])) * shape(node["A"])[0 if node["transA"] else 1]


def _onnx_attention(node: Node, shape: ShapeOf) -> int:
    """Operands (batch, heads, positions, size), or (batch, positions, heads * size), of which the former sums are the same."""
    q, k, v = shape(node["Q"]), shape(node["K"]), shape(node["V"])
    past = node.args.get("past_key")
    keys = k[-2] + (shape(past)[-2] if past is not None else 0)
    if len(q) == 4:
        return prod(q[:-1]) * keys * (q[-1] + v[-1])
    heads, kv_heads = node["q_num_heads"], node["kv_num_heads"]
    return q[0] * q[1] * keys * (q[2] + v[2] * heads // kv_heads)


def _einsum(equation: str, operands: str) -> Macs:
    """Operands are contracted from left to right; a letter that no later operand or result has is summed away at once."""

    def row(node: Node, shape: ShapeOf) -> int:
        left, arrow, right = node[equation].replace(" ", "").partition("->")
        values = list(leaves([node[operands]]))
        terms = left.split(",")
        sizes: dict[str, int] = {}
        spelled: list[set[str]] = []
        for term, value in zip(terms, values):
            found = shape(value)
            head, dots, tail = term.partition("...")
            dims = [*head, *(f"<{i}>" for i in range(len(found) - len(head) - len(tail), 0, -1)), *tail] if dots else [*term]
            for letter, length in zip(dims, found):
                sizes[letter] = max(length, sizes.get(letter, 1))
            spelled.append(set(dims))
        batch = {letter for letter in sizes if letter.startswith("<")}
        joined = left.replace(",", "").replace(".", "")
        result = set(right.replace("...", "")) if arrow else {c for c in joined if joined.count(c) == 1}
        if not arrow or "..." in right:
            result |= batch
        total, present = 0, spelled[0]
        for i, term in enumerate(spelled[1:], 1):
            later = set().union(result, *spelled[i + 1 :])
            if (present | term) - later:  # otherwise nothing is summed: an elementwise product
                total += prod(sizes[letter] for letter in present | term)
            present = (present | term) & later
        return total

    return row


def _scan(macs: Callable[..., int]) -> Macs:
    return lambda node, shape: macs(*(shape(v) if isinstance(v, Value) else None for v in node.args.values()))


MACS: Mapping[tuple[str, str], Macs] = {
    ("aten", "linear"): contraction("weight"),
    **{("aten", op): contraction("self") for op in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "_scaled_mm")},
    ("aten", "addmm"): contraction("mat1"),
    ("aten", "addmv"): contraction("mat"),
    ("aten", "baddbmm"): contraction("batch1"),
    ("aten", "addbmm"): lambda node, shape: prod(shape(node["batch1"])) * shape(node["batch2"])[-1],
    ("aten", "bilinear"): lambda node, shape: prod(shape(node.outputs[0])) * prod(shape(node["weight"])[1:]),
    ("aten", "einsum"): _einsum("equation", "tensors"),
    **{("aten", op): _convolution("input", "weight") for op in ("conv1d", "conv2d", "conv3d")},
    **{("aten", op): _transposed("input", "weight") for op in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
    **{("aten", op): _aten_convolution for op in ("convolution", "_convolution")},
    ("aten", "scaled_dot_product_attention"): _attention("query", "key", "value"),
    **{
        ("aten", f"_scaled_dot_product_{name}"): _attention("query", "key", "value")
        for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math")
    },
    **{("aten", op): _grouped_mm for op in ("_grouped_mm", "grouped_mm")},
    **{("aten", op): _recurrent for op in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    ("torchvision", "deform_conv2d"): _convolution("input", "weight"),
    ("", "Conv"): _convolution("X", "W"),
    ("", "ConvInteger"): _convolution("x", "w"),
    ("", "QLinearConv"): _convolution("x", "w"),
    ("", "DeformConv"): _convolution("X", "W"),
    ("", "ConvTranspose"): _transposed("X", "W"),
    ("", "Gemm"): _gemm,
    **{("", op): contraction("A") for op in ("MatMul", "MatMulInteger")},
    ("", "QLinearMatMul"): contraction("a"),
    ("", "Einsum"): _einsum("equation", "Inputs"),
    **{("", op): _onnx_recurrent for op in ("LSTM", "GRU", "RNN")},
    ("", "Attention"): _onnx_attention,
    ("graphprune", "selective_scan"): _scan(selective_scan.macs),
    ("graphprune", "ssd_scan"): _scan(ssd.macs),
    ("graphprune", "gated_delta_rule"): _scan(delta_rule.macs),
}


def macs(node: Node, shape_of: ShapeOf) -> int:
    """Multiply-accumulates of one node; zero where the op has no row or a shape depends on data."""
    row = MACS.get(node.op)
    if row is None or any(v.shape is None for v in (*node.inputs, node.outputs[0])):
        return 0
    return row(node, shape_of)


# ---- whole networks


def cost(program: Program, cut: Cut | None = None) -> Cost:
    """What a program costs, or what it will cost after a cut."""
    return sum((row.cost for row in by_node(program, cut)), Cost(0, 0, 0))


def footprint(program: Program, cut: Cut | None = None) -> Footprint:
    """The same, as the report shows it."""
    found = cost(program, cut)
    return Footprint(found.params, found.bytes, found.macs)


def by_node(program: Program, cut: Cut | None = None) -> list[NodeCost]:
    """Costs node by node, in topological order; what a cut bypasses is left out. A shared weight counts where it is read first."""
    rows: list[NodeCost] = []
    paid: set[Value] = set()
    for node in alive(program, cut.bypassed if cut is not None else {}):

        def shape(value: Value, node: Node = node) -> Shape:
            return cut.shape(value, node) if cut is not None else value.shape or ()

        found = Cost(0, 0, macs(node, shape))
        for value in dict.fromkeys(node.inputs):
            if _counts(value) and value not in paid:
                paid.add(value)
                found += _weight(value, shape(value))
        rows.append(NodeCost(node.name, node.op_type, node.scope, found))
    return rows


def _counts(value: Value) -> bool:
    return value.kind is Kind.PARAMETER or value.is_weight


def _weight(value: Value, shape: Shape) -> Cost:
    entries = prod(shape)
    assert value.dtype is not None
    return Cost(entries if value.kind is Kind.PARAMETER else 0, entries * value.dtype.itemsize, 0)


def alive(program: Program, bypassed: Mapping[Node, Branch]) -> Iterable[Node]:
    """Nodes (those inside control-flow bodies too) that outputs still need when the branches of some additions go."""
    if not bypassed:
        return program.walk()
    needed: set[Value] = set(program.outputs)
    kept: set[Node] = set()
    for node in reversed(program.nodes):
        if not any(v in needed for v in node.outputs):
            continue
        if node in bypassed:
            needed.add(bypassed[node].skip)
            continue
        kept.add(node)
        needed.update(node.inputs)
        for inner in Program(tuple(n for b in node.blocks for n in b.nodes), (), (), {}, None, ()).walk():
            kept.add(inner)
            needed.update(inner.inputs)
        needed.update(v for b in node.blocks for v in b.outputs)
    return [node for node in program.walk() if node in kept]


# ---- many candidate cuts of one network


class CostModel:
    """Prices cuts given as *numbers* of kept units, in milliseconds: which units stay never matters to a size.

    Args:
        analysis: the solved program.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._sizes: dict[tuple, SizeOf] = {}
        terms = []
        for node in analysis.program.walk():
            if node.op in MACS:
                terms.append(_Term(node, None, self._shapes(node.inputs + list(node.outputs), node)))
        for value in analysis.program.weights.values():
            if _counts(value) and value.uses:
                terms.append(_Term(None, value, self._shapes([value], None)))
        self._terms = terms
        self._left: dict[frozenset[Branch], set[Node]] = {}

    def _shapes(self, values: Sequence[Value], node: Node | None) -> dict[Value, tuple[SizeOf | int, ...]]:
        found: dict[Value, tuple[SizeOf | int, ...]] = {}
        for value in values:
            dims = self.analysis.axes(value, node)
            if dims is None:
                found[value] = value.shape or ()
                continue
            found[value] = tuple(self._size(dim) for dim in dims)
        return found

    def _size(self, axis: Axis) -> SizeOf | int:
        key = axis_key(axis)
        if key not in self._sizes:
            self._sizes[key] = SizeOf.of(axis)
        size = self._sizes[key]
        return size if size.atoms else size.constant

    @cached_property
    def _by_atom(self) -> dict[Any, list[_Term]]:
        found: dict[Any, list[_Term]] = {}
        for term in self._terms:
            for atom in term.atoms:
                found.setdefault(atom, []).append(term)
        return found

    def cost(self, kept: Mapping[Any, int]) -> Cost:
        """The network when the group with atom `a` keeps `kept[a]` units; groups that are not named keep all."""
        return self._sum(self._terms, kept)

    def part(self, atom: Any, kept: Mapping[Any, int]) -> Cost:
        """The share of everything that the group with this atom (not a branch) has a say in."""
        return self._sum(self._by_atom.get(atom, ()), kept)

    def _sum(self, terms: Iterable[_Term], kept: Mapping[Any, int]) -> Cost:
        gone = frozenset(atom for atom, count in kept.items() if count == 0 and isinstance(atom, Branch))
        if gone:
            if gone not in self._left:
                self._left[gone] = set(alive(self.analysis.program, {branch.join: branch for branch in gone}))
            left = self._left[gone]
            terms = [term for term in terms if term.read_in(left)]
        found = [term.cost(kept) for term in terms]
        return Cost(sum(c.params for c in found), sum(c.bytes for c in found), sum(c.macs for c in found))


@dataclass(frozen=True, eq=False)
class SizeOf:
    """The size of an axis as a polynomial: constant * product of counts * product of sums."""

    constant: int
    factors: tuple[Factor, ...]
    sums: tuple[tuple[SizeOf, ...], ...]
    atoms: frozenset[Factor]

    @classmethod
    def of(cls, axis: Axis) -> SizeOf:
        constant, factors, sums = 1, [], []
        for factor in ax.normal(axis):
            if factor.total is not None:
                parts = tuple(cls.of(part) for part in factor.total)
                if any(part.atoms for part in parts):
                    sums.append(parts)
                else:
                    constant *= factor.size
            elif factor.frozen is not None:
                constant *= factor.size
            else:
                factors.append(factor)
        atoms = frozenset(factors).union(*(part.atoms for parts in sums for part in parts))
        return cls(constant, tuple(factors), tuple(sums), atoms)

    def at(self, kept: Mapping[Any, int]) -> int:
        size = self.constant
        for factor in self.factors:
            size *= kept.get(factor, factor.size)
        for parts in self.sums:
            size *= sum(part.at(kept) for part in parts)
        return size


class _Term:
    """One addend of the cost: the MACs of a node, or a weight."""

    __slots__ = ("_found", "_order", "atoms", "node", "shapes", "weight")

    def __init__(self, node: Node | None, weight: Value | None, shapes: dict[Value, tuple[SizeOf | int, ...]]) -> None:
        self.node, self.weight, self.shapes = node, weight, shapes
        self.atoms = frozenset().union(*(size.atoms for sizes in shapes.values() for size in sizes if isinstance(size, SizeOf)))
        self._order = tuple(self.atoms)
        self._found: dict[tuple[int | None, ...], Cost] = {}  # searches ask for the same sizes again and again

    def read_in(self, nodes: set[Node]) -> bool:
        """Is it still there when only these nodes are?"""
        return self.node in nodes if self.weight is None else any(use in nodes for use in self.weight.uses)

    def cost(self, kept: Mapping[Any, int]) -> Cost:
        key = tuple(map(kept.get, self._order))
        if key not in self._found:
            self._found[key] = self._priced(kept)
        return self._found[key]

    def _priced(self, kept: Mapping[Any, int]) -> Cost:
        def shape(value: Value) -> Shape:
            return tuple(size if isinstance(size, int) else size.at(kept) for size in self.shapes[value])

        if self.node is not None:
            return Cost(0, 0, macs(self.node, shape))
        assert self.weight is not None
        return _weight(self.weight, shape(self.weight))
