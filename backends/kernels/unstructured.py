"""Unstructured sparse linear for few tokens: y = act(x W^T + bias), where any entries of W are zero.

The weight is a chain of gaps. Along a row, each kept weight is stored as 16 bits of value and 4 bits of distance from the one before:
2.5 bytes for each kept weight, no matter where it stands, against 2 for each weight of a dense one (1.6x fewer at 50 %, 2x at 60 %, 2.67x
at 70 %). A bitmap is smaller below 60 % (1.125 bytes a weight against 1.25 at 50 %), but to find a value in it takes a population count and
a gather for every weight, kept or not; a chain is walked with a shift and an addition for every kept one.

Layout (rows M, columns K). Rows are sorted by their number of entries and cut into tiles of R; columns are cut into panels of P, a power
of two. Inside a panel the chain of a row is cut into pieces of 8 entries, the rows of a tile padded to the same number of pieces, so that
all offsets are static. W walkers share the pieces of a row: each takes a run of neighbouring pieces, one for each step. Step u of all
walkers and rows of a tile lies together:
    values: (pieces, R, 8) in x's dtype: piece (step u, walker w) of R rows
    codes: (pieces, R) int32: the distances of the same 8 entries, 4 bits each, lowest bits first
    starts: (tiles * panels, W, R) int16: the column in the panel where each walker stands before its first entry, -1 before the first
    offsets: (tiles * panels + 1,) int32: first piece of each tile and panel
    order: (tiles * R,) int32: the row of W behind each row of a tile; M where there is none
Distances are 1 to 15; a longer one is bridged by steps of 15 whose value is -0.0, and the padding has distance 0: so a gradient can tell
both from kept weights.

x: (..., K) -> y: (..., M); fp16, bf16 or fp32, sums in float32. The panel of x lies in shared memory (of several tokens side by side, so
that one read gets all of them); eight neighbouring distances are added up in two registers at once, a byte each. Sums over walkers have a
fixed order; where rows are too few to fill the chip, panels are shared by programs and their parts added by a second kernel.

Source: own. The gap code is that of compressed sparse columns in Han et al., 2016, "EIE", arXiv 1602.01528, laid out for coalesced reads.
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

NAMES = ("tokens", "split", "warps", "stages", "early")
PIECE = 8  # entries that a walker takes in one step
SKIP = 15  # the longest distance of one entry
MAX_TOKENS = 4
TILES = (32, 16, 8)  # rows, the fastest first where each gives enough programs: measured on an H200 at one token
PROGRAMS = 256


@dataclass(frozen=True)
class GapCoded(Packed):
    """An unstructured weight; see the module for the layouts."""

    values: Tensor
    codes: Tensor
    starts: Tensor
    offsets: Tensor
    order: Tensor
    panel: int
    kept: int

    @property
    def density(self) -> float:
        return self.kept / max(1, self.shape[0] * self.shape[1])


def pack(weight: Tensor, tile: int | None = None, walkers: int | None = None, panel: int = 4096) -> GapCoded:
    """Compresses `weight` (M, K). `tile` (R), `walkers` (W) and `panel` (P) are powers of two; by default tiles are large where there are
    enough of them to fill a GPU, and more walkers share the rows of small ones.

    Raises:
        InvalidInput: the weight is not a matrix of a known dtype, or a number is not a power of two.
    """
    if (reason := check_weight(weight)) is not None:
        raise InvalidInput(f"unstructured: {reason}")
    rows, columns = weight.shape
    if tile is None:
        tile = next((it for it in TILES if rows * -(-columns // max(1, panel)) >= it * PROGRAMS), TILES[-1])
    if walkers is None:
        walkers = 16 if tile == TILES[0] else 32
    if any(n < 1 or n & (n - 1) for n in (tile, walkers, panel)) or panel > 32768:
        raise InvalidInput(f"unstructured: tile, walkers and panel must be powers of two, found {tile}, {walkers} and {panel}")
    weight, panels = weight.detach(), -(-columns // panel)
    tiles = -(-rows // tile)
    order = torch.argsort((weight != 0).sum(1), descending=True, stable=True)
    row, column = (weight[order] != 0).nonzero(as_tuple=True)  # rows in sorted order
    value = weight[order[row], column]
    chain, place = row * panels + column // panel, column % panel  # a chain is a row in a panel
    before = torch.full_like(place, -1)
    before[1:] = torch.where(chain[1:] == chain[:-1], place[:-1], -1)
    distance = place - before
    skips = (distance - 1) // SKIP
    end = (skips + 1).cumsum(0)
    chain = torch.repeat_interleave(chain, skips + 1)
    code = torch.full_like(chain, SKIP)
    code[end - 1] = distance - SKIP * skips
    entry = value.new_full(chain.shape, -0.0)
    entry[end - 1] = value

    # Entries to tiles, panels, steps and walkers.
    counts = torch.bincount(chain, minlength=tiles * tile * panels)
    first = counts.cumsum(0) - counts
    index = torch.arange(chain.shape[0], device=weight.device) - first[chain]
    piece = index // PIECE
    chain_tile = chain // panels // tile * panels + chain % panels
    chain_row = chain // panels % tile
    pieces = (-(-counts // PIECE)).reshape(tiles, tile, panels).amax(1).flatten()  # of each tile and panel
    offsets = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
    step, walker = _walk(piece, pieces[chain_tile], walkers)
    slot = offsets[chain_tile] + step * walkers + walker
    at = (slot * tile + chain_row) * PIECE + index % PIECE
    values = value.new_zeros(int(offsets[-1]) * tile * PIECE)
    values[at] = entry
    nibbles = torch.zeros(values.shape[0], dtype=torch.uint8, device=weight.device)
    nibbles[at] = code.to(torch.uint8)
    words = (nibbles.reshape(-1, PIECE).long() << (4 * torch.arange(PIECE, device=weight.device))).sum(1)
    codes = torch.where(words >= 2**31, words - 2**32, words).int()

    # Where each chain stands after each of its pieces: the place of its last entry so far.
    place = code.cumsum(0)
    place = place - torch.cat([place.new_zeros(1), place])[first][chain] - 1
    ends = torch.ones_like(chain, dtype=torch.bool)
    ends[:-1] = (chain[1:] != chain[:-1]) | (piece[1:] != piece[:-1])
    after = place.new_full((counts.shape[0], int(pieces.max()) + 1 if len(pieces) else 1), -1)
    after[chain[ends], piece[ends] + 1] = place[ends]
    after[counts == 0] = 0  # a chain without entries pads in place: keep it inside the panel
    after = after.cummax(1).values.reshape(tiles, tile, panels, -1).permute(0, 2, 3, 1).flatten(0, 1)  # (tiles * panels, pieces, R)
    starts = after.gather(1, _first_piece(pieces, walkers)[:, :, None].expand(-1, -1, tile))
    return GapCoded(
        (rows, columns), values.reshape(-1, tile, PIECE), codes.reshape(-1, tile), starts.to(torch.int16).contiguous(), offsets.int(),
        torch.nn.functional.pad(order, (0, tiles * tile - rows), value=rows).int(), panel, int(value.numel()),
    )  # fmt: skip


def _walk(piece: Tensor, pieces: Tensor, walkers: int) -> tuple[Tensor, Tensor]:
    """(step, walker) of a piece among `pieces`: the first walkers take one more, so that all steps but the last are full."""
    steps = -(-pieces // walkers)
    longer = pieces - (steps - 1) * walkers  # walkers with `steps` pieces
    late = piece >= longer * steps
    rest = piece - longer * steps
    shorter = (steps - 1).clamp(min=1)
    return torch.where(late, rest % shorter, piece % steps), torch.where(late, longer + rest // shorter, piece // steps)


def _first_piece(pieces: Tensor, walkers: int) -> Tensor:
    """(tiles, walkers): the first piece of each walker."""
    steps = -(-pieces // walkers)[:, None]
    longer = pieces[:, None] - (steps - 1) * walkers
    walker = torch.arange(walkers, device=pieces.device)
    return (walker * (steps - 1) + torch.minimum(walker.expand_as(longer * walker), longer)).clamp(min=0).minimum(pieces[:, None])


def _entries(values: Tensor, codes: Tensor, starts: Tensor, offsets: Tensor, order: Tensor, panel: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, is a kept weight), each laid out as `values`; row M where there is none."""
    groups, walkers, tile = starts.shape
    panels = groups * tile // max(1, order.shape[0])
    pieces = (offsets[1:] - offsets[:-1]).long()
    group = torch.repeat_interleave(torch.arange(groups, device=values.device), pieces, output_size=values.shape[0])
    local = torch.arange(values.shape[0], device=values.device) - offsets[:-1].long()[group]
    step, walker = local // walkers, local % walkers
    nibbles = (codes.long()[..., None] >> (4 * torch.arange(PIECE, device=values.device))) & 15  # (pieces, R, 8)
    within = nibbles.cumsum(2)
    moved = within.new_zeros(groups, int(step.max()) + 2 if len(step) else 1, walkers, tile)
    moved[group, step + 1, walker] = within[..., -1]
    base = moved.cumsum(1)[group, step, walker] + starts.long()[group, walker]
    column = base[..., None] + within + (group % max(1, panels) * panel)[:, None, None]
    row = order.long().reshape(-1, tile)[group // max(1, panels)][..., None].expand_as(column)
    return row, column, (nibbles > 0) & ~((values == 0) & torch.signbit(values))


def expand(
    values: Tensor, codes: Tensor, starts: Tensor, offsets: Tensor, order: Tensor, rows: int, columns: int, panel: int, **_: object
) -> Tensor:
    """The dense weight (rows, columns)."""
    row, column, kept = _entries(values, codes, starts, offsets, order, panel)
    return values.new_zeros(rows, columns).index_put((row[kept], column[kept]), values[kept])


def gather(
    dense: Tensor, values: Tensor, codes: Tensor, starts: Tensor, offsets: Tensor, order: Tensor, panel: int, **_: object
) -> Tensor:
    """The kept entries of a dense (rows, columns) tensor, laid out as `values`; zero elsewhere."""
    row, column, kept = _entries(values, codes, starts, offsets, order, panel)
    found = dense.new_zeros(values.shape)
    found[kept] = dense[row[kept], column[kept]]
    return found


def unpack(packed: GapCoded) -> Tensor:
    """The dense weight."""
    return expand(packed.values, packed.codes, packed.starts, packed.offsets, packed.order, *packed.shape, packed.panel)  # type: ignore[misc, call-arg]


def reference(
    x: Tensor, values: Tensor, codes: Tensor, starts: Tensor, offsets: Tensor, order: Tensor, bias: Tensor | None, rows: int, columns: int,
    panel: int, activation: str, config: str,
) -> Tensor:  # fmt: skip
    """The product with the dense weight, in float32."""
    weight = expand(values, codes, starts, offsets, order, rows, columns, panel)
    return epilogue(x.float() @ weight.float().T, bias, activation, x.dtype)


@jit
def _bits(x, token, N, stride_x, k, K):
    """x of one token as raw 16 bits, in an int32; 0 for tokens past the last."""
    xs = tl.load(x + token * tl.cast(stride_x, tl.int64) + k, mask=k < tl.where(token < N, K, 0), other=0.0)
    return xs.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@jit
def _halves(pair, DTYPE: tl.constexpr):
    """The low and the high 16 bits of an int32, as float32."""
    low = (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = ((pair >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@jit
def _put(y, bias, acc, token, row, part, N, M, ROWS: tl.constexpr, WALKERS: tl.constexpr, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr):
    total = tl.sum(tl.reshape(acc, (WALKERS, ROWS)), 0)
    place = token.to(tl.int64) * M + row
    if SPLIT == 1:
        if bias is not None:
            total += tl.load(bias + row, mask=row < M, other=0.0).to(tl.float32)
        total = activate(total, ACTIVATION)
    else:
        place += part.to(tl.int64) * N * M
    tl.store(y + place, total.to(y.dtype.element_ty), mask=row < tl.where(token < N, M, 0))


@jit
def _kernel(
    x,  # (N, K), rows stride_x apart
    values,  # (pieces, ROWS, 8)
    codes,  # (pieces, ROWS) int32
    starts,  # (tiles * panels, WALKERS, ROWS) int16
    offsets,  # (tiles * panels + 1,) int32
    order,  # (tiles * ROWS,) int32
    bias,  # (M,) or None
    y,  # (N, M); with SPLIT > 1 (SPLIT, N, M) float32 without epilogue
    N, M, K, stride_x,
    WALKERS: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    CHAINS: tl.constexpr = WALKERS * ROWS
    tile = tl.program_id(0)
    token = tl.program_id(2) * TOKENS
    panels = tl.cdiv(K, PANEL)
    per_split = tl.cdiv(panels, SPLIT)
    chain = tl.arange(0, CHAINS)
    entry = tl.arange(0, 8)
    acc0 = tl.zeros((CHAINS,), dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    if EARLY:
        gdc_wait()
    for panel in range(bound(tl.program_id(1) * per_split), bound(tl.minimum(panels, (tl.program_id(1) + 1) * per_split))):
        k = panel * PANEL + tl.arange(0, PANEL)
        if TOKENS == 1:
            xs = tl.load(x + token.to(tl.int64) * stride_x + k, mask=k < K, other=0.0)
        elif TOKENS == 2:
            xs = _bits(x, token, N, stride_x, k, K) | (_bits(x, token + 1, N, stride_x, k, K) << 16)
        else:
            low = _bits(x, token, N, stride_x, k, K) | (_bits(x, token + 1, N, stride_x, k, K) << 16)
            high = _bits(x, token + 2, N, stride_x, k, K) | (_bits(x, token + 3, N, stride_x, k, K) << 16)
            xs = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
        group = tile * panels + panel
        first = tl.load(offsets + group)
        pieces = tl.load(offsets + group + 1) - first
        here = tl.load(starts + tl.cast(group, tl.int64) * CHAINS + chain).to(tl.int32)
        for step in tl.range(0, bound(tl.cdiv(pieces, WALKERS)), num_stages=STAGES):
            valid = step * WALKERS + chain // ROWS < pieces
            at = tl.cast(first + step * WALKERS, tl.int64) * ROWS + chain
            code = tl.load(codes + at, mask=valid, other=0)
            v = tl.load(values + at[:, None] * 8 + entry[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
            word = tl.broadcast_to(code[:, None], (CHAINS, 8))
            odd = (word >> 4) & 0x0F0F0F0F
            through_odd = ((word & 0x0F0F0F0F) + odd) * 0x01010101  # byte j: distances 0 to 2 j + 1 added up, 120 at most
            through = tl.where((entry % 2 == 0)[None, :], through_odd - odd, through_odd)  # less the last one: distances 0 to 2 j
            column = here[:, None] + ((through >> (entry // 2 * 8)[None, :]) & 0xFF)
            found = tl.reshape(tl.gather(xs, tl.reshape(column, (CHAINS * 8,)), 0), (CHAINS, 8))
            if TOKENS == 1:
                acc0 += tl.sum(v * found.to(tl.float32), 1)
            elif TOKENS == 2:
                x0, x1 = _halves(found, DTYPE)
                acc0 += tl.sum(v * x0, 1)
                acc1 += tl.sum(v * x1, 1)
            else:
                x0, x1 = _halves(found.to(tl.int32), DTYPE)
                acc0 += tl.sum(v * x0, 1)
                acc1 += tl.sum(v * x1, 1)
                x2, x3 = _halves((found >> 32).to(tl.int32), DTYPE)
                acc2 += tl.sum(v * x2, 1)
                acc3 += tl.sum(v * x3, 1)
            here += ((((code & 0x0F0F0F0F) + ((code >> 4) & 0x0F0F0F0F)) * 0x01010101) >> 24) & 0xFF
    if EARLY:
        gdc_launch_dependents()
    row = tl.load(order + tile * ROWS + tl.arange(0, ROWS))
    part = tl.program_id(1)
    _put(y, bias, acc0, token, row, part, N, M, ROWS, WALKERS, SPLIT, ACTIVATION)
    if TOKENS >= 2:
        _put(y, bias, acc1, token + 1, row, part, N, M, ROWS, WALKERS, SPLIT, ACTIVATION)
    if TOKENS >= 4:
        _put(y, bias, acc2, token + 2, row, part, N, M, ROWS, WALKERS, SPLIT, ACTIVATION)
        _put(y, bias, acc3, token + 3, row, part, N, M, ROWS, WALKERS, SPLIT, ACTIVATION)


def launch(
    x: Tensor, values: Tensor, codes: Tensor, starts: Tensor, offsets: Tensor, order: Tensor, bias: Tensor | None, rows: int, columns: int,
    panel: int, activation: str, config: str,
) -> Tensor:  # fmt: skip
    """Runs the kernel with the tiles of `config`, the best guess where it is empty."""
    check_linear("unstructured_linear", x, (rows, columns), values.dtype, bias, activation)
    x2 = x.reshape(-1, columns)
    tokens, (_, walkers, tile_rows) = x2.shape[0], starts.shape
    if x2.stride(-1) != 1:
        x2 = x2.contiguous()
    tile = parse(config or candidates(rows, columns, panel, walkers, tile_rows, tokens, x)[0], NAMES)
    y = x.new_empty(tokens, rows)
    if y.numel():
        split, early = tile["split"], bool(tile["early"])
        out = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=x.device)
        _kernel[(order.shape[0] // tile_rows, split, triton.cdiv(tokens, tile["tokens"]))](
            x2, values, codes, starts, offsets, order, bias, out, tokens, rows, columns, x2.stride(0), WALKERS=walkers, ROWS=tile_rows,
            PANEL=panel, TOKENS=tile["tokens"], SPLIT=split, STAGES=tile["stages"], ACTIVATION=activation, EARLY=early,
            **launch_options(tile),
        )  # fmt: skip
        if split > 1:
            add_parts(out, bias, y, activation, tile["early"])
    return y.reshape(*x.shape[:-1], rows)


def candidates(rows: int, columns: int, panel: int, walkers: int, tile_rows: int, tokens: int, x: Tensor) -> list[str]:
    """Tiles worth timing for `tokens` rows like x, the best guess first."""
    wide = min(MAX_TOKENS, 1 << max(0, tokens - 1).bit_length()) if x.element_size() == 2 else 1
    early = early_launch(x.device) if not interpreted() else 0
    most = max(1, walkers * tile_rows // 32)
    panels = -(-columns // panel)
    splits = [panels, -(-panels // 2), 1]
    return [
        config(tokens=wide, split=split, warps=max(1, most // 4), stages=stages, early=early)
        for split in dict.fromkeys(splits)
        for stages in (4, 3)
    ]


op = define("unstructured_linear", reference, launch, expand, gather)


def linear(x: Tensor, packed: GapCoded, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(x W^T + bias). x: (..., K) -> (..., M)."""
    p = packed
    return op(x, p.values, p.codes, p.starts, p.offsets, p.order, bias, *p.shape, p.panel, activation, config)


def configs(packed: GapCoded, tokens: int) -> list[str]:
    """Tiles worth timing, the best guess first."""
    _, walkers, tile_rows = packed.starts.shape
    return candidates(*packed.shape, packed.panel, walkers, tile_rows, tokens, packed.values)  # type: ignore[call-arg]


KERNEL = Kernel("unstructured", op, pack, unpack, linear, reference, configs, check_weight, most_tokens=MAX_TOKENS)
