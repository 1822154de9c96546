"""Saves and reads back what a compile made: an ONNX file, or a folder of safetensors and JSON that holds all of a module but its code.

A folder holds `plan.json`, `report.json`, `certificate.json`, the state dict (`model.safetensors`) and `graphprune.json`: what the cut
changed in the module besides tensors. A Hugging Face model comes with its `config.json` too and is rebuilt without further ado; a cut
that all layers share loads by `from_pretrained` as well. A plain module is rebuilt on the original's code. Where Python code gave way to a
piece of the edited graph, the original is captured and cut again, so the folder holds its example inputs too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphprune.capture import onnx_zeros
from graphprune.capture.torch_export import capture_torch, evaluating
from graphprune.checkpoints import load_checkpoint, model_class, weight_files
from graphprune.errors import CaptureError, InvalidInput
from graphprune.files import PathLike, atomic_dir, atomic_path
from graphprune.plan import Plan
from graphprune.silence import quiet_onnxscript
from graphprune.surgery import apply_cut
from graphprune.surgery.configs import checkpoint_config
from graphprune.surgery.cut import Cut
from graphprune.surgery.edits import Workspace
from graphprune.surgery.fallback import FREEDOMS, open_shapes, shapes_for
from graphprune.surgery.substitutes import substitute_for
from graphprune.surgery.write_back import write_back

FORMAT = 1
RECORD = "graphprune.json"
WEIGHTS, BUFFERS, INPUTS = "model.safetensors", "graphprune_buffers.safetensors", "graphprune_inputs.safetensors"
HINTS = ("AUTO", "DYNAMIC", "STATIC")  # what torch.export takes in place of a named axis
INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GB; larger weights go into a file beside the model


def save_result(result: Any, path: PathLike, compress: bool = False) -> None:
    """Write a `Result`: an `.onnx` file where the name ends so, else a folder. `compress`: see `capture.onnx_zeros`.

    Raises:
        InvalidInput: if `path` cannot be written, or the result has no form that fits it.
    """
    path, source = Path(path), result.program.source
    if compress and path.suffix != ".onnx":
        raise InvalidInput(f"cannot write {path}: only ONNX files hold compressed weights; name a file that ends in .onnx")
    if path.suffix == ".onnx":
        origin = getattr(source, "path", None)
        with atomic_path(path, [origin] if origin else []) as file:
            model = result.pruned.source.model if hasattr(source, "model") else exported(result.module, source)
            if compress:
                model = model.clone()
                onnx_zeros.compress(model)
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


def exported(module: nn.Module, source: Any) -> ir.Model:
    """A module as ONNX, written by `torch.onnx.export` with the inputs of a captured one.

    Raises:
        CaptureError: it does not take the module.
    """
    wanted: list[Any] = [shapes_for(module, source.dynamic_shapes, source.args, source.kwargs)]
    if source.dynamic_shapes is None:  # as many axes open as the network takes
        wanted = []
        for freedom in FREEDOMS:
            with suppress(InvalidInput):
                shapes = open_shapes(source.module, source.args, source.kwargs, freedom)
                wanted.append(shapes_for(module, shapes, source.args, source.kwargs))
    args, kwargs = tuple(source.args), dict(source.kwargs)
    if args and isinstance(args[-1], dict) and not kwargs:
        args = (*args, {})  # the exporter takes a last dict for the keywords
    for shapes in wanted:
        try:
            with evaluating(module), _exportable_experts(module), quiet_onnxscript():
                program = torch.onnx.export(module, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False)
            assert program is not None
            return _with_parameter_names(_with_input_names(program.model, source), module)
        except Exception as error:  # it raises its own kinds
            failure = error.__cause__ or error  # its own text is advice, with the colours of a terminal
    reason, name = str(failure).strip().splitlines()[0], type(module).__name__
    raise CaptureError(f"torch.onnx.export does not take {name}: {reason}; save to a folder instead") from failure


@contextmanager
def _exportable_experts(module: nn.Module) -> Iterator[None]:
    """Experts of transformers as batched products: neither their grouped kernel nor their loop has an ONNX form."""
    held = (getattr(m, "config", None) for m in module.modules())
    configs: dict[int, Any] = {id(config): config for config in held if getattr(config, "_experts_implementation", None)}
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, kind in before:
            config._experts_implementation = kind


def _with_input_names(model: ir.Model, source: Any) -> ir.Model:
    """Inputs are called as in the user's module: an edited graph takes `*args`."""
    placeholders = [n.name for n in source.graph_module.graph.nodes if n.op == "placeholder"]
    leaves = torch.utils._pytree.tree_leaves((source.args, source.kwargs))
    names = [n for n, leaf in zip(placeholders, leaves) if isinstance(leaf, Tensor)]
    if len(names) == len(model.graph.inputs) and not {*names} & {node_output.name for n in model.graph for node_output in n.outputs}:
        for value, name in zip(model.graph.inputs, names):
            value.name = name
    return model


def _with_parameter_names(model: ir.Model, module: nn.Module) -> ir.Model:
    """Weights that the exporter stored transposed under a number are called `<parameter>.T`."""
    parameters = dict(module.named_parameters())
    by_shape: dict[tuple, list[str]] = {}
    for name, parameter in parameters.items():
        if name not in model.graph.initializers and parameter.dim() in (2, 3) and parameter.dtype is not torch.bfloat16:
            by_shape.setdefault(tuple(parameter.mT.shape), []).append(name)
    for value in list(model.graph.initializers.values()):
        candidates = by_shape.get(tuple(value.shape or ()), []) if value.name not in parameters and value.const_value is not None else []
        array = value.const_value.numpy() if candidates and value.const_value is not None else None
        twin = next((n for n in candidates if array is not None and np.array_equal(array, parameters[n].detach().cpu().mT.numpy())), None)
        if twin is not None:
            del model.graph.initializers[value.name]  # type: ignore[arg-type]
            value.name = f"{twin}.T"
            model.graph.initializers[f"{twin}.T"] = value
    return model


def _save_module(result: Any, folder: Path) -> None:
    module, original, written = result.module, result.program.source.module, result.written
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
    source = result.program.source
    inputs, shapes = (_save_inputs(source, folder), source.dynamic_shapes) if _runs_graph(written) else (None, None)
    save_record(folder, original, written, tied, inputs, module, shapes)
    (folder / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    (folder / "report.json").write_text(result.report.to_json(), encoding="utf-8")
    if result.certificate:
        (folder / "certificate.json").write_text(result.certificate.to_json(), encoding="utf-8")


def save_record(
    folder: Path, original: Any, written: Any, tied: Mapping[str, str], inputs: Any = None, module: Any = None, shapes: Any = None
) -> None:
    """What `load_result` needs besides tensors: the config, and what the cut changed in the module."""
    module = written.module if module is None else module
    if hasattr(original, "save_pretrained") and hasattr(original, "config"):
        config, layers = checkpoint_config(original, module, written.edits)
        config.architectures, config.dtype = [type(original).__name__], str(original.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if layers:  # transformers says so, rather than build a network of other sizes
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"per_layer_config": layers}, indent=2) + "\n", encoding="utf-8")
        if getattr(module, "generation_config", None) is not None:
            with suppress(ValueError):  # a generation config that contradicts itself is not ours to mend
                module.generation_config.save_pretrained(folder)
    record = {
        "format": FORMAT,
        "class": f"{type(original).__module__}.{type(original).__qualname__}",
        "config": original.config.to_dict() if (folder / "config.json").is_file() else None,
        "tied": tied,
        "edits": [[edit.path, edit.attribute, edit.new] for edit in written.edits],
        "substitutes": [path for path, kind in written.substitutes.items() if kind == "table"],
        "inputs": inputs,
        "dynamic_shapes": _spelled_shapes(shapes),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")


def _runs_graph(written: Any) -> bool:
    return written.how == "graph" or not {"graph", "absent"}.isdisjoint(written.substitutes.values())


def _plain(tensor: Tensor) -> Tensor:
    """A copy that shares memory with nothing, as safetensors wants it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _save_inputs(source: Any, folder: Path) -> Any:
    """Writes the tensors among the example inputs; their nesting as JSON, with a tensor as its name."""
    tensors: dict[str, Tensor] = {}

    def spelled(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            tensors[f"input_{len(tensors)}"] = _plain(tree)
            return {"tensor": f"input_{len(tensors) - 1}"}
        if isinstance(tree, (list, tuple)):
            return {type(tree).__name__: [spelled(item) for item in tree]}
        if isinstance(tree, Mapping):
            return {"dict": {key: spelled(item) for key, item in tree.items()}}
        if tree is None or isinstance(tree, (bool, int, float, str)):
            return {"literal": tree}
        raise InvalidInput(f"an example input is a {type(tree).__name__}, which cannot be saved; save the result as .onnx")

    found = spelled([list(source.args), dict(source.kwargs)])
    save_file(tensors, folder / INPUTS)
    return found


def _spelled_shapes(tree: Any) -> Any:
    """`dynamic_shapes` as JSON holds them: names and bounds of axes, hints, and how they are nested."""
    if tree is None or isinstance(tree, (int, str)):
        return {"literal": tree}
    if isinstance(tree, (list, tuple)):  # torch.export tells them apart, as the arguments do
        return {"list" if isinstance(tree, list) else "tuple": [_spelled_shapes(item) for item in tree]}
    if isinstance(tree, Mapping):
        return {"dict": [[key, _spelled_shapes(item)] for key, item in tree.items()]}
    hint = next((name for name in HINTS if tree is getattr(torch.export.Dim, name)), None)
    if hint is not None:
        return {"hint": hint}
    if type(tree) is torch.export.Dim:
        return {"dim": [tree.__name__, int(tree.min), int(tree.max) if tree.max != torch.export.Dim("any").max else None]}
    raise InvalidInput(f"dynamic_shapes holds {tree!r}, which cannot be saved; give named Dims, or save the result as .onnx")


def _read_shapes(tree: Mapping[str, Any] | None) -> Any:
    if tree is None:
        return None
    ((kind, held),) = tree.items()
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_read_shapes(item) for item in held)
    if kind == "dict":
        return {key: _read_shapes(item) for key, item in held}
    if kind == "hint":
        return getattr(torch.export.Dim, held)
    if kind == "dim":
        return torch.export.Dim(held[0], min=held[1], **({} if held[2] is None else {"max": held[2]}))
    return held


def _read_inputs(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, held),) = tree.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "literal":
        return held
    if kind == "dict":
        return {key: _read_inputs(item, tensors) for key, item in held.items()}
    items = [_read_inputs(item, tensors) for item in held]
    return tuple(items) if kind == "tuple" else items


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
        return load_checkpoint(folder)
    record = _record(folder)
    weight_files(folder)
    if model is None and record["config"] is None:
        raise InvalidInput(f"{folder} holds a {record['class']}: give the original module too, graphprune.load(path, model)")
    if record["inputs"] is not None:
        module = _cut_again(model if model is not None else _built(folder, record, "cpu"), record, folder)
        _place_tensors(module, record, folder)
        return module.eval()
    module = copy.deepcopy(model) if model is not None else _built(folder, record, "meta")
    _place_tensors(module, record, folder)
    workspace = Workspace(module)
    for path, attribute, size in record["edits"]:
        workspace.set(path, attribute, tuple(size) if isinstance(size, list) else size)
    for path in record["substitutes"]:
        workspace.replace(path, substitute_for(workspace.module(path)) or workspace.module(path))
    return module.eval()


def _built(folder: Path, record: Mapping[str, Any], device: str) -> nn.Module:
    """The network before the cut, with weights of no meaning."""
    cls: Any = model_class(folder)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        module = cls(cls.config_class.from_dict(record["config"]))
    if (folder / "generation_config.json").is_file() and hasattr(module, "generation_config"):
        module.generation_config = type(module.generation_config).from_pretrained(folder)
    return module.eval()


def _cut_again(original: nn.Module, record: Mapping[str, Any], folder: Path) -> nn.Module:
    args, kwargs = _read_inputs(record["inputs"], load_file(folder / INPUTS))
    shapes = _read_shapes(record.get("dynamic_shapes"))  # absent in folders of earlier versions
    program = capture_torch(original, args, kwargs, shapes_for(original, shapes, args, kwargs))
    cut = Cut(program.analysis, Plan.load(folder / "plan.json").resolve(program))
    return write_back(program, cut, apply_cut(program, cut)).module


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder / RECORD} is not a record of graphprune: {error}") from None


def _place_tensors(module: nn.Module, record: Mapping[str, Any], folder: Path) -> None:
    """Put the saved tensors into a module of the same code, tied ones into every place they had.

    Raises:
        InvalidInput: if a tensor has no place, or a place no tensor.
    """
    owners = dict(module.named_modules(remove_duplicate=False))
    files = [file for file in weight_files(folder) if file.name != INPUTS]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    placed = {name: _place(owners, name, tensor, folder) for name, tensor in tensors.items()}
    for name, first in record["tied"].items():
        _place(owners, name, placed[first], folder)
    known = {*tensors, *record["tied"]}
    missing = [name for name, it in (*module.named_parameters(), *module.named_buffers()) if it.is_meta or name not in known]
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
