"""`graphprune::gated_delta_rule`: the recurrence of gated DeltaNet, captured as one node.

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        S: (b, h, k, v), S_0 = initial_state or zero
    y_t = S_t^T q_t

The norms of queries and keys and the scale of the queries come before the op, the gated norm after it, all as ordinary nodes.

Shapes: b = batch, l = positions, g = key heads, h = value heads = g groups of r, k = key dim, v = value dim; value head `i` reads key head
`i // r`.
    query, key: (b, l, g, k); value: (b, l, h, v); decay = g_t, not positive, and beta: (b, l, h); initial_state: (b, h, k, v) or None
    -> y: (b, l, h, v), final state: (b, h, k, v); both float32, or float64 when any operand is.

Source: Yang, Kautz and Hatamizadeh, 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv 2412.06464 (section 3.3, the
chunked form: within a chunk the corrections solve a triangular system).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.ops.scan import bind, define, prepare

DIM_RULE = "b l g k, b l g k, b l (g r) v, b l (g r), b l (g r), b (g r) k v -> b l (g r) v, b (g r) k v"
_CHUNK = 64  # positions computed at once; the result does not depend on it


def reference(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A triangular system within chunks of positions, recurrent between them."""
    sizes, (query, key, value, decay, beta, state) = prepare(DIM_RULE, query, key, value, decay, beta, initial_state)
    if state is None:
        state = value.new_zeros(sizes["b"], sizes["g"] * sizes["r"], sizes["k"], sizes["v"])
    query, key = (t.repeat_interleave(sizes["r"], dim=2) for t in (query, key))
    outputs = []
    for q, k, v, a, w in zip(*(t.transpose(1, 2).split(_CHUNK, dim=2) for t in (query, key, value, decay, beta))):  # (b, h, c, ...)
        later = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool, device=a.device).tril(-1)  # l > s
        between = (a[..., None] * later).cumsum(dim=2).masked_fill(later.transpose(0, 1), -torch.inf).exp()  # decay from s to l
        passed = a.cumsum(dim=2).exp()[..., None]  # from the start of the chunk to l
        system = (w[..., None] * k) @ k.transpose(-1, -2) * between * later
        wanted = w[..., None] * (v - passed * (k @ state))
        new = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append((passed * q) @ state + (q @ k.transpose(-1, -2) * between) @ new)
        state = state * passed[:, :, -1:] + (k * between[:, :, -1, :, None]).transpose(-1, -2) @ new
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), state.contiguous()


def macs(*shapes: Sequence[int] | None) -> int:
    """Multiply-accumulates of the recurrence from the operands' shapes: four per state and position (decay, read, write, output)."""
    size = bind(DIM_RULE, shapes)
    return 4 * size["b"] * size["l"] * size["g"] * size["r"] * size["k"] * size["v"]


gated_delta_rule = define("gated_delta_rule", DIM_RULE, reference)
