"""`torch.compile(model, backend="graphprune", options={...})`: every graph that Dynamo finds is pruned, then compiled by inductor.

Dynamo calls with parameters lifted as inputs, so the user's parameters stay as they are and the pruned graph reads parts of them:

- without gradients, slices are kept beside each parameter and refreshed when its memory or its version counter changed, so that
  `load_state_dict` and optimizer steps take effect (the counter does not see writes through `parameter.data`);
- with gradients, `index_select` is part of the graph, so that gradients reach the user's parameters; what a graph writes (batch
  statistics) is written back.

Inputs and outputs of a graph are frozen axes. What was decided for a parameter is remembered with it: a graph for another batch size, or
for training, keeps the same units. Guards on the identity of the cut parameters keep one module from running with the units of another.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from graphprune.analysis import analyze
from graphprune.capture.dynamo import Argument, DynamoGraph, batch_statistics, capture_dynamo, given_arguments
from graphprune.errors import CaptureError, InvalidInput, NothingToPrune, VerificationFailed
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.surgery.cut import Cut
from graphprune.surgery.torch_graph import apply_cut
from graphprune.units import Group
from graphprune.verify.certificate import certify

log = logging.getLogger("graphprune")

OWN_OPTIONS = {
    "plan": "a Plan to apply; its groups that a graph does not hold are left out",
    "inner": "what compiles the pruned graph: 'inductor' (default), 'aot_eager', 'eager', or any backend of torch.compile",
    "mode": "of inductor, as in torch.compile(mode=), which takes no options beside it",
    "verify": "True (default): each pruned graph without random numbers and batch statistics is compared with the masked graph",
    "on_unknown": "'freeze' (default) or 'raise'",
}
NOT_HERE = ("calibration_data", "num_samples", "loss", "metric", "repair")  # of gp.compile: they need data, a backend has none


@dataclass(frozen=True)
class GraphRecord:
    """What became of one Dynamo graph."""

    status: str  # "pruned" | "unpruned"
    reason: str  # why it is unpruned, else empty
    nodes: int
    params_before: int
    params_after: int
    plan: Plan
    reused: int  # groups decided by an earlier graph
    gradients: bool
    dynamic: bool  # has symbolic sizes
    graph_break: str  # why Dynamo ended the graph here, empty at the end of the function
    certificate: str  # empty when not verified
    seconds: float


@dataclass(frozen=True)
class CompileReport:
    """All graphs that one backend (one set of options) compiled so far."""

    graphs: tuple[GraphRecord, ...] = ()

    @property
    def graph_breaks(self) -> int:
        """Graphs that ended before their function did."""
        return sum(bool(g.graph_break) for g in self.graphs)

    @property
    def plan(self) -> Plan:
        """The decisions of all graphs together."""
        return Plan({name: entry for g in self.graphs for name, entry in g.plan.entries.items()})

    def __str__(self) -> str:
        rows = [f"{len(self.graphs)} graphs, {self.graph_breaks} graph breaks"]
        for g in self.graphs:
            cut = f"{len(g.plan.entries)} groups cut, {g.reused} known from an earlier graph"
            what = f"{g.params_before} -> {g.params_after} parameters, {cut}"
            marks = "".join(f", {name}" for name, on in (("gradients", g.gradients), ("dynamic sizes", g.dynamic)) if on)
            broken = f"; break: {g.graph_break}" if g.graph_break else ""
            rows.append(f"  {g.status}: {g.reason or what}, {g.nodes} nodes{marks}, {g.seconds:.1f} s{broken}")
        return "\n".join(rows)


# ---- what is remembered of each parameter, for as long as it lives

_decisions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> {options: {axis or "layer": removed positions}}
_slices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> {kept positions: _Slice}
_backends: dict[str, GraphPruneBackend] = {}
_last: list[GraphPruneBackend] = []


@dataclass(eq=False)
class _Slice:
    """The kept part of a parameter, and what the parameter was when it was taken."""

    tensor: torch.Tensor
    keeps: tuple[tuple[int, torch.Tensor], ...]  # axis, positions on the parameter's device
    stamp: tuple[Any, ...] | None

    def refresh(self, full: torch.Tensor) -> None:
        stamp = _stamp(full)
        if stamp is None or stamp != self.stamp:
            with torch.no_grad():
                part = full
                for axis, positions in self.keeps:
                    part = part.index_select(axis, positions)
                self.tensor.copy_(part)
            self.stamp = stamp


def _stamp(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Changes when the tensor is written or gets other memory; inference tensors do not count their versions."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def _slice_of(full: torch.Tensor, part: torch.Tensor, keeps: Mapping[int, np.ndarray]) -> _Slice:
    """The shared slice of a parameter: graphs that keep the same positions read the same tensor."""
    known = _slices.setdefault(full, {})
    key = tuple((axis, keep.tobytes()) for axis, keep in keeps.items())
    if key not in known:
        positions = tuple((axis, torch.from_numpy(keep).to(full.device)) for axis, keep in keeps.items())
        known[key] = _Slice(part.detach(), positions, _stamp(full))
    return known[key]


class GraphPruneBackend:
    """A backend for `torch.compile`: `torch.compile(model, backend=GraphPruneBackend(pruning_ratio=0.5))`. `report` says what it did.

    Args:
        options: the planning arguments of `graphprune.compile`, and those of `OWN_OPTIONS`.

    Raises:
        InvalidInput: an option is unknown or cannot be used here.
    """

    def __init__(self, **options: Any) -> None:
        self.own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
        self.planning = options
        self.key = _key(options)
        self.report = CompileReport()
        _check_options(options, self.own)

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        _last[:] = [self]
        inner = self._inner()
        outcome = self._pruned(graph_module, example_inputs)
        record, run = outcome.record, None
        if outcome.lowered is not None:
            run = outcome.lowered.compiled(inner, example_inputs)
        else:
            (log.debug if not record.params_before else log.info)("torch.compile graph left unpruned: %s", record.reason)
            run = inner(graph_module, list(example_inputs))
        cause = getattr(graph_module, "compile_subgraph_reason", None)
        if cause is not None and cause.graph_break:
            record = _with(record, graph_break=str(cause.reason).strip().splitlines()[0])
        self.report = CompileReport((*self.report.graphs, _with(record, seconds=time.perf_counter() - start)))
        return run

    def _inner(self) -> Callable[..., Any]:
        name = self.own.get("inner", "inductor")
        if not isinstance(name, str):
            return name
        compiler: Callable[..., Any] = torch._dynamo.lookup_backend(name)
        if name == "inductor" and self.own.get("mode"):
            patches = torch._inductor.list_mode_options(self.own["mode"])
            return lambda graph_module, inputs: compiler(graph_module, inputs, config_patches=patches)
        return compiler

    def _pruned(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> _Outcome:
        gradients = torch.is_grad_enabled()
        blank = GraphRecord("unpruned", "", len(graph_module.graph.nodes), 0, 0, Plan(), 0, gradients, False, "", "", 0.0)
        try:
            graph = capture_dynamo(graph_module, example_inputs)
        except CaptureError as error:
            log.warning("%s; it runs unpruned", error)
            return _Outcome(_with(blank, reason=str(error)))
        program = graph.program
        size = _params(program)
        dynamic = any(not isinstance(x, torch.Tensor) for x in program.example_inputs)
        blank = _with(blank, nodes=len(program.nodes), params_before=size, params_after=size, dynamic=dynamic)
        if self.own.get("on_unknown", "freeze") == "raise":
            program.__dict__["analysis"] = analyze(program, "raise")
        if not program.groups:
            return _Outcome(_with(blank, reason="no group can be cut"))
        try:
            removed, reused = self._removed(program)
        except NothingToPrune as error:
            return _Outcome(_with(blank, reason=str(error)))
        _remember(program, removed, self.key)
        plan = Plan.of(program, removed)
        if not plan.entries:
            return _Outcome(_with(blank, reason="the plan removes nothing here", reused=reused))
        cut = Cut(program.analysis, removed)
        pruned = apply_cut(program, cut)
        certificate = self._verified(graph, pruned, cut, plan)
        record = _with(blank, status="pruned", params_after=_params(pruned), plan=plan, reused=reused, certificate=certificate)
        return _Outcome(record, _Lowered(graph, pruned, cut, gradients))

    def _removed(self, program: Program) -> tuple[dict[str, tuple[int, ...]], int]:
        """Removed units by group, and how many groups were decided before."""
        if "plan" in self.own:
            return _resolved(self.own["plan"], program), 0
        known = {g.name: units for g in program.groups if (units := _recalled(g, self.key)) is not None}
        if len(known) == len(program.groups):
            return known, len(known)
        from graphprune.backends.widths import widths_of
        from graphprune.planning import make_plan

        widths = widths_of(program, measure=False)  # amid a compilation nothing is measured
        made = make_plan(program, **self.planning, widths=widths).removed
        return {**made, **known}, len(known)

    def _verified(self, graph: DynamoGraph, pruned: Program, cut: Cut, plan: Plan) -> str:
        if not self.own.get("verify", True) or graph.random or graph.written or graph.writes_inputs:
            return ""
        with _no_autocast(graph.program.example_inputs):
            certificate = certify(graph.program, pruned, cut, seeds=(0,), plan_hash=plan.hash)
        if certificate.status == "failed":
            raise VerificationFailed(f"a graph of torch.compile, pruned, is not the masked graph: {certificate}")
        return str(certificate)


@dataclass(frozen=True)
class _Outcome:
    record: GraphRecord
    lowered: _Lowered | None = None


def _with(record: GraphRecord, **changes: Any) -> GraphRecord:
    return GraphRecord(**{**record.__dict__, **changes})


def _params(program: Program) -> int:
    return sum(v.tensor.numel() for v in program.weights.values() if v.is_weight and v.tensor is not None)


@contextlib.contextmanager
def _no_autocast(inputs: Sequence[Any]) -> Iterator[None]:
    """The certificate runs in float64, whatever autocast the compiled call is under."""
    with contextlib.ExitStack() as stack:
        for device in sorted({x.device.type for x in inputs if isinstance(x, torch.Tensor)}):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


# ---- decisions


def _recalled(group: Group, key: str) -> tuple[int, ...] | None:
    """The units that an earlier graph removed of a group, found by its parameters; None for a new group."""
    for member in group.members:
        gone = _decisions.get(member.value.tensor, {}).get(key, {}).get(_place(group, member.axis))
        if gone is not None:
            return tuple(np.flatnonzero(np.isin(member.index, gone).all(1)).tolist())
    return None


def _remember(program: Program, removed: Mapping[str, Sequence[int]], key: str) -> None:
    """Note at each parameter which positions go, of every group: those that lose nothing too."""
    for group in program.groups:
        units = list(removed.get(group.name, ()))
        for member in group.members:
            axes = _decisions.setdefault(member.value.tensor, {}).setdefault(key, {})
            place, gone = _place(group, member.axis), member.index[units].reshape(-1)
            axes[place] = np.union1d(axes.get(place, np.empty(0, np.int64)), gone)


def _place(group: Group, axis: int) -> int | str:
    """A removed layer takes whole weights with it, whatever goes from their axes."""
    return "layer" if group.kind == "layer" else axis


def _resolved(plan: Plan, program: Program) -> dict[str, tuple[int, ...]]:
    """What a given plan removes of the groups that are in this graph."""
    removed: dict[str, tuple[int, ...]] = {}
    for name, entry in plan.entries.items():
        with contextlib.suppress(InvalidInput):  # another graph holds this group
            removed.update(Plan({name: entry}).resolve(program))
    return removed


# ---- the pruned graph under the arguments of the Dynamo graph


class _Lowered:
    """A pruned graph that takes the live arguments of the Dynamo graph: cut weights are attributes (slices) or sliced in the graph."""

    def __init__(self, graph: DynamoGraph, pruned: Program, cut: Cut, gradients: bool) -> None:
        program = graph.program
        cuts = {value.name: (value, keeps) for value, keeps in cut.weights.items() if value.name in pruned.weights}
        self.arguments = graph.arguments
        self.live: list[int] = []  # positions of arguments that the pruned graph takes
        self.slices: list[tuple[int, _Slice]] = []
        self.graph, self.attributes = fx.Graph(), {}  # type: fx.Graph, dict[str, Any]
        old = pruned.source.graph_module
        inputs = iter(old.graph.find_nodes(op="placeholder"))
        env: dict[fx.Node, fx.Node] = {}
        weights: dict[str, fx.Node] = {}
        self.parts: dict[fx.Node, list[tuple[fx.Node, int, fx.Node]]] = {}  # sliced in the graph -> steps (whole, axis, positions)
        for position, argument in enumerate(graph.arguments):
            name = argument.weight and program.aliases.get(argument.weight, argument.weight)
            value, keeps = cuts.get(name, (None, {})) if name else (None, {})
            whole = value.tensor if value is not None else None
            if name and whole is not None and name not in graph.written and not (gradients and whole.requires_grad):
                if name not in weights:
                    held = _slice_of(whole, pruned.weights[name].tensor, keeps)  # type: ignore[arg-type]
                    self.slices.append((position, held))
                    weights[name] = self._attribute(f"weight_{position}", held.tensor)
                continue
            placeholder = self._placeholder(argument)
            self.live.append(position)
            if name is None:
                env[next(inputs)] = placeholder
            elif name not in weights:
                weights[name] = self._sliced(placeholder, keeps, whole)
        for node in old.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":
                name = program.aliases.get(node.target, node.target)
                env[node] = weights[name] if name in weights else self._attribute(node.target, _held(old, node.target))
                continue
            new = env[node] = self.graph.node_copy(node, lambda n: env[n])
            new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
            self._write_back(new)

    def _attribute(self, name: str, tensor: Any) -> fx.Node:
        name = name.replace(".", "_")
        self.attributes[name] = tensor
        return self.graph.get_attr(name)

    def _placeholder(self, argument: Argument) -> fx.Node:
        node = self.graph.placeholder(argument.placeholder.name)
        node.meta = dict(argument.placeholder.meta)
        if argument.source is not None:
            node._dynamo_source = argument.source
        return node

    def _sliced(self, whole: fx.Node, keeps: Mapping[int, np.ndarray], tensor: torch.Tensor | None) -> fx.Node:
        steps, part = [], whole
        for axis, keep in keeps.items():
            assert tensor is not None
            positions = self._attribute(f"keep_{len(self.attributes)}", torch.from_numpy(keep).to(tensor.device))
            steps.append((part, axis, positions))
            part = self.graph.call_function(torch.ops.aten.index_select.default, (part, axis, positions))
        if steps:
            self.parts[part] = steps
        return part

    def _write_back(self, node: fx.Node) -> None:
        """What the node wrote into a part of a weight goes into the weight."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return
        written = [given for argument, given in given_arguments(node) if argument.alias_info is not None and argument.alias_info.is_write]
        for part in dict.fromkeys([*written, *batch_statistics(node)]):
            for whole, axis, positions in reversed(self.parts.get(part, ())):
                self.graph.call_function(torch.ops.aten.index_copy_.default, (whole, axis, positions, part))
                part = whole

    def compiled(self, inner: Callable[..., Any], example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph_module = fx.GraphModule(self.attributes, self.graph, "PrunedGraph")
        _guard(self.arguments, {position for position, _ in self.slices} | {i for i in self.live if self.arguments[i].weight})
        run = inner(graph_module, [example_inputs[i] for i in self.live])
        live, slices = tuple(self.live), tuple(self.slices)

        def call(*args: Any) -> Any:
            for position, held in slices:
                held.refresh(args[position])
            return run(*[args[i] for i in live])

        return call


def _held(module: fx.GraphModule, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _guard(arguments: Sequence[Argument], positions: set[int]) -> None:
    """Another module's parameters are another graph: without this, a second instance of a class runs with the units of the first.

    The guard on the module at the root keeps such graphs from counting as recompilations of each other.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return
    from torch._dynamo.guards import GuardBuilder

    for position in sorted(positions):
        source = arguments[position].source
        roots = [source] if source is not None else []
        while roots and getattr(roots[-1], "base", None) is not None:
            roots.append(roots[-1].base)
        for guarded in dict.fromkeys((*roots[:1], *roots[-1:])):
            context.guards_context.dynamo_guards.add(guarded.make_guard(GuardBuilder.ID_MATCH))


# ---- options


def _key(options: Mapping[str, Any]) -> str:
    """Equal for equal options."""
    return ", ".join(f"{name}={value.hash if isinstance(value, Plan) else repr(value)}" for name, value in sorted(options.items()))


def _check_options(planning: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name in NOT_HERE:
        if name in planning:
            raise InvalidInput(
                f"option {name!r} needs data, which a torch.compile backend does not have; "
                "make a plan with graphprune.plan and give it as options={'plan': plan}"
            )
    if "plan" in own:
        if not isinstance(own["plan"], Plan):
            raise InvalidInput(f"option 'plan' takes a graphprune.Plan, found {type(own['plan']).__name__}")
        if planning:
            raise InvalidInput(f"option 'plan' is the whole decision, but {', '.join(sorted(planning))} came with it")
        return
    from graphprune.planning import make_plan

    known = (set(inspect.signature(make_plan).parameters) - {"program", "widths", *NOT_HERE}) | set(OWN_OPTIONS)
    for name in planning:
        if name not in known:
            raise InvalidInput(f"unknown option {name!r} of the graphprune backend; known are {', '.join(sorted(known))}")
    if own.get("on_unknown", "freeze") not in ("freeze", "raise"):
        raise InvalidInput(f"on_unknown is 'freeze' or 'raise', found {own['on_unknown']!r}")


def graphprune_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The entry point behind `torch.compile(model, backend="graphprune", options=...)`."""
    given = {**(options or {}), **({"mode": mode} if mode else {})}
    key = _key(given)
    if key not in _backends:
        _backends[key] = GraphPruneBackend(**given)
    return _backends[key](graph_module, example_inputs)


def last_report() -> CompileReport:
    """What the backend that compiled last did, since its options were first used."""
    return _last[0].report if _last else CompileReport()


__all__ = ["CompileReport", "GraphPruneBackend", "GraphRecord", "graphprune_backend", "last_report"]
