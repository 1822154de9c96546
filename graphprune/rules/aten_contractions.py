"""Dim rules of ATen: products that contract an axis (linear algebra, convolutions, attention), recurrent nets, spatial axes."""

from __future__ import annotations

import math

from graphprune.axes import Axis, Factor, leaves_of, sum_of
from graphprune.errors import Reason
from graphprune.program import Node, leaves
from graphprune.rules import families as fam
from graphprune.rules.aten_elementwise import Rule, first, unsupported
from graphprune.rules.engine import Engine

# ---- linear algebra


def matmul(engine: Engine, node: Node) -> None:
    a, b = ("self", "other") if "other" in node.args else ("self", "mat2")
    fam.matmul(engine, node[a], node[b], (a, b))


def linear(engine: Engine, node: Node) -> None:
    engine.spec(
        "input[... i] weight[o i] + bias[o] -> ... o" if len(node["weight"].shape) == 2 else "input[... i] weight[i] + bias[] -> ..."
    )


def _addend(engine: Engine, node: Node, line: str) -> None:
    """`line` plus beta * self, which broadcasts."""
    out, x = node.outputs[0], node["self"]
    engine.spec(line)
    dims = engine.axes(out)
    for i, axis in enumerate(reversed(engine.axes(x)), 1):
        engine.broadcast(dims[-i], axis)
    if node.args.get("beta", 1) != 0:
        engine.flows[-1].terms += ((x,),)


def added(line: str) -> Rule:
    return lambda engine, node: _addend(engine, node, line)


def baddbmm(engine: Engine, node: Node) -> None:
    _addend(engine, node, "batch1[b m k] batch2[b k n] -> b m n")
    fam.mark_attention(engine, node["batch1"], node["batch2"])


def inner(engine: Engine, node: Node) -> None:
    a, b = (len(node[name].shape) for name in ("self", "other"))
    if a > 2 or b > 2:
        return unsupported(engine, node)
    engine.spec(f"self[{'m ' * (a == 2)}k] other[{'n ' * (b == 2)}k] -> {'m ' * (a == 2)}{'n' * (b == 2)}")


def kron(engine: Engine, node: Node) -> None:
    if len(node["self"].shape) != 2 or len(node["other"].shape) != 2:
        return unsupported(engine, node)
    engine.spec("self[i j] other[k l] -> (i k) (j l)")


def tensordot(engine: Engine, node: Node) -> None:
    ra, rb = len(node["self"].shape), len(node["other"].shape)
    pairs = [(a % ra, b % rb) for a, b in zip(node["dims_self"], node["dims_other"])]
    left = [f"a{i}" for i in range(ra)]
    right = [next((f"a{a}" for a, b in pairs if b == i), f"b{i}") for i in range(rb)]
    result = [c for i, c in enumerate(left) if i not in {a for a, _ in pairs}] + [
        c for i, c in enumerate(right) if i not in {b for _, b in pairs}
    ]
    engine.spec(f"self[{' '.join(left)}] other[{' '.join(right)}] -> {' '.join(result)}")


def chain(engine: Engine, node: Node) -> None:
    """Matrices multiplied one after the other."""
    values = list(leaves([node.args.get("matrices", node.args.get("tensors"))]))
    if any(len(v.shape) != 2 for v in values):
        return unsupported(engine, node)
    operands = {f"m{i}": v for i, v in enumerate(values)}
    engine.spec(" ".join(f"m{i}[k{i} k{i + 1}]" for i in range(len(values))) + f" -> k0 k{len(values)}", operands=operands)


def einsum(engine: Engine, node: Node) -> None:
    """The subscripts are nearly our own notation; an operand that repeats a letter (a diagonal) is frozen."""
    fam.einsum(engine, node["equation"], list(leaves([node["tensors"]])))


def grouped_mm(engine: Engine, node: Node) -> None:
    """Rows `offs[e-1]:offs[e]` times matrix e. The experts may be cut when the offsets are counted, so that a removed one has no rows."""
    left, right = (
        ("self", "mat2") if "self" in node.args else ("input", "weight")
    )  # ATen's op, and the CPU stand-in that transformers registers
    a, b, offsets = node[left], node[right], node["offs"]
    if len(a.shape) == 3 and len(b.shape) == 3:
        return engine.spec(f"{left}[e t k] {right}[e k n] -> e t n")
    if len(a.shape) != 2 or len(b.shape) != 3 or offsets is None:
        return unsupported(engine, node)
    engine.spec(f"{left}[t k] {right}[e k n] ; offs[e] -> t n")
    engine.freeze(engine.axes(a)[0], Reason.FIXED)
    experts = engine.axes(b)[0]
    if offsets not in engine.counts:
        engine.freeze(experts, Reason.FIXED, "the offsets are not counts of indices of an axis")
    engine.flows[-1].over += (experts,)
    engine.mark(experts, "expert")


# ---- convolutions and attention


def convolution(engine: Engine, node: Node) -> None:
    transposed = node.args.get("transposed", node.op_type.startswith("conv_transpose"))
    line = "input[b (g i) *] weight[(g o) i *] + bias[(g o)] -> b (g o) *"
    if transposed:
        line = "input[b (g i) *] weight[(g i) o *] + bias[(g o)] -> b (g o) *"
    if len(node["input"].shape) == len(node["weight"].shape) - 1:  # no batch axis
        line = line.replace("b (", "(")
    engine.spec(line, sizes={"g": node["groups"]}, marks={"g": "conv", "i": "conv", "o": "conv"})


def attention(engine: Engine, node: Node) -> None:
    """softmax(query key^T + mask) value, perhaps with fewer heads of keys and values."""
    q, k, v, mask = node["query"], node["key"], node["value"], node.args.get("attn_mask")
    rank = len(q.shape)
    if rank >= 4 and q.shape[-3] != k.shape[-3] and k.shape[-3] != 1:
        sizes = {"k": k.shape[-3], "q": q.shape[-3] // k.shape[-3]}
        engine.spec("value[... k s e] ; query[... (k q) l d] key[... k s d] -> ... (k q) l e", sizes, marks={"k": "kv_group"})
    else:
        engine.spec("value[... s e] ; query[... l d] key[... s d] -> ... l e")
    keys = engine.axes(k)[-2]
    engine.flows[-1].over += (keys,)
    engine.flows[-1].products = ((q, k),)
    for tokens in (keys, engine.axes(q)[-2]):
        engine.mark(tokens, "token")
        if node["is_causal"]:
            engine.freeze(tokens, Reason.FIXED, "positions of a causal mask")
    for value in (q, v):
        engine.mark(engine.axes(value)[-1], "head_dim")
    for axis in (*engine.axes(q)[:-2], *engine.axes(k)[:-2]):
        fam.mark_heads(engine, axis)
    if mask is not None:
        scores = [*engine.axes(node.outputs[0])[:-1], keys]
        for i, axis in enumerate(reversed(engine.axes(mask)), 1):
            engine.broadcast(scores[-i], axis)
    for statistics in node.outputs[1:]:
        engine.set(statistics, engine.axes(node.outputs[0])[:-1])
        engine.flow(statistics, ())


# ---- recurrent nets


def recurrent(gates: int) -> Rule:
    """LSTM, GRU, RNN over packed gate matrices (gates * hidden), possibly bidirectional and stacked."""

    def rule(engine: Engine, node: Node) -> None:
        if "batch_first" not in node.args or "data" in node.args:
            return engine.unsupported(Reason.FIXED, "packed sequences")
        x, states, weights = node["input"], list(leaves([node["hx"]])), list(leaves([node["params"]]))
        directions = 2 if node["bidirectional"] else 1
        per = len(weights) // (node["num_layers"] * directions)
        if per not in (2, 4):
            return engine.unsupported(Reason.FIXED, "projections")
        for value in (x, *states):
            for axis in engine.axes(value)[:-1]:
                engine.freeze(axis, Reason.FIXED)
        below: Axis = engine.axes(x)[-1]
        for layer in range(node["num_layers"]):
            units = []
            for direction in range(directions):
                group = weights[(layer * directions + direction) * per :][:per]
                unit: Axis = engine.axes(group[1])[1]
                for w in group:
                    engine.equate(engine.axes(w)[0], [*engine.frozen(gates), *unit])
                engine.equate(engine.axes(group[0])[1], below)
                for state in states:  # those of all layers and directions lie in one tensor, so their units go together
                    engine.equate(engine.axes(state)[-1], unit)
                units.append(unit)
            below = units[0] if len(units) == 1 else [sum_of(units)]
        sequence, *last = node.outputs
        engine.set(sequence, [*engine.axes(x)[:-1], below])
        engine.flow(sequence, weights, over=[below])
        engine.flows[-1].products = ((x, *weights),)
        for out, state in zip(last, states):
            engine.set(out, engine.axes(state))
            engine.flow(out, (), over=[engine.axes(state)[-1]])

    return rule


# ---- spatial axes


def _keep_leading(engine: Engine, node: Node, trailing: int) -> None:
    """The last `trailing` axes are fixed by the op (pools, resizes, padding); the others stay."""
    x = first(node)
    dims = engine.axes(x)
    keep = len(dims) - trailing
    for axis in dims[keep:]:
        engine.freeze(axis, Reason.FIXED)
    for out in node.outputs:
        engine.set(out, [*dims[:keep], *(engine.frozen(n) for n in out.shape[keep:])])
        engine.flow(out, [x])


def trailing(count: int) -> Rule:
    return lambda engine, node: _keep_leading(engine, node, count)


def _new_channel(length: int) -> Axis:
    return [Factor(length)] if length > 1 else []


def pixel_shuffle(engine: Engine, node: Node) -> None:
    """(c r r) h w -> c (h r) (w r)."""
    x, out, r = node["self"], node.outputs[0], node["upscale_factor"]
    dims = engine.axes(x)
    channel = _new_channel(out.shape[-3])
    engine.equate(dims[-3], [*channel, *engine.frozen(r * r)])
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


def im2col(engine: Engine, node: Node) -> None:
    """b c h w -> b (c k k) l."""
    x, out = node["self"], node.outputs[0]
    dims = engine.axes(x)
    for axis in dims[-2:]:
        engine.freeze(axis, Reason.FIXED)
    window = math.prod(node["kernel_size"])
    engine.set(out, [*dims[:-3], [*dims[-3], *engine.frozen(window)], engine.frozen(out.shape[-1])])
    engine.flow(out, [x])


def col2im(engine: Engine, node: Node) -> None:
    """b (c k k) l -> b c h w."""
    x, out = node["self"], node.outputs[0]
    dims = engine.axes(x)
    channel = _new_channel(out.shape[-3])
    engine.equate(dims[-2], [*channel, *engine.frozen(math.prod(node["kernel_size"]))])
    engine.freeze(dims[-1], Reason.FIXED)
    engine.set(out, [*dims[:-2], channel, *(engine.frozen(n) for n in out.shape[-2:])])
    engine.flow(out, [x])


def glu(engine: Engine, node: Node) -> None:
    """a * sigmoid(b) of two halves of an axis."""
    x, dim = node["self"], node["dim"]
    dims = list(engine.axes(x))
    half = _new_channel(node.outputs[0].shape[dim])
    engine.equate(dims[dim], [Factor(2), *half])
    inside = set(leaves_of(half))
    engine.freeze([f for f in leaves_of(dims[dim]) if f not in inside], Reason.FIXED)
    dims[dim] = half
    engine.set(node.outputs[0], dims)
    engine.flow(node.outputs[0], [x])


def channel_shuffle(engine: Engine, node: Node) -> None:
    """(g c) ... -> (c g) ..."""
    engine.spec("self[b (g c) ...] -> b (c g) ...", sizes={"g": node["groups"]})


def transformed(engine: Engine, node: Node) -> None:
    """Fourier transforms fix the axes they run along; the others are a batch."""
    x, out = node["self"], node.outputs[0]
    dims, dim = engine.axes(x), node.args.get("dim")
    count = len(node.args["s"]) if dim is None and node.args.get("s") else len(dims)
    over = {d % len(dims) for d in (range(-count, 0) if dim is None else [dim] if isinstance(dim, int) else dim)}
    for d in over:
        engine.freeze(dims[d], Reason.FIXED)
    engine.set(out, [engine.frozen(n) if i in over else dims[i] for i, n in enumerate(out.shape)])
    engine.flow(out, [x])


_SPATIAL_NAMES = [f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)]

CONTRACTIONS: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "linalg_matmul"), matmul),
    "mv": "self[m k] vec[k] -> m",
    "dot": "self[k] tensor[k] -> ",
    "vdot": "self[k] other[k] -> ",
    "addmm": added("mat1[m k] mat2[k n] -> m n"),
    "addmv": added("mat[m k] vec[k] -> m"),
    "addbmm": added("batch1[b m k] batch2[b k n] -> m n"),
    "addr": added("vec1[m] vec2[n] -> m n"),
    "baddbmm": baddbmm,
    **dict.fromkeys(("outer", "ger"), "self[i] vec2[j] -> i j"),
    "inner": inner,
    "kron": kron,
    "tensordot": tensordot,
    **dict.fromkeys(("chain_matmul", "linalg_multi_dot"), chain),
    "einsum": einsum,
    "bilinear": "input1[... i] input2[... j] weight[o i j] + bias[o] -> ... o",
    **dict.fromkeys(("cdist", "_cdist_forward"), "x1[... p m] + x2[... r m] -> ... p r"),
    **dict.fromkeys(
        "linalg_inv inverse linalg_pinv linalg_matrix_exp matrix_exp linalg_cholesky linalg_det det linalg_qr linalg_svd "
        "linalg_eigh linalg_solve linalg_inv_ex "
        "linalg_cholesky_ex linalg_matrix_power".split(),
        unsupported,
    ),
    "_grouped_mm": grouped_mm,
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "_convolution"),
        convolution,
    ),
    "scaled_dot_product_attention": attention,
    "lstm": recurrent(4),
    "gru": recurrent(3),
    "rnn_tanh": recurrent(1),
    "rnn_relu": recurrent(1),
}

SPATIAL: dict[str, Rule] = {
    **{name: trailing(int(name[-2])) for name in _SPATIAL_NAMES},
    **{f"max_pool{d}d_with_indices": trailing(d) for d in (2, 3)},
    **{f"_adaptive_avg_pool{d}d": trailing(d) for d in (2, 3)},
    "max_unpool2d": "self[... _ _] ; indices[... _ _] -> ... _ _",
    "max_unpool3d": "self[... _ _ _] ; indices[... _ _ _] -> ... _ _ _",
    **{f"{exact}{d}d": trailing(d) for exact in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)},
    **{"upsample_linear1d": trailing(1), "upsample_trilinear3d": trailing(3)},
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), trailing(2)),
    **{f"{mode}_pad{d}d": trailing(d) for mode in ("reflection", "replication") for d in (1, 2, 3)},
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), "input[b c *] ; grid[b *] -> b c *"),
    "affine_grid_generator": "theta[*] -> *",
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": im2col,
    "col2im": col2im,
    "glu": glu,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    **{
        f"fft_{name}": transformed
        for name in "fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift ifftshift".split()
    },
    "stft": unsupported,
    "istft": unsupported,
}
