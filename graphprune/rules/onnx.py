"""Dim rules of the ONNX operators, keyed by op type; arguments have the names of the newest schemas (see `capture/onnx_file.py`)."""

from __future__ import annotations

from typing import Any

from graphprune.axes import Axis, Factor, size, sum_of
from graphprune.errors import Reason
from graphprune.program import Kind, Node, Value, leaves
from graphprune.rules import families as fam
from graphprune.rules.aten_elementwise import Rule
from graphprune.rules.engine import Engine
from graphprune.rules.onnx_shapes import SHAPES, first, is_known, is_zero, literal, rank, sizes

# ---- elementwise


def product(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, node.inputs, node.inputs)


def total(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, node.inputs, *([v] for v in node.inputs if not is_zero(v)))


def scaled(engine: Engine, node: Node) -> None:
    """The first operand decides where the result vanishes."""
    fam.pointwise(engine, node.inputs, [first(node)])


def opaque(engine: Engine, node: Node) -> None:
    """f(0) != 0: the result vanishes nowhere."""
    fam.pointwise(engine, node.inputs, ())


def like_first(engine: Engine, node: Node) -> None:
    """f(0) == 0 of the first operand; the others only say how."""
    x = first(node)
    for out in node.outputs:
        engine.set(out, engine.axes(x))
        engine.flow(out, [x])
    fam.keep_index(engine, x)


def opaque_like_first(engine: Engine, node: Node) -> None:
    for out in node.outputs:
        engine.set(out, engine.axes(first(node)))
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
    fam.pointwise(engine, node.inputs, *([v] for v in (node["X"], node["Y"]) if not is_zero(v)))


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
    fam.einsum(engine, node["equation"], list(leaves(node["Inputs"])))


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
    engine.spec(line + ", b k _ d, b k _ e, b _ _ _", {"k": kv_heads, "q": q_heads // kv_heads}, marks=marks)
    for value in (q, k):
        engine.freeze(engine.axes(value)[2 if whole else 1], Reason.FIXED, "positions")
    mask, nonpad = node["attn_mask"], node["nonpad_kv_seqlen"]
    if mask is not None:
        dims = engine.axes(mask)
        for axis in dims[-2:]:
            engine.freeze(axis, Reason.FIXED)
        for axis in dims[:-3]:
            engine.broadcast(axis, engine.axes(q)[0])
        if len(dims) > 2 and size(dims[-3]) > 1:
            if whole:
                engine.equate(dims[-3], engine.axes(q)[1])
            else:
                engine.freeze([*dims[-3], *engine.axes(q)[-1]], Reason.FIXED, "a mask per head")
    if nonpad is not None:
        engine.equate(engine.axes(nonpad)[0], engine.axes(q)[0])


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
    outer = [dims[0], dims[-2] if whole else dims[1]]  # batch and positions
    for cache in (node["cos_cache"], node["sin_cache"]):
        *lead, last = engine.axes(cache)
        engine.equate(last, half)
        outer += lead
    for axis in outer + (engine.axes(node["position_ids"]) if node["position_ids"] is not None else []):
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
        for axis in engine.axes(x)[:2]:
            engine.freeze(axis, Reason.FIXED)
        terms = [[x, w], [x, r]] + ([[node["B"]]] if node["B"] is not None else [])
        for out in node.outputs:
            engine.set(out, [*(engine.frozen(n) for n in sizes(out)[:-1]), unit])
            engine.flow(out, *terms, over=[unit])

    return rule


# ---- norms and reductions


def _after(node: Node, x: Value) -> range:
    return range(node["axis"] % rank(x), rank(x))


def layer_norm(engine: Engine, node: Node) -> None:
    scale, bias = (node["Scale"], node["B"]) if node.op_type == "LayerNormalization" else (node["scale"], None)
    over = _after(node, node["X"])
    fam.norm(engine, node["X"], over, scale, bias)
    for out in node.outputs[1:]:  # the statistics themselves
        for i in over:
            engine.freeze(engine.axes(node["X"])[i], Reason.FIXED, "its mean is read")
        engine.set(out, [[] if i in over else axis for i, axis in enumerate(engine.axes(node["X"]))])
        engine.flow(out, ())


def group_norm(engine: Engine, node: Node) -> None:
    x, groups = node["X"], node["num_groups"]
    per_channel = "(g c)" if node["scale"].shape[0] == x.shape[1] else "g"
    engine.spec(
        f"X[b (g c) *] scale[{per_channel}] + bias[{per_channel}] -> b (g c) *",
        sizes={"g": groups, "c": x.shape[1] // groups},
        over="c" if x.shape[1] > groups else "",
        marks={"c": "renorm"} if x.shape[1] > groups else {},
    )


def instance_norm(engine: Engine, node: Node) -> None:
    """Statistics over all axes after the channel: exporters write a group norm as one, with a group for a channel."""
    x, scale, bias = node["input"], node["scale"], node["B"]
    dims = engine.axes(x)
    for tensor in (scale, bias):
        engine.equate(dims[1], engine.axes(tensor)[0])
    for axis in dims[2:]:
        engine.mark(axis, "renorm")
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x, scale], [bias], over=dims[2:])


def batch_norm(engine: Engine, node: Node) -> None:
    if len(node.outputs) > 1:
        return engine.unsupported(Reason.FIXED, "training mode")
    engine.spec("X[b c ...] scale[c] + B[c] ; input_mean[c] input_var[c] -> b c ...")


def mean_variance_norm(engine: Engine, node: Node) -> None:
    fam.along(engine, first(node), [a % rank(first(node)) for a in node["axes"]], "fixed")


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
        fam.reduce(engine, x, over, bool(node["keepdims"]), neutral, zero_at_zero)

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
    return lambda engine, node: fam.along(engine, first(node), [node[name] % rank(first(node)) for name in names], "fixed")


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
    "InstanceNormalization": instance_norm,
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
    **SHAPES,
    # elementwise, by how zeros pass
    **dict.fromkeys(("Mul", "And", "BitwiseAnd", "SwiGLU"), product),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean", "Max", "Min", "Or", "Xor", "BitwiseOr", "BitwiseXor"), total),
    **dict.fromkeys(("Div", "Mod", "PRelu", "BitShift"), scaled),
    **dict.fromkeys(
        "Abs Asin Asinh Atan Atanh Cast CastLike Ceil Celu Dropout Elu Erf Floor Gelu HardSwish Identity LeakyRelu Mish Neg "
        "Relu Round Selu Shrink Sign Sin Sinh Softsign Sqrt Swish Tan Tanh ThresholdedRelu".split(),
        like_first,
    ),
    **dict.fromkeys(
        "Acos Acosh BitwiseNot Cos Cosh Exp HardSigmoid IsInf IsNaN Log Not Reciprocal Sigmoid Softplus".split(), opaque_like_first
    ),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), opaque),
    "Clip": clip,
    "Pow": power,
    "Where": where,
    # quantized tensors keep their axes
    **dict.fromkeys(
        "QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul ConvInteger MatMulInteger".split(), quantized
    ),
}
