"""ONNX element types and tensors in torch."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
import torch

from graphprune.execute.onnx_narrow import FLOAT4, FLOAT8, INT2, INT4, UINT2, UINT4, bits

TORCH_DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.DOUBLE: torch.float64, ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.INT8: torch.int8, ir.DataType.INT16: torch.int16, ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64, ir.DataType.UINT8: torch.uint8, ir.DataType.UINT16: torch.uint16, ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64, ir.DataType.BOOL: torch.bool, ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128, ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn, ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz, ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu, ir.DataType.FLOAT4E2M1: FLOAT4, ir.DataType.INT4: INT4,
    ir.DataType.UINT4: UINT4, ir.DataType.INT2: INT2, ir.DataType.UINT2: UINT2,
}  # fmt: skip
# What numpy proper lacks: the type of as many bytes under which memory passes from numpy to torch.
_AS_BYTES = {torch.bfloat16: np.int16} | dict.fromkeys((*FLOAT8, FLOAT4), np.uint8)
_AS_INTEGERS = {INT4: np.int8, UINT4: np.uint8, INT2: np.int8, UINT2: np.uint8}  # a byte for each entry


def torch_dtype(number: int | None) -> torch.dtype | None:
    """The torch type of an ONNX data type; None where torch has none, or none is given."""
    return TORCH_DTYPES.get(ir.DataType(number)) if number else None


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor | None:
    """The tensor as a torch tensor over the same memory; None for a type that torch does not have."""
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        return None
    array = tensor.numpy()
    array = array.view(_AS_BYTES[dtype]) if dtype in _AS_BYTES else array
    array = array.astype(_AS_INTEGERS[dtype]) if dtype in _AS_INTEGERS else array
    if not array.flags.c_contiguous or array.dtype.byteorder == ">":
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only memory: nothing here writes to it
        out = torch.from_numpy(array)
    return out.view(dtype) if dtype in _AS_BYTES or dtype in _AS_INTEGERS else out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal tensors, of a type that torch can compare or not."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
