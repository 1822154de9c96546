"""ONNX operators that the standard itself defines by others: run through that definition.

One mechanism for every operator without a row in the tables: its schema's function body, or the body that the schema builds for this
node's attributes and operand types, is read like a small file of its own. Its inside is not analysed: the operator's axes are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphprune.capture.onnx_types import TORCH_DTYPES
from graphprune.errors import UnsupportedOp
from graphprune.execute.interpreter import Compute, run
from graphprune.execute.shape_numbers import with_numbers
from graphprune.program import Node, Program, leaves


class FunctionBody:
    """The call of a node: its definition, read once for each combination of operand types."""

    def __init__(self, source: ir.Node, opsets: Mapping[str, int], read: Callable[[onnx.ModelProto], Program]) -> None:
        self.source, self.read = source, read
        self.opset = source.version or opsets.get(source.domain) or opsets.get("") or onnx.defs.onnx_opset_version()
        variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
        self.formals = [(formal.name, formal.option is variadic) for formal in _schema(source, self.opset).inputs]
        self.programs: dict[tuple[Any, ...], Program] = {}

    def __call__(self, **arguments: Any) -> tuple[Any, ...]:
        operands: list[Any] = []
        for name, variadic in self.formals:
            given = arguments.get(name)
            operands += given if variadic and given is not None else [given]
        kinds = tuple(_kind(x) for x in operands)
        floats = {x.dtype for x in leaves(operands) if isinstance(x, Tensor) and x.is_floating_point()}
        double = torch.float64 if floats == {torch.float64} else None  # the body's own constants too
        given = [x for x in operands if x is not None]
        if kinds not in self.programs:
            program = self.read(self._model(kinds))
            results = run(program, given, dtype=double, intercept=_note_shapes)
            self.programs[kinds] = with_numbers(program)
            return tuple(results)
        return tuple(run(self.programs[kinds], given, dtype=double))

    def _model(self, kinds: tuple[Any, ...]) -> onnx.ModelProto:
        """A file that holds this node only, and its definition."""
        node = ir.to_proto(self.source)
        types = [_type(kind) for kind in kinds]
        function = _definition(_schema(self.source, self.opset), node, types[: len(node.input)], self.opset)
        inputs = [onnx.helper.make_value_info(n, t) for n, t in zip(node.input, types) if n and t is not None]
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name]
        for info in outputs:
            info.ClearField("type")
        domains = {o.domain: o.version for o in function.opset_import} | {node.domain: self.opset if node.domain else 0}
        domains[""] = next((o.version for o in function.opset_import if not o.domain), onnx.defs.onnx_opset_version())
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()]
        graph = onnx.helper.make_graph([node], node.op_type, inputs, outputs)
        return onnx.helper.make_model(graph, functions=[function], opset_imports=imports)


def _note_shapes(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
    results = compute(args)
    for value, result in zip(node.outputs, results):
        if isinstance(result, Tensor):
            value.shape, value.dtype = tuple(result.shape), result.dtype
    return results


def has_body(source: ir.Node, opsets: Mapping[str, int]) -> bool:
    """Does the standard define this node by other operators?"""
    try:
        schema = _schema(source, source.version or opsets.get(source.domain))
    except onnx.defs.SchemaError:
        return False
    return schema.has_function or schema.has_context_dependent_function


def _schema(source: ir.Node, opset: int | None) -> Any:  # the stubs lack half of it
    if opset is None:
        return onnx.defs.get_schema(source.op_type, source.domain)
    return onnx.defs.get_schema(source.op_type, opset, source.domain)


def _definition(schema: Any, node: onnx.NodeProto, types: list[Any], opset: int) -> onnx.FunctionProto:
    """The schema's body for this node, under the node's own name and domain."""
    function = onnx.FunctionProto()
    if schema.has_function:
        versions = sorted(schema.function_opset_versions)
        function.ParseFromString(schema.get_function_with_opset_version(_newest(versions, opset)))
    else:
        versions = sorted(schema.context_dependent_function_opset_versions)
        packed = [b"" if t is None else t.SerializeToString() for t in types]
        function.ParseFromString(
            schema.get_context_dependent_function_with_opset_version(_newest(versions, opset), node.SerializeToString(), packed)
        )
        graphs = {a.name: a for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}  # are part of the body by now
        for name, attribute in graphs.items():
            node.attribute.remove(attribute)
            function.attribute.remove(name)
    function.name, function.domain = node.op_type, node.domain
    del function.output[len(node.output) :]  # not every body makes the optional ones
    return function


def _newest(versions: list[int], opset: int) -> int:
    return max((v for v in versions if v <= opset), default=versions[0])


def _kind(operand: Any) -> Any:
    """What a body may depend on: the type and rank of an operand, or those of a sequence's elements."""
    if isinstance(operand, (list, tuple)):
        return (_kind(operand[0]) if operand else (torch.float32, 0),)
    return (operand.dtype, operand.dim()) if isinstance(operand, Tensor) else None


def _type(kind: Any) -> onnx.TypeProto | None:
    if kind is None:
        return None
    if len(kind) == 1:
        return onnx.helper.make_sequence_type_proto(_type(kind[0]) or onnx.TypeProto())
    number = next((number for number, dtype in TORCH_DTYPES.items() if dtype is kind[0]), None)
    if number is None:
        raise UnsupportedOp(f"an operand is of type {kind[0]}, which ONNX does not have")
    return onnx.helper.make_tensor_type_proto(int(number), [None] * kind[1])
