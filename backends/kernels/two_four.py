"""2:4 linear for few tokens: y = act(x W^T + bias), where at most two of every four consecutive weights of a row are not zero.

Layout of the weight (rows M, columns K; K is padded with zeros to a multiple of 32, G = padded K / 4 groups of four):
    values: (2, M, G) in x's dtype: the first and the second kept weight of each group; a group with fewer holds zeros
    flags: (M, G / 8) int32: four flags for each of eight groups, "weight j of the group is kept". Group 2 i + h has its flag j at bit
        16 h + 4 i + j, so that one shift, one mask and one product turn the flags of two neighbouring groups into the 16-bit masks of
        a register that holds two neighbouring values.

x: (..., K) -> y: (..., M); fp16, bf16 or fp32, sums in float32. Of 16-bit weights 9/16 of the bytes cross memory. Fastest with K a multiple of 8.

Values are expanded to dense tiles in registers, two at a time and by masks alone (no gather), and multiplied on the tensor cores. Rows too
few to fill the chip split K; the parts are added in a fixed order by a second kernel.
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

NAMES = ("rows", "tokens", "words", "split", "warps", "stages", "early")
MAX_TOKENS = 256


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
    groups = torch.nn.functional.pad(weight.detach(), (0, -columns % 32)).reshape(rows, -1, 4)
    kept = groups != 0
    order = torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = groups.gather(-1, order).permute(2, 0, 1).contiguous()
    bits = torch.zeros_like(groups, dtype=torch.int32).scatter_(-1, order, 1)
    flags = (bits.reshape(rows, -1, 8, 4).long() << _shifts(weight.device)).sum((-2, -1))
    return TwoFour((rows, columns), values, _wrap(flags))


def _shifts(device: torch.device) -> Tensor:
    """(8, 4): the bit of flag j of group g in its word."""
    group = torch.arange(8, device=device)
    return (16 * (group % 2) + 4 * (group // 2))[:, None] + torch.arange(4, device=device)


def _wrap(words: Tensor) -> Tensor:
    """int64 words below 2**32 as the int32 of the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _positions(flags: Tensor) -> Tensor:
    """(2, M, G): the column of each value."""
    bits = (flags.long()[..., None, None] >> _shifts(flags.device)) & 1  # (M, G / 8, 8, 4)
    bits = bits.reshape(flags.shape[0], -1, 4)
    order = torch.argsort(bits, dim=-1, descending=True, stable=True)[..., :2]
    return (order + 4 * torch.arange(bits.shape[1], device=flags.device)[:, None]).permute(2, 0, 1)


def expand(values: Tensor, flags: Tensor, rows: int, columns: int, **_: object) -> Tensor:
    """The dense weight (rows, columns)."""
    dense = values.new_zeros(rows, values.shape[2] * 4)
    for kept, where in zip(values, _positions(flags)):
        dense = dense.scatter(1, where, kept)
    return dense[:, :columns]


def gather(dense: Tensor, flags: Tensor, columns: int, **_: object) -> Tensor:
    """The kept entries of a dense (rows, columns) tensor, laid out as `values`."""
    padded = torch.nn.functional.pad(dense, (0, -columns % 32))
    return torch.stack([padded.gather(1, where) for where in _positions(flags)])


def unpack(packed: TwoFour) -> Tensor:
    """The dense weight."""
    return expand(packed.values, packed.flags, *packed.shape)


def reference(
    x: Tensor, values: Tensor, flags: Tensor, bias: Tensor | None, rows: int, columns: int, activation: str, config: str
) -> Tensor:
    """The product with the dense weight, in float32."""
    return epilogue(x.float() @ expand(values, flags, rows, columns).float().T, bias, activation, x.dtype)


@jit
def _interleave(p0, p1, p2, p3, DTYPE: tl.constexpr):
    """Four planes of int32 registers, two groups in each, as the weights of the even and of the odd groups: (..., j / 2, j % 2)."""
    a0, b0 = _halves(p0, DTYPE)
    a1, b1 = _halves(p1, DTYPE)
    a2, b2 = _halves(p2, DTYPE)
    a3, b3 = _halves(p3, DTYPE)
    return tl.join(tl.join(a0, a2), tl.join(a1, a3)), tl.join(tl.join(b0, b2), tl.join(b1, b3))


@jit
def _halves(pair, DTYPE: tl.constexpr):
    """The low and the high 16 bits of an int32, as 16-bit values."""
    return (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True), ((pair >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@jit
def _kernel(
    x,  # (N, K), rows stride_x apart
    values,  # (2, M, G); 16-bit values are passed as (2, M, G / 2) int32
    flags,  # (M, G / 8) int32
    bias,  # (M,) or None
    y,  # (N, M), rows stride_y apart; with SPLIT > 1 (SPLIT, N, M) float32 without epilogue
    N, M, K, G, stride_x, stride_y,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PAIRED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 4 if PAIRED else 8  # elements of `values` that belong to one word of flags
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row64 = row.to(tl.int64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    word = tl.arange(0, WORDS)
    element = tl.arange(0, WORDS * PER_WORD)
    column = tl.arange(0, WORDS * 32)
    words = G // 8
    per_split = tl.cdiv(tl.cdiv(words, WORDS), SPLIT) * WORDS
    plane = tl.cast(M, tl.int64) * (words * PER_WORD)
    start = tl.program_id(1) * per_split
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    if EARLY:
        gdc_wait()
    for step in tl.range(0, bound(per_split), WORDS, num_stages=STAGES):
        first = start + step
        word_here = (row < M)[:, None] & (first + word < words)[None, :]
        flag = tl.load(flags + row64[:, None] * words + (first + word)[None, :], mask=word_here, other=0)
        flag = tl.reshape(tl.broadcast_to(flag[:, :, None], (ROWS, WORDS, PER_WORD)), (ROWS, WORDS * PER_WORD))
        here = (row < M)[:, None] & (first * PER_WORD + element < words * PER_WORD)[None, :]
        place = row64[:, None] * (words * PER_WORD) + (first * PER_WORD + element)[None, :]
        v0 = tl.load(values + place, mask=here, other=0)
        v1 = tl.load(values + plane + place, mask=here, other=0)
        k = first * 32 + column
        xs = tl.load(x + token.to(tl.int64)[:, None] * stride_x + k[None, :], mask=(token < N)[:, None] & (k < K)[None, :], other=0.0)
        if PAIRED:
            flag = flag >> ((element % 4) * 4)[None, :]
            m0 = (flag & 0x10001) * 0xFFFF
            m1 = ((flag >> 1) & 0x10001) * 0xFFFF
            m2 = ((flag >> 2) & 0x10001) * 0xFFFF
            m3 = ((flag >> 3) & 0x10001) * 0xFFFF
            even, odd = _interleave(
                v0 & m0, ((v0 & ~m0) | (v1 & m0)) & m1, ((v1 & ~m3) | (v0 & m3)) & m2, v1 & m3, DTYPE
            )  # fmt: skip
            w = tl.permute(tl.join(even, odd), (0, 1, 4, 2, 3))  # (row, pair of groups, group of the pair, j / 2, j % 2)
        else:
            flag = flag >> ((element % 8 // 2) * 4 + (element % 2) * 16)[None, :]
            zero = tl.zeros_like(v0)
            has0 = (flag & 1) != 0
            has3 = (flag & 8) != 0
            w0 = tl.where(has0, v0, zero)
            w1 = tl.where((flag & 2) != 0, tl.where(has0, v1, v0), zero)
            w2 = tl.where((flag & 4) != 0, tl.where(has3, v0, v1), zero)
            w3 = tl.where(has3, v1, zero)
            w = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (row, group, j / 2, j % 2)
        acc = dot(tl.reshape(w, (ROWS, WORDS * 32)), tl.trans(xs), acc, PRECISION)
    if EARLY:
        gdc_launch_dependents()
    place = token.to(tl.int64)[None, :] * stride_y + row[:, None]
    if SPLIT == 1:
        if bias is not None:
            acc += tl.load(bias + row, mask=row < M, other=0.0).to(tl.float32)[:, None]
        acc = activate(acc, ACTIVATION)
    else:
        place += tl.program_id(1).to(tl.int64) * N * stride_y
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=(token < N)[None, :] & (row < M)[:, None])


def launch(
    x: Tensor, values: Tensor, flags: Tensor, bias: Tensor | None, rows: int, columns: int, activation: str, config: str
) -> Tensor:
    """Runs the kernel with the tiles of `config`, the best guess where it is empty."""
    check_linear("two_four_linear", x, (rows, columns), values.dtype, bias, activation)
    x2 = x.reshape(-1, columns)
    tokens, groups = x2.shape[0], values.shape[2]
    if x2.stride(-1) != 1:
        x2 = x2.contiguous()
    tile = parse(config or candidates(rows, tokens, x)[0], NAMES)
    y = x.new_empty(tokens, rows)
    if y.numel():
        early, split, paired = bool(tile["early"]), tile["split"], x.element_size() == 2
        out = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=x.device)
        _kernel[(triton.cdiv(rows, tile["rows"]), split, triton.cdiv(tokens, tile["tokens"]))](
            x2, values.view(torch.int32) if paired else values, flags, bias, out, tokens, rows, columns, groups, x2.stride(0), rows,
            ROWS=tile["rows"], TOKENS=tile["tokens"], WORDS=tile["words"], SPLIT=split, STAGES=tile["stages"], PAIRED=paired,
            ACTIVATION=activation, PRECISION="tf32" if paired else "ieee", EARLY=early, **launch_options(tile),
        )  # fmt: skip
        if split > 1:
            add_parts(out, bias, y, activation, tile["early"])
    return y.reshape(*x.shape[:-1], rows)


TILES = (  # rows, words, warps, stages
    (64, 8, 4, 2), (64, 8, 4, 3), (64, 8, 4, 1), (64, 4, 4, 3), (64, 4, 4, 2), (128, 4, 8, 3), (128, 8, 8, 2), (128, 4, 4, 2), (128, 8, 8, 1), (32, 8, 4, 3),
)  # fmt: skip


def candidates(rows: int, tokens: int, x: Tensor) -> list[str]:
    """Tiles worth timing for `tokens` rows like x, the best guess first."""
    wide = min(64, max(8, 1 << max(0, tokens - 1).bit_length()))
    early = early_launch(x.device) if not interpreted() else 0
    chosen = []
    for tile_rows, words, warps, stages in TILES:
        tiles = -(-rows // tile_rows)
        splits = [min(16, max(1, 132 * c // tiles)) for c in (2, 3, 4, 7)]  # c programs for each of 132 multiprocessors
        chosen += [
            config(rows=tile_rows, tokens=wide, words=words, split=split, warps=warps, stages=stages, early=early)
            for split in dict.fromkeys(splits)
        ]
    return chosen


op = define("two_four_linear", reference, launch, expand, gather)


def linear(x: Tensor, packed: TwoFour, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(x W^T + bias). x: (..., K) -> (..., M)."""
    return op(x, packed.values, packed.flags, bias, *packed.shape, activation, config)


def configs(packed: TwoFour, tokens: int) -> list[str]:
    """Tiles worth timing, the best guess first."""
    return candidates(packed.shape[0], tokens, packed.values)


KERNEL = Kernel("two_four", op, pack, unpack, linear, reference, configs, accepts)
