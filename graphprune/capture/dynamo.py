"""A graph from TorchDynamo -> `Program`: traced to ATen ops above autograd, so that `linear`, `conv2d` and attention stay whole.

Dynamo hands over torch functions with parameters and buffers lifted among the inputs. They become weights of the program again, under the
names that they have in the module; every other input is an input, and symbolic sizes stay symbolic.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from graphprune.capture.torch_export import TorchSource, _writes_through_aliases, from_graph_module
from graphprune.errors import CaptureError
from graphprune.program import Kind, Program


@dataclass(frozen=True, eq=False)
class Argument:
    """One argument of a Dynamo graph, in call order."""

    placeholder: fx.Node  # in the Dynamo graph
    weight: str | None  # its name among `program.weights` (or aliases), None for an input
    source: Any  # what Dynamo guards it by, None outside Dynamo


@dataclass(frozen=True, eq=False)
class DynamoGraph:
    """A Dynamo graph as a `Program`, and how its arguments map to weights and inputs."""

    program: Program
    arguments: tuple[Argument, ...]
    written: frozenset[str]  # weights that the graph writes to, batch statistics among them
    random: bool  # draws random numbers
    writes_inputs: bool


def capture_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoGraph:
    """Trace a Dynamo graph.

    Raises:
        CaptureError: an op cannot be traced, or the memory of an argument is written under one name and read under another.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    arguments = _arguments(placeholders, example_inputs)
    fakes = [p.meta.get("example_value", x) for p, x in zip(placeholders, example_inputs)]
    try:
        traced = _traced(graph_module, fakes)
        inputs, weights = _by_role(traced, arguments)
        if _writes_through_aliases(traced.graph, inputs):  # inputs are frozen along all axes: they may be written, as key-value caches are
            if _written(traced.graph, dict.fromkeys((*inputs, *weights), "an argument"), by_views=True):
                raise CaptureError("it writes to an argument, and to memory that it reads again under another name")
            traced = _traced(graph_module, fakes, functional=True)
            inputs, weights = _by_role(traced, arguments)
        written = _written(traced.graph, weights)
    except Exception as error:  # a backend sees whatever the user's ops raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CaptureError(f"the graph from torch.compile cannot be captured: {first}") from error
    tensors = {a.weight: tensor for a, tensor in zip(arguments, example_inputs) if a.weight is not None}
    random = any(_draws(node) for node in traced.graph.nodes)
    module = _with_weights(traced, arguments, tensors)
    given = tuple(x.node.hint if isinstance(x, torch.SymInt) else x for a, x in zip(arguments, example_inputs) if a.weight is None)
    program = from_graph_module(module, given, TorchSource(module, module, given, {}))
    _free_known_sizes(program)
    writes_inputs = bool(_written(traced.graph, dict.fromkeys(inputs, "an input"), by_views=True))
    return DynamoGraph(program, arguments, written, random, writes_inputs)


def _by_role(traced: fx.GraphModule, arguments: Sequence[Argument]) -> tuple[list[fx.Node], dict[fx.Node, str]]:
    """Placeholders of inputs, and those of weights with their names."""
    nodes = list(zip(traced.graph.find_nodes(op="placeholder"), arguments))
    return [n for n, a in nodes if a.weight is None], {n: a.weight for n, a in nodes if a.weight is not None}


def _free_known_sizes(program: Program) -> None:
    """A symbolic size comes from an input, whose axes are frozen: an axis such as `batch * heads` needs no freeze of its own, heads can go.

    Sizes that depend on data stay marked.
    """
    for node in program.nodes:
        meta = node.source.meta.get("val")
        for value, found in zip(node.outputs, meta if isinstance(meta, (tuple, list)) else (meta,)):
            if value.kind is Kind.RESULT and isinstance(found, torch.Tensor):
                known = {i for i, n in enumerate(found.shape) if not isinstance(n, torch.SymInt) or n.node.hint is not None}
                value.dynamic -= known


def _arguments(placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]) -> tuple[Argument, ...]:
    out: list[Argument] = []
    taken: set[str] = set()
    for node, tensor in zip(placeholders, example_inputs):
        source = getattr(node, "_dynamo_source", None)
        name = getattr(source, "name", "")
        name = name() if callable(name) else name
        weight = None
        if isinstance(tensor, nn.Parameter) or (isinstance(tensor, torch.Tensor) and "._buffers[" in name):
            root, *steps = re.findall(r"\['?([^'\]]+)'?\]", name) or [node.name]
            weight = ".".join(steps) or root
            if weight in taken:  # two modules in one graph
                weight = f"{root}.{weight}"
            while weight in taken:
                weight += "_"
            taken.add(weight)
        out.append(Argument(node, weight, source))
    return tuple(out)


@contextlib.contextmanager
def _tracing(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """Fake inputs, of the mode that Dynamo made them in."""
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        inputs = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    with mode, enable_python_dispatcher(), fx.traceback.preserve_node_meta():
        yield list(inputs)


def _traced(graph_module: fx.GraphModule, inputs: Sequence[Any], functional: bool = False) -> fx.GraphModule:
    def forward(*args: Any) -> Any:
        return fx.Interpreter(graph_module).run(*args)

    if functional:  # in-place ops become their functional spelling, all others stay whole
        forward = dispatch_functionalize(forward, FunctionalTensorMode(pre_dispatch=True, export=True))
    with _tracing(inputs) as fakes:
        return make_fx(forward, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)


_BATCH_STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}  # they write to buffers, which their schemas do not say


def _written(graph: fx.Graph, arguments: Mapping[fx.Node, str], by_views: bool = False) -> frozenset[str]:
    """Names of those arguments that an op of the graph writes to.

    Raises:
        CaptureError: a write goes through a view of one, so that it cannot be told what to write back, and `by_views` is not set.
    """
    found: set[str] = set()
    views: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, given in given_arguments(node):
            alias = argument.alias_info
            if not isinstance(given, fx.Node) or alias is None:
                continue
            owner = arguments.get(given) or views.get(given)
            if owner is None:
                continue
            views[node] = owner
            if alias.is_write and given in views and not by_views:
                raise CaptureError(f"it writes to a view of {owner!r}")
            if alias.is_write:
                found.add(owner)
        found.update(arguments[given] for given in batch_statistics(node) if given in arguments)
    return frozenset(found)


def given_arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Schema arguments of an ATen call that were given, with what was given."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _draws(node: fx.Node) -> bool:
    """Does the op draw random numbers? Dropout outside training and attention without dropout do not."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    given |= {argument.name: value for argument, value in given_arguments(node)}
    return given.get("train", True) is not False and given.get("dropout_p", 1.0) != 0.0


def batch_statistics(node: fx.Node) -> list[fx.Node]:
    """Running statistics that a normalisation in training mode updates."""
    switch = _BATCH_STATISTICS.get(node.target._schema.name.partition("::")[2])  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in given_arguments(node)}
    if switch is None or not given.get(switch):
        return []
    return [n for n in (given.get("running_mean"), given.get("running_var")) if isinstance(n, fx.Node)]


def _with_weights(traced: fx.GraphModule, arguments: Sequence[Argument], weights: dict[Any, Any]) -> fx.GraphModule:
    """The traced graph with weights as attributes in place of arguments."""
    graph, env = fx.Graph(), {}
    attributes: dict[str, Any] = dict(weights)
    given = iter(arguments)
    for node in traced.graph.nodes:
        argument = next(given) if node.op == "placeholder" else None
        if argument is not None and argument.weight is not None:
            env[node] = graph.get_attr(argument.weight)
            env[node].meta = dict(node.meta)
        elif node.op == "get_attr":
            held = getattr(traced, node.target)
            name = f"lifted_tensor_{node.target}" if isinstance(held, torch.Tensor) else node.target
            attributes[name] = held
            env[node] = graph.get_attr(name)
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(attributes, graph, "DynamoGraph")
