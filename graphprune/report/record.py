"""What a compile did, as plain data: written to JSON, read back, compared, printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import ConsoleRenderable

from graphprune.errors import InvalidInput, NotPrunable
from graphprune.files import PathLike, atomic_path
from graphprune.report import page, tables
from graphprune.units import Group

FORMAT = 1  # of the JSON; raised when a field changes its meaning


@dataclass(frozen=True)
class Latency:
    """Time of one call on one device: median and quartiles of interleaved runs."""

    median_ms: float
    low_ms: float  # first quartile
    high_ms: float  # third quartile
    device: str  # "cpu, 1 thread", "NVIDIA H200"
    backend: str  # "torch", "onnxruntime", ...


@dataclass(frozen=True)
class Footprint:
    """What a network costs. MACs and latency hold for the example inputs; None where not measured."""

    params: int
    bytes: int
    macs: int | None = None
    latency: Latency | None = None


@dataclass(frozen=True)
class TensorChange:
    """Shape of one tensor in two networks; None where it does not exist."""

    name: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None


@dataclass(frozen=True)
class LayerCost:
    """One layer's share of the cost; pairs are (before, after)."""

    name: str  # module path, or name of the op
    op: str  # the costliest op of the layer
    params: tuple[int, int]
    macs: tuple[int, int]
    width: tuple[int, int] | None = None  # output channels or features; None where no weight makes them
    ms: tuple[float, float] | None = None  # None where not measured


@dataclass(frozen=True)
class GroupSummary:
    """One group of units, without its index tables."""

    name: str
    kind: str
    size: int
    kept: int
    exact: str  # "exact" | "renormalised" | "approximate"
    parameters: int  # weight entries that one unit owns
    members: tuple[str, ...]  # "conv1.weight[0] writer"
    note: str = ""  # the node that makes it renormalised or approximate
    spared: str = ""  # why it is cut only where it is named

    @classmethod
    def of(cls, group: Group, kept: int | None = None) -> GroupSummary:
        members = tuple(f"{m.tensor}[{m.axis}] {m.role.value}" for m in group.members)
        kept = group.size if kept is None else kept
        return cls(group.name, group.kind, group.size, kept, group.exact.value, group.parameters, members, group.note, group.spared)


@dataclass(frozen=True)
class Frozen:
    """Something that cannot be cut, and why."""

    name: str  # the weight, and the axis where that is known
    reason: str
    node: str
    hint: str = ""

    @classmethod
    def of(cls, name: str, why: NotPrunable) -> Frozen:
        return cls(name, why.reason.value, why.node, why.hint)


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran: what it changed and how long it took."""

    name: str
    seconds: float
    effect: str


@dataclass(frozen=True)
class KernelChoice:
    """How the product with one masked weight runs, from so many tokens of the last row up to these; times are of one product, cold."""

    name: str
    shape: tuple[int, ...]
    density: float
    tokens: int
    path: str  # "dense" or the name of a kernel
    reason: str
    dense_us: float | None = None  # None where not measured
    sparse_us: float | None = None
    modelled: float | None = None  # speed-up that the roofline allows

    @classmethod
    def of(cls, layers: Iterable[Any]) -> tuple[KernelChoice, ...]:
        """From what a backend decided for each layer."""
        return tuple(
            cls(layer.name, tuple(layer.shape), layer.density, d.tokens, d.path, d.reason, d.dense_us, d.sparse_us, d.modelled)
            for layer in layers
            for d in layer.decisions
        )


@dataclass(frozen=True)
class Report:
    """Before against after, the decisions between them, and the proof. `print(report)` shows a table, `to_json` keeps everything."""

    before: Footprint
    after: Footprint
    model: str = ""  # class name or file name
    plan_hash: str = ""
    layers: tuple[TensorChange, ...] = ()  # weights whose shape changed
    costs: tuple[LayerCost, ...] = ()  # layer by layer, in the order in which they run
    timing: str = ""  # where and how the times in `costs` were measured, or why not
    rounding: str = ""  # what kept widths are multiples of, and by which measurement or rule
    spread: str = ""  # under a budget of sizes: which groups lose less than others
    groups: tuple[GroupSummary, ...] = ()
    not_prunable: tuple[Frozen, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    kernels: tuple[KernelChoice, ...] = ()  # what a backend with sparse kernels decided, layer by layer
    quality: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # metric -> (before, after)
    certificate: Mapping[str, Any] | None = None  # as `certificate.json` holds it
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)  # by stage: capture, analysis, plan, surgery, verify, ...

    def __rich__(self) -> ConsoleRenderable:
        return tables.report(self)

    def __str__(self) -> str:
        return tables.plain(self)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, default=str)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            InvalidInput: if `text` is no such report.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(**{name: _READ.get(name, lambda it: it)(value) for name, value in data.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(f"this is no report that graphprune wrote: {error}") from None

    def save(self, path: PathLike) -> None:
        """Write `.json` (everything, to be read back) or `.html` (a page for people)."""
        writers: dict[str, Callable[[], str]] = {".json": self.to_json, ".html": lambda: page.html(self)}
        writer = writers.get(Path(path).suffix)
        if writer is None:
            raise InvalidInput(f"a report is written as {' or '.join(writers)}, found {path!s}")
        with atomic_path(path) as file:
            file.write_text(writer(), encoding="utf-8")


def changes(before: Mapping[str, Iterable[int]], after: Mapping[str, Iterable[int]]) -> tuple[TensorChange, ...]:
    """Tensors whose shapes differ between two networks, given as name -> shape, in the order of `before`."""
    rows = [(name, _shape(before.get(name)), _shape(after.get(name))) for name in dict.fromkeys([*before, *after])]
    return tuple(TensorChange(*row) for row in rows if row[1] != row[2])


def _shape(sizes: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if sizes is None else tuple(int(size) for size in sizes)


def _footprint(data: dict[str, Any]) -> Footprint:
    latency = data.pop("latency", None)
    return Footprint(**data, latency=Latency(**latency) if latency else None)


def _layer_cost(data: dict[str, Any]) -> LayerCost:
    pairs: dict[str, Any] = {key: tuple(it) for key, it in data.items() if isinstance(it, list)}
    return LayerCost(**(data | pairs))


_READ: Mapping[str, Callable[[Any], Any]] = {  # how a JSON field becomes what the class holds
    "before": _footprint,
    "after": _footprint,
    "layers": lambda rows: tuple(TensorChange(row["name"], _shape(row["before"]), _shape(row["after"])) for row in rows),
    "costs": lambda rows: tuple(_layer_cost(row) for row in rows),
    "groups": lambda rows: tuple(GroupSummary(**{**row, "members": tuple(row["members"])}) for row in rows),
    "not_prunable": lambda rows: tuple(Frozen(**row) for row in rows),
    "passes": lambda rows: tuple(PassRecord(**row) for row in rows),
    "kernels": lambda rows: tuple(KernelChoice(**{**row, "shape": tuple(row["shape"])}) for row in rows),
    "quality": lambda rows: {name: (before, after) for name, (before, after) in rows.items()},
    "warnings": tuple,
}
