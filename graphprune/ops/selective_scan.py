"""`graphprune::selective_scan`: the selective state-space recurrence of Mamba-1, captured as one node.

    h_t = exp(delta_t A) * h_{t-1} + (delta_t x_t) B_t        h: (b, d, n), h_0 = initial_state or zero
    y_t = sum_n h_t C_t + D x_t

`delta` is positive: the projection's bias and softplus come before the op, the gate after it, both as ordinary nodes.

Shapes: b = batch, d = channels, l = positions, n = state size.
    x, delta: (b, d, l); A: (d, n), negative; B, C: (b, n, l); D: (d) or None; initial_state: (b, d, n) or None
    -> y: (b, d, l), final state: (b, d, n); both float32, or float64 when any operand is (as in the recurrence of `transformers`).

Source: Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752 (algorithm 2, with the
simplified discretisation of B that its public code uses).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.ops.scan import bind, define, prepare

DIM_RULE = "b d l, b d l, d n, b n l, b n l, d, b d n -> b d l, b d n"


def reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence step by step."""
    sizes, (x, delta, A, B, C, D, state) = prepare(DIM_RULE, x, delta, A, B, C, D, initial_state)
    if state is None:
        state = x.new_zeros(sizes["b"], sizes["d"], sizes["n"])
    scaled = delta * x
    outputs = []
    for t in range(sizes["l"]):
        state = torch.exp(delta[:, :, t, None] * A) * state + scaled[:, :, t, None] * B[:, None, :, t]
        outputs.append((state @ C[:, :, t, None]).squeeze(-1))
    y = torch.stack(outputs, dim=-1)
    return (y if D is None else y + D[:, None] * x), state


def macs(*shapes: Sequence[int] | None) -> int:
    """Multiply-accumulates from the operands' shapes: four per state and position (delta A, decay, input, output), two per element of x."""
    size = bind(DIM_RULE, shapes)
    return size["b"] * size["d"] * size["l"] * (4 * size["n"] + 2)


selective_scan = define("selective_scan", DIM_RULE, reference)
