"""Expert linear with indirect ids: y[t, s] = act(x[t] W[id[t, s]]^T) * scale[t, s], for each of the S experts that token t was sent to.

Layouts (T tokens, S slots a token, E experts kept, M rows, K columns):
    x: (T, K), or (T, S, K) where each slot has an input of its own (the second product of an expert's MLP)
    weight: (E, M, K); ids: (T, S) integers
    mapping: (all experts,) int32 or None: the place of an expert in `weight`, -1 for one that was pruned, so that ids of the
        unpruned router still work
    scale: (T, S) or None: routing weights
    -> y: (T, S, M); a slot of a pruned expert is zero. fp16, bf16 or fp32, sums in float32.

Few slots: a program takes one slot and some rows, so that each expert's weights are read once for each slot that wants them, and nothing
has to be sorted. Many slots: slots are sorted by expert and padded to blocks, all with static shapes, so that the launch can be captured
in a CUDA graph: T S + E (block - 1) rows at most. Every result is one sum in a fixed order; none is added to by two programs.

Source: the sorted, padded id list of vLLM's fused mixture-of-experts kernel (Apache-2.0), written anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.backends.kernels.base import (
    ACTIVATION_GRADIENTS,
    ACTIVATIONS,
    DTYPES,
    activate,
    bound,
    config,
    dot,
    early_launch,
    gdc_launch_dependents,
    gdc_wait,
    interpreted,
    jit,
    launch_options,
    launches,
    parse,
    tl,
    triton,
)
from graphprune.errors import InvalidInput

NAMES = ("slots", "rows", "columns", "warps", "stages", "early")
FEW = 64  # slots up to which sorting costs more than reading an expert twice
_LIBRARY = torch.library.Library("graphprune", "FRAGMENT")


def reference(
    x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str = "", config: str = ""
) -> Tensor:
    """One expert after the other, in float32."""
    places = _places(ids, mapping)
    inputs = x if x.dim() == 3 else x[:, None].expand(-1, ids.shape[1], -1)
    y = torch.zeros(*ids.shape, weight.shape[1], dtype=torch.float32, device=x.device)
    for expert in range(weight.shape[0]):
        found = ACTIVATIONS[activation](inputs.float() @ weight[expert].float().T)
        y = torch.where((places == expert)[..., None], found, y)
    return (y if scale is None else y * scale[..., None].float()).to(x.dtype)


def _places(ids: Tensor, mapping: Tensor | None) -> Tensor:
    """The place of each slot's expert in the stacked weight, -1 where it was pruned."""
    return ids.long() if mapping is None else mapping.long()[ids.long()]


@jit
def _place(ids, mapping, slot, mask):
    """The place of a slot's expert in the stacked weight; -1 for a pruned one, -2 where there is no slot."""
    place = tl.load(ids + slot, mask=mask, other=0)
    if mapping is not None:
        place = tl.load(mapping + place, mask=mask, other=0)
    return tl.where(mask, place.to(tl.int32), -2)


@jit
def _count_kernel(
    ids,  # (T * S,) integers
    mapping,  # (all experts,) or None
    sizes,  # (E,) int32
    count,
    CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    total = tl.zeros((CHUNK,), dtype=tl.int32)
    if EARLY:
        gdc_wait()
    for first in range(0, bound(count), CHUNK):
        slot = first + tl.arange(0, CHUNK)
        total += (_place(ids, mapping, slot, slot < count) == expert).to(tl.int32)
    tl.store(sizes + expert, tl.sum(total, 0))
    if EARLY:
        gdc_launch_dependents()


@jit
def _align_kernel(
    ids,  # (T * S,) integers
    mapping,  # (all experts,) or None
    sizes,  # (E,) int32
    slots,  # (blocks * BLOCK,) int32
    owners,  # (blocks,) int32
    count, experts, blocks,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # A program owns the part of `slots` that belongs to its expert; the one past the last expert owns the unused rest.
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    if EARLY:
        gdc_wait()
    size = tl.load(sizes + every, mask=every < experts, other=0)
    start = tl.sum(tl.where(every < expert, tl.cdiv(size, BLOCK), 0), 0)  # in blocks
    own = tl.sum(tl.where(every == expert, size, 0), 0)
    end = tl.where(expert == experts, blocks, start + tl.cdiv(own, BLOCK))
    done = 0
    if expert < experts:
        for first in range(0, bound(count), CHUNK):
            slot = first + tl.arange(0, CHUNK)
            mine = (_place(ids, mapping, slot, slot < count) == expert).to(tl.int32)
            tl.store(slots + start * BLOCK + done + tl.cumsum(mine, 0) - 1, slot, mask=mine != 0)
            done += tl.sum(mine, 0)
    for first in range(bound(start * BLOCK + own), bound(end * BLOCK), CHUNK):
        rest = first + tl.arange(0, CHUNK)
        tl.store(slots + rest, tl.zeros((CHUNK,), dtype=tl.int32) + count, mask=rest < end * BLOCK)
    for first in range(bound(start), bound(end), CHUNK):
        block = first + tl.arange(0, CHUNK)
        tl.store(owners + block, tl.zeros((CHUNK,), dtype=tl.int32) + tl.where(expert < experts, expert, -1), mask=block < end)
    if EARLY:
        gdc_launch_dependents()


def align(ids: Tensor, mapping: Tensor | None, experts: int, block: int, early: int = 0) -> tuple[Tensor, Tensor]:
    """Slots sorted by expert, each expert's padded to blocks; no atomics, so the order is always the same.

    Returns (slots (blocks * block,) int32, padded with the number of slots; expert of each block (blocks,) int32, -1 for unused blocks).
    Sizes depend on shapes alone.
    """
    count = ids.numel()
    blocks = count // block + min(count, experts)
    sizes = torch.empty(experts, dtype=torch.int32, device=ids.device)
    slots, owners = sizes.new_empty(blocks * block), sizes.new_empty(blocks)
    chunk = min(2048, triton.next_power_of_2(max(32, count)))
    options = {"CHUNK": chunk, "EARLY": bool(early), **launch_options({"warps": max(1, min(8, chunk // 128)), "early": early})}
    _count_kernel[(experts,)](ids, mapping, sizes, count, **options)
    _align_kernel[(experts + 1,)](
        ids, mapping, sizes, slots, owners, count, experts, blocks, EXPERTS=triton.next_power_of_2(experts), BLOCK=block, **options
    )
    return slots, owners


@jit
def _kernel(
    x,  # (T, K) or (T * S, K), rows stride_x apart
    weight,  # (E, M, K)
    slots,  # (blocks * SLOTS,) int32; unused where ONE
    experts,  # (blocks,) int32; where ONE the ids (T * S,)
    mapping,  # (all experts,) or None; used where ONE
    scale,  # (T * S,) or None
    y,  # (T * S, M); zero before where experts were pruned
    count, M, K, stride_x, per_token,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ONE: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    if EARLY:
        gdc_wait()
    if ONE:
        expert = _place(experts, mapping, block, block < count)
    else:
        expert = tl.load(experts + block)
    if expert >= 0:
        lane = tl.arange(0, SLOTS)
        if ONE:
            slot = tl.where(lane == 0, block, count)
        else:
            slot = tl.load(slots + block * SLOTS + lane)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        source = x + (slot // per_token).to(tl.int64)[:, None] * stride_x + column[None, :]
        kernel = weight + (expert.to(tl.int64) * M + row)[:, None] * K + column[None, :]
        acc = tl.zeros((SLOTS, ROWS), dtype=tl.float32)
        for k in tl.range(0, bound(K), COLUMNS, num_stages=STAGES):
            xs = tl.load(source + k, mask=(slot < count)[:, None] & (k + column < K)[None, :], other=0.0)
            w = tl.load(kernel + k, mask=(row < M)[:, None] & (k + column < K)[None, :], other=0.0)
            acc = dot(xs, tl.trans(w), acc, PRECISION)
        acc = activate(acc, ACTIVATION)
        if scale is not None:
            acc *= tl.load(scale + slot, mask=slot < count, other=0.0).to(tl.float32)[:, None]
        place = slot.to(tl.int64)[:, None] * M + row[None, :]
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=(slot < count)[:, None] & (row < M)[None, :])
    if EARLY:
        gdc_launch_dependents()


def check(x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str) -> None:
    """The launcher's checks, before it allocates.

    Raises:
        InvalidInput: at the first wrong fact.
    """
    if weight.dim() != 3 or ids.dim() != 2:
        found = f"weight has shape {tuple(weight.shape)} and ids {tuple(ids.shape)}"
        raise InvalidInput(f"grouped_linear: {found}, expected (E, M, K) and (T, S)")
    expected = (ids.shape[0], weight.shape[2]) if x.dim() == 2 else (*ids.shape, weight.shape[2])
    if x.shape != expected:
        raise InvalidInput(f"grouped_linear: x has shape {tuple(x.shape)}, expected {expected}: a row for each token, or for each slot")
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        raise InvalidInput(f"grouped_linear: x is {x.dtype} and the weight {weight.dtype}; both must be one of float16, bfloat16, float32")
    if ids.dtype.is_floating_point or (mapping is not None and mapping.dtype.is_floating_point):
        raise InvalidInput(f"grouped_linear: ids and mapping must be integers, found {ids.dtype}")
    if scale is not None and scale.shape != ids.shape:
        raise InvalidInput(f"grouped_linear: scale has shape {tuple(scale.shape)}, expected {tuple(ids.shape)}")
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"grouped_linear: unknown activation '{activation}'; known: {', '.join(filter(None, ACTIVATIONS))}")


def launch(
    x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str = "", config: str = ""
) -> Tensor:
    """Runs the kernel with the tiles of `config`, the best guess where it is empty."""
    check(x, weight, ids, mapping, scale, activation)
    (experts, rows, columns), count = weight.shape, ids.numel()
    ids, weight, inputs = ids.contiguous(), weight.contiguous(), x.reshape(-1, columns).contiguous()
    y = x.new_empty(*ids.shape, rows) if mapping is None else x.new_zeros(*ids.shape, rows)
    if y.numel():
        tile = parse(config or candidates(ids.shape, experts, x)[0], NAMES)
        one = tile["slots"] == 1
        slots, owners = (ids, ids) if one else align(ids, mapping, experts, tile["slots"], tile["early"])
        _kernel[(triton.cdiv(rows, tile["rows"]), owners.numel())](
            inputs, weight, slots, owners, mapping, None if scale is None else scale.contiguous(), y, count, rows, columns, columns,
            ids.shape[1] if x.dim() == 2 else 1, SLOTS=max(16, tile["slots"]), ROWS=tile["rows"], COLUMNS=tile["columns"],
            STAGES=tile["stages"], ONE=one, ACTIVATION=activation, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            EARLY=bool(tile["early"]), **launch_options(tile),
        )  # fmt: skip
    return y


def candidates(slots: torch.Size, experts: int, x: Tensor) -> list[str]:
    """Tiles worth timing for (tokens, slots a token), the best guess first: after experts were pruned, other ones may be best."""
    count = slots.numel()
    early = early_launch(x.device) if not interpreted() else 0
    if x.element_size() == 4:  # no tensor cores: small tiles
        tiles: tuple[tuple[int, ...], ...] = ((1 if count <= FEW else 16, 32, 64, 4, 2),)
    elif count <= FEW:
        tiles = ((1, 16, 256, 4, 4), (1, 32, 128, 4, 5), (1, 16, 128, 2, 5), (1, 64, 128, 4, 4))
    elif count <= 32 * experts:
        tiles = ((16, 64, 128, 4, 4), (16, 128, 64, 4, 5), (32, 64, 128, 4, 4), (16, 32, 128, 4, 5))
    else:
        tiles = ((128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (128, 256, 64, 8, 3), (64, 256, 64, 8, 4))
    return [config(**dict(zip(NAMES, (*tile, early)))) for tile in tiles]


@torch.library.custom_op("graphprune::grouped_linear", mutates_args=())
def op(
    x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str = "", config: str = ""
) -> Tensor:
    return (launch if launches(x) else _checked_reference)(x, weight, ids, mapping, scale, activation, config)


def _checked_reference(
    x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str, config: str
) -> Tensor:
    check(x, weight, ids, mapping, scale, activation)
    return reference(x, weight, ids, mapping, scale, activation, config)


@op.register_fake
def _(
    x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str = "", config: str = ""
) -> Tensor:
    return x.new_empty(*ids.shape, weight.shape[1])


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and scale, an expert at a time: the number of its slots is read back, so this part is not for CUDA graphs."""
    places = _places(ids, mapping).flatten()
    slots = ids.shape[1] if x.dim() == 2 else 1
    inputs, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_x, grad_weight = torch.zeros_like(inputs), torch.zeros_like(weight)
    grad_scale = grad.new_zeros(ids.numel())
    for expert in range(weight.shape[0]):
        mine = (places == expert).nonzero().flatten()
        before = inputs[mine // slots] @ weight[expert].T
        after = ACTIVATIONS[activation](before)
        grad_scale[mine] = (grad[mine] * after).sum(1)
        local = grad[mine] if scale is None else grad[mine] * scale.flatten()[mine, None].to(grad.dtype)
        if activation:
            local = ACTIVATION_GRADIENTS[activation](local, before)
        grad_weight[expert] = local.T @ inputs[mine // slots]
        grad_x.index_add_(0, mine // slots, local @ weight[expert])
    return grad_x.reshape(x.shape), grad_weight, grad_scale.reshape(ids.shape)


_LIBRARY.define(
    "grouped_linear_gradients(Tensor grad, Tensor x, Tensor weight, Tensor ids, Tensor? mapping, Tensor? scale, str activation) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("grouped_linear_gradients", _gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("graphprune::grouped_linear_gradients", lib=_LIBRARY)
def _(
    grad: Tensor, x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None, scale: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), grad.new_empty(ids.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ids, mapping, scale, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, ids, mapping, scale)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, ids, mapping, scale = ctx.saved_tensors
    grad_x, grad_weight, grad_scale = torch.ops.graphprune.grouped_linear_gradients(grad, x, weight, ids, mapping, scale, ctx.activation)
    return grad_x, grad_weight, None, None, None if scale is None else grad_scale.to(scale.dtype), None, None


op.register_autograd(_backward, setup_context=_setup)


def grouped_linear(
    x: Tensor, weight: Tensor, ids: Tensor, mapping: Tensor | None = None, scale: Tensor | None = None, activation: str = "",
    config: str = "",
) -> Tensor:  # fmt: skip
    """y[t, s] = act(x[t] weight[ids[t, s]]^T) * scale[t, s]; see the module for shapes."""
    return op(x, weight, ids, mapping, scale, activation, config)
