"""What differs between two model files: shapes, values, interface. Only the files are read; nothing is captured or run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.console import ConsoleRenderable
from rich.text import Text
from safetensors import safe_open

from graphprune.checkpoints import read_config, weight_files
from graphprune.errors import InvalidInput
from graphprune.files import PathLike
from graphprune.report import tables
from graphprune.report.record import TensorChange, changes


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, read only when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Contents:
    """What a model file holds."""

    tensors: Mapping[str, Stored]
    facts: Mapping[str, str]  # of the interface: inputs, outputs, opset; or of the config


@dataclass(frozen=True)
class Difference:
    """Two files compared by tensor name."""

    before: str
    after: str
    shapes: tuple[TensorChange, ...]
    values: tuple[str, ...]  # tensors of equal shape and different values
    equal: int  # tensors that are the same in both
    parameters: tuple[int, int]
    facts: Mapping[str, tuple[str, str]]  # what else differs

    @property
    def empty(self) -> bool:
        return not (self.shapes or self.values or self.facts)

    def __rich__(self) -> ConsoleRenderable:
        return self.view()

    def view(self, everything: bool = False) -> ConsoleRenderable:
        """A table of the differences, cut short unless `everything`."""
        if self.empty:
            return Text(f"no difference: {self.equal} tensors are equal")
        old, new = self.parameters
        line = f"{len(self.shapes)} tensors differ in shape, {len(self.values)} in values only, {self.equal} are equal"
        parts: list[ConsoleRenderable] = [Text(line), Text(f"tensor entries: {tables.count(old)} -> {tables.count(new)}")]
        if self.shapes:
            parts.append(tables.shapes(self.shapes, None if everything else 20))
        if self.values:
            shown = self.values if everything else self.values[:10]
            more = len(self.values) - len(shown)
            rows = [(tables.tail(name, 60),) for name in shown] + ([(f"... and {more} more (--all shows them)",)] if more else [])
            parts.append(tables.grid(("other values",), rows))
        if self.facts:
            parts.append(tables.grid(("", "before", "after"), [(name, *pair) for name, pair in self.facts.items()]))
        return tables.stack(parts)


def compare(before: PathLike, after: PathLike) -> Difference:
    """Read two `.onnx` files or two checkpoint folders and compare what they hold.

    Raises:
        InvalidInput: if one of them cannot be read.
    """
    if Path(before).is_dir() != Path(after).is_dir():
        raise InvalidInput(f"{before} and {after} name their tensors differently: compare two .onnx files or two folders")
    old, new = contents(before), contents(after)
    common = [name for name, it in old.tensors.items() if name in new.tensors and new.tensors[name].shape == it.shape]
    moved = tuple(name for name in common if not _same(old.tensors[name].read(), new.tensors[name].read()))
    return Difference(
        before=str(before),
        after=str(after),
        shapes=changes(_shapes(old), _shapes(new)),
        values=moved,
        equal=len(common) - len(moved),
        parameters=(_entries(old), _entries(new)),
        facts={key: pair for key, pair in _pairs(old.facts, new.facts).items() if pair[0] != pair[1]},
    )


def contents(path: PathLike) -> Contents:
    """Tensors and interface of an `.onnx` file or a checkpoint folder."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InvalidInput(f"{path} does not exist")
    return _onnx(path)


def _folder(path: Path) -> Contents:
    found = {}
    for file in weight_files(path):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():
                found[name] = Stored(tuple(tensors.get_slice(name).get_shape()), partial(_read, file, name))
    config = read_config(path)
    facts = {key: str(value) for key, value in config.items() if isinstance(value, (int, float, str)) and not key.startswith("_")}
    return Contents(found, facts)


def _read(file: Path, name: str) -> np.ndarray:
    with safe_open(file, framework="pt") as tensors:  # numpy has no bfloat16
        tensor = tensors.get_tensor(name)
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def _onnx(path: Path) -> Contents:
    try:
        model = ir.load(path)
        found = {name: Stored(tuple(tensor.shape.numpy()), tensor.numpy) for name, tensor in _tensors(model)}
    except Exception as error:  # protobuf raises its own kinds
        raise InvalidInput(f"{path} is not a readable ONNX file: {str(error).strip().splitlines()[0]}") from None
    facts = {f"opset {domain or 'ai.onnx'}": str(version) for domain, version in model.opset_imports.items()}
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    facts |= {f"input {v.name}": _type(v) for v in inputs} | {f"output {v.name}": _type(v) for v in model.graph.outputs}
    facts["nodes"] = str(sum(1 for _ in model.graph.all_nodes()))
    return Contents(found, facts)


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.size > 1:  # single numbers are literals of the graph
                yield str(node.outputs[0].name), tensor


def _type(value: ir.Value) -> str:
    return f"{value.dtype} {value.shape}"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _pairs(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {key: (old.get(key, "-"), new.get(key, "-")) for key in dict.fromkeys([*old, *new])}


def _shapes(it: Contents) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in it.tensors.items()}


def _entries(it: Contents) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in it.tensors.values())
