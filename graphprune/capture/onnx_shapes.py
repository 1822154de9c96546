"""Input sizes at which an ONNX graph runs, and the shapes of all its values there."""

from __future__ import annotations

import ast
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphprune.capture.onnx_types import TORCH_DTYPES, same
from graphprune.errors import CaptureError, InvalidInput, UnsupportedOp
from graphprune.program import Block, Kind, Node, Value, leaves, substitute
from graphprune.rules.onnx_literals import LITERAL_OPERANDS, DataDependent, ints

log = logging.getLogger("graphprune")

BATCH_HINTS = (2, 1)
SIZE_HINTS = (32, 64, 48, 96, 128, 160, 192, 224, 256, 320, 512, 576, 288, 640, 1024, 16000, 8, 4)
LARGEST_INPUT = 20_000_000  # entries of a made-up input
_UNKNOWN = object()  # a value whose shape nobody knows
_DATA_SHAPED = {"NonZero", "Compress", "Unique", "NonMaxSuppression", "StringSplit", "If", "Loop", "Scan"}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


class Run:
    """One pass over a graph: shapes of all values, and the numbers of those that depend on shapes and constants only.

    Args:
        real: inputs and weights are real tensors, not meta tensors.
    """

    def __init__(self, nodes: Sequence[Node], inputs: Mapping[Value, Tensor], sizes: Mapping[str, int], real: bool) -> None:
        self.real, self.sizes = real, sizes
        self.shapes: dict[Value, tuple[int, ...]] = {}
        self.dtypes: dict[Value, torch.dtype] = {}
        self.known: dict[Value, Tensor] = {}
        self.unstable: dict[Value, frozenset[int]] = {}  # axes that differ between the turns of a loop, or depend on data
        self._seen_twice: set[Value] = set()
        self._data_shaped: set[Value] = set()
        self._env: dict[Value, Any] = {}
        for value, tensor in inputs.items():
            self._keep(value, tensor if real else tensor.to("meta"))
        last = _last_uses(nodes)
        for i, node in enumerate(nodes):
            self._step(node)
            for value in last.get(i, ()):
                self._env.pop(value, None)

    def _read(self, leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        if leaf in self.known:
            return self.known[leaf]
        if leaf not in self._env:
            if leaf.tensor is None:
                return _UNKNOWN
            weight = leaf.kind is Kind.PARAMETER and not self.real
            self._env[leaf] = leaf.tensor.to("meta") if weight else leaf.tensor
        return self._env[leaf]

    def _static(self, value: Value) -> bool:
        return value in self.known or value.kind is Kind.CONSTANT

    def _step(self, node: Node) -> None:
        args = substitute(node.args, self._read)
        outside = [v for v in node.inputs] + [v for block in node.blocks for v in _outer_reads(block)]
        if node.op in (("", "Shape"), ("", "Size")):
            static = node.inputs[0] not in self._data_shaped
        else:
            static = node.op_type not in _RANDOM and all(self._static(v) for v in outside)
        literals = LITERAL_OPERANDS.get(node.op_type, ())
        data_shaped = not static and (
            node.op_type in _DATA_SHAPED
            or any(v in self._data_shaped for v in node.inputs)
            or any(not self._static(v) for name in literals for v in leaves([node.args.get(name)]) if isinstance(v, Value))
        )
        if any(leaf is _UNKNOWN for leaf in leaves(args.values())):
            results: Sequence[Any] = self._inferred(node, args)
        else:
            try:
                extra = {"run_block": self._run_block} if node.blocks else {}
                out = node.call(**args, **extra)
                results = out if isinstance(out, tuple) else (out,)
            except UnsupportedOp as error:
                log.debug("%s: %s", node.name, error)
                results = self._inferred(node, args)
            except (DataDependent, NotImplementedError):
                if not self.real:
                    raise DataDependent from None
                results = self._inferred(node, args)
        for block in node.blocks:
            self._visit_untaken(block)
        for value, result in zip(node.outputs, results):
            self._keep(value, result, static)
            if data_shaped:
                self._data_shaped.add(value)
                if not node.blocks and not any(v in self._data_shaped for v in node.inputs):
                    self.unstable[value] = _free_axes(node, value, self.shapes.get(value, ()))

    def _keep(self, value: Value, result: Any, static: bool = False) -> None:
        if result is None:
            return
        if not isinstance(result, Tensor):
            self._env[value] = result
            return
        shape = tuple(result.shape)
        before = self.shapes.get(value)
        if before is not None and before != shape:
            same_rank = len(before) == len(shape)
            changed = (i for i, size in enumerate(shape) if not same_rank or before[i] != size)
            self.unstable[value] = self.unstable.get(value, frozenset()) | frozenset(changed)
        self.shapes[value], self.dtypes[value] = shape, result.dtype
        if static and not result.is_meta:
            old = self.known.get(value)
            if old is not None and not same(old, result):
                self._seen_twice.add(value)
            if value not in self._seen_twice:
                self.known[value] = result
                return
            self.known.pop(value, None)
        self._env[value] = result

    def _run_block(self, block: Block, inputs: Sequence[Any] = ()) -> list[Any]:
        for value, given in zip(block.inputs, inputs):
            self._keep(value, given)
        for node in block.nodes:
            self._step(node)
        return [self._read(v) for v in block.outputs]

    def _visit_untaken(self, block: Block) -> None:
        """Find the shapes in a branch that was not taken, if it can be run on meta tensors at all."""
        if block.inputs or not block.nodes or any(v in self.shapes for v in block.nodes[0].outputs):
            return
        held, real = dict(self._env), self.real
        self._env = {v: x.to("meta") if isinstance(x, Tensor) else x for v, x in self._env.items()}
        self.real = False
        try:
            self._run_block(block)
        except Exception as error:  # sizes that fit one branch need not fit the other: its values stay without shapes
            log.debug("a branch was not taken and cannot be run at these sizes: %s", error)
        finally:
            self._env, self.real = held, real

    def _inferred(self, node: Node, args: Mapping[str, Any]) -> list[Any]:
        """Outputs of a node that cannot be run: from its schema's shape inference, else from what the file declares."""
        found = _infer(node, [self._read(v) for v in node.inputs])
        return [t if t is not None else self._declared(v) for t, v in zip(found, node.source.outputs)]

    def _declared(self, value: ir.Value) -> Any:
        if value.shape is None or value.dtype not in TORCH_DTYPES:
            return _UNKNOWN
        shape = [size if isinstance(size, int) else _evaluate(size.value, self.sizes) for size in value.shape]
        known = [size for size in shape if size is not None]
        return torch.empty(known, dtype=TORCH_DTYPES[value.dtype], device="meta") if len(known) == len(shape) else _UNKNOWN


def _infer(node: Node, operands: Sequence[Any]) -> list[Tensor | None]:
    source: ir.Node = node.source
    unknown: list[Tensor | None] = [None] * len(node.outputs)
    if any(not isinstance(t, Tensor) for t in operands) or node.blocks:
        return unknown
    numbers = {dtype: number for number, dtype in TORCH_DTYPES.items()}
    try:
        version = source.version or (source.graph.opset_imports.get(source.domain) if source.graph is not None else None)
        schema = onnx.defs.get_schema(source.op_type, version or onnx.defs.onnx_opset_version(), source.domain)
        names = [v.name or "" for v in source.inputs if v is not None]
        types = {n: onnx.helper.make_tensor_type_proto(int(numbers[t.dtype]), list(t.shape)) for n, t in zip(names, operands)}
        inferred = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(source), types)
    except Exception as error:  # inference failing means no more than "unknown"
        log.debug("no shape inference for %s: %s", node.name, error)
        return unknown
    found: list[Tensor | None] = []
    for value in source.outputs:
        kind = inferred[value.name].tensor_type if value.name in inferred else None
        complete = kind is not None and kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim)
        dtype = TORCH_DTYPES.get(ir.DataType(kind.elem_type)) if kind is not None else None
        shape = [d.dim_value for d in kind.shape.dim] if kind is not None else []
        found.append(torch.empty(shape, dtype=dtype, device="meta") if complete and dtype is not None else None)
    return found


def _free_axes(node: Node, value: Value, shape: Sequence[int]) -> frozenset[int]:
    """Axes of a result whose sizes its data decide: those that a Slice names, else all."""
    axes = node.args.get("axes")
    if node.op_type == "Slice" and (axes is None or not isinstance(axes, Value) or axes.tensor is not None):
        named = ints(axes.tensor if isinstance(axes, Value) else axes)
        if named is not None:
            return frozenset(a % len(shape) for a in named)
    if node.op_type == "NonZero":
        return frozenset({1})
    return frozenset(range(len(shape)))


def _outer_reads(block: Block) -> Iterator[Value]:
    inside = set(block.inputs) | {v for node in block.nodes for v in node.outputs}
    nested = (_outer_reads(b) for node in block.nodes for b in node.blocks)
    for value in itertools.chain(block.outputs, *(node.inputs for node in block.nodes), *nested):
        if value not in inside:
            yield value


def _last_uses(nodes: Sequence[Node]) -> dict[int, list[Value]]:
    last: dict[Value, int] = {}
    for i, node in enumerate(nodes):
        for value in itertools.chain(node.inputs, node.outputs, *(_outer_reads(b) for b in node.blocks)):
            last[value] = i
    out: dict[int, list[Value]] = {}
    for value, i in last.items():
        if value.kind is Kind.RESULT:
            out.setdefault(i, []).append(value)
    return out


# --- example inputs -----------------------------------------------------------------------------------------------------------


def example_tensors(inputs: Sequence[Value], given: Any) -> dict[Value, Tensor] | None:
    """The user's example inputs by value.

    Raises:
        InvalidInput: too many, too few, or unknown names.
    """
    if given is None:
        return None
    names = [v.name for v in inputs]
    if isinstance(given, Mapping):
        unknown, missing = sorted(set(given) - set(names)), [n for n in names if n not in given]
        if unknown or missing:
            what = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
            raise InvalidInput(f"example_inputs do not match the inputs of the model ({', '.join(names)}); {what}")
        ordered = [given[name] for name in names]
    else:
        ordered = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(ordered) != len(names):
            raise InvalidInput(f"the model has {len(names)} inputs ({', '.join(names)}), but example_inputs has {len(ordered)}")
    return {v: torch.as_tensor(x) for v, x in zip(inputs, ordered)}


def _evaluate(expression: str | None, sizes: Mapping[str, int]) -> int | None:
    """The value of a symbolic size such as "past + length", if all its names are known."""
    if expression is None:
        return None
    if expression in sizes:
        return sizes[expression]
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:
        return None

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            operations = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b, ast.FloorDiv: a // max(b, 1), ast.Div: a // max(b, 1)}
            if type(node.op) in operations:
                return operations[type(node.op)]
        raise KeyError

    try:
        return value(tree)
    except KeyError:
        return None


def _symbols(graph_inputs: Sequence[ir.Value]) -> dict[tuple[int, int], str]:
    """(input, axis) -> name of its symbolic size; only nameless first axes are taken to be one size, the batch."""
    out = {}
    for i, source in enumerate(graph_inputs):
        for axis, size in enumerate(source.shape or ()):
            if not isinstance(size, int) or size <= 0:
                named = size.value if isinstance(size, ir.SymbolicDim) else None
                out[i, axis] = str(named) if named else f"axis {axis} of {source.name}" if axis else "axis 0"
    return out


def _is_compound(name: str) -> bool:
    return any(mark in name for mark in "+-*/")


def _fill(value: Value, shape: Sequence[int], source: ir.Value) -> Tensor:
    """A made-up input: noise, small ids, or the number that the graph compares a scalar with."""
    dtype = value.dtype or torch.float32
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    count = 1
    for size in shape:
        count *= size
    if count == 1:
        return torch.full(tuple(shape), _compared_with(source), dtype=dtype)
    if "mask" in value.name.lower() and dtype != torch.bool:
        return torch.ones(tuple(shape), dtype=dtype)
    return (torch.arange(count) % 2).reshape(tuple(shape)).to(dtype)


def _compared_with(source: ir.Value) -> int:
    for node in source.consumers():
        if node.op_type == "Equal":
            for other in node.inputs:
                tensor = ir.convenience.get_const_tensor(other) if other is not None and other is not source else None
                if tensor is not None and tensor.size == 1:
                    return int(tensor.numpy().reshape(-1)[0])
    return 1


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor at another size: cut, or repeated from the start."""
    for axis, size in enumerate(shape):
        if tensor.shape[axis] != size:
            tensor = tensor.index_select(axis, torch.arange(size) % max(tensor.shape[axis], 1))
    return tensor


def shape_runs(
    model: ir.Model, nodes: Sequence[Node], inputs: Sequence[Value], weights: Mapping[str, Value], given: dict[Value, Tensor] | None
) -> tuple[tuple[Tensor, ...], Run, Run | None]:
    """Example inputs and two runs, the second at other symbolic sizes (None where there are none, or no other size works).

    Raises:
        CaptureError: no sizes were found at which the graph runs.
    """
    sources = [v for v in model.graph.inputs if not v.is_initializer()]
    symbols = _symbols(sources)
    if given is None:
        for value, source in zip(inputs, sources):
            if source.shape is None or value.dtype is None:
                raise CaptureError(f"input {value.name!r} declares no tensor type and shape; give example_inputs")
        candidates: Iterable[dict[str, int]] = _first_sizes(symbols)
    else:
        for i, value in enumerate(inputs):
            _check_given(value, sources[i], given[value])
        candidates = [{name: int(given[inputs[i]].shape[axis]) for (i, axis), name in symbols.items()}]
    base: dict[Value, Tensor] | None = given
    failure: Exception | None = None
    for sizes in candidates:
        if given is None and any(math.prod(shape) > LARGEST_INPUT for shape in _shapes_at(sources, symbols, sizes)):
            continue
        tensors = given if given is not None else _made_up(inputs, sources, symbols, sizes)
        try:
            first = _attempt(nodes, tensors, sizes)
        except Exception as error:  # an infeasible size fails in as many ways as there are ops
            failure = failure or error
            continue
        base = tensors
        break
    else:
        raise _no_sizes(inputs, sources, symbols, given, failure)
    for value, tensor in base.items():  # type: ignore[union-attr]
        value.shape, value.dtype = tuple(tensor.shape), tensor.dtype
    second = _second(nodes, inputs, symbols, base, sizes, first)  # type: ignore[arg-type]
    for (i, axis), _ in symbols.items():
        inputs[i].dynamic |= {axis}
    return tuple(base[v] for v in inputs), first, second  # type: ignore[index]


def _attempt(nodes: Sequence[Node], tensors: Mapping[Value, Tensor], sizes: Mapping[str, int]) -> Run:
    with torch.no_grad():
        try:
            return Run(nodes, tensors, sizes, real=False)
        except (DataDependent, NotImplementedError):
            return Run(nodes, tensors, sizes, real=True)


def _first_sizes(symbols: Mapping[tuple[int, int], str]) -> Iterator[dict[str, int]]:
    plain = {name for name in symbols.values() if not _is_compound(name)}
    batch = {name for (_, axis), name in symbols.items() if axis == 0 or "batch" in name.lower()} & plain
    for hint, size in itertools.product(BATCH_HINTS, SIZE_HINTS) if plain - batch else ((hint, 0) for hint in BATCH_HINTS):
        yield {name: hint if name in batch else size for name in plain}
    for other in sorted(plain - batch) if len(plain - batch) > 1 else ():  # a batch axis that does not look like one
        yield from ({name: hint if name in batch | {other} else size for name in plain} for hint in BATCH_HINTS for size in SIZE_HINTS)
    if len(plain) > 1:  # one size for all
        yield from ({name: size for name in plain} for size in SIZE_HINTS)
    if not plain:
        yield {}


def _made_up(
    inputs: Sequence[Value], sources: Sequence[ir.Value], symbols: Mapping[tuple[int, int], str], sizes: Mapping[str, int]
) -> dict[Value, Tensor]:
    return {v: _fill(v, shape, s) for v, s, shape in zip(inputs, sources, _shapes_at(sources, symbols, sizes))}


def _shapes_at(sources: Sequence[ir.Value], symbols: Mapping[tuple[int, int], str], sizes: Mapping[str, int]) -> list[list[int]]:
    return [_shape_at(source.shape or (), i, symbols, sizes) for i, source in enumerate(sources)]


def _shape_at(shape: Iterable[Any], i: int, symbols: Mapping[tuple[int, int], str], sizes: Mapping[str, int]) -> list[int]:
    out = []
    for axis, size in enumerate(shape):
        name = symbols.get((i, axis))
        out.append(int(size) if name is None else _evaluate(name, sizes) or SIZE_HINTS[0])
    return out


def _second(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    symbols: Mapping[tuple[int, int], str],
    base: Mapping[Value, Tensor],
    sizes: dict[str, int],
    first: Run,
) -> Run | None:
    """The run with as many other sizes as work together: all at once, else one symbol after the other."""
    names = [name for name in dict.fromkeys(symbols.values()) if name in sizes]

    def attempt(changed: Mapping[str, int]) -> Run | None:
        now = {**sizes, **changed}
        shapes = {v: list(t.shape) for v, t in base.items()}
        for (i, axis), name in symbols.items():
            shapes[inputs[i]][axis] = _evaluate(name, now) or shapes[inputs[i]][axis]
        try:
            return _attempt(nodes, {v: _resized(t, shapes[v]) for v, t in base.items()}, now)
        except Exception as error:  # as above
            log.debug("sizes %s do not work: %s", dict(changed), error)
            return None

    def grown(size: int) -> list[int]:
        return [size + 1] if size < 4 else list(dict.fromkeys((size * 3 // 2, size * 2, size + 1)))

    for step in range(2):  # growing by one comes last, size by size: 65 // 8 is 64 // 8, and what is equal in both runs counts as fixed
        run = attempt({name: grown(sizes[name])[min(step, len(grown(sizes[name])) - 1)] for name in names}) if names else None
        if run is not None:
            return run
    best: Run | None = None
    changed: dict[str, int] = {}
    for name in names:
        for size in grown(sizes[name]):
            run = attempt(changed | {name: size})
            if run is not None:
                best, changed = run, changed | {name: size}
                break
    return best


def _check_given(value: Value, source: ir.Value, tensor: Tensor) -> None:
    declared = source.shape
    if declared is not None and len(declared) != tensor.dim():
        raise InvalidInput(f"input {value.name!r} has {len(declared)} axes {declared}, but its example has shape {list(tensor.shape)}")
    for axis, size in enumerate(declared or ()):
        if isinstance(size, int) and size > 0 and size != tensor.shape[axis]:
            raise InvalidInput(f"input {value.name!r} is declared {declared}, but its example has shape {list(tensor.shape)} (axis {axis})")
    if value.dtype is not None and value.dtype != tensor.dtype:
        raise InvalidInput(f"input {value.name!r} is of type {value.dtype}, but its example is {tensor.dtype}")


def _no_sizes(
    inputs: Sequence[Value],
    sources: Sequence[ir.Value],
    symbols: Mapping[tuple[int, int], str],
    given: Mapping[Value, Tensor] | None,
    failure: Exception | None,
) -> CaptureError:
    why = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200] if failure is not None else ""
    if given is not None:
        return CaptureError(f"the model does not run at the shapes of example_inputs: {why}")
    listed = "; ".join(
        f"{v.name!r} has {s.shape} (give {', '.join(f'axis {axis}' for j, axis in symbols if j == i)})"
        for i, (v, s) in enumerate(zip(inputs, sources))
        if any(j == i for j, _ in symbols)
    )
    found = listed or "all sizes are fixed"
    return CaptureError(f"no input sizes were found at which the model runs; give example_inputs: {found} ({why})")
