"""Another basis for the residual stream: the principal directions of what its norms put out, the strongest first (SliceGPT).

Where every norm over the stream is an RMS norm, the network does not change when (1) the scale of each norm is folded into what reads it,
and (2) with Q orthogonal, writers become Q^T W, readers W Q and embedding rows e Q: an RMS norm without scale commutes with a rotation.
After that the last units of the stream carry least, and an ordinary cut of its `hidden` group removes them (Ashkboos et al. 2024, arXiv
2401.15024). There is one Q for the whole stream, so that no matrix is needed on the shortcuts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.axes import leaves_of
from graphprune.calibration import batches
from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import Compute, run
from graphprune.program import Node, Program, Value
from graphprune.surgery.cut import Cut
from graphprune.units import Group

SAME = {  # ops that leave vectors along the stream as they are
    *(("aten", op) for op in ("to", "_to_copy", "clone", "contiguous", "detach", "alias", "dropout", "slice", "select", "index_select")),
    *(("aten", op) for op in ("transpose", "view", "reshape", "unsqueeze", "squeeze", "expand")),
    *(("", op) for op in ("Identity", "Cast", "Slice", "Dropout")),
}  # fmt: skip
ADD = {("aten", "add"): ("self", "other"), ("aten", "add_"): ("self", "other"), ("", "Add"): ("A", "B")}
MULTIPLY = {("aten", "mul"): ("self", "other"), ("", "Mul"): ("A", "B")}
SQUARE = {("aten", "pow"): ("self", "exponent"), ("", "Pow"): ("X", "Y")}
MEAN = {("aten", "mean"), ("", "ReduceMean")}
RMS_NORM = {("aten", "rms_norm"): ("input", "weight"), ("", "RMSNormalization"): ("X", "scale")}


@dataclass
class Stream:
    """How a residual stream is written and read."""

    group: Group
    writers: dict[tuple[Value, int], None] = field(default_factory=dict)  # (weight, axis that is written)
    readers: dict[tuple[Value, int], Value | None] = field(default_factory=dict)  # (weight, axis) -> scale of the norm before it
    norms: dict[Node, tuple[Value, Value]] = field(default_factory=dict)  # node that applies a scale -> (what it scales, the scale)


def stream_of(program: Program) -> Stream:
    """The stream of a network, followed from its writers to its readers.

    Raises:
        InvalidInput: there is no group of kind `hidden`, or a node on the way does not commute with a rotation.
    """
    groups = [g for g in program.analysis.groups if g.kind == "hidden"]
    if not groups:
        raise InvalidInput("a rotation needs a residual stream that can be cut; this network has no group of kind hidden")
    group = max(groups, key=lambda g: (len(g.members), g.size))
    whole = np.arange(group.size)[:, None]
    if not all(np.array_equal(m.index, whole) for m in group.members):
        raise InvalidInput(f"group {group.name!r} is part of a wider axis in some weights; such a stream cannot be rotated")
    found = Stream(group)
    states: dict[Value, Any] = {}
    for node in program.nodes:
        state = _Step(program, found, states, node).state()
        if state is not None:
            states.update(dict.fromkeys((v for v in node.outputs if _along(program, v, group)), state))
    covered = {*found.writers, *found.readers, *((scale, 0) for _, scale in found.norms.values())}
    missing = [m.tensor for m in group.members if (m.value, m.axis) not in covered]
    if missing:
        raise InvalidInput(f"the stream {group.name!r} cannot be rotated: weight {missing[0]!r} lies along it in a way that is not known")
    scales = {scale for _, scale in found.norms.values()}
    for (weight, axis), scale in found.readers.items():
        if scale is not None and (weight, axis) in found.writers:
            raise InvalidInput(
                f"the stream {group.name!r} cannot be rotated: {weight.name!r} writes it and reads it after a norm (tied weights), so the "
                "norm's scale cannot be folded into it; untie them first"
            )
    if scales & {weight for weight, _ in (*found.writers, *found.readers)}:
        raise InvalidInput(f"the stream {group.name!r} cannot be rotated: a norm's scale is used as a weight, too")
    return found


def _along(program: Program, value: Value, group: Group) -> bool:
    return any(group.atom in leaves_of(axis) for axis in program.analysis.axes(value) or ())


STREAM, SQUARED = "stream", "squared"  # states of a value; a `Value` is the scale that it was multiplied with after a norm


@dataclass
class _Step:
    program: Program
    found: Stream
    states: dict[Value, Any]
    node: Node

    def state(self) -> Any:
        """The state of what the node puts out, None where nothing of it lies along the stream."""
        node, group = self.node, self.found.group
        touched = [v for v in (*node.inputs, *node.outputs) if _along(self.program, v, group)]
        if not touched:
            return None
        args, out = node.args, any(_along(self.program, v, group) for v in node.outputs)
        if node.op_type == "embedding" and args["weight"] in touched:
            return self._writes(args["weight"], 1)
        if node.op == ("", "Gather") and args["data"] in touched and args["data"].is_weight and args.get("axis", 0) == 0:
            return self._writes(args["data"], 1)
        if node.op == ("aten", "linear"):
            return self._linear(args["input"], args["weight"], args.get("bias"), 1, 0, out)
        if node.op == ("", "MatMul") and isinstance(args["B"], Value) and args["B"].is_weight and len(args["B"].shape) == 2:
            return self._linear(args["A"], args["B"], None, 0, 1, out)
        if node.op in RMS_NORM:
            x, scale = (args.get(name) for name in RMS_NORM[node.op])
            if isinstance(x, Value) and self.states.get(x) == STREAM and isinstance(scale, Value) and len(scale.shape) == 1:
                self.found.norms[node] = (x, scale)
                return scale
            return self._refuse("is no RMS norm with a scale, directly on the stream")
        if node.op in SAME and out:
            return self.states.get(node.inputs[0]) or self._refuse("moves something that is not the stream")
        if node.op in ADD:
            return self._adds([args[name] for name in ADD[node.op]])
        if node.op in SQUARE and self.states.get(args[SQUARE[node.op][0]]) == STREAM and args[SQUARE[node.op][1]] in (2, 2.0):
            return SQUARED
        if node.op in MEAN and not out and self.states.get(node.inputs[0]) == SQUARED:
            return None
        if node.op in MULTIPLY:
            return self._multiplies([args[name] for name in MULTIPLY[node.op]])
        return self._refuse("does not commute with a rotation" + (": only RMS norms do" if "norm" in node.op_type.lower() else ""))

    def _refuse(self, why: str) -> Any:
        where = self.node.scope or self.node.name
        raise InvalidInput(f"the stream {self.found.group.name!r} cannot be rotated: {self.node.op_type} at {where} {why}")

    def _writes(self, weight: Value, axis: int) -> str:
        self.found.writers[weight, axis] = None
        return STREAM

    def _linear(self, x: Value, weight: Value, bias: Any, reads: int, writes: int, out: bool) -> Any:
        group = self.found.group
        if _along(self.program, x, group):
            state = self.states.get(x)
            if state is None or state == SQUARED:
                self._refuse("reads something that is not the stream")
            scale = None if state == STREAM else state
            if self.found.readers.setdefault((weight, reads), scale) is not scale:
                self._refuse("reads the stream after two different norms")
        if not out:
            return None
        self._writes(weight, writes)
        if isinstance(bias, Value):
            self._writes(bias, 0)
        return STREAM

    def _adds(self, operands: list[Any]) -> Any:
        for x in operands:
            if isinstance(x, Value) and x.is_weight and _along(self.program, x, self.found.group):
                axes = [a for a, axis in enumerate(self.program.analysis.axes(x) or ()) if self.found.group.atom in leaves_of(axis)]
                self._writes(x, axes[0])
            elif not isinstance(x, Value) or self.states.get(x) != STREAM:
                self._refuse("adds something that is not part of the stream")
        return STREAM

    def _multiplies(self, operands: list[Any]) -> Any:
        inside = [x for x in operands if isinstance(x, Value) and _along(self.program, x, self.found.group)]
        moving = [x for x in inside if self.states.get(x) == STREAM]
        scales = [x for x in inside if x.is_weight and len(x.shape) == 1]
        if len(moving) == 1 and len(inside) == 1:
            return STREAM  # by a number per vector
        if len(moving) == 1 and len(scales) == 1 and len(inside) == 2:
            self.found.norms[self.node] = (moving[0], scales[0])
            return scales[0]
        return self._refuse("multiplies the directions of the stream by different numbers that are no norm's scale")


def principal(program: Program, stream: Stream, data: Any) -> Tensor:
    """(size, size) float64, orthogonal: columns are the principal directions of what the norms put out before their scale, descending."""
    size = stream.group.size
    second = torch.zeros(size, size, dtype=torch.float64)

    def intercept(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        if node in stream.norms:
            x = stream.norms[node][0]
            rows = next(args[name] for name, value in node.args.items() if value is x).detach().double().cpu().reshape(-1, size)
            rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            second.add_(rows.T @ rows)
        return compute(args)

    for inputs, _ in batches(program, data):
        run(program, inputs, intercept=intercept)
    values, vectors = torch.linalg.eigh(second)
    return vectors[:, values.argsort(descending=True, stable=True)]


def rotation(program: Program, data: Any = None, basis: Tensor | None = None) -> dict[str, Tensor]:
    """Weights, float64, by name: those of the same network with its stream in the basis of its principal directions.

    Args:
        data: calibration data; the example inputs when absent.
        basis: (size, size), orthogonal, in place of the principal directions.

    Raises:
        InvalidInput: the stream cannot be rotated, and what is in the way.
    """
    stream = stream_of(program)
    basis = principal(program, stream, data) if basis is None else basis
    new: dict[Value, Tensor] = {}

    def now(value: Value) -> Tensor:
        return new[value] if value in new else value.tensor.detach().double().cpu()

    for (weight, axis), scale in stream.readers.items():
        x = now(weight).movedim(axis, -1)
        x = x * scale.tensor.detach().double().cpu() if scale is not None else x
        new[weight] = (x @ basis).movedim(-1, axis)
    for weight, axis in stream.writers:
        if (weight, axis) not in stream.readers:  # tied, without a norm between: turned once
            new[weight] = (now(weight).movedim(axis, -1) @ basis).movedim(-1, axis)
    for _, scale in stream.norms.values():
        new[scale] = torch.ones(stream.group.size, dtype=torch.float64)
    return {value.name: tensor.contiguous() for value, tensor in new.items()}


def norm_width(program: Program, cut: Cut, pruned: Program, data: Any) -> dict[str, Tensor]:
    """Norm scales times sqrt(width before / after): norms over the stream go on dividing by its old width, as if what left were zero.

    The small number under the root grows in the same proportion. Where no such unit left there is nothing to do.
    """
    if not any(program.analysis.by_name[name].kind == "hidden" for name in cut.removed):
        return {}
    stream = stream_of(program)
    kept = stream.group.size - len(cut.removed.get(stream.group.name, ()))
    names = {scale.name for _, scale in stream.norms.values()}
    return {name: pruned.weights[name].tensor.detach() * math.sqrt(stream.group.size / kept) for name in names if name in pruned.weights}
