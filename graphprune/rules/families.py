"""Rules shared by both dialects: each takes values and literals already read from a node; a dialect's table only names them."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.axes import Axis, Factor, leaves_of, size, sum_of
from graphprune.errors import Reason
from graphprune.program import Kind, Value
from graphprune.rules.engine import Engine


def out_of(engine: Engine) -> Value:
    return engine.node.outputs[0]


def aligned(engine: Engine, values: Sequence[Value], out: Value) -> list[Axis]:
    """The axes of a result of broadcasting operands against each other."""
    assert out.shape is not None
    dims: list[Axis] = [[] for _ in out.shape]
    for value in values:
        for i, axis in enumerate(reversed(engine.axes(value)), 1):
            dims[-i] = engine.broadcast(dims[-i], axis)
    return dims


def pointwise(engine: Engine, values: Sequence[Value], *terms: Sequence[Value]) -> None:
    """Broadcasting elementwise op; `terms` tell how zeros pass (see `Flow`); an empty term never vanishes."""
    out = out_of(engine)
    engine.set(out, aligned(engine, values, out))
    rank = len(out.shape or ())
    carries = {v: [rank - i for i, n in enumerate(reversed(v.shape or ()), 1) if n > 1] for v in values}
    engine.flow(out, *terms, carries=carries)


def keep_index(engine: Engine, source: Value) -> None:
    """The result indexes the axis that `source` indexes."""
    if source in engine.indexes:
        engine.indexes[out_of(engine)] = engine.indexes[source]
    if source in engine.counts:
        engine.counts.add(out_of(engine))


def reshape(engine: Engine, x: Value) -> None:
    """Same elements in row-major order, other shape."""
    out = out_of(engine)
    dims = engine.axes(x)
    old = [f for axis in dims for f in axis]
    assert out.shape is not None
    new = dims if x.shape == out.shape else engine.fresh(out)
    flat = [f for axis in new for f in axis]
    if size(old) != size(flat):
        return engine.unsupported(Reason.FIXED)
    engine.equate(old, flat)
    engine.set(out, new)
    engine.flow(out, [x])
    keep_index(engine, x)


def permute(engine: Engine, x: Value, order: Sequence[int]) -> None:
    dims = engine.axes(x)
    engine.set(out_of(engine), [dims[i] for i in order])
    engine.flow(out_of(engine), [x])
    keep_index(engine, x)


def expand(engine: Engine, x: Value) -> None:
    """Size-1 axes are repeated, new leading axes are added."""
    out = out_of(engine)
    dims = engine.axes(x)
    assert out.shape is not None and x.shape is not None
    lead = len(out.shape) - len(dims)
    new: list[Axis] = []
    for i, length in enumerate(out.shape):
        if i >= lead and x.shape[i - lead] == length:
            new.append(dims[i - lead])
        else:
            new.append([] if length == 1 else [Factor(length)])
    engine.set(out, new)
    engine.flow(out, [x])
    keep_index(engine, x)


def concat(engine: Engine, values: Sequence[Value], axis: int) -> None:
    out = out_of(engine)
    values = [v for v in values if v.shape is not None and 0 not in v.shape]
    dims = [list(a) for a in engine.axes(values[0])]
    axis %= len(dims)
    for value in values[1:]:
        for i, a in enumerate(engine.axes(value)):
            if i != axis:
                engine.equate(dims[i], a)
    parts = [engine.axes(v)[axis] for v in values]
    dims[axis] = parts[0] if len(parts) == 1 else [sum_of(parts)]
    engine.set(out, dims)
    engine.flow(out, *[[v] for v in values], joined=True)
    tags = [engine.indexes[v] for v in values if v in engine.indexes]
    if len(tags) == len(values) and all(size(tag) == size(tags[0]) for tag in tags):  # several picks from one axis
        for tag in tags[1:]:
            engine.equate(tags[0], tag)
        engine.indexes[out] = tags[0]


def split(engine: Engine, x: Value, axis: int, lengths: Sequence[int]) -> None:
    """One result per part of the axis."""
    dims = engine.axes(x)
    axis %= len(dims)
    if sum(lengths) != size(dims[axis]):  # lengths that are known only when the model runs
        engine.freeze(dims[axis], Reason.DYNAMIC)
        for out, n in zip(engine.node.outputs, lengths):
            engine.set(out, [engine.frozen(n, Reason.DYNAMIC) if i == axis else a for i, a in enumerate(dims)])
            engine.flow(out, [x], dropped=[dims[axis]])
        return
    parts: list[Axis] = [[] if n == 1 else [Factor(n)] for n in lengths]
    engine.equate(dims[axis], [sum_of(part for part, n in zip(parts, lengths) if n)])
    for out, part in zip(engine.node.outputs, parts):
        engine.set(out, [part if i == axis else a for i, a in enumerate(dims)])
        engine.flow(out, [x], dropped=[dims[axis]])
        if x in engine.indexes:
            engine.indexes[out] = engine.indexes[x]


def slice_axis(engine: Engine, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Axis:
    """The part of an axis that a slice takes. A strided slice that takes position k of every block of `step` refines the axis."""
    dim = engine.axes(x)[axis]
    length = size(dim)
    if (start, stop, step) == (0, length, 1):
        return dim
    taken = len(range(start, stop, step))
    if step == 1 and 0 < taken:
        parts: list[Axis] = [[] if n == 1 else [Factor(n)] for n in (start, taken, length - stop) if n]
        engine.equate(dim, [sum_of(parts)])
        return parts[1 if start else 0]
    if step > 1 and length % step == 0 and taken == length // step and start < step:
        head: Axis = [] if taken == 1 else [Factor(taken)]
        inner: Axis = [Factor(step)]
        engine.equate(dim, [*head, *inner])
        engine.freeze(inner, Reason.FIXED)
        return head
    engine.freeze(dim, Reason.FIXED, "a strided or empty slice")
    return engine.frozen(taken) if taken != 0 else [Factor(0)]


def slice_(engine: Engine, x: Value, axis: int, start: int, stop: int, step: int = 1) -> None:
    out = out_of(engine)
    dims = list(engine.axes(x))
    axis %= len(dims)
    whole = dims[axis]
    dims[axis] = slice_axis(engine, x, axis, start, stop, step)
    engine.set(out, dims)
    engine.flow(out, [x], dropped=[whole])
    keep_index(engine, x)


RUNS = 8  # a selection of more stretches than this is a table look-up, not a slice


def selection(engine: Engine, x: Value, axis: int, positions: Sequence[int]) -> Axis | None:
    """The axis that constant distinct positions make: stretches of the old one side by side. None where it is a table look-up."""
    length = size(engine.axes(x)[axis])
    positions = [p % length for p in positions]
    starts = [i for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1]
    if not positions or len(starts) > RUNS or len(set(positions)) < len(positions):
        return None
    runs = [(positions[a], positions[b - 1] + 1) for a, b in zip(starts, [*starts[1:], len(positions)])]
    parts = [slice_axis(engine, x, axis, start, stop) for start, stop in runs]
    return parts[0] if len(parts) == 1 else [sum_of(parts)]


def select(engine: Engine, x: Value, axis: int) -> None:
    """One position of an axis; the others may not move."""
    dims = list(engine.axes(x))
    engine.freeze(dims.pop(axis), Reason.FIXED, "one position is selected")
    engine.set(out_of(engine), dims)
    engine.flow(out_of(engine), [x])
    keep_index(engine, x)


def reduce(engine: Engine, x: Value, axes: Sequence[int], keepdim: bool, neutral: str = "zero", zero_at_zero: bool = True) -> None:
    """Axes are summed ("zero"), averaged ("renorm"), reduced by an op that knows minus infinity ("-inf"), or may not be cut ("fixed").

    `zero_at_zero`: where the operand is zero all along the axes, the result is.
    """
    dims = engine.axes(x)
    axes = sorted({a % max(len(dims), 1) for a in axes}) if axes else list(range(len(dims)))
    over = [dims[a] for a in axes]
    if neutral == "fixed":
        for axis in over:
            engine.freeze(axis, Reason.FIXED)
    if neutral == "renorm":
        for axis in over:
            engine.mark(axis, "renorm")
        if axes == [len(dims) - 1]:  # the average over features of a norm that is written out
            engine.mark(over[0], "hidden")
    kept = [([] if i in axes else a) for i, a in enumerate(dims) if keepdim or i not in axes]
    for out in engine.node.outputs:
        engine.set(out, kept)
        floating = out.dtype is not None and out.dtype.is_floating_point
        reach = {x: range(len(kept))}
        engine.flow(out, [x] if zero_at_zero and floating else (), over=() if neutral == "zero" else over, summed=over, carries=reach)


def along(engine: Engine, x: Value, axes: Sequence[int], neutral: str) -> None:
    """The shape stays; each result depends on all along the axes (softmax: "-inf", norms: "renorm", cumsum: "zero", flips: "fixed")."""
    out, dims = out_of(engine), engine.axes(x)
    over = [dims[a] for a in axes]
    for axis in over:
        if neutral == "fixed":
            engine.freeze(axis, Reason.FIXED)
        if neutral == "renorm":
            engine.mark(axis, "renorm")
    engine.set(out, dims)
    if neutral == "-inf":
        engine.flow(out, (), over=over)
        for axis in over:
            engine.mark(axis, "token")  # if this is attention, and if nothing else says what it is
    elif neutral == "zero":  # a prefix sum needs zeros below, and does not vanish itself
        engine.flow(out, [x], summed=over)
    else:
        engine.flow(out, [x], over=over if neutral == "renorm" else ())


def norm(engine: Engine, x: Value, axes: Sequence[int], weight: Value | None, bias: Value | None) -> None:
    """Statistics over some axes, then an affine map whose tensors are aligned with those axes."""
    out, dims = out_of(engine), engine.axes(x)
    for a in axes:
        engine.mark(dims[a], "renorm")
        engine.mark(dims[a], "hidden")
    for tensor in (weight, bias):
        if tensor is not None:
            for a, axis in zip(sorted(axes)[::-1], reversed(engine.axes(tensor))):
                engine.broadcast(dims[a], axis)
    engine.set(out, dims)
    terms = [[v for v in (x, weight) if v is not None]] + ([[bias]] if bias is not None else [])
    engine.flow(out, *terms, over=[dims[a] for a in axes])


def topk(engine: Engine, x: Value, axis: int, k: int) -> None:
    """Values and indices; the indices index the axis, of which at least k positions must stay."""
    dims = list(engine.axes(x))
    chosen = dims[axis]
    engine.limits.append((chosen, k, engine.node))
    engine.mark(chosen, "expert")
    values, indices = engine.node.outputs
    dims[axis] = engine.frozen(k)
    engine.set(values, dims)
    engine.set(indices, dims)
    engine.flow(values, [x], over=[chosen])
    engine.flow(indices, (), over=[chosen])
    engine.indexes[indices] = chosen


def argmax(engine: Engine, x: Value, axis: int, keepdim: bool) -> None:
    reduce(engine, x, [axis], keepdim, "-inf", zero_at_zero=False)
    chosen = engine.axes(x)[axis]
    engine.mark(chosen, "expert")
    engine.indexes[engine.node.outputs[-1]] = chosen


def index_axis(engine: Engine, axis: Axis, indices: Value) -> None:
    """`axis` is addressed by integers: they are known to index it, or it is frozen."""
    tag = engine.address(indices)
    if tag is None:
        engine.freeze(axis, Reason.UNTAGGED_INDEX)
    else:
        engine.equate(tag, axis)


def picked(engine: Engine, x: Value, indices: Value) -> None:
    """What a router's choice picks from a weight is still a weight, not an activation."""
    if indices in engine.indexes and x not in engine.from_input:
        engine.from_input.discard(out_of(engine))


def indexed_by(engine: Engine, indices: Value, length: int) -> Axis:
    """An axis of a result with one position for each unit that `indices` may name."""
    tag = engine.address(indices)
    if tag is not None and size(tag) == length:
        return list(tag)
    engine.freeze(tag or (), Reason.FIXED, "as many positions as the op says, not as many as there are units")
    return engine.frozen(length)


def matmul(engine: Engine, a: Value, b: Value, names: tuple[str, str]) -> None:
    """numpy-style matmul. A product of two activations is attention-like: batch axes are heads, contraction and columns head dims."""
    ra, rb = len(a.shape or ()), len(b.shape or ())
    left = "k" if ra == 1 else "... m k"
    right = "k" if rb == 1 else "... k n" if rb > 2 else "k n"
    if ra == 2:
        left = "m k"
    result = ("... " if max(ra, rb) > 2 else "") + ("m " if ra > 1 else "") + ("n" if rb > 1 else "")
    engine.spec(f"{names[0]}[{left}] {names[1]}[{right}] -> {result}")
    mark_attention(engine, a, b)


def mark_attention(engine: Engine, a: Value, b: Value) -> None:
    """A batched product of two activations."""
    da, db = engine.axes(a), engine.axes(b)
    if a in engine.from_input and b in engine.from_input and min(len(da), len(db)) > 2:
        for x in (*da[:-2], *db[:-2]):
            mark_heads(engine, x)
        engine.mark(da[-1], "head_dim")
        engine.mark(db[-1], "head_dim")


def einsum(engine: Engine, equation: str, operands: Sequence[Value]) -> None:
    """The subscripts are nearly our own notation; an operand that repeats a letter (a diagonal) is frozen."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(t.replace(".", ""))) != len(t.replace(".", "")) for t in terms):
        return engine.unsupported(Reason.FIXED, "a repeated subscript")

    def spaced(term: str) -> str:
        return " ".join(term.replace("...", "~")).replace("~", "...")

    line = " ".join(f"t{i}[{spaced(t)}]" for i, t in enumerate(terms)) + f" -> {spaced(right)}"
    engine.spec(line, operands={f"t{i}": v for i, v in enumerate(operands)})
    if len(operands) == 2 and all(v in engine.from_input for v in operands) and "..." not in left:  # attention-like
        for value, term, other in zip(operands, terms, reversed(terms)):
            for axis, letter in zip(engine.axes(value), term):
                if letter in other and letter in right:
                    mark_heads(engine, axis)
                elif letter in other:
                    engine.mark(axis, "head_dim")
        if terms[1][-1] not in terms[0] and terms[1][-1] in right:
            engine.mark(engine.axes(operands[1])[-1], "head_dim")


def mark_heads(engine: Engine, axis: Axis) -> None:
    """A batch axis of attention: heads; with two factors, key-value groups and query heads inside a group."""
    free = [leaf for leaf in leaves_of(axis) if leaf.frozen is None]
    if len(free) == 2:
        engine.mark(free[:1], "kv_group")
    engine.mark(axis, "head")


def is_constant(value: object) -> bool:
    return isinstance(value, Value) and value.kind is Kind.CONSTANT
