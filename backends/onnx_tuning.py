"""An ONNX model made ready for ONNX Runtime: sizes fixed, subgraphs fused, arithmetic in 16 bits. Every step takes a model and edits it.

    fix_sizes   open axes get their sizes, and all that depends on sizes alone (masks, positions, rotary tables) becomes a constant
    fuse        attention, grouped-query attention, skip-norm and GELU become the operators that ONNX Runtime has fast kernels for
    narrow      weights and arithmetic in float16 or bfloat16; what loses too much, or has no such form, stays in float32

Fusion comes after the cut, so heads and widths are those of each layer. Whether a step may be kept is for the caller to measure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import optimize
from onnxscript.rewriter import pattern

from graphprune.errors import InvalidInput
from graphprune.silence import quiet_onnxscript

NARROW: Mapping[str, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
FUSED = "com.microsoft"  # the domain of ONNX Runtime's own operators, which all have a 16-bit form
NAMELESS = frozenset({"SimplifiedLayerNormalization"})  # of ONNX Runtime as well, though in ONNX's domain
WIDE = frozenset({  # sums of many terms, powers that overflow, and what a small relative error of the argument ruins
    "Pow", "Exp", "Log", "Cos", "Sin", "CumSum", "Reciprocal", "LogSoftmax", "ReduceSum", "ReduceMean", "ReduceProd", "ReduceL1",
    "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "MeanVarianceNormalization", "LpNormalization", "Range",
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Det",
    "NonMaxSuppression", "TopK",
})  # fmt: skip
ANGLES = frozenset({"Cos", "Sin"})  # of large arguments: what these are computed from stays wide as well
FOLLOW = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Abs", "Clip", "Max", "Min", "Where"})  # wide where all they take is wide


def fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Give open axes their sizes and fold what becomes constant.

    Args:
        sizes: name of the axis, or of an input for its first axis -> size.

    Raises:
        InvalidInput: a name is not that of an open axis, or a size is not positive.
    """
    inputs = [value for value in model.graph.inputs if value.shape is not None]
    for value in inputs:  # axes without a name are axes of their own
        named = [d if isinstance(d, int) or d.value else f"axis {i} of {value.name}" for i, d in enumerate(value.shape or ())]
        value.shape = ir.Shape(named)
    first = {v.name: str(v.shape[0].value) for v in inputs if v.shape and isinstance(v.shape[0], ir.SymbolicDim)}
    known = {str(d.value) for value in inputs for d in value.shape or () if isinstance(d, ir.SymbolicDim)}
    wanted = {first.get(name, name): size for name, size in sizes.items()}
    unknown = sorted(set(wanted) - known)
    if unknown or any(size < 1 for size in wanted.values()):
        found = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InvalidInput(f"sizes= gives open axes ({', '.join(sorted(known)) or 'this model has none'}) one entry or more, found {found}")
    for value in inputs:
        value.shape = ir.Shape([d if isinstance(d, int) else wanted.get(str(d.value), d) for d in value.shape or ()])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # it may hold the old names
    passes.ShapeInferencePass()(model)
    with quiet_onnxscript():
        optimize(model)
    _drop_zero_terms(model.graph)


def _drop_zero_terms(graph: ir.Graph) -> None:
    """x + 0, where 0 is a mask that masks nothing: it would keep attention from the fast kernels."""
    for node in list(graph):
        if node.op_type == "Add" and node.domain == "":
            for term, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
                constant, out = _array(term), node.outputs[0]
                if other is None or constant is None or constant.any() or other.shape is None or other.shape != out.shape:
                    continue
                if out not in graph.outputs:
                    out.replace_all_uses_with(other)
                    graph.remove(node, safe=True)
                break


def _array(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def fuse(model: ir.Model) -> dict[str, int]:
    """Fuse for ONNX Runtime; how many nodes of each of its operators the model has now."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with quiet_onnxscript():
        pattern.RewriteRuleSet([CausalGroupedAttention.rule()], commute=True).apply_to_model(model)
        optimize_for_ort(model)
    passes.InlinePass()(model)
    passes.RemoveUnusedNodesPass()(model)
    _lengths_of_all_sequences(model.graph)
    return dict(Counter(node.op_type for node in model.graph if _of_onnxruntime(node)))


def _lengths_of_all_sequences(graph: ir.Graph) -> None:
    """onnxscript reads lengths off the positions, of which models often have one row for all sequences; the operator wants one for each."""
    for node in [it for it in graph if it.op_type == "GroupQueryAttention"]:
        query, lengths = node.inputs[0], node.inputs[5]
        if query is None or lengths is None or lengths.is_initializer() or _array(lengths) is not None:
            continue
        batch = ir.node("Shape", [query], {"start": 0, "end": 1})
        repeated = ir.node("Expand", [lengths, batch.outputs[0]])
        graph.insert_before(node, [batch, repeated])
        node.replace_input_with(5, repeated.outputs[0])


class CausalGroupedAttention(pattern.RewriteRuleClassBase):
    """Rotary causal attention whose keys and values are repeated for the queries of a group -> `GroupQueryAttention`.

    For fixed sizes, where mask and rotary tables are constants and can be read. Heads are those of the layer at hand.
    """

    def pattern(self, op: Any, query: Any, key: Any, value: Any, cos: Any, sin: Any, mask: Any, query_scale: Any, key_scale: Any) -> Any:
        some = pattern.ANY_VALUE

        def heads(x: Any, name: str) -> Any:
            return op.Transpose(op.Reshape(x, some, _outputs=[f"{name}_heads"]), perm=[0, 2, 1, 3])

        def rotated(x: Any, name: str) -> Any:
            low, high = (op.Slice(x, some, some, some, some, _outputs=[f"{name}_{half}"]) for half in ("low", "high"))
            return op.Add(op.Mul(x, cos), op.Mul(op.Concat(op.Neg(high), low, axis=-1), sin))

        def repeated(x: Any, name: str) -> Any:
            return op.Expand(op.Unsqueeze(x, some, _outputs=[f"{name}_apart"]), some, _outputs=[f"{name}_repeated"])

        keys = op.Reshape(repeated(rotated(heads(key, "key"), "key"), "key"), some, _outputs=["keys_flat"])
        keys = op.Reshape(op.Transpose(keys, perm=[0, 2, 1]), some, _outputs=["keys"])
        values = op.Reshape(repeated(heads(value, "value"), "value"), some, _outputs=["values"])
        scores = op.MatMul(op.Mul(rotated(heads(query, "query"), "query"), query_scale), op.Mul(keys, key_scale))
        weights = op.Softmax(op.Add(scores, mask), axis=-1)
        weights = pattern.OrValue([op.Where(op.IsNaN(weights), some, weights), weights])
        return op.Reshape(op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3]), some, _outputs=["result"])

    def check(self, context: Any, **found: Any) -> Any:  # type: ignore[override]
        result, read = pattern.MatchResult(), _Grouped.read(found)
        return result if isinstance(read, _Grouped) else result.fail(read)

    def rewrite(self, op: Any, query: Any, key: Any, value: Any, **found: Any) -> Any:
        read = _Grouped.read({**found, "query": query, "key": key, "value": value})
        assert isinstance(read, _Grouped)  # `check` has read the same
        lengths = op.Constant(value=ir.tensor(np.full(read.batch, read.length - 1, np.int32)))
        total = op.Constant(value=ir.tensor(np.array([read.length], np.int32)))
        cos, sin = (op.Constant(value=ir.tensor(table)) for table in (read.cos, read.sin))
        inputs = [query, key, value, None, None, lengths, total, cos, sin]
        options = {"num_heads": read.heads, "kv_num_heads": read.kv_heads, "scale": read.scale, "do_rotary": 1, "rotary_interleaved": 0}
        return op.GroupQueryAttention(*inputs, **options, _domain=FUSED, _outputs=3)[0]


@dataclass(frozen=True)
class _Grouped:
    """What the values of a match say of it."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    scale: float
    cos: np.ndarray  # (length, half of a head)
    sin: np.ndarray

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> _Grouped | str:
        """Why it is not that, if it is not."""
        constants = {name: _array(found[name]) for name in ("cos", "sin", "mask", "query_scale", "key_scale")}
        if any(it is None for it in constants.values()):
            return "sizes are open, so mask and rotary tables are not constants"
        cos, sin, mask, *scales = (it for it in constants.values() if it is not None)
        query, key = _sizes(found["query_heads"]), _sizes(found["key_heads"])
        if len(query) != 4 or len(key) != 4 or not key[2]:
            return "the sizes of a head are not known"
        (batch, length, heads, width), kv_heads = query, key[2]
        half, repeats = width // 2, heads // kv_heads
        wanted = {
            "key_heads": (batch, length, kv_heads, width), "value_heads": (batch, length, kv_heads, width),
            "key_apart": (batch, kv_heads, 1, length, width), "value_apart": (batch, kv_heads, 1, length, width),
            "key_repeated": (batch, kv_heads, repeats, length, width), "value_repeated": (batch, kv_heads, repeats, length, width),
            "keys_flat": (batch * heads, length, width), "keys": (batch, heads, width, length), "values": (batch, heads, length, width),
            "result": (batch, length, heads * width), "query": (batch, length, heads * width),
        }  # fmt: skip
        for name, sizes in wanted.items():
            if _sizes(found[name]) != sizes:
                return f"{name} is {_sizes(found[name])}, not {sizes}: heads are not repeated side by side"
        if any(_axes(found[f"{name}_apart"]) != [2] for name in ("key", "value")):
            return "heads are not repeated side by side"
        spans = {"low": (0, half), "high": (half, width)}
        if half % 8 or any(_span(found[f"{name}_{part}"]) != (3, *span) for name in ("query", "key") for part, span in spans.items()):
            return "only a part of each head is rotated, or the kernel does not take this width of a head (a multiple of 16)"
        allowed = np.tril(np.ones((length, length), bool))
        if mask.shape[-2:] != allowed.shape or mask[..., allowed].any() or mask[..., ~allowed].max(initial=-np.inf) > -1e4:
            return "the mask is not causal"
        halves = []
        for table in (cos, sin):
            rows = table.reshape(-1, *table.shape[-2:]) if table.ndim > 1 else table
            if rows.shape[1:] != (length, width) or (rows != rows[:1]).any() or (rows[..., :half] != rows[..., half:]).any():
                return "the rotary table is not that of halves, one row per position"
            halves.append(np.ascontiguousarray(rows[0, :, :half]))
        scale = float(np.prod([it.item() for it in scales])) if all(it.size == 1 for it in scales) else 0.0
        if scale == 0.0:  # to the kernel that means its own
            return "scores are not scaled by one number"
        return cls(batch, length, heads, kv_heads, scale, *halves)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """The sizes of a value; empty where one of them is open."""
    shape = value.shape
    return tuple(int(d) for d in shape if isinstance(d, int)) if shape is not None and shape.is_static() else ()


def _numbers(value: ir.Value, place: int) -> list[int] | None:
    """The constant that the node of this value takes at a place."""
    node = value.producer()
    held = _array(node.inputs[place]) if node is not None and place < len(node.inputs) else None
    return None if held is None else [int(number) for number in held.reshape(-1)]


def _axes(unsqueezed: ir.Value) -> list[int] | None:
    axes, rank = _numbers(unsqueezed, 1), len(_sizes(unsqueezed))
    return None if axes is None else [axis % rank for axis in axes]


def _span(cut: ir.Value) -> tuple[int, int, int] | None:
    """Axis, start and end of a slice of one axis, without gaps."""
    starts, ends, axes, steps = (_numbers(cut, place) for place in (1, 2, 3, 4))
    node = cut.producer()
    whole = _sizes(node.inputs[0]) if node is not None and node.inputs[0] is not None else ()
    if not (starts and ends and axes and steps == [1] and whole and len(axes) == 1):
        return None
    axis = axes[0] % len(whole)
    start, end, _ = slice(starts[0], ends[0]).indices(whole[axis])
    return axis, start, end


def narrow(model: ir.Model, precision: str, keep_io: bool = True, wide: Collection[str] = ()) -> None:
    """Weights and arithmetic in float16 or bfloat16. Integers, and values of other types, stay what they are.

    Args:
        precision: "float16" or "bfloat16".
        keep_io: float32 inputs and outputs stay float32, and are converted inside.
        wide: op types that stay in float32 beside those that lose too much or have no such form.

    Raises:
        InvalidInput: `precision` is another one, or float32 values are of unknown type.
    """
    if precision not in NARROW:
        raise InvalidInput(f"precision is float32, {' or '.join(NARROW)}, found {precision!r}")
    passes.InlinePass()(model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.ShapeInferencePass()(model)
    _complete_types(model.graph)
    _Narrowing(model, NARROW[precision], frozenset(wide)).run(keep_io)


def _complete_types(graph: ir.Graph) -> None:
    """ONNX infers nothing for the fused operators: they give the type that they take."""
    for node in graph:
        for value in node.outputs:
            if value.name and value.dtype is None and value.uses():
                source = next((v for v in node.inputs if v is not None and _floating(v)), None)
                if not _of_onnxruntime(node) or source is None:
                    raise InvalidInput(f"{value.name!r} (node {node.name!r}, {node.op_type}) is of unknown type, so it cannot be converted")
                value.type = source.type


def _of_onnxruntime(node: ir.Node) -> bool:
    return node.domain == FUSED or node.op_type in NAMELESS


def _floating(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, *NARROW.values())


class _Narrowing:
    """Decides node by node, changes types, and puts a cast after what is taken in the other type (one per value, whoever takes it)."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, wide: frozenset[str]) -> None:
        self.model, self.graph, self.dtype, self.wide = model, model.graph, dtype, WIDE | wide
        self.stays: set[ir.Node] = set()

    def run(self, keep_io: bool) -> None:
        graph, outputs = self.graph, list(self.graph.outputs)
        angles = self._above(ANGLES)
        for node in graph:
            if node in angles or self._is_wide(node):
                self.stays.add(node)
        floats = [v for v in outputs if v.dtype == ir.DataType.FLOAT]
        kept = [v for v in graph.inputs if v.dtype == ir.DataType.FLOAT] if keep_io else []
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in values:
            if value.dtype == ir.DataType.FLOAT:
                self._settle(value, value in kept)
        wanted = ir.DataType.FLOAT if keep_io else self.dtype
        for value in outputs:
            if value in floats and value.dtype != wanted:
                self._turn_output(value, wanted)

    def _above(self, ops: Collection[str]) -> set[ir.Node]:
        """The nodes of these ops, and those that their floating-point arguments are computed by."""
        found: set[ir.Node] = set()
        queue = [node for node in self.graph if node.op_type in ops and node.domain == ""]
        while queue:
            node = queue.pop()
            if node not in found:
                found.add(node)
                queue += [p for v in node.inputs if v is not None and _floating(v) and (p := v.producer()) is not None]
        return found

    def _is_wide(self, node: ir.Node) -> bool:
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        if node.op_type in self.wide or not (node.domain == "" or _of_onnxruntime(node)) or any(True for _ in _subgraphs(node)):
            return True
        if node.op_type == "Cast" and not floats:  # integers may be too large
            return True
        results = [i for i, v in enumerate(node.outputs) if v.dtype == ir.DataType.FLOAT and (v.uses() or v in self.graph.outputs)]
        if not all(self._allows(node, "outputs", i) for i in results):
            return True
        producers = [v.producer() for v in floats if v.const_value is None]
        return node.op_type in FOLLOW and bool(producers) and all(p in self.stays for p in producers)

    def _allows(self, node: ir.Node, side: str, index: int) -> bool:
        """Whether the operator's schema has a 16-bit form at this place."""
        if _of_onnxruntime(node):
            return True
        version = self.model.opset_imports.get("", onnx.defs.onnx_opset_version())
        formals = getattr(onnx.defs.get_schema(node.op_type, version, ""), side)
        types = formals[min(index, len(formals) - 1)].types  # the last may be variadic
        return f"tensor({self.dtype.name.lower()})" in types

    def _takes_narrow(self, node: ir.Node, index: int) -> bool:
        """Inputs of nodes in bodies of control flow are taken as they were."""
        return node.graph is self.graph and node not in self.stays and self._allows(node, "inputs", index)

    def _settle(self, value: ir.Value, given: bool) -> None:
        """Fix the type of a value, and cast it for those that take the other one."""
        producer = value.producer()
        uses = [(use.node, use.idx) for use in value.uses()]
        narrow = [self._takes_narrow(node, i) for node, i in uses]
        if value.const_value is not None:
            if all(narrow):
                self._retype(value)
            elif any(narrow):
                twin = self._constant(value)
                for (node, i), wanted in zip(uses, narrow):
                    if wanted:
                        node.replace_input_with(i, twin)
            return
        is_narrow = not given and (producer is None or producer not in self.stays)
        if is_narrow:
            value.dtype = self.dtype
            if producer is not None:
                self._retarget(producer)
        others = [use for use, wanted in zip(uses, narrow) if wanted != is_narrow]
        if others:
            cast = self._cast(value, ir.DataType.FLOAT if is_narrow else self.dtype)
            for node, i in others:
                node.replace_input_with(i, cast)

    def _retarget(self, node: ir.Node) -> None:
        """A result type that stands in an attribute."""
        for name in ("to", "dtype"):
            if name in node.attributes and node.attributes[name].as_int() == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrInt64(name, self.dtype)
        held = node.attributes.get("value")
        if node.op_type == "ConstantOfShape":
            number = 0.0 if held is None else float(held.as_tensor().numpy().item())
            node.attributes["value"] = ir.AttrTensor("value", _narrowed(ir.tensor(np.array([number], np.float32)), self.dtype))

    def _retype(self, value: ir.Value) -> None:
        assert value.const_value is not None
        value.const_value = _narrowed(value.const_value, self.dtype)
        value.dtype = self.dtype

    def _constant(self, value: ir.Value) -> ir.Value:
        name, kind = f"{value.name}.{self.dtype.name.lower()}", ir.TensorType(ir.DataType.FLOAT)
        twin = ir.Value(name=name, shape=value.shape, type=kind, const_value=value.const_value)
        self.graph.register_initializer(twin)
        self._retype(twin)
        return twin

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": dtype})
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{value.name}.{dtype.name.lower()}", value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], node)
        return out

    def _turn_output(self, value: ir.Value, dtype: ir.DataType) -> None:
        """The name of an output belongs to the user: the value of the other type under it gets another one."""
        old, name = value.dtype, value.name
        assert old is not None
        cast = self._cast(value, dtype)
        place = list(self.graph.outputs).index(value)
        value.name = f"{name}.{old.name.lower()}"
        cast.name = name
        self.graph.outputs[place] = cast


def _subgraphs(node: ir.Node) -> Iterator[Any]:
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            yield attribute.value


def _narrowed(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.Tensor:
    """A constant in 16 bits: finite numbers stay finite (a mask's least float32 would be minus infinity)."""
    array = tensor.numpy()
    with np.errstate(over="ignore"):
        short = array.astype(dtype.numpy())
    lost = ~np.isfinite(short)
    if lost.any():
        lost &= np.isfinite(array)
        short = np.where(lost, np.copysign(ml_dtypes.finfo(dtype.numpy()).max, array).astype(dtype.numpy()), short)
    return ir.Tensor(np.asarray(short), dtype=dtype, name=tensor.name)
