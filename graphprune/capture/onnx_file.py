"""An ONNX file -> `Program`: the file's own nodes, arguments under their newest schema names, weights shared with the file.

Shapes are found by running the graph twice, at two settings of its symbolic sizes. Weights and activations are on the meta device in
these runs, so that only shape arithmetic is computed, however large the model; where shapes depend on data, the runs use real numbers.
An axis whose size differs between the runs is dynamic; shape arithmetic that comes out the same in both is folded.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from graphprune.capture import onnx_zeros
from graphprune.capture.onnx_functions import FunctionBody, has_body
from graphprune.capture.onnx_shapes import Run, example_tensors, shape_runs
from graphprune.capture.onnx_types import TORCH_DTYPES, same, to_torch, torch_dtype
from graphprune.errors import InvalidInput
from graphprune.execute.onnx_ops import ONNX_OPS, lower
from graphprune.execute.onnx_recurrent import BODIES
from graphprune.program import Block, Kind, Node, Program, Value, leaves
from graphprune.rules.onnx_literals import LITERAL_OPERANDS

log = logging.getLogger("graphprune")

OLDEST_OPSET = 7  # numpy broadcasting, and no `broadcast` attribute


@dataclass(frozen=True, eq=False)
class OnnxSource:
    """The user's ONNX model as it was read; surgery edits a copy."""

    model: ir.Model
    path: Path | None = None
    values: Mapping[ir.Value, Value] = field(default_factory=dict)  # of the whole file, also what the program folds away


def capture_onnx(model: str | os.PathLike[str] | ir.Model | onnx.ModelProto, example_inputs: Any = None) -> Program:
    """View an ONNX model as a `Program`.

    Args:
        example_inputs: a tensor or array, a sequence of them, or a mapping by input name; made up when absent.

    Raises:
        InvalidInput: the file is missing, damaged, too old, or lacks its external data.
        CaptureError: no input sizes were found at which the model runs.
    """
    source = load_onnx(model)
    reader = _Reader(source.model)
    nodes, inputs, outputs = reader.read(source.model.graph)
    _settle_kinds(reader, nodes)
    _name_by_module(reader, nodes)
    examples, first, second = shape_runs(source.model, nodes, inputs, reader.weights, example_tensors(inputs, example_inputs))
    for value in inputs:
        value.dynamic |= _differing(first, second, value)
    _record(nodes, first, second)
    kept = _prune(nodes, outputs)
    live = {v for node in _walk(kept) for v in node.inputs} | set(outputs) | set(_block_outputs(kept))
    weights = {name: v for name, v in reader.weights.items() if v in live and v.kind is Kind.PARAMETER}
    source = replace(source, values=reader.values)
    program = Program(kept, tuple(inputs), tuple(outputs), weights, source, examples)
    for node in program.walk():
        for value in dict.fromkeys(node.inputs):
            value.uses.append(node)
    return program


def read_program(model: onnx.ModelProto) -> Program:
    """A model as it stands: no shapes are found, nothing is folded, no weight is told from a constant."""
    source = load_onnx(model)
    nodes, inputs, outputs = _Reader(source.model).read(source.model.graph)
    return Program(nodes, inputs, outputs, {}, source, ())


# --- loading ------------------------------------------------------------------------------------------------------------------


def load_onnx(model: str | os.PathLike[str] | ir.Model | onnx.ModelProto) -> OnnxSource:
    """The model behind a path or an object, checked for what a graph needs: a known opset, all weights present.

    Raises:
        InvalidInput: if it cannot be read.
    """
    path = None
    if isinstance(model, onnx.ModelProto):
        loaded = ir.from_proto(model)
    elif isinstance(model, ir.Model):
        loaded = model
    else:
        path = Path(model)
        if not path.is_file():
            raise InvalidInput(f"no ONNX file at {path}")
        try:
            loaded = ir.load(path)
        except Exception as error:  # protobuf and onnx_ir raise many types
            raise InvalidInput(f"{path} is not a readable ONNX model (truncated or of another format): {_first_line(error)}") from None
    where = path or "the ONNX model"
    if not len(loaded.graph) and not loaded.graph.outputs:
        raise InvalidInput(f"{where} holds no graph (truncated or of another format)")
    opset = loaded.opset_imports.get("")
    if opset is not None and opset < OLDEST_OPSET:
        raise InvalidInput(f"{where} is of opset {opset}, but {OLDEST_OPSET} or newer is needed; convert it with onnx.version_converter")
    for value in loaded.graph.initializers.values():
        _check_present(value, where)
    if loaded.functions:
        loaded = loaded.clone()
        onnx_zeros.expand(loaded)
        loaded = InlinePass()(loaded).model
    return OnnxSource(loaded, path)


def _check_present(value: ir.Value, where: Any) -> None:
    tensor = value.const_value
    if tensor is None:
        raise InvalidInput(f"{where}: initializer {value.name!r} has no data")
    if isinstance(tensor, ir.ExternalTensor):
        file = Path(tensor.path)
        if not file.is_file():
            raise InvalidInput(f"{where}: the data of {value.name!r} should lie in {file}, which does not exist; put it beside the model")
        end = (tensor.offset or 0) + (tensor.length or 0)
        if end > file.stat().st_size:
            raise InvalidInput(f"{where}: {file} has {file.stat().st_size} bytes, but {value.name!r} ends at {end}; the file is truncated")
        named = {"shape": tensor.shape, "name": tensor.name or "", "base_dir": tensor.base_dir}
        value.const_value = _Mapped(tensor.location, tensor.offset, tensor.length, tensor.dtype, **named)  # type: ignore[arg-type]


class _Mapped(ir.ExternalTensor):
    """Its file stays mapped as long as a tensor looks into it: closing a file that torch reads is an error."""

    def release(self) -> None:
        self._array = self.raw = None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- nodes --------------------------------------------------------------------------------------------------------------------


def _constant_tensor(node: ir.Node) -> torch.Tensor | None:
    """What a `Constant` node holds."""
    name, attribute = next(iter(node.attributes.items()))
    if name == "value":
        return to_torch(attribute.as_tensor())
    if name in ("value_float", "value_floats"):
        return torch.tensor(attribute.value, dtype=torch.float32)
    return torch.tensor(attribute.value, dtype=torch.int64) if name in ("value_int", "value_ints") else None


@cache
def _schema(op_type: str, opset: int | None, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, domain) if opset is not None else onnx.defs.get_schema(op_type, domain)
    except onnx.defs.SchemaError:
        return None


# Old spellings -> the newest schema's. Attributes that became inputs under the same name need no entry.
_RENAMED = {
    ("BatchNormalization", "mean"): "input_mean",
    ("BatchNormalization", "var"): "input_var",
    ("Pad", "value"): "constant_value",
    ("TopK", "k"): "K",
}
_DTYPE_ATTRIBUTES = {"to", "dtype", "output_datatype", "output_dtype", "softmax_precision"}


def _plain(node: ir.Node, name: str, attribute: ir.Attr) -> Any:
    """An attribute as a plain Python value."""
    if name in _DTYPE_ATTRIBUTES and attribute.type is ir.AttributeType.INT:
        return torch_dtype(attribute.as_int())
    if attribute.type is ir.AttributeType.TENSOR:
        return to_torch(attribute.as_tensor())
    value = attribute.value
    return list(value) if isinstance(value, (tuple, list)) else value


def _default(name: str, definition: onnx.defs.OpSchema.Attribute) -> Any:
    proto = definition.default_value
    if not proto.name:
        return None
    value = onnx.helper.get_attribute_value(proto)
    if name in _DTYPE_ATTRIBUTES:
        return torch_dtype(value)
    if isinstance(value, bytes):
        return value.decode()
    return [v.decode() if isinstance(v, bytes) else v for v in value] if isinstance(value, (list, tuple)) else value


def arguments(node: ir.Node, opset: int | None, operand: Any) -> dict[str, Any]:
    """The node's arguments by name: operands (through `operand`), then attributes, in the form of the newest opset."""
    domain = "" if node.domain in ("", "ai.onnx") else node.domain
    schema, newest = _schema(node.op_type, opset, domain), _schema(node.op_type, None, domain)
    given = list(node.inputs)
    if schema is None or newest is None:
        named = {f"input{i}": operand(value) for i, value in enumerate(given)}
        return named | {k: _plain(node, k, a) for k, a in node.attributes.items() if a.type not in _GRAPHS}
    found: dict[str, Any] = {}
    for i, formal in enumerate(schema.inputs):
        name = _RENAMED.get((node.op_type, formal.name), formal.name)
        if formal.option is onnx.defs.OpSchema.FormalParameterOption.Variadic:
            found[name] = [operand(value) for value in given[i:]]
        else:
            found[name] = operand(given[i]) if i < len(given) else None
    for name, definition in schema.attributes.items():
        if definition.type in _GRAPH_TYPES:
            continue
        attribute = node.attributes.get(name)
        value = _plain(node, name, attribute) if attribute is not None else _default(name, definition)
        found.setdefault(_RENAMED.get((node.op_type, name), name), value)
    order = [formal.name for formal in newest.inputs]
    args = {name: found.pop(name, None) for name in order} | found
    args |= {name: _plain(node, name, a) for name, a in node.attributes.items() if name not in schema.attributes and a.type not in _GRAPHS}
    return args | _changed_meaning(node, opset or 0)


def operand_names(node: ir.Node, opset: int | None) -> list[str]:
    """The names under which `arguments` gives the node's operands, in their order at this opset."""
    schema = _schema(node.op_type, node.version if node.version is not None else opset, "" if node.domain == "ai.onnx" else node.domain)
    return [_RENAMED.get((node.op_type, formal.name), formal.name) for formal in schema.inputs] if schema is not None else []


_GRAPH_TYPES = (onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS)
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _changed_meaning(node: ir.Node, opset: int) -> dict[str, Any]:
    """Arguments that say in today's words what the operator meant at `opset`."""
    if node.op_type in ("Softmax", "LogSoftmax", "Hardmax") and opset < 13:
        return {"to_end": True}  # all axes from `axis` on, together
    if node.op_type == "Resize" and opset < 11:
        return {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if node.op_type == "Scan" and opset < 9:
        return {"batched": True}
    if node.op_type == "Split":
        return {"num_outputs": len(node.outputs)}
    return {}


def module_path(node: ir.Node) -> str:
    """The dotted module path that the exporter left in the node's metadata or name; "" if it left none."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
        return names[-2] if len(names) > 1 else ""
    parts = (node.name or "").strip("/").split("/")[:-1]
    kept: list[str] = []
    for part in parts:  # "/layer1/layer1.0/conv1/Conv": each part may repeat the ones before it
        if kept and (part == kept[-1] or part.startswith(kept[-1] + ".")):
            kept.pop()
        kept.append(part)
    return ".".join(kept)


class _Reader:
    """Turns graphs into nodes and values, names made unique over all of them."""

    def __init__(self, model: ir.Model) -> None:
        self.opsets = model.opset_imports
        self.values: dict[ir.Value, Value] = {}
        self.weights: dict[str, Value] = {}  # every tensor of the file, until `_settle_kinds`
        self.literal_uses: dict[Value, bool] = {}  # is every use a shape, a position or a count?
        self.names: set[str] = set()

    def unique(self, wanted: str, scope: str = "") -> str:
        """`wanted`, or what comes closest among the names that are left."""
        name = wanted if wanted not in self.names else f"{wanted}@{scope or len(self.names)}"
        while name in self.names:
            name += "'"
        self.names.add(name)
        return name

    def _tensor(self, source: ir.Value, tensor: torch.Tensor | None, scope: str) -> Value:
        weight = tensor is not None and tensor.is_floating_point() and tensor.numel() > 1
        name = self.unique(source.name or "constant", scope)
        shape = tuple(tensor.shape) if tensor is not None else None
        value = Value(name, Kind.PARAMETER if weight else Kind.CONSTANT, shape, tensor.dtype if tensor is not None else None, tensor=tensor)
        self.values[source] = self.weights[name] = value
        return value

    def read(self, graph: ir.Graph, scope: str = "") -> tuple[tuple[Node, ...], tuple[Value, ...], tuple[Value, ...]]:
        for source in graph.initializers.values():
            self._tensor(source, to_torch(source.const_value), scope)  # type: ignore[arg-type]
        inputs = []
        for source in graph.inputs:
            if source in self.values:
                continue  # IR 3 lists the weights as inputs
            value = Value(self.unique(source.name or "input", scope), Kind.RESULT if scope else Kind.INPUT, None, _declared_dtype(source))
            self.values[source] = value
            inputs.append(value)
        nodes = [node for source in graph if (node := self._node(source, scope)) is not None]
        return tuple(nodes), tuple(inputs), tuple(self.values[v] for v in graph.outputs)

    def _node(self, source: ir.Node, scope: str) -> Node | None:
        domain = "" if source.domain in ("", "ai.onnx") else source.domain
        if (domain, source.op_type) == ("", "Constant"):
            self._tensor(source.outputs[0], _constant_tensor(source), scope)
            return None
        name = source.name or source.outputs[0].name or source.op_type
        opset = source.version if source.version is not None else self.opsets.get(source.domain, self.opsets.get(domain))
        args = arguments(source, opset, lambda v: None if v is None else self.values[v])
        literal = LITERAL_OPERANDS.get(source.op_type, ())
        for key, argument in args.items():
            for value in leaves([argument]):
                if isinstance(value, Value):
                    self.literal_uses[value] = self.literal_uses.get(value, True) and key in literal
        bodies = BODIES.get(source.op_type, ()) if domain == "" else ()
        blocks = tuple(self._block(source, attribute, f"{name}.{attribute}") for attribute in bodies)
        outputs = []
        for out in source.outputs:
            value = Value(self.unique(out.name or f"{name}.unused", scope), Kind.RESULT, None, _declared_dtype(out))
            self.values[out] = value
            outputs.append(value)
        node = Node(name, domain, source.op_type, args, tuple(outputs), lambda **_: None, module_path(source), source, blocks)
        if (domain, source.op_type) not in ONNX_OPS and has_body(source, self.opsets):
            call: Any = FunctionBody(source, self.opsets, read_program)
        else:
            call = lower(domain, source.op_type, args, len(outputs))
        node.call = partial(call, blocks=blocks) if blocks else call
        for value in outputs:
            value.producer = node
        return node

    def _block(self, node: ir.Node, attribute: str, scope: str) -> Block:
        return Block(*self.read(node.attributes[attribute].as_graph(), scope))


def _declared_dtype(value: ir.Value) -> torch.dtype | None:
    return TORCH_DTYPES.get(value.dtype) if value.dtype is not None else None


_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Where"}


def _settle_kinds(reader: _Reader, nodes: Sequence[Node]) -> None:
    """Float tensors that only say how (Resize's scales, a Pad's fill) are constants, whatever their size.

    So are tables that several nodes add or multiply (rotary angles, ALiBi, masks): each use may be cut by itself, or one table would tie
    the heads of all layers. And so is one number repeated, which exporters store once for all the norms and biases that start with it.
    """
    uses: dict[Value, list[Node]] = {}
    for node in _walk(nodes):
        for value in dict.fromkeys(node.inputs):
            uses.setdefault(value, []).append(node)
    for value in reader.weights.values():
        if value.kind is not Kind.PARAMETER:
            continue
        read = uses.get(value, [])
        table = len(read) > 1 and sum(size > 1 for size in value.shape or ()) > 1 and all(n.op_type in _ELEMENTWISE for n in read)
        if table or (len(read) > 1 and _is_fill(value.tensor)) or reader.literal_uses.get(value, False):
            value.kind = Kind.CONSTANT


def _is_fill(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and bool((tensor == tensor.reshape(-1)[0]).all())


_MADE_UP = re.compile(r"val_\d+|onnx::\w+|\d+|\w*Constant\w*|/.*Constant.*_output_\d+")  # names that exporters give to what has none
_PARAMETERS = {
    "W": "weight", "Scale": "weight", "scale": "weight", "input_mean": "running_mean", "input_var": "running_var", "R": "weight_hh",
}  # fmt: skip


def _name_by_module(reader: _Reader, nodes: Sequence[Node]) -> None:
    """Weights without a name of their own are called after the module that reads them, so that plans carry over between exports."""
    for node in _walk(nodes):
        for argument, value in node.args.items():
            if not isinstance(value, Value) or value.kind is not Kind.PARAMETER or not node.scope or not _MADE_UP.fullmatch(value.name):
                continue
            matrix = node.op_type in ("MatMul", "Mul") or (node.op_type == "Gemm" and argument == "B")
            suffix = "weight" if matrix else "bias" if argument in ("A", "B", "C", "bias") else _PARAMETERS.get(argument, argument)
            del reader.weights[value.name]
            value.name = reader.unique(f"{node.scope}.{suffix}")
            reader.weights[value.name] = value


def _walk(nodes: Iterable[Node]) -> Iterator[Node]:
    for node in nodes:
        for block in node.blocks:
            yield from _walk(block.nodes)
        yield node


# --- shapes -------------------------------------------------------------------------------------------------------------------


def _differing(first: Run, second: Run | None, value: Value) -> frozenset[int]:
    """The axes of a value whose sizes differ between the runs."""
    if second is None or value not in first.shapes or value not in second.shapes:
        return frozenset()
    a, b = first.shapes[value], second.shapes[value]
    if len(a) != len(b):
        return frozenset(range(len(a)))
    return frozenset(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


def _record(nodes: Iterable[Node], first: Run, second: Run | None) -> None:
    """Write what the runs found into the values; fold what came out the same in both without looking at data."""
    for node in nodes:
        for block in node.blocks:
            for value in block.inputs:
                _record_value(value, first, second)
            _record(block.nodes, first, second)
        for value in node.outputs:
            _record_value(value, first, second)


def _record_value(value: Value, first: Run, second: Run | None) -> None:
    if value not in first.shapes:
        return
    value.shape, value.dtype = first.shapes[value], first.dtypes[value]
    value.dynamic = _differing(first, second, value) | first.unstable.get(value, frozenset())
    known = first.known.get(value)
    if known is None:
        return
    again = second.known.get(value) if second is not None else known
    if again is not None and same(known, again):
        value.kind, value.tensor, value.producer, value.dynamic = Kind.CONSTANT, known, None, frozenset()


def _prune(nodes: Sequence[Node], outputs: Iterable[Value]) -> tuple[Node, ...]:
    """The nodes that the outputs need and that are not folded."""
    needed = set(outputs)
    kept: list[Node] = []
    for node in reversed(nodes):
        if all(v.kind is Kind.CONSTANT for v in node.outputs) or not any(v in needed for v in node.outputs):
            continue
        node.blocks = tuple(Block(_prune(b.nodes, b.outputs), b.inputs, b.outputs) for b in node.blocks)
        if node.blocks:
            node.call = partial(node.call.func, blocks=node.blocks)  # type: ignore[attr-defined]
        kept.append(node)
        needed.update(node.inputs)
        for block in node.blocks:
            needed.update(_reads(block))
    return tuple(reversed(kept))


def _reads(block: Block) -> Iterator[Value]:
    yield from block.outputs
    for node in block.nodes:
        yield from node.inputs
        for inner in node.blocks:
            yield from _reads(inner)


def _block_outputs(nodes: Iterable[Node]) -> Iterator[Value]:
    for node in nodes:
        for block in node.blocks:
            yield from block.outputs
            yield from _block_outputs(block.nodes)
