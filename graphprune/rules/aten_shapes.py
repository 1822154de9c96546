"""Dim rules of ATen: views, permutations, concatenation, slices, padding. The algebra itself."""

from __future__ import annotations

from graphprune.axes import Axis, Factor, size, sum_of
from graphprune.errors import Reason
from graphprune.program import Node, leaves
from graphprune.rules import families as fam
from graphprune.rules.aten_elementwise import Rule, first, integer, unsupported
from graphprune.rules.engine import Engine

# ---- views


def view(engine: Engine, node: Node) -> None:
    if node.args.get("dtype") is not None:
        return unsupported(engine, node)
    fam.reshape(engine, first(node))


def view_as(engine: Engine, node: Node) -> None:
    """The second operand lends its shape."""
    fam.reshape(engine, node["self"])
    for axis, same in zip(engine.axes(node.outputs[0]), engine.axes(node["other"])):
        engine.equate(axis, same)


def permute(engine: Engine, node: Node) -> None:
    rank = len(node["self"].shape)
    fam.permute(engine, node["self"], [d % rank for d in node["dims"]])


def transpose(engine: Engine, node: Node) -> None:
    """Two axes change places: (dim0, dim1), (axis0, axis1), or the last two."""
    x, rank = node["self"], len(node["self"].shape)
    order = list(range(rank))
    if rank > 1:
        a, b = (node.args.get(f"dim{i}", node.args.get(f"axis{i}", i - 2)) for i in (0, 1))
        order[a], order[b] = order[b], order[a]
    fam.permute(engine, x, order)


def reversed_axes(engine: Engine, node: Node) -> None:
    fam.permute(engine, node["self"], range(len(node["self"].shape))[::-1])


def movedim(engine: Engine, node: Node) -> None:
    x, rank = node["self"], len(node["self"].shape)
    source = [s % rank for s in leaves([node["source"]])]
    target = [s % rank for s in leaves([node["destination"]])]
    rest = iter(i for i in range(rank) if i not in source)
    place = dict(zip(target, source))
    fam.permute(engine, x, [place[i] if i in place else next(rest) for i in range(rank)])


def unbind(engine: Engine, node: Node) -> None:
    x = node["self"]
    axis = node["dim"] % len(x.shape)
    dims = list(engine.axes(x))
    engine.freeze(dims.pop(axis), Reason.FIXED, "each position becomes a tensor of its own")
    for out in node.outputs:
        engine.set(out, dims)
        engine.flow(out, [x])


def diagonal(engine: Engine, node: Node) -> None:
    dims = list(engine.axes(node["self"]))
    pair = {node["dim1"] % len(dims), node["dim2"] % len(dims)}
    for i in pair:
        engine.freeze(dims[i], Reason.FIXED)
    out = node.outputs[0]
    engine.set(out, [*(a for i, a in enumerate(dims) if i not in pair), engine.frozen(out.shape[-1])])
    engine.flow(out, [node["self"]])


def as_complex(engine: Engine, node: Node) -> None:
    """The last axis, of size 2, becomes the two parts of a number."""
    dims = engine.axes(node["self"])
    engine.freeze(dims[-1], Reason.FIXED)
    engine.set(node.outputs[0], dims[:-1])
    engine.flow(node.outputs[0], [node["self"]])


def as_real(engine: Engine, node: Node) -> None:
    engine.set(node.outputs[0], [*engine.axes(node["self"]), engine.frozen(2)])
    engine.flow(node.outputs[0], [node["self"]])


def window(engine: Engine, node: Node) -> None:
    """Tensor.unfold: windows over an axis; their length is appended as an axis."""
    x, out = node["self"], node.outputs[0]
    dims = list(engine.axes(x))
    axis = node["dimension"] % len(dims)
    engine.freeze(dims[axis], Reason.FIXED)
    dims[axis] = engine.frozen(out.shape[axis])
    engine.set(out, [*dims, engine.frozen(out.shape[-1])])
    engine.flow(out, [x])


# ---- parts


def concat(engine: Engine, node: Node) -> None:
    fam.concat(engine, [v for v in leaves([node["tensors"]]) if v.shape != (0,)], node.args.get("dim", 0))


def hstack(engine: Engine, node: Node) -> None:
    fam.concat(engine, list(leaves([node["tensors"]])), 0 if len(node.outputs[0].shape) == 1 else 1)


def vstack(engine: Engine, node: Node) -> None:
    values = list(leaves([node["tensors"]]))
    if any(len(v.shape) < 2 for v in values):
        return unsupported(engine, node)
    fam.concat(engine, values, 0)


def stack(engine: Engine, node: Node) -> None:
    values = list(leaves([node["tensors"]]))
    out = node.outputs[0]
    dims = fam.aligned(engine, values, values[0])
    axis = node["dim"] % len(out.shape)
    engine.set(out, [*dims[:axis], engine.frozen(len(values)), *dims[axis:]])
    engine.flow(out, *[[v] for v in values])


def split(engine: Engine, node: Node) -> None:
    axis = node.args.get("dim", 0)
    fam.split(engine, node["self"], axis, [out.shape[axis] for out in node.outputs if out.shape])


def slice_(engine: Engine, node: Node) -> None:
    x, axis = node["self"], node["dim"] % len(node["self"].shape)
    fam.slice_(engine, x, axis, *slice_bounds(node, x.shape[axis], node.outputs[0].shape[axis]))


def slice_bounds(node: Node, length: int, taken: int) -> tuple[int, int, int]:
    """start, stop and step of a slice that takes `taken` of `length` positions."""
    step = node["step"]
    start = 0 if node["start"] is None else integer(node["start"])
    start = max(0, start + length) if start < 0 else min(start, length)
    if taken and step > 1 and length % step == 0 and taken == length // step:
        return start, length, step
    return start, min(length, start + (taken - 1) * step + 1) if taken else start, step


def narrow(engine: Engine, node: Node) -> None:
    fam.slice_(engine, node["self"], node["dim"], integer(node["start"]), integer(node["start"]) + integer(node["length"]))


def select(engine: Engine, node: Node) -> None:
    fam.select(engine, node["self"], node["dim"] % len(node["self"].shape))


def slice_scatter(engine: Engine, node: Node) -> None:
    """A part of an axis is overwritten."""
    x, source, out = node["self"], node["src"], node.outputs[0]
    axis = node["dim"] % len(x.shape)
    part = fam.slice_axis(engine, x, axis, *slice_bounds(node, x.shape[axis], source.shape[axis]))
    dims = engine.axes(x)
    for i, other in enumerate(engine.axes(source)):
        engine.equate(other, part if i == axis else dims[i])
    engine.set(out, dims)
    engine.flow(out, [x], [source], joined=True)


def select_scatter(engine: Engine, node: Node) -> None:
    x, source, out = node["self"], node["src"], node.outputs[0]
    dims = engine.axes(x)
    axis = node["dim"] % len(dims)
    engine.freeze(dims[axis], Reason.FIXED, "one position is overwritten")
    for own, other in zip([a for i, a in enumerate(dims) if i != axis], engine.axes(source)):
        engine.equate(own, other)
    engine.set(out, dims)
    engine.flow(out, [x], [source])


# ---- repetition and padding


def expand(engine: Engine, node: Node) -> None:
    fam.expand(engine, node["self"])


def expand_as(engine: Engine, node: Node) -> None:
    """The second operand lends its shape."""
    x, out = node["self"], node.outputs[0]
    engine.set(out, fam.aligned(engine, [x, node["other"]], out))
    engine.flow(out, [x])
    fam.keep_index(engine, x)


def broadcast(engine: Engine, node: Node) -> None:
    """broadcast_tensors: all operands at their common shape."""
    values = list(leaves([node["tensors"]]))
    dims = fam.aligned(engine, values, node.outputs[0])
    for value, out in zip(values, node.outputs):
        engine.set(out, dims)
        engine.flow(out, [value])


def meshgrid(engine: Engine, node: Node) -> None:
    values = list(leaves([node["tensors"]]))
    dims = [engine.axes(v)[0] if v.shape else [] for v in values]
    if node.args.get("indexing") == "xy":
        dims[:2] = dims[1::-1]
    for value, out in zip(values, node.outputs):
        engine.set(out, dims)
        engine.flow(out, [value])


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
    x, out, dim, times = node["self"], node.outputs[0], node["dim"], node["repeats"]
    if dim is None or not isinstance(times, int):
        return unsupported(engine, node)
    dims = list(engine.axes(x))
    dims[dim] = [*dims[dim], *([Factor(times)] if times > 1 else [])]
    engine.set(out, dims)
    engine.flow(out, [x])


def pad(engine: Engine, node: Node) -> None:
    """Constant padding is a concat with frozen parts; other modes and cropping freeze the padded axes."""
    x, out = node["self"], node.outputs[0]
    widths = [integer(w) for w in node["pad"]]
    constant, zero = node.args.get("mode", "constant") == "constant", not node.args.get("value")
    dims = list(engine.axes(x))
    for i in range(len(widths) // 2):
        axis, (before, after) = -1 - i, widths[2 * i : 2 * i + 2]
        if before == after == 0:
            continue
        if min(before, after) < 0 or not constant:
            engine.freeze(dims[axis], Reason.FIXED)
            dims[axis] = engine.frozen(out.shape[axis])
        else:
            parts = [engine.frozen(before)] * (before > 0) + [dims[axis]] + [engine.frozen(after)] * (after > 0)
            dims[axis] = [sum_of(parts)]
    engine.set(out, dims)
    engine.flow(out, [x] if zero or not constant else ())


# ---- order


def reordered(engine: Engine, node: Node) -> None:
    """Rolls and flips: the axes keep all their positions; empty `dims` means all axes."""
    x = node["self"]
    fam.along(engine, x, list(node.args.get("dims") or range(len(x.shape))), "fixed")


def fixed_axes(*axes: int) -> Rule:
    return lambda engine, node: fam.along(engine, node["self"], axes, "fixed")


def sorted_along(engine: Engine, node: Node) -> None:
    """sort: the indices refer to the sorted axis, which keeps all its positions."""
    x = node["self"]
    chosen = engine.axes(x)[node.args.get("dim", 0)]
    engine.freeze(chosen, Reason.FIXED, "it is sorted")
    for out in node.outputs:
        engine.set(out, engine.axes(x))
        engine.flow(out, [x] if out.dtype == x.dtype and x.dtype.is_floating_point else ())
    if x in engine.indexes:
        engine.indexes[node.outputs[0]] = engine.indexes[x]
    if len(node.outputs) == 2:
        engine.indexes[node.outputs[1]] = chosen


def argsort(engine: Engine, node: Node) -> None:
    fam.along(engine, node["self"], [node["dim"]], "fixed")
    engine.indexes[node.outputs[0]] = engine.axes(node["self"])[node["dim"]]


def difference(engine: Engine, node: Node) -> None:
    """Neighbours along an axis are subtracted."""
    x, out, dim = node["self"], node.outputs[0], node["dim"]
    if node.args.get("prepend") is not None or node.args.get("append") is not None:
        return unsupported(engine, node)
    dims = list(engine.axes(x))
    engine.freeze(dims[dim], Reason.FIXED)
    dims[dim] = engine.frozen(out.shape[dim])
    engine.set(out, dims)
    engine.flow(out, [x])


def cross(engine: Engine, node: Node) -> None:
    """The three positions of an axis are mixed."""
    a, b, out = node["self"], node["other"], node.outputs[0]
    dims = fam.aligned(engine, [a, b], out)
    dim = node["dim"] if node["dim"] is not None else next(i for i, n in enumerate(out.shape) if n == 3)
    engine.freeze(dims[dim], Reason.FIXED)
    engine.set(out, dims)
    engine.flow(out, [a, b])


SHAPES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"), view),
    **dict.fromkeys(("atleast_1d", "atleast_2d", "atleast_3d"), view),
    **dict.fromkeys(("view_as", "reshape_as"), view_as),
    **dict.fromkeys(("transpose", "t", "swapaxes", "swapdims", "adjoint", "mT", "mH", "matrix_H"), transpose),
    "numpy_T": reversed_axes,
    "permute": permute,
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    "unbind": unbind,
    "diagonal": diagonal,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    "unfold": window,
    **dict.fromkeys(("cat", "concat", "concatenate"), concat),
    "hstack": hstack,
    "vstack": vstack,
    "stack": stack,
    **dict.fromkeys(
        (
            "split",
            "split_with_sizes",
            "chunk",
            "tensor_split",
            "unsafe_split",
            "unsafe_split_with_sizes",
            "unsafe_chunk",
            "split_with_sizes_copy",
        ),
        split,
    ),
    "slice": slice_,
    **dict.fromkeys(("narrow", "narrow_copy"), narrow),
    "select": select,
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
    "expand": expand,
    "broadcast_to": expand,
    "expand_as": expand_as,
    "broadcast_tensors": broadcast,
    "meshgrid": meshgrid,
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("roll", "flip", "rot90"), reordered),
    "fliplr": fixed_axes(1),
    "flipud": fixed_axes(0),
    **dict.fromkeys(("tril", "triu"), fixed_axes(-1, -2)),
    "sort": sorted_along,
    "msort": sorted_along,
    "argsort": argsort,
    "diff": difference,
    **dict.fromkeys(("cross", "linalg_cross"), cross),
    **dict.fromkeys(
        (
            "as_strided",
            "as_strided_scatter",
            "diag",
            "diag_embed",
            "diagonal_scatter",
            "trace",
            "quantile",
            "pairwise_distance",
            "unique_consecutive",
            "_unique2",
        ),
        unsupported,
    ),
}
