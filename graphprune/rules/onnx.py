"""Dim rules of the ONNX operators, keyed by op type; arguments have the names of the newest schemas (see `capture/onnx_file.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphprune.axes import Axis, Factor, size, sum_of
from graphprune.errors import Reason
from graphprune.program import Kind, Node, Value, leaves
from graphprune.rules import families as fam
from graphprune.rules.aten import Rule
from graphprune.rules.engine import Engine
from graphprune.rules.onnx_literals import LITERAL_OPERANDS, ints, slice_range


def literal(operand: Any) -> list[int] | None:
    """The integers of a literal operand; None where it is absent or only known when the model runs (see `is_known`)."""
    return ints(operand.tensor if isinstance(operand, Value) else operand)


def is_known(operand: Any) -> bool:
    """Is a literal operand the same in every run?"""
    return not isinstance(operand, Value) or operand.tensor is not None


def rank(value: Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _first(node: Node) -> Value:
    return node.inputs[0]


def _is_zero(operand: Any) -> bool:
    tensor = operand.tensor if isinstance(operand, Value) and operand.kind is Kind.CONSTANT else None
    return tensor is not None and tensor.numel() > 0 and not bool(tensor.any())


# ---- elementwise


def product(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, node.inputs, node.inputs)


def total(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, node.inputs, *([v] for v in node.inputs if not _is_zero(v)))


def scaled(engine: Engine, node: Node) -> None:
    """The first operand decides where the result vanishes."""
    fam.pointwise(engine, node.inputs, [_first(node)])


def opaque(engine: Engine, node: Node) -> None:
    """f(0) != 0: the result vanishes nowhere."""
    fam.pointwise(engine, node.inputs, ())


def like_first(engine: Engine, node: Node) -> None:
    """f(0) == 0 of the first operand; the others only say how."""
    x = _first(node)
    for out in node.outputs:
        engine.set(out, engine.axes(x))
        engine.flow(out, [x])
    fam.keep_index(engine, x)


def opaque_like_first(engine: Engine, node: Node) -> None:
    for out in node.outputs:
        engine.set(out, engine.axes(_first(node)))
        engine.flow(out, ())


def clip(engine: Engine, node: Node) -> None:
    def number(operand: Any) -> float | None:
        return float(operand.tensor) if isinstance(operand, Value) and operand.tensor is not None else operand

    low, high = number(node["min"]), number(node["max"])
    known = not isinstance(low, Value) and not isinstance(high, Value)
    inside = known and (low is None or low <= 0) and (high is None or high >= 0)
    x = node["input"]
    engine.set(node.outputs[0], engine.axes(x))
    engine.flow(node.outputs[0], [x] if inside else ())
    fam.keep_index(engine, x)


def power(engine: Engine, node: Node) -> None:
    exponent = node["Y"].tensor
    positive = node["Y"].kind is Kind.CONSTANT and exponent is not None and bool((exponent > 0).all())
    fam.pointwise(engine, node.inputs, [node["X"]] if positive else ())


def where(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, node.inputs, *([v] for v in (node["X"], node["Y"]) if not _is_zero(v)))


def quantized(engine: Engine, node: Node) -> None:
    engine.unsupported(Reason.QUANTIZED)


# ---- linear algebra


def matmul(engine: Engine, node: Node) -> None:
    fam.matmul(engine, node["A"], node["B"], ("A", "B"))


def gemm(engine: Engine, node: Node) -> None:
    a, b = "k m" if node["transA"] else "m k", "n k" if node["transB"] else "k n"
    bias = {0: "", 1: "n", 2: "m n"}[rank(node["C"])] if node["C"] is not None else ""
    engine.spec(f"A[{a}] B[{b}] + C[{bias}] -> m n")


def einsum(engine: Engine, node: Node) -> None:
    operands, equation = list(leaves(node["Inputs"])), node["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if any(v.kind is Kind.CONSTANT for v in operands) or any(len(set(t.replace(".", ""))) != len(t.replace(".", "")) for t in terms):
        return engine.unsupported(Reason.FIXED, "a repeated subscript or a constant operand")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))

    def spaced(term: str) -> str:
        return " ".join(term.replace("...", "~")).replace("~", "...")

    named = {f"t{i}": v for i, v in enumerate(operands)}  # the operands live in a list; the notation wants names
    engine.node = Node(node.name, node.domain, node.op_type, named, node.outputs, node.call)
    engine.spec(" ".join(f"t{i}[{spaced(t)}]" for i, t in enumerate(terms)) + f" -> {spaced(right)}")
    engine.node = node
    if len(operands) == 2 and all(v in engine.from_input for v in operands) and "..." not in left:  # attention-like
        for value, term, other in zip(operands, terms, reversed(terms)):
            for axis, letter in zip(engine.axes(value), term):
                if letter in other and letter in right:
                    fam.mark_heads(engine, axis)
                elif letter in other:
                    engine.mark(axis, "head_dim")


_CONV_MARKS = {"g": "conv", "i": "conv", "o": "conv"}


def convolution(engine: Engine, node: Node) -> None:
    kernel = "(g i) o *" if node.op_type == "ConvTranspose" else "(g o) i *"
    engine.spec(f"X[b (g i) *] W[{kernel}] + B[(g o)] -> b (g o) *", sizes={"g": node["group"]}, marks=_CONV_MARKS)


def attention(engine: Engine, node: Node) -> None:
    """Heads are an axis of their own (four axes), or the outer part of the last one (three)."""
    q, k, whole = node["Q"], node["K"], rank(node["Q"]) == 4
    q_heads, kv_heads = (q.shape[1], k.shape[1]) if whole else (node["q_num_heads"], node["kv_num_heads"])
    line = (
        "V[b k s e] past_value[b k _ e] ; Q[b (k q) l d] K[b k s d] past_key[b k _ d] -> b (k q) l e"
        if whole
        else "V[b s (k e)] past_value[b k _ e] ; Q[b l (k q d)] K[b s (k d)] past_key[b k _ d] -> b l (k q e)"
    )
    grouped = q_heads != kv_heads
    marks = {"k": "kv_group", "q": "head", "d": "head_dim", "e": "head_dim"} if grouped else {"k": "head", "d": "head_dim", "e": "head_dim"}
    at = len(engine.flows)
    engine.spec(line + ", b k _ d, b k _ e, b _ _ _", {"k": kv_heads, "q": q_heads // kv_heads}, marks=marks)
    tokens = engine.axes(k)[2 if whole else 1]
    engine.flows[at].over += (tokens,)  # the softmax neutralises removed positions itself
    mask, nonpad = node["attn_mask"], node["nonpad_kv_seqlen"]
    if mask is not None:
        dims = engine.axes(mask)
        for axis in (*dims[-2:], *dims[:-3]):
            engine.freeze(axis, Reason.FIXED)
        if len(dims) > 2 and size(dims[-3]) > 1:
            if whole:
                engine.equate(dims[-3], engine.axes(q)[1])
            else:
                engine.freeze([*dims[-3], *engine.axes(q)[-1]], Reason.FIXED, "a mask per head")
    for axis in engine.axes(nonpad) if nonpad is not None else ():
        engine.freeze(axis, Reason.FIXED)


def rotary(engine: Engine, node: Node) -> None:
    """Pairs of positions of a head turn together: (2 half) or, interleaved, (half 2), and the rest of the head stays."""
    x, whole = node["X"], rank(node["X"]) == 4
    width = x.shape[-1] if whole else x.shape[-1] // node["num_heads"]
    turned = node["rotary_embedding_dim"] or width
    half: Axis = [Factor(turned // 2)] if turned > 2 else []
    pair = engine.frozen(2)
    inner: Axis = [*half, *pair] if node["interleaved"] else [*pair, *half]
    if turned < width:
        inner = [sum_of([inner, [Factor(width - turned)] if width - turned > 1 else []])]
    dims = engine.axes(x)
    heads: Axis = [Factor(node["num_heads"])] if not whole and node["num_heads"] > 1 else []
    engine.equate(dims[-1], inner if whole else [*heads, *inner])
    for cache in (node["cos_cache"], node["sin_cache"]):
        *lead, last = engine.axes(cache)
        engine.equate(last, half)
        for axis in lead:
            engine.freeze(axis, Reason.FIXED)
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x])


def recurrent(gates: int) -> Rule:
    """LSTM, GRU, RNN: units are shared by the gates and, as both lie in one tensor, by the two directions."""

    def rule(engine: Engine, node: Node) -> None:
        if any(name not in ("Sigmoid", "Tanh", "Relu") for name in node["activations"] or ()) or node.args.get("P") is not None:
            return engine.unsupported(Reason.FIXED, "peepholes or an activation that is not zero at zero")
        x, w, r = node["X"], node["W"], node["R"]
        unit = engine.axes(r)[2]
        gate = engine.frozen(gates)
        engine.equate(engine.axes(r)[1], [*gate, *unit])
        engine.equate(engine.axes(w)[1], [*gate, *unit])
        engine.equate(engine.axes(w)[2], engine.axes(x)[2])
        for tensor in (w, r, node["B"]):
            if tensor is not None:
                engine.freeze(engine.axes(tensor)[0], Reason.FIXED)
        if node["B"] is not None:
            engine.equate(engine.axes(node["B"])[1], [*engine.frozen(2), *gate, *unit])
        for state in (node["initial_h"], node.args.get("initial_c")):
            if state is not None:
                *outer, last = engine.axes(state)
                engine.equate(last, unit)
                for axis in outer:
                    engine.freeze(axis, Reason.FIXED)
        terms = [[x, w], [x, r]] + ([[node["B"]]] if node["B"] is not None else [])
        for out in node.outputs:
            assert out.shape is not None
            engine.set(out, [*(engine.frozen(n) for n in out.shape[:-1]), unit])
            engine.flow(out, *terms, over=[unit])

    return rule


# ---- norms and reductions


def _after(node: Node, x: Value) -> range:
    return range(node["axis"] % rank(x), rank(x))


def layer_norm(engine: Engine, node: Node) -> None:
    scale, bias = (node["Scale"], node["B"]) if node.op_type == "LayerNormalization" else (node["scale"], None)
    over = _after(node, node["X"])
    fam.norm(engine, node["X"], over, scale, bias)
    for out in node.outputs[1:]:
        engine.set(out, [[] if i in over else axis for i, axis in enumerate(engine.axes(node["X"]))])
        engine.flow(out, ())


def group_norm(engine: Engine, node: Node) -> None:
    x, groups = node["X"], node["num_groups"]
    per_channel = "(g c)" if node["scale"].shape[0] == x.shape[1] else "g"
    engine.spec(
        f"X[b (g c) *] scale[{per_channel}] + bias[{per_channel}] -> b (g c) *",
        sizes={"g": groups, "c": x.shape[1] // groups},
        over="c",
        marks={"c": "renorm"} if x.shape[1] > groups else {},
    )


def batch_norm(engine: Engine, node: Node) -> None:
    if len(node.outputs) > 1:
        return engine.unsupported(Reason.FIXED, "training mode")
    engine.spec("X[b c ...] scale[c] + B[c] ; input_mean[c] input_var[c] -> b c ...")


def mean_variance_norm(engine: Engine, node: Node) -> None:
    fam.along(engine, _first(node), [a % rank(_first(node)) for a in node["axes"]], "fixed")


def softmax(engine: Engine, node: Node) -> None:
    x = node["input"]
    over = _after(node, x) if node.args.get("to_end") else [node["axis"] % rank(x)]
    fam.along(engine, x, list(over), "-inf")


def reduction(neutral: str, zero_at_zero: bool = True) -> Rule:
    def rule(engine: Engine, node: Node) -> None:
        x, axes = node["data"], node.args.get("axes")
        if not is_known(axes):
            return engine.unsupported(Reason.FIXED, "axes that are only known when the model runs")
        over = literal(axes) or []
        if not over and node.args.get("noop_with_empty_axes"):
            return like_first(engine, node) if zero_at_zero else opaque_like_first(engine, node)
        fam.reduce(engine, x, over, bool(node["keepdims"]), neutral)
        if not zero_at_zero:
            engine.flow(node.outputs[0], (), over=engine.flows[-1].over)

    return rule


def argmax(engine: Engine, node: Node) -> None:
    fam.argmax(engine, node["data"], node["axis"] % rank(node["data"]), bool(node["keepdims"]))


def cumulative(neutral: str) -> Rule:
    def rule(engine: Engine, node: Node) -> None:
        axis = literal(node["axis"]) if is_known(node["axis"]) else None
        if axis is None:
            return engine.unsupported(Reason.FIXED)
        fam.along(engine, node["x"], [axis[0] % rank(node["x"])], neutral)

    return rule


def fixed_along(*names: str) -> Rule:
    """The shape stays; the axes that these attributes name may not move."""
    return lambda engine, node: fam.along(engine, _first(node), [node[name] % rank(_first(node)) for name in names], "fixed")


# ---- shapes


def reshape(engine: Engine, node: Node) -> None:
    fam.reshape(engine, _first(node))


def transpose(engine: Engine, node: Node) -> None:
    x = node["data"]
    fam.permute(engine, x, node["perm"] if node["perm"] is not None else range(rank(x))[::-1])


def concat(engine: Engine, node: Node) -> None:
    fam.concat(engine, list(leaves(node["inputs"])), node["axis"])


def split(engine: Engine, node: Node) -> None:
    axis = node["axis"] % rank(node["input"])
    fam.split(engine, node["input"], axis, [out.shape[axis] for out in node.outputs if out.shape])


def slice_(engine: Engine, node: Node) -> None:
    x, out = node["data"], node.outputs[0]
    assert x.shape is not None and out.shape is not None
    if not is_known(node["axes"]):
        return engine.unsupported(Reason.FIXED, "axes that are only known when the model runs")
    if is_known(node["starts"]):
        count = len(literal(node["starts"]) or ())
    else:
        count = node["starts"].shape[0]
    dims = list(engine.axes(x))
    known = is_known(node["starts"]) and is_known(node["ends"]) and is_known(node["steps"])
    starts, ends = (literal(node["starts"]) or [], literal(node["ends"]) or []) if known else ([0] * count, [0] * count)
    steps = (literal(node["steps"]) if known else None) or [1] * count
    for axis, start, end, step in zip(literal(node["axes"]) or range(count), starts, ends, steps):
        axis %= rank(x)
        taken = slice_range(x.shape[axis], start, end, step)
        if known and step > 0 and axis not in x.dynamic and len(taken):
            dims[axis] = fam.slice_axis(engine, x, axis, taken.start, taken.stop, step)
        else:
            engine.freeze(dims[axis], Reason.FIXED)
            dims[axis] = engine.frozen(out.shape[axis])
    engine.set(out, dims)
    engine.flow(out, [x])
    fam.keep_index(engine, x)


def gather(engine: Engine, node: Node) -> None:
    """Constant positions are a selection or a slice; other indices address the axis."""
    x, picks = node["data"], node["indices"]
    axis = node["axis"] % rank(x)
    if picks.kind is Kind.CONSTANT and rank(picks) == 0:
        return fam.select(engine, x, axis)
    if picks.kind is Kind.CONSTANT and rank(picks) == 1:
        at = np.asarray(picks.tensor) % max(x.shape[axis], 1)
        if len(at) and (at == np.arange(at[0], at[0] + len(at))).all():
            return fam.slice_(engine, x, axis, int(at[0]), int(at[-1]) + 1)
    dims = engine.axes(x)
    if x.kind is Kind.PARAMETER and axis == 0 and picks.kind is not Kind.CONSTANT:
        engine.mark(dims[0], "vocab")
    fam.index_axis(engine, dims[axis], picks)
    engine.set(node.outputs[0], [*dims[:axis], *engine.axes(picks), *dims[axis + 1 :]])
    engine.flow(node.outputs[0], [x])
    fam.keep_index(engine, x)


def _beside(engine: Engine, dims: Sequence[Axis], others: Sequence[Sequence[Axis]], axis: int) -> None:
    """Element-wise gathers and scatters: all axes but one correspond."""
    for i, a in enumerate(dims):
        for other in others:
            if i == axis:
                continue
            if size(a) == size(other[i]):
                engine.equate(a, other[i])
            else:
                engine.freeze([*a, *other[i]], Reason.FIXED)


def gather_elements(engine: Engine, node: Node) -> None:
    x, picks = node["data"], node["indices"]
    axis = node["axis"] % rank(x)
    fam.index_axis(engine, engine.axes(x)[axis], picks)
    _beside(engine, engine.axes(x), [engine.axes(picks)], axis)
    engine.set(node.outputs[0], engine.axes(picks))
    engine.flow(node.outputs[0], [x])
    fam.keep_index(engine, x)


def scatter_elements(engine: Engine, node: Node) -> None:
    x, picks, updates = node["data"], node["indices"], node["updates"]
    axis = node["axis"] % rank(x)
    fam.index_axis(engine, engine.axes(x)[axis], picks)
    _beside(engine, engine.axes(x), [engine.axes(picks), engine.axes(updates)], axis)
    engine.equate(engine.axes(picks)[axis], engine.axes(updates)[axis])
    engine.set(node.outputs[0], engine.axes(x))
    engine.flow(node.outputs[0], [x], [updates])


def gather_nd(engine: Engine, node: Node) -> None:
    x, picks, out = node["data"], node["indices"], node.outputs[0]
    dims, depth = engine.axes(x), picks.shape[-1] + node["batch_dims"]
    for axis in (*dims[:depth], *engine.axes(picks)):
        engine.freeze(axis, Reason.FIXED)
    tail = dims[depth:]
    engine.set(out, [*(engine.frozen(n) for n in out.shape[: rank(out) - len(tail)]), *tail])
    engine.flow(out, [x])


def scatter_nd(engine: Engine, node: Node) -> None:
    x, picks, updates = node["data"], node["indices"], node["updates"]
    dims, new, depth = engine.axes(x), engine.axes(updates), picks.shape[-1]
    tail = dims[depth:]
    lead = new[: len(new) - len(tail)]
    for axis in (*dims[:depth], *engine.axes(picks), *lead):
        engine.freeze(axis, Reason.FIXED)
    for a, b in zip(tail, new[len(lead) :]):
        engine.equate(a, b)
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x], [updates])


def topk(engine: Engine, node: Node) -> None:
    if len(node.outputs) < 2 or not node.args.get("largest", 1):
        return engine.unsupported(Reason.FIXED)
    axis = node["axis"] % rank(node["X"])
    fam.topk(engine, node["X"], axis, node.outputs[0].shape[axis])  # type: ignore[index]


def one_hot(engine: Engine, node: Node) -> None:
    x, out = node["indices"], node.outputs[0]
    axis = node["axis"] % rank(out)
    tag = engine.indexes.get(x)
    hot = list(tag) if tag is not None and size(tag) == out.shape[axis] else engine.frozen(out.shape[axis])
    dims = list(engine.axes(x))
    dims.insert(axis, hot)
    engine.freeze(engine.axes(node["values"])[0], Reason.FIXED)
    engine.set(out, dims)
    engine.flow(out, (), over=[hot])  # a masked unit is never indexed


def expand(engine: Engine, node: Node) -> None:
    fam.expand(engine, node["input"])


def tile(engine: Engine, node: Node) -> None:
    x, out = node["input"], node.outputs[0]
    dims = []
    for inner, length in zip(engine.axes(x), out.shape):
        times = length // max(1, size(inner))
        dims.append([*([Factor(times)] if times > 1 else []), *inner])
    engine.set(out, dims)
    engine.flow(out, [x])


def _resized(engine: Engine, node: Node) -> None:
    """Axes that keep their size stay; the others are fixed."""
    x = _first(node)
    dims = list(engine.axes(x))
    for out in node.outputs:
        assert x.shape is not None and out.shape is not None
        for axis, (old, new) in enumerate(zip(x.shape, out.shape)):
            if old != new:
                engine.freeze(dims[axis], Reason.FIXED)
                dims[axis] = engine.frozen(new)
        engine.set(out, dims)
        engine.flow(out, [x])


def resize(engine: Engine, node: Node) -> None:
    if node.args.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return engine.unsupported(Reason.FIXED)
    _resized(engine, node)


def pad(engine: Engine, node: Node) -> None:
    """Constant padding with zeros is a concat with frozen parts; other modes and values freeze the padded axes."""
    x, out = node["data"], node.outputs[0]
    if not is_known(node["axes"]):
        return engine.unsupported(Reason.FIXED)
    if not is_known(node["pads"]):
        return _resized(engine, node)
    over = [a % rank(x) for a in literal(node["axes"]) or range(rank(x))]
    amounts = literal(node["pads"]) or []
    fill = node["constant_value"]
    zero = node["mode"] == "constant" and (fill is None or fill == 0 if not isinstance(fill, Value) else _is_zero(fill))
    dims = list(engine.axes(x))
    for axis, before, after in zip(over, amounts, amounts[len(over) :]):
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


def spatial(engine: Engine, node: Node) -> None:
    """Pools: batch and channel stay, the other axes are fixed."""
    x = _first(node)
    dims = engine.axes(x)
    for axis in dims[2:]:
        engine.freeze(axis, Reason.FIXED)
    for out in node.outputs:
        assert out.shape is not None
        engine.set(out, [*dims[:2], *(engine.frozen(n) for n in out.shape[2:])])
        engine.flow(out, [x])


def depth_to_space(engine: Engine, node: Node) -> None:
    x, out = node["input"], node.outputs[0]
    dims = engine.axes(x)
    channel: Axis = [Factor(out.shape[1])] if out.shape[1] > 1 else []
    block = engine.frozen(node["blocksize"] ** (rank(x) - 2))
    engine.equate(dims[1], [*block, *channel] if node["mode"] == "DCR" else [*channel, *block])
    for axis in dims[2:]:
        engine.freeze(axis, Reason.FIXED)
    engine.set(out, [dims[0], channel, *(engine.frozen(n) for n in out.shape[2:])])
    engine.flow(out, [x])


def space_to_depth(engine: Engine, node: Node) -> None:
    x, out = node["input"], node.outputs[0]
    dims = engine.axes(x)
    block = engine.frozen(node["blocksize"] ** (rank(x) - 2))
    for axis in dims[2:]:
        engine.freeze(axis, Reason.FIXED)
    channel = [*block, *dims[1]] if node.args.get("mode", "DCR") == "DCR" else [*dims[1], *block]
    engine.set(out, [dims[0], channel, *(engine.frozen(n) for n in out.shape[2:])])
    engine.flow(out, [x])


def generated(engine: Engine, node: Node) -> None:
    """Made from a shape: the axes are free, like a constant's."""
    out = node.outputs[0]
    value = node.args.get("value")
    zeros = node.op_type == "ConstantOfShape" and (value is None or not bool(value.any()))
    engine.set(out, engine.fresh(out))
    engine.flow(out, (), over=engine.axes(out) if zeros else ())


def shape_of(engine: Engine, node: Node) -> None:
    """Sizes are computed anew after a cut. Where they are used for more than shapes, the axes they measure must keep their size."""
    x = node["data"]
    engine.set(node.outputs[0], [engine.frozen(n) for n in node.outputs[0].shape])
    engine.flow(node.outputs[0], ())
    if node.op_type == "Size" or not _only_shapes(node.outputs[0], x.dynamic):
        for axis in engine.axes(x):
            engine.freeze(axis, Reason.FIXED, "its size is used in arithmetic")


_PASS_SHAPES_ON = {"Cast", "Concat", "Gather", "Identity", "Slice", "Split", "Squeeze", "Unsqueeze", "Reshape"}


def _only_shapes(value: Value, dynamic: frozenset[int]) -> bool:
    """Does a vector of sizes end in shapes only, or in sizes that are dynamic, hence frozen, anyway?"""
    for use in value.uses:
        if use.op_type == "Gather" and use["data"] is value and use["indices"].tensor is not None:
            if {int(i) for i in np.asarray(use["indices"].tensor).reshape(-1)} <= dynamic:
                continue
        if any(v is value for name in LITERAL_OPERANDS.get(use.op_type, ()) for v in leaves([use.args.get(name)])):
            continue
        if use.op_type not in _PASS_SHAPES_ON or not all(v.kind is Kind.CONSTANT or _only_shapes(v, frozenset()) for v in use.outputs):
            return False
    return True


ONNX: dict[str, Rule] = {
    # products and contractions
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "Conv": convolution,
    "ConvTranspose": convolution,
    "CausalConvWithState": "input[b c *] weight[c _ _] + bias[c] ; past_state[b c _] -> b c *, b c _",
    "Attention": attention,
    "RotaryEmbedding": rotary,
    "LSTM": recurrent(4),
    "GRU": recurrent(3),
    "RNN": recurrent(1),
    # norms
    "BatchNormalization": batch_norm,
    "InstanceNormalization": "input[b c *] scale[c] + B[c] -> b c *",
    "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    "MeanVarianceNormalization": mean_variance_norm,
    "LpNormalization": like_first,  # zeros add nothing to the norm
    "LRN": lambda engine, node: fam.along(engine, node["X"], [1], "fixed"),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), softmax),
    # reductions
    **dict.fromkeys(("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"), reduction("zero")),
    "ReduceMean": reduction("renorm"),
    "ReduceMax": reduction("-inf"),
    "ReduceMin": reduction("-inf"),
    "ReduceProd": reduction("fixed"),
    "ReduceLogSum": reduction("zero", zero_at_zero=False),
    "ReduceLogSumExp": reduction("-inf", zero_at_zero=False),
    "ArgMax": argmax,
    "ArgMin": argmax,
    "CumSum": cumulative("zero"),
    "CumProd": cumulative("fixed"),
    "ReverseSequence": fixed_along("time_axis", "batch_axis"),
    "Trilu": lambda engine, node: fam.along(engine, node["input"], [-1, -2], "fixed"),
    # shapes
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Expand": expand,
    "Tile": tile,
    "Pad": pad,
    "CenterCropPad": _resized,
    "Resize": resize,
    "Upsample": resize,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "GridSample": "X[b c *] ; grid[b *] -> b c *",
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), spatial),
    "Shape": shape_of,
    "Size": shape_of,
    **dict.fromkeys("ConstantOfShape Range RandomNormal RandomUniform BlackmanWindow HammingWindow HannWindow".split(), generated),
    # indices
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    **dict.fromkeys(("Scatter", "ScatterElements"), scatter_elements),
    "ScatterND": scatter_nd,
    "TopK": topk,
    "OneHot": one_hot,
    **dict.fromkeys(("NonZero", "Compress", "Unique", "NonMaxSuppression"), lambda engine, node: engine.unsupported(Reason.FIXED)),
    # elementwise, by how zeros pass
    **dict.fromkeys(("Mul", "And", "BitwiseAnd", "SwiGLU"), product),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean", "Max", "Min", "Or", "Xor", "BitwiseOr", "BitwiseXor"), total),
    **dict.fromkeys(("Div", "Mod", "PRelu", "BitShift"), scaled),
    **dict.fromkeys(
        "Abs Asin Asinh Atan Atanh BitCast Cast CastLike Ceil Celu Dropout Elu Erf Floor Gelu HardSwish Identity LeakyRelu Mish Neg "
        "Relu Round Selu Shrink Sign Sin Sinh Softsign Sqrt Swish Tan Tanh ThresholdedRelu".split(),
        like_first,
    ),
    **dict.fromkeys(
        "Acos Acosh BitwiseNot Cos Cosh Exp HardSigmoid IsInf IsNaN Log Not Reciprocal Sigmoid Softplus".split(), opaque_like_first
    ),
    **dict.fromkeys("Bernoulli EyeLike RandomNormalLike RandomUniformLike".split(), opaque_like_first),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), opaque),
    "Clip": clip,
    "Pow": power,
    "Where": where,
    # quantized tensors keep their axes
    **dict.fromkeys(
        "QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul ConvInteger MatMulInteger".split(), quantized
    ),
}
