"""2:4 linear for few tokens: y = act(x W^T + bias), where at most two of every four consecutive weights of a row are not zero.

Layout of the weight (rows M, columns K), in tiles of 64 rows by 256 columns, padded with zeros, each tile one piece of memory:
    values: (row tiles, column tiles, 2, 64, 64) in x's dtype: the first and the second kept weight of each group of four; a group with
        fewer holds -0.0, by which a gradient knows what was pruned
    flags: (row tiles, column tiles, 64, 8) int32: a word for each eight groups, with four flags a group, "weight j is kept". Flag j of
        group 2 i + h stands at bit 16 h + (7, 15, 6, 14)[j] - 2 i. So one byte permutation that repeats sign bits makes of a shifted word
        two masks for registers of two neighbouring values; plain shifts, masks and products do the same.
A tile is a matrix of 64 x 8 words of 32 columns. Memory holds it in another order: with bits of the row r5..r0 and of the word c2..c0, line
and word in memory are (c2 r3 r5 r4 r2 r1) and (r0 c1 c0). Then what a thread reads, 16 bytes a line, is what the tensor cores want of that
thread: a product may take its columns in any order, if x comes in the same, and nothing has to move between threads.

x: (..., K) -> y: (..., M); fp16, bf16 or fp32, sums in float32. Of 16-bit weights 9/16 of the bytes cross memory. Fastest with K a
multiple of 8.

One token: each value picks its column of x by its flags, and multiplies on the ordinary cores. More tokens: values are expanded to dense
tiles in registers, two at a time by masks alone, and stay there as operands of the tensor cores; x is put in order while it is read, or by
a kernel before. Rows too few to fill the chip split K; the parts are added in a fixed order by a second kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.backends.kernels.base import (
    Kernel,
    Packed,
    activate,
    add_parts,
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

NAMES = ("tokens", "ordered", "split", "warps", "stages", "early")  # tokens=1 is the kernel for one token
MAX_TOKENS = 256
ROWS, COLUMNS = 64, 256  # of a tile


@dataclass(frozen=True)
class TwoFour(Packed):
    """A 2:4 weight; see the module for the layouts."""

    values: Tensor
    flags: Tensor

    @property
    def density(self) -> float:
        return 0.5


def accepts(weight: Tensor) -> str | None:
    """Why `weight` is not 2:4, or None."""
    if (reason := check_weight(weight)) is not None:
        return reason
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4)).reshape(weight.shape[0], -1, 4)
    crowded = int(((groups != 0).sum(-1) > 2).sum())
    return f"{crowded} groups of four hold more than two non-zero weights" if crowded else None


def pack(weight: Tensor) -> TwoFour:
    """Compresses a weight (M, K) that is 2:4 already.

    Raises:
        InvalidInput: if it is not.
    """
    if (reason := accepts(weight)) is not None:
        raise InvalidInput(f"2:4: {reason}; prune with pattern='2:4' first")
    rows, columns = weight.shape
    groups = _tiles(weight.detach())
    kept = groups != 0
    order = torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = torch.where(kept, groups, -0.0).gather(-1, order).permute(0, 1, 4, 2, 3).contiguous()
    bits = torch.zeros_like(groups, dtype=torch.int64).scatter_(-1, order, 1)
    words = (bits.unflatten(3, (-1, 8)) << _shifts(weight.device)).sum((-2, -1))
    return TwoFour((rows, columns), values, torch.where(words >= 2**31, words - 2**32, words).int())


def _tiles(dense: Tensor) -> Tensor:
    """(M, K) as (row tiles, column tiles, 64 lines, 64 groups, 4), padded with zeros."""
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[1] % COLUMNS, 0, -dense.shape[0] % ROWS))
    high, wide = padded.shape[0] // ROWS, padded.shape[1] // COLUMNS
    bits = padded.reshape(high, 4, 2, 4, 2, wide, 2, 4, 32)  # tile, r5 r4, r3, r2 r1, r0, tile, c2, c1 c0, column
    return bits.permute(0, 5, 6, 2, 1, 3, 4, 7, 8).reshape(high, wide, ROWS, COLUMNS // 4, 4)


def _matrix(tiles: Tensor) -> Tensor:
    """The reverse of `_tiles`, with the padding."""
    high, wide = tiles.shape[:2]
    bits = tiles.reshape(high, wide, 2, 2, 4, 4, 2, 4, 32)
    return bits.permute(0, 4, 3, 5, 6, 1, 2, 7, 8).reshape(high * ROWS, wide * COLUMNS)


def _shifts(device: torch.device) -> Tensor:
    """(8, 4): the bit of flag j of group g in its word."""
    group = torch.arange(8, device=device)
    return (16 * (group % 2) - 2 * (group // 2))[:, None] + torch.tensor([7, 15, 6, 14], device=device)


def _places(flags: Tensor) -> Tensor:
    """(row tiles, column tiles, 64, 64, 2): which of its group each value is."""
    bits = ((flags.long()[..., None, None] >> _shifts(flags.device)) & 1).flatten(3, 4)
    return torch.argsort(bits, dim=-1, descending=True, stable=True)[..., :2]


def expand(values: Tensor, flags: Tensor, rows: int, columns: int, **_: object) -> Tensor:
    """The dense weight (rows, columns)."""
    high, wide = values.shape[:2]
    groups = values.new_zeros(high, wide, ROWS, COLUMNS // 4, 4).scatter(-1, _places(flags), values.permute(0, 1, 3, 4, 2))
    return _matrix(groups)[:rows, :columns]


def gather(dense: Tensor, values: Tensor, flags: Tensor, **_: object) -> Tensor:
    """The kept entries of a dense (rows, columns) tensor, laid out as `values`; zero elsewhere."""
    found = _tiles(dense).gather(-1, _places(flags)).permute(0, 1, 4, 2, 3)
    return found.masked_fill((values == 0) & torch.signbit(values), 0.0)


def unpack(packed: TwoFour) -> Tensor:
    """The dense weight."""
    return expand(packed.values, packed.flags, *packed.shape)


def reference(
    x: Tensor, values: Tensor, flags: Tensor, bias: Tensor | None, rows: int, columns: int, activation: str, config: str
) -> Tensor:
    """The product with the dense weight, in float32."""
    return epilogue(x.float() @ expand(values, flags, rows, columns).float().T, bias, activation, x.dtype)


@jit
def _masks(word, pair, ASM: tl.constexpr):
    """Of each word of flags and pair of groups: four registers, all bits of a half set where weight j of its group is kept."""
    if ASM:
        m0, m1, m2, m3 = tl.inline_asm_elementwise(
            """{
            .reg .b32 high, low;
            shl.b32 high, $4, $5;
            shl.b32 low, high, 1;
            prmt.b32 $0, high, 0, 0xaa88;
            prmt.b32 $1, high, 0, 0xbb99;
            prmt.b32 $2, low, 0, 0xaa88;
            prmt.b32 $3, low, 0, 0xbb99;
            }""",
            "=r,=r,=r,=r,r,r", [word, 2 * pair], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        m0 = ((word >> (7 - 2 * pair)) & 0x10001) * 0xFFFF
        m1 = ((word >> (15 - 2 * pair)) & 0x10001) * 0xFFFF
        m2 = ((word >> (6 - 2 * pair)) & 0x10001) * 0xFFFF
        m3 = ((word >> (14 - 2 * pair)) & 0x10001) * 0xFFFF
    return m0, m1, m2, m3


@jit
def _halves(pair, DTYPE: tl.constexpr):
    """The low and the high 16 bits of an int32, as 16-bit values."""
    return (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True), ((pair >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@jit
def _floats(pair, DTYPE: tl.constexpr):
    """The low and the high 16 bits of an int32, as float32."""
    if DTYPE == tl.bfloat16:  # the upper half of a float32
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = _halves(pair, DTYPE)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
    return low, high


@jit
def _finish(y, bias, acc, place, row, M, mask, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr):
    """Bias, activation and store of a tile; parts of a split sum are stored as they are."""
    if SPLIT == 1:
        if bias is not None:
            acc += tl.load(bias + row, mask=row < M, other=0.0).to(tl.float32)
        acc = activate(acc, ACTIVATION)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=mask)


@jit
def _one_kernel(
    x,  # (K / 2,) int32: pairs of 16-bit x
    values,  # (row tiles, column tiles, 2, 64, 32) int32: pairs of values
    flags,  # (row tiles, column tiles, 64, 8) int32
    bias,  # (M,) or None
    y,  # (M,) in DTYPE; with SPLIT > 1 (SPLIT, M) float32 without epilogue
    M, K,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.arange(0, 64)
    pair = tl.arange(0, 32)
    wide = tl.cdiv(K, 256)
    per_split = tl.cdiv(wide, SPLIT)
    value = values + tile.to(tl.int64) * wide * 4096 + row[:, None] * 32 + pair[None, :]
    flag = flags + tile.to(tl.int64) * wide * 512 + row[:, None] * 8 + tl.arange(0, 8)[None, :]
    acc = tl.zeros((64, 32), dtype=tl.float32)
    shift = (2 * (pair % 4))[None, :]
    if EARLY:
        gdc_wait()
    for step in tl.range(
        bound(tl.program_id(1) * per_split), bound(tl.minimum(wide, (tl.program_id(1) + 1) * per_split)), num_stages=STAGES
    ):  # fmt: skip
        word = tl.load(flag + step * 512)
        v0 = tl.load(value + step * 4096)
        v1 = tl.load(value + step * 4096 + 2048)
        k = step * 128 + tl.arange(0, 128)
        xs = tl.load(x + k, mask=2 * k < K, other=0)
        word = tl.reshape(tl.broadcast_to(word[:, :, None], (64, 8, 4)), (64, 32))
        xs = tl.broadcast_to(tl.reshape(xs, (2, 1, 1, 16, 2, 2)), (2, 32, 2, 16, 2, 2))  # (c2, rows, r0, pairs, group of the pair, j / 2)
        x01, x23 = tl.split(tl.reshape(xs, (64, 32, 2, 2)))
        even01, odd01 = tl.split(x01)
        even23, odd23 = tl.split(x23)
        a0, a1 = _floats(even01, DTYPE)
        a2, a3 = _floats(even23, DTYPE)
        b0, b1 = _floats(odd01, DTYPE)
        b2, b3 = _floats(odd23, DTYPE)
        av0, bv0 = _floats(v0, DTYPE)
        av1, bv1 = _floats(v1, DTYPE)
        # The first kept weight of a group is weight 0, 1 or 2, the second 1, 2 or 3.
        acc += av0 * tl.where((word & (0x80 >> shift)) != 0, a0, tl.where((word & (0x8000 >> shift)) != 0, a1, a2))
        acc += av1 * tl.where((word & (0x4000 >> shift)) != 0, a3, tl.where((word & (0x40 >> shift)) != 0, a2, a1))
        acc += bv0 * tl.where((word & (0x800000 >> shift)) != 0, b0, tl.where(((word >> 1) & (0x40000000 >> shift)) != 0, b1, b2))
        acc += bv1 * tl.where((word & (0x40000000 >> shift)) != 0, b3, tl.where((word & (0x400000 >> shift)) != 0, b2, b1))
    if EARLY:
        gdc_launch_dependents()
    total = tl.sum(tl.sum(tl.reshape(acc, (2, 32, 2, 16)), 3), 0)  # (r3 r5 r4 r2 r1, r0)
    high = tl.arange(0, 32)[:, None]
    out = tile * 64 + high // 4 % 4 * 16 + high // 16 * 8 + high % 4 * 2 + tl.arange(0, 2)[None, :]
    place = out if SPLIT == 1 else tl.program_id(1) * M + out
    _finish(y, bias, total, place, out, M, out < M, SPLIT, ACTIVATION)


@jit
def _order(k):
    """The column of a tile that a product takes at place k; bits of k from the highest: c2, group in the word, j / 2, c1 c0, j % 2."""
    return k // 128 * 128 + k // 2 % 4 * 32 + k // 16 % 8 * 4 + k // 8 % 2 * 2 + k % 2


@jit
def _order_kernel(
    x,  # (N, K), rows stride_x apart
    ordered,  # (N, column tiles, 256): tiles of x in the order of the products, zero past K
    K, stride_x, wide,
    EARLY: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, 256)
    column = tl.program_id(0) * 256 + _order(k)
    token = tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_wait()
    xs = tl.load(x + token * stride_x + column, mask=column < K, other=0.0)
    tl.store(ordered + (token * wide + tl.program_id(0)) * 256 + k, xs)
    if EARLY:
        gdc_launch_dependents()


@jit
def _kernel(
    x,  # (N, K), rows stride_x apart; with ORDERED (N, column tiles, 256), see above
    values,  # (row tiles, column tiles, 2, 64, 64); 16-bit values as pairs, (..., 64, 32) int32
    flags,  # (row tiles, column tiles, 64, 8) int32
    bias,  # (M,) or None
    y,  # (N, M); with SPLIT > 1 (SPLIT, N, M) float32 without epilogue
    N, M, K, stride_x,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PAIRED: tl.constexpr, ASM: tl.constexpr, WHOLE: tl.constexpr,
    ORDERED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 32 if PAIRED else 64  # elements of a row of values in a tile
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile = tl.program_id(0)
    row = tl.arange(0, 64)
    element = tl.arange(0, WIDTH)
    column = tl.arange(0, 256)
    if not ORDERED:
        column = _order(column)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    wide = tl.cdiv(K, 256)
    per_split = tl.cdiv(wide, SPLIT)
    value = values + tile.to(tl.int64) * wide * (128 * WIDTH) + row[:, None] * WIDTH + element[None, :]
    flag = flags + tile.to(tl.int64) * wide * 512 + row[:, None] * 8 + tl.arange(0, 8)[None, :]
    xs_place = x + token.to(tl.int64)[:, None] * stride_x + column[None, :]
    present = tl.broadcast_to((token < N)[:, None], (TOKENS, 256))
    acc = tl.zeros((64, TOKENS), dtype=tl.float32)
    if EARLY:
        gdc_wait()
    for step in tl.range(
        bound(tl.program_id(1) * per_split), bound(tl.minimum(wide, (tl.program_id(1) + 1) * per_split)), num_stages=STAGES
    ):  # fmt: skip
        word = tl.load(flag + step * 512)
        v0 = tl.load(value + step * (128 * WIDTH))
        v1 = tl.load(value + step * (128 * WIDTH) + 64 * WIDTH)
        if WHOLE:
            xs = tl.load(xs_place + step * 256, mask=present, other=0.0)
        else:
            xs = tl.load(xs_place + step * 256, mask=present & (step * 256 + column < K)[None, :], other=0.0)
        word = tl.reshape(tl.broadcast_to(word[:, :, None], (64, 8, WIDTH // 8)), (64, WIDTH))
        if PAIRED:
            m0, m1, m2, m3 = _masks(word, tl.broadcast_to((element % 4)[None, :], (64, WIDTH)), ASM)
            a0, b0 = _halves(v0 & m0, DTYPE)
            a1, b1 = _halves(((v0 & ~m0) | (v1 & m0)) & m1, DTYPE)
            a2, b2 = _halves(((v1 & ~m3) | (v0 & m3)) & m2, DTYPE)
            a3, b3 = _halves(v1 & m3, DTYPE)
            even = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # (row, pair, j / 2, j % 2)
            odd = tl.join(tl.join(b0, b2), tl.join(b1, b3))
            w = tl.permute(tl.join(even, odd), (0, 1, 4, 2, 3))  # (line, pair, group of the pair, j / 2, j % 2)
        else:
            shift = (16 * (element % 2) - 2 * (element % 8 // 2))[None, :]
            zero = tl.zeros_like(v0)
            has0 = ((word >> (shift + 7)) & 1) != 0
            has3 = ((word >> (shift + 14)) & 1) != 0
            w0 = tl.where(has0, v0, zero)
            w1 = tl.where(((word >> (shift + 15)) & 1) != 0, tl.where(has0, v1, v0), zero)
            w2 = tl.where(((word >> (shift + 6)) & 1) != 0, tl.where(has3, v0, v1), zero)
            w3 = tl.where(has3, v1, zero)
            w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        w = tl.reshape(w, (2, 2, 4, 4, 2, 4, 8, 2, 2))  # c2, r3, r5 r4, r2 r1, r0, c1 c0, group in the word, j / 2, j % 2
        w = tl.permute(w, (2, 1, 3, 4, 0, 6, 7, 5, 8))
        acc = dot(tl.reshape(w, (64, 256)), tl.trans(xs), acc, PRECISION)
    if EARLY:
        gdc_launch_dependents()
    out = (tile * 64 + row)[:, None]
    place = token.to(tl.int64)[None, :] * M + out
    if SPLIT > 1:
        place += tl.program_id(1).to(tl.int64) * N * M
    _finish(y, bias, acc, place, out, M, (token < N)[None, :] & (out < M), SPLIT, ACTIVATION)


def launch(
    x: Tensor, values: Tensor, flags: Tensor, bias: Tensor | None, rows: int, columns: int, activation: str, config: str
) -> Tensor:
    """Runs the kernel with the tiles of `config`, the best guess where it is empty."""
    check_linear("two_four_linear", x, (rows, columns), values.dtype, bias, activation)
    x2 = x.reshape(-1, columns)
    tokens, high = x2.shape[0], values.shape[0]
    if x2.stride(-1) != 1:
        x2 = x2.contiguous()
    tile = parse(config or candidates(rows, columns, tokens, x)[0], NAMES)
    y = x.new_empty(tokens, rows)
    if y.numel():
        early, split, paired = bool(tile["early"]), tile["split"], x.element_size() == 2
        out = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=x.device)
        shared = {"SPLIT": split, "STAGES": tile["stages"], "ACTIVATION": activation, "EARLY": early, **launch_options(tile)}
        if tile["tokens"] == 1 and _one(x2):
            _one_kernel[(high, split)](
                x2.view(torch.int32), values.view(torch.int32), flags, bias, out, rows, columns, DTYPE=_TRITON_TYPES[x.dtype], **shared
            )
        else:
            wide, ordered = max(16, tile["tokens"]), bool(tile["ordered"])
            if ordered:
                source, x2 = x2, x.new_empty(tokens, values.shape[1] * COLUMNS)
                _order_kernel[(values.shape[1], tokens)](
                    source, x2, columns, source.stride(0), values.shape[1], EARLY=early,
                    **launch_options({"warps": 2, "early": tile["early"]}),
                )  # fmt: skip
            _kernel[(high, split, triton.cdiv(tokens, wide))](
                x2, values.view(torch.int32) if paired else values, flags, bias, out, tokens, rows, columns, x2.stride(0), TOKENS=wide,
                PAIRED=paired, ASM=not interpreted() and torch.version.cuda is not None, WHOLE=ordered or columns % COLUMNS == 0,
                ORDERED=ordered, PRECISION="tf32" if paired else "ieee", **shared,
            )  # fmt: skip
        if split > 1:
            add_parts(out, bias, y, activation, tile["early"])
    return y.reshape(*x.shape[:-1], rows)


_TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} if tl is not None else {}


def _one(x: Tensor) -> bool:
    """Whether x is one row that can be read as pairs."""
    return x.shape[0] == 1 and x.element_size() == 2 and x.shape[1] % 2 == 0 and x.data_ptr() % 4 == 0


def candidates(rows: int, columns: int, tokens: int, x: Tensor) -> list[str]:
    """Tiles worth timing for `tokens` rows like x, the best guess first."""
    exact = x.element_size() == 4  # no tensor cores, and twice the shared memory
    wide = 1 if tokens <= 1 else min(16 if exact else 64, max(16, 1 << (tokens - 1).bit_length()))
    early = early_launch(x.device) if not interpreted() else 0
    tiles, steps = -(-rows // ROWS), -(-columns // COLUMNS)
    splits = [min(steps, max(1, 132 * c // tiles)) for c in (2, 4, 7)]  # c programs for each of 132 multiprocessors
    return [
        config(tokens=w, ordered=ordered, split=split, warps=4, stages=stages, early=early)
        for w, ordered in (((1, 0), (16, 0)) if wide == 1 else ((wide, 1), (wide, 0)))
        for stages in ((1,) if exact else (3, 1, 2))
        for split in dict.fromkeys(splits)
    ]


op = define("two_four_linear", reference, launch, expand, gather)


def linear(x: Tensor, packed: TwoFour, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(x W^T + bias). x: (..., K) -> (..., M)."""
    return op(x, packed.values, packed.flags, bias, *packed.shape, activation, config)


def configs(packed: TwoFour, tokens: int) -> list[str]:
    """Tiles worth timing, the best guess first."""
    return candidates(*packed.shape, tokens, packed.values)  # type: ignore[call-arg]


KERNEL = Kernel("two_four", op, pack, unpack, linear, reference, configs, accepts, most_tokens=MAX_TOKENS)
