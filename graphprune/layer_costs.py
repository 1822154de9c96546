"""What every layer costs before and after a cut, for the report: width, parameters and MACs exactly, time as measured.

A layer is a module path (of an ONNX file: the module path in its node names, else the node). Times are those of single ops run one by one
in PyTorch, the two networks in turns, so they show where time goes; a runtime that fuses ops is faster than their sum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphprune import costs
from graphprune.costs import MACS
from graphprune.errors import UnsupportedOp
from graphprune.execute.interpreter import Compute, run
from graphprune.program import Kind, Node, Program, Value
from graphprune.report import LayerCost
from graphprune.surgery.cut import Cut

LOOK_UPS = {("aten", "embedding"), ("aten", "embedding_bag"), ("", "Gather")}  # rows of a weight come out as they are
ROUNDS = 5  # timed runs of each network, after one that warms up

Times = Mapping[str, tuple[float, float]]  # node name -> median ms before, after


@dataclass
class _Layer:
    """Sums over the nodes of one layer; each pair is (before, after)."""

    op: str
    op_macs: int = -1
    params: list[int] = field(default_factory=lambda: [0, 0])
    macs: list[int] = field(default_factory=lambda: [0, 0])
    width: list[int] | None = None
    ms: list[float] | None = None


def layer_costs(program: Program, cut: Cut, times: Times | None = None) -> tuple[LayerCost, ...]:
    """One row per layer, in the order in which they first run."""
    before, after = ({row.name: row for row in costs.by_node(program, it)} for it in (None, cut))
    weights = _from_weights(program)
    layers: dict[str, _Layer] = {}
    for node in program.walk():
        name = node.scope or node.name
        layer = layers.setdefault(name, _Layer(node.op_type))
        pair = [before[node.name].cost, after[node.name].cost if node.name in after else costs.Cost(0, 0, 0)]
        for i, found in enumerate(pair):
            layer.params[i] += found.params
            layer.macs[i] += found.macs
        if pair[0].macs > layer.op_macs and (pair[0].macs or pair[0].params):
            layer.op, layer.op_macs = node.op_type, pair[0].macs  # the op that stands for the layer is the costliest
            axis = _output_axis(node, weights)
            if axis is not None:
                out = node.outputs[0]
                assert out.shape is not None
                layer.width = [out.shape[axis], cut.shape(out)[axis] if node.name in after else 0]
        if times and node.name in times:
            layer.ms = [a + b for a, b in zip(layer.ms or [0.0, 0.0], times[node.name])]
    return tuple(LayerCost(name, it.op, _pair(it.params), _pair(it.macs), _pair(it.width), _pair(it.ms)) for name, it in layers.items())


def _pair(it: Sequence[Any] | None) -> Any:
    return None if it is None else (it[0], it[1])


def _from_weights(program: Program) -> set[Value]:
    """Values computed from weights alone: a transposed matrix is still the weight of the product that reads it."""
    found = {v for v in program.weights.values() if v.is_weight}
    for node in program.walk():
        if node.inputs and not node.blocks and all(v in found or v.kind is Kind.CONSTANT for v in node.inputs):
            found.update(node.outputs)
    return found


def _output_axis(node: Node, weights: set[Value]) -> int | None:
    """The axis of a node's result that a weight produces: the width of the layer."""
    out = node.outputs[0]
    read = [v for v in node.inputs if v in weights and v.shape and len(v.shape) >= 2]
    if not (node.op in MACS or node.op in LOOK_UPS) or not read or not out.shape:
        return None
    if "conv" in node.op_type.lower():  # weights (o, i, ...), result (..., o, ...) with as many axes after o
        assert read[0].shape is not None
        return len(out.shape) - len(read[0].shape) + 1
    return len(out.shape) - 1


def op_times(before: Program, after: Program, seconds: float = 0.5) -> tuple[Times, str]:
    """Median time of every op of two networks with equal node names, run in turns for about `seconds`, and one line on how.

    The line says why nothing was measured when the times are empty. Neither weights nor the random state change.
    """
    tensors = [v.tensor for v in before.weights.values() if v.tensor is not None]
    device = next((t.device for t in tensors), torch.device("cpu"))
    if device.type == "meta" or any(isinstance(x, torch.Tensor) and x.is_meta for x in before.example_inputs):
        return {}, "not measured: the weights are on the meta device"
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    end = time.perf_counter() + seconds
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while not rounds or (len(rounds) <= ROUNDS and time.perf_counter() < end):
                rounds.append((_timed(before, device), _timed(after, device)))
    except (RuntimeError, UnsupportedOp) as error:  # an op that this device lacks in the weights' own dtype, or one without a lowering
        return {}, f"not measured: {str(error).strip().splitlines()[0]}"
    rounds = rounds[1:] or rounds

    def median(name: str, which: int) -> float:
        return statistics.median(pair[which].get(name, 0.0) for pair in rounds)  # a bypassed op takes no time

    times = {name: (median(name, 0), median(name, 1)) for name in rounds[0][0]}
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return times, f"{place}; each op run by itself in PyTorch, median of {len(rounds)} runs"


def _timed(program: Program, device: torch.device) -> dict[str, float]:
    """Milliseconds of every node outside control-flow bodies, in one run."""
    times: dict[str, float] = {}
    outer = set(program.nodes)

    def intercept(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        if node not in outer:
            return compute(args)
        start = time.perf_counter()
        result = compute(args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[node.name] = 1e3 * (time.perf_counter() - start)
        return result

    copies = {v: v.tensor.clone() for v in program.weights.values() if v.kind is Kind.BUFFER and v.tensor is not None}  # ops may write them
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in program.example_inputs]
    run(program, inputs, tensors=copies, intercept=intercept)
    return times
