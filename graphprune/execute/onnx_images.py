"""ONNX operators that sample images and feature maps: resizing, grids, regions of interest, deformable convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import UnsupportedOp
from graphprune.rules.onnx_literals import ints, numbers


def _source_position(mode: str, out: int, size: int, scale: float, roi: tuple[float, float]) -> Tensor:
    """Where along an axis of `size` each of the `out` new positions lies, in float64."""
    x = torch.arange(out, dtype=torch.float64)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * (size - 1) / (out - 1) if out > 1 else torch.zeros_like(x)
    if mode == "pytorch_half_pixel":
        return (x + 0.5) / scale - 0.5 if out > 1 else torch.zeros_like(x)
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = roi
        if out == 1:
            return torch.full_like(x, 0.5 * (start + end) * (size - 1))
        return start * (size - 1) + x * (end - start) * (size - 1) / (out - 1)
    if mode == "half_pixel_symmetric":
        offset = size / 2 * (1 - out / (scale * size))
        return offset + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5  # half_pixel


def _nearest(position: Tensor, mode: str) -> Tensor:
    if mode == "floor":
        return position.floor()
    if mode == "ceil":
        return position.ceil()
    return (position + 0.5).floor() if mode == "round_prefer_ceil" else (position - 0.5).ceil()


def _kernel(distance: Tensor, mode: str, a: float) -> Tensor:
    d = distance.abs()
    if mode == "linear":
        return (1 - d).clamp(min=0)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _interpolation(position: Tensor, size: int, mode: str, scale: float, a: float, antialias: bool, exclude_outside: bool) -> Tensor:
    """The (new, old) matrix of weights along one axis."""
    reach = min(scale, 1.0) if antialias else 1.0
    radius = math.ceil((1 if mode == "linear" else 2) / reach)
    taps = position.floor()[:, None] + torch.arange(-radius, radius + 2)
    weights = _kernel((taps - position[:, None]) * reach, mode, a)
    if exclude_outside or antialias:
        weights = torch.where((taps >= 0) & (taps < size), weights, torch.zeros_like(weights)) if exclude_outside else weights
        weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(len(position), size, dtype=torch.float64)
    return matrix.scatter_add(1, taps.clamp(0, size - 1).long(), weights)


def _resize(
    X: Tensor,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    over = [axis % X.dim() for axis in (axes if axes is not None else range(X.dim()))]
    old = [X.shape[axis] for axis in over]
    wanted, factors, region = ints(sizes) or [], numbers(scales) or [], numbers(roi) or []
    if wanted:
        factors = [new / size for new, size in zip(wanted, old)]
        if keep_aspect_ratio_policy != "stretch":
            common = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors, wanted = [common] * len(over), [math.floor(common * size + 0.5) for size in old]
    else:
        wanted = [math.floor(size * factor) for size, factor in zip(old, factors)]
    out, dtype = X, X.dtype
    if mode != "nearest" and not dtype.is_floating_point:
        out = out.to(torch.float32)
    for i, axis in enumerate(over):
        cropped = coordinate_transformation_mode == "tf_crop_and_resize"
        if wanted[i] == old[i] and factors[i] == 1 and not cropped:
            continue
        bounds = (region[i], region[i + len(over)]) if cropped else (0.0, 1.0)
        position = _source_position(coordinate_transformation_mode, wanted[i], old[i], factors[i], bounds)
        if mode == "nearest":
            index = _nearest(position, nearest_mode).clamp(0, old[i] - 1).long().to(X.device)
            out = out.index_select(axis, index)
        else:
            weights = _interpolation(position, old[i], mode, factors[i], cubic_coeff_a, bool(antialias), bool(exclude_outside))
            out = (out.movedim(axis, -1) @ weights.to(X.device, out.dtype).T).movedim(-1, axis)
        if cropped:
            outside = ((position < 0) | (position > old[i] - 1)).to(X.device)
            out = torch.where(outside.reshape([-1 if j == axis else 1 for j in range(X.dim())]), out.new_tensor(extrapolation_value), out)
    return out.to(dtype)


def _upsample(X: Tensor, scales: Any, mode: str = "nearest") -> Tensor:
    return _resize(X, scales=scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


_GRID_MODES = {"bilinear": "bilinear", "linear": "bilinear", "bicubic": "bicubic", "cubic": "bicubic", "nearest": "nearest"}


def _grid_sample(X: Tensor, grid: Tensor, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros") -> Tensor:
    return F.grid_sample(X, grid.to(X.dtype), _GRID_MODES[mode], padding_mode, bool(align_corners))


def _affine_grid(theta: Tensor, size: Any, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, ints(size) or [], bool(align_corners))


def _roi_samples(start: float, extent: float, bins: int, size: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Where the samples of one axis lie: (samples, 2) lower and upper pixels, and their weights, zero outside the image."""
    grid = ratio if ratio > 0 else math.ceil(extent / bins)
    position = start + (torch.arange(bins * grid, dtype=torch.float64) + 0.5) * extent / (bins * grid)
    inside = (position >= -1) & (position <= size)
    low = position.clamp(0, size - 1).floor()
    upper = position.clamp(0, size - 1) - low
    pixels = torch.stack([low, (low + 1).clamp(max=size - 1)], 1).long()
    return pixels, torch.stack([1 - upper, upper], 1) * inside[:, None]


def _roi_align(
    X: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    half = coordinate_transformation_mode == "half_pixel"
    shift, least = (0.5, 0.0) if half else (0.0, 1.0)
    out = []
    for (x1, y1, x2, y2), image in zip((_floats(roi) for roi in rois), ints(batch_indices) or []):
        top, left = y1 * spatial_scale - shift, x1 * spatial_scale - shift
        height, width = max(y2 * spatial_scale - shift - top, least), max(x2 * spatial_scale - shift - left, least)
        rows, row_weights = _roi_samples(top, height, output_height, X.shape[2], sampling_ratio)
        columns, column_weights = _roi_samples(left, width, output_width, X.shape[3], sampling_ratio)
        # (channels, row, upper or lower, column, left or right), each pixel with its share
        shares = row_weights[:, :, None, None] * column_weights[None, None]
        corners = X[image][:, rows.to(X.device)[:, :, None, None], columns.to(X.device)[None, None]] * shares.to(X.device, X.dtype)
        bins = corners.reshape(X.shape[1], output_height, -1, 2, output_width, columns.shape[0] // output_width, 2)
        out.append(bins.amax((2, 3, 5, 6)) if mode == "max" else bins.sum((3, 6)).mean((2, 4)))
    return torch.stack(out) if out else X.new_zeros(0, X.shape[1], output_height, output_width)


def _floats(tensor: Tensor) -> list[float]:
    return [float(v) for v in numbers(tensor) or []]


def _deform_conv(
    X: Tensor,
    W: Tensor,
    offset: Tensor,
    B: Tensor | None = None,
    mask: Tensor | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    if X.dim() != 4:
        raise UnsupportedOp(f"ai.onnx::DeformConv over {X.dim() - 2} spatial axes; the lowering has 2")
    batch, channels, *size = X.shape
    kernel, out = W.shape[2:], offset.shape[2:]
    stride, dilation, before = list(strides or (1, 1)), list(dilations or (1, 1)), list(pads or (0, 0))
    taps = math.prod(kernel)
    shifts = offset.reshape(batch, offset_group, *kernel, 2, *out)
    places = []
    for i in range(2):  # rows, then columns: (batch, offset groups, kernel rows, kernel columns, out rows, out columns)
        at_kernel = (torch.arange(kernel[i], device=X.device) * dilation[i]).reshape([-1 if j == i else 1 for j in range(4)])
        at_out = (torch.arange(out[i], device=X.device) * stride[i] - before[i]).reshape([-1 if j == i + 2 else 1 for j in range(4)])
        places.append((2 * (shifts[:, :, :, :, i] + at_kernel + at_out) + 1) / size[i] - 1)
    grid = torch.stack(places[::-1], -1).reshape(batch * offset_group, taps * out[0], out[1], 2)
    parts = X.reshape(batch * offset_group, channels // offset_group, *size)
    taken = F.grid_sample(parts, grid.to(X.dtype), align_corners=False).reshape(batch, offset_group, -1, taps, *out)
    if mask is not None:
        taken = taken * mask.reshape(batch, offset_group, 1, taps, *out)
    columns = taken.reshape(batch, group, channels // group * taps, -1)
    result = (W.reshape(group, W.shape[0] // group, -1) @ columns).reshape(batch, W.shape[0], *out)
    return result if B is None else result + B.reshape(-1, 1, 1)


IMAGE_OPS: dict[str, Callable[..., Any]] = {
    "AffineGrid": _affine_grid,
    "DeformConv": _deform_conv,
    "GridSample": _grid_sample,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Upsample": _upsample,
}
