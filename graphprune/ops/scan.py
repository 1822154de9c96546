"""What the state-space scans share: operand shapes bound by the dim rule, the fake implementation and recomputed gradients."""

import re
from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from graphprune.errors import InvalidInput

_AXIS = re.compile(r"\([^)]*\)|\w+")
_LIBRARY = torch.library.Library("graphprune", "FRAGMENT")


def bind(rule: str, shapes: Sequence[Sequence[int] | None]) -> dict[str, int]:
    """The size of each letter of a dim rule; an absent operand is None or missing at the end.

    Raises:
        InvalidInput: an operand has another rank or size than the rule says.
    """
    rows = []  # (operand, axis, size)
    for operand, shape in zip(_sides(rule)[0], shapes):
        axes = _AXIS.findall(operand)
        if shape is not None and len(axes) != len(shape):
            raise InvalidInput(f"an operand of the scan '{rule}' has shape {tuple(shape)}, expected the {len(axes)} axes '{operand}'")
        rows += [(operand, axis, size) for axis, size in zip(axes, shape or ())]
    sizes: dict[str, int] = {}
    for operand, axis, size in sorted(rows, key=lambda row: "(" in row[1]):  # products last: then only one of their letters is unknown
        letters = axis.strip("()").split()
        known = prod(sizes.get(letter, 1) for letter in letters)
        for letter in letters:
            sizes.setdefault(letter, size // known)
        if (expected := prod(sizes[letter] for letter in letters)) != size:
            raise InvalidInput(f"operand '{operand}' of the scan '{rule}' has size {size} on axis '{axis}', expected {expected}")
    return sizes


def prepare(rule: str, *operands: Tensor | None) -> tuple[dict[str, int], list[Any]]:
    """The sizes of a scan, and its operands in the type it computes in."""
    dtype = compute_dtype(operands)
    return bind(rule, [None if t is None else t.shape for t in operands]), [None if t is None else t.to(dtype) for t in operands]


def compute_dtype(operands: Sequence[Tensor | None]) -> torch.dtype:
    """What a scan computes in and returns: float32, or float64 when any operand is."""
    return reduce(torch.promote_types, (t.dtype for t in operands if t is not None), torch.float32)


def define(name: str, rule: str, reference: Callable[..., tuple[Tensor, Tensor]]) -> CustomOpDef:
    """Registers `graphprune::<name>`, which runs `reference` on every device.

    Its gradient is an op as well, `graphprune::<name>_gradients`, which differentiates a recomputed forward: a traced backward holds one
    node, not the unrolled recurrence. There are no second derivatives.
    """
    op = torch.library.custom_op(f"graphprune::{name}", reference, mutates_args=())

    @op.register_fake
    def _(*operands: Tensor | None) -> tuple[Tensor, ...]:
        sizes = bind(rule, [None if t is None else t.shape for t in operands])
        shapes = [[prod(sizes[letter] for letter in axis.strip("()").split()) for axis in _AXIS.findall(side)] for side in _sides(rule)[1]]
        assert operands[0] is not None
        return tuple(operands[0].new_empty(shape, dtype=compute_dtype(operands)) for shape in shapes)

    def gradients(grads: list[Tensor], operands: list[Tensor | None]) -> list[Tensor]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
        with torch.enable_grad():
            outputs = reference(*leaves)
        return [g.contiguous() for g in torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads)]

    # CompositeExplicitAutograd and not `custom_op`: below the autograd keys, where a custom op runs, nothing can be differentiated.
    _LIBRARY.define(f"{name}_gradients(Tensor[] grads, Tensor?[] operands) -> Tensor[]")
    _LIBRARY.impl(f"{name}_gradients", gradients, "CompositeExplicitAutograd")

    @torch.library.register_fake(f"graphprune::{name}_gradients", lib=_LIBRARY)
    def _(grads: list[Tensor], operands: list[Tensor | None]) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in operands if t is not None]

    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        saved = iter(ctx.saved_tensors)
        operands = [next(saved) if present else None for present in ctx.present]
        found = iter(getattr(torch.ops.graphprune, f"{name}_gradients")(list(grads), operands))
        return tuple(next(found) if present else None for present in ctx.present)

    def setup_context(ctx, inputs: tuple[Tensor | None, ...], output: object) -> None:  # type: ignore[no-untyped-def]
        ctx.present = [t is not None for t in inputs]
        ctx.save_for_backward(*(t for t in inputs if t is not None))

    op.register_autograd(backward, setup_context=setup_context)
    return op


def _sides(rule: str) -> list[list[str]]:
    """Operands and results of a dim rule."""
    return [[operand.strip() for operand in side.split(",")] for side in rule.split("->")]
