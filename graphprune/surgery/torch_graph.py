"""Applies a cut to an exported graph: slices weights and recomputes literals. The edited graph is right by construction and is the
reference for write-back.

Literals are never patched: each is recomputed from what the algebra says of the node's operands and results after the cut. One row per op
that has any.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graphprune.capture.torch_export import TorchSource, from_graph_module
from graphprune.program import Kind, Node, Program, Value, substitute
from graphprune.surgery.cut import Cut

Edit = tuple[Any, dict[str, Any]] | dict[str, Any]  # (another overload, all its arguments) or the changed arguments


def apply_cut(program: Program, cut: Cut) -> Program:
    """The pruned program: a new graph module that shares every tensor that was not cut."""
    source: TorchSource = program.source
    old = source.graph_module
    nodes = {node.source: node for node in program.nodes}
    origin = {v: n for n, found in source.values.items() for v in (found if isinstance(found, tuple) else (found,)) if isinstance(v, Value)}
    tensors = sliced_weights(program, cut)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}

    place = next((t.device for t in tensors.values()), torch.device("cpu"))

    def kept(positions: np.ndarray, device: torch.device | str = place) -> fx.Node:
        name = f"lifted_tensor_kept_{len(attributes)}"  # a constant for `from_graph_module`
        while hasattr(old, name):  # the network was cut before
            name += "_"
        attributes[name] = torch.from_numpy(positions).to(device)
        return graph.get_attr(name)

    for fx_node in old.graph.nodes:
        new = env[fx_node] = graph.node_copy(fx_node, lambda n: env[n])
        if fx_node.op == "get_attr":
            value = source.values.get(fx_node)
            attributes[fx_node.target] = tensors.get(value) if value in tensors else _attribute(old, fx_node.target)
            continue
        node = nodes.get(fx_node)
        if node in cut.bypassed:
            graph.erase_node(new)
            env[fx_node] = env[origin[cut.bypassed[node].skip]]  # type: ignore[index]
            continue
        if fx_node.target in _VIEWS:  # operands may now be laid out otherwise, so that a view is no longer possible
            new.target = torch.ops.aten.reshape.default
        elif fx_node.target is torch.ops.aten.view_as_complex.default:
            with graph.inserting_before(new):
                whole = graph.call_function(torch.ops.aten.contiguous.default, (new.args[0],))
                whole.meta = dict(new.args[0].meta)  # type: ignore[union-attr]
            new.args = (whole,)
        if fx_node.target is torch.ops.aten.view.default and cut.removed:
            new.target = torch.ops.aten.reshape.default  # upstream of here something may be laid out in memory otherwise
        if node is None or not cut.touches(node):
            continue
        metas = fx_node.meta.get("val")
        device = getattr(metas[0] if isinstance(metas, (tuple, list)) else metas, "device", "cpu")
        new.meta["shapes"] = tuple(cut.shape(v) if v.shape is not None else None for v in node.outputs)
        with graph.inserting_before(new):
            for value in dict.fromkeys(v for v in node.inputs if v.kind is Kind.CONSTANT):
                picked = env[origin[value]]  # its axes are free for each use: select what this use keeps
                for axis, keep in cut.keeps(value, node).items():
                    picked = graph.call_function(torch.ops.aten.index_select.default, (picked, axis, kept(keep, value.tensor.device)))  # type: ignore[union-attr]
                    picked.meta = {"val": value.tensor, "shapes": (cut.shape(value, node),)}
                new.replace_input_with(env[origin[value]], picked)
            edit = LITERALS.get(node.op_type, _no_edit)(node, cut)
            if isinstance(edit, tuple):
                new.target, edit = edit
                new.args, new.kwargs = (), {}

            def lowered(leaf: Any) -> Any:
                if isinstance(leaf, Scaled):
                    whole = graph.call_function(operator.mul, (env[origin[leaf.size]], leaf.new))
                    return graph.call_function(operator.floordiv, (whole, leaf.old))
                return env[origin[leaf]] if isinstance(leaf, Value) else kept(leaf, device) if isinstance(leaf, np.ndarray) else leaf

            for name, literal in edit.items():
                _set_argument(new, name, substitute(literal, lowered))
    if cut.bypassed:
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))  # in-place and random ops go too
        read = {n.target for n in graph.nodes if n.op == "get_attr"}
        attributes = {name: tensor for name, tensor in attributes.items() if name in read}
    graph._codegen = copy.copy(old.graph._codegen)
    graph_module = fx.GraphModule(attributes, graph, "Pruned" + type(source.module).__name__)
    graph_module.meta = dict(old.meta)
    return from_graph_module(graph_module, program.example_inputs, replace(source, graph_module=graph_module, values={}))


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def sliced_weights(program: Program, cut: Cut) -> dict[Value, torch.Tensor]:
    """Every weight after the cut; what is not cut is the tensor itself. requires_grad, device, dtype and memory format stay."""
    out: dict[Value, torch.Tensor] = {}
    for value in program.weights.values():
        tensor = value.tensor
        assert tensor is not None
        keeps = cut.keeps(value)
        if keeps:
            with torch.no_grad():
                for axis, keep in keeps.items():
                    tensor = tensor.index_select(axis, torch.from_numpy(keep).to(tensor.device))
                if (
                    value.tensor.dim() == 4
                    and value.tensor.is_contiguous(memory_format=torch.channels_last)
                    and not value.tensor.is_contiguous()
                ):  # type: ignore[union-attr]
                    tensor = tensor.contiguous(memory_format=torch.channels_last)
            if isinstance(value.tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=value.tensor.requires_grad)
        out[value] = tensor
    return out


def _set_argument(fx_node: fx.Node, name: str, literal: Any) -> None:
    schema = fx_node.target._schema.arguments  # type: ignore[union-attr]
    position = next(i for i, a in enumerate(schema) if a.name == name)
    if schema[position].kwarg_only or position > len(fx_node.args):
        fx_node.update_kwarg(name, literal)
    elif position == len(fx_node.args):
        fx_node.args = (*fx_node.args, literal)
    else:
        fx_node.update_arg(position, literal)


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default)


# ---- literals


def _no_edit(node: Node, cut: Cut) -> Edit:
    return {}


def _target_shape(argument: str) -> Callable[[Node, Cut], Edit]:
    """A shape argument: entries of axes that changed get their new size; -1 stays, a symbolic size is scaled."""

    def edit(node: Node, cut: Cut) -> Edit:
        shape = cut.shape(node.outputs[0])
        return {argument: [entry if entry == -1 else _resized(entry, new, cut) for entry, new in zip(node[argument], shape)]}

    return edit


@dataclass(frozen=True)
class Scaled:
    """A symbolic size times new / old: one factor of the axis is symbolic and stays, another was cut."""

    size: Value
    new: int
    old: int


def _resized(entry: Any, new: int, cut: Cut) -> Any:
    if not isinstance(entry, Value):
        return new
    if entry.tensor is None:
        return entry  # data decides it, so the axis is frozen
    now = _after(entry, cut)
    return entry if now == new else Scaled(entry, new, now)


def _after(size: Any, cut: Cut) -> Any:
    """A symbolic size at the example sizes in the cut graph: it may have been read off a tensor that lost some."""
    node = size.producer if isinstance(size, Value) else None
    if node is not None and node.op_type == "sym_size":
        return cut.shape(node["self"])[node["dim"]]
    if node is not None and node.domain == "python":
        return node.call(**substitute(node.args, lambda leaf: _after(leaf, cut)))
    return int(size.tensor) if isinstance(size, Value) else size


def _view(node: Node, cut: Cut) -> Edit:
    """What is cut may be laid out in memory otherwise, so that a view is no longer possible."""
    changed = _target_shape("size")(node, cut)
    return torch.ops.aten.reshape.default, {"self": node["self"], "shape": changed["size"]}  # type: ignore[index, call-overload]


def _unflatten(node: Node, cut: Cut) -> Edit:
    dim = node["dim"] % len(node["self"].shape)
    count = len(node["sizes"])
    return {"sizes": list(cut.shape(node.outputs[0])[dim : dim + count])}


def _split(node: Node, cut: Cut) -> Edit:
    dim = node["dim"] % len(node["self"].shape)
    if cut.keep(node["self"], dim) is None:
        return {}
    sizes = [cut.shape(out)[dim] for out in node.outputs]
    return torch.ops.aten.split_with_sizes.default, {"self": node["self"], "split_sizes": sizes, "dim": dim}


def _slice(node: Node, cut: Cut) -> Edit:
    """The kept positions among those the slice takes, renumbered: a slice when they are evenly spaced, else an index_select."""
    x, dim, at, bounds = _taken(node, cut)
    if at is None:
        return {}
    if bounds is not None:
        return torch.ops.aten.slice.Tensor, {"self": x, "dim": dim, **bounds}
    return torch.ops.aten.index_select.default, {"self": x, "dim": dim, "index": at}


def _slice_scatter(node: Node, cut: Cut) -> Edit:
    x, dim, at, bounds = _taken(node, cut)
    if at is None:
        return {}
    if bounds is not None:
        return bounds
    return torch.ops.aten.index_copy.default, {"self": x, "dim": dim, "index": at, "source": node["src"]}


def _taken(node: Node, cut: Cut) -> tuple[Value, int, np.ndarray | None, dict[str, int] | None]:
    """Operand and axis of a slice, which of the kept positions it takes (None: nothing is removed), and its bounds where they are evenly
    spaced.
    """
    x, dim = node["self"], node["dim"] % len(node["self"].shape)
    keep = cut.keep(x, dim, node)
    if keep is None:
        return x, dim, None, None
    if "length" in node.args:
        taken = np.arange(node["start"], node["start"] + node["length"])
    else:
        taken = np.arange(x.shape[dim])[slice(node["start"], None if node["end"] is None else int(node["end"]), node["step"])]  # type: ignore[index]
    at = np.flatnonzero(np.isin(keep, taken))
    steps = np.diff(at)
    if len(at) and (len(steps) == 0 or (steps == steps[0]).all()):
        return x, dim, at, {"start": int(at[0]), "end": int(at[-1]) + 1, "step": int(steps[0]) if len(steps) else 1}
    return x, dim, at, None


def _squeeze(node: Node, cut: Cut) -> Edit:
    """Axes of size 1 by name, so that an axis of which one position is left stays."""
    x = node["self"]
    if "dim" in node.args:
        return {}
    return torch.ops.aten.squeeze.dims, {"self": x, "dim": [i for i, n in enumerate(x.shape) if n == 1]}


def _index(node: Node, cut: Cut) -> Edit:
    """Constant positions of one axis, renumbered."""
    x, picks = node["self"], node["indices"]
    new = list(picks)
    for dim, pick in enumerate(picks):
        keep = cut.keep(x, dim)
        if keep is not None and isinstance(pick, Value) and pick.kind is Kind.CONSTANT:
            new[dim] = _positions(pick, keep, x.shape[dim])
    return {"indices": new} if any(a is not b for a, b in zip(new, picks)) else {}


def _index_select(node: Node, cut: Cut) -> Edit:
    x, pick, dim = node["self"], node["index"], node["dim"] % len(node["self"].shape)
    keep = cut.keep(x, dim)
    return {"index": _positions(pick, keep, x.shape[dim])} if keep is not None and pick.kind is Kind.CONSTANT else {}


def _positions(pick: Value, keep: np.ndarray, length: int) -> np.ndarray:
    wanted = pick.tensor.cpu().numpy() % length  # type: ignore[union-attr]
    return np.searchsorted(keep, wanted[np.isin(wanted, keep)])


def _select(node: Node, cut: Cut) -> Edit:
    x, dim = node["self"], node["dim"] % len(node["self"].shape)
    keep = cut.keep(x, dim)
    if keep is None:
        return {}
    return {"index": int(np.searchsorted(keep, node["index"] % x.shape[dim]))}


def _repeat(node: Node, cut: Cut) -> Edit:
    new, old = cut.shape(node.outputs[0]), cut.shape(node["self"])
    name = "repeats" if "repeats" in node.args else "dims"
    times = node[name]
    old = (1,) * (len(new) - len(old)) + old
    return {name: [n // o if isinstance(r, int) else r for n, o, r in list(zip(new, old, [1] * (len(new) - len(times)) + times))]}


def _repeat_interleave(node: Node, cut: Cut) -> Edit:
    dim = node["dim"]
    size = cut.shape(node.outputs[0])[dim]
    return {"repeats": size // cut.shape(node["self"])[dim], **({"output_size": size} if node["output_size"] is not None else {})}


def _convolution(node: Node, cut: Cut) -> Edit:
    if node["groups"] == 1:
        return {}
    channel = len(node["input"].shape) - len(node["weight"].shape) + 1
    channels, weight = cut.shape(node["input"])[channel], cut.shape(node["weight"])
    transposed = node.args.get("transposed", node.op_type.startswith("conv_transpose"))
    if not transposed:
        return {"groups": channels // weight[1]}
    return {"groups": cut.shape(node.outputs[0])[channel] // weight[1]}


def _normalized_shape(node: Node, cut: Cut) -> Edit:
    return {"normalized_shape": list(cut.shape(node["input"])[-len(node["normalized_shape"]) :])}


def _groups(operand: str, count: str) -> Callable[[Node, Cut], Edit]:
    """How many groups of channels have any left."""

    def edit(node: Node, cut: Cut) -> Edit:
        keep = cut.keep(node[operand], 1)
        if keep is None:
            return {}
        per_group = node[operand].shape[1] // node[count]
        return {count: len(np.unique(keep // per_group))}

    return edit


def _native_group_norm(node: Node, cut: Cut) -> Edit:
    shape = cut.shape(node["input"])
    return {"N": shape[0], "C": shape[1], "HxW": math.prod(shape[2:]), **_groups("input", "group")(node, cut)}  # type: ignore[dict-item]


def _attention(node: Node, cut: Cut) -> Edit:
    """The scale is that of the old head dim."""
    if node["scale"] is not None or cut.keep(node["query"], len(node["query"].shape) - 1) is None:
        return {}
    return {"scale": 1.0 / math.sqrt(node["query"].shape[-1])}


def _bins(node: Node, cut: Cut) -> Edit:
    units = cut.shape(node.outputs[0])[-1]
    return {"bins": units, "max": units - 1 + (node["max"] - (node.outputs[0].shape[-1] - 1))}


def _count_argument(name: str) -> Callable[[Node, Cut], Edit]:
    return lambda node, cut: {name: cut.shape(node.outputs[0])[-1]}


LITERALS: Mapping[str, Callable[[Node, Cut], Edit]] = {
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias"), _view),
    "expand": _target_shape("size"),
    "reshape": _target_shape("shape"),
    "broadcast_to": _target_shape("size"),
    "unflatten": _unflatten,
    **dict.fromkeys(
        (
            "split",
            "split_with_sizes",
            "chunk",
            "tensor_split",
            "unsafe_split",
            "unsafe_split_with_sizes",
            "unsafe_chunk",
            "split_with_sizes_copy",
        ),
        _split,
    ),
    **dict.fromkeys(("slice", "narrow", "narrow_copy"), _slice),
    "slice_scatter": _slice_scatter,
    "index": _index,
    "index_select": _index_select,
    **dict.fromkeys(("select", "select_scatter"), _select),
    "squeeze": _squeeze,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"), _normalized_shape),
    "group_norm": _groups("input", "num_groups"),
    "native_group_norm": _native_group_norm,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _groups("self", "groups")),
    "scaled_dot_product_attention": _attention,
    "histc": _bins,
    "bincount": _count_argument("minlength"),
    "one_hot": _count_argument("num_classes"),
}
