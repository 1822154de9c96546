"""Modules that take the place of others whose Python code cannot express a cut, with the same parameter names.

`nn.MultiheadAttention` insists on `num_heads * head_dim == embed_dim`; with fewer heads `in_proj_weight` has `3 * num_heads * head_dim`
rows and `out_proj` as many columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads need not add up to `embed_dim`: same parameters, same arguments."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes and results as in `nn.MultiheadAttention`."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(int(not self.batch_first)) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        apart = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        weights = self.in_proj_weight.chunk(3) if self.in_proj_weight is not None else apart
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(x.shape[0], 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1) for x in (k, v))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._additive(attn_mask, key_padding_mask, q, k)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            probabilities = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
            out = probabilities @ v
        else:
            probabilities = None
            out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, scale=self.head_dim**-0.5)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if probabilities is not None and average_attn_weights:
            probabilities = probabilities.mean(1)
        if not batched:
            out = out.squeeze(int(not self.batch_first))
            probabilities = None if probabilities is None else probabilities.squeeze(0)
        return out, probabilities

    def _additive(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores: (batch, heads or 1, queries, keys)."""
        total: Tensor | None = None
        for mask, padding in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(mask, float("-inf"))
            if padding:
                mask = mask[:, None, None, :]
            elif mask.dim() == 3:  # one per batch and head
                mask = mask.unflatten(0, (q.shape[0], -1))
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
            total = mask if total is None else total + mask
        return total


class Absent(nn.Module):
    """Stands in a residual branch that was removed: returns zeros in place of the tensor that the module returned, and None for all others.

    Args:
        inputs, outputs: flat arguments and results of a call of the module.
        spec: how the results are nested.
        shape: of the zeros, at the sizes of that call; axes that are like those of the first input follow it.
    """

    def __init__(self, inputs: Sequence[Any], outputs: Sequence[Any], spec: Any, shape: Sequence[int]) -> None:
        super().__init__()
        first = next(x for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
        self.at = next(i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.dim() == len(shape))
        self.spec, self.count = spec, len(outputs)
        same = [first.dim() == len(shape) and a == b == c for a, b, c in zip(first.shape, outputs[self.at].shape, shape)]
        self.sizes = tuple(None if follows else n for follows, n in zip([*same, *[False] * len(shape)], shape))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes anything; looks at the first floating tensor only."""
        x = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
        leaves: list[Any] = [None] * self.count
        leaves[self.at] = x.new_zeros([x.shape[axis] if n is None else n for axis, n in enumerate(self.sizes)])
        return pytree.tree_unflatten(leaves, self.spec)


def _multihead_attention(module: nn.Module) -> nn.Module:
    assert isinstance(module, nn.MultiheadAttention)
    new = MultiheadAttention.__new__(MultiheadAttention)
    new.__dict__ = dict(module.__dict__)
    projection = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    rows = projection.shape[0] // (3 if module.in_proj_weight is not None else 1)
    new.embed_dim = new.out_proj.out_features = module.out_proj.weight.shape[0]
    new.out_proj.in_features = rows
    new.num_heads = rows // module.head_dim
    new._qkv_same_embed_dim = False  # keeps fused kernels away that read the old layout
    return new


SUBSTITUTES: Mapping[type, Callable[[nn.Module], nn.Module]] = {nn.MultiheadAttention: _multihead_attention}


def substitute_for(module: nn.Module) -> nn.Module | None:
    """A module that runs the weights that `module` holds now, or None where the table has no row of exactly this type."""
    make = SUBSTITUTES.get(type(module))
    return None if make is None else make(module)
