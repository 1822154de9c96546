"""Least-squares refit: kept weights of every layer that lost inputs are moved so that its result changes least on the calibration data.

For a layer y = W x + b whose inputs are split into kept (k) and removed (r) ones, with second moments C = E[x x^T], the best change of the
kept weights is

    W_k' = W_k + W_r C_rk (C_kk + lambda I)^-1

with the moments taken about the mean, and the bias taking up the mean, where there is a bias. It is the optimal brain surgeon update of all
removed weights of a row at once (Hassibi and Stork 1993; used so by He et al. 2017, arXiv 1707.06168). All layers are fitted to the inputs
that the original network gives them, in one pass over the data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.calibration import batches
from graphprune.execute.interpreter import Compute, run
from graphprune.program import Node, Program, Value
from graphprune.repair.affine import Affine, affine
from graphprune.repair.moments import kept, working_dtype
from graphprune.surgery.cut import Cut

log = logging.getLogger("graphprune")

DAMPING = 1e-3  # of the mean diagonal of C: keeps the fit sane with fewer samples than inputs
LARGEST = 8192  # inputs times window positions; beyond this the moments would not fit


@dataclass
class _Moments:
    """Sums over samples of the inputs of one weight, in float64."""

    layer: Affine
    keep: np.ndarray  # kept rows of the unfolded input
    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """rows: (samples, inputs)."""
        rows = rows.double()
        self.count += rows.shape[0]
        self.total = self.total + rows.sum(0)
        self.square = self.square + rows.T @ rows


def least_squares(program: Program, cut: Cut, pruned: Program, data: Any) -> dict[str, Tensor]:
    """New weights and biases of the linear maps and (ungrouped, one- and two-dimensional) convolutions that lost inputs."""
    moments: dict[Value, _Moments] = {}
    layers: dict[str, Value] = {}
    for node in program.nodes:
        found = affine(node)
        unfolded = _unfolding(node, found) if found is not None else None
        if found is None or found.weight is None or unfolded is None or found.weight.name not in pruned.weights:
            continue
        keep = cut.keep(found.x, _input_axis(found))
        if keep is None or unfolded * len(keep) == 0:
            continue
        window = np.arange(unfolded)
        if (found.x.shape or ())[_input_axis(found)] * unfolded > LARGEST:
            log.warning("least_squares: %s has too many inputs (more than %d) and keeps its weights", node.name, LARGEST)
            continue
        layers[node.name] = found.weight
        moments.setdefault(found.weight, _Moments(found, (keep[:, None] * unfolded + window).reshape(-1)))
    if not moments:
        return {}

    def observe(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        if node.name in layers:
            found = affine(node)
            assert found is not None
            name = next(key for key, value in node.args.items() if value is found.x)
            moments[layers[node.name]].add(_rows(node, args, args[name]))
        return compute(args)

    dtype = working_dtype(program)
    for inputs, _ in batches(program, data):
        run(program, inputs, intercept=observe, dtype=dtype)
    out: dict[str, Tensor] = {}
    for weight, sums in moments.items():
        out.update(_refit(cut, weight, sums, pruned))
    return out


def _refit(cut: Cut, weight: Value, moments: _Moments, pruned: Program) -> dict[str, Tensor]:
    layer, count = moments.layer, max(moments.count, 1)
    inputs_first = _inputs_first(layer)
    assert weight.tensor is not None
    dense = kept(weight.tensor.detach(), cut, weight, 1 if inputs_first else 0, 1 if inputs_first else 0).double()
    rows = dense.T if inputs_first else dense.flatten(1)  # (outputs, inputs)
    square, mean = moments.square.to(rows.device) / count, moments.total.to(rows.device) / count
    has_bias = layer.bias is not None and layer.bias.name in pruned.weights
    if has_bias:
        square = square - torch.outer(mean, mean)
    stays = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
    stays[torch.from_numpy(moments.keep).to(rows.device)] = True
    inner, cross = square[stays][:, stays], square[stays][:, ~stays]
    inner.diagonal().add_(DAMPING * inner.diagonal().mean().clamp_min(1e-30))
    change = torch.linalg.solve(inner, cross @ rows[:, ~stays].T).T
    new = rows[:, stays] + change
    value = pruned.weights[weight.name]
    assert value.tensor is not None
    shaped = new.T if inputs_first else new.reshape(value.tensor.shape)
    if not torch.isfinite(shaped).all():
        log.warning("least_squares: the inputs of %s are not finite; it keeps its weights", weight.name)
        return {}
    out = {weight.name: shaped.contiguous()}
    if has_bias:
        assert layer.bias is not None
        old = pruned.weights[layer.bias.name].tensor
        assert old is not None
        out[layer.bias.name] = old.detach().double() + rows @ mean - new @ mean[stays]
    return out


def _inputs_first(layer: Affine) -> bool:
    """Is the weight (inputs, outputs), as in `x @ weight`? A Gemm may have it either way; its node says so."""
    assert layer.weight is not None
    node = layer.weight.uses[0]
    return node.op in {("", "MatMul"), ("aten", "addmm")} or (node.op == ("", "Gemm") and not node["transB"])


def _input_axis(layer: Affine) -> int:
    assert layer.x.shape is not None
    return layer.channel % len(layer.x.shape)


def _unfolding(node: Node, layer: Affine | None) -> int | None:
    """Window positions per input channel: 1 for linear maps; None where the layer is not refitted."""
    if layer is None or layer.weight is None or layer.x.shape is None:
        return None
    shape = layer.weight.shape or ()
    if node.op_type in ("linear", "addmm", "Gemm", "MatMul"):
        return 1 if len(shape) == 2 else None
    if node.op_type not in ("conv1d", "conv2d", "Conv") or len(shape) not in (3, 4) or len(layer.x.shape) != len(shape):
        return None
    grouped = (node.args.get("groups") or node.args.get("group") or 1) != 1
    automatic = node.args.get("auto_pad", "NOTSET") not in ("NOTSET", None, "VALID")
    symbolic = any(not isinstance(p, int) for p in _padding(node, len(shape) - 2))
    return None if grouped or automatic or symbolic else int(np.prod(shape[2:]))


def _padding(node: Node, spatial: int) -> list[Any]:
    """Padding before and after each axis of the window, in the order of `F.pad`: last axis first."""
    if node.domain == "":
        pads = list(node.args.get("pads") or [0] * (2 * spatial))
        pairs = [(pads[i], pads[i + spatial]) for i in range(spatial)]
    else:
        given = node["padding"]
        if isinstance(given, str):
            return [given]
        pairs = [(p, p) for p in (list(given) * spatial)[:spatial]]
    return [p for pair in reversed(pairs) for p in pair]


def _rows(node: Node, args: Mapping[str, Any], x: Tensor) -> Tensor:
    """(samples, inputs): every vector that the layer multiplies with its weight."""
    if node.op_type not in ("conv1d", "conv2d", "Conv"):
        return x.reshape(-1, x.shape[-1])
    shape = node["weight" if node.domain == "aten" else "W"].shape or ()
    spatial = len(shape) - 2
    onnx = node.domain == ""
    strides = list(args["strides" if onnx else "stride"] or [1] * spatial)
    dilations = list(args["dilations" if onnx else "dilation"] or [1] * spatial)
    x, window = F.pad(x, _padding(node, spatial)), list(shape[2:])
    if spatial == 1:
        x, window, strides, dilations = x.unsqueeze(-2), [1, *window], [1, *strides], [1, *dilations]
    pair = [tuple((sizes * 2)[:2]) for sizes in (window, dilations, strides)]
    return F.unfold(x, pair[0], pair[1], 0, pair[2]).transpose(1, 2).flatten(0, 1)
