"""Operators of the domain ai.onnx.ml that are arithmetic on tensors: what classical pipelines put around a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_COMPARISONS = (torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne)  # by number; 6 is membership in a set
_MEMBER = 6


def _binarizer(X: Tensor, threshold: float = 0.0) -> Tensor:
    return (X > threshold).to(X.dtype)


def _scaler(X: Tensor, offset: Sequence[float] = (), scale: Sequence[float] = ()) -> Tensor:
    x = X if X.dtype.is_floating_point else X.to(torch.float32)
    return (x - x.new_tensor(list(offset or [0.0]))) * x.new_tensor(list(scale or [1.0]))


def _normalizer(X: Tensor, norm: str = "MAX") -> Tensor:
    x = X if X.dtype.is_floating_point else X.to(torch.float32)
    size = x.amax(-1, keepdim=True) if norm == "MAX" else x.norm(1 if norm == "L1" else 2, dim=-1, keepdim=True)
    return x / torch.where(size == 0, torch.ones_like(size), size)


_POST: dict[str, Callable[[Tensor], Tensor]] = {
    "NONE": lambda x: x,
    "SOFTMAX": lambda x: torch.softmax(x, -1),
    "LOGISTIC": torch.sigmoid,
    "SOFTMAX_ZERO": lambda x: torch.where(x == 0, torch.zeros_like(x), torch.softmax(torch.where(x == 0, -torch.inf, x), -1)),
    "PROBIT": torch.special.ndtri,
}


def _linear_regressor(
    X: Tensor, coefficients: Sequence[float] = (), intercepts: Sequence[float] = (), post_transform: str = "NONE", targets: int = 1
) -> Tensor:
    x = X if X.dtype.is_floating_point else X.to(torch.float32)
    out = x @ x.new_tensor(list(coefficients)).reshape(targets, -1).T
    return _POST[post_transform](out + x.new_tensor(list(intercepts)) if intercepts else out)


def _imputer(
    X: Tensor,
    imputed_value_floats: Sequence[float] | None = None,
    imputed_value_int64s: Sequence[int] | None = None,
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Tensor:
    floats = X.dtype.is_floating_point
    old, new = (replaced_value_float, imputed_value_floats) if floats else (replaced_value_int64, imputed_value_int64s)
    missing = X.isnan() if old != old else X == old
    return torch.where(missing, X.new_tensor(list(new or [])), X)


def _tree_ensemble(
    X: Tensor,
    leaf_targetids: Sequence[int],
    leaf_weights: Tensor,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_modes: Tensor,
    nodes_splits: Tensor,
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    tree_roots: Sequence[int],
    aggregate_function: int = 1,
    membership_values: Tensor | None = None,
    n_targets: int = 1,
    nodes_hitrates: Tensor | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    post_transform: int = 0,
) -> Tensor:
    """All rows walk down all trees together; a leaf is the number of nodes plus its own number."""
    count, rows = len(nodes_featureids), torch.arange(X.shape[0], device=X.device)

    def table(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), device=X.device)

    feature, splits, modes = table(nodes_featureids), nodes_splits.to(X.device), nodes_modes.to(X.device).long()
    yes, no = (
        table([n + count if leaf else n for n, leaf in zip(ids, leafs)])
        for ids, leafs in ((nodes_truenodeids, nodes_trueleafs), (nodes_falsenodeids, nodes_falseleafs))
    )
    tracks = table(nodes_missing_value_tracks_true or [0] * count).bool()
    members = _member_table(nodes_modes.tolist(), membership_values, X)
    leaves = []
    for root in tree_roots:
        only_leaf = nodes_trueleafs[root] and nodes_falseleafs[root] and nodes_truenodeids[root] == nodes_falsenodeids[root]
        at = torch.full_like(rows, nodes_truenodeids[root] + count if only_leaf else root)
        while bool((at < count).any()):
            here = at.clamp(max=count - 1)
            x = X[rows, feature[here]]
            held = torch.stack([compare(x, splits[here]) for compare in _COMPARISONS] + [(x[:, None] == members[here]).any(1)])
            true = held[modes[here], rows] | (x.isnan() & tracks[here])
            at = torch.where(at < count, torch.where(true, yes[here], no[here]), at)
        leaves.append(at - count)
    leaf = torch.stack(leaves, 1)  # (rows, trees)
    reduction = ("sum", "sum", "amin", "amax")[aggregate_function]
    weights, targets = leaf_weights.to(X.device)[leaf], table(leaf_targetids)[leaf]
    out = leaf_weights.new_zeros(X.shape[0], n_targets).to(X.device).scatter_reduce(1, targets, weights, reduction, include_self=False)
    return list(_POST.values())[post_transform](out / len(tree_roots) if aggregate_function == 0 else out)


def _member_table(modes: Sequence[int], values: Tensor | None, X: Tensor) -> Tensor:
    """(nodes, longest set): the set of each membership node, filled up with NaN, which equals nothing."""
    sets: list[list[float]] = [[]]
    for value in values.tolist() if values is not None else ():
        if value != value:
            sets.append([])
        else:
            sets[-1].append(value)
    following = iter(sets)
    of_node = [next(following) if mode == _MEMBER else [] for mode in modes]
    longest = max((len(s) for s in of_node), default=0)
    filled = [s + [float("nan")] * (longest - len(s)) for s in of_node]
    return torch.tensor(filled, dtype=X.dtype, device=X.device).reshape(len(modes), longest)


ML_OPS: dict[str, Callable[..., Any]] = {
    "ArrayFeatureExtractor": lambda X, Y: X.index_select(-1, Y.reshape(-1)),
    "Binarizer": _binarizer,
    "FeatureVectorizer": lambda X, inputdimensions=None: torch.cat([x.to(torch.float32) for x in X], -1),
    "Imputer": _imputer,
    "LinearRegressor": _linear_regressor,
    "Normalizer": _normalizer,
    "Scaler": _scaler,
    "TreeEnsemble": _tree_ensemble,
}
