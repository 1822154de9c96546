"""Dim rules of ATen: ops that address positions of an axis by integers.

Integers that are known to index an axis (`Engine.indexes`: what top-k, argmax and sort return) tie the axes that they address, so that
router, one-hot, counts and stacked experts meet in one group; an axis that is addressed by other integers is frozen. A removed unit is
never indexed, so the addressed axis needs no zero.
"""

from __future__ import annotations

import torch

from graphprune.axes import Axis, size
from graphprune.errors import Reason
from graphprune.program import Node, Value
from graphprune.rules import families as fam
from graphprune.rules.aten_elementwise import Rule, integer, unsupported
from graphprune.rules.engine import Engine

_BOOLEAN = (torch.bool, torch.uint8)


def topk(engine: Engine, node: Node) -> None:
    fam.topk(engine, node["self"], node["dim"], integer(node["k"]))


def embedding(engine: Engine, node: Node) -> None:
    engine.spec("weight[v d] ; indices[...] -> ... d")
    table = engine.axes(node["weight"])[0]
    fam.index_axis(engine, table, node["indices"])
    engine.flows[-1].over += (table,)
    engine.mark(table, "vocab")


def index(engine: Engine, node: Node) -> None:
    """x[i, :, j]: axes that are indexed by integers or booleans go, their broadcast shape comes in."""
    x, out = node["self"], node.outputs[0]
    picks = list(node["indices"]) + [None] * (len(x.shape) - len(node["indices"]))
    if any(p is not None and p.dtype in _BOOLEAN for p in picks):
        return _boolean_index(engine, node, picks)
    dims = engine.axes(x)
    used = [i for i, p in enumerate(picks) if p is not None]
    if len(used) == 1 and (part := _constant_positions(engine, x, used[0], picks[used[0]])) is not None:
        engine.set(out, [part if i in used else a for i, a in enumerate(dims)])
        return engine.flow(out, [x], dropped=[dims[used[0]]])
    block: list[Axis] = [[] for _ in range(max((len(picks[i].shape) for i in used), default=0))]
    for i in used:
        for k, axis in enumerate(reversed(engine.axes(picks[i])), 1):
            block[-k] = engine.broadcast(block[-k], axis)
        fam.index_axis(engine, dims[i], picks[i])
    together = not used or used == list(range(used[0], used[-1] + 1))
    at = used[0] if together and used else 0
    rest = [(i, a) for i, a in enumerate(dims) if i not in used]
    engine.set(out, [*(a for i, a in rest if i < at), *block, *(a for i, a in rest if i >= at)])
    engine.flow(out, [x], over=[dims[i] for i in used])
    fam.keep_index(engine, x)
    for i in used:
        fam.picked(engine, x, picks[i])


def _constant_positions(engine: Engine, x: Value, axis: int, picks: Value) -> Axis | None:
    if not fam.is_constant(picks) or picks.tensor is None or len(picks.shape or ()) != 1:
        return None
    return fam.selection(engine, x, axis, picks.tensor.tolist())


def _boolean_index(engine: Engine, node: Node, picks: list[Value | None]) -> None:
    """How many positions a mask takes is known only when the model runs."""
    x, out = node["self"], node.outputs[0]
    dims = engine.axes(x)
    at, kept = 0, []
    for p in picks:
        if at >= len(dims):
            break
        if p is None:
            kept.append(dims[at])
            at += 1
            continue
        for axis in (*dims[at : at + len(p.shape)], *engine.axes(p)):
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
    used = [i for i, p in enumerate(picks) if p is not None]
    for i in used:
        if picks[i].dtype in _BOOLEAN:
            for axis in dims[i : i + len(picks[i].shape)]:
                engine.freeze(axis, Reason.FIXED)
        else:
            fam.index_axis(engine, dims[i], picks[i])
        for axis in engine.axes(picks[i]):
            engine.freeze(axis, Reason.FIXED)
    leading = used == list(range(len(used)))
    rest = len(dims) - sum(len(picks[i].shape) if picks[i].dtype in _BOOLEAN else 1 for i in used)
    for i, axis in enumerate(reversed(engine.axes(values)), 1):
        if leading and i <= rest:
            engine.broadcast(dims[-i], axis)
        else:
            engine.freeze(axis, Reason.FIXED)
    if not leading:
        for axis in dims:
            engine.freeze(axis, Reason.FIXED)
    whole = len(values.shape) >= rest and values.shape[len(values.shape) - rest :] == x.shape[len(x.shape) - rest :]
    engine.set(out, dims)
    engine.flow(out, [x], [values], joined=whole)


def index_select(engine: Engine, node: Node) -> None:
    x, picks, dim = node["self"], node["index"], node["dim"]
    dims = list(engine.axes(x))
    chosen = dims[dim]
    if (part := _constant_positions(engine, x, dim % len(dims), picks)) is not None:
        dims[dim] = part
        engine.set(node.outputs[0], dims)
        return engine.flow(node.outputs[0], [x], dropped=[chosen])
    fam.index_axis(engine, chosen, picks)
    dims[dim] = engine.axes(picks)[0] if picks.shape else []
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x], over=[chosen])
    fam.keep_index(engine, x)
    fam.picked(engine, x, picks)


def gather(engine: Engine, node: Node) -> None:
    x, picks, dim = node["self"], node.args.get("index", node.args.get("indices")), node["dim"]
    if dim is None:
        return unsupported(engine, node)
    dims, at = engine.axes(x), engine.axes(picks)
    fam.index_axis(engine, dims[dim], picks)
    for i, (a, b) in enumerate(zip(dims, at)):
        if i != dim % max(len(dims), 1):
            if size(a) == size(b):
                engine.equate(a, b)
            else:
                engine.freeze([*a, *b], Reason.FIXED)
    engine.set(node.outputs[0], at)
    engine.flow(node.outputs[0], [x], over=dims[dim : dim + 1] if dim >= 0 else [dims[dim]])
    fam.keep_index(engine, x)


def scatter(engine: Engine, node: Node) -> None:
    """Writes at, or adds to, indexed positions. Indices and source share their own positions along the axis."""
    x, picks, dim = node["self"], node["index"], node["dim"] % max(len(node["self"].shape), 1)
    dims, at, source = engine.axes(x), engine.axes(picks), node.args.get("src")
    fam.index_axis(engine, dims[dim], picks)
    others = [at] + ([engine.axes(source)] if isinstance(source, Value) and source.shape else [])
    adds = node.op_type == "scatter_add"
    for i, a in enumerate(dims):
        for other in others:
            if i != dim and size(a) == size(other[i]):
                engine.equate(a, other[i])
            elif i != dim or not adds or size(other[i]) != size(at[i]):
                engine.freeze([*other[i], *(a if i != dim else ())], Reason.FIXED)
            elif other is not at:
                engine.equate(at[i], other[i])
    engine.set(node.outputs[0], dims)
    terms = [[x]] + ([[source]] if isinstance(source, Value) else [] if source is not None or node.args.get("value") == 0 else [()])
    engine.flow(node.outputs[0], *terms, joined=isinstance(source, Value) and bool(source.shape), summed=at[dim : dim + 1] if adds else ())


def index_add(engine: Engine, node: Node) -> None:
    """Rows of `source` are added to, or replace (index_copy), the indexed rows."""
    x, source, dim = node["self"], node["source"], node["dim"] % max(len(node["self"].shape), 1)
    dims, other = engine.axes(x), engine.axes(source)
    rows = engine.axes(node["index"])[0] if node["index"].shape else []
    fam.index_axis(engine, dims[dim], node["index"])
    engine.equate(other[dim], rows)
    if node.op_type != "index_add":
        engine.freeze(rows, Reason.FIXED)
    for i, (a, b) in enumerate(zip(dims, other)):
        if i != dim:
            engine.equate(a, b)
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x], [source], joined=True, summed=[rows])


def index_fill(engine: Engine, node: Node) -> None:
    x = node["self"]
    fam.index_axis(engine, engine.axes(x)[node["dim"]], node["index"])
    for axis in engine.axes(node["index"]):
        engine.freeze(axis, Reason.FIXED)
    engine.set(node.outputs[0], engine.axes(x))
    engine.flow(node.outputs[0], [x], ())


def one_hot(engine: Engine, node: Node) -> None:
    """A new axis, of the units that are indexed; a removed unit is never hot."""
    x, out = node["self"], node.outputs[0]
    last = fam.indexed_by(engine, x, out.shape[-1])
    engine.set(out, [*engine.axes(x), last])
    engine.flow(out, (), over=[last])


def counts(engine: Engine, node: Node) -> None:
    """histc and bincount of tagged indices: one bin per unit."""
    x, out = node["self"], node.outputs[0]
    for value in node.inputs:  # of bincount, also weights
        for axis in engine.axes(value):
            engine.freeze(axis, Reason.FIXED)
    last = fam.indexed_by(engine, x, out.shape[0])
    engine.set(out, [last])
    engine.flow(out, (), over=[last])
    engine.counts.add(out)


def cumulative(engine: Engine, node: Node) -> None:
    """A prefix sum; of counts, it gives the offsets of each unit's rows."""
    fam.along(engine, node["self"], [node["dim"]], "zero")
    if node["self"] in engine.counts:
        engine.counts.add(node.outputs[0])


def search(engine: Engine, node: Node) -> None:
    """searchsorted in one list of boundaries, and bucketize: each element by itself."""
    boundaries, x = (node.args.get(a, node.args.get(b)) for a, b in (("sorted_sequence", "boundaries"), ("self", "self")))
    if len(boundaries.shape) != 1 or node.args.get("sorter") is not None:
        return unsupported(engine, node)
    engine.freeze(engine.axes(boundaries)[0], Reason.FIXED)
    engine.set(node.outputs[0], engine.axes(x))
    engine.flow(node.outputs[0], ())


def contained(engine: Engine, node: Node) -> None:
    """isin: each element by itself against all of a set."""
    for axis in engine.axes(node["test_elements"]):
        engine.freeze(axis, Reason.FIXED)
    engine.set(node.outputs[0], engine.axes(node["elements"]))
    engine.flow(node.outputs[0], ())


INDICES: dict[str, Rule] = {
    "topk": topk,
    "embedding": embedding,
    "index": index,
    "index_put": index_put,
    "index_select": index_select,
    "gather": gather,
    "take_along_dim": gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    **dict.fromkeys(("index_add", "index_copy"), index_add),
    "index_fill": index_fill,
    "one_hot": one_hot,
    "histc": counts,
    "bincount": counts,
    "cumsum": cumulative,
    **dict.fromkeys(("searchsorted", "bucketize"), search),
    "isin": contained,
    **dict.fromkeys(
        "take put masked_scatter masked_select nonzero nonzero_static embedding_bag _embedding_bag index_reduce "
        "_is_all_true _is_any_true".split(),
        unsupported,
    ),
}
