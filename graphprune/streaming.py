"""Checkpoints larger than the memory: weights are read from the folder's safetensors when they are needed, block by block, forgotten after
their last use, and the result is written file by file.

Calibration goes through the network once, all batches in step, so that what is on the device are the weights of one block and the
activations of one place. What a method finds (masks, new weights) waits on the disk beside the output.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.api import capture
from graphprune.calibration import reread
from graphprune.checkpoints import model_class, read_config, weight_files
from graphprune.decisions import decide, known_arguments
from graphprune.errors import InvalidInput
from graphprune.files import PathLike, atomic_dir
from graphprune.plan import Plan, SavedMasks
from graphprune.program import Program, Value
from graphprune.recipes import recipe_of
from graphprune.results import BUFFERS, save_record
from graphprune.sparsity import UPDATES
from graphprune.surgery import Cut, apply_cut
from graphprune.surgery.write_back import write_back

log = logging.getLogger("graphprune")

SHARD_BYTES = 2_000_000_000  # of one file of the result


class Shelf(MutableMapping[str, Tensor]):
    """Tensors in files of a folder: one is in memory while it is used."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._files: dict[str, Path] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        file = self._files.setdefault(name, self.folder / f"{len(self._files)}.safetensors")
        save_file({"it": tensor.detach().cpu().contiguous()}, file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor("it")

    def __delitem__(self, name: str) -> None:
        self._files.pop(name).unlink()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class FolderReader:
    """Reads weights of a checkpoint by name: what `Program.reader` is of a program whose weights stay in their files.

    Args:
        buffers: tensors that the code computes and no file holds.
        device: where tensors are put.
        shelves: a folder for what is found; it is made.
    """

    def __init__(self, folder: PathLike, buffers: Mapping[str, Tensor], device: torch.device | str, shelves: Path) -> None:
        self.device, self.buffers, self.shelves = torch.device(device), dict(buffers), shelves
        self.files: dict[str, tuple[Path, str]] = {}  # name -> file, and the name in it, which is another one for some tied weights
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                self.files.update({name: (file, name) for name in tensors.keys()})
        self._shelves = 0

    def stored(self, name: str) -> Tensor:
        """A tensor of the checkpoint, on the CPU."""
        if name in self.buffers:
            return self.buffers[name]
        path, written = self.files[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(written)

    def __call__(self, value: Value) -> Tensor:
        return self.stored(value.name).to(self.device, value.dtype)

    def shelf(self) -> Shelf:
        self._shelves += 1
        return Shelf(self.shelves / str(self._shelves))


@contextmanager
def _parameters_without_data() -> Iterator[None]:
    """Inside, modules are built with parameters on the meta device and buffers as they are."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # else it is tied to another one, and stays the same object
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def open_checkpoint(folder: PathLike, example_inputs: Any = None, *, device: torch.device | str = "cpu", shelves: PathLike) -> Program:
    """A checkpoint as a `Program` whose weights stay in their files; `graphprune.plan` takes it as it takes any other.

    Args:
        example_inputs: of the shape that calibration data will have; made up from the config when absent.
        device: where blocks are computed.
        shelves: a folder that does not exist yet, on a disk with room for what is found (masks: one byte for a weight; new weights).

    Raises:
        InvalidInput: the folder is no such checkpoint, or its tensors have other names than the module's.
    """
    cls, kind = model_class(folder), getattr(torch, str(read_config(folder).get("dtype") or read_config(folder).get("torch_dtype")), None)
    with _parameters_without_data(), torch.random.fork_rng(devices=[]):
        model = cls(cls.config_class.from_pretrained(folder, local_files_only=True)).eval()
    if isinstance(kind, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind)
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    model.to("meta")
    reader = FolderReader(folder, {}, device, Path(shelves))
    reader.buffers = {name: buffer for name, buffer in buffers.items() if name not in reader.files}
    inputs = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, example_inputs)
    program = capture(model, dict(inputs) if isinstance(inputs, Mapping) else inputs)
    for name in program.weights:
        other = [alias for alias, held in program.aliases.items() if held == name and alias in reader.files]
        if name not in reader.files and name not in reader.buffers and other:
            reader.files[name] = reader.files[other[0]]
    shapes = {name: value.shape for name, value in (*program.weights.items(), *model.state_dict().items())}
    for name, shape in shapes.items():
        if name not in reader.files and name not in reader.buffers and name not in program.aliases:
            raise InvalidInput(
                f"{folder} holds no tensor {name!r} of {list(shape or ())}: transformers renames or joins tensors of this class when it "
                "loads them. Load the model whole, and prune it with graphprune.compile"
            )
    program.reader = reader
    return program


def prune_checkpoint(
    folder: PathLike, out: PathLike, *, example_inputs: Any = None, device: torch.device | str = "cpu", **planning: Any
) -> Plan:
    """Prune a checkpoint that need not fit into any memory; `graphprune.load(out)` reads the result back.

    Neither device nor host ever holds the weights of more than a block or two. Nothing is proved here: `graphprune verify` does so where
    both networks fit. Repairs are those that come with masks; others are skipped, with a warning.

    Args:
        folder: a Hugging Face checkpoint in safetensors, in one file or many; out: a folder for the result, absent or an earlier result.
        example_inputs: by default the first item of the calibration data.
        planning: the arguments of `graphprune.compile` that say what goes (recipe, pruning_ratio, budget, sparsity, pattern, ...).

    Raises:
        InvalidInput, NothingToPrune, BudgetNotMet: as `graphprune.compile`; nothing is written then.
    """
    planning = known_arguments(planning)
    method = recipe_of(planning["recipe"]) if planning.get("recipe") is not None else None
    if method is not None and method.prepare:
        raise InvalidInput(f"recipe {method.name!r} rewrites all weights before it chooses; use graphprune.compile")
    data = planning["calibration_data"] = reread(planning.get("calibration_data"))
    if example_inputs is None and data is not None:
        example_inputs = data if isinstance(data, (Tensor, Mapping, tuple)) else next(iter(data), None)
    with atomic_dir(out, [folder]) as fresh:
        program = open_checkpoint(folder, example_inputs, device=device, shelves=fresh.parent / "shelves")
        made = decide(lambda: program, lambda program, **given: None, **planning)
        skipped = [name for name in made.plan.repair if name not in UPDATES and name != "bn"]
        if skipped:
            log.warning("weights are read one at a time, so the repair %s is skipped", ", ".join(skipped))
        _write(program, made.plan, made.solved or {}, fresh)
        if (Path(folder) / "generation_config.json").is_file():
            shutil.copy(Path(folder) / "generation_config.json", fresh)
    shapes = {name: program.weights[name].shape or () for name in made.plan.masks}
    return replace(made.plan, masks=SavedMasks(Path(out) / "plan.json", shapes))


def _write(program: Program, plan: Plan, solved: Mapping[str, Tensor], folder: Path) -> None:
    """The pruned checkpoint: each tensor read, masked, cut and written on its own."""
    reader: Any = program.reader
    cut = Cut(program.analysis, plan.resolve(program))
    written = write_back(program, cut, apply_cut(program, cut))
    if written.how != "module" or not set(written.substitutes.values()) <= {"table"}:
        raise InvalidInput(f"this cut cannot be written without running the network: {'; '.join(written.notes)}. Use graphprune.compile")

    def result(name: str) -> Tensor:
        value = program.weights.get(program.aliases.get(name, name))
        if value is None:  # nothing reads it
            return reader.stored(name)
        tensor = solved[value.name] if value.name in solved else reader.stored(value.name).to(value.dtype)
        if value.name in plan.masks:
            tensor = tensor * plan.masks[value.name]
        for axis, keep in cut.keeps(value).items():
            tensor = tensor.index_select(axis, torch.from_numpy(keep))
        return tensor.contiguous()

    tied = {alias: name for alias, name in program.aliases.items()}
    names = [name for name in written.module.state_dict() if name not in tied]
    _write_shards(names, result, folder)
    save_file({name: result(name).clone() for name in reader.buffers if name not in tied and name not in names}, folder / BUFFERS)
    save_record(folder, program.source.module, written, tied)
    plan.save(folder / "plan.json")


def _write_shards(names: list[str], read: Callable[[str], Tensor], folder: Path) -> None:
    """Files of at most `SHARD_BYTES` (or one tensor), and the index that names the file of each tensor."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if held:
            save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    for name in names:
        tensor = read(name)
        if sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    where: dict[str, str] = {}
    for i, members in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        where |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
