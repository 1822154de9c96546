"""Repairs that match moments: the pruned network follows the original batch by batch, and every bias or batch norm takes up the difference.

Both networks see the same data, so that the noise of a small sample cancels, and the pruned one goes on with what was corrected, so that a
later layer does not correct an earlier one's error a second time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration import batches
from graphprune.execute.interpreter import Compute, run
from graphprune.program import Node, Program, Value
from graphprune.repair.affine import affine
from graphprune.surgery.cut import Cut

ENOUGH = 400  # values per channel that moments are taken over where the data are drawn
MOST_ROUNDS = 32

# op -> arguments: operand, scale, bias, running mean, running variance
BATCH_NORM: Mapping[tuple[str, str], tuple[str, str, str, str, str]] = {
    ("aten", "batch_norm"): ("input", "weight", "bias", "running_mean", "running_var"),
    ("", "BatchNormalization"): ("X", "scale", "B", "input_mean", "input_var"),
}


def working_dtype(program: Program) -> torch.dtype | None:
    """What to compute statistics in: float32 where weights are narrower."""
    narrow = any(v.is_weight and v.dtype is not None and v.dtype.itemsize < 4 for v in program.weights.values())
    return torch.float32 if narrow else None


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector shaped to broadcast along one axis."""
    return vector.reshape([-1 if a == axis % rank else 1 for a in range(rank)])


def kept(x: Tensor, cut: Cut, value: Value, axis: int, dim: int = 0) -> Tensor:
    """`x` along `dim` at the positions of one axis of `value` that the cut keeps."""
    keep = cut.keep(value, axis % len(value.shape or ()))
    return x if keep is None else x.index_select(dim, torch.from_numpy(keep).to(x.device))


def _others(x: Tensor, axis: int) -> list[int]:
    return [a for a in range(x.dim()) if a != axis % x.dim()]


def bias(program: Program, cut: Cut, pruned: Program, data: Any) -> dict[str, Tensor]:
    """Mean-bias compensation: every bias takes up what its layer's mean result lost.

    What removed units contributed on average to a layer is the shift of the layer's mean, channel by channel (Nagel et al. 2019, arXiv
    1906.04721, section 4.2, there for rounding errors; An et al. 2023, arXiv 2312.11983, for removed channels).
    """
    watched = {node.name: node for node in program.nodes if (found := affine(node)) is not None and found.bias is not None}
    if not watched:
        return {}
    shift: dict[str, list[Tensor]] = {}
    dtype = working_dtype(program)
    for inputs, _ in batches(program, data):
        means: dict[str, Tensor] = {}

        def observe(node: Node, args: Mapping[str, Any], compute: Compute, means: dict[str, Tensor] = means) -> tuple[Any, ...]:
            results = compute(args)
            if node.name in watched:
                out, axis = results[0], affine(node).channel  # type: ignore[union-attr]
                means[node.name] = kept(out.mean(_others(out, axis)), cut, node.outputs[0], axis)
            return results

        def correct(node: Node, args: Mapping[str, Any], compute: Compute, means: dict[str, Tensor] = means) -> tuple[Any, ...]:
            results = compute(args)
            found = affine(node) if node.name in means else None
            if found is None or found.bias is None:
                return results
            out = results[0]
            delta = means[node.name] - out.mean(_others(out, found.channel))
            shift.setdefault(found.bias.name, []).append(delta)
            return (out + along(delta, found.channel, out.dim()), *results[1:])

        run(program, inputs, intercept=observe, dtype=dtype)
        run(pruned, inputs, intercept=correct, dtype=dtype)
    return {name: pruned.weights[name].tensor.detach() + torch.stack(found).mean(0) for name, found in shift.items()}  # type: ignore[union-attr]


def batch_norm(program: Program, cut: Cut, pruned: Program, data: Any = None) -> dict[str, Tensor]:
    """Re-estimates the running statistics of batch norms.

    A mean moves by the difference between pruned and original network, a variance by their ratio: with much data this is plain
    re-estimation (Li et al. 2020, arXiv 2007.02491), with little it is less noisy. Without data, every batch norm of both networks puts out
    what its own scale and bias say, as independent normal numbers, so that each is judged by the layers since the one before it.
    """
    names = {node.name for node in program.nodes if node.op in BATCH_NORM and not node.args.get("training")}
    if not names:
        return {}
    means: dict[str, list[Tensor]] = {}  # name of a running mean -> its moves
    spreads: dict[str, list[tuple[Tensor, Tensor]]] = {}  # name of a running variance -> (of the pruned, of the original network)
    dtype = working_dtype(program)
    for index, inputs in _inputs(program, data, names):
        moments: dict[str, tuple[Tensor, Tensor]] = {}

        def drawn(node: Node, args: Mapping[str, Any], shape: torch.Size, index: int = index) -> Tensor:
            """What the batch norm puts out if its statistics are right, at the original shape."""
            generator = torch.Generator().manual_seed(zlib.crc32(f"{index} {node.name}".encode()))
            return torch.randn(shape, generator=generator)

        def observe(node: Node, args: Mapping[str, Any], compute: Compute, moments: dict = moments) -> tuple[Any, ...]:
            if node.name not in names:
                return compute(args)
            operand, scale, offset, _, _ = BATCH_NORM[node.op]
            x, value = args[operand], node[operand]
            found = torch.var_mean(x, _others(x, 1), correction=0)
            moments[node.name] = kept(found[1], cut, value, 1), kept(found[0], cut, value, 1)
            if data is not None:
                return compute(args)
            noise = drawn(node, args, x.shape).to(x)
            moments[node.name] += (kept(noise, cut, node.outputs[0], 1, 1),)  # type: ignore[assignment]
            return (_affine(noise, args[scale], args[offset]),)

        def correct(node: Node, args: Mapping[str, Any], compute: Compute, moments: dict = moments) -> tuple[Any, ...]:
            if node.name not in moments:
                return compute(args)
            operand, scale, offset, running_mean, running_var = BATCH_NORM[node.op]
            x = args[operand]
            var, mean = torch.var_mean(x, _others(x, 1), correction=0)
            old_mean, old_var, *noise = moments[node.name]
            means.setdefault(node[running_mean].name, []).append(mean - old_mean)
            spreads.setdefault(node[running_var].name, []).append((var, old_var))
            if noise:
                return (_affine(noise[0], args[scale], args[offset]),)
            moved = {running_mean: args[running_mean] + mean - old_mean, running_var: args[running_var] * _ratio(var, old_var)}
            return compute({**args, **moved})

        run(program, inputs, intercept=observe, dtype=dtype)
        run(pruned, inputs, intercept=correct, dtype=dtype)
    out: dict[str, Tensor] = {}
    for name, moves in means.items():
        out[name] = pruned.weights[name].tensor.detach() + torch.stack(moves).mean(0)  # type: ignore[union-attr]
    for name, pairs in spreads.items():
        var, old_var = (torch.stack(column).mean(0) for column in zip(*pairs))
        out[name] = pruned.weights[name].tensor.detach() * _ratio(var, old_var)  # type: ignore[union-attr]
    return out


def _inputs(program: Program, data: Any, names: set[str]) -> Iterator[tuple[int, list[Any]]]:
    """Numbered inputs; without data, normal numbers with mean and deviation of the example inputs, as often as the smallest norm needs."""
    if data is not None:
        yield from ((i, inputs) for i, (inputs, _) in enumerate(batches(program, data)))
        return
    shapes = [node.outputs[0].shape or (0, 0) for node in program.nodes if node.name in names]
    smallest = min((prod(shape) // shape[1] for shape in shapes), default=0)
    for i in range(min(MOST_ROUNDS, -(-ENOUGH // smallest)) if smallest else 0):
        generator = torch.Generator().manual_seed(i)
        yield i, [_redrawn(x, generator) for x in program.example_inputs]


def _redrawn(x: Any, generator: torch.Generator) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x.mean() + noise * x.std(correction=0)


def _affine(noise: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    out = noise if scale is None else noise * along(scale, 1, noise.dim())
    return out if offset is None else out + along(offset, 1, noise.dim())


def _ratio(var: Tensor, old: Tensor) -> Tensor:
    """One where the original never varies."""
    return torch.where(old > 1e-12, var / old.clamp_min(1e-12), torch.ones_like(old)).clamp_min(1e-4)
