"""Nodes that compute `weight * x + bias`, in both dialects: what repairs that move weights and biases may touch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from graphprune.program import Kind, Node, Value


@dataclass(frozen=True)
class Affine:
    """The operands of one affine node, and the axis of its result along which the bias runs."""

    x: Value
    weight: Value | None  # None for an addition on its own
    bias: Value | None
    channel: int  # counted from the end


def _named(x: str, weight: str, bias: str, channel: Callable[[Node], int]) -> Callable[[Node], Affine | None]:
    def read(node: Node) -> Affine | None:
        return Affine(node[x], _parameter(node.args.get(weight)), _parameter(node.args.get(bias), 1), channel(node))

    return read


def _spatial(weight: str) -> Callable[[Node], int]:
    """Of a convolution: before the axes of its window."""
    return lambda node: 1 - len(node[weight].shape or ())


def _scaled_sum(x: str, weight: str, bias: str) -> Callable[[Node], Affine | None]:
    """alpha * x @ weight + beta * bias, with both factors one and nothing but the weight transposed."""

    def read(node: Node) -> Affine | None:
        if node["alpha"] != 1 or node["beta"] != 1 or node.args.get("transA"):
            return None
        return Affine(node[x], _parameter(node[weight]), _parameter(node.args.get(bias), 1), -1)

    return read


def _addition(a: str, b: str) -> Callable[[Node], Affine | None]:
    """A value plus a vector along its last axis."""

    def read(node: Node) -> Affine | None:
        if node.args.get("alpha", 1) != 1:
            return None
        for x, bias in ((node[a], node[b]), (node[b], node[a])):
            if isinstance(x, Value) and x.shape and _parameter(bias, 1) is not None and len(x.shape) > 1 and x.shape[-1] == bias.shape[0]:
                return Affine(x, None, bias, -1)
        return None

    return read


def _batch_norm(x: str, weight: str, bias: str) -> Callable[[Node], Affine | None]:
    return _named(x, weight, bias, lambda node: 1 - len(node[x].shape or ()))


AFFINE: Mapping[tuple[str, str], Callable[[Node], Affine | None]] = {
    ("aten", "linear"): _named("input", "weight", "bias", lambda node: -1),
    ("aten", "addmm"): _scaled_sum("mat1", "mat2", "self"),
    ("aten", "matmul"): _named("self", "other", "", lambda node: -1),
    ("aten", "mm"): _named("self", "mat2", "", lambda node: -1),
    **{("aten", f"conv{t}{n}d"): _named("input", "weight", "bias", _spatial("weight")) for t in ("", "_transpose") for n in (1, 2, 3)},
    ("aten", "batch_norm"): _batch_norm("input", "weight", "bias"),
    ("aten", "add"): _addition("self", "other"),
    **{("", op): _named("X", "W", "B", _spatial("W")) for op in ("Conv", "ConvTranspose")},
    ("", "Gemm"): _scaled_sum("A", "B", "C"),
    ("", "MatMul"): _named("A", "B", "", lambda node: -1),
    ("", "BatchNormalization"): _batch_norm("X", "scale", "B"),
    ("", "Add"): _addition("A", "B"),
}


RUNNING_MEAN = {("aten", "batch_norm"): "running_mean", ("", "BatchNormalization"): "input_mean"}


def _parameter(value: object, rank: int | None = None) -> Value | None:
    if not isinstance(value, Value) or value.kind is not Kind.PARAMETER or not value.is_weight or value.tensor is None:
        return None
    return value if rank is None or len(value.shape or ()) == rank else None


def affine(node: Node) -> Affine | None:
    """The operands of an affine node, or None."""
    read = AFFINE.get(node.op)
    return read(node) if read is not None and node.outputs[0].shape else None


def offset(node: Node, outputs: Collection[Value] = ()) -> tuple[Value, float] | None:
    """What a constant that is added to the result of a linear map, channel by channel, can go into, and with which sign.

    Its own bias; where it has none, that of the addition, or the running mean of the batch norm, that is all that reads it: no other node,
    nor whoever reads the `outputs` of the program.
    """
    own = affine(node)
    if own is not None and own.bias is not None:
        return own.bias, 1.0
    if own is None or len(node.outputs[0].uses) != 1 or node.outputs[0] in outputs:
        return None
    (reader,) = node.outputs[0].uses
    found = affine(reader)
    if found is None or found.x is not node.outputs[0] or found.channel != own.channel:
        return None
    if reader.op in RUNNING_MEAN:
        mean = reader.args.get(RUNNING_MEAN[reader.op])
        alone = isinstance(mean, Value) and mean.is_weight and len(mean.uses) == 1
        train = reader.args.get("training") or reader.args.get("training_mode")
        return (mean, -1.0) if alone and not train else None  # type: ignore[return-value]
    alone = found.weight is None and found.bias is not None and len(found.bias.uses) == 1
    return (found.bias, 1.0) if alone and found.bias is not None else None
