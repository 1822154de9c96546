"""Least-squares refit: kept weights of every layer that lost inputs are moved so that its result changes least on the calibration data.

For a layer y = W x + b whose inputs are split into kept (k) and removed (r) ones, with second moments C = E[x x^T], the best change of the
kept weights is

    W_k' = W_k + W_r C_rk (C_kk + lambda I)^-1

with the moments taken about the mean, and the bias taking up the mean, where there is a bias. It is the
optimal brain surgeon update of all removed weights of a row at once (Hassibi and Stork 1993; used so by He et al. 2017, arXiv 1707.06168).
All layers are fitted to the inputs that the original network gives them, in one pass over the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from graphprune.calibration import Gram, Moments, batches
from graphprune.calibration.statistics import weight_of
from graphprune.execute.interpreter import Compute, run
from graphprune.linear_maps import LinearMap, columns, linear_maps
from graphprune.program import Node, Program, Value
from graphprune.repair.affine import affine, offset
from graphprune.repair.moments import kept, working_dtype
from graphprune.surgery.cut import Cut

log = logging.getLogger("graphprune")

DAMPING = 1e-3  # of the mean diagonal of C: keeps the fit sane with fewer samples than inputs
T = TypeVar("T", Gram, Moments)
LARGEST = 8192  # inputs times window positions; beyond this the moments would not fit


def least_squares(program: Program, cut: Cut, pruned: Program, data: Any) -> dict[str, Tensor]:
    """New weights and biases of the linear maps without groups (convolutions too) that lost inputs."""
    layers: dict[Node, LinearMap] = {}
    for node, linear in _lost_inputs(program, cut, pruned).items():
        if linear.matrix(linear.weight.tensor).shape[-1] > LARGEST:
            log.warning("least_squares: %s has too many inputs (more than %d) and keeps its weights", node.name, LARGEST)
            continue
        layers[node] = linear
    out: dict[str, Tensor] = {}
    for linear, gram in _observed(program, layers, data, Gram):
        out.update(_refit(cut, linear, gram, pruned))
    return out


def removed_mean(program: Program, cut: Cut, pruned: Program, data: Any) -> dict[str, Tensor]:
    """New biases of the linear maps without groups that lost inputs: `b + W_r E[x_r]`, with the inputs that the original network has.
    Where a layer has none, the addition or the batch norm after it takes that up, if one does.

    As in An et al. 2023, arXiv 2312.11983. Unlike the repair "bias" it does not follow the pruned network: what removals upstream do to
    kept inputs is left alone.
    """
    layers = {
        node: linear for node, linear in _lost_inputs(program, cut, pruned).items()
        if (found := offset(node, program.outputs)) is not None and found[0].name in pruned.weights
    }  # fmt: skip
    out: dict[str, Tensor] = {}
    for linear, moments in _observed(program, layers, data, Moments):
        found, axis = offset(linear.node, program.outputs), 1 - linear.input_axis
        assert found is not None and moments.mean is not None
        name, sign = found[0].name, found[1]
        dense = kept(weight_of(linear.weight), cut, linear.weight, axis, axis).double()
        gone = ~_stays(cut, linear, dense.device)
        bias = pruned.weights[name].tensor
        assert bias is not None
        lost = linear.matrix(dense)[0][:, gone] @ moments.mean[0].double()[gone]
        out[name] = out.get(name, bias.detach().double()) + sign * lost
    return out


def _lost_inputs(program: Program, cut: Cut, pruned: Program) -> dict[Node, LinearMap]:
    found: dict[Node, LinearMap] = {}
    for node, linear in linear_maps(program).items():
        keep = cut.keep(linear.weight, linear.input_axis)
        if linear.groups == 1 and keep is not None and len(keep) and linear.weight.name in pruned.weights:
            found[node] = linear
    return found


def _observed(program: Program, layers: dict[Node, LinearMap], data: Any, make: Callable[[], T]) -> list[tuple[LinearMap, T]]:
    """Statistics of the inputs of every weight once, from the original network."""
    found: dict[Value, Any] = {linear.weight: make() for linear in layers.values()}
    if not found:
        return []

    def observe(node: Node, args: Mapping[str, Any], compute: Compute) -> tuple[Any, ...]:
        if node in layers:
            found[layers[node].weight].update(*layers[node].rows(args))
        return compute(args)

    dtype = working_dtype(program)
    for inputs, _ in batches(program, data):
        run(program, inputs, intercept=observe, dtype=dtype)
    return [(linear, found[linear.weight]) for linear in {linear.weight: linear for linear in reversed(list(layers.values()))}.values()]


def _stays(cut: Cut, linear: LinearMap, device: torch.device) -> Tensor:
    """(inputs * window,) bool: the columns of the matrix that the cut keeps."""
    keep = cut.keep(linear.weight, linear.input_axis)
    assert keep is not None and linear.weight.shape is not None
    stays = torch.zeros(linear.weight.shape[linear.input_axis] * linear.window, dtype=torch.bool, device=device)
    stays[torch.from_numpy(np.sort(columns(linear, keep[:, None]).reshape(-1))).to(device)] = True
    return stays


def _refit(cut: Cut, linear: LinearMap, gram: Gram, pruned: Program) -> dict[str, Tensor]:
    weight, output_axis = linear.weight, 1 - linear.input_axis
    assert weight.tensor is not None and gram.count is not None and gram.square is not None
    dense = kept(weight.tensor.detach(), cut, weight, output_axis, output_axis).double()
    rows = linear.matrix(dense)[0]  # (outputs, inputs)
    square, mean = (gram.square / gram.count[..., None])[0].double(), gram.mean[0].double()
    found = affine(linear.node)  # its own bias alone: a fit about the mean that a later batch norm has to keep is worse after deep cuts
    bias = pruned.weights.get(found.bias.name) if found is not None and found.bias is not None else None
    if bias is not None:
        square = square - torch.outer(mean, mean)
    stays = _stays(cut, linear, rows.device)
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
