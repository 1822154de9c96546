"""Layer after layer: all batches stand before one layer at a time, so that a layer is fitted to what the layers before it now give.

The batches advance through the graph in lock step, node by node. Only what is still to be read is alive, so the memory is that of the
widest cut through one block, for all batches; weights are read when their node comes up and forgotten after their last use, so that a
network larger than the device is passed from its files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration.batches import batches
from graphprune.calibration.taps import Finite, all_shards, timed
from graphprune.execute.interpreter import Execution, Tensors, last_use, last_weights
from graphprune.linear_maps import LinearMap, linear_maps
from graphprune.program import Program, Value

Decide = Callable[[LinearMap, Tensor, Any], Tensor | None]  # (layer, its weight, statistics of its inputs) -> the new weight


def layerwise(
    program: Program,
    data: Any,
    decide: Decide,
    *,
    make: Callable[[], Any] | None,
    only: Iterable[Value] | None = None,
    inputs: str = "pruned",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    load: Callable[[Value], Tensor] | None = None,
) -> None:
    """Call `decide` for the weight of every linear map, in topological order; a weight with several uses at its first.

    Args:
        make: an empty accumulator of rows (`Moments`, `Gram`) for the inputs of one layer; None passes None to `decide` and runs nothing.
        only: the weights to decide on.
        inputs: "pruned": later layers read what earlier ones give with their new weights; "dense": what they gave with the old ones.
        load: reads a weight that the program holds no data of (meta device); by default the program's `reader`.

    Raises:
        InvalidInput: an activation is not finite.
    """
    layers = linear_maps(program)
    wanted = {linear.weight for linear in layers.values()} if only is None else set(only)
    replaced: dict[Value, Tensor] = {}
    if load is None and program.reader is not None:
        load, device = program.reader, device or program.reader.device
    tensors = Tensors(replaced, dtype, device, load)
    if make is None:
        for layer in layers.values():
            if layer.weight in wanted:
                wanted.discard(layer.weight)
                decide(layer, tensors[layer.weight], None)
                tensors.forget(layer.weight)
        return
    ends, weight_ends = last_use(program), last_weights(program)
    with torch.no_grad():
        executions = [Execution(program, flat, tensors) for flat, _ in batches(program, data)]
        nodes, finite = list(program.nodes), Finite()
        statistics: Any = None
        read: Any = None
        for i, node in enumerate(timed(nodes, nodes, "layers")):
            linear = layers.get(node)
            if linear is not None and linear.weight in wanted:
                wanted.discard(linear.weight)
                if statistics is None or linear.reads != read:  # layers side by side read the same
                    statistics, read = make(), linear.reads
                    for execution in executions:
                        args = execution.arguments(node)
                        finite.watch(node, args[linear.operand])
                        statistics.update(*linear.rows(args))
                    finite.settle()
                    all_shards({0: statistics})
                new = decide(linear, tensors[linear.weight], statistics)
                if new is not None and inputs == "pruned":
                    replaced[linear.weight] = new
                    tensors.forget(linear.weight)
            if not wanted:
                return  # what follows decides nothing
            for execution in executions:
                execution.step(node)
                execution.forget(ends.get(i, ()))
            for value in weight_ends.get(node, ()):
                tensors.forget(value)
                replaced.pop(value, None)
