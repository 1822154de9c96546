"""Dim rules of ATen: elementwise ops by how zeros pass, reductions, norms.

Elementwise ops that are not listed get the rule `opaque` from `torch.Tag.pointwise` (see `rules/__init__.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphprune.errors import Reason
from graphprune.program import Node, Value
from graphprune.rules import families as fam
from graphprune.rules.engine import Engine

Rule = str | Callable[[Engine, Node], None]


def tensors(node: Node) -> list[Value]:
    return [v for v in node.inputs if v.shape is not None]


def first(node: Node) -> Value:
    return tensors(node)[0]


def integer(value: Any) -> int:
    """A literal, or the hint of a symbolic size."""
    return int(value.tensor if isinstance(value, Value) else value)  # symbolic scalars keep their hint as a 0-d tensor


def is_zero(value: Any) -> bool:
    """A literal or a constant that is zero everywhere."""
    if isinstance(value, Value):
        return fam.is_constant(value) and value.tensor is not None and value.tensor.numel() > 0 and not bool(value.tensor.any())
    return isinstance(value, (int, float)) and value == 0


def unsupported(engine: Engine, node: Node) -> None:
    """Known, and everything it touches stays as it is: gathers of single elements, sorting, shapes that depend on values."""
    engine.unsupported(Reason.FIXED)


# ---- elementwise


def product(engine: Engine, node: Node) -> None:
    values = tensors(node)
    fam.pointwise(engine, values, values)


def total(engine: Engine, node: Node) -> None:
    """A sum, and whatever else is zero where all operands are."""
    values = tensors(node)
    offset = [] if len(values) > 1 or is_zero(node.args.get("other", 0)) else [()]
    fam.pointwise(engine, values, *([v] for v in values if not is_zero(v)), *offset)


def scaled(engine: Engine, node: Node) -> None:
    """The first operand decides where the result vanishes."""
    fam.pointwise(engine, tensors(node), [first(node)])


def opaque(engine: Engine, node: Node) -> None:
    """f(0) != 0: the result vanishes nowhere."""
    fam.pointwise(engine, tensors(node), ())


def unary(engine: Engine, node: Node) -> None:
    """f(0) == 0 of the first operand; other operands only lend a type."""
    x = first(node)
    for out in node.outputs:
        engine.set(out, engine.axes(x))
        engine.flow(out, [x])


def index_preserving(engine: Engine, node: Node) -> None:
    unary(engine, node)
    fam.keep_index(engine, first(node))


def where(engine: Engine, node: Node) -> None:
    if "self" not in node.args:  # the positions of a condition
        return engine.unsupported(Reason.FIXED)
    branches = [node[n] for n in ("self", "other") if not is_zero(node[n])]
    fam.pointwise(engine, tensors(node), *([b] if isinstance(b, Value) else () for b in branches))


def masked_fill(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, tensors(node), [node["self"]], *([] if is_zero(node["value"]) else [()]))
    fam.keep_index(engine, node["self"])


def clamp(engine: Engine, node: Node) -> None:
    low, high = node.args.get("min", node.args.get("min_val")), node.args.get("max", node.args.get("max_val"))
    inside = all(not isinstance(v, Value) for v in (low, high)) and (low is None or low <= 0) and (high is None or high >= 0)
    fam.pointwise(engine, tensors(node), [first(node)] if inside else ())
    fam.keep_index(engine, first(node))


def threshold(engine: Engine, node: Node) -> None:
    """x where x > threshold, else a value."""
    fam.pointwise(engine, tensors(node), [node["self"]] if node["threshold"] < 0 or node["value"] == 0 else ())


def power(engine: Engine, node: Node) -> None:
    exponent = node.args.get("exponent")
    zero_at_zero = isinstance(node["self"], Value) and isinstance(exponent, (int, float)) and exponent > 0
    fam.pointwise(engine, tensors(node), [node["self"]] if zero_at_zero else ())


def prelu(engine: Engine, node: Node) -> None:
    """The slopes lie along axis 1."""
    slopes = node["weight"]
    if slopes.shape[0] == 1 or len(node["self"].shape) == 1:
        return scaled(engine, node)
    engine.spec("self[b c ...] ; weight[c] -> b c ...")


def addcmul(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, tensors(node), [node["self"]], [node["tensor1"], node["tensor2"]])


def addcdiv(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, tensors(node), [node["self"]], [node["tensor1"]])


def copy(engine: Engine, node: Node) -> None:
    """The second operand, at the shape of the first."""
    fam.pointwise(engine, tensors(node), [node["src"]])


def fill(engine: Engine, node: Node) -> None:
    """One value everywhere."""
    fam.pointwise(engine, tensors(node), [node["self"]] if is_zero(node["value"]) else ())


def lerp(engine: Engine, node: Node) -> None:
    fam.pointwise(engine, tensors(node), [node["self"]], [node["end"]])


# ---- reductions


def reduced_axes(node: Node) -> list[int]:
    dim = node.args.get("dim")
    return [] if dim is None else [dim] if isinstance(dim, int) else list(dim)


def reduction(neutral: str, zero_at_zero: bool = True) -> Rule:
    return lambda engine, node: fam.reduce(
        engine, first(node), reduced_axes(node), bool(node.args.get("keepdim", False)), neutral, zero_at_zero
    )


def vector_norm(engine: Engine, node: Node) -> None:
    order = node.args.get("ord", node.args.get("p", 2))
    additive = order is None or order == "fro" or (not isinstance(order, str) and order > 0)
    fam.reduce(engine, node["self"], reduced_axes(node), bool(node.args.get("keepdim", False)), "zero" if additive else "fixed")


def linalg_norm(engine: Engine, node: Node) -> None:
    """Of vectors; of matrices only the Frobenius norm is a sum."""
    axes = reduced_axes(node) or range(len(node["self"].shape))
    additive = node["ord"] in (None, "fro") or (len(axes) == 1 and not isinstance(node["ord"], str) and node["ord"] > 0)
    fam.reduce(engine, node["self"], list(axes), bool(node["keepdim"]), "zero" if additive else "fixed")


def argmax(engine: Engine, node: Node) -> None:
    if node["dim"] is None:
        return unsupported(engine, node)
    fam.argmax(engine, node["self"], node["dim"], bool(node["keepdim"]))


def extremum(engine: Engine, node: Node) -> None:
    """max and min: over everything, along an axis (with indices), or elementwise."""
    if isinstance(node.args.get("other"), Value):
        return total(engine, node)
    fam.reduce(engine, node["self"], reduced_axes(node), bool(node.args.get("keepdim", False)), "-inf")
    if len(node.outputs) == 2:
        engine.indexes[node.outputs[1]] = engine.axes(node["self"])[node["dim"]]


def cosine_similarity(engine: Engine, node: Node) -> None:
    """Sums of products of the two, and of each with itself."""
    values = [node["x1"], node["x2"]]
    dims = fam.aligned(engine, values, max(values, key=lambda v: len(v.shape or ())))
    over = dims.pop(node["dim"] % len(dims))
    out = node.outputs[0]
    engine.set(out, dims)
    engine.flow(out, *([v] for v in values), summed=[over])


def along(neutral: str) -> Rule:
    return lambda engine, node: fam.along(engine, first(node), [node["dim"]], neutral)


def log_of_sums(engine: Engine, node: Node) -> None:
    fam.along(engine, node["self"], [node["dim"]], "fixed")
    engine.flow(node.outputs[0], ())


def running_extremum(engine: Engine, node: Node) -> None:
    x = node["self"]
    engine.freeze(engine.axes(x)[node["dim"]], Reason.FIXED)
    for out in node.outputs:
        engine.set(out, engine.axes(x))
        engine.flow(out, [x])


# ---- norms


def normalize_axes(engine: Engine, node: Node) -> None:
    """layer_norm and rms_norm; the native spellings also return statistics."""
    x, count = node["input"], len(node["normalized_shape"])
    rank = len(x.shape)
    fam.norm(engine, x, range(rank - count, rank), node["weight"], node.args.get("bias"))
    for out in node.outputs[1:]:
        engine.set(out, [*engine.axes(x)[: rank - count], *([] for _ in range(count))])
        engine.flow(out, ())


BATCH_NORM = "input[b c ...] weight[c] + running_mean[c] weight[c] + bias[c] ; running_var[c] -> b c ..."


def batch_norm(engine: Engine, node: Node) -> None:
    """An affine map in evaluation; with statistics of the batch (weight standardisation) a norm over all axes but the channel."""
    engine.spec(BATCH_NORM)
    if node.args.get("training"):
        over = [axis for i, axis in enumerate(engine.axes(node["input"])) if i != 1]
        for axis in over:
            engine.mark(axis, "renorm")
        engine.flows[-1].over += tuple(over)


def weight_norm(engine: Engine, node: Node) -> None:
    """v / |v| * g, with one norm for each position of an axis."""
    v, g, out = node["v"], node["g"], node.outputs[0]
    dims = fam.aligned(engine, [v, g], out)
    for axis, scale in zip(dims, g.shape):
        if scale == 1:
            engine.mark(axis, "renorm")
    engine.set(out, dims)
    engine.flow(out, [v, g])


def instance_norm(engine: Engine, node: Node) -> None:
    if not node["use_input_stats"]:
        return engine.spec(BATCH_NORM)
    engine.spec("input[b c *] weight[c] + bias[c] ; running_mean[c] running_var[c] -> b c *")


def group_norm(engine: Engine, node: Node) -> None:
    """Statistics over the channels inside a group: they renormalise; whole groups may go."""
    x, groups = node["input"], node["num_groups"] if "num_groups" in node.args else node["group"]
    per_group = x.shape[1] // groups
    engine.spec(
        "input[b (g c) *] weight[(g c)] + bias[(g c)] -> b (g c) *",
        sizes={"g": groups, "c": per_group},
        over="c" if per_group > 1 else "",
        marks={"c": "renorm"} if per_group > 1 else {},
    )


ELEMENTWISE: dict[str, Rule] = {
    # zero where any operand is
    **dict.fromkeys(
        "mul multiply logical_and bitwise_and __and__".split(),
        product,
    ),
    # zero where all operands are
    **dict.fromkeys(
        "add sub subtract rsub maximum minimum fmax fmin logical_or bitwise_or __or__ logical_xor bitwise_xor __xor__ hypot "
        "complex".split(),
        total,
    ),
    # zero where the first operand is
    **dict.fromkeys(
        "div divide true_divide floor_divide fmod remainder copysign xlogy _prelu_kernel polar bitwise_left_shift "
        "bitwise_right_shift".split(),
        scaled,
    ),
    "prelu": prelu,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    "lerp": lerp,
    "copy": copy,
    "fill": fill,
    # f(0) == 0
    **dict.fromkeys(
        "relu gelu silu tanh neg negative abs absolute sqrt relu6 leaky_relu elu selu celu mish hardswish sin asin arcsin tan "
        "atan arctan sinh asinh arcsinh atanh arctanh erf erfinv expm1 log1p square sign sgn round floor ceil trunc fix frac "
        "dropout feature_dropout alpha_dropout native_dropout softshrink hardshrink zeros_like zero nan_to_num positive rrelu "
        "deg2rad rad2deg real imag conj conj_physical resolve_conj resolve_neg".split(),
        unary,
    ),
    # the same numbers, perhaps of another type
    **dict.fromkeys(
        "clone to _to_copy contiguous detach alias lift_fresh_copy type_as".split(),
        index_preserving,
    ),
    # f(0) != 0
    **dict.fromkeys(
        "sigmoid exp exp2 log log2 log10 cos acos arccos cosh rsqrt reciprocal softplus hardsigmoid log_sigmoid erfc logit "
        "bitwise_not logical_not eq ne lt le gt ge greater greater_equal less less_equal not_equal isnan isinf isfinite".split(),
        opaque,
    ),
    **dict.fromkeys(
        "full_like ones_like rand_like randn_like empty_like bernoulli".split(),
        opaque,
    ),
    "where": where,
    "masked_fill": masked_fill,
    **dict.fromkeys(("clamp", "clip", "hardtanh", "clamp_min", "clamp_max"), clamp),
    "threshold": threshold,
    "pow": power,
    "float_power": power,
}

REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys(("sum", "nansum"), reduction("zero")),
    "count_nonzero": reduction("zero"),
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), reduction("renorm")),
    **dict.fromkeys(("amax", "amin"), reduction("-inf")),
    "logsumexp": reduction("-inf", zero_at_zero=False),
    **dict.fromkeys(("any", "all"), reduction("-inf", zero_at_zero=False)),
    **dict.fromkeys(("prod", "median", "nanmedian", "mode", "kthvalue", "aminmax"), reduction("fixed")),
    **dict.fromkeys(("norm", "linalg_vector_norm", "frobenius_norm"), vector_norm),
    "linalg_norm": linalg_norm,
    "max": extremum,
    "min": extremum,
    "argmax": argmax,
    "argmin": argmax,
    "cosine_similarity": cosine_similarity,
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax", "special_softmax", "log_softmax", "_log_softmax"), along("-inf")),
    "cumsum": along("zero"),
    "cumprod": along("fixed"),
    "logcumsumexp": log_of_sums,
    "cummax": running_extremum,
    "cummin": running_extremum,
}

NORMS: dict[str, Rule] = {
    **dict.fromkeys(("batch_norm", "native_batch_norm"), batch_norm),
    "_native_batch_norm_legit_no_training": BATCH_NORM,
    "instance_norm": instance_norm,
    "_weight_norm": weight_norm,
    **dict.fromkeys(("group_norm", "native_group_norm"), group_norm),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"), normalize_axes),
}
