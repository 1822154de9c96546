"""`torch.export` -> `Program`: one node per ATen op of the undecomposed training IR, nothing copied.

The graph is only decomposed (functionalised) when an in-place op writes through a view, or into a value that is read again under its old
name: there an in-place
spelling is not its functional one.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import sympy
import torch
from torch import fx, nn
from torch._decomp import decompositions
from torch.utils import _pytree as pytree

from graphprune.capture.known_values import KnownValues
from graphprune.capture.rejection import quiet, rejection
from graphprune.errors import CaptureError, InvalidInput
from graphprune.program import Kind, Node, Program, Value, substitute

log = logging.getLogger("graphprune")


@dataclass(frozen=True, eq=False)
class TorchSource:
    """The user's module, the exported graph as a module of its own, and how its inputs are nested."""

    module: nn.Module
    graph_module: fx.GraphModule
    args: tuple
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any = None
    values: dict[fx.Node, Any] = field(default_factory=dict)  # FX node -> Value, or a tuple of them


def capture_torch(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None
) -> Program:
    """Export a module in evaluation mode and view the result as a `Program`. The module is left as it was.

    Raises:
        CaptureError: torch.export rejects the module; the message holds its reason and the line of code.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(module, torch.jit.ScriptModule):
        raise InvalidInput("a ScriptModule has no Python source to export; give the nn.Module that it was made from, or its ONNX export")
    with evaluating(module), torch.no_grad(), _scans(), _lstm_states(), _settled(), KnownValues(module) as values:
        try:
            with quiet():
                exported = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            raise CaptureError(rejection(module, error)) from error
    graph_module = _inlined(_unlifted(exported))
    if values.assumed:
        _compare(module, graph_module, args, kwargs)
    if _writes_through_aliases(graph_module.graph):
        for part in exported.graph_module.modules():
            if isinstance(part, fx.GraphModule):
                _hold_dropouts(part.graph)
        with torch.no_grad(), _scans(), _lstm_states():
            exported = exported.run_decompositions({torch.ops.aten.copy.default: _copied})
        graph_module = _inlined(_unlifted(exported))
        _release_dropouts(graph_module)
    example = tuple(pytree.tree_leaves((args, kwargs)))
    return from_graph_module(graph_module, example, TorchSource(module, graph_module, args, kwargs, dynamic_shapes))


def _copied(over: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What an in-place copy leaves behind, in ops that have a derivative."""
    source = source if source.dtype == over.dtype else source.to(over.dtype)
    return source.expand(over.shape) if source.shape != over.shape else source.clone()


def _hold_dropouts(graph: fx.Graph) -> None:
    """Put an op that survives decomposition in the place of every dropout, which does nothing in evaluation mode and would vanish.

    It is held as in training: in evaluation mode it returns its input itself, and whatever else reads that would be taken to read it.
    """
    for node in [n for n in graph.nodes if n.target in (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)]:
        if any(user.op == "output" for user in node.users):
            continue  # the signature knows it by name
        with graph.inserting_before(node):
            held = graph.call_function(torch.ops.aten.native_dropout.default, (*node.args[:2], True))
            first = graph.call_function(operator.getitem, (held, 0))
        held.meta, first.meta = {k: v for k, v in node.meta.items() if k != "val"}, dict(node.meta)
        node.replace_all_uses_with(first)
        graph.erase_node(node)


def _release_dropouts(graph_module: fx.GraphModule) -> None:
    """What `_hold_dropouts` put there is a dropout again."""
    graph = graph_module.graph
    for held in [n for n in graph.nodes if n.target is torch.ops.aten.native_dropout.default]:
        for first in [user for user in held.users if user.target is operator.getitem and user.args[1] == 0]:
            first.target, first.args, first.kwargs = torch.ops.aten.dropout.default, (*held.args[:2], False), {}
        if not held.users:
            graph.erase_node(held)
    graph_module.recompile()


def _compare(module: nn.Module, graph_module: fx.GraphModule, args: tuple, kwargs: dict[str, Any]) -> None:
    """Does the graph compute what the module does?

    Raises:
        CaptureError: it does not.
    """
    with evaluating(module), torch.no_grad():
        pairs = zip(pytree.tree_leaves(module(*args, **kwargs)), pytree.tree_leaves(graph_module(*args, **kwargs)))
        same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs if isinstance(a, torch.Tensor))
    if not same:
        raise CaptureError(
            f"{type(module).__name__} loops over positions that it finds in a tensor, and a graph that visits all positions computes "
            "something else; let the loop visit all of them, or add nothing for those that it may skip"
        )


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration; each sub-module's own mode comes back."""
    modes = [(m, m.training) for m in module.modules()]
    module.train()  # some models keep derived weights (attention biases) from an earlier evaluation: leaving the mode drops them
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Inside, `module.to(dtype)` of a module that is there already does nothing: under a trace parameters cannot be replaced."""
    original = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        held = [*module.parameters(), *module.buffers()]
        settled = layout is None and all(device in (None, t.device) for t in held)
        settled = settled and all(dtype in (None, t.dtype) for t in held if t.is_floating_point())
        return module if settled else original(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _lstm_states() -> Iterator[None]:
    """Inside, the last states of an LSTM have as many axes as its first ones; torch 2.11 traces them with one more."""
    original = decompositions.one_layer_lstm

    def one_layer(inp: Any, hidden: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        out, states = original(inp, hidden, *args, **kwargs)
        return out, tuple(last.reshape(first.shape) for last, first in zip(states, hidden))

    decompositions.one_layer_lstm = one_layer
    try:
        yield
    finally:
        decompositions.one_layer_lstm = original


def _scans() -> contextlib.AbstractContextManager:
    from graphprune.capture.scans import scans_captured_whole

    return scans_captured_whole()


def _unlifted(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    try:
        graph_module = exported.module(check_guards=False)  # type: ignore[call-arg]
    except TypeError:
        graph_module = exported.module()
    for node in list(graph_module.graph.nodes):
        guard = node.op == "call_module" or node.target in _ASSERTIONS
        if guard and not node.users:  # of sizes and dtypes that we may change
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module  # type: ignore[return-value]


_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # name -> arguments before the body


def _inlined(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Bodies of grad-mode and autocast wrappers become part of the graph."""
    graph = graph_module.graph
    again = True
    while again:
        again = False
        for node in list(graph.nodes):
            skip = _WRAPPERS.get(getattr(node.target, "__name__", str(node.target))) if node.op == "call_function" else None
            if skip is None:
                continue
            body: Any = graph_module.get_submodule(node.args[skip].target)
            again = True
            inputs = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], node.args[skip + 1 :]))
            with graph.inserting_before(node):
                for inner in body.graph.nodes:
                    if inner.op == "output":
                        result = fx.map_arg(inner.args[0], lambda n: inputs[n])
                    elif inner.op == "get_attr":
                        name = f"{node.args[skip].target}.{inner.target}"
                        inputs[inner] = graph.get_attr(name)
                        inputs[inner].meta = dict(inner.meta)
                    elif inner.op != "placeholder":
                        inputs[inner] = graph.node_copy(inner, lambda n: inputs[n])
            for user in list(node.users):
                assert user.target is operator.getitem
                user.replace_all_uses_with(result[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _writes_through_aliases(graph: fx.Graph, frozen: Collection[fx.Node] = ()) -> bool:
    """Does an in-place op write into memory, other than that of `frozen` values, that is read again under another name?"""
    order = {node: i for i, node in enumerate(graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            if target is operator.getitem and node.args[0] in root:
                root[node] = root[node.args[0]]
                members[root[node]].append(node)
            continue
        base = None
        for position, argument in enumerate(target._schema.arguments):
            alias = argument.alias_info
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if alias is None or not isinstance(given, fx.Node):
                continue
            base = root.get(given, given)
            if alias.is_write and base not in frozen:
                for name in {base, *members.get(base, ())}:
                    if name is not given and any(order[u] > order[node] for u in name.users):
                        return True
                if any(order[u] > order[node] for u in given.users):
                    return True
        if base is not None and target._schema.returns and target._schema.returns[0].alias_info is not None:
            root[node] = base
            members.setdefault(base, []).append(node)
    return False


class AtenCall:
    """Calls an overload with arguments by schema name."""

    __slots__ = ("keywords", "target")

    def __init__(self, target: torch._ops.OpOverload) -> None:
        self.target = target
        self.keywords = {a.name for a in target._schema.arguments if a.kwarg_only}

    def __call__(self, /, **args: Any) -> Any:
        positional = [v for k, v in args.items() if k not in self.keywords]
        return self.target(*positional, **{k: v for k, v in args.items() if k in self.keywords})


class SeededCall(AtenCall):
    """A call that draws random numbers: the same ones each time, so that two runs differ only by what else differs."""

    __slots__ = ("seed",)

    def __init__(self, target: torch._ops.OpOverload, seed: int) -> None:
        super().__init__(target)
        self.seed = seed

    def __call__(self, /, **args: Any) -> Any:
        if args.get("train") is False or args.get("dropout_p") == 0.0:
            return super().__call__(**args)
        devices = {x.device for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(self.seed)
            return super().__call__(**args)


class PlainCall:
    """Calls a Python function (arithmetic on sizes, higher-order ops) with positional arguments in order."""

    __slots__ = ("target",)

    def __init__(self, target: Any) -> None:
        self.target = target

    def __call__(self, /, **args: Any) -> Any:
        return self.target(*args.values())


def from_graph_module(graph_module: fx.GraphModule, example_inputs: Sequence[Any], source: TorchSource) -> Program:
    """View an FX graph of ATen ops as a `Program`; what depends on neither inputs nor weights is folded."""
    env = source.values
    weights: dict[str, Value] = {}
    aliases: dict[str, str] = {}
    by_storage: dict[tuple, Value] = {}
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    buffers = dict(graph_module.named_buffers(remove_duplicate=False))
    inputs: list[Value] = []
    nodes: list[Node] = []
    outputs: tuple[Value, ...] = ()
    for fx_node in graph_module.graph.nodes:
        if fx_node.op == "placeholder":
            env[fx_node] = _value(fx_node.name, Kind.INPUT, fx_node.meta.get("val"))
            inputs.append(env[fx_node])
        elif fx_node.op == "get_attr":
            env[fx_node] = _attribute(graph_module, fx_node.target, parameters, buffers, weights, aliases, by_storage)
        elif fx_node.op == "output":
            flat = [env[n] if isinstance(n, fx.Node) else n for n in pytree.tree_leaves(fx_node.args)]
            outputs = tuple(v for item in flat for v in (item if isinstance(item, tuple) else (item,)) if isinstance(v, Value))
        elif fx_node.target is operator.getitem and isinstance(env.get(fx_node.args[0]), tuple):
            env[fx_node] = env[fx_node.args[0]][fx_node.args[1]]
        else:
            _node(fx_node, env, nodes)
    for node in nodes:
        for value in dict.fromkeys(node.inputs):
            value.uses.append(node)
    return Program(tuple(nodes), tuple(inputs), outputs, weights, source, tuple(example_inputs), aliases)


def _value(name: str, kind: Kind, meta: Any, tensor: torch.Tensor | None = None) -> Value:
    if not isinstance(meta, torch.Tensor):
        hint = meta
        if isinstance(meta, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            hint = meta.node.hint  # None where data decides
        return Value(name, kind, None, None, tensor=torch.tensor(hint) if isinstance(hint, (int, float, bool)) else None)
    shape: list[int] = []
    dynamic: set[int] = set()
    for axis, length in enumerate(meta.shape):
        if isinstance(length, torch.SymInt):
            symbolic = not length.node.is_constant() and not str(length.node.expr).isdigit()
            if symbolic:
                dynamic.add(axis)
            length = _hint(length) if symbolic else int(length)
        shape.append(int(length))
    return Value(name, kind, tuple(shape), meta.dtype, frozenset(dynamic), tensor)


def _hint(length: torch.SymInt) -> int:
    """The size in the example run; for one that data decides, a prime of its own, so that no two such sizes look alike."""
    if length.node.hint is not None:
        return int(length.node.hint)
    environment, sizes = length.node.shape_env, {}
    for symbol in length.node.expr.free_symbols:
        name = str(symbol)
        known = None if name[0] in "uz" else environment.create_symintnode(symbol, hint=None).node.hint
        sizes[symbol] = sympy.prime(_FIRST_PRIME + int(re.sub(r"\D", "", name) or 0)) if known is None else known
    return max(int(length.node.expr.subs(sizes)), 0)


_FIRST_PRIME = 27  # the 27th prime is 103: above the small sizes of heads and kernels


def _attribute(graph_module, name, parameters, buffers, weights, aliases, by_storage) -> Any:
    """A parameter or buffer (tied ones meet by storage, layout and shape), a constant tensor, or a sub-module."""
    if name in weights:
        return weights[name]
    if name in aliases:
        return weights[aliases[name]]
    kind = Kind.PARAMETER if name in parameters else Kind.BUFFER if name in buffers else Kind.CONSTANT
    tensor: Any = graph_module
    for part in name.split("."):
        tensor = getattr(tensor, part)
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if kind is Kind.CONSTANT or ".lifted_tensor_" in f".{name}" or name.startswith(("lifted_tensor", "_lifted_tensor")):
        return _value(name, Kind.CONSTANT, tensor, tensor)
    key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
    if key in by_storage and tensor.numel() > 0:
        aliases[name] = by_storage[key].name
        return by_storage[key]
    weights[name] = by_storage[key] = _value(name, kind, tensor, tensor)
    return weights[name]


def _node(fx_node: fx.Node, env: dict[fx.Node, Any], nodes: list[Node]) -> None:
    target = fx_node.target
    positional, keywords = fx.map_arg((fx_node.args, dict(fx_node.kwargs)), lambda n: _Ref(env[n]))  # type: ignore[arg-type, return-value, misc]
    if isinstance(target, torch._ops.OpOverload):
        domain = target.namespace
        op_type = target._schema.name.partition("::")[2]
        if op_type.endswith("_") and not op_type.startswith("__") and hasattr(getattr(torch.ops, domain), op_type[:-1]):
            op_type = op_type[:-1]  # the rule, not the call, of the functional spelling
        args = {}
        for position, argument in enumerate(target._schema.arguments):
            if position < len(positional):
                args[argument.name] = positional[position]
            elif argument.name in keywords:
                args[argument.name] = keywords[argument.name]
            else:
                args[argument.name] = argument.default_value
        random = torch.Tag.nondeterministic_seeded in target.tags
        call: Any = SeededCall(target, crc32(fx_node.name.encode())) if random else AtenCall(target)
    else:
        domain, op_type = "python", getattr(target, "__name__", str(target))
        args = {f"arg{i}": a for i, a in enumerate((*positional, *keywords.values()))}
        call, random = PlainCall(target), False
    args = {key: _plain(value) for key, value in args.items()}
    stack = list((fx_node.meta.get("nn_module_stack") or {}).values())
    node = Node(fx_node.name, domain, op_type, args, (), call, str(stack[-1][0]) if stack else "", fx_node)
    metas, shapes = fx_node.meta.get("val"), fx_node.meta.get("shapes")
    many = isinstance(metas, (tuple, list))
    operands = [v for v in node.inputs if not (op_type.startswith("new_") and v is next(iter(args.values())))]
    symbolic = any(v.shape is None for v in operands)
    constant = (
        not random and domain != "python" and all(v.kind is Kind.CONSTANT or (v.shape is None and v.tensor is not None) for v in operands)
    )
    kind = Kind.CONSTANT if constant else Kind.RESULT
    values = tuple(
        _value(f"{fx_node.name}.{i}" if many else fx_node.name, kind, meta) for i, meta in enumerate(metas if many else (metas,))  # type: ignore[arg-type]
    )
    for value, shape in zip(values, shapes or ()):
        value.shape = shape  # surgery wrote what the cut left
    node.outputs = values
    env[fx_node] = values if many else values[0]
    if constant:
        _evaluate(node)
        if not symbolic and not op_type.startswith("new_") and all(v.shape is not None for v in values):
            return  # a number is computed again: those who take it want a number, not a tensor
    for value in values:
        value.producer = node
    nodes.append(node)


def _evaluate(node: Node) -> None:
    """Fold a node at the example sizes; on the CPU where the network is on the meta device, so that it can be run elsewhere."""
    device = _real(getattr(node.source.meta.get("val"), "device", None))

    def concrete(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return _real(leaf)
        if leaf.kind is not Kind.CONSTANT and leaf.shape is not None:
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=device)  # `new_*` reads dtype and device only
        return leaf.tensor if leaf.shape is not None else leaf.tensor.item()  # type: ignore[union-attr]

    with torch.no_grad():
        # in-place ops must not write into a constant that others read
        args = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in substitute(node.args, concrete).items()}
        result = node.call(**args)
    for value, tensor in zip(node.outputs, result if isinstance(result, (tuple, list)) else (result,)):
        value.tensor = tensor if isinstance(tensor, torch.Tensor) or tensor is None else torch.tensor(tensor)


def _real(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf


class _Ref:
    """Keeps `fx.map_arg` from looking into tuples of values."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _plain(tree: Any) -> Any:
    if isinstance(tree, _Ref):
        return tree.value
    if isinstance(tree, (list, tuple)):
        return [_plain(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return tree
