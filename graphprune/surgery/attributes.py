"""Which attributes of a module hold a size that a cut changed, and what they become.

Attributes of torch's own layers follow from their new weights. Any other integer is compared with the sizes that the algebra knows of
where the module's nodes run: an
axis of width `kv * head * head_dim` gives a size for every run of its factors. An integer that equals several of them has several
choices, the likeliest first; running
the module decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune import axes as ax
from graphprune.analysis import axis_key
from graphprune.axes import Axis
from graphprune.errors import Reason
from graphprune.program import Kind, Node, Program
from graphprune.surgery.cut import Cut
from graphprune.surgery.edits import Edit, Size

# ---- torch's own layers


@dataclass(frozen=True)
class Site:
    """Where a layer is used: its path, its nodes after the cut, and what was kept of its weights."""

    path: str
    nodes: tuple[Node, ...]
    keeps: Mapping[str, Mapping[int, np.ndarray]]  # weight name -> axis -> kept positions

    def argument(self, name: str, default: Any) -> Any:
        return next((node[name] for node in self.nodes if name in node.args), default)


def _linear(m: Any, site: Site) -> dict[str, Size]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _bilinear(m: Any, site: Site) -> dict[str, Size]:
    return {"out_features": m.weight.shape[0], "in1_features": m.weight.shape[1], "in2_features": m.weight.shape[2]}


def _conv(m: Any, site: Site) -> dict[str, Size]:
    groups = site.argument("groups", m.groups)
    first, second = m.weight.shape[:2]
    inputs, outputs = (first, second * groups) if m.transposed else (second * groups, first)
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def _features(m: Any, site: Site) -> dict[str, Size]:
    held = next((t for t in (m.weight, m.running_mean) if t is not None), None)
    if held is not None:
        return {"num_features": held.shape[0]}
    node = next((n for n in site.nodes if n.inputs), None)
    return {} if node is None else {"num_features": node.inputs[0].shape[1]}  # type: ignore[index]


def _group_norm(m: Any, site: Site) -> dict[str, Size]:
    node = next((n for n in site.nodes if n.op_type == "group_norm"), None)
    return {} if node is None else {"num_groups": node["num_groups"], "num_channels": node["input"].shape[1]}


def _normalized(m: Any, site: Site) -> dict[str, Size]:
    shape = site.argument("normalized_shape", m.weight.shape if m.weight is not None else m.normalized_shape)
    return {"normalized_shape": tuple(shape)}


def _embedding(m: Any, site: Site) -> dict[str, Size]:
    padding = m.padding_idx
    keep = site.keeps.get(f"{site.path}.weight" if site.path else "weight", {}).get(0)
    if padding is not None and keep is not None:
        padding = int(np.searchsorted(keep, padding)) if padding in keep else None
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1], "padding_idx": padding}


def _prelu(m: Any, site: Site) -> dict[str, Size]:
    return {"num_parameters": m.weight.shape[0]}


def _rnn(m: Any, site: Site) -> dict[str, Size]:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    return {"input_size": m.weight_ih_l0.shape[1], "hidden_size": m.weight_hh_l0.shape[0] // gates}


def _conv1d(m: Any, site: Site) -> dict[str, Size]:
    return {"nx": m.weight.shape[0], "nf": m.weight.shape[1]}


KNOWN: Mapping[type, Callable[[Any, Site], dict[str, Size]]] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.modules.conv._ConvNd: _conv,
    nn.modules.batchnorm._NormBase: _features,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _normalized,
    nn.RMSNorm: _normalized,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.RNNBase: _rnn,
}
_BY_NAME = {"Conv1D": _conv1d}  # of transformers, which is not imported here


def known(module: nn.Module) -> Callable[[Any, Site], dict[str, Size]] | None:
    """The row of a layer whose attributes follow from its weights."""
    for cls in type(module).__mro__:
        if cls in KNOWN:
            return KNOWN[cls]
    return _BY_NAME.get(type(module).__name__) if hasattr(module, "nf") else None


def layer_edits(root: nn.Module, pruned: Program, keeps: Mapping[str, Mapping[int, np.ndarray]]) -> Iterator[Edit]:
    """Attributes of torch's own layers in a network whose weights have been cut."""
    nodes: dict[str, list[Node]] = {}
    for node in pruned.walk():
        nodes.setdefault(scope_of(node), []).append(node)
    for path, module in root.named_modules(remove_duplicate=False):
        rule = known(module)
        if rule is None:
            continue
        for attribute, new in rule(module, Site(path, tuple(nodes.get(path, ())), keeps)).items():
            old = getattr(module, attribute, None)
            if isinstance(new, torch.Size):
                new = tuple(new)
            if (tuple(old) if isinstance(old, (list, tuple)) else old) != new:
                yield Edit(path, attribute, old, new)


# ---- other integers


Label = tuple[str, ...]  # the kinds of the groups that make the difference


@dataclass
class Choice:
    """One attribute that equals an old size, and what it may become, the likeliest first."""

    path: str
    attribute: str
    old: int
    options: tuple[tuple[int, Label], ...]
    sibling: tuple[str, str, int]  # equal for the same attribute of layers of one class
    taken: int = 0

    @property
    def kept(self) -> int:
        """The option that changes nothing."""
        return next(i for i, (new, _) in enumerate(self.options) if new == self.old)

    @property
    def edit(self) -> Edit:
        return Edit(self.path, self.attribute, self.old, self.options[self.taken][0])

    def take(self, label: Label) -> None:
        """Decide as for a sibling, where that is one of the options."""
        self.taken = next((i for i, (_, other) in enumerate(self.options) if other == label), self.taken)


def scope_of(node: Node) -> str:
    """The path of the module that a node comes from; a second call of one module is marked `name@1` by the export."""
    return re.sub(r"@\d+", "", node.scope)


def ancestors(path: str) -> Iterator[str]:
    """The path itself, then its parents, up to the root."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


# Which kinds a name speaks of. It only orders what is tried.
_NAMES = (
    (re.compile(r"expert"), ("expert",)),
    (re.compile(r"kv|key_value"), ("kv_group", "head")),
    (re.compile(r"heads|n_head$|num_head$|groups|attn_dim|(key|value|conv)_dim|qkv|all_head|split_size"), ("head", "kv_group", "ssm_head")),
    (re.compile(r"head_(dim|size)|d_head|d_kv|v_dim|qk_"), ("head_dim",)),
    (re.compile(r"state"), ("ssm_state",)),
    (re.compile(r"inter|inner|ffn|mlp|d_ff|hidden_(dim|features)"), ("neuron", "channel", "head", "ssm_head")),
    (re.compile(r"hidden_size|embed|d_model|^dim$|n_embd"), ("hidden", "channel")),
    (re.compile(r"vocab"), ("vocab",)),
)


_NO_SIZE = re.compile(r"token|layers$|(^|_)(id|ids|idx|index|seed|version)$|layer_id|window|top_?k|kernel|d_conv|chunk_size")


def _fit(attribute: str, label: Label) -> int:
    """1: the name speaks of these kinds; -1: of others; 0: of none, or nothing changes."""
    if not label:
        return 0
    spoken = {kind for pattern, kinds in _NAMES if pattern.search(attribute) for kind in kinds}
    return 0 if not spoken else 1 if spoken & set(label) else -1


class Sizes:
    """Old and new sizes of every run of factors, by the module whose nodes they appear at."""

    def __init__(self, program: Program, cut: Cut) -> None:
        self.cut = cut
        self.own: dict[str, Counter[tuple[int, int, Label]]] = {}
        self.below: dict[str, Counter[tuple[int, int, Label]]] = {}
        self._runs: dict[tuple, set[tuple[int, int, Label]]] = {}
        self.touched = {path for node in program.walk() if cut.touches(node) for path in ancestors(scope_of(node))}
        for node in program.walk():
            scope = scope_of(node)
            found: set[tuple[int, int, Label]] = set()
            for value in (*node.inputs, *node.outputs):
                for axis in cut.analysis.axes(value, node if value.kind is Kind.CONSTANT else None) or ():
                    found |= self._sizes(axis)
            self.own.setdefault(scope, Counter()).update(found)
            for path in ancestors(scope):
                if path in self.touched:
                    self.below.setdefault(path, Counter()).update(found)

    def _sizes(self, axis: Axis) -> set[tuple[int, int, Label]]:
        key = axis_key(axis)
        if key not in self._runs:
            self._runs[key] = set(self._walk(ax.normal(axis)))
        return self._runs[key]

    def _walk(self, axis: Axis) -> Iterator[tuple[int, int, Label]]:
        groups = self.cut.analysis.by_atom
        parts: list[tuple[int, int, frozenset[str], bool]] = []
        for factor in axis:
            leaves = list(ax.leaves_of([factor]))
            mask = ax.mask([factor], self.cut.kept)
            kinds = frozenset(groups[leaf].kind for leaf in leaves if leaf in self.cut.kept and leaf in groups)
            outside = any(leaf.frozen is not None and leaf.frozen.reason in (Reason.INPUT, Reason.DYNAMIC) for leaf in leaves)
            parts.append((factor.size, factor.size if mask is None else int(mask.sum()), kinds, outside))
            for part in factor.total or ():
                yield from self._walk(ax.normal(part))
        for start in range(len(parts)):
            for stop in range(start + 1, len(parts) + 1):
                run = parts[start:stop]
                if not any(outside for *_, outside in run):
                    kinds = frozenset().union(*(k for _, _, k, _ in run))
                    yield prod(o for o, *_ in run), prod(n for _, n, *_ in run), tuple(sorted(kinds))

    def choices(self, root: nn.Module) -> Iterator[Choice]:
        """Every integer that may have to change, innermost modules first."""
        modules = dict(root.named_modules())
        for path in sorted(self.touched & modules.keys(), key=lambda p: -p.count(".")):
            module = modules[path]
            if known(module) is not None:
                continue
            own, below = self.own.get(path, Counter()), self.below.get(path, Counter())
            for attribute, old in _integers(module):
                *holder, name = [part for part in attribute.split(".") if not part.isdigit()]
                options = self._options(name, bool(holder), old, own, below)
                if len(options) > 1:
                    yield Choice(path, attribute, old, options, (type(module).__qualname__, attribute, old))

    def _options(self, name: str, in_config: bool, old: int, own: Counter, below: Counter) -> tuple[tuple[int, Label], ...]:
        """New sizes, the likeliest first. Nothing changes at first unless the name speaks of it or, outside of configs, the module's
        own nodes do.
        """
        seen: Counter[tuple[int, Label]] = Counter()
        here: Counter[tuple[int, Label]] = Counter()
        for size, new, label in below:
            if size == old:
                seen[new, label if new != old else ()] += below[size, new, label]
                here[new, label if new != old else ()] += own[size, new, label]
        keep = (old, ())
        changed = [key for key in seen if key != keep]
        if not changed or _NO_SIZE.search(name):
            return ()

        named = {new for new, label in changed if _fit(name, label) == 1 and not here[new, label]}

        def rank(key: tuple[int, Label]) -> tuple:
            fit = _fit(name, key[1])
            uneven = len(named) > 1 and not here[key]  # the layers below differ: no one size is theirs
            first = 1 if fit == 1 and not uneven else 0 if key == keep or (fit == 0 and not in_config and here[key] > 0) else -1
            return (-first, -here[key], key != keep, -seen[key], key)

        return tuple(sorted({keep, *changed}, key=rank))


_INTERNAL = frozenset(vars(nn.Module()))


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Dotted names and values of the integers that a module or its config holds."""
    for name, held in vars(module).items():
        if name in _INTERNAL or name.startswith("__") or name == "generation_config":
            continue
        if type(held) is int:
            yield name, held
        elif isinstance(held, (list, tuple)):
            yield from _items(name, held)
        elif _is_config(name, held):
            for key, inner in vars(held).items():
                if type(inner) is int and not key.startswith("_"):
                    yield f"{name}.{key}", inner


def _items(name: str, sequence: Any) -> Iterator[tuple[str, int]]:
    if len(sequence) > 16 or hasattr(sequence, "_fields"):
        return
    for i, item in enumerate(sequence):
        if type(item) is int:
            yield f"{name}.{i}", item
        elif isinstance(item, (list, tuple)):
            yield from _items(f"{name}.{i}", item)


def _is_config(name: str, held: Any) -> bool:
    named = "config" in name.lower() or "Config" in type(held).__name__ or name == "args"
    return named and hasattr(held, "__dict__") and not isinstance(held, (nn.Module, torch.Tensor, type)) and not callable(held)
