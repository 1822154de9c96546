"""`graphprune::ssd_scan`: the state-space duality scan of Mamba-2, captured as one node.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T        h: (b, h, p, n), h_0 = initial_state or zero
    y_t = h_t C_t + D x_t

The decay is one number per head, B and C are shared by the heads of a group. `dt` is positive: bias, softplus and clamp come before the
op, the gated norm after it, all as ordinary nodes.

Shapes: b = batch, l = positions, h = heads = g groups of q, p = head dim, n = state size; head `i` reads group `i // q`.
    x: (b, l, h, p); dt: (b, l, h); A: (h), negative; B, C: (b, l, g, n); D: (h) or None; initial_state: (b, h, p, n) or None
    -> y: (b, l, h, p), final state: (b, h, p, n); both float32, or float64 when any operand is.

Source: Dao and Gu, 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
arXiv 2405.21060 (section 6; here the states of the chunks are passed on one after the other).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.ops.scan import bind, define, prepare

DIM_RULE = "b l (g q) p, b l (g q), (g q), b l g n, b l g n, (g q), b (g q) p n -> b l (g q) p, b (g q) p n"
_CHUNK = 64  # positions computed at once as a masked attention; the result does not depend on it


def reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quadratic within chunks of positions, recurrent between them."""
    sizes, (x, dt, A, B, C, D, state) = prepare(DIM_RULE, x, dt, A, B, C, D, initial_state)
    heads = sizes["g"], sizes["q"]
    if state is None:
        state = x.new_zeros(sizes["b"], *heads, sizes["p"], sizes["n"])
    state = state.reshape(sizes["b"], *heads, sizes["p"], sizes["n"])
    scaled, decays = (x * dt[..., None]).unflatten(2, heads), (dt * A).unflatten(2, heads)
    outputs = []
    for u, a, b, c in zip(*(t.split(_CHUNK, dim=1) for t in (scaled, decays, B, C))):
        later = torch.ones(a.shape[1], a.shape[1], dtype=torch.bool, device=a.device).tril(-1)[:, :, None, None]  # l > s
        # A sum of the decays between s and l, not a difference of two long sums: those cancel in float32.
        between = (a[:, :, None] * later).cumsum(dim=1).masked_fill(later.transpose(0, 1), -torch.inf)
        weights, passed = torch.exp(between), torch.exp(a.cumsum(dim=1))[..., None]  # (b, l, s, g, q): s to l; (b, l, g, q, 1): start to l
        scores = torch.einsum("blgn,bsgn->blsg", c, b)[..., None] * weights
        outputs.append(torch.einsum("blsgq,bsgqp->blgqp", scores, u) + torch.einsum("blgn,bgqpn->blgqp", c, state) * passed)
        arrived = torch.einsum("bsgqp,bsgn->bgqpn", u * weights[:, -1, ..., None], b)
        state = state * passed[:, -1, ..., None] + arrived
    y, state = torch.cat(outputs, dim=1).flatten(2, 3), state.flatten(1, 2)
    return (y if D is None else y + D[:, None] * x).contiguous(), state.contiguous()


def macs(*shapes: Sequence[int] | None) -> int:
    """Multiply-accumulates of the recurrence from the operands' shapes: three per state and position, two per element of x."""
    size = bind(DIM_RULE, shapes)
    return size["b"] * size["l"] * size["g"] * size["q"] * size["p"] * (3 * size["n"] + 2)


ssd_scan = define("ssd_scan", DIM_RULE, reference)
