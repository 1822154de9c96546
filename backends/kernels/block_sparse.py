"""Block-sparse linear: y = act(x W^T + bias), where W is zero outside some square blocks of B x B.

Layout of the weight (rows M, columns K; the last block row and column are padded with zeros):
    values: (blocks, B, B) in x's dtype, row major inside a block; blocks of one block row are neighbours, in the order of their columns
    columns: (blocks,) int32, the block column of each block
    schedule: (block rows, 4) int32: block row, first block, end, 0; the longest block rows first, so that no long one starts last

x: (..., K) -> y: (..., M); fp16, bf16 or fp32, sums in float32. B is 16, 32, 64 or 128. Fastest with K a multiple of 8 (16-byte rows).

Few tokens: weights are traffic. A program owns `part` rows of a block row and takes `unroll` blocks at a time, each the A operand of a
batched product whose batch is spread over the warps: rows are short enough to fill the chip without splitting a sum over programs, so the
order of additions is fixed. Many tokens: a program owns a block row and `tokens` tokens, and reads one block of W and of x a step.

Source: the block-sparse row format of PyTorch (`torch.sparse._triton_ops`), with the activations left as they are instead of transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.backends.kernels.base import (
    Kernel,
    Packed,
    activate,
    bound,
    check_linear,
    check_weight,
    config,
    define,
    dot,
    early_launch,
    epilogue,
    gdc_launch_dependents,
    gdc_wait,
    interpreted,
    jit,
    launch_options,
    parse,
    tl,
    triton,
)
from graphprune.errors import InvalidInput

BLOCKS = (16, 32, 64, 128)
FEW = 64  # tokens up to which weights dominate the traffic
FEW_NAMES = ("part", "tokens", "unroll", "warps", "stages", "early")
MANY_NAMES = ("tokens", "warps", "stages", "swap", "tma")


@dataclass(frozen=True)
class BlockSparse(Packed):
    """A weight with B x B blocks; see the module for the layouts."""

    values: Tensor
    columns: Tensor
    schedule: Tensor
    block: int

    @property
    def density(self) -> float:
        return self.values.numel() / max(1, self.shape[0] * self.shape[1])

    @property
    def work(self) -> float:
        return self.density

    @property
    def unread(self) -> int:
        return max(0, self.shape[1] - self.columns.unique().numel() * self.block)


def pack(weight: Tensor, block: int = 64) -> BlockSparse:
    """Keeps the blocks of `weight` (M, K) that hold a non-zero.

    Raises:
        InvalidInput: the weight is not a matrix of a known dtype, or there is no kernel for the block.
    """
    if (reason := check_weight(weight)) is not None:
        raise InvalidInput(f"block-sparse: {reason}")
    if block not in BLOCKS:
        raise InvalidInput(f"block-sparse: blocks of {block} x {block} have no kernel; choose one of {BLOCKS}")
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.detach(), (0, -columns % block, 0, -rows % block))
    tiles = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block).transpose(1, 2)
    kept = (tiles != 0).flatten(2).any(-1)
    counts = kept.sum(1, dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32)
    order = torch.argsort(counts, descending=True, stable=True)
    schedule = torch.stack([order.int(), (ends - counts)[order], ends[order], torch.zeros_like(counts)], 1)
    return BlockSparse(
        (rows, columns), tiles[kept].contiguous(), kept.nonzero()[:, 1].int().contiguous(), schedule.contiguous(), block
    )


def _places(columns_of_blocks: Tensor, schedule: Tensor) -> tuple[Tensor, Tensor]:
    """(block row, block column) of every block."""
    by_row = schedule[torch.argsort(schedule[:, 0])].long()
    counts = by_row[:, 2] - by_row[:, 1]
    return torch.repeat_interleave(by_row[:, 0], counts, output_size=columns_of_blocks.shape[0]), columns_of_blocks.long()


def _tiled(rows: int, columns: int, block: int) -> tuple[int, int]:
    return -(-rows // block), -(-columns // block)


def expand(values: Tensor, columns_of_blocks: Tensor, schedule: Tensor, rows: int, columns: int, block: int, **_: object) -> Tensor:
    """The dense weight (rows, columns)."""
    high, wide = _tiled(rows, columns, block)
    tiles = values.new_zeros(high, wide, block, block).index_put(_places(columns_of_blocks, schedule), values)
    return tiles.transpose(1, 2).reshape(high * block, wide * block)[:rows, :columns]


def gather(dense: Tensor, columns_of_blocks: Tensor, schedule: Tensor, rows: int, columns: int, block: int, **_: object) -> Tensor:
    """The blocks of a dense (rows, columns) tensor, laid out as `values`."""
    high, wide = _tiled(rows, columns, block)
    padded = torch.nn.functional.pad(dense, (0, wide * block - columns, 0, high * block - rows))
    return padded.reshape(high, block, wide, block).transpose(1, 2)[_places(columns_of_blocks, schedule)]


def unpack(packed: BlockSparse) -> Tensor:
    """The dense weight."""
    return expand(packed.values, packed.columns, packed.schedule, *packed.shape, packed.block)  # type: ignore[call-arg]


def reference(
    x: Tensor, values: Tensor, columns_of_blocks: Tensor, schedule: Tensor, bias: Tensor | None, rows: int, columns: int, block: int,
    activation: str, config: str,
) -> Tensor:  # fmt: skip
    """The product with the dense weight, in float32."""
    weight = expand(values, columns_of_blocks, schedule, rows, columns, block)
    return epilogue(x.float() @ weight.float().T, bias, activation, x.dtype)


@jit
def _few_kernel(
    x,  # (N, K), rows stride_x apart
    values,  # (blocks, BLOCK, BLOCK)
    columns,  # (blocks,) int32
    schedule,  # (block rows, 4) int32
    bias,  # (M,) or None
    y,  # (N, M), rows stride_y apart
    N, M, K, stride_x, stride_y,
    BLOCK: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // PART
    entry = schedule + (tl.program_id(0) // PARTS) * 4
    row_block, start, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row = (tl.program_id(0) % PARTS) * PART + tl.arange(0, PART)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    unroll = tl.arange(0, UNROLL)
    inner = tl.arange(0, BLOCK)
    acc = tl.zeros((UNROLL, PART, TOKENS), dtype=tl.float32)
    if EARLY:
        gdc_wait()
    for first in tl.range(bound(start), bound(end), UNROLL, num_stages=STAGES):
        slot = first + unroll
        here = slot < end
        column = tl.load(columns + slot, mask=here, other=0)
        w = tl.load(
            values + (slot.to(tl.int64) * (BLOCK * BLOCK))[:, None, None] + (row[:, None] * BLOCK + inner[None, :])[None],
            mask=here[:, None, None], other=0.0,
        )  # fmt: skip
        k = column[:, None] * BLOCK + inner[None, :]
        xt = tl.load(
            x + token.to(tl.int64)[None, None, :] * stride_x + k[:, :, None],
            mask=(token < N)[None, None, :] & (k < K)[:, :, None], other=0.0,
        )  # fmt: skip
        acc = dot(w, xt, acc, PRECISION)
    if EARLY:
        gdc_launch_dependents()
    total = tl.sum(acc, 0)
    out = row_block * BLOCK + row
    if bias is not None:
        total += tl.load(bias + out, mask=out < M, other=0.0).to(tl.float32)[:, None]
    total = activate(total, ACTIVATION)
    place = token.to(tl.int64)[None, :] * stride_y + out[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < N)[None, :] & (out < M)[:, None])


@jit
def _many_kernel(
    x,  # (N, K), rows stride_x apart; with TMA a descriptor of it, in tiles (TOKENS, BLOCK)
    values,  # (blocks, BLOCK, BLOCK); with TMA a descriptor of (blocks * BLOCK, BLOCK), in tiles (BLOCK, BLOCK)
    columns,  # (blocks,) int32
    schedule,  # (block rows, 4) int32
    bias,  # (M,) or None
    y,  # (N, M), rows stride_y apart
    N, M, K, stride_x, stride_y,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    entry = schedule + tl.program_id(0) * 4
    row_block, start, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    first_token = tl.program_id(1) * TOKENS
    token = first_token + tl.arange(0, TOKENS)
    inner = tl.arange(0, BLOCK)
    acc = tl.zeros((TOKENS, BLOCK) if SWAP else (BLOCK, TOKENS), dtype=tl.float32)
    for slot in tl.range(bound(start), bound(end), num_stages=STAGES):
        column = tl.load(columns + slot)
        if TMA:
            w = values.load([slot * BLOCK, 0])
            xs = x.load([first_token, column * BLOCK])
        else:
            w = tl.load(values + tl.cast(slot, tl.int64) * (BLOCK * BLOCK) + inner[:, None] * BLOCK + inner[None, :])
            k = column * BLOCK + inner
            xs = tl.load(x + token.to(tl.int64)[:, None] * stride_x + k[None, :], mask=(token < N)[:, None] & (k < K)[None, :], other=0.0)
        if SWAP:
            acc = dot(xs, tl.trans(w), acc, PRECISION)
        else:
            acc = dot(w, tl.trans(xs), acc, PRECISION)
    total = acc if SWAP else tl.trans(acc)
    out = row_block * BLOCK + inner
    if bias is not None:
        total += tl.load(bias + out, mask=out < M, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    place = token.to(tl.int64)[:, None] * stride_y + out[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < N)[:, None] & (out < M)[None, :])


def launch(
    x: Tensor, values: Tensor, columns_of_blocks: Tensor, schedule: Tensor, bias: Tensor | None, rows: int, columns: int, block: int,
    activation: str, config: str,
) -> Tensor:  # fmt: skip
    """Runs the kernel for few or many tokens, as the names in `config` say; the best guess where it is empty."""
    check_linear("block_sparse_linear", x, (rows, columns), values.dtype, bias, activation)
    x2 = x.reshape(-1, columns)
    tokens = x2.shape[0]
    if x2.stride(-1) != 1:
        x2 = x2.contiguous()
    config = config or candidates(block, tokens, x)[0]
    few = "part=" in config
    tile = parse(config, FEW_NAMES if few else MANY_NAMES)
    y = x.new_empty(tokens, rows)
    if y.numel():
        block_rows, token_tiles = schedule.shape[0], triton.cdiv(tokens, tile["tokens"])
        shared = (columns_of_blocks, schedule, bias, y, tokens, rows, columns, x2.stride(0), y.stride(0))
        precision = "ieee" if x.dtype == torch.float32 else "tf32"  # only float32 operands look at it
        if few:
            _few_kernel[(block_rows * (block // tile["part"]), token_tiles)](
                x2, values, *shared, BLOCK=block, PART=tile["part"], TOKENS=tile["tokens"], UNROLL=tile["unroll"], STAGES=tile["stages"],
                ACTIVATION=activation, PRECISION=precision, EARLY=bool(tile["early"]), **launch_options(tile),
            )  # fmt: skip
        else:
            tma = bool(tile["tma"]) and values.shape[0] > 0 and x2.stride(0) * x.element_size() % 16 == 0 and x2.data_ptr() % 16 == 0
            _many_kernel[(block_rows, token_tiles)](
                _descriptor(x2, tile["tokens"], block) if tma else x2, _descriptor(values.view(-1, block), block, block) if tma else values,
                *shared, BLOCK=block, TOKENS=tile["tokens"], STAGES=tile["stages"], SWAP=bool(tile["swap"]), TMA=tma,
                ACTIVATION=activation, PRECISION=precision, **launch_options(tile),
            )  # fmt: skip
    return y.reshape(*x.shape[:-1], rows)


def _descriptor(matrix: Tensor, *tile: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(tile))


def candidates(block: int, tokens: int, x: Tensor) -> list[str]:
    """Tiles worth timing for `tokens` rows like x, the best guess first."""

    def fits(rows: int, columns: int, width: int, stages: int) -> bool:
        return (rows + columns) * width * x.element_size() * max(1, stages // 2) <= SHARED_BYTES

    if tokens <= FEW:
        early = early_launch(x.device) if not interpreted() else 0
        wide = max(8, 1 << max(0, tokens - 1).bit_length())
        tiles = [tile for tile in FEW_TILES if tile[0] <= block and fits(tile[0], wide, tile[1] * block, tile[3])]
        return [config(**dict(zip(FEW_NAMES, (part, wide, *rest, early)))) for part, *rest in tiles or FEW_TILES[-1:]]
    exact = x.element_size() == 4  # no tensor cores: smaller tiles
    many = [t for t in MANY_TILES if fits(t[0], block, block, t[2]) and t[0] * block <= (4096 if exact else 32768) * t[1] // 4]
    return [config(**dict(zip(MANY_NAMES, tile))) for tile in many or MANY_TILES[-1:]]


SHARED_BYTES = 180_000  # of the 227 KiB a program may take on sm_90
# Reading the column of a block before the block takes pipeline stages too: 3, 5 and 7 stages hold 1, 2 and 3 steps in flight.
FEW_TILES = (  # part, unroll, warps, stages
    (32, 1, 1, 9), (32, 1, 1, 7), (16, 1, 1, 9), (16, 2, 2, 9), (32, 2, 2, 7), (64, 1, 1, 9),
    (16, 1, 1, 3),
)  # fmt: skip
MANY_TILES = (  # tokens, warps, stages, swap, tma
    (256, 4, 7, 0, 1), (256, 4, 3, 0, 1), (128, 4, 5, 1, 1), (128, 4, 7, 0, 1), (256, 4, 5, 0, 1), (128, 4, 5, 0, 0),
    (64, 4, 3, 0, 0), (32, 4, 3, 0, 0),
)  # fmt: skip


op = define("block_sparse_linear", reference, launch, expand, gather)


def linear(x: Tensor, packed: BlockSparse, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(x W^T + bias). x: (..., K) -> (..., M)."""
    return op(x, packed.values, packed.columns, packed.schedule, bias, *packed.shape, packed.block, activation, config)


def configs(packed: BlockSparse, tokens: int) -> list[str]:
    """Tiles worth timing, the best guess first."""
    return candidates(packed.block, tokens, packed.values)


KERNEL = Kernel("block_sparse", op, pack, unpack, linear, reference, configs, check_weight)
