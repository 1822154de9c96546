"""Weights with zeros, small in an ONNX file: one bit for every entry and the kept values, put together by a function of standard operators.

The function `graphprune.Scattered(values, bits, shape) -> weight` stands in the file with its body, so every runtime that knows ONNX
functions runs it; ONNX Runtime folds it into the dense weight when it opens the file. `values` is a zero and then the kept entries in
order; `bits` (uint8) has the lowest bit first. Everything else, names included, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from graphprune.errors import InvalidInput

DOMAIN, NAME = "graphprune", "Scattered"
OLDEST_OPSET = 11
SMALL = 4096  # entries; smaller weights stay as they are
BODY = """
<opset_import: ["" : {opset}], domain: "graphprune">
Scattered (values, bits, shape) => (weight) {{
    shifts = Constant <value = uint8[8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
    two = Constant <value = uint8[1] {{2}}> ()
    column = Constant <value = int64[2] {{-1, 1}}> ()
    flat = Constant <value = int64[1] {{-1}}> ()
    zero = Constant <value = int64[1] {{0}}> ()
    axis = Constant <value = int64 {{0}}> ()
    bytes = Reshape (bits, column)
    shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
    odd = Mod (shifted, two)
    padded = Reshape (odd, flat)
    count = ReduceProd <keepdims = 1> (shape)
    places = Slice (padded, zero, count, zero)
    kept = Cast <to = 6> (places)
    order = CumSum (kept, axis)
    index = Mul (order, kept)
    entries = Gather <axis = 0> (values, index)
    weight = Reshape (entries, shape)
}}
"""


def compress(model: ir.Model) -> list[str]:
    """Stores the weights of `model` that get smaller so by their kept entries; returns their names.

    Raises:
        InvalidInput: the model's opset is older than the operators of the function.
    """
    opset = model.opset_imports.get("") or onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise InvalidInput(f"weights are compressed in models of opset {OLDEST_OPSET} and newer, this one has {opset}: save it whole")
    graph = model.graph
    packed: list[str] = []
    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for name, value, tensor in list(_weights(graph)):
        if tensor is None or id(value) in ends or tensor.size < SMALL or not ir.DataType(tensor.dtype).is_floating_point():
            continue
        array = tensor.numpy().reshape(-1)
        kept = array != 0  # what a mask leaves of a negative weight is -0.0: zero all the same
        if (int(kept.sum()) + 1) * array.itemsize + array.size // 8 >= 0.9 * array.nbytes:
            continue
        values = np.concatenate([np.zeros(1, array.dtype), array[kept]])
        parts = {"values": values, "bits": np.packbits(kept, bitorder="little"), "shape": np.asarray(tuple(tensor.shape), np.int64)}
        tensors = [ir.tensor(held, name=f"{name}.{part}") for part, held in parts.items()]
        operands = [ir.Value(name=it.name, const_value=it) for it in tensors]
        node = ir.node(NAME, operands, domain=DOMAIN, name=f"{name}.{NAME}")
        weight = node.outputs[0]
        weight.type, weight.shape = value.type, value.shape
        value.replace_all_uses_with(weight)
        if (constant := value.producer()) is not None:
            graph.remove(constant)
        else:
            del graph.initializers[name]
        weight.name, value.name = name, None
        for operand in operands:
            graph.register_initializer(operand)
        graph.insert_before(graph[0], node)
        packed.append(name)
    if packed:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(BODY.format(opset=opset)))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
    return packed


def expand(model: ir.Model) -> None:
    """Puts the dense weights back that `compress` took apart, under their names."""
    for node in list(_nodes(model.graph)):
        weight, held = node.outputs[0], [None if it is None else it.const_value for it in node.inputs]
        if any(it is None for it in held):
            continue  # not ours: what it is made of is computed
        values, bits, shape = (it.numpy() for it in held)  # type: ignore[union-attr]
        kept = np.unpackbits(bits, bitorder="little")[: int(np.prod(shape))].astype(bool)
        array = np.zeros(len(kept), values.dtype)
        array[kept] = values[1:]
        dense = ir.Value(name=weight.name, type=weight.type, const_value=ir.tensor(array.reshape(shape), name=weight.name))
        dense.shape = ir.Shape(shape.tolist())
        operands = list(node.inputs)
        weight.replace_all_uses_with(dense)
        weight.name = None
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
        for operand in operands:
            if operand is not None and not operand.uses():
                model.graph.initializers.pop(str(operand.name), None)
        model.graph.register_initializer(dense)
    model.functions.pop((DOMAIN, NAME, ""), None)


def _weights(graph: ir.Graph) -> Iterator[tuple[str, ir.Value, ir.TensorProtocol | None]]:
    """Initializers and constants, by name."""
    for name, value in graph.initializers.items():
        yield name, value, value.const_value
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            yield str(node.outputs[0].name), node.outputs[0], node.attributes["value"].as_tensor()


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph.all_nodes() if node.domain == DOMAIN and node.op_type == NAME)
