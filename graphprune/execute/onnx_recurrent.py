"""ONNX operators with a loop inside: recurrent layers and control flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import UnsupportedOp
from graphprune.execute.onnx_tensors import reversal
from graphprune.rules.onnx_literals import numbers

ACTIVATIONS: dict[str, Callable[[Tensor, float | None, float | None], Tensor]] = {
    "Relu": lambda x, a, b: torch.relu(x),
    "Tanh": lambda x, a, b: torch.tanh(x),
    "Sigmoid": lambda x, a, b: torch.sigmoid(x),
    "Affine": lambda x, a, b: (1.0 if a is None else a) * x + (b or 0.0),
    "LeakyRelu": lambda x, a, b: F.leaky_relu(x, 0.01 if a is None else a),
    "ThresholdedRelu": lambda x, a, b: torch.where(x > (1.0 if a is None else a), x, torch.zeros_like(x)),
    "ScaledTanh": lambda x, a, b: (1.0 if a is None else a) * torch.tanh((1.0 if b is None else b) * x),
    "HardSigmoid": lambda x, a, b: torch.clamp((0.2 if a is None else a) * x + (0.5 if b is None else b), 0, 1),
    "Elu": lambda x, a, b: F.elu(x, 1.0 if a is None else a),
    "Softsign": lambda x, a, b: F.softsign(x),
    "Softplus": lambda x, a, b: F.softplus(x),
}
_TAKES_ALPHA = {"Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu"}
_TAKES_BETA = {"Affine", "ScaledTanh", "HardSigmoid"}

Cell = Callable[[Tensor, list[Tensor], Tensor, Tensor, Tensor, Any], list[Tensor]]


@dataclass(frozen=True)
class Variant:
    """What a cell may have besides its weights."""

    linear_before_reset: int = 0  # GRU: the reset gate acts after the product
    input_forget: int = 0  # LSTM: one gate both lets in and forgets
    peephole: Tensor | None = None  # LSTM: (3 * size,) weights of the cell in the input, output and forget gates


def _activations(
    names: Sequence[str], alpha: Sequence[float] | None, beta: Sequence[float] | None, clip: float | None
) -> list[Callable[[Tensor], Tensor]]:
    """Each name with the next of the given parameters, if it takes one; `clip` bounds what goes in."""
    alphas, betas = list(alpha or []), list(beta or [])
    chosen: list[Callable[[Tensor], Tensor]] = []
    for name in names:
        a = alphas.pop(0) if name in _TAKES_ALPHA and alphas else None
        b = betas.pop(0) if name in _TAKES_BETA and betas else None
        chosen.append(_with_parameters(ACTIVATIONS[name], a, b, clip))
    return chosen


def _with_parameters(
    function: Callable[[Tensor, float | None, float | None], Tensor], a: float | None, b: float | None, clip: float | None
) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x if clip is None else x.clamp(-clip, clip), a, b)


def _rnn_cell(x: Tensor, state: list[Tensor], R: Tensor, wb: Tensor, rb: Tensor, act: Any) -> list[Tensor]:
    return [act[0](x + wb + state[0] @ R.T + rb)]


def _lstm_cell(variant: Variant) -> Cell:
    def cell(x: Tensor, state: list[Tensor], R: Tensor, wb: Tensor, rb: Tensor, act: Any) -> list[Tensor]:
        h, c = state
        i, o, f, g = (x + wb + h @ R.T + rb).chunk(4, -1)
        pi, po, pf = variant.peephole.chunk(3) if variant.peephole is not None else (0.0, 0.0, 0.0)
        i = act[0](i + pi * c)
        f = 1 - i if variant.input_forget else act[0](f + pf * c)
        c = f * c + i * act[1](g)
        return [act[0](o + po * c) * act[2](c), c]

    return cell


def _gru_cell(variant: Variant) -> Cell:
    def cell(x: Tensor, state: list[Tensor], R: Tensor, wb: Tensor, rb: Tensor, act: Any) -> list[Tensor]:
        (h,) = state
        size = h.shape[-1]
        gates, candidate = (x + wb).split([2 * size, size], -1)
        z, r = act[0](gates + h @ R[: 2 * size].T + rb[: 2 * size]).chunk(2, -1)
        inner, bias = R[2 * size :], rb[2 * size :]
        past = r * (h @ inner.T + bias) if variant.linear_before_reset else (r * h) @ inner.T + bias
        return [(1 - z) * act[1](candidate + past) + z * h]

    return cell


def _recurrent(cell_of: Callable[[Variant], Cell], default: Sequence[str], num_states: int) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        X: Tensor,
        W: Tensor,
        R: Tensor,
        B: Tensor | None = None,
        sequence_lens: Tensor | None = None,
        initial_h: Tensor | None = None,
        initial_c: Tensor | None = None,
        P: Tensor | None = None,
        activation_alpha: Sequence[float] | None = None,
        activation_beta: Sequence[float] | None = None,
        activations: Sequence[str] | None = None,
        clip: float | None = None,
        direction: str = "forward",
        input_forget: int = 0,
        layout: int = 0,
        linear_before_reset: int = 0,
    ) -> tuple[Tensor, ...]:
        directions, size = R.shape[0], R.shape[-1]
        x = X.transpose(0, 1) if layout else X
        per_direction = len(default)
        names = list(activations or list(default) * directions)
        first = [s.transpose(0, 1) if layout else s for s in (initial_h, initial_c) if s is not None]
        zero = x.new_zeros(directions, x.shape[1], size)
        for state in first:  # torch would broadcast what ONNX rejects
            if state.shape != zero.shape:
                raise ValueError(f"the initial state of a recurrent layer has shape {list(state.shape)} where {list(zero.shape)} is needed")
        states = (first + [zero] * num_states)[:num_states] if initial_h is not None or initial_c is None else [zero, first[0]]
        act = _activations(names, activation_alpha, activation_beta, clip)
        outputs, finals = [], []
        for d in range(directions):
            backward = direction == "reverse" or d == 1
            biases = B[d].chunk(2) if B is not None else (x.new_zeros(W.shape[1]), x.new_zeros(W.shape[1]))
            cell = cell_of(Variant(linear_before_reset, input_forget, P[d] if P is not None else None))
            y, last = _direction(
                x, W[d], R[d], biases, [s[d] for s in states], sequence_lens, backward,
                cell, act[d * per_direction : (d + 1) * per_direction],
            )  # fmt: skip
            outputs.append(y)
            finals.append(last)
        y = torch.stack(outputs, 1)  # (steps, directions, batch, size)
        last_states = [torch.stack(parts) for parts in zip(*finals)]
        if layout:
            return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last_states)
        return y, *last_states

    return run


def _direction(
    x: Tensor,
    W: Tensor,
    R: Tensor,
    biases: tuple[Tensor, Tensor] | Sequence[Tensor],
    state: list[Tensor],
    lengths: Tensor | None,
    backward: bool,
    cell: Cell,
    act: list[Callable[[Tensor], Tensor]],
) -> tuple[Tensor, list[Tensor]]:
    """One direction of a recurrent layer over x (steps, batch, inputs): all outputs, and the last states."""
    if backward:
        x = x.flip(0) if lengths is None else x.gather(0, reversal(x, lengths))
    projected = x @ W.T
    outputs = []
    for t in range(x.shape[0]):
        fresh = cell(projected[t], state, R, biases[0], biases[1], act)
        if lengths is not None:
            running = (t < lengths)[:, None]
            outputs.append(torch.where(running, fresh[0], torch.zeros_like(fresh[0])))
            fresh = [torch.where(running, new, old) for new, old in zip(fresh, state)]
        else:
            outputs.append(fresh[0])
        state = fresh
    y = torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1], R.shape[-1])
    if backward:
        y = y.flip(0) if lengths is None else y.gather(0, reversal(y, lengths))
    return y, state


# --- control flow: `blocks` and `run_block` come from the node and the interpreter ------------------------------------------------


def _one(operand: Any) -> Any:
    return (numbers(operand) or [None])[0]


def _if(cond: Any, blocks: Sequence[Any], run_block: Callable[..., Any]) -> tuple[Any, ...]:
    then_branch, else_branch = blocks
    return tuple(run_block(then_branch if _one(cond) else else_branch, ()))


def _loop(M: Any, cond: Any, v_initial: Sequence[Any] | None, blocks: Sequence[Any], run_block: Callable[..., Any]) -> tuple[Any, ...]:
    (body,) = blocks
    carried = list(v_initial or [])
    limit = _one(M) if M is not None else None
    go = cond is None or bool(_one(cond))
    collected: list[list[Tensor]] = [[] for _ in body.outputs[1 + len(carried) :]]
    i = 0
    while go and (limit is None or i < limit):
        results = run_block(body, (torch.tensor(i), torch.tensor(True), *carried))
        go = bool(_one(results[0]))
        carried = list(results[1 : 1 + len(carried)])
        for parts, part in zip(collected, results[1 + len(carried) :]):
            parts.append(part)
        i += 1
    empty = [torch.zeros(0, *(value.shape or ()), dtype=value.dtype) for value in body.outputs[1 + len(carried) :]]
    return (*carried, *(torch.stack(parts) if parts else nothing for parts, nothing in zip(collected, empty)))


def _scan(
    initial_state_and_scan_inputs: Sequence[Tensor],
    num_scan_inputs: int,
    blocks: Sequence[Any],
    run_block: Callable[..., Any],
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    sequence_lens: Tensor | None = None,
    directions: Sequence[int] | None = None,
    batched: bool = False,
) -> tuple[Tensor, ...]:
    (body,) = blocks
    if batched:  # opset 8: every operand and result has the batch first
        if sequence_lens is not None:
            raise UnsupportedOp("ai.onnx::Scan with sequence_lens (opset 8); convert the model to opset 9 or newer")
        each = [
            _scan([x[b] for x in initial_state_and_scan_inputs], num_scan_inputs, blocks, run_block, None, directions)
            for b in range(initial_state_and_scan_inputs[0].shape[0])
        ]
        return tuple(torch.stack(parts) for parts in zip(*each))
    num_states = len(initial_state_and_scan_inputs) - num_scan_inputs
    state = list(initial_state_and_scan_inputs[:num_states])
    axes, backward = list(scan_input_axes or [0] * num_scan_inputs), list(scan_input_directions or [0] * num_scan_inputs)
    streams = [
        x.movedim(axis, 0).flip(0) if reverse else x.movedim(axis, 0)
        for x, axis, reverse in zip(initial_state_and_scan_inputs[num_states:], axes, backward)
    ]
    steps = []
    for t in range(streams[0].shape[0]):
        results = list(run_block(body, (*state, *(stream[t] for stream in streams))))
        state = results[:num_states]
        steps.append(results[num_states:])
    count = len(body.outputs) - num_states
    out_axes, out_backward = list(scan_output_axes or [0] * count), list(scan_output_directions or [0] * count)
    stacked = [torch.stack(parts[::-1] if reverse else parts, axis) for parts, axis, reverse in zip(zip(*steps), out_axes, out_backward)]
    return (*state, *stacked)


CONTROL_FLOW: dict[str, Callable[..., Any]] = {"If": _if, "Loop": _loop, "Scan": _scan}
BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}

RECURRENT_OPS: dict[str, Callable[..., Any]] = CONTROL_FLOW | {
    "GRU": _recurrent(_gru_cell, ("Sigmoid", "Tanh"), 1),
    "LSTM": _recurrent(_lstm_cell, ("Sigmoid", "Tanh", "Tanh"), 2),
    "RNN": _recurrent(lambda _: _rnn_cell, ("Tanh",), 1),
}
