"""The standardized graph: one small view over two dialects, ATen (from torch) and ONNX.

A `Program` is read only. Its nodes are in topological order; each has a `(domain, op_type)` that keys every table of the compiler
(dim rules, execution, literals), and its arguments *by name*: the names of the ATen schema or of the ONNX operator schema, defaults
filled in. Nothing but those tables asks which dialect a node is of. The user's own form of the model stays in `Program.source`, and
surgery edits that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Protocol

import torch


class Kind(Enum):
    """What a value is: only parameters, buffers and constants hold a tensor."""

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # depends on neither inputs nor parameters: folded at capture, its axes are free for each use
    RESULT = "result"


@dataclass(eq=False, slots=True)
class Value:
    """A tensor (or, with `shape` None, a Python scalar such as a symbolic size) that flows between nodes."""

    name: str
    kind: Kind
    shape: Any  # tuple[int, ...]: sizes at the example inputs, symbolic ones replaced by their hints; None for a scalar
    dtype: torch.dtype | None
    dynamic: frozenset[int] = frozenset()  # axes whose size is symbolic
    tensor: Any = None  # torch.Tensor of a weight or constant, never copied from the user's model
    producer: Node | None = None
    uses: list[Node] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"%{self.name}{list(self.shape) if self.shape is not None else ''}"

    @property
    def is_weight(self) -> bool:
        """A floating-point parameter or buffer: what a cut slices and a score reads."""
        return self.kind in (Kind.PARAMETER, Kind.BUFFER) and self.dtype is not None and self.dtype.is_floating_point


@dataclass(eq=False, slots=True)
class Node:
    """One operation. `args` maps schema names to values, (nested) lists of values, and literals, in schema order."""

    name: str
    domain: str  # "aten", "" (ONNX), "graphprune" (ops of our own), "python" (arithmetic on symbolic sizes)
    op_type: str  # without overload name: "linear", "add_", "Conv"
    args: Mapping[str, Any]
    outputs: tuple[Value, ...]
    call: Callable[..., Any]  # call(**args with tensors) -> a tensor, or a tuple of `len(outputs)`
    scope: str = ""  # dotted path of the module (or the ONNX node's namespace) that the node comes from
    source: Any = None  # the FX node or the onnx_ir node behind it
    blocks: tuple[Block, ...] = ()  # bodies of control flow; `call` then also receives `run_block(block, inputs) -> outputs`

    def __repr__(self) -> str:
        outputs, args = ", ".join(map(repr, self.outputs)), ", ".join(f"{k}={v}" for k, v in self.args.items())
        return f"{outputs} = {self.domain or 'onnx'}.{self.op_type}({args})"

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def op(self) -> tuple[str, str]:
        return self.domain, self.op_type

    @property
    def inputs(self) -> list[Value]:
        """Tensor operands in schema order, lists flattened."""
        return [v for v in leaves(self.args.values()) if isinstance(v, Value)]


@dataclass(eq=False, slots=True)
class Block:
    """A body of a control-flow node: its nodes read outer values freely; every value that crosses the border is frozen."""

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def leaves(tree: Any) -> Iterator[Any]:
    """All leaves of nested lists, tuples and mappings."""
    for item in tree:
        if isinstance(item, (list, tuple)):
            yield from leaves(item)
        elif isinstance(item, Mapping):
            yield from leaves(item.values())
        else:
            yield item


def substitute(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """`tree` with every leaf replaced by `leaf(it)`; lists stay lists, tuples tuples."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(substitute(item, leaf) for item in tree)
    if isinstance(tree, Mapping):
        return {key: substitute(item, leaf) for key, item in tree.items()}
    return leaf(tree)


class Reader(Protocol):
    """Weights that lie elsewhere, such as in files larger than the memory: read when they are needed, and forgotten."""

    device: torch.device  # of what it gives, and so of all computing

    def __call__(self, value: Value) -> torch.Tensor: ...

    def shelf(self) -> MutableMapping[str, torch.Tensor]:
        """An empty mapping for tensors of that size."""


@dataclass(eq=False)
class Program:
    """A captured model: nodes in topological order, the values that enter and leave, and the user's own form behind them."""

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]  # flat, in the order of `example_inputs`
    outputs: tuple[Value, ...]  # flat
    weights: Mapping[str, Value]  # parameters and buffers by name; a tied tensor appears once
    source: Any  # TorchSource | OnnxSource
    example_inputs: tuple[torch.Tensor, ...]  # flat, one per entry of `inputs`
    aliases: Mapping[str, str] = field(default_factory=dict)  # name of a tied tensor -> its name in `weights`
    reader: Reader | None = None  # of weights that the program holds no data of (meta device)

    def walk(self) -> Iterator[Node]:
        """All nodes in topological order, those inside control-flow bodies before the node that holds them."""

        def visit(nodes: tuple[Node, ...]) -> Iterator[Node]:
            for node in nodes:
                for block in node.blocks:
                    yield from visit(block.nodes)
                yield node

        return visit(self.nodes)

    @cached_property
    def analysis(self):
        """Axis equations of the whole graph, solved once."""
        from graphprune.analysis import analyze

        return analyze(self)

    @property
    def groups(self):
        """All groups that can be cut, in topological order."""
        return self.analysis.groups

    def explain(self, name: str):
        """Why the weight, module or group `name` is or is not prunable: groups it belongs to, and `NotPrunable` reasons."""
        return self.analysis.explain(name)
