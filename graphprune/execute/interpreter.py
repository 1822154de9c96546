"""Runs a `Program` node by node, in any dtype, with any tensor replaced and any node intercepted.

One interpreter serves certificates in float64, statistics on the way, and masked runs, for both dialects: a node brings its own `call`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphprune.program import Block, Kind, Node, Program, Value, substitute

Compute = Callable[[Mapping[str, Any]], tuple[Any, ...]]
Intercept = Callable[[Node, Mapping[str, Any], Compute], tuple[Any, ...]]


def run(
    program: Program,
    inputs: Sequence[Any],
    *,
    tensors: Mapping[Value, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    intercept: Intercept | None = None,
) -> list[Any]:
    """The outputs of a program at flat inputs.

    Args:
        tensors: replaces the tensors of weights and constants.
        dtype: every floating-point tensor and every floating dtype in an argument becomes this one.
        intercept: called as `intercept(node, args, compute)` in place of every node; `compute(args)` runs it.
    """
    tensors = tensors or {}
    env: dict[Value, Any] = {v: _cast(x, dtype) for v, x in zip(program.inputs, inputs)}
    last = _last_use(program)
    held: dict[Value, torch.Tensor] = {}

    def read(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            if leaf in env:
                return env[leaf]
            if leaf not in held:
                held[leaf] = _cast(tensors.get(leaf, leaf.tensor), dtype)
            return held[leaf]
        if isinstance(leaf, torch.dtype) and dtype is not None and leaf.is_floating_point:
            return dtype
        return _cast(leaf, dtype)  # a tensor given as an attribute

    def run_block(block: Block, block_inputs: Sequence[Any] = ()) -> list[Any]:
        env.update(zip(block.inputs, block_inputs))
        for node in block.nodes:
            step(node)
        return [read(v) for v in block.outputs]

    def step(node: Node) -> None:
        args = substitute(node.args, read)

        def compute(args: Mapping[str, Any]) -> tuple[Any, ...]:
            extra = {"run_block": run_block} if node.blocks else {}
            call: Any = _DOUBLE.get(node.op, node.call) if dtype is torch.float64 else node.call
            call = _view if node.op == ("aten", "view") and "size" in args else call
            result = call(**args, **extra)
            # integers divided by a number come out in the default dtype
            return tuple(_cast(r, dtype) for r in (result if isinstance(result, (tuple, list)) else (result,)))

        results = compute(args) if intercept is None else intercept(node, args, compute)
        for value, result in zip(node.outputs, results):
            env[value] = result

    with torch.no_grad() if not any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors.values()) else torch.enable_grad():
        for i, node in enumerate(program.nodes):
            step(node)
            for value in last.get(i, ()):
                env.pop(value, None)
        return [read(v) for v in program.outputs]


def _last_use(program: Program) -> dict[int, list[Value]]:
    """Values whose last reader is node i; those read inside bodies live to the end."""
    at: dict[Value, int] = {}
    for i, node in enumerate(program.nodes):
        for value in (*node.inputs, *node.outputs):
            at[value] = i
    for node in program.walk():
        for block in node.blocks:
            for inner in block.nodes:
                for value in inner.inputs:
                    at.pop(value, None)
    for value in program.outputs:
        at.pop(value, None)
    out: dict[int, list[Value]] = {}
    for value, i in at.items():
        if value.kind is Kind.RESULT:
            out.setdefault(i, []).append(value)
    return out


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    if dtype is not None and isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.to(dtype)
    return x


def _view(self: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Values that are replaced on the way may be laid out in memory otherwise."""
    return self.reshape(size)


def _grouped_mm(self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None = None, bias=None, out_dtype=None) -> torch.Tensor:
    """CPU `_grouped_mm` knows no float64: rows offs[e-1]:offs[e] times matrix e."""
    if self.dim() == 3:
        return torch.bmm(self, mat2)
    assert offs is not None
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    out = self.new_zeros(self.shape[0], mat2.shape[-1])
    for e, (a, b) in enumerate(zip(starts, ends)):
        out[a:b] = self[a:b] @ mat2[e]
    return out


_DOUBLE: dict[tuple[str, str], Callable[..., Any]] = {("aten", "_grouped_mm"): _grouped_mm}
