"""Unstructured sparse linear for one to some tens of tokens: y = act(x W^T + bias), where any entries of W are zero.

The weight is a bitmap and the kept values: 1 bit for every place and 2 bytes for every kept weight, 9/16 of the dense bytes at 50 %.
Each thread expands the very operands that the matrix units want of it, in registers; so more tokens cost little more than one.

Layout (rows M, columns K). Rows are sorted by the length of their chains and cut into blocks of 16; columns are cut into steps of 64, and
pairs of steps into `splits` equal runs. A warp works on one block and one run; a program holds all runs of some blocks, and the warps of a
run share what they read of x. A lane of a warp, 4 g + t, owns of a block the rows g and g + 8, and of a step the columns 32 h + 8 t + c
(h = 0, 1; c = 0 .. 7): sixteen places for each row.
    plans: (blocks, pairs of steps, 68) int32: for each lane a word of mask for each of the two steps (bit 4 c + 2 h says that row g keeps
        the place, bit 4 c + 2 h + 1 that row g + 8 does), then their bases: the slot before which no chain of the warp reads any more
    values: (chunks, 8, 32, 2) in x's dtype: the kept values of each lane's two rows are two chains, one for each half of a 32-bit word; a
        slot is a word for each lane, a chunk eight slots
    offsets: (blocks * splits + 1,) int32: the first chunk of each block and run
    order: (blocks * 16,) int32: the row of W behind each row of a block; M where there is none
A slot lies 128 bytes after the one before, so a lane reads its chains from shared memory through a bank of its own, wherever it stands:
that is what lets 64 chains advance each at its own pace, without bank conflicts and without being padded to the slowest. Shared memory
holds RING slots, refilled in order as the base advances. Where chains of a warp drift apart so far that the ring could not hold what a step
reads AHEAD steps earlier, the base lifts the ones that lag, and slots stay unused; such slots hold -0.0.

x: (..., K) -> y: (..., M); fp16 or bf16, sums in float32 in a fixed order. CUDA C++ (bitmap.cu): Triton has no reads of shared memory at
places that differ by thread. Needs compute capability 8.0.

Source: own; the bitmap with expansion in front of the matrix units is that of Fan et al., 2025, "SpInfer", doi 10.1145/3689031.3717481,
where a thread finds its values by counting bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from graphprune.backends.kernels import nvrtc
from graphprune.backends.kernels.base import (
    ACTIVATIONS,
    Kernel,
    Packed,
    check_linear,
    check_weight,
    config,
    define,
    epilogue,
    parse,
)
from graphprune.errors import InvalidInput

SOURCE = Path(__file__).with_name("bitmap.cu")
ROWS, STEP, CHUNK, RING, AHEAD = 16, 64, 8, 64, 3
CHAIN = STEP // 4  # places of a chain in a step
PLAN_WORDS = 68
WARP_BYTES = (RING + CHUNK) * 128 + 4 * 4 * PLAN_WORDS  # of shared memory
TILE_BYTES = (AHEAD + 1) * 8 * STEP * 2  # of shared memory, what a run holds of 8 tokens
MAX_TOKENS, MAX_SPLITS, MAX_TILES, MAX_WARPS = 64, 8, 4, 16
BUSY = 2048  # warps that keep a large device busy
NAMES = ("tiles", "groups")  # of a program: groups of 8 tokens, and blocks


@dataclass(frozen=True)
class Bitmap(Packed):
    """An unstructured weight; see the module for the layouts."""

    values: Tensor
    plans: Tensor
    offsets: Tensor
    order: Tensor
    splits: int
    kept: int

    @property
    def density(self) -> float:
        return self.kept / max(1, self.shape[0] * self.shape[1])


def accepts(weight: Tensor) -> str | None:
    """Why the format, the device or what is installed does not take `weight`, or None."""
    if (reason := check_weight(weight)) is not None:
        return reason
    if weight.element_size() != 2:
        return f"the weight is {weight.dtype}, expected float16 or bfloat16"
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] < 8:
        return "the device is older than compute capability 8.0"
    return nvrtc.missing() if weight.is_cuda else None


def pack(weight: Tensor, splits: int | None = None) -> Bitmap:
    """Compresses `weight` (M, K). `splits`: warps that share the columns of a block, 1 to 8; by default as many as keep a device busy.

    Raises:
        InvalidInput: the weight is not a matrix of 16-bit numbers, or `splits` is out of range.
    """
    if (reason := accepts(weight)) is not None:
        raise InvalidInput(f"bitmap: {reason}")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise InvalidInput(f"bitmap: splits is {splits}, expected 1 to {MAX_SPLITS}")
    (rows, columns), weight = weight.shape, weight.detach()
    blocks, steps = -(-rows // ROWS), -(-columns // (2 * STEP)) * 2
    fit = _shared_memory(weight.device) // shared_bytes(1, 1, 1)
    splits = splits or max(1, min(MAX_SPLITS, fit, round(BUSY / max(1, blocks)), steps // 8))
    weight = padded(weight, (0, steps * STEP - columns))
    order = torch.argsort(_longest(weight != 0, splits), descending=True, stable=True)
    places = _places(padded(weight[order], (0, 0, 0, blocks * ROWS - rows)), blocks, steps)
    kept = places != 0
    bits = kept.transpose(2, 3).flatten(3).int()  # (blocks, steps, lanes, chains * places)
    masks = (bits << _bits(weight.device)).sum(3, dtype=torch.int32)
    counts = kept.sum(4, dtype=torch.int32).flatten(2)
    bases, lengths = _bases(counts, splits)
    offsets = padded((-(-lengths // CHUNK)).cumsum(0), (1, 0)).int()
    values = weight.new_full((int(offsets[-1]), CHUNK, 32, 2), -0.0)
    at = _slots(kept, bases, offsets, splits)
    values.view(-1)[at[kept]] = places[kept]
    masks = masks.reshape(blocks, -1, 2, 32).transpose(2, 3).flatten(2)
    plans = torch.cat([masks, padded(bases.reshape(blocks, -1, 2), (0, PLAN_WORDS - 66))], 2)
    order = padded(order, (0, blocks * ROWS - rows), value=rows).int()
    return Bitmap((rows, columns), values, plans, offsets, order, splits, int(kept.sum()))


def _longest(kept: Tensor, splits: int) -> Tensor:
    """(rows,) slots that each row would take alone, of all runs together: rows that are alike share a block."""
    counts = kept.reshape(kept.shape[0], -1, 2, 4, 8).sum((2, 4), dtype=torch.int32)  # (rows, steps, lanes of a row)
    return _runs(counts, splits).sum(1).amax(1).reshape(-1, splits).sum(1)


def _bits(device: torch.device) -> Tensor:
    """(chains * places,) the bit of each place of a lane in its word of mask."""
    place = torch.arange(32, dtype=torch.int32, device=device)
    return 4 * (place % 8) + 2 * (place // 8 % 2) + place // CHAIN


def _places(weight: Tensor, blocks: int, steps: int) -> Tensor:
    """(blocks * 16, steps * 64) -> (blocks, steps, chains, lanes, places of a chain)."""
    cut = weight.reshape(blocks, 2, 8, steps, 2, 4, 8)  # block, chain, g, step, h, t, c
    return cut.permute(0, 3, 1, 2, 5, 4, 6).reshape(blocks, steps, 2, 32, CHAIN)


def _matrix(places: Tensor) -> Tensor:
    """The inverse of `_places`."""
    blocks, steps = places.shape[:2]
    cut = places.reshape(blocks, steps, 2, 8, 4, 2, 8).permute(0, 2, 3, 1, 5, 4, 6)
    return cut.reshape(blocks * ROWS, steps * STEP)


def _runs(tensor: Tensor, splits: int) -> Tensor:
    """(blocks, steps, ...) -> (blocks * splits, steps of a run, ...); runs are equally long, the last are filled up with zeros."""
    blocks, steps = tensor.shape[:2]
    span = -(-steps // (2 * splits)) * 2
    rest = [0, 0] * (tensor.dim() - 2)
    return padded(tensor, (*rest, 0, splits * span - steps)).reshape(blocks * splits, span, *tensor.shape[2:])


def _walk(counts: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Where chains stand (runs, steps + 1, chains) before each step and at the end, and the base of each step.

    `counts` (runs, steps, chains) are the values that each chain takes; a base is where the last chain stands, or `least` (runs, steps).
    """
    stand, stands, bases = torch.zeros_like(counts[:, 0]), [], []
    for step in range(counts.shape[1]):
        bases.append(torch.maximum(stand.amin(1), least[:, step]))
        stands.append(torch.maximum(stand, bases[-1][:, None]))
        stand = stands[-1] + counts[:, step]
    return torch.stack([*stands, stand], 1), torch.stack(bases, 1)


def _bases(counts: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """(blocks, steps) bases and (blocks * splits,) slots of each run, for `counts` (blocks, steps, chains).

    What a step reads must lie in the ring as it was filled AHEAD steps earlier: RING slots from the chunk of that step's base on. Raising a
    base there moves chains that lag; that may ask for more elsewhere, so it is repeated until all is well. It ends: with every base at
    CHAIN times its step, as far as chains without any zero get, all is well, and no base is ever raised above that.
    """
    blocks, steps = counts.shape[:2]
    runs = _runs(counts, splits)
    least = torch.zeros_like(runs[:, :, 0])
    while True:
        stands, bases = _walk(runs, least)
        ends = (stands[:, :-1] + runs).amax(2)
        needed = (-(-ends // CHUNK) * CHUNK - RING)[:, AHEAD:]  # of the base AHEAD steps before, rounded down to its chunk
        short = needed > bases[:, : needed.shape[1]] // CHUNK * CHUNK
        if not bool(short.any()):
            return bases.reshape(blocks, -1)[:, :steps].contiguous(), stands[:, -1].amax(1)
        least[:, : needed.shape[1]] = torch.where(short, needed, least[:, : needed.shape[1]])


def _slots(kept: Tensor, bases: Tensor, offsets: Tensor, splits: int) -> Tensor:
    """Where in `values` (flat) the entry of each place lies, if it is `kept` (blocks, steps, chains, lanes, places)."""
    blocks, steps = kept.shape[:2]
    stands, _ = _walk(_runs(kept.sum(4, dtype=torch.int32).flatten(2), splits), _runs(bases, splits))
    first = stands[:, :-1] + offsets[:-1, None, None] * CHUNK
    first = first.reshape(blocks, -1, 2, 32, 1)[:, :steps].long()
    slot = first + kept.cumsum(4, dtype=torch.int32) - 1
    lane = torch.arange(32, device=kept.device)[:, None]
    chain = torch.arange(2, device=kept.device)[:, None, None]
    return (slot * 32 + lane) * 2 + chain


def _entries(plans: Tensor, offsets: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """(is kept, place in `values`) for each place."""
    blocks, pairs = plans.shape[:2]
    masks = plans[..., :64].reshape(blocks, pairs, 32, 2).transpose(2, 3).reshape(blocks, 2 * pairs, 32, 1)
    bits = masks >> _bits(plans.device) & 1
    kept = bits.bool().reshape(blocks, 2 * pairs, 32, 2, CHAIN).transpose(2, 3)
    return kept, _slots(kept, plans[..., 64:66].flatten(1), offsets, splits)


def expand(
    values: Tensor, plans: Tensor, offsets: Tensor, order: Tensor, rows: int, columns: int, splits: int, **_: object
) -> Tensor:
    """The dense weight (rows, columns)."""
    kept, at = _entries(plans, offsets, splits)
    places = torch.where(kept, values.flatten()[torch.where(kept, at, 0)], 0.0) if values.numel() else kept.to(values.dtype)
    found = order < rows
    return values.new_zeros(rows, columns).index_put((order[found].long(),), _matrix(places)[found, :columns])


def gather(
    dense: Tensor, values: Tensor, plans: Tensor, offsets: Tensor, order: Tensor, splits: int, **_: object
) -> Tensor:
    """The kept entries of a dense (rows, columns) tensor, laid out as `values`; zero elsewhere."""
    kept, at = _entries(plans, offsets, splits)
    blocks, steps = plans.shape[0], 2 * plans.shape[1]
    rows, columns = dense.shape
    sorted_rows = padded(dense, (0, steps * STEP - columns, 0, 1))[order.long().clamp(max=rows)]
    return dense.new_zeros(values.numel()).index_put((at[kept],), _places(sorted_rows, blocks, steps)[kept]).reshape(values.shape)


def unpack(packed: Bitmap) -> Tensor:
    """The dense weight."""
    return expand(packed.values, packed.plans, packed.offsets, packed.order, *packed.shape, packed.splits)  # type: ignore[misc]


def reference(
    x: Tensor, values: Tensor, plans: Tensor, offsets: Tensor, order: Tensor, bias: Tensor | None, rows: int, columns: int,
    splits: int, activation: str, config: str,
) -> Tensor:  # fmt: skip
    """The product with the dense weight, in float32."""
    weight = expand(values, plans, offsets, order, rows, columns, splits)
    return epilogue(x.float() @ weight.float().T, bias, activation, x.dtype)


def launch(
    x: Tensor, values: Tensor, plans: Tensor, offsets: Tensor, order: Tensor, bias: Tensor | None, rows: int, columns: int,
    splits: int, activation: str, config: str,
) -> Tensor:  # fmt: skip
    """Runs the kernel with the program of `config`, the best guess where it is empty; the reference on the CPU."""
    check_linear("bitmap_linear", x, (rows, columns), values.dtype, bias, activation)
    if not x.is_cuda:
        return reference(x, values, plans, offsets, order, bias, rows, columns, splits, activation, config)
    x2, width = x.reshape(-1, columns), 2 * STEP * plans.shape[1]
    tokens, blocks = x2.shape[0], plans.shape[0]
    y = x.new_empty(tokens, rows)
    if y.numel():
        if columns != width or x2.stride(-1) != 1 or x2.stride(0) % 8 or x2.data_ptr() % 16:  # threads read 16 bytes at once
            x2 = padded(x2, (0, width - columns)).contiguous()
        program = parse(config or candidates(blocks, splits, tokens, x.device)[0], NAMES)
        tiles, groups = program["tiles"], program["groups"]
        threads = 32 * splits * groups
        constants = {
            "TILES": tiles, "GROUPS": groups, "THREADS": threads, "BF16": int(x.dtype == torch.bfloat16), "BIAS": int(bias is not None),
            "ACTIVATION": list(ACTIVATIONS).index(activation), "CHUNK": CHUNK, "RING": RING, "AHEAD": AHEAD,
        }  # fmt: skip
        kernel = nvrtc.function(SOURCE, "bitmap_linear", constants, shared_bytes(splits, tiles, groups), x.device)
        bias = y if bias is None else bias.to(x.dtype)
        given = (x2, plans, values, offsets, order, bias, y, tokens, rows, x2.stride(0), plans.shape[1], blocks)
        with torch.cuda.device(x.device):
            kernel((-(-blocks // groups), -(-tokens // (8 * tiles)), 1), threads, given)
    return y.reshape(*x.shape[:-1], rows)


def shared_bytes(splits: int, tiles: int, groups: int) -> int:
    """Of shared memory that a program takes."""
    return splits * (groups * WARP_BYTES + tiles * TILE_BYTES)


def candidates(blocks: int, splits: int, tokens: int, device: torch.device) -> list[str]:
    """Programs worth timing, the best guess first: as many blocks in one as spread evenly over the device, or half of them, or one."""
    even = -(-blocks // _processors(device))
    sizes = [even, -(-even // 2), 1] if splits > 1 else [-(-even // 2), even, 1]
    whole = min(MAX_TILES, 1 << max(0, -(-tokens // 8) - 1).bit_length())
    made = []
    for tiles in dict.fromkeys([whole, max(1, whole // 2), 1]):
        room = _shared_memory(device) // splits - tiles * TILE_BYTES
        most = min(MAX_WARPS // splits, room // WARP_BYTES)
        made += [config(tiles=tiles, groups=groups) for groups in dict.fromkeys(min(size, most) for size in sizes) if groups]
    return made[: 2 * len(sizes)]


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; elsewhere what large GPUs have."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]  # the stubs lack it


op = define("bitmap_linear", reference, launch, expand, gather)


def linear(x: Tensor, packed: Bitmap, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(x W^T + bias). x: (..., K) -> (..., M)."""
    p = packed
    return op(x, p.values, p.plans, p.offsets, p.order, bias, *p.shape, p.splits, activation, config)


def configs(packed: Bitmap, tokens: int) -> list[str]:
    """Programs worth timing, the best guess first."""
    return candidates(packed.plans.shape[0], packed.splits, tokens, packed.values.device)


KERNEL = Kernel("bitmap", op, pack, unpack, linear, reference, configs, accepts, most_tokens=MAX_TOKENS)
