"""Dim rules of the ATen op set (the undecomposed training IR of torch.export), keyed by base name without overload.

Most ops are a line of the notation or a row of a family; elementwise ops that are not listed get their rule from `torch.Tag.pointwise`. An in-place spelling
(`add_`) has the rule of its functional one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from graphprune.rules.engine import Engine
import torch

from graphprune.axes import Axis, Factor, leaves_of, size, sum_of
from graphprune.errors import Reason
from graphprune.program import Node, Value, leaves
from graphprune.rules import families as fam

Rule = str | Callable[[Engine, Node], None]


def tensors(node: Node) -> list[Value]:
    return [v for v in node.inputs if v.shape is not None]


def _first(node: Node) -> Value:
    return next(iter(tensors(node)))


def _int(value: Any) -> int:
    """A literal, or the hint of a symbolic size."""
    return int(value.tensor if isinstance(value, Value) else value)  # symbolic scalars keep their hint as a 0-d tensor


# ---- elementwise


def product(engine: Engine, node: Node) -> None:
    values = tensors(node)
    fam.pointwise(engine, values, values)


def total(engine: Engine, node: Node) -> None:
    values = tensors(node)
    offset = [] if len(values) > 1 or not any(isinstance(v, (int, float)) and v != 0 for v in (node.args.get("other"),)) else [()]
    fam.pointwise(engine, values, *([v] for v in values), *offset)


def scaled(engine: Engine, node: Node) -> None:
    """The first operand decides where the result vanishes."""
    fam.pointwise(engine, tensors(node), [_first(node)])


def opaque(engine: Engine, node: Node) -> None:
    """f(0) != 0: the result vanishes nowhere."""
    fam.pointwise(engine, tensors(node), ())


def unary(engine: Engine, node: Node) -> None:
    """f(0) == 0."""
    fam.pointwise(engine, tensors(node), [_first(node)])


def index_preserving(engine: Engine, node: Node) -> None:
    unary(engine, node)
    fam.keep_index(engine, _first(node))


def where(engine: Engine, node: Node) -> None:
    branches = [node[n] for n in ("self", "other")]
    fam.pointwise(engine, tensors(node), *([b] if isinstance(b, Value) else () for b in branches))


def masked_fill(engine: Engine, node: Node) -> None:
    fill = node["value"]
    fam.pointwise(engine, tensors(node), [node["self"]], *([] if isinstance(fill, (int, float)) and fill == 0 else [()]))
    fam.keep_index(engine, node["self"])


def clamp(engine: Engine, node: Node) -> None:
    low, high = node.args.get("min", node.args.get("min_val")), node.args.get("max", node.args.get("max_val"))
    inside = all(not isinstance(v, Value) for v in (low, high)) and (low is None or low <= 0) and (high is None or high >= 0)
    fam.pointwise(engine, tensors(node), [_first(node)] if inside else ())
    fam.keep_index(engine, _first(node))


def power(engine: Engine, node: Node) -> None:
    exponent = node.args.get("exponent")
    zero_at_zero = isinstance(node["self"], Value) and isinstance(exponent, (int, float)) and exponent > 0
    fam.pointwise(engine, tensors(node), [_first(node)] if zero_at_zero else ())


# ---- linear algebra


def matmul(engine: Engine, node: Node) -> None:
    a, b = ("self", "other") if "other" in node.args else ("self", "mat2")
    fam.matmul(engine, node[a], node[b], (a, b))


def linear(engine: Engine, node: Node) -> None:
    engine.spec("input[... i] weight[o i] + bias[o] -> ... o" if len(node["weight"].shape) == 2 else "input[... i] weight[i] + bias[] -> ...")


def addmm(engine: Engine, node: Node) -> None:
    rank = len(node["self"].shape)
    engine.spec(f"mat1[m k] mat2[k n] + self[{'m n' if rank == 2 else 'n'}] -> m n")


def baddbmm(engine: Engine, node: Node) -> None:
    out = node.outputs[0]
    engine.spec("batch1[b m k] batch2[b k n] -> b m n")
    dims = engine.axes(out)
    for i, axis in enumerate(reversed(engine.axes(node["self"])), 1):
        engine.broadcast(dims[-i], axis)
    if node["beta"] != 0:
        engine.flow(out, [node["batch1"], node["batch2"]], [node["self"]])
    if all(v in engine.from_input for v in (node["batch1"], node["batch2"])):
        da, db = engine.axes(node["batch1"]), engine.axes(node["batch2"])
        fam.mark_heads(engine, da[0])
        for axis in (da[-1], db[-1]):
            engine.mark(axis, "head_dim")


def einsum(engine: Engine, node: Node) -> None:
    """The subscripts are nearly our own notation; an operand that repeats a letter (a diagonal) is frozen."""
    equation = node["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    operands = list(leaves(node["tensors"]))
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(t.replace(".", ""))) != len(t.replace(".", "")) for t in terms):
        return engine.unsupported(Reason.FIXED, "a repeated subscript")

    def spaced(term: str) -> str:
        return " ".join(term.replace("...", "~")).replace("~", "...")

    # operands live in a list; give them names for the length of this rule
    named = Node(node.name, node.domain, node.op_type, {f"t{i}": v for i, v in enumerate(operands)}, node.outputs, node.call)
    line = " ".join(f"t{i}[{spaced(t)}]" for i, t in enumerate(terms)) + f" -> {spaced(right)}"
    engine.node = named
    engine.spec(line)
    engine.node = node
    live = [(v, t) for v, t in zip(operands, terms) if v in engine.from_input]
    if len(live) == 2 and len(operands) == 2:  # attention-like
        (a, ta), (b, tb) = live
        da, db = dict(zip(ta, engine.axes(a))), dict(zip(tb, engine.axes(b)))
        if "..." not in left:
            for c in ta:
                if c in tb and c in right:
                    fam.mark_heads(engine, da[c])
                elif c in tb:
                    engine.mark(da[c], "head_dim")
            if tb[-1] not in ta and tb[-1] in right:
                engine.mark(db[tb[-1]], "head_dim")


def convolution(engine: Engine, node: Node) -> None:
    groups = node["groups"]
    line = "input[b (g i) *] weight[(g o) i *] + bias[(g o)] -> b (g o) *"
    if node.op_type.startswith("conv_transpose"):
        line = "input[b (g i) *] weight[(g i) o *] + bias[(g o)] -> b (g o) *"
    if len(node["input"].shape) == len(node["weight"].shape) - 1:  # no batch axis
        line = line.replace("b (", "(")
    engine.spec(line, sizes={"g": groups}, marks={"g": "conv", "i": "conv", "o": "conv"})


def attention(engine: Engine, node: Node) -> None:
    q, k, out = node["query"], node["key"], node.outputs[0]
    rank = len(q.shape)
    if rank >= 4 and q.shape[-3] != k.shape[-3] and k.shape[-3] != 1:
        sizes = {"k": k.shape[-3], "q": q.shape[-3] // k.shape[-3]}
        engine.spec("value[... k s e] ; query[... (k q) l d] key[... k s d] -> ... (k q) l e", sizes, marks={"k": "kv_group", "q": "head", "d": "head_dim", "e": "head_dim"})
    else:
        engine.spec("value[... s e] ; query[... l d] key[... s d] -> ... l e", marks={"d": "head_dim", "e": "head_dim"})
    # the softmax over s neutralises removed positions itself
    engine.flows[-1].over += (engine.axes(k)[-2],)
    dims = engine.axes(out)
    if rank >= 3:
        for axis in (engine.axes(q)[-3], engine.axes(k)[-3]):
            fam.mark_heads(engine, axis)
    mask = node.args.get("attn_mask")
    if mask is not None:
        scores = [*dims[:-1], engine.axes(k)[-2]]
        for i, axis in enumerate(reversed(engine.axes(mask)), 1):
            engine.broadcast(scores[-i], axis)


# ---- shapes


def view(engine: Engine, node: Node) -> None:
    fam.reshape(engine, _first(node))


def permute(engine: Engine, node: Node) -> None:
    rank = len(node["self"].shape)
    fam.permute(engine, node["self"], [d % rank for d in node["dims"]])


def transpose(engine: Engine, node: Node) -> None:
    x = node["self"]
    order = list(range(len(x.shape)))
    if node.op_type.startswith("t") and "dim0" not in node.args or not order:
        order.reverse()
    else:
        a, b = node.args.get("dim0", -1), node.args.get("dim1", -2)
        if not isinstance(a, int):
            a, b = -1, -2
        order[a], order[b] = order[b], order[a]
    fam.permute(engine, x, order)


def movedim(engine: Engine, node: Node) -> None:
    x, rank = node["self"], len(node["self"].shape)
    source = [s % rank for s in leaves([node.args.get("source", node.args.get("axis0"))])]
    target = [s % rank for s in leaves([node.args.get("destination", node.args.get("axis1"))])]
    if "axis0" in node.args:
        order = list(range(rank))
        order[source[0]], order[target[0]] = target[0], source[0]
        return fam.permute(engine, x, order)
    rest = iter(i for i in range(rank) if i not in source)
    place = dict(zip(target, source))
    fam.permute(engine, x, [place[i] if i in place else next(rest) for i in range(rank)])


def concat(engine: Engine, node: Node) -> None:
    fam.concat(engine, [v for v in leaves(node["tensors"]) if v.shape != (0,)], node["dim"])


def stack(engine: Engine, node: Node) -> None:
    values = list(leaves(node["tensors"]))
    out = node.outputs[0]
    dims = fam.aligned(engine, values, values[0])
    axis = node["dim"] % len(out.shape or ())
    engine.set(out, [*dims[:axis], engine.frozen(len(values)), *dims[axis:]])
    engine.flow(out, *[[v] for v in values])


def split(engine: Engine, node: Node) -> None:
    axis = node["dim"]
    fam.split(engine, node["self"], axis, [out.shape[axis] for out in node.outputs if out.shape])


def unbind(engine: Engine, node: Node) -> None:
    x = node["self"]
    axis = node["dim"] % len(x.shape)
    dims = list(engine.axes(x))
    engine.freeze(dims.pop(axis), Reason.FIXED, "each position becomes a tensor of its own")
    for out in node.outputs:
        engine.set(out, dims)
        engine.flow(out, [x])


def slice_(engine: Engine, node: Node) -> None:
    x, axis = node["self"], node["dim"] % len(node["self"].shape)
    length, out = x.shape[axis], node.outputs[0].shape[axis]
    step = node["step"]
    start = 0 if node["start"] is None else _int(node["start"])
    start = max(0, start + length) if start < 0 else min(start, length)
    stop = min(length, start + (out - 1) * step + 1) if out else start
    if out and step > 1 and length % step == 0 and out == length // step:
        stop = length
    fam.slice_(engine, x, axis, start, stop, step)


def narrow(engine: Engine, node: Node) -> None:
    fam.slice_(engine, node["self"], node["dim"], _int(node["start"]), _int(node["start"]) + _int(node["length"]))


def select(engine: Engine, node: Node) -> None:
    fam.select(engine, node["self"], node["dim"] % len(node["self"].shape))


def expand(engine: Engine, node: Node) -> None:
    fam.expand(engine, node["self"])


def repeat(engine: Engine, node: Node) -> None:
    x, out = node["self"], node.outputs[0]
    dims = engine.axes(x)
    lead = len(out.shape) - len(dims)
    new: list[Axis] = []
    for i, length in enumerate(out.shape):
        inner = dims[i - lead] if i >= lead else []
        times = length // max(1, size(inner))
        new.append([*([Factor(times)] if times > 1 else []), *inner])
    engine.set(out, new)
    engine.flow(out, [x])


def repeat_interleave(engine: Engine, node: Node) -> None:
    x, out, dim = node["self"], node.outputs[0], node.args.get("dim")
    if dim is None or not isinstance(node.args.get("repeats"), int):
        return engine.unsupported(Reason.FIXED)
    dims = list(engine.axes(x))
    times = node["repeats"]
    dims[dim] = [*dims[dim], *([Factor(times)] if times > 1 else [])]
    engine.set(out, dims)
    engine.flow(out, [x])


def pad(engine: Engine, node: Node) -> None:
    """Constant padding with zeros is a concat with frozen parts; other modes and values freeze the padded axes."""
    x, out = node["self"], node.outputs[0]
    widths = [_int(w) for w in node["pad"]]
    zero = node.args.get("mode", "constant") == "constant" and not node.args.get("value")
    dims = list(engine.axes(x))
    for i in range(len(widths) // 2):
        axis, (before, after) = -1 - i, widths[2 * i : 2 * i + 2]
        if before == after == 0:
            continue
        if min(before, after) < 0 or not zero:
            engine.freeze(dims[axis], Reason.FIXED)
            dims[axis] = engine.frozen(out.shape[axis])
        else:
            parts = [engine.frozen(before)] * (before > 0) + [dims[axis]] + [engine.frozen(after)] * (after > 0)
            dims[axis] = [sum_of(parts)]
    engine.set(out, dims)
    engine.flow(out, [x])


def _keep_leading(engine: Engine, node: Node, trailing: int) -> None:
    """The last `trailing` axes are fixed by the op (pools, resizes, padding); the others stay."""
    x = _first(node)
    dims = engine.axes(x)
    keep = len(dims) - trailing
    for axis in dims[keep:]:
        engine.freeze(axis, Reason.FIXED)
    for out in node.outputs:
        engine.set(out, [*dims[:keep], *(engine.frozen(n) for n in out.shape[keep:])])
        engine.flow(out, [x])


def trailing(count: int) -> Rule:
    return lambda engine, node: _keep_leading(engine, node, count)


def roll(engine: Engine, node: Node) -> None:
    axes = node["dims"] or range(len(node["self"].shape))
    fam.along(engine, node["self"], list(axes), "fixed")


def flip(engine: Engine, node: Node) -> None:
    fam.along(engine, node["self"], list(node["dims"]), "fixed")


def diagonal_mask(engine: Engine, node: Node) -> None:
    fam.along(engine, node["self"], [-1, -2], "fixed")


# ---- reductions and norms


def _reduced_axes(node: Node) -> list[int]:
    dim = node.args.get("dim")
    return [] if dim is None else [dim] if isinstance(dim, int) else list(dim)


def reduction(neutral: str) -> Rule:
    return lambda engine, node: fam.reduce(engine, _first(node), _reduced_axes(node), bool(node.args.get("keepdim", False)), neutral)


def vector_norm(engine: Engine, node: Node) -> None:
    order = node.args.get("ord", node.args.get("p", 2))
    fam.reduce(engine, node["self"], _reduced_axes(node), bool(node["keepdim"]), "zero" if order is None or order > 0 else "fixed")


def along(neutral: str) -> Rule:
    return lambda engine, node: fam.along(engine, _first(node), [node["dim"]], neutral)


def normalize_axes(engine: Engine, node: Node) -> None:
    count = len(node["normalized_shape"])
    rank = len(node["input"].shape)
    fam.norm(engine, node["input"], range(rank - count, rank), node["weight"], node.args.get("bias"))


def group_norm(engine: Engine, node: Node) -> None:
    """Statistics over the channels inside a group: they renormalise; whole groups may go."""
    x, groups = node["input"], node["num_groups"]
    engine.spec(
        "input[b (g c) *] weight[(g c)] + bias[(g c)] -> b (g c) *",
        sizes={"g": groups, "c": x.shape[1] // groups},
        over="c",
        marks={"c": "renorm"} if x.shape[1] > groups else {},
    )


def cumulative(engine: Engine, node: Node) -> None:
    fam.along(engine, node["self"], [node["dim"]], "zero")


# ---- indices


def topk(engine: Engine, node: Node) -> None:
    fam.topk(engine, node["self"], node["dim"], _int(node["k"]))


def sort(engine: Engine, node: Node) -> None:
    x, dim = node["self"], node["dim"]
    dims = list(engine.axes(x))
    values, indices = node.outputs
    chosen = dims[dim]
    tag = engine.indexes.get(x)
    if tag is None and all(f.frozen is None for f in chosen):
        engine.freeze(chosen, Reason.FIXED)
    engine.set(values, dims)
    engine.set(indices, dims)
    engine.flow(values, [x], over=[chosen])
    engine.flow(indices, (), over=[chosen])
    if tag is not None:
        engine.indexes[values] = tag
    engine.indexes[indices] = chosen


def argmax(engine: Engine, node: Node) -> None:
    if node["dim"] is None:
        return engine.unsupported(Reason.FIXED)
    fam.argmax(engine, node["self"], node["dim"], bool(node["keepdim"]))


def extremum(engine: Engine, node: Node) -> None:
    """max and min: over everything, along an axis (with indices), or elementwise."""
    if isinstance(node.args.get("other"), Value):
        return total(engine, node)
    fam.reduce(engine, node["self"], _reduced_axes(node), bool(node.args.get("keepdim", False)), "-inf")
    if len(node.outputs) == 2:
        engine.indexes[node.outputs[1]] = engine.axes(node["self"])[node["dim"]]


def embedding(engine: Engine, node: Node) -> None:
    engine.spec("weight[v d] indices[...] -> ... d")
    table = engine.axes(node["weight"])[0]
    fam.index_axis(engine, table, node["indices"])
    engine.mark(table, "vocab")


def index(engine: Engine, node: Node) -> None:
    """x[i, :, j]: axes that are indexed by integers or booleans go, their broadcast shape comes in."""
    x, out = node["self"], node.outputs[0]
    picks = list(node["indices"]) + [None] * (len(x.shape) - len(node["indices"]))
    if any(p is not None and p.dtype in _BOOLEAN for p in picks):
        return _boolean_index(engine, node, picks)
    dims = engine.axes(x)
    used = [i for i, p in enumerate(picks) if p is not None]
    tensors_ = [picks[i] for i in used]
    rank = max((len(p.shape) for p in tensors_), default=0)
    block: list[Axis] = [[] for _ in range(rank)]
    for p in tensors_:
        for i, axis in enumerate(reversed(engine.axes(p)), 1):
            block[-i] = engine.broadcast(block[-i], axis)
    for i in used:
        fam.index_axis(engine, dims[i], picks[i])
    rest = [(i, dims[i]) for i in range(len(dims)) if i not in used]
    together = used == list(range(used[0], used[-1] + 1)) if used else True
    at = used[0] if together and used else 0
    new = [a for i, a in rest if i < at] if together else []
    new = [*new, *block, *(a for i, a in rest if not together or i >= at)]
    engine.set(out, new)
    engine.flow(out, [x])
    fam.keep_index(engine, x)


def _boolean_index(engine: Engine, node: Node, picks: list[Value | None]) -> None:
    x, out = node["self"], node.outputs[0]
    dims = engine.axes(x)
    at, kept = 0, []
    for p in picks:
        if at >= len(dims):
            break
        if p is None:
            kept.append(dims[at])
            at += 1
        else:
            for axis in dims[at : at + len(p.shape)]:
                engine.freeze(axis, Reason.FIXED)
            for axis in engine.axes(p):
                engine.freeze(axis, Reason.FIXED)
            at += len(p.shape)
    lead = len(out.shape) - len(kept)
    engine.set(out, [*(engine.frozen(n) for n in out.shape[:lead]), *kept])
    engine.flow(out, [x])


def index_put(engine: Engine, node: Node) -> None:
    """Writes into positions: the indexed axes are addressed, the others are shared with the values."""
    x, out, values = node["self"], node.outputs[0], node["values"]
    dims = engine.axes(x)
    picks = list(node["indices"])
    for i, p in enumerate(picks):
        if p is None:
            continue
        if p.dtype in _BOOLEAN:
            engine.freeze(dims[i], Reason.FIXED)
        else:
            fam.index_axis(engine, dims[i], p)
        for axis in engine.axes(p):
            engine.freeze(axis, Reason.FIXED)
    used = [i for i, p in enumerate(picks) if p is not None]
    leading = used == list(range(len(used)))
    for i, axis in enumerate(reversed(engine.axes(values)), 1):
        if leading and i <= len(dims) - len(used):
            engine.broadcast(dims[-i], axis)
        else:
            engine.freeze(axis, Reason.FIXED)
    if not leading:
        for axis in dims:
            engine.freeze(axis, Reason.FIXED)
    engine.set(out, dims)
    engine.flow(out, [x], [values])


def index_select(engine: Engine, node: Node) -> None:
    x, picks, dim = node["self"], node["index"], node["dim"]
    dims = list(engine.axes(x))
    fam.index_axis(engine, dims[dim], picks)
    dims[dim] = engine.axes(picks)[0] if picks.shape else []
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x])
    fam.keep_index(engine, x)


def gather(engine: Engine, node: Node) -> None:
    x, picks, dim = node["self"], node["index"], node["dim"]
    dims, at = engine.axes(x), engine.axes(picks)
    fam.index_axis(engine, dims[dim], picks)
    for i, (a, b) in enumerate(zip(dims, at)):
        if i != dim % max(len(dims), 1):
            if size(a) == size(b):
                engine.equate(a, b)
            else:
                engine.freeze([*a, *b], Reason.FIXED)
    engine.set(node.outputs[0], at)
    engine.flow(node.outputs[0], [x])
    fam.keep_index(engine, x)


def scatter(engine: Engine, node: Node) -> None:
    x, picks, dim = node["self"], node["index"], node["dim"]
    dims, at = engine.axes(x), engine.axes(picks)
    source = node.args.get("src")
    fam.index_axis(engine, dims[dim], picks)
    others = [at] + ([engine.axes(source)] if isinstance(source, Value) and source.shape else [])
    for i, a in enumerate(dims):
        for other in others:
            if i == dim % max(len(dims), 1):
                if source is not None and size(other[i]) != size(at[i]):
                    engine.freeze(other[i], Reason.FIXED)
            elif size(a) == size(other[i]):
                engine.equate(a, other[i])
            else:
                engine.freeze([*a, *other[i]], Reason.FIXED)
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x], ([source] if isinstance(source, Value) else ()))


def index_add(engine: Engine, node: Node) -> None:
    x, source, dim = node["self"], node["source"], node["dim"]
    dims, other = engine.axes(x), engine.axes(source)
    fam.index_axis(engine, dims[dim], node["index"])
    engine.equate(other[dim], engine.axes(node["index"])[0])
    for i, (a, b) in enumerate(zip(dims, other)):
        if i != dim % len(dims):
            engine.equate(a, b)
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x], [source])


def one_hot(engine: Engine, node: Node) -> None:
    x, out = node["self"], node.outputs[0]
    tag = engine.indexes.get(x)
    last = list(tag) if tag is not None and size(tag) == out.shape[-1] else engine.frozen(out.shape[-1])
    engine.set(out, [*engine.axes(x), last])
    engine.flow(out, (), over=[last])  # a masked unit is never indexed


def counts(engine: Engine, node: Node) -> None:
    """histc and bincount of tagged indices: one bin per unit."""
    x, out = node["self"], node.outputs[0]
    tag = engine.indexes.get(x)
    for axis in engine.axes(x):
        engine.freeze(axis, Reason.FIXED)
    last = list(tag) if tag is not None and size(tag) == out.shape[0] else engine.frozen(out.shape[0])
    engine.set(out, [last])
    engine.flow(out, (), over=[last])


def grouped_mm(engine: Engine, node: Node) -> None:
    a, b = node["self"], node["mat2"]
    if len(a.shape) == 2 and len(b.shape) == 3:
        engine.spec("self[t k] mat2[e k n] offs[e] -> t n" if node["offs"] is not None else "self[t k] mat2[_ k n] -> t n")
        engine.flows[-1].over += (engine.axes(b)[0],)  # rows of a removed expert do not exist
        engine.mark(engine.axes(b)[0], "expert")
    elif len(a.shape) == 3 and len(b.shape) == 3:
        engine.spec("self[e t k] mat2[e k n] -> e t n")
    else:
        engine.unsupported(Reason.FIXED)


# ---- recurrent nets


def recurrent(gates: int) -> Rule:
    """LSTM, GRU, RNN over packed gate matrices (gates * hidden), possibly bidirectional and stacked."""

    def rule(engine: Engine, node: Node) -> None:
        x, hidden = node["input"], node["hx"]
        hidden = list(leaves([hidden]))
        weights = list(leaves(node["params"]))
        if "batch_first" not in node.args or "data" in node.args:
            return engine.unsupported(Reason.FIXED, "packed sequences")
        directions = 2 if node["bidirectional"] else 1
        per = len(weights) // (node["num_layers"] * directions)
        if per not in (2, 4):
            return engine.unsupported(Reason.FIXED, "projections")
        below: Axis = engine.axes(x)[-1]
        for state in hidden:
            for axis in engine.axes(state)[:-1]:
                engine.freeze(axis, Reason.FIXED)
        for layer in range(node["num_layers"]):
            units = []
            for direction in range(directions):
                group = weights[(layer * directions + direction) * per :][:per]
                unit: Axis = engine.axes(group[1])[1]
                gate = engine.frozen(gates)
                for w in group:
                    engine.equate(engine.axes(w)[0], [*gate, *unit])
                engine.equate(engine.axes(group[0])[1], below)
                # the state of this layer and direction is a slice of the stacked one, so its hidden axis is this unit's
                for state in hidden:
                    engine.equate(engine.axes(state)[-1], unit)
                units.append(unit)
            below = units[0] if len(units) == 1 else [sum_of(units)]
        sequence, *last = node.outputs
        engine.set(sequence, [*engine.axes(x)[:-1], below])
        engine.flow(sequence, weights, over=[below])
        for out, state in zip(last, hidden):
            engine.set(out, engine.axes(state))
            engine.flow(out, ())

    return rule


def glu(engine: Engine, node: Node) -> None:
    """a * sigmoid(b) of two halves of an axis."""
    x, dim = node["self"], node["dim"]
    dims = list(engine.axes(x))
    half: Axis = [Factor(node.outputs[0].shape[dim])] if node.outputs[0].shape[dim] > 1 else []
    engine.equate(dims[dim], [Factor(2), *half]) if half else engine.freeze(dims[dim], Reason.FIXED)
    _freeze_outer(engine, dims[dim], half)
    dims[dim] = half
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x])


def _freeze_outer(engine: Engine, axis: Axis, inner: Axis) -> None:
    inside = set(leaves_of(inner))
    engine.freeze([f for f in leaves_of(axis) if f not in inside], Reason.FIXED)


def pixel_shuffle(engine: Engine, node: Node) -> None:
    """(c r r) h w -> c (h r) (w r)."""
    x, out, r = node["self"], node.outputs[0], node["upscale_factor"]
    dims = engine.axes(x)
    channel: Axis = [Factor(out.shape[-3])] if out.shape[-3] > 1 else []
    inner = engine.frozen(r * r)
    engine.equate(dims[-3], [*channel, *inner])
    for axis in dims[-2:]:
        engine.freeze(axis, Reason.FIXED)
    engine.set(out, [*dims[:-3], channel, *(engine.frozen(n) for n in out.shape[-2:])])
    engine.flow(out, [x])


def pixel_unshuffle(engine: Engine, node: Node) -> None:
    """c (h r) (w r) -> (c r r) h w."""
    x, out, r = node["self"], node.outputs[0], node["downscale_factor"]
    dims = engine.axes(x)
    for axis in dims[-2:]:
        engine.freeze(axis, Reason.FIXED)
    engine.set(out, [*dims[:-3], [*dims[-3], *engine.frozen(r * r)], *(engine.frozen(n) for n in out.shape[-2:])])
    engine.flow(out, [x])


def unfold(engine: Engine, node: Node) -> None:
    """im2col: b c h w -> b (c k k) l; Tensor.unfold: a window axis is appended."""
    x, out = node["self"], node.outputs[0]
    dims = engine.axes(x)
    if "dimension" in node.args:
        axis = node["dimension"] % len(dims)
        engine.freeze(dims[axis], Reason.FIXED)
        new = [engine.frozen(out.shape[axis]) if i == axis else a for i, a in enumerate(dims)]
        engine.set(out, [*new, engine.frozen(out.shape[-1])])
    else:
        for a in dims[-2:]:
            engine.freeze(a, Reason.FIXED)
        window = math.prod(node["kernel_size"])
        engine.set(out, [*dims[:-3], [*dims[-3], *engine.frozen(window)], engine.frozen(out.shape[-1])])
    engine.flow(out, [x])


_BOOLEAN = (torch.bool, torch.uint8)

ATEN: dict[str, Rule] = {
    # products and contractions
    "linear": linear,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "mv": "self[m k] vec[k] -> m",
    "dot": "self[k] tensor[k] -> ",
    "addmm": addmm,
    "baddbmm": baddbmm,
    "einsum": einsum,
    "bilinear": "input1[... i] input2[... j] weight[o i j] + bias[o] -> ... o",
    "outer": "self[i] vec2[j] -> i j",
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution),
    "scaled_dot_product_attention": attention,
    "_grouped_mm": grouped_mm,
    "embedding": embedding,
    "lstm": recurrent(4),
    "gru": recurrent(3),
    "rnn_tanh": recurrent(1),
    "rnn_relu": recurrent(1),
    # norms
    "batch_norm": "input[b c *] weight[c] + bias[c] ; running_mean[c] running_var[c] -> b c *".replace("*", "..."),
    "instance_norm": "input[b c *] weight[c] + bias[c] ; running_mean[c] running_var[c] -> b c *",
    "group_norm": group_norm,
    "layer_norm": normalize_axes,
    "rms_norm": normalize_axes,
    "softmax": along("-inf"),
    "log_softmax": along("-inf"),
    "_softmax": along("-inf"),
    "_safe_softmax": along("-inf"),
    "logcumsumexp": along("fixed"),
    "cumsum": cumulative,
    "cumprod": along("fixed"),
    # reductions
    "sum": reduction("zero"),
    "mean": reduction("renorm"),
    "var": reduction("renorm"),
    "std": reduction("renorm"),
    "var_mean": reduction("renorm"),
    "std_mean": reduction("renorm"),
    "amax": reduction("-inf"),
    "amin": reduction("-inf"),
    "logsumexp": reduction("-inf"),
    "prod": reduction("fixed"),
    "any": reduction("fixed"),
    "all": reduction("fixed"),
    "norm": vector_norm,
    "linalg_vector_norm": vector_norm,
    "max": extremum,
    "min": extremum,
    "argmax": argmax,
    "argmin": argmax,
    # shapes
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "_reshape_alias"), view),
    **dict.fromkeys(("transpose", "t", "swapaxes", "swapdims", "adjoint", "mT"), transpose),
    "numpy_T": lambda e, n: fam.permute(e, n["self"], range(len(n["self"].shape))[::-1]),
    "permute": permute,
    "movedim": movedim,
    "moveaxis": movedim,
    "cat": concat,
    "concat": concat,
    "concatenate": concat,
    "stack": stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), split),
    "unbind": unbind,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "expand": expand,
    "expand_as": expand,
    "broadcast_to": expand,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "pad": pad,
    "constant_pad_nd": pad,
    **{f"{mode}_pad{d}d": trailing(d) for mode in ("reflection", "replication") for d in (1, 2, 3)},
    "roll": roll,
    "flip": flip,
    "tril": diagonal_mask,
    "triu": diagonal_mask,
    # pools and resizes: the trailing axes are spatial
    **{f"{kind}_pool{d}d": trailing(d) for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)},
    **{f"max_pool{d}d_with_indices": trailing(d) for d in (2, 3)},
    **{f"upsample_{kind}": trailing(d) for kind, d in (("nearest1d", 1), ("nearest2d", 2), ("nearest3d", 3), ("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3), ("_nearest_exact2d", 2))},
    "_upsample_nearest_exact2d": trailing(2),
    "_upsample_bilinear2d_aa": trailing(2),
    "_upsample_bicubic2d_aa": trailing(2),
    # indices
    "topk": topk,
    "sort": sort,
    "argsort": lambda e, n: fam.along(e, n["self"], [n["dim"]], "fixed"),
    "index": index,
    "index_put": index_put,
    "index_select": index_select,
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    "index_add": index_add,
    "one_hot": one_hot,
    "histc": counts,
    "bincount": counts,
    # elementwise, by how zeros pass
    **dict.fromkeys(("mul", "multiply", "logical_and", "bitwise_and"), product),
    **dict.fromkeys(("add", "sub", "subtract", "rsub", "maximum", "minimum", "fmax", "fmin", "logical_or", "bitwise_or", "hypot"), total),
    **dict.fromkeys(("div", "divide", "true_divide", "floor_divide", "fmod", "remainder", "copysign", "prelu", "rrelu"), scaled),
    **dict.fromkeys(
        "relu gelu silu tanh neg negative abs sqrt relu6 leaky_relu elu selu celu softsign mish hardswish sin asin tan atan sinh asinh erf expm1 "
        "log1p square sign sgn round floor ceil trunc dropout feature_dropout alpha_dropout softshrink hardshrink tanhshrink nan_to_num positive".split(),
        unary,
    ),
    **dict.fromkeys("clone to _to_copy contiguous detach detach_ alias lift_fresh_copy float double half type_as long int view_of _assert_tensor_metadata".split(), index_preserving),
    **dict.fromkeys("sigmoid exp exp2 log log2 log10 cos acos cosh rsqrt reciprocal softplus hardsigmoid log_sigmoid erfc logit bitwise_not logical_not".split(), opaque),
    **dict.fromkeys("eq ne lt le gt ge isnan isinf isfinite logical_xor full_like ones_like rand_like randn_like empty_like bernoulli".split(), opaque),
    "zeros_like": unary,
    "where": where,
    "masked_fill": masked_fill,
    **dict.fromkeys(("clamp", "clip", "hardtanh", "clamp_min", "clamp_max"), clamp),
    "pow": power,
    "float_power": power,
    "glu": glu,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "unfold": unfold,
    "im2col": unfold,
    "take_along_dim": gather,
}
