"""Solves the axis equations of a program and reads the groups off the solution.

One pass in topological order lets the rule of every node emit equations; forward passes over the solved graph then compute what is not an
equation: along which factors a value vanishes when units are masked (exactness), and how each weight meets each factor (roles).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from graphprune import axes as ax
from graphprune.axes import Axis, Factor
from graphprune.branches import branches
from graphprune.errors import NotPrunable, Reason, UnsupportedOp
from graphprune.program import Kind, Node, Program, Value
from graphprune.rules import RULES
from graphprune.rules.engine import Engine, Flow
from graphprune.units import Exactness, Group, Member, Role

log = logging.getLogger("graphprune")


@dataclass(eq=False)
class Analysis:
    """The solved equations of one program."""

    program: Program
    engine: Engine
    groups: list[Group] = field(default_factory=list)
    vanish: dict[Value, set[Factor]] = field(default_factory=dict)  # along which factors of groups a result is zero when masked

    def axes(self, value: Value, node: Node | None = None) -> list[Axis] | None:
        """The axes of a value, or None where nothing is known; a constant's are those of its use at `node`."""
        if value.kind is Kind.CONSTANT and node is not None:
            return self.engine.constants.get((node, value))
        return self.engine.dims.get(value)

    @cached_property
    def by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def by_atom(self) -> dict[Factor, Group]:
        return {group.atom: group for group in self.groups}

    def frozen_axes(self) -> Iterator[tuple[Value, int, NotPrunable]]:
        """Every weight axis that has a frozen factor, with the first reason."""
        for value in self.program.weights.values():
            for axis, dim in enumerate(self.engine.dims.get(value, ())):
                for leaf in ax.leaves_of(dim):
                    if leaf.frozen is not None:
                        yield value, axis, leaf.frozen
                        break

    def explain(self, name: str) -> list[tuple[str, int, Group | NotPrunable]]:
        """For the weights of a module (or one weight, or a group): per axis, the groups it belongs to or the reason why it has none.

        Raises:
            InvalidInput: no weight, module or group has this name.
        """
        from graphprune.errors import InvalidInput

        if name in self.by_name:
            return [(m.tensor, m.axis, self.by_name[name]) for m in self.by_name[name].members]
        wanted = [v for key, v in self.program.weights.items() if key == name or key.startswith(name + ".")]
        if name in self.program.aliases:
            wanted.append(self.program.weights[self.program.aliases[name]])
        if not wanted:
            import difflib

            close = difflib.get_close_matches(name, [*self.program.weights, *self.by_name], 3, 0.3)
            raise InvalidInput(f"no weight, module or group is named {name!r}" + (f"; close names: {', '.join(close)}" if close else ""))
        out: list[tuple[str, int, Group | NotPrunable]] = []
        for value in wanted:
            for axis, dim in enumerate(self.engine.dims.get(value, ())):
                for leaf in dict.fromkeys(ax.leaves_of(dim)):
                    reason = leaf.frozen or NotPrunable(Reason.NO_PARAMETER, value.name)
                    out.append((value.name, axis, self.by_atom.get(leaf) or reason))
        return out


MAKES_NUMBERS = {"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "item", "_local_scalar_dense"}


def _without_axes(node: Node, shapeless: set[Value]) -> bool:
    """Does a node make constants, or numbers out of numbers and of the sizes of tensors?"""
    if all(v.kind is Kind.CONSTANT for v in node.outputs):
        return True
    if any(v.shape is not None and v.kind is not Kind.CONSTANT for v in node.outputs):
        return False
    return node.op_type in MAKES_NUMBERS or not any(v.shape is not None or v in shapeless for v in node.inputs)


def analyze(program: Program, on_unknown: str = "freeze", free_border: bool = False) -> Analysis:
    """Solve the axis equations of a program and list its groups.

    Args:
        on_unknown: what to do with an op that has no rule: "freeze" what it touches, or "raise" `UnsupportedOp`.
        free_border: leave the axes of inputs and outputs free (the rule checker and block-wise verification want that).
    """
    engine = Engine(on_unknown)
    analysis = Analysis(program, engine)
    engine.from_input.update(program.inputs)
    shapeless: set[Value] = set()  # tensors of unknown rank: what an unknown op makes, and what is made of that
    boundary = Node("model inputs", "", "", {}, (), call=lambda: None)
    engine.node = boundary
    for value in program.inputs:
        if value.shape is not None:
            for axis in engine.axes(value):
                if not free_border:
                    engine.freeze(axis, Reason.INPUT)
    for node in program.walk():
        engine.node = node
        if any(v in engine.from_input for v in node.inputs) or node.blocks:
            engine.from_input.update(node.outputs)
        sequence = node.op_type in MAKES_SEQUENCE
        if not node.blocks and not sequence and _without_axes(node, shapeless):
            continue  # arithmetic on symbolic sizes, and what depends on nothing else
        if all(_is_empty(v) for v in node.outputs):
            continue  # nothing in it that could move
        rule = RULES.get(node.op)
        tensors = any(v.shape is not None or v in engine.parts or v in shapeless for v in node.inputs)
        of_sizes = not node.blocks and not tensors
        if rule is None and not node.blocks and not of_sizes:
            engine.unknown.setdefault(node.op, []).append(node)
            if on_unknown == "raise":
                raise UnsupportedOp(
                    f"no dim rule for {node.domain or 'ai.onnx'}::{node.op_type} (node {node.name!r}). "
                    "Register one in graphprune.rules.RULES or freeze its axes with on_unknown='freeze'."
                )
        vague = any(v.shape is None for v in node.outputs) and not sequence
        if vague or not shapeless.isdisjoint(node.inputs) or (any(map(_is_empty, node.inputs)) and node.op_type not in TAKES_EMPTY):
            shapeless.update(v for v in node.outputs if v.shape is None)
            engine.unsupported(Reason.FIXED if rule is not None or node.blocks else Reason.NO_RULE)
            engine.seal_indexes()
            continue
        if of_sizes:
            engine.unsupported(Reason.DYNAMIC)  # made of sizes that are known only when the model runs
            continue
        if node.blocks:
            _freeze_border(engine, node)
        elif rule is None:
            engine.unsupported(Reason.NO_RULE, f"op {node.domain or 'ai.onnx'}::{node.op_type}; register a rule in graphprune.rules.RULES")
        elif isinstance(rule, str):
            engine.spec(rule)
        else:
            rule(engine, node)
        engine.seal_indexes()
    engine.node = Node("model outputs", "", "", {}, (), call=lambda: None)
    for value in program.outputs:
        for axes in (engine.dims.get(value, []), *engine.parts.get(value, ())):
            for axis in axes:
                if not free_border:
                    engine.freeze(axis, Reason.OUTPUT)
        if value in engine.indexes and not free_border:
            engine.freeze(engine.indexes[value], Reason.OUTPUT, "the output numbers its positions")
    analysis.groups = _groups(analysis, free_border)
    if not free_border:
        analysis.groups += _layers(program)
    return analysis


def _layers(program: Program) -> list[Group]:
    """Residual branches, each a group of one unit that may go."""
    found = []
    for branch in branches(program):
        members = tuple(Member(v, 0, Role.CARRIER, lambda v=v: np.arange(v.shape[0])[None]) for v in branch.weights if v.shape)  # type: ignore[misc]
        if not members:  # a branch whose only weight is one number
            continue
        first = members[0].tensor.rpartition(".")[0] or members[0].tensor
        found.append(Group(f"{first}:layer", "layer", 1, members, Exactness.EXACT, 0, branch, branch.join.name))
    return found


MAKES_SEQUENCE = frozenset(("SplitToSequence", "SequenceConstruct", "SequenceInsert"))  # of tensors, which have shapes where it has none
TAKES_EMPTY = frozenset(("cat", "concat", "concatenate", "hstack", "vstack", "Concat"))  # an operand without elements adds nothing


def _is_empty(value: Value) -> bool:
    return 0 in (value.shape or ())


def _freeze_border(engine: Engine, node: Node) -> None:
    """Control flow: what crosses the border of a body is frozen, on both sides."""
    inner = {v for b in node.blocks for n in b.nodes for v in n.outputs} | {v for b in node.blocks for v in b.inputs}
    crossing = [v for b in node.blocks for n in b.nodes for v in n.inputs if v not in inner and v.tensor is None]
    crossing += [v for b in node.blocks for v in (*b.outputs, *b.inputs)]
    for value in crossing:
        if value.shape is not None:
            for axis in engine.axes(value):
                engine.freeze(axis, Reason.CONTROL_FLOW)
    engine.unsupported(Reason.CONTROL_FLOW)


def _groups(analysis: Analysis, free_border: bool) -> list[Group]:
    engine, program = analysis.engine, analysis.program
    where: dict[Factor, list[tuple[Value, int]]] = {}
    carriers: Iterable[Value] = program.weights.values()
    if free_border:
        carriers = [*program.inputs, *carriers]
    for value in carriers:
        if value in engine.dims and (value.is_weight or (free_border and value.kind is Kind.INPUT)):
            for axis, dim in enumerate(engine.dims[value]):
                for leaf in dict.fromkeys(ax.leaves_of(dim)):
                    if leaf.frozen is None:
                        where.setdefault(leaf, []).append((value, axis))
    if not free_border:  # buffers follow parameters, they do not make a group
        where = {leaf: at for leaf, at in where.items() if any(v.kind is Kind.PARAMETER for v, _ in at)}
    order = _appearance(program, engine, where)
    approximate, analysis.vanish = _exactness(engine, where)
    roles = _roles(engine, where)
    limits: dict[Factor, int] = {}
    for dim, count, _ in engine.limits:
        factors = list(dict.fromkeys(ax.leaves_of(dim)))
        if len(factors) == 1:
            limits[factors[0]] = max(limits.get(factors[0], 1), count)
    cache: dict[tuple, dict[Factor, np.ndarray]] = {}
    groups: list[Group] = []
    names: dict[str, int] = {}
    for leaf in order:
        members = tuple(_member(engine, value, axis, leaf, roles, cache) for value, axis in where[leaf])
        kind = _kind(leaf, members)
        first = next((m for m in members if m.role is Role.WRITER), members[0])
        base = first.tensor.rsplit(".", 1)[0] if "." in first.tensor else first.tensor
        name = f"{base}:{kind}"
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}.{names[name]}"
        exact, note = Exactness.EXACT, ""
        if leaf in approximate:
            exact, note = Exactness.APPROXIMATE, approximate[leaf]
        elif "renorm" in leaf.marks:
            exact, note = Exactness.RENORMALISED, leaf.marks["renorm"]
        groups.append(Group(name, kind, leaf.size, members, exact, limits.get(leaf, 1), leaf, note))
    return groups


def _appearance(program: Program, engine: Engine, where: Mapping[Factor, Any]) -> list[Factor]:
    """Leaves in the order in which the graph first touches them: it does not depend on how weights are listed."""
    seen: dict[Factor, None] = {}
    for node in program.walk():
        for value in node.inputs:
            if value.kind in (Kind.PARAMETER, Kind.BUFFER, Kind.INPUT):
                for dim in engine.dims.get(value, ()):
                    for leaf in ax.leaves_of(dim):
                        if leaf in where:
                            seen.setdefault(leaf)
    return list(seen)


def _member(engine: Engine, value: Value, axis: int, leaf: Factor, roles: Mapping, cache: dict) -> Member:
    dim = engine.dims[value][axis]

    def positions() -> np.ndarray:
        if (value, axis) not in cache:  # an axis with many parts is asked once per part
            key = axis_key(dim)
            if key not in cache:
                cache[key] = ax.index(dim)
            cache[value, axis] = cache[key]
        return cache[value, axis][leaf]

    return Member(value, axis, roles.get((value, leaf), Role.CARRIER), positions)


def axis_key(dim: Axis) -> tuple:
    """A hashable picture of a normal form."""
    return tuple(f if f.total is None else tuple(axis_key(part) for part in f.total) for f in ax.normal(dim))


KIND_OF_MARK = (  # the first mark that a factor carries names its kind
    ("expert", "expert"),
    ("ssm_head", "ssm_head"),
    ("ssm_state", "ssm_state"),
    ("kv_group", "kv_group"),
    ("head", "head"),
    ("head_dim", "head_dim"),
    ("hidden", "hidden"),
    ("vocab", "vocab"),
    ("conv", "channel"),
)


def _kind(leaf: Factor, members: Iterable[Member]) -> str:
    # attention runs over tokens, which only tables lie along; an axis that a weight computes is one of features
    if "token" in leaf.marks and "expert" not in leaf.marks and all(member.role is Role.CARRIER for member in members):
        return "token"
    return next((kind for tag, kind in KIND_OF_MARK if tag in leaf.marks), "neuron")


def _leafset(engine: Engine, value: Value, node: Node | None = None) -> set[Factor]:
    dims = engine.constants.get((node, value)) if value.kind is Kind.CONSTANT and node is not None else engine.dims.get(value)
    return {leaf for dim in dims or () for leaf in ax.leaves_of(dim)}


def _exactness(engine: Engine, where: Mapping[Factor, Any]) -> tuple[dict[Factor, str], dict[Value, set[Factor]]]:
    """Forward over all flows: along which candidate factors each value vanishes; a sum over one where nothing does is approximate."""
    vanish: dict[Value, set[Factor]] = {}
    leafsets: dict[tuple[Value, Node | None], set[Factor]] = {}

    def leaves(value: Value, node: Node) -> set[Factor]:
        key = (value, node if value.kind is Kind.CONSTANT else None)
        if key not in leafsets:
            leafsets[key] = _leafset(engine, value, node) & where.keys()
        return leafsets[key]

    def vanishing(value: Value, node: Node) -> set[Factor]:
        if value.kind is Kind.RESULT:
            return vanish.get(value, set())
        # masked slices of tensors are zero, and so are those of inputs (free only in the rule checker); integers are left as they are
        return leaves(value, node) if value.dtype is not None and value.dtype.is_floating_point else set()

    def below(axes: Iterable[Axis]) -> set[Factor]:
        return {leaf for axis in axes for leaf in ax.leaves_of(axis)}

    approximate: dict[Factor, str] = {}
    for flow in engine.flows:
        out, over, summed = leaves(flow.out, flow.node), below(flow.over), below(flow.summed)
        dropped = below(flow.dropped) | over
        gone: dict[tuple[Value, ...], set[Factor]] = {}
        present: dict[tuple[Value, ...], set[Factor]] = {}
        for term in (*flow.terms, *flow.products):
            gone[term] = set().union(*(vanishing(value, flow.node) for value in term))
            present[term] = set().union(*(leaves(value, flow.node) for value in term))
            for leaf in ((present[term] - out) | (present[term] & summed)) - dropped - gone[term]:
                approximate.setdefault(leaf, flow.node.name)
        if flow.joined:  # a term has its say along the axes that it has
            zero = {leaf for leaf in set().union(*present.values()) if all(leaf in gone[t] for t in flow.terms if leaf in present[t])}
        else:
            zero = set.intersection(*(gone[term] for term in flow.terms)) if flow.terms else set()
        # a factor that occurs twice (in two axes of the result, or in one that is also summed) vanishes only if it does so in each
        rows = _rows(engine, flow.out, (zero | over) & out)
        for leaf in [leaf for leaf in zero & out if leaf in summed or len(rows[leaf]) > 1]:
            if not _everywhere(flow, rows[leaf], lambda v, leaf=leaf, node=flow.node: leaf in vanishing(v, node), leaf in summed):  # type: ignore[misc]
                zero.discard(leaf)
        vanish[flow.out] = (zero | {leaf for leaf in over & out if len(rows[leaf]) == 1}) & out
    return approximate, vanish


def _everywhere(flow: Flow, rows: Sequence[int], vanishes: Callable[[Value], bool], summed: bool) -> bool:
    """Does every term vanish along each of these axes of the result, by an operand that reaches it?"""
    reach = flow.carries
    if reach is None:
        return not summed
    return all(any(vanishes(value) and row in reach.get(value, ()) for value in term) for term in flow.terms for row in rows)


def _rows(engine: Engine, value: Value, leaves: set[Factor]) -> dict[Factor, list[int]]:
    """The axes of a value that each leaf lies along."""
    found: dict[Factor, list[int]] = {leaf: [] for leaf in leaves}
    for row, dim in enumerate(engine.dims.get(value, ()) if leaves else ()):
        for leaf in dict.fromkeys(ax.leaves_of(dim)):
            if leaf in found:
                found[leaf].append(row)
    return found


def _roles(engine: Engine, where: Mapping[Factor, Any]) -> dict[tuple[Value, Factor], Role]:
    """How each weight meets each factor, read at the first node where it (or a value computed from weights only) meets an activation."""
    roles: dict[tuple[Value, Factor], Role] = {}
    origin: dict[Value, set[Value]] = {}  # of values computed from weights only
    for flow in engine.flows:
        operands = list(dict.fromkeys(v for term in flow.terms for v in term))
        operands += [v for v in flow.node.inputs if v not in operands]
        live = [v for v in operands if v in engine.from_input]
        if flow.out not in engine.from_input:
            origin[flow.out] = set().union(*(origin.get(v, {v} if v.is_weight else set()) for v in operands))
        out, over = _leafset(engine, flow.out), {leaf for axis in flow.over for leaf in ax.leaves_of(axis)}
        for value in operands:
            sources = origin.get(value, {value} if value.is_weight else set())
            if not sources or value in engine.from_input:
                continue
            if not live:
                continue
            term = next((t for t in flow.terms if value in t), ())
            for leaf in _leafset(engine, value) & where.keys():
                elsewhere = any(leaf in _leafset(engine, v, flow.node) for v in term if v is not value)
                if leaf not in out:
                    role = Role.CARRIER if leaf in over else Role.READER
                elif flow.out not in engine.from_input:
                    continue  # picked by experts: still a weight
                elif elsewhere or len(term) < 2:
                    role = Role.CARRIER
                else:
                    role = Role.WRITER
                for source in sources:
                    roles.setdefault((source, leaf), role)
    return roles
