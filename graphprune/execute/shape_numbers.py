"""Shape arithmetic of an ONNX graph in Python numbers instead of tensors, so that `torch.compile` sees through it.

A size that goes `Shape -> Gather -> Mul -> Concat -> Reshape` as tensors is data to a tracer. Here such values are Python integers, or
lists of them, from `Shape` to the operand that is a shape, a position or a count; where one is used as data after all, a node makes it a
tensor. Results are the same. Bodies of control flow are not entered: a graph with any stays as it is, and runs eagerly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphprune.execute.onnx_narrow import BYTES, decode
from graphprune.program import Kind, Node, Program, Value, substitute
from graphprune.rules.onnx_literals import LITERAL_OPERANDS, slice_range

_INTEGERS = {torch.int64, torch.int32, torch.bool}


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of numbers and lists, a list of one standing for as many as the others have."""

    def run(**operands: Any) -> Any:
        given = [x for x in operands.values() if x is not None]
        lists = [x for x in given if isinstance(x, list)]
        if not lists:
            return function(*given)
        length = next((len(x) for x in lists if len(x) != 1), 1)
        spread = [x if isinstance(x, list) and len(x) == length else _listed(x) * length for x in given]
        return [function(*parts) for parts in zip(*spread)]

    return run


def _variadic(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda data_0: _elementwise(function)(**{str(i): x for i, x in enumerate(data_0)})


def _listed(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def _divided(a: int, b: int) -> int:
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def _gather(data: list[Any], indices: Any, axis: int = 0) -> Any:
    return [data[i] for i in indices] if isinstance(indices, list) else data[indices]


def _slice(data: list[Any], starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> list[Any]:
    (start,), (end,), (step,) = _listed(starts), _listed(ends), _listed(steps if steps is not None else 1)
    return [data[i] for i in slice_range(len(data), start, end, step)]


def _reduced(function: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    def run(data: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        total = function(_listed(data))
        return [total] if keepdims and isinstance(data, list) else total

    return run


# Operators on numbers and lists of numbers, by the schema names of their arguments.
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Cast": lambda input, **_: input,
    "Concat": lambda inputs, axis: [number for part in inputs for number in part],
    "ConstantOfShape": lambda input, value=None: list(value or [0]) * input[0],
    "Div": _elementwise(_divided),
    "Equal": _elementwise(lambda a, b: bool(a == b)),
    "Gather": _gather,
    "Identity": lambda input: input,
    "Max": _variadic(max),
    "Min": _variadic(min),
    "Mod": _elementwise(lambda a, b, fmod: a - b * _divided(a, b) if fmod else a % b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Neg": _elementwise(lambda x: -x),
    "ReduceProd": _reduced(math.prod),
    "ReduceSum": _reduced(sum),
    "Reshape": lambda data, shape, allowzero=0: _listed(data) if shape else _listed(data)[0],
    "Shape": lambda data, start=0, end=None: list(data.shape)[start:end],
    "Size": lambda data: data.numel(),
    "Slice": _slice,
    "Squeeze": lambda data, axes=None: data[0] if isinstance(data, list) else data,
    "Sub": _elementwise(lambda a, b: a - b),
    "Unsqueeze": lambda data, axes: _listed(data),
    "Where": _elementwise(lambda condition, x, y: x if condition else y),
}
_OF_ANY = {"Shape", "Size"}  # whatever their operand is
_DECODES = {"DequantizeLinear", "Cast"}  # what reads numbers out of narrow tensors


def with_numbers(program: Program) -> Program:
    """The program with its shape arithmetic, and every constant shape, position and count, in Python numbers.

    Constants of types below a byte are decoded where they are read.
    """
    if any(node.blocks for node in program.nodes):
        return program
    numbers: set[Value] = set()
    tensors: dict[Value, Value] = {}  # a value of numbers -> the same as a tensor
    nodes: list[Node] = []

    def data(leaf: Any) -> Any:
        if not isinstance(leaf, Value) or leaf not in numbers:
            return leaf
        if leaf not in tensors:
            tensors[leaf] = replace(leaf, uses=[])
            make = partial(_made_tensor, dtype=leaf.dtype)
            nodes.append(Node(f"{leaf.name} as a tensor", "python", "tensor", {"numbers": leaf}, (tensors[leaf],), make))
        return tensors[leaf]

    for node in program.nodes:
        if node.domain == "" and _is_arithmetic(node, numbers):
            args = node.args if node.op_type in _OF_ANY else substitute(node.args, _number)
            if node.op_type in _OF_ANY:
                args = {name: data(argument) for name, argument in args.items()}
            nodes.append(replace(node, args=args, call=partial(_alone, ARITHMETIC[node.op_type])))
            numbers.update(node.outputs)
            continue
        literal = LITERAL_OPERANDS.get(node.op_type, ()) if node.domain == "" else ()
        args = {k: substitute(v, _number if k in literal else data) for k, v in node.args.items()}
        if node.domain == "" and node.op_type in _DECODES:
            args = substitute(args, _decoded)
        nodes.append(replace(node, args=args))
    outputs = tuple(data(value) for value in program.outputs)
    return replace(program, nodes=tuple(nodes), outputs=outputs)


def _is_arithmetic(node: Node, numbers: set[Value]) -> bool:
    """Can this node be computed in numbers: known integers in, at most one axis everywhere?"""
    if node.op_type in _OF_ANY:
        return True
    if node.op_type not in ARITHMETIC or any(not _is_flat(value) for value in (*node.inputs, *node.outputs)):
        return False
    return any(value in numbers for value in node.inputs) and all(value in numbers or _is_constant(value) for value in node.inputs)


def _is_flat(value: Value) -> bool:
    return value.shape is not None and len(value.shape) <= 1 and value.dtype in _INTEGERS and not value.dynamic


def _is_constant(value: Value) -> bool:
    return value.kind is Kind.CONSTANT and isinstance(value.tensor, Tensor)


def _number(leaf: Any) -> Any:
    tensor = leaf.tensor if isinstance(leaf, Value) and _is_constant(leaf) else leaf
    return tensor.tolist() if isinstance(tensor, Tensor) else leaf


def _decoded(leaf: Any) -> Any:
    """A constant of a type below a byte as the numbers that it holds: tracers do not know such types."""
    if not isinstance(leaf, Value) or not _is_constant(leaf) or leaf.tensor.dtype not in BYTES:
        return leaf
    tensor = decode(leaf.tensor)
    return replace(leaf, tensor=tensor, dtype=tensor.dtype, uses=[])


def _alone(function: Callable[..., Any], **arguments: Any) -> tuple[Any]:
    return (function(**arguments),)  # a list would be as many results


def _made_tensor(numbers: Any, dtype: torch.dtype | None) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)
