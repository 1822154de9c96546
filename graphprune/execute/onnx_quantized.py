"""ONNX operators on quantized tensors: exact integer arithmetic, in float64 where torch has no integer kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphprune.execute.onnx_narrow import LIMITS, decode, encode
from graphprune.execute.onnx_nn import NN_OPS


def _quantization_operand(x: Tensor, operand: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point stretched to the shape of `x`: one for all, one per index of `axis`, or one per block along it."""
    if operand.numel() == 1:
        return operand.reshape(())
    if block_size:
        return operand.repeat_interleave(block_size, dim=axis).narrow(axis, 0, x.shape[axis])
    return operand.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _quantize(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    saturate: int = 1,
) -> Tensor:
    dtype = y_zero_point.dtype if y_zero_point is not None else output_dtype or torch.uint8
    scaled = x / _quantization_operand(x, decode(y_scale), axis, block_size)
    if dtype not in LIMITS:  # a small float: its own rounding, and a zero point that is zero
        return encode(scaled, dtype, bool(saturate))
    scaled = torch.round(scaled)
    if y_zero_point is not None:
        scaled = scaled + _quantization_operand(x, decode(y_zero_point), axis, block_size).to(scaled.dtype)
    return encode(scaled.clamp(*LIMITS[dtype]), dtype)


def _dequantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    x, scale = decode(x), decode(x_scale)
    value = x.to(scale.dtype)
    if x_zero_point is not None:
        value = value - _quantization_operand(x, decode(x_zero_point), axis, block_size).to(scale.dtype)
    return (value * _quantization_operand(x, scale, axis, block_size)).to(output_dtype or scale.dtype)


def _dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / scale).clamp(0, 255).to(torch.uint8)
    return _quantize(x, scale, zero_point), scale, zero_point


def _centred(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    value = x.to(torch.float64)
    if zero_point is None:
        return value
    return value - _quantization_operand(x, zero_point, axis, 0).to(torch.float64)


def _matmul_integer(A: Tensor, B: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None) -> Tensor:
    return (_centred(A, a_zero_point, -2) @ _centred(B, b_zero_point, -1)).to(torch.int32)


def _conv_integer(
    x: Tensor, w: Tensor, x_zero_point: Tensor | None = None, w_zero_point: Tensor | None = None, **attributes: Any
) -> Tensor:
    attributes.pop("kernel_shape", None)
    return NN_OPS["Conv"](_centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0), **attributes).to(torch.int32)


def _qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    product = (_centred(a, a_zero_point, -2) * _quantization_operand(a, a_scale, -2, 0)) @ (
        _centred(b, b_zero_point, -1) * _quantization_operand(b, b_scale, -1, 0)
    )
    return _quantize(product, y_scale.to(torch.float64), y_zero_point, axis=-2)


def _qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    B: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    bias = None if B is None else B.to(torch.float64)
    total = NN_OPS["Conv"](_centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0), bias, auto_pad, dilations, group, pads, strides)
    scale = (x_scale * w_scale).to(torch.float64).reshape(-1, *[1] * (x.dim() - 2))
    return _quantize(total * scale, y_scale.to(torch.float64), y_zero_point)


QUANTIZED_OPS: dict[str, Callable[..., Any]] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
}
