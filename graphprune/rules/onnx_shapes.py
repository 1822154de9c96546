"""Dim rules of the ONNX operators that move elements: shapes, slices, padding, indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.axes import Axis, Factor, size, sum_of
from graphprune.errors import Reason
from graphprune.program import Kind, Node, Value, leaves
from graphprune.rules import families as fam
from graphprune.rules.aten_elementwise import Rule
from graphprune.rules.engine import Engine
from graphprune.rules.onnx_literals import LITERAL_OPERANDS, chunk_sizes, in_order, ints, slice_range


def literal(operand: Any) -> list[int] | None:
    """The integers of a literal operand; None where it is absent or only known when the model runs (see `is_known`)."""
    return ints(operand.tensor if isinstance(operand, Value) else operand)


def is_known(operand: Any) -> bool:
    """Is a literal operand the same in every run?"""
    return not isinstance(operand, Value) or operand.tensor is not None


def sizes(value: Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape


def rank(value: Value) -> int:
    return len(sizes(value))


def first(node: Node) -> Value:
    return node.inputs[0]


def is_zero(operand: Any) -> bool:
    tensor = operand.tensor if isinstance(operand, Value) and operand.kind is Kind.CONSTANT else None
    return tensor is not None and tensor.numel() > 0 and not bool(tensor.any())


def fixed(engine: Engine, node: Node) -> None:
    """Nothing that the node touches may move."""
    engine.unsupported(Reason.FIXED)


# ---- shapes


def reshape(engine: Engine, node: Node) -> None:
    fam.reshape(engine, first(node))


def transpose(engine: Engine, node: Node) -> None:
    x = node["data"]
    fam.permute(engine, x, node["perm"] if node["perm"] is not None else range(rank(x))[::-1])


def concat(engine: Engine, node: Node) -> None:
    fam.concat(engine, list(leaves(node["inputs"])), node["axis"])


def split(engine: Engine, node: Node) -> None:
    axis = node["axis"] % rank(node["input"])
    fam.split(engine, node["input"], axis, [sizes(out)[axis] for out in node.outputs if out.shape])


def slice_(engine: Engine, node: Node) -> None:
    x, out = node["data"], node.outputs[0]
    if not is_known(node["axes"]):
        return engine.unsupported(Reason.FIXED, "axes that are only known when the model runs")
    if is_known(node["starts"]):
        count = len(literal(node["starts"]) or ())
    else:
        count = node["starts"].shape[0]
    dims, whole = list(engine.axes(x)), []
    known = is_known(node["starts"]) and is_known(node["ends"]) and is_known(node["steps"])
    starts, ends = (literal(node["starts"]) or [], literal(node["ends"]) or []) if known else ([0] * count, [0] * count)
    steps = (literal(node["steps"]) if known else None) or [1] * count
    for axis, start, end, step in zip(literal(node["axes"]) or range(count), starts, ends, steps):
        axis %= rank(x)
        whole.append(dims[axis])
        taken = slice_range(x.shape[axis], start, end, step)
        if known and step > 0 and axis not in x.dynamic and len(taken):
            dims[axis] = fam.slice_axis(engine, x, axis, taken.start, taken.stop, step)
        else:
            engine.freeze(dims[axis], Reason.FIXED)
            dims[axis] = engine.frozen(sizes(out)[axis])
    engine.set(out, dims)
    engine.flow(out, [x], dropped=whole)
    fam.keep_index(engine, x)


def gather(engine: Engine, node: Node) -> None:
    """Constant positions are a selection, a slice or another shape; other indices address the axis."""
    x, picks = node["data"], node["indices"]
    axis = node["axis"] % rank(x)
    if picks.kind is Kind.CONSTANT and rank(picks) == 0:
        return fam.select(engine, x, axis)
    if picks.kind is Kind.CONSTANT and rank(picks) == 1:
        at = np.asarray(picks.tensor) % max(x.shape[axis], 1)
        if len(at) and (at == np.arange(at[0], at[0] + len(at))).all():
            return fam.slice_(engine, x, axis, int(at[0]), int(at[-1]) + 1)
    dims = engine.axes(x)
    if in_order(picks, sizes(x)[axis]):
        engine.equate(dims[axis], [f for a in engine.axes(picks) for f in a])
        engine.set(node.outputs[0], [*dims[:axis], *engine.axes(picks), *dims[axis + 1 :]])
        return engine.flow(node.outputs[0], [x])
    if x.kind is Kind.PARAMETER and axis == 0 and picks.kind is not Kind.CONSTANT:
        engine.mark(dims[0], "vocab")
    fam.index_axis(engine, dims[axis], picks)
    engine.set(node.outputs[0], [*dims[:axis], *engine.axes(picks), *dims[axis + 1 :]])
    engine.flow(node.outputs[0], [x], over=[dims[axis]])
    fam.keep_index(engine, x)
    fam.picked(engine, x, picks)


def gather_elements(engine: Engine, node: Node) -> None:
    x, picks = node["data"], node["indices"]
    axis = node["axis"] % rank(x)
    dims, at = engine.axes(x), engine.axes(picks)
    fam.index_axis(engine, dims[axis], picks)
    for i, (a, b) in enumerate(zip(dims, at)):
        if i != axis and size(a) == size(b):
            engine.equate(a, b)
        elif i != axis:
            engine.freeze([*a, *b], Reason.FIXED)
    engine.set(node.outputs[0], at)
    engine.flow(node.outputs[0], [x], over=[dims[axis]])
    fam.keep_index(engine, x)
    fam.picked(engine, x, picks)


def scatter_elements(engine: Engine, node: Node) -> None:
    """Writes at, or adds to, indexed positions. Indices and updates share their own positions along the axis."""
    x, picks, updates = node["data"], node["indices"], node["updates"]
    axis = node["axis"] % rank(x)
    dims, at, new = engine.axes(x), engine.axes(picks), engine.axes(updates)
    fam.index_axis(engine, dims[axis], picks)
    adds = node.args.get("reduction", "none") == "add"
    for i, a in enumerate(dims):
        engine.equate(at[i], new[i])
        if i != axis and size(a) == size(at[i]):
            engine.equate(a, at[i])
        elif i != axis or not adds:
            engine.freeze([*at[i], *(a if i != axis else ())], Reason.FIXED)
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x], [updates], joined=True, summed=at[axis : axis + 1] if adds else ())


def gather_nd(engine: Engine, node: Node) -> None:
    """With one index per pick, and no batch, the leading axis is addressed; otherwise the leading axes are fixed."""
    x, picks, out = node["data"], node["indices"], node.outputs[0]
    if sizes(picks)[-1] == 1 and not node["batch_dims"]:
        dims = engine.axes(x)
        fam.index_axis(engine, dims[0], picks)
        engine.set(out, [*engine.axes(picks)[:-1], *dims[1:]])
        engine.flow(out, [x], over=[dims[0]])
        fam.keep_index(engine, x)
        return fam.picked(engine, x, picks)
    dims, depth = engine.axes(x), picks.shape[-1] + node["batch_dims"]
    for axis in (*dims[:depth], *engine.axes(picks)):
        engine.freeze(axis, Reason.FIXED)
    tail = dims[depth:]
    engine.set(out, [*(engine.frozen(n) for n in sizes(out)[: rank(out) - len(tail)]), *tail])
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
    fam.topk(engine, node["X"], axis, sizes(node.outputs[0])[axis])


def one_hot(engine: Engine, node: Node) -> None:
    """A new axis, of the units that are indexed; a removed unit is never hot."""
    x, out = node["indices"], node.outputs[0]
    axis = node["axis"] % rank(out)
    dims = list(engine.axes(x))
    dims.insert(axis, fam.indexed_by(engine, x, sizes(out)[axis]))
    engine.freeze(engine.axes(node["values"])[0], Reason.FIXED)
    engine.set(out, dims)
    engine.flow(out, (), over=[dims[axis]])


def expand(engine: Engine, node: Node) -> None:
    fam.expand(engine, node["input"])


def tile(engine: Engine, node: Node) -> None:
    x, out = node["input"], node.outputs[0]
    dims = []
    for inner, length in zip(engine.axes(x), sizes(out)):
        times = length // max(1, size(inner))
        dims.append([*([Factor(times)] if times > 1 else []), *inner])
    engine.set(out, dims)
    engine.flow(out, [x])


def _resized(engine: Engine, node: Node) -> None:
    """Axes that keep their size stay; the others are fixed."""
    x = first(node)
    dims = list(engine.axes(x))
    for out in node.outputs:
        for axis, (old, new) in enumerate(zip(sizes(x), sizes(out))):
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
    """Constant padding is a concat with frozen parts; other modes and cropping freeze the padded axes."""
    x, out = node["data"], node.outputs[0]
    if not is_known(node["axes"]):
        return engine.unsupported(Reason.FIXED)
    if not is_known(node["pads"]):
        return _resized(engine, node)
    over = [a % rank(x) for a in literal(node["axes"]) or range(rank(x))]
    amounts = literal(node["pads"]) or []
    fill = node["constant_value"]
    constant = node["mode"] == "constant"
    zero = not constant or (is_zero(fill) if isinstance(fill, Value) else not fill)
    dims = list(engine.axes(x))
    for axis, before, after in zip(over, amounts, amounts[len(over) :]):
        if before == after == 0:
            continue
        if min(before, after) < 0 or not constant:
            engine.freeze(dims[axis], Reason.FIXED)
            dims[axis] = engine.frozen(sizes(out)[axis])
        else:
            parts = [engine.frozen(before)] * (before > 0) + [dims[axis]] + [engine.frozen(after)] * (after > 0)
            dims[axis] = [sum_of(parts)]
    engine.set(out, dims)
    engine.flow(out, [x] if zero else ())


def spatial(engine: Engine, node: Node) -> None:
    """Pools: batch and channel stay, the other axes are fixed."""
    x = first(node)
    dims = engine.axes(x)
    for axis in dims[2:] if len(node.outputs) == 1 else dims:  # the second result numbers all elements
        engine.freeze(axis, Reason.FIXED)
    for out in node.outputs:
        engine.set(out, [*dims[:2], *(engine.frozen(n) for n in sizes(out)[2:])])
        engine.flow(out, [x])


def depth_to_space(engine: Engine, node: Node) -> None:
    x, out = node["input"], node.outputs[0]
    dims = engine.axes(x)
    channel: Axis = [Factor(sizes(out)[1])] if sizes(out)[1] > 1 else []
    block = engine.frozen(node["blocksize"] ** (rank(x) - 2))
    engine.equate(dims[1], [*block, *channel] if node["mode"] == "DCR" else [*channel, *block])
    for axis in dims[2:]:
        engine.freeze(axis, Reason.FIXED)
    engine.set(out, [dims[0], channel, *(engine.frozen(n) for n in sizes(out)[2:])])
    engine.flow(out, [x])


def space_to_depth(engine: Engine, node: Node) -> None:
    x, out = node["input"], node.outputs[0]
    dims = engine.axes(x)
    block = engine.frozen(node["blocksize"] ** (rank(x) - 2))
    for axis in dims[2:]:
        engine.freeze(axis, Reason.FIXED)
    channel = [*block, *dims[1]] if node.args.get("mode", "DCR") == "DCR" else [*dims[1], *block]
    engine.set(out, [dims[0], channel, *(engine.frozen(n) for n in sizes(out)[2:])])
    engine.flow(out, [x])


def generated(engine: Engine, node: Node) -> None:
    """One number in a shape: the axes are free, like a constant's."""
    out, value = node.outputs[0], node["value"]
    zeros = value is None or not bool(value.any())
    engine.set(out, engine.fresh(out))
    engine.flow(out, (), over=engine.axes(out) if zeros else ())


def split_to_sequence(engine: Engine, node: Node) -> None:
    """The parts of an axis. They are told apart again by SequenceAt; any other use of the sequence fixes them."""
    x, sequence = node["input"], node.outputs[0]
    dims, axis = engine.axes(x), node["axis"] % rank(x)
    given = literal(node["split"]) or ([1] if node["split"] is None and node["keepdims"] else [])
    uses = [use for use in sequence.uses if use.op_type != "SequenceAt" or not is_known(use["position"])]
    if uses or not given:
        return engine.unsupported(Reason.FIXED)
    lengths = chunk_sizes(sizes(x)[axis], given[0]) if len(given) == 1 else given
    parts: list[Axis] = [[] if n == 1 else [Factor(n)] for n in lengths]
    engine.equate(dims[axis], [sum_of(parts)])
    engine.parts[sequence] = [[part if i == axis else a for i, a in enumerate(dims)] for part in parts]


def sequence_at(engine: Engine, node: Node) -> None:
    sequence, position = node["input_sequence"], literal(node["position"])
    if sequence not in engine.parts or position is None:
        return engine.unsupported(Reason.FIXED)
    split = sequence.producer
    x = split["input"]
    engine.set(node.outputs[0], engine.parts[sequence][position[0]])
    engine.flow(node.outputs[0], [x], dropped=[engine.axes(x)[split["axis"] % rank(x)]])


def shape_of(engine: Engine, node: Node) -> None:
    """Sizes are computed anew after a cut. Where they are used for more than shapes, the axes they measure must keep their size."""
    x = node["data"]
    engine.set(node.outputs[0], [engine.frozen(n) for n in sizes(node.outputs[0])])
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


SHAPES: dict[str, Rule] = {
    # shapes
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "SplitToSequence": split_to_sequence,
    "SequenceAt": sequence_at,
    **dict.fromkeys(("SequenceConstruct", "SequenceInsert"), fixed),
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
    "ConstantOfShape": generated,
    **dict.fromkeys("Range RandomNormal RandomUniform BlackmanWindow HammingWindow HannWindow".split(), fixed),
    **dict.fromkeys("Bernoulli BitCast EyeLike RandomNormalLike RandomUniformLike".split(), fixed),
    # indices
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    **dict.fromkeys(("Scatter", "ScatterElements"), scatter_elements),
    "ScatterND": scatter_nd,
    "TopK": topk,
    "OneHot": one_hot,
    **dict.fromkeys(("NonZero", "Compress", "Unique", "NonMaxSuppression"), fixed),
}
