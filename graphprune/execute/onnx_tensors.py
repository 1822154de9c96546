"""ONNX operators that move elements without computing on them: shapes, slices, indices, sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphprune.rules.onnx_literals import ints, numbers, reshape_target, slice_range, split_sizes


def _number(operand: Any) -> Any:
    return (numbers(operand) or [0])[0]


def _one(operand: Any, default: int) -> int:
    values = ints(operand)
    return values[0] if values else default


def _reshape(data: Tensor, shape: Any, allowzero: int = 0) -> Tensor:
    return data.reshape(reshape_target(ints(shape) or [], data.shape, allowzero))


def _flatten(input: Tensor, axis: int = 1) -> Tensor:
    axis = axis % input.dim() if axis < 0 else axis
    return input.reshape(math.prod(input.shape[:axis]), math.prod(input.shape[axis:]))


def _squeeze(data: Tensor, axes: Any = None) -> Tensor:
    over = ints(axes)
    return data.squeeze() if over is None else data.squeeze(tuple(over)) if over else data


def _unsqueeze(data: Tensor, axes: Any) -> Tensor:
    over = ints(axes) or []
    rank = data.dim() + len(over)
    for axis in sorted(a % rank for a in over):
        data = data.unsqueeze(axis)
    return data


def _transpose(data: Tensor, perm: Sequence[int] | None = None) -> Tensor:
    return data.permute(tuple(perm) if perm is not None else tuple(reversed(range(data.dim()))))


def _expand(input: Tensor, shape: Any) -> Tensor:
    return input.expand(torch.broadcast_shapes(input.shape, tuple(ints(shape) or ())))


def _tile(input: Tensor, repeats: Any) -> Tensor:
    return input.repeat(ints(repeats) or []) if input.dim() else input


def _concat(inputs: Sequence[Tensor], axis: int) -> Tensor:
    return torch.cat(list(inputs), axis)


def _split(input: Tensor, split: Any = None, axis: int = 0, num_outputs: int | None = None) -> tuple[Tensor, ...]:
    sizes = ints(split) or split_sizes(input.shape[axis], num_outputs or 1)
    return tuple(torch.split(input, sizes, axis))


def _slice(data: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    first, last = ints(starts) or [], ints(ends) or []
    over = ints(axes) if axes is not None else list(range(len(first)))
    strides = ints(steps) if steps is not None else [1] * len(first)
    for axis, start, end, step in zip(over or [], first, last, strides or []):
        positions = slice_range(data.shape[axis], start, end, step)
        if step > 0:
            index = [slice(None)] * data.dim()
            index[axis] = slice(positions.start, max(positions.stop, positions.start), step)
            data = data[tuple(index)]
        else:
            data = data.index_select(axis, torch.tensor(list(positions), dtype=torch.int64, device=data.device))
    return data


def _wrapped(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(data: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    axis %= data.dim()
    taken = data.index_select(axis, _wrapped(indices, data.shape[axis]).reshape(-1))
    return taken.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


def _gather_elements(data: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, _wrapped(indices, data.shape[axis]))


def _gather_nd(data: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    depth = indices.shape[-1]
    batch, rest = data.shape[:batch_dims], indices.shape[batch_dims:-1]
    index = [_wrapped(indices[..., i], data.shape[batch_dims + i]) for i in range(depth)]
    for i, size in enumerate(batch):
        shape = [1] * (len(batch) + len(rest))
        shape[i] = size
        index.insert(i, torch.arange(size, device=data.device).reshape(shape))
    return data[tuple(index)]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, reduction: str = "none") -> Tensor:
    index = _wrapped(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, index, updates)
    return data.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction], include_self=True)


def _scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, reduction: str = "none") -> Tensor:
    depth = indices.shape[-1]
    lead, tail = data.shape[:depth], data.shape[depth:]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
    for i, size in enumerate(lead):
        flat = flat * size + _wrapped(indices[..., i], size)
    rows = data.reshape(math.prod(lead), math.prod(tail))
    source = updates.reshape(flat.numel(), math.prod(tail))
    index = flat.reshape(-1, 1).expand_as(source)
    if reduction == "none":
        result = rows.scatter(0, index, source)
    else:
        result = rows.scatter_reduce(0, index, source, _REDUCTIONS[reduction], include_self=True)
    return result.reshape(data.shape)


def _tensor_scatter(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, mode: str = "linear", axis: int = -2
) -> Tensor:
    axis %= past_cache.dim()
    steps = torch.arange(update.shape[axis], device=update.device)
    start = write_indices if write_indices is not None else torch.zeros(update.shape[0], dtype=torch.int64, device=update.device)
    positions = start.long()[:, None] + steps
    if mode == "circular":
        positions = positions % past_cache.shape[axis]
    shape = [1] * update.dim()
    shape[0], shape[axis] = positions.shape
    return past_cache.scatter(axis, positions.reshape(shape).expand_as(update), update)


def _top_k(X: Tensor, K: Any, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    k = _one(K, 1)
    # A stable sort gives equal elements in index order, as the specification asks; torch.topk does not.
    values, indices = torch.sort(X, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


def _one_hot(indices: Tensor, depth: Any, values: Tensor, axis: int = -1) -> Tensor:
    size = _one(depth, 0)
    axis = axis % (indices.dim() + 1)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = size
    hit = torch.arange(size, device=indices.device).reshape(shape) == (indices.long() % max(size, 1)).unsqueeze(axis)
    valid = ((indices >= -size) & (indices < size)).unsqueeze(axis)
    return torch.where(hit & valid, values[1], values[0])


def _range(start: Any, limit: Any, delta: Any) -> Tensor:
    first, last, step = (_number(operand) for operand in (start, limit, delta))
    whole = all(isinstance(number, int) for number in (first, last, step))
    default = torch.int64 if whole else torch.float32
    dtype = next((operand.dtype for operand in (start, limit, delta) if isinstance(operand, Tensor)), default)
    count = max(-(-(last - first) // step) if whole else math.ceil((last - first) / step), 0)
    steps = torch.arange(count, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    return (first + steps * step).to(dtype)


def _constant_of_shape(input: Any, value: Tensor | None = None) -> Tensor:
    fill = value if value is not None else torch.zeros(1)
    return fill.reshape(()).expand(ints(input) or ()).clone()


def _eye_like(input: Tensor, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    rows, columns = input.shape
    return (torch.arange(columns)[None] - torch.arange(rows)[:, None] == k).to(input.device, dtype or input.dtype)


def _pad(data: Tensor, pads: Any, constant_value: Any = None, axes: Any = None, mode: str = "constant") -> Tensor:
    over = [a % data.dim() for a in (ints(axes) if axes is not None else range(data.dim())) or []]
    amounts = ints(pads) or []
    before, after = amounts[: len(over)], amounts[len(over) :]
    if mode == "constant":
        fill = constant_value.reshape(()) if isinstance(constant_value, Tensor) and constant_value.numel() else constant_value
        for axis, low, high in zip(over, before, after):
            data = _pad_constant(data, axis, low, high, fill)
        return data
    for axis, low, high in zip(over, before, after):
        size = data.shape[axis]
        index = torch.arange(-low, size + high)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:  # reflect
            period = max(2 * (size - 1), 1)
            index = (index % period - (size - 1)).abs().neg() + (size - 1)
        data = data.index_select(axis, index.to(data.device))
    return data


def _pad_constant(data: Tensor, axis: int, low: int, high: int, fill: Any) -> Tensor:
    axis %= data.dim()
    cut_low, cut_high = max(-low, 0), max(-high, 0)
    if cut_low or cut_high:
        data = data.narrow(axis, cut_low, data.shape[axis] - cut_low - cut_high)

    def block(amount: int) -> list[Tensor]:
        shape = [amount if i == axis else size for i, size in enumerate(data.shape)]
        return [] if amount <= 0 else [(data.new_zeros(shape) if fill is None else data.new_ones(shape) * fill).to(data.dtype)]

    parts = [*block(low), data, *block(high)]
    return torch.cat(parts, axis) if len(parts) > 1 else data


def _center_crop_pad(input_data: Tensor, shape: Any, axes: Sequence[int] | None = None) -> Tensor:
    over = list(axes) if axes is not None else list(range(input_data.dim()))
    for axis, target in zip(over, ints(shape) or []):
        extra = target - input_data.shape[axis]
        low = extra // 2 if extra >= 0 else -(-extra // 2)
        input_data = _pad_constant(input_data, axis, low, extra - low, None)
    return input_data


def _depth_to_space(input: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    batch, channels, *space = input.shape
    block = [blocksize] * len(space)
    depth = channels // blocksize ** len(space)
    n = len(space)
    if mode == "DCR":
        x = input.reshape(batch, *block, depth, *space)
        order = [0, n + 1] + [axis for i in range(n) for axis in (n + 2 + i, 1 + i)]
    else:
        x = input.reshape(batch, depth, *block, *space)
        order = [0, 1] + [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
    return x.permute(order).reshape(batch, depth, *(size * blocksize for size in space))


def _space_to_depth(input: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    batch, channels, *space = input.shape
    n = len(space)
    x = input.reshape(batch, channels, *(v for size in space for v in (size // blocksize, blocksize)))
    blocks, rest = [3 + 2 * i for i in range(n)], [2 + 2 * i for i in range(n)]
    order = [0, *blocks, 1, *rest] if mode == "DCR" else [0, 1, *blocks, *rest]
    return x.permute(order).reshape(batch, channels * blocksize**n, *(size // blocksize for size in space))


def _trilu(input: Tensor, k: Any = None, upper: int = 1) -> Tensor:
    return torch.triu(input, _one(k, 0)) if upper else torch.tril(input, _one(k, 0))


def _shape(data: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(data.shape)[start:end], dtype=torch.int64)


def _reverse_sequence(input: Tensor, sequence_lens: Tensor, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    x = input.movedim((time_axis, batch_axis), (0, 1))
    return x.gather(0, reversal(x, sequence_lens)).movedim((0, 1), (time_axis, batch_axis))


def reversal(x: Tensor, lengths: Tensor) -> Tensor:
    """Index that reverses the first `lengths[b]` steps of x (steps, batch, ...) and leaves the rest, as large as `x`."""
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    lengths = lengths.long()[None]
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return index.reshape(index.shape + (1,) * (x.dim() - 2)).expand_as(x)


def _compress(input: Tensor, condition: Tensor, axis: int | None = None) -> Tensor:
    taken = torch.nonzero(condition).reshape(-1)
    return input.reshape(-1)[taken] if axis is None else input.index_select(axis, taken)


def _unique(X: Tensor, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, ...]:
    values, inverse, counts = torch.unique(X, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    positions = torch.arange(inverse.numel(), device=X.device)
    first = torch.full((counts.numel(),), inverse.numel(), device=X.device).scatter_reduce(0, inverse.reshape(-1), positions, "amin")
    if not sorted:
        order = torch.argsort(first)
        rank = torch.argsort(order)
        values, first, counts = values.index_select(axis or 0, order), first[order], counts[order]
        inverse = rank[inverse]
    return values, first, inverse.reshape(-1), counts


def _split_to_sequence(input: Tensor, split: Any = None, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    if split is None:
        parts = torch.split(input, 1, axis)
        return list(parts) if keepdims else [part.squeeze(axis) for part in parts]
    sizes = ints(split) or []
    scalar = split.dim() == 0 if isinstance(split, Tensor) else not isinstance(split, list)
    return list(torch.split(input, sizes[0] if scalar else sizes, axis))


def _sequence_insert(input_sequence: list[Tensor], tensor: Tensor, position: Any = None) -> list[Tensor]:
    where = _one(position, len(input_sequence))
    return input_sequence[:where] + [tensor] + input_sequence[where:] if where else [tensor, *input_sequence]


def _sequence_erase(input_sequence: list[Tensor], position: Any = None) -> list[Tensor]:
    where = _one(position, -1) % len(input_sequence)
    return input_sequence[:where] + input_sequence[where + 1 :]


def _concat_from_sequence(input_sequence: list[Tensor], axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(input_sequence, axis) if new_axis else torch.cat(input_sequence, axis)


def _non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Any = None,
    iou_threshold: Any = None,
    score_threshold: Any = None,
    center_point_box: int = 0,
) -> Tensor:
    """boxes: (batch, n, 4), scores: (batch, classes, n). Returns (kept, 3) triples of batch, class, box."""
    limit, overlap, least = _one(max_output_boxes_per_class, 0), numbers(iou_threshold) or [0.0], numbers(score_threshold)
    if center_point_box:
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        low, high = centre - half, centre + half
    else:
        low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
    area = (high - low).prod(-1)
    kept = []
    for batch, class_ in itertools.product(range(scores.shape[0]), range(scores.shape[1])):
        score = scores[batch, class_]
        order = torch.argsort(score, descending=True, stable=True)
        order = order[score[order] > least[0]] if least else order
        taken: list[int] = []
        for box in order.tolist():
            if len(taken) >= limit:
                break
            shared = (torch.minimum(high[batch, box], high[batch, taken]) - torch.maximum(low[batch, box], low[batch, taken])).clamp(min=0)
            both = shared.prod(-1)
            if not (both / (area[batch, box] + area[batch, taken] - both) > overlap[0]).any():
                taken.append(box)
        kept += [(batch, class_, box) for box in taken]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _col2im(
    input: Tensor,
    image_shape: Any,
    block_shape: Any,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    image, block = ints(image_shape) or [], ints(block_shape) or []
    rank = len(image)
    step, apart, edges = list(strides or [1] * rank), list(dilations or [1] * rank), list(pads or [0] * 2 * rank)
    whole = [image[i] + edges[i] + edges[rank + i] for i in range(rank)]
    windows = [(whole[i] - (block[i] - 1) * apart[i] - 1) // step[i] + 1 for i in range(rank)]
    flat = torch.zeros((), dtype=torch.int64, device=input.device)  # where each entry of a block goes: (*block, *windows)
    for i in range(rank):
        at_block = (torch.arange(block[i], device=input.device) * apart[i]).reshape([-1 if j == i else 1 for j in range(2 * rank)])
        at_window = (torch.arange(windows[i], device=input.device) * step[i]).reshape([-1 if j == rank + i else 1 for j in range(2 * rank)])
        flat = flat * whole[i] + at_block + at_window
    batch, channels = input.shape[0], input.shape[1] // math.prod(block)
    out = input.new_zeros(batch, channels, math.prod(whole)).index_add(2, flat.reshape(-1), input.reshape(batch, channels, -1))
    out = out.reshape(batch, channels, *whole)
    for i in range(rank):
        out = out.narrow(2 + i, edges[i], image[i])
    return out


TENSOR_OPS: dict[str, Callable[..., Any]] = {
    "CenterCropPad": _center_crop_pad,
    "Col2Im": _col2im,
    "Compress": _compress,
    "Concat": _concat,
    "ConcatFromSequence": _concat_from_sequence,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonMaxSuppression": _non_max_suppression,
    "NonZero": lambda X: torch.nonzero(X).T,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "SequenceAt": lambda input_sequence, position: input_sequence[_one(position, 0)],
    "SequenceConstruct": lambda inputs: list(inputs),
    "SequenceEmpty": lambda dtype=None: [],
    "SequenceErase": _sequence_erase,
    "SequenceInsert": _sequence_insert,
    "SequenceLength": lambda input_sequence: torch.tensor(len(input_sequence)),
    "Shape": _shape,
    "Size": lambda data: torch.tensor(data.numel()),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "TensorScatter": _tensor_scatter,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unique": _unique,
    "Unsqueeze": _unsqueeze,
}
