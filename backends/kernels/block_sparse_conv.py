"""Block-sparse convolution: y = act(conv2d(x, W) + bias), where W is zero outside some blocks of B outputs times B channels at one tap.

A tap is a position of the window. The weight is a matrix (M, taps x channels), the channels of every tap padded with zeros to whole blocks,
and stored as `block_sparse` stores one:
    values: (blocks, B, B) in x's dtype, row major (outputs times channels); blocks of one block row are neighbours
    columns: (blocks,) int32: tap row << 24 | tap column << 16 | block of channels
    schedule: (block rows, 4) int32: block row, first block, end, 0; the longest block rows first

x: (N, C, H, W) -> y: (N, M, H', W'), both with the channels last in memory; fp16, bf16 or fp32, sums in float32. B is 16, 32, 64 or 128.
Any stride, padding with zeros and dilation; no groups. Fastest with C a multiple of 8 (16-byte rows).

An implicit product of matrices: a program owns a block row and a patch of outputs (images x high x wide), and for each block of W reads the
channels at the shifted places of the patch. With stride 1 such a place is a box of x, whose parts outside the image the copy engine fills
with zeros; else each output is addressed. A window of one position that neither steps nor pads is a product over pixels: `block_sparse`.

Source: implicit-GEMM convolution as in CUTLASS (Thakkar et al., BSD-3-Clause), over the block-sparse rows of `block_sparse`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.backends.kernels import block_sparse
from graphprune.backends.kernels.base import (
    ACTIVATION_GRADIENTS,
    ACTIVATIONS,
    DTYPES,
    EXPAND,
    Kernel,
    Packed,
    activate,
    bound,
    config,
    dot,
    epilogue,
    jit,
    launch_options,
    launches,
    parse,
    tl,
    triton,
)
from graphprune.errors import InvalidInput

NAMES = ("images", "high", "wide", "warps", "stages", "swap", "tma")
Pair = tuple[int, int]
SIZE = (28, 28)  # of images, where it is not known


@dataclass(frozen=True)
class BlockSparseConv(Packed):
    """The weight of a convolution with B x B blocks, and how it steps; see the module for the layouts. `shape`: (M, C * taps)."""

    values: Tensor
    columns: Tensor
    schedule: Tensor
    block: int
    full: tuple[int, int, int, int]  # (M, C, taps high, taps wide)
    stride: Pair
    padding: Pair
    dilation: Pair
    size: Pair  # of the images that times are measured with

    @property
    def work(self) -> float:
        return self.values.numel() / max(1, self.shape[0] * self.shape[1])

    @property
    def width(self) -> int:
        return self.shape[0] + self.full[1] * self.stride[0] * self.stride[1]

    @property
    def unread(self) -> int:
        channels = (self.columns & 0xFFFF).unique().numel() * self.block
        return max(0, self.full[1] - channels) * self.stride[0] * self.stride[1]

    def example(self, tokens: int, like: Tensor) -> Tensor:
        """Images with about so many output pixels."""
        high, wide = outputs(self.size, self.full, self.stride, self.padding, self.dilation)
        images = max(1, round(tokens / (high * wide)))
        x = torch.randn(images, self.full[1], *self.size, device=like.device).to(like.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # the library's best
        try:
            return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)
        finally:
            torch.backends.cudnn.benchmark = before


def matrix(weight: Tensor, block: int) -> Tensor:
    """(M, taps * channels), the channels of every tap padded with zeros to whole blocks, of (M, C, taps high, taps wide)."""
    return F.pad(weight.permute(0, 2, 3, 1), (0, -weight.shape[1] % block)).flatten(1)


def accepts(weight: Tensor) -> str | None:
    """Why `weight` cannot take this format, or None."""
    if weight.dim() != 4:
        return f"the weight has {weight.dim()} axes, expected 4: outputs, channels, and a window"
    if not weight.numel():
        return f"the weight has no entries, its shape is {tuple(weight.shape)}"
    if weight.dtype not in DTYPES:
        return f"the weight is {weight.dtype}, expected float16, bfloat16 or float32"
    if max(weight.shape[2:]) > 127:
        return f"the window is {weight.shape[2]} x {weight.shape[3]}, expected at most 127 x 127"
    return None


def pack(
    weight: Tensor, block: int = 64, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1), size: Pair = SIZE
) -> BlockSparseConv:
    """Keeps the blocks of `weight` (M, C, taps high, taps wide) that hold a non-zero.

    Raises:
        InvalidInput: the weight is not that of a convolution, of a known dtype, or there is no kernel for the block.
    """
    if (reason := accepts(weight)) is not None:
        raise InvalidInput(f"block-sparse convolution: {reason}")
    rows, channels, high, wide = weight.shape
    packed = block_sparse.pack(matrix(weight.detach(), block), block)
    blocks = -(-channels // block)
    tap, place = packed.columns // blocks, packed.columns % blocks
    codes = (tap // wide << 24) | (tap % wide << 16) | place
    return BlockSparseConv(
        (rows, channels * high * wide), packed.values, codes.int(), packed.schedule, block, (rows, channels, high, wide),
        stride, padding, dilation, size,
    )  # fmt: skip


def _flat(codes: Tensor, full: Sequence[int], block: int) -> Tensor:
    """Block columns of `matrix`."""
    return ((codes >> 24) * full[3] + (codes >> 16 & 255)) * -(-full[1] // block) + (codes & 65535)


def _columns(full: Sequence[int], block: int) -> int:
    return full[2] * full[3] * -(-full[1] // block) * block


def expand(values: Tensor, columns: Tensor, schedule: Tensor, full: Sequence[int], block: int, **_: object) -> Tensor:
    """The dense weight."""
    rows, channels, high, wide = full
    flat = block_sparse.expand(values, _flat(columns, full, block), schedule, rows, _columns(full, block), block)
    return flat.reshape(rows, high, wide, -1)[..., :channels].permute(0, 3, 1, 2)


def gather(dense: Tensor, columns: Tensor, schedule: Tensor, full: Sequence[int], block: int, **_: object) -> Tensor:
    """The blocks of a dense tensor like the weight, laid out as `values`."""
    return block_sparse.gather(matrix(dense, block), _flat(columns, full, block), schedule, full[0], _columns(full, block), block)


def unpack(packed: BlockSparseConv) -> Tensor:
    """The dense weight."""
    return expand(packed.values, packed.columns, packed.schedule, packed.full, packed.block)


def outputs(size: Sequence[int], full: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Pair:
    """Height and width of the result."""
    high, wide = ((n + 2 * p - d * (t - 1) - 1) // s + 1 for n, t, s, p, d in zip(size, full[2:], stride, padding, dilation))
    return high, wide


def reference(
    x: Tensor, values: Tensor, columns: Tensor, schedule: Tensor, bias: Tensor | None, full: Sequence[int], block: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], activation: str, config: str,
) -> Tensor:  # fmt: skip
    """The convolution with the dense weight, in float32."""
    weight = expand(values, columns, schedule, full, block).float()
    y = F.conv2d(x.float(), weight, None, stride, padding, dilation)
    y = epilogue(y, None if bias is None else bias[:, None, None], activation, x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


@jit
def _kernel(
    x,  # (N, H, W, C), contiguous; with TMA a descriptor of it, in boxes (IMAGES, HIGH, WIDE, BLOCK)
    values,  # (blocks, BLOCK, BLOCK); with TMA a descriptor of (blocks * BLOCK, BLOCK), in tiles (BLOCK, BLOCK)
    columns,  # (blocks,) int32
    schedule,  # (block rows, 4) int32
    bias,  # (M,) or None
    y,  # (N, OH, OW, M), contiguous
    N, H, W, C, OH, OW, M, block_rows,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    BLOCK: tl.constexpr, IMAGES: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = IMAGES * HIGH * WIDE
    entry = schedule + (tl.program_id(0) % block_rows) * 4
    row_block, start, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    patch = tl.program_id(0) // block_rows
    wide, high = tl.cdiv(OW, WIDE), tl.cdiv(OH, HIGH)
    n0, h0, w0 = patch // (wide * high) * IMAGES, patch // wide % high * HIGH, patch % wide * WIDE
    lane = tl.arange(0, PIXELS)
    n, oh, ow = n0 + lane // (HIGH * WIDE), h0 + lane // WIDE % HIGH, w0 + lane % WIDE
    top, left = oh * stride_h - pad_h, ow * stride_w - pad_w
    inner = tl.arange(0, BLOCK)
    acc = tl.zeros((PIXELS, BLOCK) if SWAP else (BLOCK, PIXELS), dtype=tl.float32)
    for slot in tl.range(bound(start), bound(end), num_stages=STAGES):
        code = tl.load(columns + slot)
        down, right, channel = (code >> 24) * dilation_h, ((code >> 16) & 255) * dilation_w, (code & 65535) * BLOCK
        if TMA:
            w = values.load([slot * BLOCK, 0])
            xs = x.load([n0, h0 - pad_h + down, w0 - pad_w + right, channel]).reshape(PIXELS, BLOCK)
        else:
            w = tl.load(values + tl.cast(slot, tl.int64) * (BLOCK * BLOCK) + inner[:, None] * BLOCK + inner[None, :])
            ih, iw = top + down, left + right
            inside = (n < N) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            place = ((n.to(tl.int64) * H + ih) * W + iw) * C + channel
            xs = tl.load(x + place[:, None] + inner[None, :], mask=inside[:, None] & (channel + inner < C)[None, :], other=0.0)
        if SWAP:
            acc = dot(xs, tl.trans(w), acc, PRECISION)
        else:
            acc = dot(w, tl.trans(xs), acc, PRECISION)
    total = acc if SWAP else tl.trans(acc)
    out = row_block * BLOCK + inner
    if bias is not None:
        total += tl.load(bias + out, mask=out < M, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    there = (n < N) & (oh < OH) & (ow < OW)
    to = ((n.to(tl.int64) * OH + oh) * OW + ow) * M
    tl.store(y + to[:, None] + out[None, :], total.to(y.dtype.element_ty), mask=there[:, None] & (out < M)[None, :])


def _check(x: Tensor, values: Tensor, bias: Tensor | None, full: Sequence[int], activation: str) -> None:
    if x.dim() != 4 or x.shape[1] != full[1]:
        raise InvalidInput(f"block_sparse_conv: x has shape {tuple(x.shape)}, expected (images, {full[1]}, height, width)")
    if x.dtype != values.dtype or x.dtype not in DTYPES:
        raise InvalidInput(f"block_sparse_conv: x is {x.dtype} and the weight {values.dtype}; both must be float16, bfloat16 or float32")
    if bias is not None and (bias.shape != (full[0],) or bias.device != x.device):
        found = f"the bias has shape {tuple(bias.shape)} on {bias.device}"
        raise InvalidInput(f"block_sparse_conv: {found}, expected ({full[0]},) on {x.device}")
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"block_sparse_conv: unknown activation '{activation}'; known: {', '.join(filter(None, ACTIVATIONS))}")


def _empty(x: Tensor, full: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The result's memory, (N, H', W', M)."""
    return x.new_empty(x.shape[0], *outputs(x.shape[2:], full, stride, padding, dilation), full[0])


def launch(
    x: Tensor, values: Tensor, columns: Tensor, schedule: Tensor, bias: Tensor | None, full: Sequence[int], block: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], activation: str, config: str,
) -> Tensor:  # fmt: skip
    """Runs the kernel with the tile in `config`; the best guess where it is empty."""
    rows, channels = full[:2]
    x = x.permute(0, 2, 3, 1).contiguous()
    if _pointwise(full, stride, padding):
        y = block_sparse.launch(x, values, columns, schedule, bias, rows, channels, block, activation, config)
        return y.permute(0, 3, 1, 2)
    y = _empty(x.permute(0, 3, 1, 2), full, stride, padding, dilation)
    if y.numel():
        tile = parse(config or candidates(block, y.shape[:3], tuple(stride) == (1, 1), x)[0], NAMES)
        box = tile["images"], tile["high"], tile["wide"]
        aligned = channels * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        tma = bool(tile["tma"]) and tuple(stride) == (1, 1) and aligned and values.shape[0] > 0
        patches = 1
        for length, part in zip(y.shape, box):
            patches *= triton.cdiv(length, part)
        _kernel[(schedule.shape[0] * patches,)](
            _descriptor(x, *box, block) if tma else x, _descriptor(values.view(-1, block), block, block) if tma else values,
            columns, schedule, bias, y, x.shape[0], x.shape[1], x.shape[2], channels, y.shape[1], y.shape[2], rows, schedule.shape[0],
            *stride, *padding, *dilation, BLOCK=block, IMAGES=box[0], HIGH=box[1], WIDE=box[2], STAGES=tile["stages"],
            SWAP=bool(tile["swap"]), TMA=tma, ACTIVATION=activation, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            **launch_options(tile),
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def _pointwise(full: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    return (*full[2:], *stride) == (1, 1, 1, 1) and not any(padding)


def _descriptor(tensor: Tensor, *box: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [1]  # not those of the tensor, which may be anything along an axis of one
    for length in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * length)
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(box))


def patch(pixels: int, lengths: Sequence[int]) -> tuple[int, int, int]:
    """(images, high, wide), powers of two with this product, that cover outputs (N, H', W') with the fewest patches; wide ones first."""
    best = (0, 0, 0), float("inf")
    wide = pixels
    while wide:
        high = pixels // wide
        while high:
            box = pixels // wide // high, high, wide
            number = 1.0
            for length, part in zip(lengths, box):
                number *= -(-length // part)
            if number < best[1]:
                best = box, number
            high //= 2
        wide //= 2
    return best[0]


def candidates(block: int, lengths: Sequence[int], steps_by_one: bool, x: Tensor) -> list[str]:
    """Tiles worth timing for outputs (N, H', W'), the best guess first."""
    most = (4096 if x.element_size() == 4 else 16384) // 4  # sums a warp holds; no tensor cores take float32

    def fits(pixels: int, warps: int, stages: int, swap: int, tma: int) -> bool:
        shared = (pixels + block) * block * x.element_size() * max(1, stages // 2)
        return shared <= block_sparse.SHARED_BYTES and pixels * block <= most * warps

    known = (TILES if steps_by_one else STEPPING_TILES) if block >= 64 else (SMALL_TILES if steps_by_one else SMALL_STEPPING_TILES)
    tiles = [tile for tile in known if fits(*tile)] or [LAST_TILE]
    return [config(**dict(zip(NAMES, (*patch(pixels, lengths), *rest)))) for pixels, *rest in tiles]


# Pixels, warps, stages, swap, tma. Stages as in `block_sparse`; lists are short here, so that several programs on one multiprocessor, which
# start and end in turn, are worth more than many steps in flight. The matrix units take 64 rows at least, so that blocks of 16 and 32
# outputs have to be the columns (swap).
TILES = (
    (128, 4, 5, 0, 1), (256, 4, 3, 0, 1), (256, 4, 5, 0, 1), (128, 4, 3, 0, 1), (128, 4, 7, 0, 1), (256, 8, 5, 0, 1), (64, 4, 5, 0, 1),
)  # fmt: skip
STEPPING_TILES = ((128, 4, 5, 0, 0), (128, 4, 3, 1, 0), (128, 4, 5, 1, 0), (256, 8, 5, 1, 0), (64, 4, 3, 0, 0))
SMALL_STEPPING_TILES = ((128, 4, 5, 1, 0), (256, 4, 5, 1, 0), (128, 4, 7, 1, 0), (256, 8, 5, 1, 0), (64, 4, 5, 1, 0))
SMALL_TILES = ((256, 4, 5, 1, 1), (128, 4, 7, 1, 1), (256, 8, 7, 1, 1), (128, 4, 9, 1, 1), *SMALL_STEPPING_TILES[:3])
LAST_TILE = (32, 4, 3, 0, 0)


def forward(
    x: Tensor, values: Tensor, columns: Tensor, schedule: Tensor, bias: Tensor | None, full: Sequence[int], block: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], activation: str, config: str,
) -> Tensor:  # fmt: skip
    """What the op runs: the kernel, the reference, or the dense convolution with the expanded weight."""
    _check(x, values, bias, full, activation)
    bias = None if bias is None else bias.contiguous()  # the kernel steps through it one by one
    if config == EXPAND:
        y = F.conv2d(x, expand(values, columns, schedule, full, block), bias, stride, padding, dilation)
        return ACTIVATIONS[activation](y).contiguous(memory_format=torch.channels_last)
    run = launch if launches(x) else reference
    return run(x, values, columns, schedule, bias, full, block, stride, padding, dilation, activation, config)


op = torch.library.custom_op("graphprune::block_sparse_conv", forward, mutates_args=())
SIGNATURE = inspect.signature(forward)


@op.register_fake
def _(*args: Any, **kwargs: Any) -> Tensor:
    given = SIGNATURE.bind(*args, **kwargs).arguments
    return _empty(*(given[name] for name in ("x", "full", "stride", "padding", "dilation"))).permute(0, 3, 1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As through the dense convolution; a gradient never reaches a pruned entry."""
    x, values, columns, schedule, bias = ctx.saved_tensors
    full, block, stride, padding, dilation, activation, _ = ctx.rest
    weight = expand(values, columns, schedule, full, block)
    if activation:
        before = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, dilation)
        grad = ACTIVATION_GRADIENTS[activation](grad, before)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, list(stride), list(padding), list(dilation), False, [0, 0], 1, wanted
    )
    to_values = gather(to_weight, columns, schedule, full, block) if wanted[1] else None
    to_bias = grad.sum((0, 2, 3)).to(bias.dtype) if bias is not None and ctx.needs_input_grad[4] else None
    return to_x, to_values, None, None, to_bias, *(None for _ in ctx.rest)


op.register_autograd(_backward, setup_context=_setup)


def linear(x: Tensor, packed: BlockSparseConv, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(conv2d(x, W) + bias). x: (N, C, H, W) or (C, H, W); the result has its channels last in memory."""
    if x.dim() == 3:
        return linear(x[None], packed, bias, activation, config)[0]
    return op(
        x, packed.values, packed.columns, packed.schedule, bias, packed.full, packed.block, packed.stride, packed.padding, packed.dilation,
        activation, config,
    )  # fmt: skip


def configs(packed: BlockSparseConv, tokens: int) -> list[str]:
    """Tiles worth timing for so many output pixels, the best guess first."""
    if _pointwise(packed.full, packed.stride, packed.padding):
        return block_sparse.candidates(packed.block, tokens, packed.values)
    high, wide = outputs(packed.size, packed.full, packed.stride, packed.padding, packed.dilation)
    return candidates(packed.block, (max(1, round(tokens / (high * wide))), high, wide), packed.stride == (1, 1), packed.values)


KERNEL = Kernel("block_sparse_conv", op, pack, unpack, linear, reference, configs, accepts, shapes=())
