"""The config of a pruned Hugging Face model: what `from_pretrained` builds from it is the pruned model, or it says that no single
config describes it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from graphprune.surgery.edits import Edit

_BOOKKEEPING = re.compile(r"^_|^training$|^gradient_checkpointing$|^generation_config$|^(hf_)?device_map$|^name_or_path$")


_DERIVED = ("head_dim",)  # read by models whose config class does not name them


def checkpoint_config(original: Any, pruned: Any, edits: Iterable[Edit]) -> tuple[Any, dict[str, dict[str, Any]] | None]:
    """A config to save with the pruned model; None beside it if its class builds exactly that model from it.

    If no config does, it is the original's, with what differs layer by layer for `per_layer_config`: `from_pretrained` then says that the
    layers differ instead of building another network.

    Args:
        original: the model before the cut; `pruned` is its copy after it.
        edits: the attributes that the cut changed.
    """
    edits = [edit for edit in edits if edit.attribute.startswith("config.")]
    if type(pruned) is type(original) and all(isinstance(edit.new, int) for edit in edits):
        config = copy.deepcopy(pruned.config)
        _edit_nested(original, config, edits)
        for candidate in (config, _spelled_out(config, pruned)):
            if _builds(type(original), candidate, pruned):
                return candidate, None
    config = copy.deepcopy(original.config)
    return config, _by_layer(edits, getattr(config, "num_hidden_layers", 0))


def edits_of_config(original: Any, pruned: Any, edits: Iterable[Edit]) -> list[Edit]:
    """What the config of the pruned model leaves open and its class would derive from sizes that changed, such as `head_dim`.

    With it transformers' own `save_pretrained` writes a folder that `from_pretrained` reads, where any config does.
    """
    edits = list(edits)
    if not any(edit.attribute.startswith("config.") for edit in edits) or not hasattr(getattr(pruned, "config", None), "to_dict"):
        return []
    config, layers = checkpoint_config(original, pruned, edits)
    if layers is not None:
        return []
    before = vars(pruned.config)
    spelled = {name: value for name, value in vars(config).items() if type(value) is int and before.get(name) is None}
    return [Edit("", f"config.{name}", None, value) for name, value in spelled.items()]


def _edit_nested(original: nn.Module, config: Any, edits: list[Edit]) -> None:
    """Configs inside the config (text and vision parts) follow the outermost module that each belongs to."""
    outermost: dict[int, str] = {}
    for path, module in original.named_modules():
        if hasattr(module, "config"):
            outermost.setdefault(id(module.config), path)
    for name, held in vars(original.config).items():
        for edit in edits:
            if hasattr(held, "to_dict") and edit.path == outermost.get(id(held)):
                setattr(getattr(config, name), edit.attribute.removeprefix("config."), edit.new)


def _spelled_out(config: Any, pruned: nn.Module) -> Any:
    """With values for what the config leaves open (`head_dim`, else derived from sizes that changed), where all modules agree on one."""
    found: dict[str, set[Any]] = {}
    for module in pruned.modules():
        for name, value in vars(module).items():
            if type(value) is int and (vars(config).get(name, 0) is None or (name in _DERIVED and not hasattr(config, name))):
                found.setdefault(name, set()).add(value)
    config = copy.deepcopy(config)
    for name, values in found.items():
        if len(values) == 1:
            setattr(config, name, values.pop())
    return config


def _by_layer(edits: list[Edit], count: int) -> dict[str, dict[str, Any]]:
    """Layer index -> attributes, where every module of the layer agrees."""
    layers: dict[str, dict[str, Any]] = {}
    for edit in edits:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", edit.path)
        name = edit.attribute.removeprefix("config.")
        if found and int(found[1]) < count and "." not in name and isinstance(edit.new, int):
            layers.setdefault(found[1], {})[name] = edit.new
    return layers


def _builds(cls: Any, config: Any, pruned: nn.Module) -> bool:
    """Does the class build, from this config once written and read, modules of the same types, shapes and plain attributes?"""
    for device in ("meta", "cpu"):
        try:
            read = type(config).from_dict(config.to_dict())  # config classes refuse some sizes: a Llama's width is a multiple of its heads
            with torch.device(device), torch.random.fork_rng(devices=[]):
                fresh = cls(read)
            break
        except Exception:  # code that reads values while it builds does not run on meta; sizes that no model has do not build at all
            continue
    else:
        return False
    theirs = dict(pruned.named_modules())
    ours = dict(fresh.named_modules())
    if theirs.keys() != ours.keys():
        return False
    for path, module in ours.items():
        other = theirs[path]
        if type(module) is not type(other) or _shapes(module) != _shapes(other) or _numbers(module) != _numbers(other):
            return False
    return True


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    held = [*module._parameters.items(), *module._buffers.items()]
    return {name: tuple(tensor.shape) for name, tensor in held if tensor is not None}


def _numbers(module: nn.Module) -> dict[str, Any]:
    def plain(value: Any) -> bool:
        return value is None or isinstance(value, (int, float, str)) or (isinstance(value, (tuple, list)) and all(map(plain, value)))

    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(module).items() if plain(v) and not _BOOKKEEPING.search(k)}
