"""The masked network: the original graph with the removed units neutralised. It shares no slicing code with surgery.

Every member slice (writer, reader, carrier, folded constant) is zero. Where an op reduces or normalises over a cut axis itself, zero is
not neutral: softmax, max and top-k get minus infinity there, means and norms take their statistics over the kept positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphprune.axes import Axis, leaves_of
from graphprune.errors import VerificationFailed
from graphprune.execute.interpreter import Compute, Intercept, run
from graphprune.program import Kind, Node, Program, Value, substitute
from graphprune.surgery.cut import Cut

Gone = dict[int, torch.Tensor]  # axis -> boolean (size,): positions that are removed
Neutral = Callable[[Mapping[str, Any], Gone, Compute], tuple[Any, ...]]
Observe = Callable[[Node, Mapping[str, Any], tuple[Any, ...]], None]


def run_masked(
    program: Program,
    cut: Cut,
    inputs: Sequence[Any],
    dtype: torch.dtype | None = torch.float64,
    tensors: Mapping[Value, torch.Tensor] | None = None,
) -> list[Any]:
    """Outputs of the original network with the removed units of `cut` neutralised, at the original shapes."""
    return masked(program, cut, dtype, tensors)(inputs)


def masked(
    program: Program, cut: Cut, dtype: torch.dtype | None = torch.float64, tensors: Mapping[Value, torch.Tensor] | None = None
) -> Callable[..., list[Any]]:
    """The same for many inputs: weights are masked once. What is returned also takes an observer of every node: see `observed`."""
    over = _reduced_axes(cut)
    weights = masked_weights(program, cut, tensors)

    def intercept(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        for value in node.inputs:
            if (
                value.kind is Kind.CONSTANT
                and value.dtype is not None
                and value.dtype.is_floating_point
                and (gone := _gone(cut, value, node))
            ):
                args = {k: _replaced(node.args[k], args[k], value, gone) for k in args}
        if node in cut.bypassed:
            end = cut.bypassed[node].end
            args = {k: torch.zeros_like(a) if node.args[k] is end else a for k, a in args.items()}
        if node in over:
            gone = over[node]
            style = NEUTRAL.get(node.op)
            if style is None:
                raise VerificationFailed(
                    f"{node.op_type} at {node.name} runs over a cut axis and has no neutral form in graphprune.verify.masking.NEUTRAL"
                )
            return style(args, gone, compute)
        if node.op in UNDEFINED_AT_ZERO and (gone := _gone(cut, node.outputs[0])):
            return tuple(_filled_where_undefined(result, gone) for result in compute(args))
        return compute(args)

    return lambda inputs, observe=None: run(program, inputs, tensors=weights, dtype=dtype, intercept=observed(observe, intercept))


def observed(observe: Observe | None, intercept: Intercept = lambda node, args, compute: compute(args)) -> Intercept:
    """Nodes as they were intercepted, and `observe(node, arguments, results)` after each."""
    if observe is None:
        return intercept

    def both(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        results = intercept(node, args, compute)
        observe(node, args, results)
        return results

    return both


def masked_weights(program: Program, cut: Cut, tensors: Mapping[Value, torch.Tensor] | None = None) -> dict[Value, torch.Tensor]:
    """Every weight in floating point with its removed slices zero; one that loses nothing is the program's own tensor."""
    return {
        v: _zeroed(t, _gone(cut, v))
        for v in program.weights.values()
        if (t := (tensors or {}).get(v, v.tensor)) is not None and t.is_floating_point()
    }


def only_weights(cut: Cut) -> bool:
    """Does zeroing weights neutralise all that is removed, with no node treated otherwise (but for 0 / 0)?"""
    read = (v for node in cut.analysis.program.walk() for v in node.inputs if v.kind is Kind.CONSTANT)
    constants = any(v.dtype is not None and v.dtype.is_floating_point and _gone(cut, v) for v in read)
    return not (cut.bypassed or constants or _reduced_axes(cut))


def _reduced_axes(cut: Cut) -> dict[Node, Gone]:
    """Nodes that neutralise a cut axis themselves: removed positions of the first operand that lies along it."""
    found: dict[Node, Gone] = {}
    for flow in cut.analysis.engine.flows:
        over = [axis for axis in flow.over if cut.mask(axis) is not None]
        if not over or flow.node in found:
            continue
        # the very axis that the rule names; or, where the rule names a part of an axis, the axis that holds it
        for same in (_is_one_of, _holds_one_of):
            for operand in dict.fromkeys(v for v in flow.node.inputs if v.shape is not None):
                dims = cut.analysis.axes(operand, flow.node) or ()
                gone = {axis: ~torch.from_numpy(cut.mask(dim)) for axis, dim in enumerate(dims) if same(dim, over)}  # type: ignore[arg-type]
                if gone:
                    found.setdefault(flow.node, gone)
    return found


def _is_one_of(axis: Axis, over: Sequence[Axis]) -> bool:
    return any(axis is other for other in over)


def _holds_one_of(axis: Axis, over: Sequence[Axis]) -> bool:
    leaves = set(leaves_of(axis))
    return any(leaves.issuperset(leaves_of(other)) for other in over)


def _gone(cut: Cut, value: Value, node: Node | None = None) -> Gone:
    dims = cut.analysis.axes(value, node) or ()
    masks = {axis: cut.mask(dim) for axis, dim in enumerate(dims)}
    return {axis: ~torch.from_numpy(mask) for axis, mask in masks.items() if mask is not None}


def _along(gone: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    return gone.reshape([-1 if i == axis else 1 for i in range(rank)])


def _filled(x: torch.Tensor, gone: Gone, fill: float) -> torch.Tensor:
    for axis, mask in gone.items():
        x = x.masked_fill(_along(mask.to(x.device), axis, x.dim()), fill)
    return x


def _filled_where_undefined(x: Any, gone: Gone) -> Any:
    """0 / 0 at a removed position stands for zero."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    for axis, mask in gone.items():
        x = torch.where(_along(mask.to(x.device), axis, x.dim()) & x.isnan(), 0.0, x)
    return x


def _zeroed(x: torch.Tensor, gone: Gone) -> torch.Tensor:
    return _filled(x, gone, 0.0) if gone else x


def _replaced(tree: Any, args: Any, value: Value, gone: Gone) -> Any:
    """`args` with the tensors that stand for `value` in `tree` zeroed."""
    if isinstance(tree, (list, tuple)):
        return type(args)(_replaced(t, a, value, gone) for t, a in zip(tree, args))
    return _zeroed(args, gone) if tree is value else args


# ---- neutral forms


def _first_tensor(args: Mapping[str, Any]) -> str:
    return next(k for k, v in args.items() if isinstance(v, torch.Tensor) or (isinstance(v, list) and v and isinstance(v[0], torch.Tensor)))


def fill(value: float) -> Neutral:
    """Removed positions get the neutral element of the op."""

    def neutral(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
        name = _first_tensor(args)
        x = args[name]
        if not x.is_floating_point():
            x = x.to(torch.float64)
        return compute({**args, name: _filled(x, gone, value)})

    return neutral


def zero_after(neutral: Neutral) -> Neutral:
    """The op would leave minus infinity at removed positions of its result (which has the operand's axes): they are zero."""

    def zeroed(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
        return tuple(_zeroed(result, gone) for result in neutral(args, gone, compute))

    return zeroed


def only_kept(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
    """A reduction over the axis sees the kept positions only."""
    name = _first_tensor(args)
    x = args[name]
    for axis, mask in gone.items():
        x = x[(slice(None),) * axis + (~mask,)]
    return compute({**args, name: x})


def as_is(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
    """Zero is neutral already: no index, gate or row points at a removed unit."""
    return compute(args)


def normalised(
    x: str,
    weight: str,
    bias: str,
    centred: bool,
    axes: Callable[[Mapping[str, Any]], Sequence[int]],
    eps: Callable[[Mapping[str, Any]], float],
) -> Neutral:
    """(x - mean) / sqrt(var + eps) * weight + bias with statistics over kept positions; removed positions are zero."""

    def neutral(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
        value = args[x]
        over = [a % value.dim() for a in axes(args)]
        kept = torch.ones(value.shape, dtype=value.dtype, device=value.device)
        for axis, mask in gone.items():
            kept = kept.masked_fill(_along(mask.to(value.device), axis, value.dim()), 0.0)
        count = kept.sum(over, keepdim=True)
        mean = (value * kept).sum(over, keepdim=True) / count if centred else 0.0
        variance = (((value - mean) * kept) ** 2).sum(over, keepdim=True) / count
        out = (value - mean) / torch.sqrt(variance + eps(args))
        if args.get(weight) is not None:
            out = out * args[weight]
        if args.get(bias) is not None:
            out = out + args[bias]
        return (out * kept,)

    return neutral


def _group_norm(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
    x, groups = args["input"], args["num_groups"] if "num_groups" in args else args["group"]
    kept = (~gone[1]).to(x).reshape(groups, -1)
    y = x.reshape(x.shape[0], groups, kept.shape[1], -1)
    mask = kept[None, :, :, None]
    count = mask.sum((2,), keepdim=True) * y.shape[-1]
    mean = (y * mask).sum((2, 3), keepdim=True) / count
    variance = (((y - mean) * mask) ** 2).sum((2, 3), keepdim=True) / count
    y = ((y - mean) / torch.sqrt(variance + args["eps"]) * mask).nan_to_num(0.0).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    for name, combine in (("weight", torch.mul), ("bias", torch.add)):
        if args.get(name) is not None:
            y = combine(y, args[name].reshape(shape))
    return (_zeroed(y, gone),)


def _batch_norm(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
    """Statistics of the batch, over kept positions."""
    rank = args["input"].dim()
    affine = {name: args[name].reshape([1, -1] + [1] * (rank - 2)) for name in ("weight", "bias") if args.get(name) is not None}
    style = normalised("input", "weight", "bias", True, lambda args: [0, *range(2, rank)], _aten_eps)
    return style({**args, **affine}, gone, compute)


def _attention(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
    """Keys at removed positions do not exist."""
    keep = ~next(iter(gone.values()))
    mask = args.get("attn_mask")
    if mask is not None and mask.shape[-1] > 1:
        mask = mask[..., keep]
    return compute({**args, "key": args["key"][..., keep, :], "value": args["value"][..., keep, :], "attn_mask": mask})


def _trailing(args: Mapping[str, Any]) -> list[int]:
    return [-1 - i for i in range(len(args["normalized_shape"]))]


def _aten_eps(args: Mapping[str, Any]) -> float:
    return torch.finfo(args["input"].dtype).eps if args.get("eps") is None else args["eps"]


_INDEXED = ("index", "index_select", "gather", "take_along_dim", "embedding", "_grouped_mm")

NEUTRAL: dict[tuple[str, str], Neutral] = {
    **{
        ("aten", op): fill(-torch.inf)
        for op in ("softmax", "_softmax", "_safe_softmax", "special_softmax", "topk", "argmax", "amax", "max", "logsumexp")
    },
    **{("aten", op): zero_after(fill(-torch.inf)) for op in ("log_softmax", "_log_softmax")},
    **{("aten", op): fill(torch.inf) for op in ("amin", "min", "argmin")},
    **{("aten", op): only_kept for op in ("mean", "var", "std", "var_mean", "std_mean", "any", "all")},
    ("transformers", "grouped_mm_fallback"): as_is,
    **{("aten", op): as_is for op in ("lstm", "gru", "rnn_tanh", "rnn_relu", *_INDEXED)},
    ("aten", "scaled_dot_product_attention"): _attention,
    **{("aten", op): _batch_norm for op in ("batch_norm", "native_batch_norm")},
    **{("aten", op): normalised("input", "weight", "bias", True, _trailing, _aten_eps) for op in ("layer_norm", "native_layer_norm")},
    **{("aten", op): normalised("input", "weight", "bias", False, _trailing, _aten_eps) for op in ("rms_norm", "_fused_rms_norm")},
    **{("aten", op): _group_norm for op in ("group_norm", "native_group_norm")},
}


def _onnx_after(args: Mapping[str, Any]) -> range:
    return range(args["axis"] % args["X"].dim(), args["X"].dim())


def _onnx_group_norm(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
    x, scale, bias = args["X"], args["scale"], args["bias"]
    if scale.shape[0] != x.shape[1]:  # one per group, before opset 21
        scale, bias = (t.repeat_interleave(x.shape[1] // scale.shape[0]) for t in (scale, bias))
    return _group_norm({"input": x, "num_groups": args["num_groups"], "eps": args["epsilon"], "weight": scale, "bias": bias}, gone, compute)


def _onnx_instance_norm(args: Mapping[str, Any], gone: Gone, compute: Compute) -> tuple[Any, ...]:
    shape = [1, -1] + [1] * (args["input"].dim() - 2)
    affine = {name: args[name].reshape(shape) for name in ("scale", "B")}
    style = normalised("input", "scale", "B", True, lambda a: range(2, a["input"].dim()), lambda a: a["epsilon"])
    return style({**args, **affine}, gone, compute)


NEUTRAL |= {
    **{("", op): fill(-torch.inf) for op in ("Softmax", "Hardmax", "TopK", "ArgMax", "ReduceMax", "ReduceLogSumExp")},
    ("", "LogSoftmax"): zero_after(fill(-torch.inf)),
    **{("", op): fill(torch.inf) for op in ("ReduceMin", "ArgMin")},
    ("", "ReduceMean"): only_kept,
    **{
        ("", op): as_is
        for op in ("LSTM", "GRU", "RNN", "OneHot", "Gather", "GatherElements", "GatherND", "ScatterElements", "Scatter", "ConstantOfShape")
    },
    ("", "LayerNormalization"): normalised("X", "Scale", "B", True, _onnx_after, lambda args: args["epsilon"]),
    ("", "RMSNormalization"): normalised("X", "scale", "", False, _onnx_after, lambda args: args["epsilon"]),
    ("", "GroupNormalization"): _onnx_group_norm,
    ("", "InstanceNormalization"): _onnx_instance_norm,
}

UNDEFINED_AT_ZERO = {
    ("aten", op)
    for op in ("div", "divide", "true_divide", "floor_divide", "fmod", "remainder", "mul", "multiply", "addcdiv", "xlogy", "_weight_norm")
} | {("", "Div"), ("", "Mul"), ("", "Mod")}

__all__ = ["NEUTRAL", "UNDEFINED_AT_ZERO", "run_masked", "substitute"]
