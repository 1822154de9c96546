"""Every node that multiplies its input with a weight, seen as one thing: `y = x W^T` with `W: (groups, outputs, inputs)`.

Linear layers, convolutions (an input is then a channel at one position of the window, and `groups` are those of the convolution) and
stacked expert matrices (`groups` are the experts), in both dialects. Statistics, scores of weights and least-squares repairs are written
once, on this view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.program import Kind, Node, Program, Value

Rows = tuple[Tensor, Tensor | None]  # (groups, samples, inputs), and how many of the samples count for each group (None: all)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One node and the weight that it multiplies with."""

    node: Node
    operand: str  # name of the argument that is multiplied
    weight: Value
    input_axis: int  # of the weight
    groups: int
    window: int  # positions of a convolution's window; 1 for the others
    _rows: Callable[[LinearMap, Mapping[str, Any]], Rows]

    @property
    def x(self) -> Value:
        return self.node[self.operand]

    def matrix(self, weight: Tensor) -> Tensor:
        """(groups, outputs, inputs * window): a tensor of the weight's shape as a stack of matrices; a view where possible."""
        if weight.dim() == 2 or self.window_axes:
            stacked = weight.T if self.input_axis == 0 else weight
            return stacked.reshape(self.groups, stacked.shape[0] // self.groups, -1)
        return weight if self.input_axis == 2 else weight.mT

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        shape = self.weight.shape or ()
        if len(shape) == 2 or self.window_axes:
            flat = matrix.reshape(matrix.shape[0] * matrix.shape[1], -1)
            return flat.T.contiguous() if self.input_axis == 0 else flat.reshape(shape)
        return matrix if self.input_axis == 2 else matrix.mT.contiguous()

    @property
    def reads(self) -> Any:
        """Equal for maps whose rows are equal."""
        return (self.x, self._rows) if self._rows is _whole else self.node

    @property
    def window_axes(self) -> bool:
        return "onv" in self.node.op_type

    def rows(self, args: Mapping[str, Any]) -> Rows:
        """(groups, samples, inputs * window): every vector that the node multiplies with the weight, from the arguments of a run."""
        return self._rows(self, args)

    def along_input(self, columns: Tensor) -> Tensor:
        """(length of the weight's input axis,): a number per column, (groups, inputs * window), summed over groups and window."""
        return columns.reshape(columns.shape[0], -1, self.window).sum((0, 2))


def _whole(linear: LinearMap, args: Mapping[str, Any]) -> Rows:
    x = args[linear.operand]
    return x.reshape(1, -1, x.shape[-1]), None


def _stacked(linear: LinearMap, args: Mapping[str, Any]) -> Rows:
    """Batched products: the leading axis of the input is that of the weight."""
    x = args[linear.operand]
    return (x if x.dim() == 3 else x.reshape(linear.groups, -1, x.shape[-1])), None


def _ragged(linear: LinearMap, args: Mapping[str, Any]) -> Rows:
    """Rows `offs[e-1]:offs[e]` belong to matrix e; shorter runs are filled up with zeros."""
    x, ends = args["self"], args["offs"].tolist()
    starts = [0, *ends[:-1]]
    counts = torch.tensor([b - a for a, b in zip(starts, ends)], device=x.device)
    out = x.new_zeros(len(ends), int(counts.max()) if ends else 0, x.shape[-1])
    for e, (a, b) in enumerate(zip(starts, ends)):
        out[e, : b - a] = x[a:b]
    return out, counts


def _unfolded(linear: LinearMap, args: Mapping[str, Any]) -> Rows:
    """Convolutions: one sample per window."""
    node, x, shape = linear.node, args[linear.operand], linear.weight.shape or ()
    spatial, onnx = len(shape) - 2, node.domain == ""
    stride = _each(args["strides" if onnx else "stride"], spatial)
    dilation = _each(args["dilations" if onnx else "dilation"], spatial)
    x = F.pad(x, _padding(node, spatial))
    for axis, (size, step, apart) in enumerate(zip(shape[2:], stride, dilation)):
        reach = (size - 1) * apart + 1
        x = x.unfold(2 + axis, reach, step)[..., ::apart]
    # (batch, channels, *places, *window) -> (groups, batch * places, channels / groups * window), by one copy
    batch, channels, places = x.shape[0], x.shape[1], prod(x.shape[2 : 2 + spatial])
    x = x.unflatten(1, (linear.groups, channels // linear.groups))
    x = x.permute(1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
    return x.reshape(linear.groups, batch * places, -1), None


def _each(given: Any, spatial: int) -> list[int]:
    """One number per spatial axis, however it was given."""
    numbers = [given or 1] if not isinstance(given, (list, tuple)) else list(given) or [1]
    return numbers * spatial if len(numbers) == 1 else numbers


def _padding(node: Node, spatial: int) -> list[Any]:
    """Padding before and after each axis of the window, in the order of `F.pad`: last axis first."""
    if node.domain == "":
        pads = list(node.args.get("pads") or [0] * (2 * spatial))
        pairs = [(pads[i], pads[i + spatial]) for i in range(spatial)]
    else:
        given = node["padding"]
        if isinstance(given, str):
            return [given]
        pairs = [(p, p) for p in (list(given) * spatial)[:spatial]]
    return [p for pair in reversed(pairs) for p in pair]


# op -> (argument that is multiplied, argument that holds the weight, axis of the weight that is contracted)
LINEAR: Mapping[tuple[str, str], tuple[str, str, int]] = {
    ("aten", "linear"): ("input", "weight", 1),
    ("aten", "addmm"): ("mat1", "mat2", 0),
    ("aten", "mm"): ("self", "mat2", 0),
    ("aten", "matmul"): ("self", "other", -2),
    ("aten", "bmm"): ("self", "mat2", 1),
    ("aten", "_grouped_mm"): ("self", "mat2", 1),
    **{("aten", f"conv{n}d"): ("input", "weight", 1) for n in (1, 2, 3)},
    ("", "Conv"): ("X", "W", 1),
    ("", "MatMul"): ("A", "B", -2),
    ("", "Gemm"): ("A", "B", 0),
}


def linear_map(node: Node) -> LinearMap | None:
    """The linear map of a node, or None where it is none (or multiplies with no parameter, or pads by a rule of its own)."""
    if node.op not in LINEAR:
        return None
    operand, name, axis = LINEAR[node.op]
    x, weight = node.args.get(operand), node.args.get(name)
    if not isinstance(x, Value) or x.shape is None or not isinstance(weight, Value) or weight.kind is not Kind.PARAMETER:
        return None
    if not weight.is_weight or weight.tensor is None:
        return None
    shape: tuple[int, ...] = weight.shape or ()
    if "onv" in node.op_type:
        groups = int(node.args.get("groups") or node.args.get("group") or 1)
        plain = node.args.get("auto_pad", "NOTSET") in ("NOTSET", None, "VALID") and len(x.shape) == len(shape)
        numbers = all(isinstance(p, int) for p in _padding(node, len(shape) - 2))
        return LinearMap(node, operand, weight, axis, groups, prod(shape[2:]), _unfolded) if plain and numbers else None
    if node.op == ("", "Gemm"):
        if node.args.get("transA"):
            return None
        axis = 1 if node["transB"] else 0
    if len(shape) == 2:
        return LinearMap(node, operand, weight, axis % 2, 1, 1, _whole) if node.op_type != "_grouped_mm" else None
    if len(shape) != 3 or len(x.shape) not in (2, 3):
        return None
    if node.op_type == "_grouped_mm" and len(x.shape) == 2 and isinstance(node.args.get("offs"), Value):
        return LinearMap(node, operand, weight, 1, shape[0], 1, _ragged)
    same = len(x.shape) == 3 and x.shape[0] == shape[0]
    return LinearMap(node, operand, weight, 1, shape[0], 1, _stacked) if same else None


def linear_maps(program: Program) -> dict[Node, LinearMap]:
    """Every linear map of a program, in topological order."""
    found = ((node, linear_map(node)) for node in program.nodes)
    return {node: linear for node, linear in found if linear is not None}


def columns(linear: LinearMap, positions: np.ndarray) -> np.ndarray:
    """Columns of the matrix that belong to positions of the weight's input axis."""
    return (positions[..., None] * linear.window + np.arange(linear.window)).reshape(*positions.shape[:-1], -1)
