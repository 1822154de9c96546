"""Operands of ONNX operators that are shapes, positions and counts: which they are, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Operands that are shapes, positions and counts rather than data: read as Python numbers, recomputed when an axis is cut.
LITERAL_OPERANDS: dict[str, tuple[str, ...]] = {
    "AffineGrid": ("size",),
    "BlackmanWindow": ("size",),
    "CenterCropPad": ("shape",),
    "Col2Im": ("image_shape", "block_shape"),
    "ConstantOfShape": ("input",),
    "CumProd": ("axis",),
    "CumSum": ("axis",),
    "DFT": ("dft_length", "axis"),
    "Dropout": ("ratio", "training_mode"),
    "Expand": ("shape",),
    "HammingWindow": ("size",),
    "HannWindow": ("size",),
    "If": ("cond",),
    "Loop": ("M", "cond"),
    "MaxUnpool": ("output_shape",),
    "NonMaxSuppression": ("max_output_boxes_per_class", "iou_threshold", "score_threshold"),
    "OneHot": ("depth",),
    "Pad": ("pads", "axes"),
    "Range": ("start", "limit", "delta"),
    "Reshape": ("shape",),
    "Resize": ("roi", "scales", "sizes"),
    "STFT": ("frame_step", "frame_length"),
    "SequenceAt": ("position",),
    "SequenceErase": ("position",),
    "SequenceInsert": ("position",),
    "Slice": ("starts", "ends", "axes", "steps"),
    "Split": ("split",),
    "SplitToSequence": ("split",),
    "Squeeze": ("axes",),
    "Tile": ("repeats",),
    "TopK": ("K",),
    "Trilu": ("k",),
    "Unsqueeze": ("axes",),
    "Upsample": ("scales",),
} | {f"Reduce{name}": ("axes",) for name in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()}


class DataDependent(Exception):
    """A shape, position or count is needed that the meta device does not have."""


def numbers(operand: Any) -> list[Any] | None:
    """A literal operand, given as a tensor, a number or a list, as a flat list of Python numbers."""
    if operand is None:
        return None
    if isinstance(operand, Tensor):
        if operand.is_meta:
            raise DataDependent
        return operand.reshape(-1).tolist()
    return list(operand) if isinstance(operand, (list, tuple)) else [operand]


def ints(operand: Any) -> list[int] | None:
    """As `numbers`, in integers."""
    values = numbers(operand)
    return None if values is None else [int(v) for v in values]


def reshape_target(shape: Sequence[int], data_shape: Sequence[int], allowzero: int = 0) -> list[int]:
    """The shape that Reshape's operand means: 0 copies a size of the input (unless `allowzero`); -1 is left for torch to infer."""
    return [data_shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape)]


def split_sizes(size: int, parts: int) -> list[int]:
    """Sizes of an even Split: the last part takes what is left."""
    each = -(-size // parts)
    return [min(each, size - i * each) for i in range(parts)]


def chunk_sizes(size: int, each: int) -> list[int]:
    """Sizes of the parts of SplitToSequence with one length: the last part takes what is left."""
    return [min(each, size - start) for start in range(0, size, each)]


def in_order(positions: Any, length: int) -> bool:
    """Are constant positions all those of an axis, once each and in order? Exporters write a contiguous `as_strided` that way."""
    at = getattr(positions, "tensor", None)
    return at is not None and at.numel() == length and bool((at.reshape(-1).cpu() == torch.arange(length)).all())


def slice_range(size: int, start: int, end: int, step: int) -> range:
    """The positions that one axis of a Slice takes, negative and overlong bounds resolved."""
    return range(size)[slice(start, None if step < 0 and end < -size else end, step)]
