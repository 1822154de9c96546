"""ONNX operators of sequence models: attention, rotary embedding, linear attention, causal convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _heads(x: Tensor, num_heads: int | None) -> Tensor:
    """(batch, length, heads * dim) as (batch, heads, length, dim); four axes stay as they are."""
    if x.dim() == 4:
        return x
    return x.reshape(x.shape[0], x.shape[1], num_heads or 1, -1).transpose(1, 2)


def _attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: torch.dtype | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
) -> tuple[Tensor, ...]:
    q, k, v = _heads(Q, q_num_heads), _heads(K, kv_num_heads), _heads(V, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = k, v
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    raw = (q * math.sqrt(scale)) @ (k * math.sqrt(scale)).transpose(-1, -2)
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    length, total = q.shape[2], k.shape[2]
    bias = torch.zeros((), dtype=q.dtype, device=q.device)
    hidden = torch.tensor(-math.inf, dtype=q.dtype, device=q.device)
    if attn_mask is not None:
        short = total - attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool:
            bias = torch.where(F.pad(attn_mask, (0, short)), bias, hidden)
        else:
            bias = F.pad(attn_mask.to(q.dtype), (0, short), value=-math.inf)
    columns = torch.arange(total, device=q.device)
    offset = torch.tensor([past], device=q.device)
    if nonpad_kv_seqlen is not None:
        filled = nonpad_kv_seqlen.reshape(-1, 1, 1, 1)
        bias = bias + torch.where(columns < filled, torch.zeros_like(hidden), hidden)
        offset = filled - length if past_key is None else offset
    rows = torch.arange(length, device=q.device)[:, None] + offset
    if is_causal:
        bias = bias + torch.where(columns <= rows, torch.zeros_like(hidden), hidden)
    if left_window_size >= 0:
        bias = bias + torch.where(columns >= rows - left_window_size, torch.zeros_like(hidden), hidden)
    if right_window_size >= 0:
        bias = bias + torch.where(columns <= rows + right_window_size, torch.zeros_like(hidden), hidden)
    logits = capped + bias
    weights = torch.softmax(logits.to(softmax_precision or logits.dtype), -1).to(q.dtype)
    weights = torch.where((logits == -math.inf).all(-1, keepdim=True), torch.zeros_like(weights), weights)
    out = weights @ v
    if Q.dim() == 3:
        out = out.transpose(1, 2).reshape(Q.shape[0], length, -1)
    return out, *present, (raw, capped, logits, weights)[qk_matmul_output_mode]


def _rotary(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    x = _heads(X, num_heads)
    width = rotary_embedding_dim or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    cos, sin = cos_cache.unsqueeze(1), sin_cache.unsqueeze(1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    out = torch.cat([turned, rest], -1)
    return out if X.dim() == 4 else out.transpose(1, 2).reshape(X.shape)


def _linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    kv_num_heads: int = 1,
    q_num_heads: int = 1,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    q, k, v = _heads(query, q_num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    scale = scale or 1 / math.sqrt(q.shape[-1])
    state = past_state if past_state is not None else q.new_zeros(k.shape[0], k.shape[1], k.shape[3], v.shape[3])
    gate = _heads(decay, kv_num_heads).exp() if decay is not None else None
    rate = beta.transpose(1, 2)[..., None] if beta is not None else None
    outputs = []
    for t in range(k.shape[2]):
        if "gated" in update_rule and gate is not None:
            state = state * gate[:, :, t].unsqueeze(-1)
        update = v[:, :, t]
        if "delta" in update_rule and rate is not None:
            update = rate[:, :, t] * (update - (state * k[:, :, t].unsqueeze(-1)).sum(-2))
        state = state + k[:, :, t].unsqueeze(-1) * update.unsqueeze(-2)
        shared = state.repeat_interleave(q_num_heads // kv_num_heads, 1)
        outputs.append(scale * (q[:, :, t].unsqueeze(-1) * shared).sum(-2))
    return torch.stack(outputs, 1).reshape(query.shape[0], query.shape[1], -1), state


def _causal_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, past_state: Tensor | None = None, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    history = weight.shape[-1] - 1
    past = past_state if past_state is not None else input.new_zeros(input.shape[0], input.shape[1], history)
    whole = torch.cat([past, input], -1)
    out = F.conv1d(whole, weight, bias, groups=input.shape[1])
    return out if activation == "none" else F.silu(out), whole[..., whole.shape[-1] - history :]


ATTENTION_OPS: dict[str, Callable[..., Any]] = {
    "Attention": _attention,
    "CausalConvWithState": _causal_conv,
    "LinearAttention": _linear_attention,
    "RotaryEmbedding": _rotary,
}
