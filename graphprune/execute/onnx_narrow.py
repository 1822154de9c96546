"""Element types that torch names but hardly computes with: integers of 2 and 4 bits, floats of 4 and 8, wide unsigned integers.

A tensor of a narrow type holds one entry per byte and carries its type as its dtype. `decode` gives it in a type with arithmetic,
`encode` comes back; what only moves elements moves bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import UnsupportedOp
from graphprune.program import leaves, substitute

FLOAT4 = torch.bits8  # e2m1, a code in the low 4 bits; torch's own float4 packs two entries and so has other shapes
_FLOAT4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

INT4, UINT4, INT2, UINT2 = (getattr(torch, name) for name in ("int4", "uint4", "int2", "uint2"))  # names that torch's stubs lack

LIMITS: dict[torch.dtype, tuple[int, int]] = {  # of the integers a quantized tensor may hold
    UINT2: (0, 3), INT2: (-2, 1), UINT4: (0, 15), INT4: (-8, 7), torch.uint8: (0, 255), torch.int8: (-128, 127),
    torch.uint16: (0, 65535), torch.int16: (-32768, 32767), torch.int32: (-(2**31), 2**31 - 1),
}  # fmt: skip
BYTES: dict[torch.dtype, torch.dtype] = {  # integers below a byte, and the type that holds each entry
    UINT2: torch.uint8, INT2: torch.int8, UINT4: torch.uint8, INT4: torch.int8, FLOAT4: torch.uint8,
}  # fmt: skip
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}


def bits(x: Tensor) -> Tensor:
    """A narrow tensor as bytes that can be moved and compared; any other as it is."""
    return x.view(torch.uint8) if x.dtype in BYTES or x.dtype in FLOAT8 else x


def decode(x: Tensor) -> Tensor:
    """The numbers of a narrow tensor: 8-bit integers or float32; any other tensor as it is."""
    if x.dtype is FLOAT4:
        codes = x.view(torch.uint8).long()
        values = torch.tensor(_FLOAT4_VALUES + tuple(-v for v in _FLOAT4_VALUES), device=x.device)
        return values[codes & 15]
    if x.dtype in BYTES:
        return x.view(BYTES[x.dtype])
    return x.float() if x.dtype in FLOAT8 else x


def encode(x: Tensor, dtype: torch.dtype, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """Numbers in any type that ONNX has, under the conversion rules of its Cast."""
    x = decode(x)
    if dtype is FLOAT4:
        return _float4(x).view(dtype)
    if dtype in BYTES:  # the low bits of the integer part
        low, high = LIMITS[dtype]
        integers = x.to(torch.int32)
        return ((integers - low) % (high - low + 1) + low).to(BYTES[dtype]).view(dtype)
    if dtype is torch.float8_e8m0fnu:
        return _power_of_two(x.float(), saturate, round_mode)
    if dtype in FLOAT8:
        return _float8(x.float(), dtype, saturate)
    return x.to(dtype)


def _float4(x: Tensor) -> Tensor:
    """Codes of the nearest values, ties to the even code, NaN to minus zero."""
    size = x.abs().nan_to_num(0.0, math.inf)
    code = torch.zeros_like(size, dtype=torch.uint8)
    for i, (low, high) in enumerate(pairwise(_FLOAT4_VALUES)):
        middle = (low + high) / 2
        code += (size > middle if i % 2 == 0 else size >= middle).to(torch.uint8)
    return code | ((torch.signbit(x) | x.isnan()).to(torch.uint8) << 3)


def _float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    largest = torch.finfo(dtype).max
    if saturate:
        return x.clamp(-largest, largest).to(dtype)
    if dtype is torch.float8_e4m3fn:  # no infinity; torch saturates from some version on
        x = torch.where(x.abs() > 464, math.nan, x)  # half a step above 448
    return x.to(dtype)


def _power_of_two(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """The exponent byte of a float32, rounded by its fraction; an infinity is NaN."""
    pattern = x.contiguous().view(torch.int32).long()
    exponent, fraction = (pattern >> 23) & 255, pattern & 0x7FFFFF
    half = 1 << 22
    above = {"up": fraction > 0, "down": fraction < 0, "nearest": (fraction > half) | ((fraction == half) & (exponent > 0))}[round_mode]
    above &= exponent < (254 if saturate else 255)
    return torch.where(exponent == 255, exponent, exponent + above).to(torch.uint8).view(torch.float8_e8m0fnu)


def moved_as_bytes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which computes nothing, also on tensors whose type torch cannot copy."""

    @wraps(function)
    def run(**arguments: Any) -> Any:
        dtype = _first_of(BYTES, arguments)
        if dtype is None:
            return function(**arguments)
        result = function(**substitute(arguments, lambda x: bits(x) if isinstance(x, Tensor) else x))
        return substitute(result, lambda y: y.view(dtype) if isinstance(y, Tensor) and y.dtype is torch.uint8 else y)

    return run


def _first_of(dtypes: Mapping[torch.dtype, Any], arguments: Mapping[str, Any]) -> torch.dtype | None:
    return next((x.dtype for x in leaves(arguments.values()) if isinstance(x, Tensor) and x.dtype in dtypes), None)


_WIDE = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` also on unsigned integers above 8 bits, which torch has no kernels for: computed in a wider signed type.

    uint64 has none: sums, products and bits are right there, comparison and division only below 2**63.
    """

    @wraps(function)
    def run(**arguments: Any) -> Any:
        dtype = _first_of(_WIDE, arguments)
        if dtype is None:
            return function(**arguments)
        wide = _WIDE[dtype]
        result = function(**substitute(arguments, lambda x: x.to(wide) if isinstance(x, Tensor) and x.dtype is dtype else x))
        return result.to(dtype) if result.dtype is wide else result

    return run


def known(dtype: torch.dtype | None, what: str) -> torch.dtype:
    """The type, if there is one.

    Raises:
        UnsupportedOp: torch has no such type.
    """
    if dtype is None:
        raise UnsupportedOp(f"ai.onnx::{what} to a type that torch does not have")
    return dtype
