"""Runs a `Program` node by node, in any dtype, with any tensor replaced and any node intercepted.

One interpreter serves certificates in float64, statistics on the way, and masked runs, for both dialects: a node brings its own `call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    held = Tensors(tensors, dtype)
    execution, last = Execution(program, inputs, held, intercept), last_use(program)
    copies = last_weights(program) if dtype is not None else {}  # in another type: each lives as long as it is read
    trains = _wants_grad((tensors or {}).values()) or (torch.is_grad_enabled() and _wants_grad(inputs))
    with torch.enable_grad() if trains else torch.no_grad():
        for i, node in enumerate(program.nodes):
            execution.step(node)
            execution.forget(last.get(i, ()))
            for value in copies.get(node, ()):
                held.forget(value)
        return execution.outputs()


class Tensors:
    """Weights and constants as executions read them: replaced, cast, moved; each once.

    Args:
        replaced: tensors in place of the program's own; may be written while executions go on.
        load: gives the tensor of a weight that the program holds no data of.
    """

    def __init__(
        self,
        replaced: Mapping[Value, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        load: Callable[[Value], torch.Tensor] | None = None,
    ) -> None:
        self.replaced, self.dtype, self.device, self.load = {} if replaced is None else replaced, dtype, device, load
        self._held: dict[Value, Any] = {}

    def __getitem__(self, value: Value) -> Any:
        if value not in self._held:
            tensor = self.replaced.get(value, value.tensor)
            if self.load is not None and isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                tensor = self.load(value)
            self._held[value] = self.cast(tensor)
        return self._held[value]

    def cast(self, x: Any) -> Any:
        x = _cast(x, self.dtype)
        return x.to(self.device) if self.device is not None and isinstance(x, torch.Tensor) else x

    def forget(self, value: Value) -> None:
        """It is read anew the next time."""
        self._held.pop(value, None)


class Execution:
    """A run that is advanced node by node, so that several can go in lock step."""

    def __init__(self, program: Program, inputs: Sequence[Any], tensors: Tensors, intercept: Intercept | None = None) -> None:
        self.program, self.tensors, self.intercept = program, tensors, intercept
        self._env: dict[Value, Any] = {v: tensors.cast(x) for v, x in zip(program.inputs, inputs)}

    def read(self, leaf: Any) -> Any:
        """What stands for a value, or for a literal, in this run."""
        dtype = self.tensors.dtype
        if isinstance(leaf, Value):
            return self._env[leaf] if leaf in self._env else self.tensors[leaf]
        if isinstance(leaf, torch.dtype) and dtype is not None and leaf.is_floating_point and leaf.itemsize > 1:
            return dtype
        if isinstance(leaf, torch.device) and self.tensors.device is not None:
            return self.tensors.device
        return _cast(leaf, dtype)  # a tensor given as an attribute

    def arguments(self, node: Node) -> Mapping[str, Any]:
        """The arguments with which a node runs next."""
        return substitute(node.args, self.read)

    def step(self, node: Node) -> None:
        """Run one node, all whose operands are there."""
        args, dtype = self.arguments(node), self.tensors.dtype

        def compute(args: Mapping[str, Any]) -> tuple[Any, ...]:
            extra = {"run_block": self._run_block} if node.blocks else {}
            call: Any = _DOUBLE.get(node.op, node.call) if dtype is torch.float64 else node.call
            call = _view if node.op == ("aten", "view") and "size" in args else call
            result = call(**args, **extra)
            # integers divided by a number come out in the default dtype
            return tuple(_cast(r, dtype) for r in (result if isinstance(result, (tuple, list)) else (result,)))

        results = compute(args) if self.intercept is None else self.intercept(node, args, compute)
        for value, result in zip(node.outputs, results):
            self._env[value] = result

    def forget(self, values: Iterable[Value]) -> None:
        """Free what nothing reads any more."""
        for value in values:
            self._env.pop(value, None)

    def outputs(self) -> list[Any]:
        return [self.read(v) for v in self.program.outputs]

    def _run_block(self, block: Block, block_inputs: Sequence[Any] = ()) -> list[Any]:
        self._env.update(zip(block.inputs, block_inputs))
        for node in block.nodes:
            self.step(node)
        return [self.read(v) for v in block.outputs]


def last_use(program: Program) -> dict[int, list[Value]]:
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


def last_weights(program: Program) -> dict[Node, list[Value]]:
    """Weights and constants whose last use is a node."""
    last = {v: node for node in program.walk() for v in node.inputs if v.tensor is not None}
    out: dict[Node, list[Value]] = {}
    for value, node in last.items():
        out.setdefault(node, []).append(value)
    return out


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    if dtype is not None and isinstance(x, torch.Tensor) and x.is_floating_point() and x.element_size() > 1:  # float8 is a code
        return x.to(dtype)
    return x


def _wants_grad(tensors: Iterable[Any]) -> bool:
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


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
