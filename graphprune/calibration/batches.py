"""Calibration data as the flat inputs of a program: tensors, tuples and dictionaries, cut into batches of the size it was captured with."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.errors import InvalidInput
from graphprune.program import Program

Batch = tuple[list[Any], Any]  # flat inputs of the program, and the item as the user gave it (labels included)


def batches(program: Program, data: Any = None) -> Iterator[Batch]:
    """Flat inputs for every batch of calibration data; the program's own example inputs when there are none.

    An axis that was captured with a fixed size must have that size; along axis 0 longer items are cut into pieces (a remainder is
    dropped), shorter ones are repeated.

    Args:
        data: an iterable of items, or one item: a tensor, a tuple of positional inputs, or a mapping by name. What follows the inputs
            (labels) is left to the loss.

    Raises:
        InvalidInput: a name is missing, a shape does not fit, or there is no item at all.
    """
    if data is None:
        yield list(program.example_inputs), None
        return
    items: Iterable[Any] = [data] if isinstance(data, (torch.Tensor, np.ndarray, Mapping, tuple)) else data
    found = False
    for item in items:
        for piece in _pieces(program, _tensors(item)):
            found = True
            yield piece
    if not found:
        raise InvalidInput("calibration_data is empty; give at least one batch (an iterator is read only once: pass a list)")


def reread(data: Any) -> Any:
    """The data in a form that can be read several times: an iterator is drained into a list."""
    return data if data is None or hasattr(data, "__len__") or isinstance(data, (torch.Tensor, Mapping, tuple)) else list(data)


def first_inputs(module: nn.Module, data: Any) -> tuple[Any, Any]:
    """Example inputs that the first item of the data gives, two samples at least, and the data with that item still in it.

    None for inputs where an item does not say which of its parts are labels (tuples), or where there is no item.
    """
    if isinstance(data, Iterator):
        begun = list(itertools.islice(data, 1))
        data = itertools.chain(begun, data)
    else:
        begun = [data] if isinstance(data, (torch.Tensor, np.ndarray, Mapping, tuple)) else list(itertools.islice(data, 1))
    item = _tensors(begun[0]) if begun else None
    if isinstance(item, dict):
        names = [name for name in inspect.signature(module.forward).parameters if not name.startswith("label")]
        item = {name: item[name] for name in names if isinstance(item.get(name), torch.Tensor)}
    tensors: list[Any] = [*item.values()] if isinstance(item, dict) else [item]
    if not tensors or not all(isinstance(x, torch.Tensor) and x.dim() for x in tensors):
        return None, data
    device = next((p.device for p in module.parameters()), None)
    single = all(len(x) == 1 for x in tensors)  # would be taken for a size that is always one
    return pytree.tree_map(lambda x: torch.cat([x, x] if single else [x]).to(device), item), data


def noise(program: Program, count: int, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Batches that stand for calibration data where there are none: normal numbers with mean and deviation of the example inputs, and
    integers drawn evenly from the range of the example's (masks of zeros and ones stay as they are).
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            numbers = torch.randn(x.shape, generator=generator).to(x)
            return x.mean() + numbers * x.std(correction=0).clamp_min(0.1)
        if x.dtype == torch.bool or x.dim() == 0 or x.numel() == 0 or int(x.max()) <= 1:
            return x
        return torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=generator).to(x)

    return [tuple(drawn(x) for x in program.example_inputs if isinstance(x, torch.Tensor)) for _ in range(count)]


def samples(program: Program, data: Any = None) -> Iterator[Batch]:
    """Every sample on its own, as a batch of copies of it: mean losses and their gradients are then those of the sample."""
    for inputs, item in batches(program, data):
        sizes = {x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim()}
        if len(sizes) != 1:  # no common axis of samples
            yield inputs, item
            continue
        size = sizes.pop()
        for i in range(size):

            def copies(leaf: Any, i: int = i) -> Any:
                whole = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size
                return leaf[i : i + 1].expand_as(leaf) if whole else leaf

            yield [copies(x) for x in inputs], pytree.tree_map(copies, item)


def _tensors(item: Any) -> Any:
    """Mappings of any class (a tokenizer's encoding) as dictionaries, arrays as tensors."""
    item = dict(item) if isinstance(item, Mapping) else item
    return pytree.tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, item)


def flat_inputs(program: Program, item: Any) -> list[Any]:
    """One item as the flat inputs of a program, in its order, before any check of shapes.

    Raises:
        InvalidInput: inputs are missing.
    """
    examples = program.example_inputs
    if isinstance(item, Mapping):
        return _by_name(program, item)
    given = list(item) if isinstance(item, (tuple, list)) else [item]
    wanted = [i for i, x in enumerate(examples) if isinstance(x, torch.Tensor)]
    flat = [x for x in pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]
    if len(flat) < len(wanted):
        names = ", ".join(program.inputs[i].name for i in wanted)
        raise InvalidInput(f"a batch of calibration_data has {len(flat)} tensors, but the model takes {len(wanted)} ({names})")
    out = list(examples)
    for i, x in zip(wanted, flat):
        out[i] = x
    return out


def _by_name(program: Program, item: Mapping[str, Any]) -> list[Any]:
    source = program.source
    if not hasattr(source, "graph_module"):
        names = [value.name for value in program.inputs]
        _check_names(names, names, item)
        return [item[name] for name in names]
    positional = list(inspect.signature(source.module.forward).parameters)[: len(source.args)]
    names = [*positional, *source.kwargs]
    examples = [*source.args, *source.kwargs.values()]
    needed = [name for name, x in zip(names, examples) if any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(x))]
    _check_names(needed, names, item)
    args = tuple(item.get(name, example) for name, example in zip(positional, source.args))
    kwargs = {name: item.get(name, example) for name, example in source.kwargs.items()}
    return pytree.tree_leaves((args, kwargs))


def _check_names(needed: list[str], names: list[str], item: Mapping[str, Any]) -> None:
    missing = [name for name in needed if name not in item]
    if missing:
        found, wanted = ", ".join(map(str, item)), ", ".join(names)
        raise InvalidInput(f"calibration_data has the keys {found}, but the model also needs {', '.join(missing)}; its inputs are {wanted}")


def _pieces(program: Program, item: Any) -> Iterator[Batch]:
    inputs = flat_inputs(program, item)
    if len(inputs) != len(program.inputs):
        raise InvalidInput(f"a batch of calibration_data has {len(inputs)} inputs, the model was captured with {len(program.inputs)}")
    length = batch = None
    for value, x, example in zip(program.inputs, inputs, program.example_inputs):
        if not isinstance(example, torch.Tensor) or not isinstance(x, torch.Tensor):
            continue
        wrong = [a for a in range(1, min(x.dim(), example.dim())) if a not in value.dynamic and x.shape[a] != example.shape[a]]
        if x.dim() != example.dim() or wrong:
            raise InvalidInput(
                f"calibration_data gives input {value.name!r} the shape {tuple(x.shape)}, the network was captured with "
                f"{tuple(example.shape)}; give batches of that shape, or capture with other example_inputs"
            )
        if x.dim() and 0 not in value.dynamic and x.shape[0] != example.shape[0]:
            length, batch = x.shape[0], example.shape[0]
    if batch is None or not length:
        yield [_like(x, example) for x, example in zip(inputs, program.example_inputs)], item
        return
    fixed = [x.shape[0] == length if isinstance(x, torch.Tensor) and x.dim() else False for x in inputs]
    for start in range(0, max(length - batch, 0) + 1, batch):
        rows = torch.arange(start, start + batch) % length
        flat = [_like(x[rows.to(x.device)] if cut else x, example) for x, cut, example in zip(inputs, fixed, program.example_inputs)]

        def along(leaf: Any, rows: torch.Tensor = rows) -> Any:
            return leaf[rows.to(leaf.device)] if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == length else leaf

        yield flat, pytree.tree_map(along, item)


def _like(x: Any, example: Any) -> Any:
    """On the device of the example (unless that holds no data), and of its dtype where both are floating."""
    if not isinstance(x, torch.Tensor) or not isinstance(example, torch.Tensor):
        return x
    device = x.device if example.device.type == "meta" else example.device
    return x.to(device, example.dtype if x.is_floating_point() and example.is_floating_point() else None)
