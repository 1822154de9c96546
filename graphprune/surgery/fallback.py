"""An edited graph as a module: where attributes cannot express a cut, the module (or the whole network) runs the graph instead of its own
Python code.

It keeps the sub-modules, parameters and buffers of the module whose place it takes, under their names. The export was made in evaluation
mode; here every dropout and batch norm
follows the `training` flag of the module it came from.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphprune.analysis import analyze
from graphprune.branches import branches
from graphprune.capture.torch_export import TorchSource, capture_torch, from_graph_module
from graphprune.errors import GraphPruneError, InvalidInput
from graphprune.execute.interpreter import run
from graphprune.execute.likeness import distance
from graphprune.program import Kind, Node, Program
from graphprune.surgery.attributes import scope_of
from graphprune.surgery.cut import Cut
from graphprune.surgery.torch_graph import apply_cut

log = logging.getLogger("graphprune")

_TRAINING_ARGUMENT = {  # op -> its argument that says whether the module trains
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
    "rrelu": "training",
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"), "train"),
}
_ASSERTIONS = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range")  # of sizes before the cut


def shapes_for(module: nn.Module, shapes: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`dynamic_shapes` of the user's module as torch.export wants them of one that runs an edited graph: below `args` and `kwargs`."""
    if shapes is None or not isinstance(module, EditedGraph) or (isinstance(shapes, Mapping) and {*shapes} & {"args", "kwargs"}):
        return shapes
    names = list(module._signature.parameters)
    by_name = dict(shapes) if isinstance(shapes, Mapping) else dict(zip(names, shapes))
    nested = {"args": tuple(by_name.get(name) for name, _ in zip(names, args)), "kwargs": {name: by_name.get(name) for name in kwargs}}
    return {kind: specs for kind, specs in nested.items() if specs}


class EditedGraph(nn.Module):
    """Runs an edited graph with the weights of `shell`, a module of the same parameter names.

    Args:
        shell: the module whose place this takes; its sub-modules and weights become this module's.
        pruned: the edited program; it was captured from a module of the same structure.
        selections: flat input -> axis -> positions to take, for inputs that arrive with their old size.
    """

    edited_graph = True  # told apart without an import

    def __init__(self, shell: nn.Module, pruned: Program, selections: Mapping[int, Mapping[int, np.ndarray]] | None = None) -> None:
        super().__init__()
        source: TorchSource = pruned.source
        self._modules, self._parameters, self._buffers = shell._modules, shell._parameters, shell._buffers
        self._non_persistent_buffers_set = set(shell._non_persistent_buffers_set)
        self.training = shell.training
        for name in ("config", "generation_config", "main_input_name"):
            if hasattr(shell, name):
                setattr(self, name, getattr(shell, name))
        self.original = type(shell).__name__
        self.selected = {i: tuple(keeps) for i, keeps in (selections or {}).items()}
        self._signature = _signature(shell)
        self._names, captured = _arranged(self._signature, source.args, source.kwargs)
        self._captured, self._in_spec = pytree.tree_flatten(captured)
        self._captured = [_kind(leaf) for leaf in self._captured]
        tensors = {n for n, v in zip(self._names, captured) if any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(v))}
        self._literals = {n: v for n, v in zip(self._names, captured) if n not in tensors}
        self._out_spec = source.graph_module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        self._graph = self._owned(source.graph_module, pruned, selections or {})
        self._compile()

    def _owned(self, graph_module: fx.GraphModule, pruned: Program, selections: Mapping[int, Mapping[int, np.ndarray]]) -> fx.Graph:
        """The graph with this module as owner: constants become buffers that are not saved, mode flags are read when it runs."""
        programmed = {node.source: node for node in pruned.nodes}
        modules = dict(self.named_modules(remove_duplicate=False))
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        constants: dict[Any, str] = {}
        for old in graph_module.graph.nodes:
            if old.op == "call_function" and getattr(old.target, "__name__", "").startswith(_ASSERTIONS):
                continue
            new = env[old] = graph.node_copy(old, lambda n: env[n])
            new.meta = {}
            if old.op == "get_attr":
                new.target = constants.get(old.target) or self._adopt(graph_module, str(old.target), len(constants))
                if new.target != old.target:
                    constants[old.target] = new.target
            elif old in programmed:
                self._follow_mode(graph, new, programmed[old], modules)
        self._select(graph, selections)
        graph.set_codegen(fx.graph.CodeGen())
        return graph

    def _select(self, graph: fx.Graph, selections: Mapping[int, Mapping[int, np.ndarray]]) -> None:
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        for i, keeps in selections.items():
            value, made = inputs[i], set()
            for axis, keep in keeps.items():
                self.register_buffer(name := f"_kept_input_{i}_{axis}", torch.from_numpy(keep).to(self._device()), persistent=False)
                with graph.inserting_after(inputs[-1]):
                    positions = graph.get_attr(name)
                with graph.inserting_after(positions):
                    value = graph.call_function(torch.ops.aten.index_select.default, (value, axis, positions))
                    made.add(value)
            inputs[i].replace_all_uses_with(value, delete_user_cb=lambda user, made=made: user not in made)

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _adopt(self, graph_module: fx.GraphModule, name: str, count: int) -> str:
        found, mine = attribute_of(graph_module, name), attribute_of(self, name)
        ours = isinstance(mine, torch.Tensor) and isinstance(found, torch.Tensor) and mine.shape == found.shape
        if ours and not name.startswith(("_kept_", "lifted_tensor", "_lifted")):
            return name
        fresh = f"_constant_{count}"
        if isinstance(found, torch.Tensor):
            self.register_buffer(fresh, found, persistent=False)
        else:
            setattr(self, fresh, found)
        return fresh

    def _follow_mode(self, graph: fx.Graph, new: fx.Node, node: Node, modules: Mapping[str, nn.Module]) -> None:
        path = next((p for p in (scope_of(node),) if p in modules), "")
        flag = f"{path}.training" if path else "training"
        argument = _TRAINING_ARGUMENT.get(node.op_type)
        by_batch = node.args.get("running_mean", node) is None  # a norm without running statistics takes those of its input in both modes
        if argument is not None and argument in node.args and not by_batch:
            with graph.inserting_before(new):
                _set(new, argument, graph.get_attr(flag))
        elif node.op_type == "scaled_dot_product_attention" and not node["dropout_p"]:
            p = next((v for k, v in vars(modules[path]).items() if "drop" in k and isinstance(v, float) and 0 < v < 1), 0.0)
            if p:  # functional: the export in evaluation mode wrote 0
                setattr(self, name := f"_dropout_{sum(k.startswith('_dropout_') for k in vars(self))}", p)
                with graph.inserting_before(new):
                    _set(new, "dropout_p", graph.call_function(_when, (graph.get_attr(flag), graph.get_attr(name))))

    def _compile(self) -> None:
        with warnings.catch_warnings(action="ignore"):
            code = self._graph.python_code("self")
        scope: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, f"<edited graph of {self.original}>", "exec"), scope)
        self.__dict__["_run"] = scope["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_run"} | {"_graph": _flat(self._graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_graph": _built(state["_graph"])})
        self._compile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the original module takes, as far as it was captured."""
        names, values = _arranged(self._signature, args, kwargs)
        given = dict(zip(names, values))
        extra = [n for n, v in given.items() if n not in self._names and v is not None and not _is_default(self._signature, n, v)]
        if extra:
            raise InvalidInput(f"the graph of {self.original} was captured without the argument {extra[0]!r}; give one when capturing")
        open_names = [n for n in self._names if given.get(n) is None]
        given |= {n: self._literals.get(n, _default(self._signature, n)) for n in open_names}
        wanted = [given[n] for n in self._names]
        leaves, spec = pytree.tree_flatten(wanted)
        if spec != self._in_spec or [_kind(leaf) for leaf in leaves] != self._captured:
            expected = _described(self._names, pytree.tree_unflatten(self._captured, self._in_spec))
            found = _described(self._names, pytree.tree_map(_kind, wanted))
            raise InvalidInput(f"the graph of {self.original} was captured with the arguments {expected}; found {found}")
        if self.training:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.num_batches_tracked is not None:
                    module.num_batches_tracked.add_(1)
        return pytree.tree_unflatten(self.__dict__["_run"](self, *leaves), self._out_spec)

    def extra_repr(self) -> str:
        return f"edited graph of {self.original}, {len(self._graph.nodes)} nodes"


@dataclass(frozen=True)
class _At:
    """The node at a position, or, with a name, an operator of torch.ops."""

    position: int
    name: str = ""


def _flat(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as pickle takes it: it knows no operators of torch."""
    at = {node: _At(i) for i, node in enumerate(graph.nodes)}

    def target(found: Any) -> Any:
        if isinstance(found, torch._ops.HigherOrderOperator):
            return _At(-1, f"higher_order.{found.name()}")
        return _At(-1, str(found)) if isinstance(found, torch._ops.OpOverload) else found

    return [(n.op, target(n.target), *fx.node.map_arg((n.args, n.kwargs), at.get), n.name) for n in graph.nodes]  # type: ignore[arg-type]


def _built(rows: Sequence[tuple[Any, ...]]) -> fx.Graph:
    graph, nodes = fx.Graph(), []  # type: fx.Graph, list[fx.Node]
    for op, target, args, kwargs, name in rows:
        target = attrgetter(target.name)(torch.ops) if isinstance(target, _At) else target
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: nodes[a.position] if isinstance(a, _At) else a)  # type: ignore[misc]
        nodes.append(graph.create_node(op, target, args, kwargs, name))
    graph.set_codegen(fx.graph.CodeGen())
    return graph


def _kind(leaf: Any) -> Any:
    """What an argument must be: any tensor, or this very literal."""
    return "tensor" if isinstance(leaf, torch.Tensor) else leaf


def _described(names: Sequence[str], kinds: Sequence[Any]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in zip(names, kinds)).replace("'", "")


def attribute_of(module: nn.Module, name: str) -> Any:
    """What a dotted name refers to; None if nothing."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _when(training: bool, p: float) -> float:
    return p if training else 0.0


def _set(fx_node: fx.Node, name: str, value: Any) -> None:
    from graphprune.surgery.torch_graph import _set_argument

    _set_argument(fx_node, name, value)


def _signature(module: nn.Module) -> inspect.Signature:
    if isinstance(module, EditedGraph):
        return module._signature
    signature = inspect.signature(module.forward)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return inspect.Signature(plain)


def _arranged(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """Names and values of a call, positional ones first, in the order given."""
    names: list[str] = []
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for i in range(len(args)):
        names.append(positional[i].name if i < len(positional) else f"*{i - len(positional)}")
    return names + list(kwargs), [*args, *kwargs.values()]


def _default(signature: inspect.Signature, name: str) -> Any:
    parameter = signature.parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _is_default(signature: inspect.Signature, name: str, value: Any) -> bool:
    default = _default(signature, name)
    plain = isinstance(value, (bool, int, str, float))
    return value is default or (plain and value == default) or (name == "return_dict" and value is True)


# ---- graphs for other input shapes

GIVING_UP = (GraphPruneError, RuntimeError, ValueError, TypeError, KeyError, AssertionError, AttributeError, IndexError)

# which axes of the inputs are left open, the freest first; the export closes those that the code fixes
FREEDOMS: Mapping[str, Callable[[torch.Tensor, int], Iterable[int]]] = {
    "any batch size and length": lambda x, length: (a for a, n in enumerate(x.shape) if a == 0 or (n == length and (a, x.dim()) != (2, 3))),
    "any batch size": lambda x, length: range(min(1, x.dim())),
    "input sizes as captured": lambda x, length: (),
}


def _length(inputs: Sequence[Any]) -> int:
    """The length of the sequences among flat inputs: token ids (batch, length) or features (batch, length, width); 0 if there are none."""
    sequences = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == (3 if x.is_floating_point() else 2)]
    return sequences[0].shape[1] if sequences else 0


def edited_graph(shell: nn.Module, program: Program, cut: Cut, pruned: Program, deadline: float = math.inf) -> tuple[EditedGraph, str]:
    """The whole network as its edited graph, for as many input sizes as it allows and time permits; and a word about them."""
    source: TorchSource = program.source
    if source.dynamic_shapes is not None:
        return EditedGraph(shell, pruned), "the dynamic_shapes that were given"
    for freedom in list(FREEDOMS)[:-1]:
        if time.monotonic() > deadline:
            break
        try:
            other = recaptured(source.module, source.args, source.kwargs, freedom)
            found = EditedGraph(shell, apply_cut(other, transferred(program, cut, other)))
            _check(found, source, pruned)
            return found, freedom
        except GIVING_UP as error:
            log.debug("no graph of %s for %s: %s", type(source.module).__name__, freedom, error)
    return EditedGraph(shell, pruned), "input sizes as captured"


def _check(graph: EditedGraph, source: TorchSource, pruned: Program) -> None:
    """Raises ValueError unless the graph computes what the edited one does."""
    training = graph.training
    with torch.no_grad():
        got = pytree.tree_leaves(graph.eval()(*source.args, **source.kwargs))
    graph.train(training)
    error = distance(got, run(pruned, pruned.example_inputs))
    if not error <= 1e-3:
        raise ValueError(f"outputs differ by {error:.1e}")


def edited_submodule(
    other: Program,
    path: str,
    arriving: Sequence[Any] | None,
    shell: nn.Module,
    program: Program,
    cut: Cut,
    selected: Mapping[int, Sequence[int]] | None = None,
) -> EditedGraph:
    """One sub-module as its own edited graph.

    Args:
        other: the sub-module before the cut, captured by itself.
        arriving: its flat arguments in the pruned network, where what does not come from weights may have its old size; None where the
            network does not run that far.
        shell: the same sub-module of the pruned network.
        selected: flat input -> axes that arrive with their old size; taken from a module like this one where `arriving` is None.

    Raises:
        GraphPruneError: its own graph does not contain the cut.
    """
    new = transferred(program, cut, other, f"{path}." if path else "")
    selections: dict[int, dict[int, np.ndarray]] = {}
    for i, value in enumerate(other.inputs):
        for axis, keep in (new.keeps(value) if value.shape is not None else {}).items():
            if arriving is not None:
                tensor = arriving[i]
                old = isinstance(tensor, torch.Tensor) and tensor.dim() > axis and tensor.shape[axis] == value.shape[axis]
            else:
                old = axis in (selected or {}).get(i, ())
            if old:
                selections.setdefault(i, {})[axis] = keep
    return EditedGraph(shell, apply_cut(other, new), selections)


def recaptured(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], freedom: str) -> Program:
    """Captured again with some axes of its inputs open."""
    return capture_torch(module, args, kwargs, open_shapes(module, args, kwargs, freedom))


def open_shapes(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], freedom: str) -> Any:
    """`dynamic_shapes` of an export that leaves axes open as one of `FREEDOMS` says.

    Raises:
        InvalidInput: the call has nothing of that kind.
    """
    signature = _signature(module)
    names, values = _arranged(signature, args, kwargs)
    axes, length = FREEDOMS[freedom], _length(pytree.tree_leaves(values))
    if "length" in freedom and not length:
        raise InvalidInput("no input is a sequence")
    if any(n.startswith("*") for n in names):
        return None

    def spec(leaf: Any) -> Any:
        free = [a for a in axes(leaf, length) if leaf.shape[a] > 1] if isinstance(leaf, torch.Tensor) else []
        return dict.fromkeys(free, torch.export.Dim.AUTO) or None

    specs = {n: pytree.tree_map(spec, v) for n, v in zip(names, values)}
    extra = {n: s for n, s in specs.items() if n not in signature.parameters}
    keywords = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    found = {n: s for n, s in specs.items() if n in signature.parameters} | ({keywords: extra} if extra and keywords else {})
    return shapes_for(module, found, args, kwargs)


def rebound(program: Program, module: nn.Module) -> Program:
    """A captured sub-module with the weights of another one of its class; constants of its code are taken to be the same."""
    source: TorchSource = program.source
    held = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    attributes: dict[str, Any] = {}
    for node in source.graph_module.graph.nodes:
        if node.op == "get_attr":
            attributes[node.target] = held[node.target] if node.target in held else attribute_of(source.graph_module, node.target)
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph_module.graph, {}))
    for new, old in zip(graph.nodes, source.graph_module.graph.nodes):
        new.meta = dict(old.meta)
    graph._codegen = source.graph_module.graph._codegen
    graph_module = fx.GraphModule(attributes, graph)
    return from_graph_module(graph_module, program.example_inputs, replace(source, module=module, graph_module=graph_module, values={}))


def transferred(program: Program, cut: Cut, other: Program, prefix: str = "") -> Cut:
    """The same cut on another capture of the network, or of one of its sub-modules.

    Raises:
        InvalidInput: the other graph has no groups that cut its weights in the same way.
    """
    other.__dict__["analysis"] = analyze(other, free_border=True)

    def kept(name: str, axis: int) -> np.ndarray | None:
        value = program.weights.get(program.aliases.get(prefix + name, prefix + name))
        dims = cut.analysis.axes(value) if value is not None else None
        return cut.mask(dims[axis]) if dims else None

    removed: dict[str, np.ndarray] = {}
    for group in other.groups:
        for member in group.members:
            mask = kept(member.tensor, member.axis) if member.value.kind in (Kind.PARAMETER, Kind.BUFFER) else None
            if mask is None:
                continue
            gone = np.flatnonzero(~mask[member.index].any(axis=1))
            if len(gone):
                removed[group.name] = gone
            break
    new = Cut(other.analysis, removed)
    bypassed = [frozenset(value.name for value in branch.weights) for branch in cut.bypassed.values()]
    for branch in branches(other) if bypassed else ():
        if frozenset(prefix + value.name for value in branch.weights) in bypassed:
            new.bypassed[branch.join] = branch
    dropped = {prefix + value.name for branch in new.bypassed.values() for value in branch.weights}
    for name, value in other.weights.items():
        if prefix + name in dropped:
            continue
        if value.kind is not Kind.PARAMETER and prefix + name not in program.weights and prefix + name not in program.aliases:
            continue  # a constant of the whole graph
        for axis in range(len(value.shape or ())):
            ours, theirs = new.keep(value, axis), kept(name, axis)
            expected = None if theirs is None else np.flatnonzero(theirs)
            if (ours is None) != (expected is None) or (ours is not None and expected is not None and not np.array_equal(ours, expected)):
                raise InvalidInput(f"the graph of the sub-module cuts axis {axis} of {name!r} in another way than the whole graph")
    return new
