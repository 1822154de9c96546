"""From a method to masks and new weights, layer by layer; and from the masks of a plan back to weights."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration import layerwise, working_dtype
from graphprune.errors import InvalidInput, NothingToPrune, Reason
from graphprune.linear_maps import LinearMap, linear_maps
from graphprune.program import Program, Value
from graphprune.sparsity.methods import Weights
from graphprune.sparsity.patterns import NOfM, Pattern
from graphprune.surgery.cut import Cut

SMALLEST = 2  # a matrix with fewer inputs or outputs is left alone


def maskable(program: Program, ignore: Sequence[str] = (), targets: Sequence[str] = ()) -> list[LinearMap]:
    """The linear maps whose weights may get zeros, each weight once: all but those that put out the network's results, as in the papers.

    A weight that something else reads too (an embedding tied to the head) stays whole. `targets` names the only ones, output layers too.

    Raises:
        InvalidInput: a pattern names nothing.
    """
    layers = linear_maps(program)
    found: dict[Value, LinearMap] = {}
    for linear in layers.values():
        if all(use in layers for use in linear.weight.uses) and min(linear.matrix(linear.weight.tensor).shape[1:]) >= SMALLEST:
            found.setdefault(linear.weight, linear)
    names = {value: {value.name, *(alias for alias, name in program.aliases.items() if name == value.name)} for value in found}
    left_out = {value for pattern in _tuple(ignore) for value in _named(pattern, names)}
    if targets:
        wanted = {value for pattern in _tuple(targets) for value in _named(pattern, names)}
    else:
        last = {value for value, _, why in program.analysis.frozen_axes() if why.reason is Reason.OUTPUT}
        wanted = {value for value in found if value not in last} or set(found)
    return [linear for value, linear in found.items() if value in wanted and value not in left_out]


def _tuple(patterns: Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _named(pattern: str, names: Mapping[Value, set[str]]) -> list[Value]:
    """Weights that a name, a module path, a glob or "re:..." means."""
    if pattern.startswith("re:"):
        match: Callable[[str], Any] = re.compile(pattern[3:]).match
    elif any(c in pattern for c in "*?["):
        match = re.compile(fnmatch.translate(pattern)).match
    else:
        match = lambda name: name == pattern or name.startswith(pattern + ".")  # noqa: E731
    found = [value for value, known in names.items() if any(match(name) for name in known)]
    if not found:
        some = ", ".join(sorted(v.name for v in names)[:8])
        raise InvalidInput(f"no weight that can get zeros is named {pattern!r}; they are {some}, ...")
    return found


def solve_masks(
    program: Program,
    method: Weights,
    pattern: Pattern,
    sparsity: float | Mapping[str, float],
    *,
    data: Any = None,
    ignore: Sequence[str] = (),
    targets: Sequence[str] = (),
    device: torch.device | None = None,
    load: Callable[[Value], Tensor] | None = None,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Masks (True where kept) and new weights by name, in the shapes of the weights. Later layers are fitted to what earlier ones now give.

    Args:
        sparsity: fraction of zeros in every matrix, or by weight name; N:M patterns bring their own.
        data: calibration data; the example inputs when absent.
        load, device: see `graphprune.calibration.layerwise`. With a reader, what is found goes to its shelves.

    Raises:
        InvalidInput: a sparsity out of range, or activations that are not finite.
        NothingToPrune: no weight is left.
    """
    layers = maskable(program, ignore, targets)
    if isinstance(pattern, NOfM):
        layers = [linear for linear in layers if linear.matrix(linear.weight.tensor).shape[-1] >= pattern.of]
    if not layers:
        raise NothingToPrune(f"no weight is left that pattern {pattern} applies to")
    levels = {}
    for linear in layers:
        level = sparsity.get(linear.weight.name, 0.0) if isinstance(sparsity, Mapping) else sparsity
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level < 1:
            raise InvalidInput(f"sparsity is the fraction of zeros, at least 0 and less than 1, found {level!r}")
        levels[linear.weight] = level
    shelf = program.reader.shelf if program.reader is not None else dict
    masks, weights = shelf(), shelf()

    def decide(linear: LinearMap, weight: Tensor, statistic: Any) -> Tensor:
        matrix = linear.matrix(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
        new, keep = method.masked(matrix, statistic, pattern, levels[linear.weight], window=_window(linear))
        tensor = linear.tensor(new).to(weight.dtype)
        masks[linear.weight.name] = linear.tensor(keep).cpu()
        if method.update is not None:
            weights[linear.weight.name] = tensor.to("cpu" if device is not None or program.reader is not None else weight.device)
        return tensor

    wanted, dtype = [linear.weight for linear in layers], working_dtype(program, device)
    layerwise(program, data, decide, make=method.make, only=wanted, dtype=dtype, device=device, load=load)
    return masks, weights


def _window(linear: LinearMap) -> int:
    """Positions that tiles are apart by; a matrix of a convolution with groups is narrower than tiles are made for."""
    return linear.window if linear.groups == 1 else 1


def repair_masked(program: Program, masks: Mapping[str, Tensor], update: str, pattern: Pattern, data: Any) -> dict[str, Tensor]:
    """New weights under masks that are given, by name: "sequential" or "joint", see `graphprune.repair.obs`. With the pattern and the data
    that made the masks, they are the weights that were made with them.
    """
    method = Weights(None, need="gram", update=update)
    by_weight = {linear.weight: linear for linear in linear_maps(program).values() if linear.weight.name in masks}
    out: dict[str, Tensor] = {}

    def decide(linear: LinearMap, weight: Tensor, statistic: Any) -> Tensor:
        keep = linear.matrix(masks[linear.weight.name].to(weight.device))
        matrix = linear.matrix(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
        new, _ = method.masked(matrix, statistic, pattern, 0.0, keep, _window(linear))
        out[linear.weight.name] = linear.tensor(new).to(weight.dtype)
        return out[linear.weight.name]

    layerwise(program, data, decide, make=method.make, only=by_weight, dtype=working_dtype(program))
    return out


def masks_after(program: Program, cut: Cut, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks as they are after a cut, by the weights' names in `program.weights`.

    Raises:
        InvalidInput: a mask is of no weight, or of another shape.
    """
    after: dict[str, Tensor] = {}
    for name, mask in masks.items():
        value = _masked(program, name, mask)
        for axis, keep in cut.keeps(value).items():
            mask = mask.index_select(axis, torch.from_numpy(keep))
        after[value.name] = mask
    return after


def masked_tensors(program: Program, masks: Mapping[str, Tensor]) -> dict[Value, Tensor]:
    """The masked weights of a network before any cut, for its certificate."""
    found = {_masked(program, name, mask): mask for name, mask in masks.items()}
    return {value: value.tensor.detach() * mask.to(value.tensor.device) for value, mask in found.items()}


def _masked(program: Program, name: str, mask: Tensor) -> Value:
    value = program.weights.get(program.aliases.get(name, name))
    if value is None or value.tensor is None:
        raise InvalidInput(f"the plan masks the weight {name!r}, which this network does not have")
    if value.shape != tuple(mask.shape):
        raise InvalidInput(f"the plan's mask of {name!r} has shape {tuple(mask.shape)}, the weight {value.shape}")
    return value


def zeros(masks: Iterable[Tensor]) -> tuple[int, int]:
    """Entries that are masked, and all entries of masked weights."""
    sizes = [(int((~mask).sum()), mask.numel()) for mask in masks]
    return sum(a for a, _ in sizes), sum(b for _, b in sizes)
