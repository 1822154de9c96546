"""Clean-up after surgery: constants are folded, no-ops bypassed, dead nodes removed. What stays keeps its name; opsets and metadata stay.

For ONNX the rewrites are those of onnx_ir and onnxscript, on a copy of the model; for torch they are three small ones on the FX graph. No
parameter is folded there, and nothing that training needs is removed (dropout stays).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch import fx

from graphprune.capture.onnx_file import OnnxSource, capture_onnx
from graphprune.capture.torch_export import from_graph_module
from graphprune.errors import InvalidInput
from graphprune.pass_manager import Pass, State, Step
from graphprune.program import Kind, Program, Value
from graphprune.silence import quiet_onnxscript

FOLDED_ENTRIES = 2**20  # a larger constant is folded only where it is not larger than what it is made from
WHOLE = 2**62  # the end of a slice that goes on to the end is the largest integer


@dataclass(frozen=True)
class CleanupPass(Pass):
    """Fold, bypass and remove what computes nothing that is needed at run time. One step per rewrite."""

    name: ClassVar[str] = "cleanup"
    rewrites: tuple[str, ...] = ("fold", "identity", "dead")

    def __post_init__(self) -> None:
        for rewrite in self.rewrites:
            if rewrite not in FX:
                raise InvalidInput(f"cleanup knows the rewrites {', '.join(FX)}, found {rewrite!r}")

    def steps(self, state: State) -> Sequence[Step]:
        return [Step(rewrite) for rewrite in self.rewrites]

    def apply(self, state: State, steps: Sequence[Step]) -> State:
        names = [step.name for step in steps]
        clean = _clean_onnx if isinstance(state.program.source, OnnxSource) else _clean_fx
        return replace(state, program=clean(state.program, names))


# ---- ONNX


def _fold_onnx(model: ir.Model) -> bool:
    with quiet_onnxscript():
        return fold_constants(model).modified


ONNX: Mapping[str, Callable[[ir.Model], bool]] = {
    "fold": _fold_onnx,
    "identity": lambda model: IdentityEliminationPass()(model).modified,
    "dead": lambda model: RemoveUnusedNodesPass()(model).modified,
}


def _clean_onnx(program: Program, rewrites: Sequence[str]) -> Program:
    model = program.source.model.clone()
    modified = [ONNX[name](model) for name in rewrites]  # a list: all of them run
    return capture_onnx(model, list(program.example_inputs)) if any(modified) else program


# ---- FX


def _clean_fx(program: Program, rewrites: Sequence[str]) -> Program:
    module = copy.copy(program.source.graph_module)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copies)
    if result is not None:
        end = graph.output(result)
        end.meta = dict(module.graph.output_node().meta)
    graph._codegen = copy.copy(module.graph._codegen)
    rewriter = _Rewriter(program, graph, {copies[node]: value for node, value in program.source.values.items() if node in copies})
    if not any([FX[name](rewriter) for name in rewrites]):  # a list: all of them run
        return program
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    attributes = {name: rewriter.folded[name] if name in rewriter.folded else _attribute(module, name) for name in read}
    cleaned = fx.GraphModule(attributes, graph, type(module).__name__)
    cleaned.meta = dict(module.meta)
    return from_graph_module(cleaned, program.example_inputs, replace(program.source, graph_module=cleaned, values={}))


def _attribute(module: torch.nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


class _Rewriter:
    """A copy of the graph, what is known of its values, and the constants that were made."""

    def __init__(self, program: Program, graph: fx.Graph, values: Mapping[fx.Node, Any]) -> None:
        self.program, self.graph, self.values = program, graph, values
        self.folded: dict[str, torch.Tensor] = {}
        self.constants: dict[fx.Node, torch.Tensor] = {}

    def fold(self) -> bool:
        """Ops on constants become constants; in-place ops and what they write to stay."""
        module = self.program.source.graph_module
        for node in list(self.graph.nodes):
            value = self.values.get(node)
            made = value.tensor if isinstance(value, Value) and value.kind is Kind.CONSTANT else None
            if made is not None and not node.all_input_nodes and not _written(node):  # an attribute, or `arange` and its like
                self.constants[node] = _attribute(module, node.target) if node.op == "get_attr" else made
            elif self._foldable(node):
                args, keywords = fx.node.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
                with torch.no_grad():
                    result = node.target(*args, **keywords)
                operands = sum(self.constants[n].numel() for n in node.all_input_nodes)
                if isinstance(result, torch.Tensor) and result.numel() <= max(FOLDED_ENTRIES, operands):
                    self._replace(node, result)
        return bool(self.folded)

    def _foldable(self, node: fx.Node) -> bool:
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
            return False
        return bool(node.all_input_nodes) and all(n in self.constants for n in node.all_input_nodes) and not _written(node)

    def _replace(self, node: fx.Node, result: torch.Tensor) -> None:
        name = f"lifted_tensor_{node.name}"
        with self.graph.inserting_before(node):
            new = self.graph.get_attr(name)
        new.meta = {"val": result}
        self.folded[name] = self.constants[new] = result.clone()
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def identity(self) -> bool:
        """Slices of everything, and reshapes and expansions to the same fixed shape, pass their operand on."""
        found = False
        for node in list(self.graph.nodes):
            if self._is_identity(node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
                found = True
        return found

    def _is_identity(self, node: fx.Node) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        name = node.target._schema.name.partition("::")[2]
        if _written(node) or _written(node.args[0]):
            return False
        if name == "alias":
            return True
        if name == "slice":
            start, end, step = (*node.args[2:], *(None,) * 3)[:3]
            return start in (0, None) and (end is None or (isinstance(end, int) and end >= WHOLE)) and step in (1, None) and not node.kwargs
        before, after = self.values.get(node.args[0]), self.values.get(node)
        if name not in ("view", "reshape", "expand") or not isinstance(before, Value) or not isinstance(after, Value):
            return False
        return (before.shape, before.dtype) == (after.shape, after.dtype) and not before.dynamic and not after.dynamic

    def dead(self) -> bool:
        """Nodes that nothing reads and that write nothing."""
        return self.graph.eliminate_dead_code()


def _written(node: fx.Node) -> bool:
    return any(isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable for user in node.users)


FX: Mapping[str, Callable[[_Rewriter], bool]] = {"fold": _Rewriter.fold, "identity": _Rewriter.identity, "dead": _Rewriter.dead}
