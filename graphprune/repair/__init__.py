"""Repairs: changes of kept weights that make up for what left. They never change which units stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from graphprune.errors import InvalidInput
from graphprune.program import Kind, Program
from graphprune.repair.moments import batch_norm, bias
from graphprune.repair.refit import least_squares, removed_mean
from graphprune.repair.rotation import norm_width
from graphprune.surgery.cut import Cut

Repair = Callable[[Program, Cut, Program, Any], Mapping[str, Tensor]]  # (original, cut, pruned, data) -> new tensors by weight name

REPAIRS: dict[str, Repair] = {
    "bn": batch_norm, "bias": bias, "removed_mean": removed_mean, "least_squares": least_squares, "norm_width": norm_width,
}  # fmt: skip
DATA_FREE = ("bn",)


def check_repairs(names: Iterable[str], data: Any = None) -> None:
    """Refuse what is not known, and what has no data to work with.

    Raises:
        InvalidInput: which one, and what to do.
    """
    for name in names:
        if name not in REPAIRS:
            of_masks = " (those of masks come with recipes such as 'sparsegpt')" if name.startswith("obs") else ""
            raise InvalidInput(f"no repair is named {name!r}; known are {', '.join(REPAIRS)}{of_masks}")
        if data is None and name not in DATA_FREE:
            raise InvalidInput(f"repair {name!r} needs calibration_data; without data only {', '.join(DATA_FREE)} works")


def repaired(program: Program, cut: Cut, pruned: Program, names: Iterable[str], data: Any = None) -> Program:
    """`pruned` after the named repairs, one after the other. Tensors that change are new ones: nothing shared with the original is written.

    Args:
        data: calibration data that can be read several times, see `graphprune.calibration.batches`.

    Raises:
        InvalidInput: an unknown name, or no data where they are needed.
    """
    names = list(names)
    check_repairs(names, data)
    if data is not None and not hasattr(data, "__len__") and not isinstance(data, (Tensor, Mapping, tuple)):
        data = list(data)
    for name in names:
        for weight, tensor in REPAIRS[name](program, cut, pruned, data).items():
            replace_weight(pruned, weight, tensor)
    return pruned


def replace_weight(program: Program, name: str, tensor: Tensor) -> None:
    """Give a weight of a program that nobody else holds another tensor of the same shape; dtype, device and requires_grad stay."""
    value = program.weights[name]
    old = value.tensor
    assert old is not None and old.shape == tensor.shape, f"{name}: {tuple(tensor.shape)}"
    new = tensor.detach().to(old.device, old.dtype, copy=True)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    value.tensor = new
    graph_module = getattr(program.source, "graph_module", None)
    if graph_module is not None:
        for path in (name, *(alias for alias, held in program.aliases.items() if held == name)):
            owner, _, attribute = path.rpartition(".")
            part = graph_module.get_submodule(owner)
            if value.kind is Kind.PARAMETER:
                part.register_parameter(attribute, new)
            else:
                setattr(part, attribute, new)
        return
    target = next(source for source, found in program.source.values.items() if found is value)
    held = ir.tensor(np.ascontiguousarray(new.cpu().numpy()), name=target.name)
    if target.is_initializer():
        target.const_value = held
        return
    node = target.producer()
    assert node is not None and node.op_type == "Constant"
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", held)


__all__ = ["REPAIRS", "Repair", "check_repairs", "repaired", "replace_weight"]
