"""Applies a cut to an ONNX model: slices weights where they lie and recomputes literals, in a copy that shares the rest.

Names, opsets, attributes and metadata stay as they are where nothing was cut. A literal operand (a shape, a position, a count) is not
patched but computed from what the algebra says of the node after the cut, and is written only if what the file would compute differs.
Where the operand is computed when the model runs, the static entries that change are laid over it by a `Where`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from graphprune.axes import size
from graphprune.capture.onnx_file import operand_names
from graphprune.program import Kind, Node, Program, Value, leaves
from graphprune.rules.onnx_literals import LITERAL_OPERANDS, chunk_sizes, in_order, ints, slice_range, split_sizes
from graphprune.surgery.cut import Cut

Literals = dict[str, Any]  # argument -> its new value: a number, a list, an array; None where an attribute goes


def apply_cut(program: Program, cut: Cut) -> ir.Model:
    """The pruned model; the one in `program.source` is left as it is."""
    surgery = _Surgery(program, cut)
    surgery.slice_weights()
    for node in program.walk():
        if node not in cut.bypassed:
            surgery.edit(node)
    surgery.write_constants()
    surgery.bypass()
    surgery.declare_shapes()
    surgery.sweep()
    surgery.seal()
    return surgery.model


class _Surgery:
    """One copy of the model under the knife. Original values and nodes are the keys of all maps, copies are what is edited."""

    def __init__(self, program: Program, cut: Cut) -> None:
        self.program, self.cut = program, cut
        original: ir.Model = program.source.model
        self.model = original.clone()
        self.values: dict[ir.Value, ir.Value] = {}
        self.nodes: dict[ir.Node, ir.Node] = {}
        self._pair(original.graph, self.model.graph)
        self.origin: dict[Value, ir.Value] = {v: k for k, v in program.source.values.items()}
        self.names = {v.name for v in self.values.values()}
        self.dead_before = set(_dead(self.model.graph))
        self.idle_before = set(_idle_initializers(self.model.graph))
        self._made: dict[tuple, ir.Value] = {}
        self._new: set[str] = set()  # names of what was made
        self._wanted: dict[tuple[ir.Node, int], tuple[ir.Value | None, np.ndarray, str]] = {}  # operand -> what it was, is to be, is called
        self._moving: dict[ir.Value, bool] = {}

    def _pair(self, old: ir.Graph, new: ir.Graph) -> None:
        self.values.update(zip(old.inputs, new.inputs))
        self.values.update((value, new.initializers[name]) for name, value in old.initializers.items())
        for a, b in zip(old, new):
            self.nodes[a] = b
            self.values.update(zip(a.outputs, b.outputs))
            for name, attribute in a.attributes.items():
                if attribute.type is ir.AttributeType.GRAPH:
                    self._pair(attribute.as_graph(), b.attributes[name].as_graph())

    # ---- tensors

    def slice_weights(self) -> None:
        """Weights are cut where they lie: in an initializer, or in a `Constant` node."""
        for value, keeps in self.cut.weights.items():
            target = self.values[self.origin[value]]
            array = _contents(target)
            assert array is not None
            for axis, keep in keeps.items():
                array = np.take(array, keep, axis)
            _overwrite(target, array)

    def write_constants(self) -> None:
        """Constants that changed: in place where all uses want the same, else beside the old ones."""
        wanted: dict[ir.Value | None, list[tuple[ir.Node, int]]] = {}
        for operand, (old, _, _) in self._wanted.items():
            wanted.setdefault(_behind(old), []).append(operand)
        for old, operands in wanted.items():
            arrays = [self._wanted[operand][1] for operand in operands]
            same = all(a.shape == arrays[0].shape and a.tobytes() == arrays[0].tobytes() for a in arrays)
            if old is not None and same and _uses(old) == set(operands) and _contents(old) is not None:
                _overwrite(old, arrays[0])
                continue
            for node, position in operands:
                _, array, name = self._wanted[node, position]
                if position >= len(node.inputs):
                    node.resize_inputs(position + 1)
                node.replace_input_with(position, self.constant(array, name))

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """An initializer of the main graph with these contents; equal ones are made once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            unique = name
            while unique in self.names:
                unique += "_"
            self.names.add(unique)
            tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique)
            value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.model.graph.register_initializer(value)
            self._made[key] = value
            self._new.add(unique)
        return self._made[key]

    # ---- nodes

    def edit(self, node: Node) -> None:
        """Constant operands as this use keeps them, and literals anew."""
        touched = self.cut.touches(node)
        literal = LITERAL_OPERANDS.get(node.op_type, ()) if node.domain == "" else ()
        changes: Literals = LITERALS.get(node.op_type, _nothing)(node, self.cut) if touched and node.domain == "" else {}
        for name, argument in node.args.items():
            for value in dict.fromkeys(v for v in leaves([argument]) if isinstance(v, Value)):
                source = self.origin.get(value)
                if name in changes or source is None:
                    continue
                if value.kind is Kind.CONSTANT and value.tensor is not None:
                    keeps = {} if name in literal else self.cut.keeps(value, node)
                    if keeps or self.moves(source):
                        array, target = _array(value.tensor, keeps), self.nodes[node.source]
                        for i, operand in enumerate(target.inputs):
                            if operand is self.values[source]:
                                self._wanted[target, i] = operand, array, f"{value.name}_cut"
                elif name in literal and self.moves(source) and node.op_type in _SHAPES:
                    changes[name] = _static_sizes(node, self.cut)
        for name, new in changes.items():
            self._write(node, name, new)

    def _write(self, node: Node, name: str, new: Any) -> None:
        """Give an argument its new value: in the attribute that holds it, or in an operand."""
        target: ir.Node = self.nodes[node.source]
        spelled = next((key for key in (name, _OLD_NAMES.get((node.op_type, name), name)) if key in target.attributes), None)
        position = _position(node, name, self.model.opset_imports.get(""))
        if new is None:
            target.attributes.pop(name, None)
        elif spelled is not None or position is None:
            target.attributes[spelled or name] = ir.convenience.convert_attribute(spelled or name, new)
        else:
            operand = target.inputs[position] if position < len(target.inputs) else None
            argument = node.args[name]
            if isinstance(argument, Value) and argument.tensor is None:  # computed when the model runs: lay the new entries over it
                assert operand is not None
                fixed = np.array([size is not None for size in new])
                numbers = np.array([size or 0 for size in new], dtype=np.int64)
                operands = [self.constant(fixed, "cut_axes"), self.constant(numbers, "cut_sizes"), operand]
                where = ir.node("Where", operands, name=f"{target.name}_cut")
                where.outputs[0].name = self._fresh(f"{argument.name}_cut")
                where.outputs[0].type = operand.type
                assert target.graph is not None
                target.graph.insert_before(target, where)
                target.replace_input_with(position, where.outputs[0])
            else:
                like = np.asarray(argument.tensor) if isinstance(argument, Value) else np.zeros(0, np.int64)
                array = np.asarray(new, dtype=like.dtype)
                array = array.reshape(()) if like.ndim == 0 and array.size == 1 else np.atleast_1d(array)
                stem = argument.name if isinstance(argument, Value) else f"{target.name}_{name}"
                self._wanted[target, position] = operand, array, f"{stem}_cut"

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def moves(self, source: ir.Value) -> bool:
        """Is an original value computed from the size of an axis that was cut?"""
        stack = [source]
        while stack:  # depth first, without recursion: exporters chain hundreds of nodes
            value = stack[-1]
            node = value.producer()
            if value in self._moving or node is None:
                self._moving.setdefault(value, False)
                stack.pop()
                continue
            if node.op_type in ("Shape", "Size") and node.inputs[0] is not None:
                measured = self.program.source.values.get(node.inputs[0])
                self._moving[value] = measured is not None and measured.shape is not None and bool(self.cut.keeps(measured))
                stack.pop()
                continue
            known = self.program.source.values.get(value)
            if known is not None and known.dtype is not None and known.kind is Kind.RESULT and known.dtype.is_floating_point:
                self._moving[value] = False  # data; sizes that become data are frozen
                stack.pop()
                continue
            open_ = [v for v in node.inputs if v is not None and v not in self._moving]
            if open_:
                stack.extend(open_)
                continue
            self._moving[value] = any(self._moving[v] for v in node.inputs if v is not None)
            stack.pop()
        return self._moving[source]

    # ---- the rest of the graph

    def bypass(self) -> None:
        """Residual branches that go: the sum becomes its other operand."""
        for join, branch in self.cut.bypassed.items():
            total = self.values[self.origin[join.outputs[0]]]
            node = self.nodes[join.source]
            other = next(v for v in node.inputs if v is not self.values[self.origin[branch.end]])
            assert other is not None
            if total.is_graph_output():
                output = ir.Value(name=total.name, shape=total.shape, type=total.type)
                identity = ir.node("Identity", [other], outputs=[output], name=node.name)
                graph = node.graph
                assert graph is not None
                graph.insert_before(node, identity)
                total.name = self._fresh(f"{total.name}_bypassed")
                total.replace_all_uses_with(identity.outputs[0], replace_graph_outputs=True)
            else:
                total.replace_all_uses_with(other)

    def declare_shapes(self) -> None:
        """Declared sizes follow the cut; symbolic ones and wrong ranks stay as they were."""
        for source, value in self.program.source.values.items():
            target = self.values[source]
            if value.shape is None or target.shape is None or len(target.shape) != len(value.shape) or value.kind is Kind.CONSTANT:
                continue
            keeps = self.cut.keeps(value)
            if keeps and not target.is_initializer():
                sizes = [len(keeps[i]) if i in keeps and isinstance(size, int) else size for i, size in enumerate(target.shape)]
                target.shape = ir.Shape(sizes)

    def sweep(self) -> None:
        """Remove what only the cut left without use."""
        again = True
        while again:
            dead = [node for node in _dead(self.model.graph) if node not in self.dead_before]
            again = bool(dead)
            for node in dead:
                assert node.graph is not None
                node.graph.remove(node, safe=True)
        for graph, name in _idle_initializers(self.model.graph):
            if (graph, name) not in self.idle_before:
                value = graph.initializers.pop(name)
                if value in graph.inputs:
                    graph.inputs.remove(value)

    def seal(self) -> None:
        """Before IR version 4 all weights had to be inputs too, and some writers keep to that: it keeps runtimes from folding and packing
        them, and they run several times slower.
        """
        inputs = set(self.model.graph.inputs)
        if all(value in inputs for value in self.model.graph.initializers.values() if value.name not in self._new):
            RemoveInitializersFromInputsPass()(self.model)
            self.model.ir_version = max(self.model.ir_version, 4)


def _behind(value: ir.Value | None) -> ir.Value | None:
    """What a chain of `Identity` nodes passes on: exporters share equal tensors through them."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return value


def _uses(value: ir.Value) -> set[tuple[ir.Node | None, int]]:
    """The operands that a value is, through `Identity` nodes too; None stands for an output of the graph."""
    found: set[tuple[ir.Node | None, int]] = {(None, 0)} if value.is_graph_output() else set()
    for use in value.uses():
        found |= _uses(use.node.outputs[0]) if use.node.op_type == "Identity" else {(use.node, use.idx)}
    return found


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    yield from graph.subgraphs()


def _dead(graph: ir.Graph) -> list[ir.Node]:
    return [n for g in _graphs(graph) for n in reversed(list(g)) if not any(v.uses() or v.is_graph_output() for v in n.outputs)]


def _idle_initializers(graph: ir.Graph) -> list[tuple[ir.Graph, str]]:
    return [(g, name) for g in _graphs(graph) for name, v in g.initializers.items() if not v.uses() and not v.is_graph_output()]


def _contents(value: ir.Value) -> np.ndarray | None:
    """What an initializer or a `Constant` node holds; None for other values."""
    if value.is_initializer():
        return value.const_value.numpy() if value.const_value is not None else None
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    name, attribute = next(iter(node.attributes.items()))
    if name == "value":
        return attribute.as_tensor().numpy()
    return np.asarray(attribute.value, np.float32 if "float" in name else np.int64) if name != "sparse_value" else None


def _overwrite(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer or a `Constant` node other contents of the same type."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if value.is_initializer():
        assert value.const_value is not None
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        return
    node = value.producer()
    assert node is not None
    name, attribute = next(iter(node.attributes.items()))
    if name == "value":
        old = attribute.as_tensor()
        node.attributes[name] = ir.AttrTensor(name, ir.Tensor(array, dtype=old.dtype, name=old.name))
    else:
        node.attributes[name] = ir.convenience.convert_attribute(name, array.tolist(), attribute.type)
    if value.shape is not None:
        value.shape = ir.Shape(array.shape)


def _array(tensor: torch.Tensor, keeps: Mapping[int, np.ndarray]) -> np.ndarray:
    for axis, keep in keeps.items():
        tensor = tensor.index_select(axis, torch.from_numpy(keep))
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


_OLD_NAMES = {("TopK", "K"): "k", ("Pad", "constant_value"): "value"}  # newest name of an argument -> the attribute it once was


def _position(node: Node, name: str, opset: int | None) -> int | None:
    """The operand that an argument is, or None where it is an attribute at the model's opset."""
    names = operand_names(node.source, opset)
    return names.index(name) if name in names else None


# ---- literals


def _nothing(node: Node, cut: Cut) -> Literals:
    return {}


def _numbers(operand: Any) -> list[int] | None:
    """The entries of a literal operand; None where it is absent or computed when the model runs."""
    if isinstance(operand, Value):
        return None if operand.tensor is None else ints(operand.tensor)
    return ints(operand)


def _changed(argument: str, old: Any, new: Any) -> Literals:
    return {} if old == new else {argument: new}


def _static_sizes(node: Node, cut: Cut) -> list[int | None]:
    """The size of every axis of the result that is the same in every run; None for the others."""
    out = node.outputs[0]
    return [None if axis in out.dynamic else size for axis, size in enumerate(cut.shape(out))]


def _target_shape(argument: str) -> Callable[[Node, Cut], Literals]:
    """A shape of the result, aligned right: entries of axes that change get their new size; -1 stays, and so does a 0 that still copies."""

    def edit(node: Node, cut: Cut) -> Literals:
        out = node.outputs[0]
        assert out.shape is not None
        old, new = out.shape, cut.shape(out)
        entries = _numbers(node[argument])
        if entries is None:
            if old == new:
                return {}
            lead = len(old) - node[argument].shape[0]
            return {argument: [n if n != o else None for o, n in zip(old[lead:], new[lead:])]}
        lead = len(old) - len(entries)
        x = node.inputs[0]
        before = cut.shape(x) if x.shape is not None and node.op_type == "Reshape" else ()
        wanted = []
        for i, entry in enumerate(entries):
            o, n = old[lead + i], new[lead + i]
            copies = entry == 0 and not node.args.get("allowzero") and node.op_type == "Reshape"
            if entry == -1 or (copies and i < len(before) and before[i] == n):
                wanted.append(entry)
            elif copies:
                wanted.append(n if lead + i not in out.dynamic else entry)
            else:
                wanted.append(n if n != o and entry == o else entry)
        return _changed(argument, entries, wanted)

    return edit


def _split(node: Node, cut: Cut) -> Literals:
    axis = node["axis"] % len(node["input"].shape)
    sizes = [cut.shape(out)[axis] for out in node.outputs]
    given = _numbers(node["split"])
    if given is None and split_sizes(sum(sizes), len(sizes)) == sizes:
        return {}
    return _changed("split", given, sizes) | ({"num_outputs": None} if given is None else {})


def _split_to_sequence(node: Node, cut: Cut) -> Literals:
    parts = cut.analysis.engine.parts.get(node.outputs[0])
    given = _numbers(node["split"])
    if parts is None or given is None:
        return {}
    masks = [(cut.mask(part), part) for part in (axes[node["axis"] % len(axes)] for axes in parts)]
    sizes = [size(part) if mask is None else int(mask.sum()) for mask, part in masks]
    return _changed("split", given, sizes[:1] if chunk_sizes(sum(sizes), sizes[0]) == sizes and len(given) == 1 else sizes)


def _slice(node: Node, cut: Cut) -> Literals:
    """Positions renumbered, unless the old bounds still take exactly the kept ones."""
    x = node["data"]
    starts, ends = _numbers(node["starts"]), _numbers(node["ends"])
    if starts is None or ends is None:
        return {}
    axes = _numbers(node["axes"]) or list(range(len(starts)))
    steps = _numbers(node["steps"]) or [1] * len(starts)
    new_starts, new_ends, new_steps = list(starts), list(ends), list(steps)
    for i, axis in enumerate(axes):
        axis %= len(x.shape)
        keep = cut.keep(x, axis, node)
        if keep is None:
            continue
        taken = slice_range(x.shape[axis], starts[i], ends[i], steps[i])
        at = np.flatnonzero(np.isin(keep, taken))
        if list(slice_range(len(keep), starts[i], ends[i], steps[i])) != at.tolist():
            stride = np.diff(at)
            assert len(at) and (len(stride) == 0 or (stride == stride[0]).all()), f"{node}: the kept positions are not evenly spaced"
            new_starts[i], new_ends[i], new_steps[i] = int(at[0]), int(at[-1]) + 1, int(stride[0]) if len(stride) else 1
    changes = _changed("starts", starts, new_starts) | _changed("ends", ends, new_ends)
    return changes | (_changed("steps", steps, new_steps) if node["steps"] is not None else {})


def _gather(node: Node, cut: Cut) -> Literals:
    """A run of constant positions is renumbered."""
    x, picks = node["data"], node["indices"]
    keep = cut.keep(x, node["axis"] % len(x.shape), node)
    if keep is None or picks.kind is not Kind.CONSTANT:
        return {}
    if len(picks.shape) > 1:
        whole = in_order(picks, x.shape[node["axis"] % len(x.shape)])
        return {"indices": np.arange(len(keep)).reshape(cut.shape(picks, node))} if whole else {}
    taken = np.asarray(picks.tensor) % x.shape[node["axis"] % len(x.shape)]
    if picks.shape == ():
        return {"indices": int(np.searchsorted(keep, taken))}
    return {"indices": np.flatnonzero(np.isin(keep, taken))}


def _convolution(node: Node, cut: Cut) -> Literals:
    if node["group"] == 1:
        return {}
    channels = node["X"] if node.op_type == "Conv" else node.outputs[0]
    return _changed("group", node["group"], cut.shape(channels)[1] // cut.shape(node["W"])[1])


def _group_norm(node: Node, cut: Cut) -> Literals:
    keep = cut.keep(node["X"], 1)
    per_group = node["X"].shape[1] // node["num_groups"]
    return {} if keep is None else {"num_groups": len(np.unique(keep // per_group))}


def _recurrent(node: Node, cut: Cut) -> Literals:
    return _changed("hidden_size", node["hidden_size"], cut.shape(node["R"])[2])


def _kept_heads(value: Value, heads: int, cut: Cut) -> int:
    """How many heads of (..., heads * dim) keep any position."""
    keep = cut.keep(value, 2)
    return heads if keep is None else len(np.unique(keep // (value.shape[2] // heads)))  # type: ignore[index]


def _attention(node: Node, cut: Cut) -> Literals:
    """The scale is that of the old head dim; with three axes, heads are counted anew."""
    q, k = node["Q"], node["K"]
    changes: Literals = {}
    if len(q.shape) == 3:
        changes = _changed("q_num_heads", node["q_num_heads"], _kept_heads(q, node["q_num_heads"], cut))
        changes |= _changed("kv_num_heads", node["kv_num_heads"], _kept_heads(k, node["kv_num_heads"], cut))
    width = q.shape[-1] // (node["q_num_heads"] if len(q.shape) == 3 else 1)
    new = cut.shape(q)[-1] // (changes.get("q_num_heads", node["q_num_heads"]) if len(q.shape) == 3 else 1)
    return changes | ({"scale": 1 / math.sqrt(width)} if node["scale"] is None and new != width else {})


def _rotary(node: Node, cut: Cut) -> Literals:
    changes: Literals = {}
    if len(node["X"].shape) == 3:
        changes = _changed("num_heads", node["num_heads"], _kept_heads(node["X"], node["num_heads"], cut))
    if node["rotary_embedding_dim"]:
        changes |= _changed("rotary_embedding_dim", node["rotary_embedding_dim"], 2 * cut.shape(node["cos_cache"], node)[-1])
    return changes


def _tile(node: Node, cut: Cut) -> Literals:
    repeats = _numbers(node["repeats"])
    if repeats is None:
        return {}
    return _changed("repeats", repeats, [n // max(o, 1) for n, o in zip(cut.shape(node.outputs[0]), cut.shape(node["input"]))])


def _resize(node: Node, cut: Cut) -> Literals:
    if node["sizes"] is None:
        return {}
    return _target_shape("sizes")(node, cut) if node["axes"] is None else {}


def _one_hot(node: Node, cut: Cut) -> Literals:
    axis = node["axis"] % len(node.outputs[0].shape or ())
    return _changed("depth", [node.outputs[0].shape[axis]], [cut.shape(node.outputs[0])[axis]])  # type: ignore[index]


LITERALS: Mapping[str, Callable[[Node, Cut], Literals]] = {
    "Reshape": _target_shape("shape"),
    "Expand": _target_shape("shape"),
    "ConstantOfShape": _target_shape("input"),
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Slice": _slice,
    "Gather": _gather,
    "Tile": _tile,
    "Resize": _resize,
    "OneHot": _one_hot,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "GroupNormalization": _group_norm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
}
_SHAPES = {"Reshape", "Expand", "ConstantOfShape"}  # literal operands that are the shape of the result

