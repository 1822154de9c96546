"""Changes to a module that are not tensors: attributes that hold a size. Recorded, so that loading can repeat them without a capture."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Size = int | tuple[int, ...] | str | None


@dataclass(frozen=True)
class Edit:
    """One attribute of one module; `attribute` is dotted where the size lies inside a config object or a sequence."""

    path: str
    attribute: str  # "out_features", "config.num_attention_heads", "split_sizes.0"
    old: Size
    new: Size

    def __str__(self) -> str:
        return f"{self.path}{'.' if self.path else ''}{self.attribute}: {self.old} -> {self.new}"


class Workspace:
    """Sets attributes on the modules of one network; every module whose config is edited gets a config of its own first."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules: dict[str, nn.Module] = dict(root.named_modules(remove_duplicate=False))
        self._own: set[tuple[int, str]] = set()

    def module(self, path: str) -> nn.Module:
        return self._modules[path]

    def replace(self, path: str, new: nn.Module) -> None:
        """Put another module in the place of one, under every name it has."""
        old = self._modules[path]
        for name, parent in list(self._modules.items()):
            for child, module in list(parent._modules.items()):
                if module is old and parent is not new:
                    parent._modules[child] = new
                    self._modules[f"{name}.{child}" if name else child] = new

    def set(self, path: str, attribute: str, size: Size) -> None:
        """Set one attribute, see `Edit.attribute`."""
        module = self._modules[path]
        first, *rest = attribute.split(".")
        if not rest:
            object.__setattr__(module, first, size)
            return
        held = getattr(module, first)
        if isinstance(held, (list, tuple)):
            object.__setattr__(module, first, _with_item(held, [int(key) for key in rest], size))
            return
        if (id(module), first) not in self._own:
            held = copy.copy(held)
            object.__setattr__(module, first, held)
            self._own.add((id(module), first))
        name, *keys = rest
        setattr(held, name, _with_item(getattr(held, name), [int(key) for key in keys], size) if keys else size)


def _with_item(sequence: Any, keys: list[int], size: Size) -> Any:
    items = list(sequence)
    items[keys[0]] = _with_item(items[keys[0]], keys[1:], size) if len(keys) > 1 else size
    return torch.Size(items) if isinstance(sequence, torch.Size) else type(sequence)(items)


def apply_edits(root: nn.Module, edits: Iterable[Edit]) -> None:
    """Set all attributes."""
    workspace = Workspace(root)
    for edit in edits:
        workspace.set(edit.path, edit.attribute, edit.new)


def set_tensors(root: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters and buffers by name."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if isinstance(module, nn.RNNBase):
            setattr(module, leaf, tensor)  # it lists its weights a second time
        elif leaf in module._parameters:
            module._parameters[leaf] = tensor  # type: ignore[assignment]
        else:
            module._buffers[leaf] = tensor
