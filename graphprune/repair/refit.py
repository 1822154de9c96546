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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.calibration import Gram, batches
from graphprune.execute.interpreter import Compute, run
from graphprune.linear_maps import LinearMap, columns, linear_maps
from graphprune.program import Node, Program, Value
from graphprune.repair.affine import affine
from graphprune.repair.moments import kept, working_dtype
from graphprune.surgery.cut import Cut

log = logging.getLogger("graphprune")

DAMPING = 1e-3  # of the mean diagonal of C: keeps the fit sane with fewer samples than inputs
LARGEST = 8192  # inputs times window positions; beyond this the moments would not fit


def least_squares(program: Program, cut: Cut, pruned: Program, data: Any) -> dict[str, Tensor]:
    """New weights and biases of the linear maps without groups (convolutions too) that lost inputs."""
    layers: dict[Node, LinearMap] = {}
    for node, linear in linear_maps(program).items():
        keep = cut.keep(linear.weight, linear.input_axis)
        if linear.groups != 1 or keep is None or not len(keep) or linear.weight.name not in pruned.weights:
            continue
        if linear.matrix(linear.weight.tensor).shape[-1] > LARGEST:
            log.warning("least_squares: %s has too many inputs (more than %d) and keeps its weights", node.name, LARGEST)
            continue
        layers[node] = linear
    grams: dict[Value, Gram] = {linear.weight: Gram() for linear in layers.values()}
    if not grams:
        return {}

    def observe(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        if node in layers:
            grams[layers[node].weight].update(*layers[node].rows(args))
        return compute(args)

    dtype = working_dtype(program)
    for inputs, _ in batches(program, data):
        run(program, inputs, intercept=observe, dtype=dtype)
    out: dict[str, Tensor] = {}
    for linear in {linear.weight: linear for linear in reversed(layers.values())}.values():
        out.update(_refit(cut, linear, grams[linear.weight], pruned))
    return out


def _refit(cut: Cut, linear: LinearMap, gram: Gram, pruned: Program) -> dict[str, Tensor]:
    weight, output_axis = linear.weight, 1 - linear.input_axis
    assert weight.tensor is not None and gram.count is not None and gram.square is not None
    dense = kept(weight.tensor.detach(), cut, weight, output_axis, output_axis).double()
    rows = linear.matrix(dense)[0]  # (outputs, inputs)
    square, mean = (gram.square / gram.count[..., None])[0].double(), gram.mean[0].double()
    found = affine(linear.node)
    bias = pruned.weights.get(found.bias.name) if found is not None and found.bias is not None else None
    if bias is not None:
        square = square - torch.outer(mean, mean)
    keep = cut.keep(weight, linear.input_axis)
    assert keep is not None
    stays = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
    stays[torch.from_numpy(np.sort(columns(linear, keep[:, None]).reshape(-1))).to(rows.device)] = True
    inner, cross = square[stays][:, stays], square[stays][:, ~stays]
    inner.diagonal().add_(DAMPING * inner.diagonal().mean().clamp_min(1e-30))
    change = torch.linalg.solve(inner, cross @ rows[:, ~stays].T).T
    new = rows[:, stays] + change
    old = pruned.weights[weight.name].tensor
    assert old is not None
    shaped = (new.T if linear.input_axis == 0 else new).reshape(old.shape)
    if not torch.isfinite(shaped).all():
        log.warning("least_squares: the inputs of %s are not finite; it keeps its weights", weight.name)
        return {}
    out = {weight.name: shaped.contiguous()}
    if bias is not None:
        assert bias.tensor is not None
        out[bias.name] = bias.tensor.detach().double() + rows @ mean - new @ mean[stays]
    return out
