"""ONNX operators of networks: convolution, pooling, normalisation, contraction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import UnsupportedOp
from graphprune.rules.onnx_literals import ints

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _rank_lookup(table: dict[int, Callable[..., Any]], rank: int, op: str) -> Callable[..., Any]:
    if rank not in table:
        raise UnsupportedOp(f"ai.onnx::{op} over {rank} spatial axes; torch has 1 to 3")
    return table[rank]


def _pads(
    auto_pad: str, pads: Sequence[int] | None, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis."""
    rank = len(sizes)
    if auto_pad in ("NOTSET", ""):
        pads = list(pads or [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    if auto_pad == "VALID":
        return [0] * rank, [0] * rank
    total = [
        max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    if not any(before) and not any(after):
        return x
    return F.pad(x, [amount for pair in zip(reversed(before), reversed(after)) for amount in pair], value=value)


def _conv(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = X.dim() - 2
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    before, after = _pads(auto_pad, pads, X.shape[2:], W.shape[2:], strides, dilations)
    conv = _rank_lookup(CONV, rank, "Conv")
    if before == after:
        return conv(X, W, B, strides, before, dilations, group)
    return conv(_padded(X, before, after), W, B, strides, 0, dilations, group)


def _conv_transpose(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = X.dim() - 2
    strides, dilations, extra = list(strides or [1] * rank), list(dilations or [1] * rank), list(output_padding or [0] * rank)
    full = [s * (n - 1) + e + (k - 1) * d + 1 for n, k, s, d, e in zip(X.shape[2:], W.shape[2:], strides, dilations, extra)]
    if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        output_shape = [n * s for n, s in zip(X.shape[2:], strides)]
    if output_shape is not None:
        total = [max(f - o, 0) for f, o in zip(full, list(output_shape)[-rank:])]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        after = [a + min(f - o, 0) for a, f, o in zip(after, full, list(output_shape)[-rank:])]
    else:
        before, after = _pads(auto_pad, pads, X.shape[2:], W.shape[2:], strides, dilations)
    # The whole sum first, then the crop: torch's own padding is symmetric.
    whole = _rank_lookup(CONV_TRANSPOSE, rank, "ConvTranspose")(X, W, None, strides, 0, 0, group, dilations)
    whole = _padded(whole, [-b for b in before], [e - a for e, a in zip(extra, after)])
    return whole if B is None else whole + B.reshape(-1, *[1] * rank)


def _window(
    X: Tensor,
    kernel: Sequence[int],
    auto_pad: str,
    ceil_mode: int,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """strides, dilations, padding before, padding after, and what `ceil_mode` adds after that, for each spatial axis."""
    rank = X.dim() - 2
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    before, after = _pads(auto_pad, pads, X.shape[2:], kernel, stride, dilation)
    extra = [0] * rank
    if ceil_mode:
        for i, (size, k, s, d) in enumerate(zip(X.shape[2:], kernel, stride, dilation)):
            room = size + before[i] + after[i] - ((k - 1) * d + 1)
            steps = -(-room // s)
            if steps * s >= size + before[i]:  # a window may not start in the padding
                steps -= 1
            extra[i] = max(steps * s - room, 0)
    return stride, dilation, before, after, extra


def _max_pool(
    X: Tensor,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    rank = X.dim() - 2
    stride, dilation, before, after, extra = _window(X, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    x = X if X.dtype.is_floating_point else X.to(torch.float32)
    x = _padded(x, before, [a + e for a, e in zip(after, extra)], -math.inf)
    values, index = _rank_lookup(MAX_POOL, rank, "MaxPool")(x, list(kernel_shape), stride, 0, dilation, return_indices=True)
    position: list[Tensor] = []
    flat = index
    for i in reversed(range(rank)):
        position.insert(0, flat % x.shape[2 + i] - before[i])
        flat = flat // x.shape[2 + i]
    axes = list(range(rank))
    linear = torch.zeros_like(index)
    for i in axes if not storage_order else reversed(axes):
        linear = linear * X.shape[2 + i] + position[i]
    planes = torch.arange(X.shape[0] * X.shape[1], device=X.device).reshape(X.shape[0], X.shape[1], *[1] * rank)
    return values.to(X.dtype), linear + planes * math.prod(X.shape[2:])


def _max_unpool(
    X: Tensor,
    I: Tensor,  # noqa: E741 (the schema's name)
    output_shape: Any = None,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Positions in `I` count through the result that the kernel implies; a larger `output_shape` adds zeros after it."""
    rank = X.dim() - 2
    cut, stride = list(pads or [0] * 2 * rank), list(strides or [1] * rank)
    sizes = [(n - 1) * s - cut[i] - cut[rank + i] + k for i, (n, s, k) in enumerate(zip(X.shape[2:], stride, kernel_shape))]
    flat = X.new_zeros(math.prod(X.shape[:2]) * math.prod(sizes)).scatter(0, I.reshape(-1), X.reshape(-1))
    out = flat.reshape(*X.shape[:2], *sizes)
    wanted = ints(output_shape) or list(out.shape)
    return _padded(out, [0] * rank, [new - old for new, old in zip(wanted[2:], sizes)])


def _sum_pool(x: Tensor, kernel: Sequence[int], stride: list[int], dilation: list[int]) -> Tensor:
    rank = x.dim() - 2
    if any(d != 1 for d in dilation):
        ones = x.new_ones(1, 1, *kernel)
        flat = x.reshape(-1, 1, *x.shape[2:])
        pooled = _rank_lookup(CONV, rank, "AveragePool")(flat, ones, None, stride, 0, dilation)
        return pooled.reshape(*x.shape[:2], *pooled.shape[2:])
    return _rank_lookup(AVG_POOL, rank, "AveragePool")(x, list(kernel), stride) * math.prod(kernel)


def _average_pool(
    X: Tensor,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    stride, dilation, before, after, extra = _window(X, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    inside = torch.ones((1, 1, *X.shape[2:]), dtype=X.dtype, device=X.device)
    inside = _padded(_padded(inside, before, after, float(count_include_pad)), [0] * len(extra), extra)
    total = _sum_pool(_padded(X, before, [a + e for a, e in zip(after, extra)]), kernel_shape, stride, dilation)
    return total / _sum_pool(inside, kernel_shape, stride, dilation)


def _lp_pool(
    X: Tensor,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    stride, dilation, before, after, extra = _window(X, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    x = _padded(X.abs().pow(p), before, [a + e for a, e in zip(after, extra)])
    return _sum_pool(x, kernel_shape, stride, dilation).pow(1 / p)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _batch_norm(
    X: Tensor,
    scale: Tensor,
    B: Tensor,
    input_mean: Tensor,
    input_var: Tensor,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Tensor, ...]:
    shape = (-1, *[1] * (X.dim() - 2))
    mean, var = input_mean, input_var
    running: tuple[Tensor, ...] = ()
    if training_mode:
        over = (0, *_spatial(X))
        mean, var = X.mean(over), X.var(over, unbiased=False)
        running = (input_mean * momentum + mean * (1 - momentum), input_var * momentum + var * (1 - momentum))
    factor = scale / torch.sqrt(var + epsilon)
    return ((X - mean.reshape(shape)) * factor.reshape(shape) + B.reshape(shape)).to(X.dtype), *running


def _stash(x: Tensor) -> Tensor:
    """Statistics of half-precision data are taken in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _layer_norm(X: Tensor, Scale: Tensor, B: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5) -> tuple[Tensor, ...]:
    over = tuple(range(axis % X.dim(), X.dim()))
    x = _stash(X)
    mean = x.mean(over, keepdim=True)
    inverse = (x.var(over, unbiased=False, keepdim=True) + epsilon).rsqrt()
    out = ((x - mean) * inverse).to(X.dtype) * Scale
    return out if B is None else out + B, mean, inverse


def _rms_norm(X: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    over = tuple(range(axis % X.dim(), X.dim()))
    x = _stash(X)
    return (x * (x.square().mean(over, keepdim=True) + epsilon).rsqrt()).to(X.dtype) * scale


def _group_norm(X: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    if scale.numel() == num_groups != X.shape[1]:  # before opset 21 there is one scale per group
        scale, bias = (t.repeat_interleave(X.shape[1] // num_groups) for t in (scale, bias))
    return torch.group_norm(X, num_groups, scale, bias, epsilon)


def _lrn(X: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    squares = F.pad(X.square().movedim(1, -1), ((size - 1) // 2, size // 2))
    total = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return X / (bias + alpha / size * total).pow(beta)


def _gemm(A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> Tensor:
    out = (A.T if transA else A) @ (B.T if transB else B)
    out = out if alpha == 1 else out * alpha
    return out if C is None else out + (C if beta == 1 else C * beta)


def _einsum(Inputs: Sequence[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *Inputs)


NN_OPS: dict[str, Callable[..., Any]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda X: X.mean(_spatial(X), keepdim=True),
    "GlobalLpPool": lambda X, p=2: X.norm(p, dim=_spatial(X), keepdim=True),
    "GlobalMaxPool": lambda X: X.amax(_spatial(X), keepdim=True),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": lambda input, scale, B, epsilon=1e-5: torch.group_norm(input, input.shape[1], scale, B, epsilon),
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LpPool": _lp_pool,
    "MatMul": lambda A, B: torch.matmul(A, B),
    "MaxPool": _max_pool,
    "MaxUnpool": _max_unpool,
    "RMSNormalization": _rms_norm,
}
