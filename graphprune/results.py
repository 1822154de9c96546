"""Saves and reads back what a compile made: an ONNX file, or a folder of safetensors and JSON that holds all of a module but its code.

A folder holds `plan.json`, `report.json`, `certificate.json`, the state dict (`model.safetensors`) and `graphprune.json`: the sizes that
modules keep as attributes, tied names, and where non-persistent buffers are. A Hugging Face model comes with its `config.json` too and is
rebuilt from that; a cut that all layers share loads by `from_pretrained` as well. A plain module is rebuilt on the original's code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphprune.checkpoints import model_class, read_config, weight_files
from graphprune.errors import CaptureError, InvalidInput
from graphprune.files import PathLike, atomic_dir, atomic_path

FORMAT = 1
RECORD = "graphprune.json"
WEIGHTS, BUFFERS = "model.safetensors", "graphprune_buffers.safetensors"
INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GB; larger weights go into a file beside the model


def save_result(result: Any, path: PathLike) -> None:
    """Write a `Result`: an `.onnx` file where the name ends so, else a folder.

    Raises:
        InvalidInput: if `path` cannot be written, or the result has no form that fits it.
    """
    path, source = Path(path), result.program.source
    if path.suffix == ".onnx":
        origin = getattr(source, "path", None)
        with atomic_path(path, [origin] if origin else []) as file:
            model = result.pruned.source.model if hasattr(source, "model") else _exported(result, file)
            _save_onnx(model, file, _metadata(result))
    elif hasattr(source, "model"):
        raise InvalidInput(f"cannot write {path}: the network came as ONNX and is saved as ONNX; name a file that ends in .onnx")
    else:
        with atomic_dir(path) as folder:
            _save_module(result, folder)


def _metadata(result: Any) -> dict[str, str]:
    found = {"graphprune.plan": result.plan.hash}
    return found | ({"graphprune.certificate": result.certificate.to_json()} if result.certificate else {})


def _save_onnx(model: ir.Model, file: Path, metadata: Mapping[str, str]) -> None:
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    before = dict(model.metadata_props)
    model.metadata_props.update(metadata)
    try:
        if sum(t.nbytes for t in tensors) > INLINE_BYTES:
            ir.save(model, file, external_data=f"{file.name}.data")
        else:
            ir.save(ir.external_data.load_to_model(model), file)
    finally:
        model.metadata_props.clear()
        model.metadata_props.update(before)


def _exported(result: Any, file: Path) -> ir.Model:
    """The pruned module as ONNX, written by `torch.onnx.export`."""
    source = result.program.source
    try:
        program = torch.onnx.export(
            result.module.eval(), source.args, kwargs=dict(source.kwargs), dynamic_shapes=source.dynamic_shapes, dynamo=True, verbose=False
        )
    except Exception as error:  # it raises its own kinds
        reason = str(error).strip().splitlines()[0]
        name = type(result.module).__name__
        raise CaptureError(f"torch.onnx.export does not take the pruned {name}: {reason}; save to a folder instead") from error
    assert program is not None
    return program.model


def _save_module(result: Any, folder: Path) -> None:
    module: Any = result.module
    if type(module).__module__.startswith("graphprune.execute"):
        raise InvalidInput("the result is an edited graph without code of its own (the report says why); save it as .onnx")
    if hasattr(module, "save_pretrained") and hasattr(module, "config"):
        config = copy.deepcopy(module.config)
        config.architectures, config.dtype = [type(module).__name__], str(module.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if getattr(module, "generation_config", None) is not None:
            with suppress(ValueError):  # a generation config that contradicts itself is not ours to mend
                module.generation_config.save_pretrained(folder)
    stored, tied, seen = {}, {}, {}  # type: dict[str, Tensor], dict[str, str], dict[tuple, str]
    for name, tensor in module.state_dict().items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        stored[name] = _plain(tensor)
    extra = {name: _plain(buffer) for name, buffer in module.named_buffers() if name not in stored and name not in tied}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    save_file(extra, folder / BUFFERS)
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    record = {"format": FORMAT, "class": name, "tied": tied, "sizes": dict(_sizes(module))}
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    (folder / "report.json").write_text(result.report.to_json(), encoding="utf-8")
    if result.certificate:
        (folder / "certificate.json").write_text(result.certificate.to_json(), encoding="utf-8")


def _plain(tensor: Tensor) -> Tensor:
    """A copy that shares memory with nothing, as safetensors wants it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _sizes(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Per submodule, the attributes that can hold a size: whole numbers and tuples of them."""
    for path, owner in module.named_modules():
        found = {name: value for name, value in vars(owner).items() if _is_size(value)}
        if found:
            yield path, found


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list, torch.Size)):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int


def load_result(folder: PathLike, model: nn.Module | None = None) -> nn.Module:
    """The module that `save_result` wrote into a folder, or any Hugging Face checkpoint, in evaluation mode.

    Args:
        model: the original, for a plain module: its code is needed, its weights are not. Left as it is.

    Raises:
        InvalidInput: if the folder is damaged, of another format, or `model` is missing or another network.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInput(f"{folder} does not exist")
    if not (folder / RECORD).is_file():
        from graphprune.checkpoints import load_checkpoint

        return load_checkpoint(folder)
    record = _record(folder)
    if model is not None:
        shell = copy.deepcopy(model)
    elif (folder / "config.json").is_file():
        cls, config = model_class(folder), read_config(folder)
        with torch.device("meta"):
            shell = cls(cls.config_class.from_dict(config))
        _read_generation_config(shell, folder)
    else:
        raise InvalidInput(f"{folder} holds a {record['class']}: give the original module too, graphprune.load(path, model)")
    _fill(shell, record, folder)
    return shell.eval()


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder / RECORD} is not a record of graphprune: {error}") from None


def _read_generation_config(shell: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file() and hasattr(shell, "generation_config"):
        shell.generation_config = type(shell.generation_config).from_pretrained(folder)


def _fill(shell: nn.Module, record: Mapping[str, Any], folder: Path) -> None:
    """Put the saved sizes and tensors into a module of the same code."""
    weight_files(folder)
    owners = dict(shell.named_modules())
    for path, found in record["sizes"].items():
        for name, value in found.items() if path in owners else ():
            old = getattr(owners[path], name, None)
            if _is_size(old) and old != value:
                setattr(owners[path], name, type(old)(value) if isinstance(old, (tuple, list)) else value)  # type: ignore[call-overload]
    tensors = {**load_file(folder / WEIGHTS), **load_file(folder / BUFFERS)}
    placed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        placed[name] = _place(owners, name, tensor, folder)
    for name, first in record["tied"].items():
        _place(owners, name, placed[first], folder)
    known = {*tensors, *record["tied"]}
    missing = [name for name, it in (*shell.named_parameters(), *shell.named_buffers()) if it.is_meta or name not in known]
    if missing:
        raise InvalidInput(f"{folder} has no tensor for {missing[0]!r}: it was saved from another network")


def _place(owners: Mapping[str, nn.Module], name: str, tensor: Tensor, folder: Path) -> Tensor:
    path, _, attribute = name.rpartition(".")
    old = getattr(owners.get(path), attribute, None)
    if not isinstance(old, Tensor):
        raise InvalidInput(f"{folder} holds {name!r}, which this network does not have: it was saved from another one")
    if not isinstance(old, nn.Parameter):
        setattr(owners[path], attribute, tensor if old.is_meta else tensor.to(old.device))
        return tensor
    if not isinstance(tensor, nn.Parameter):  # a tied one comes as the parameter that it shares
        tensor = nn.Parameter(tensor if old.is_meta else tensor.to(old.device), old.requires_grad)
    setattr(owners[path], attribute, tensor)
    return tensor
