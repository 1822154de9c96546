"""One run over the calibration data that feeds every statistic asked for.

A tap says which nodes are watched and what adds up one run of each; several share one pass. Under `torch.distributed` every rank passes its
own shard of the data, and all ranks end with the statistics of the whole.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration.accumulators import Gram, Mean, Moments, Similarity
from graphprune.calibration.batches import batches
from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import Compute, Execution, Intercept, Tensors, last_use, last_weights, run
from graphprune.linear_maps import LinearMap, columns, linear_maps
from graphprune.program import Node, Program
from graphprune.units import INNER_UNITS, Role

log = logging.getLogger("graphprune")

Store = dict[Hashable, Any]  # what is observed (a weight, a branch) -> its accumulator
Observer = Callable[[Mapping[str, Any], tuple[Any, ...]], None]  # (arguments, results) of one run of a node


Tap = Callable[[Program, Store], Mapping[Node, Observer]]


def _rows(make: Callable[[], Any]) -> Tap:
    """Statistics of the rows that every weight multiplies, those of all its uses together."""

    def sites(program: Program, store: Store) -> Mapping[Node, Observer]:
        maps = linear_maps(program)
        uses = Counter(linear.weight for linear in maps.values())
        shared: dict[Any, Any] = {}  # maps side by side read the same, and have one accumulator
        watched: dict[Node, Observer] = {}
        for node, linear in maps.items():
            if uses[linear.weight] == 1 and linear.reads in shared:
                store[linear.weight] = shared[linear.reads]
                continue
            accumulator = store.setdefault(linear.weight, make())
            if uses[linear.weight] == 1:
                shared[linear.reads] = accumulator

            def observe(
                args: Mapping[str, Any], results: tuple[Any, ...], linear: LinearMap = linear, accumulator: Any = accumulator
            ) -> None:
                accumulator.update(*linear.rows(args))

            watched[node] = observe
        return watched

    return sites


def _similarities(program: Program, store: Store) -> Mapping[Node, Observer]:
    """Of every residual branch: what enters its addition beside it, and what leaves."""
    from graphprune.branches import branches

    def observer(branch: Any) -> Observer:
        accumulator = store.setdefault(branch.join, Similarity())
        name = next(key for key, value in branch.join.args.items() if value is branch.skip)

        def observe(args: Mapping[str, Any], results: tuple[Any, ...]) -> None:
            before, after = features_last(args[name]), features_last(results[0])
            accumulator.update(before, after)

        return observe

    return {branch.join: observer(branch) for branch in branches(program)}


def _stages(program: Program, store: Store) -> Mapping[Node, Observer]:
    """Of every block of residual branches: what enters it, and what leaves."""
    from graphprune.blocks import stages

    watched: dict[Node, Observer] = {}
    for stage in stages(program):
        accumulator = store.setdefault(stage.end, Similarity())
        name = next(key for key, value in stage.start.args.items() if value is stage.entry)
        held: dict[str, Tensor] = {}

        def enter(args: Mapping[str, Any], results: tuple[Any, ...], held: dict[str, Tensor] = held, name: str = name) -> None:
            held["entry"] = args[name].clone()  # a later node may write into it

        def leave(
            args: Mapping[str, Any], results: tuple[Any, ...], held: dict[str, Tensor] = held, accumulator: Similarity = accumulator
        ) -> None:
            accumulator.update(features_last(held.pop("entry")), features_last(results[0]))

        def pass_through(
            args: Mapping[str, Any], results: tuple[Any, ...], enter: Observer = enter, leave: Observer = leave
        ) -> None:
            enter(args, results)
            leave(args, results)

        if stage.start is stage.end:
            watched[stage.start] = pass_through
        else:
            watched[stage.start], watched[stage.end] = enter, leave
    return watched


CHUNK = 1 << 24  # entries of the products that exist at once


def _projected(program: Program, store: Store) -> Mapping[Node, Observer]:
    """Of every unit that a linear map reads by several columns (heads): mean over tokens of ||W[:, unit] x[unit]||_1."""
    wide: dict[Any, list[Any]] = {}
    for group in program.analysis.groups:
        for member in group.members if group.kind in INNER_UNITS else ():
            if member.role is Role.READER and member.index.shape[1] > 1:
                wide.setdefault(member.value, []).append((group.name, member))

    def observer(linear: LinearMap, members: list[Any]) -> Observer:
        for name, _ in members:
            store.setdefault((linear.weight, name), Mean())

        def observe(args: Mapping[str, Any], results: tuple[Any, ...]) -> None:
            rows, counts = linear.rows(args)
            weight = next(args[key] for key, value in linear.node.args.items() if value is linear.weight)
            matrix = linear.matrix(weight.detach())
            tokens = rows.new_tensor(rows.shape[1]) if counts is None else counts.sum()
            for name, member in members:
                index = torch.from_numpy(columns(linear, member.index)).flatten(1).to(rows.device)
                size = max(1, CHUNK // max(rows.shape[1] * matrix.shape[1], 1))
                found = [_lengths(rows, matrix, part) for part in index.split(size)]
                store[linear.weight, name].update(torch.cat(found), tokens)

        return observe

    return {
        node: observer(linear, at)
        for node, linear in linear_maps(program).items()
        if (at := [m for m in wide.get(linear.weight, ()) if m[1].axis == linear.input_axis])
    }


def _lengths(rows: Tensor, matrix: Tensor, index: Tensor) -> Tensor:
    """(units,): summed over groups and samples, ||matrix[:, unit] row[unit]||_1. index: (units, width)."""
    parts, weights = rows[..., index], matrix[..., index]  # (groups, samples, units, width), (groups, outputs, units, width)
    return torch.einsum("gsuw,gouw->gsuo", parts.float(), weights.float()).abs().sum((0, 1, 3))


def features_last(x: Tensor) -> Tensor:
    """Images have their channels second."""
    return x.movedim(1, -1) if x.dim() >= 4 else x


TAPS: Mapping[str, Tap] = {
    "moments": _rows(Moments), "gram": _rows(Gram), "similarity": _similarities, "stages": _stages, "projected": _projected,
}  # fmt: skip


def tapped(program: Program, data: Any, needs: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Store]:
    """The statistics named, by what they are of.

    Args:
        needs: names of `TAPS`.
        dtype: what to compute in; None for the dtypes of the program.

    Raises:
        InvalidInput: an activation is not finite.
    """
    found: dict[str, Store] = {name: {} for name in needs}
    watched: dict[Node, list[Observer]] = {}
    for name, store in found.items():
        for node, observer in TAPS[name](program, store).items():
            watched.setdefault(node, []).append(observer)

    finite, operands = Finite(), {node: linear.operand for node, linear in linear_maps(program).items()}

    def intercept(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        results = compute(args)
        if node in watched:
            if node in operands:
                finite.watch(node, args[operands[node]])
            for observe in watched[node]:
                observe(args, results)
        return results

    if program.reader is not None:
        _in_step(program, data, intercept, dtype, finite)
    else:
        for inputs, _ in timed(batches(program, data), data, "statistics"):
            run(program, inputs, intercept=intercept, dtype=dtype)
            finite.settle()
    for store in found.values():
        all_shards(store)
    return found


def _in_step(program: Program, data: Any, intercept: Intercept, dtype: torch.dtype | None, finite: Finite) -> None:
    """All batches advance together, so that every weight is read once and forgotten after its last use."""
    assert program.reader is not None
    tensors = Tensors(None, dtype, program.reader.device, program.reader)
    ends, weight_ends = last_use(program), last_weights(program)
    with torch.no_grad():
        executions = [Execution(program, flat, tensors, intercept) for flat, _ in batches(program, data)]
        for i, node in enumerate(timed(program.nodes, program.nodes, "statistics")):
            for execution in executions:
                execution.step(node)
                execution.forget(ends.get(i, ()))
            finite.settle()
            for value in weight_ends.get(node, ()):
                tensors.forget(value)


class Finite:
    """Are activations finite? On the CPU it looks at once, elsewhere when told to settle: to look is to wait for the device."""

    def __init__(self) -> None:
        self._seen: list[tuple[Node, Tensor]] = []

    def watch(self, node: Node, x: Any) -> None:
        """x: what the node reads."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return
        if x.device.type != "cpu":
            self._seen.append((node, torch.linalg.vector_norm(x, torch.inf)))  # NaN stays NaN
        elif not torch.isfinite(x).all():
            self._refuse(node, f" ({int((~torch.isfinite(x)).sum())} of {x.numel()} entries)")

    def settle(self) -> None:
        """Raises:
        InvalidInput: something seen since the last time was not finite.
        """
        seen, self._seen = self._seen, []
        found = torch.isfinite(torch.stack([largest.to(seen[0][1].device) for _, largest in seen])).tolist() if seen else []
        for (node, _), good in zip(seen, found):
            if not good:
                self._refuse(node, "")

    def _refuse(self, node: Node, count: str) -> None:
        raise InvalidInput(
            f"the input of {node.op_type} {node.scope or node.name} is not finite on the calibration data{count}; are the data right, "
            "and is the dtype wide enough?"
        )


def working_dtype(program: Program, device: torch.device | None = None) -> torch.dtype | None:
    """What statistics are computed in: float32 where weights are narrower, None for the network's own dtypes.

    Accelerators run a network in its own dtypes, many times as fast; accumulators are float32 all the same.
    """
    weights = [v for v in program.weights.values() if v.is_weight and v.tensor is not None]
    sizes = {v.dtype.itemsize for v in weights if v.dtype is not None}
    if device is None:
        device = program.reader.device if program.reader is not None else next((v.tensor.device for v in weights), torch.device("cpu"))
    return torch.float32 if sizes and min(sizes) < (4 if device.type == "cpu" else 2) else None


def timed(items: Iterable[Any], data: Any, doing: str) -> Iterable[Any]:
    """The items, and word of the time left once a second."""
    total = len(data) if hasattr(data, "__len__") and not isinstance(data, (Tensor, Mapping, tuple)) else None
    start = said = time.perf_counter()
    for i, item in enumerate(items):
        yield item
        now = time.perf_counter()
        if now - said > 1.0:
            said = now
            left = f" of {total}, {(now - start) / (i + 1) * max(total - i - 1, 0):.0f} s left" if total else ""
            log.info("%s: batch %d%s", doing, i + 1, left)


def all_shards(store: Mapping[Hashable, Any]) -> None:
    """Join the accumulators of all ranks, in the order of ranks, so that every rank ends with the same numbers."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_world_size() == 1:
        return
    for accumulator in {id(it): it for it in store.values()}.values():  # some have several names
        own = {name: part.device for name, part in vars(accumulator).items() if isinstance(part, Tensor)}
        shards: list[Any] = [None] * torch.distributed.get_world_size()
        on_host = _moved(accumulator, dict.fromkeys(own, torch.device("cpu")))  # another rank may not have this one's device
        torch.distributed.all_gather_object(shards, on_host)
        first = shards[0]
        for shard in shards[1:]:
            first.merge(shard)
        accumulator.__dict__.update(vars(_moved(first, own)))


def _moved(accumulator: Any, devices: Mapping[str, torch.device]) -> Any:
    """A copy with the named tensors elsewhere."""
    moved = copy.copy(accumulator)
    moved.__dict__.update({name: getattr(accumulator, name).to(device) for name, device in devices.items()})
    return moved
