"""What must come out of the algebra without special cases: one tiny module per structure, its groups, and the proof with all groups cut at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.capture.torch_export import capture_torch
from graphprune.ops.selective_scan import selective_scan
from graphprune.ops.ssd import ssd_scan
from graphprune.program import Program
from graphprune.surgery.cut import Cut
from graphprune.surgery.torch_graph import apply_cut
from graphprune.units import Exactness
from graphprune.verify.certificate import certify, shifted_control
from tests.randomise import randomise, seeded
from tests.zoo import Dense, Residual, Shuffle, SqueezeExcite, conv_bn, rotate

Groups = dict[tuple[str, int], int]  # (kind, size) -> how many groups
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Groups]] = {}


def case(groups: Groups, *shape: int, vocab: int = 0) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a module under the name of its builder; inputs are normal numbers, or ids below `vocab`."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[build.__name__] = (build, (lambda: torch.randint(vocab, shape)) if vocab else (lambda: torch.randn(shape)), groups)
        return build

    return register


class Forward(nn.Module):
    """Named parts and a function of them: the whole of most cases below."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs)


# ---- convolutional nets


@case({("channel", 16): 1, ("channel", 8): 1, ("channel", 10): 1, ("channel", 26): 1, ("channel", 12): 2, ("channel", 14): 2}, 2, 3, 9, 9)
def residual_chain() -> nn.Module:
    body = [conv_bn(3, 16), Residual(16, 8, 16), Residual(16, 12, 26, stride=2), Residual(26, 12, 26)]
    return nn.Sequential(*body, nn.Conv2d(26, 5, 1))


@case({("channel", 14): 1, ("channel", 6): 3}, 2, 3, 8, 8)
def densenet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 14, 3, padding=1), Dense(14, 6, 3), nn.Conv2d(32, 5, 1))


@case({("channel", 7): 2, ("channel", 9): 1, ("channel", 12): 1}, 2, 3, 8, 8)
def csp_split() -> nn.Module:
    """C2f of YOLO: one half passes, the other goes through a bottleneck, and all three are joined."""

    def forward(m: Any, x: Tensor) -> Tensor:
        parts = list(m.stem(x).chunk(2, 1))
        parts.append(parts[-1] + m.bottleneck(parts[-1]))
        return m.head(m.join(torch.cat(parts, 1)))

    bottleneck = nn.Sequential(conv_bn(7, 9), conv_bn(9, 7))
    return Forward(forward, stem=conv_bn(3, 14), bottleneck=bottleneck, join=conv_bn(21, 12), head=nn.Conv2d(12, 5, 1))


@case({("channel", 12): 3, ("channel", 34): 1}, 2, 3, 8, 8)
def channel_shuffle() -> nn.Module:
    """Each half of the stem, and the middle of the branch; what passes and what the branch returns lie interleaved, so they go together."""
    return nn.Sequential(conv_bn(3, 24), Shuffle(12, 1), conv_bn(24, 34, 1), nn.Conv2d(34, 5, 1))


@case({("channel", 3): 1, ("channel", 4): 1, ("channel", 5): 1}, 2, 3, 8, 8)
def grouped_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 15, 3, groups=3), nn.ReLU(), nn.Conv2d(15, 7, 1))


@case({("channel", 12): 1, ("channel", 2): 1}, 2, 3, 8, 8)
def depthwise_convolution() -> nn.Module:
    """With a multiplier of two in the second one."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=12), nn.Hardswish(), nn.Conv2d(12, 24, 3, groups=12), nn.Conv2d(24, 5, 1)
    )


@case({("channel", 3): 1, ("channel", 4): 2}, 2, 3, 5, 5)
def transposed_convolution() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 12, 2, 2), nn.ReLU(), nn.ConvTranspose2d(12, 12, 2, 2, groups=3), nn.ReLU(), nn.ConvTranspose2d(12, 5, 2)
    )


@case({("channel", 7): 1, ("channel", 6): 1}, 2, 3, 8, 8)
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 28, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.PixelUnshuffle(2), nn.Conv2d(24, 5, 1))


@case({("hidden", 6): 1, ("hidden", 12): 1}, 2, 3, 8, 8)
def patch_merging() -> nn.Module:
    """Swin: the four pixels of a window side by side, under one norm."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return m.head(m.norm2(m.reduction(m.norm(x))))

    return Forward(
        forward,
        patch=nn.Conv2d(3, 6, 2, 2),
        norm=nn.LayerNorm(24),
        reduction=nn.Linear(24, 12, bias=False),
        norm2=nn.LayerNorm(12),
        head=linear(12, 5),
    )


@case({("channel", 20): 1, ("channel", 6): 1}, 2, 3, 8, 8)
def squeeze_excite() -> nn.Module:
    return nn.Sequential(conv_bn(3, 20), SqueezeExcite(20, 6), nn.Conv2d(20, 5, 1))


@case({("channel", 18): 1, ("channel", 22): 1, ("neuron", 30): 1}, 2, 3, 9, 10)
def flatten_before_classifier() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 18, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(18, 22, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(132, 30), nn.ReLU(), nn.Linear(30, 5))


@case({("channel", 4): 1, ("channel", 3): 1, ("channel", 14): 1}, 2, 3, 8, 8)
def group_norm() -> nn.Module:
    """Groups go whole (exact), or each loses the same of its channels (under new statistics)."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.SiLU(), nn.Conv2d(12, 14, 3), nn.GroupNorm(14, 14), nn.Conv2d(14, 5, 1)
    )


@case({("channel", 12): 1, ("channel", 17): 1, ("channel", 9): 2}, 2, 3, 8, 8)
def detection_head() -> nn.Module:
    """Anchors times (box and classes) per pixel, from two scales, side by side along the positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        fine = m.stem(x)
        coarse = m.down(fine)
        maps = m.head1(fine), m.head2(coarse)
        return torch.cat([y.view(y.shape[0], 3, 7, -1).transpose(2, 3).flatten(1, 2) for y in maps], 1)

    return Forward(
        forward,
        stem=conv_bn(3, 12), down=conv_bn(12, 17, stride=2), head1=nn.Sequential(conv_bn(12, 9), nn.Conv2d(9, 21, 1)),
        head2=nn.Sequential(conv_bn(17, 9), nn.Conv2d(9, 21, 1)),
    )  # fmt: skip


# ---- attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(b, heads, n, d) each; -> (b, n, heads * d), without the fused op."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


@case({("head", 4): 1, ("head_dim", 5): 1}, 2, 7, 11)
def fused_qkv_3hd() -> nn.Module:
    """One select of three ties the dims of query, key and value."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(2, 7, 3, 4, 5).permute(2, 0, 3, 1, 4).unbind(0)
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 20))

    return Forward(forward, qkv=linear(11, 60), out=linear(20, 6))


@case({("head", 4): 1, ("head_dim", 5): 1}, 2, 7, 11)
def fused_qkv_h3d() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(2, 7, 4, 3, 5).transpose(1, 2).unbind(3)
        return m.out(attend(q, k, v))

    return Forward(forward, qkv=linear(11, 60), out=linear(20, 6))


@case({("head", 4): 1, ("head_dim", 5): 2}, 2, 7, 11)
def fused_qkv_split() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(t, 4) for t in m.qkv(x).split(20, -1))
        return m.out(attend(q, k, v))

    return Forward(forward, qkv=linear(11, 60), out=linear(20, 6))


@case({("head", 4): 1, ("head_dim", 5): 1, ("head_dim", 3): 1}, 2, 7, 11)
def einsum_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (m.q, m.k, m.v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        return torch.einsum("bnhe,heo->bno", torch.einsum("bhnm,bmhe->bnhe", weights, v), m.o)

    return Forward(forward, q=torch.randn(11, 4, 5), k=torch.randn(11, 4, 5), v=torch.randn(11, 4, 3), o=torch.randn(4, 3, 6))


def _gqa(repeat: Callable[[Tensor], Tensor], rope: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x), 6), repeat(rope(heads(m.k(x), 2))), repeat(heads(m.v(x), 2))
        return m.o(attend(rope(q), k, v))

    return Forward(forward, q=linear(11, 48), k=linear(11, 16), v=linear(11, 16), o=linear(48, 5))


@case({("kv_group", 2): 1, ("head", 3): 1, ("head_dim", 8): 2}, 2, 7, 11)
def gqa_expand() -> nn.Module:
    return _gqa(lambda t: t[:, :, None].expand(2, 2, 3, 7, 8).reshape(2, 6, 7, 8))


@case({("kv_group", 2): 1, ("head", 3): 1, ("head_dim", 8): 2}, 2, 7, 11)
def gqa_repeat_interleave() -> nn.Module:
    return _gqa(lambda t: t.repeat_interleave(3, 1))


@case({("kv_group", 2): 1, ("head", 3): 1, ("head_dim", 8): 2}, 2, 7, 11)
def gqa_fused_op() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x), 6), heads(m.k(x), 2), heads(m.v(x), 2)
        return m.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    return Forward(forward, q=linear(11, 48), k=linear(11, 16), v=linear(11, 16), o=linear(48, 5))


@case({("kv_group", 2): 1, ("head", 3): 1, ("head_dim", 4): 1, ("head_dim", 8): 1}, 2, 7, 11)
def rope_by_halves() -> nn.Module:
    """A frequency is a unit: two dims of query and key."""
    return _gqa(lambda t: t.repeat_interleave(3, 1), rotate)


@case({("kv_group", 2): 1, ("head", 3): 1, ("head_dim", 4): 1, ("head_dim", 8): 1}, 2, 7, 11)
def rope_interleaved() -> nn.Module:
    def rope(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] * 1e4 ** (-torch.arange(half) / half)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(-2)

    return _gqa(lambda t: t.repeat_interleave(3, 1), rope)


@case({("kv_group", 2): 1, ("head", 3): 1, ("head_dim", 4): 1, ("head_dim", 8): 1}, 2, 7, 11)
def rope_table_as_buffer() -> nn.Module:
    """cos and sin come from a buffer of frequencies, which loses what query and key lose."""
    module = _gqa(lambda t: t.repeat_interleave(3, 1))
    module.register_buffer("inv_freq", 1e4 ** (-torch.arange(4) / 4))
    plain = module.function

    def forward(m: Any, x: Tensor) -> Tensor:
        angle = torch.arange(7)[:, None] * m.inv_freq
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

        def rope(t: Tensor) -> Tensor:
            return t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin

        q, k, v = rope(heads(m.q(x), 6)), rope(heads(m.k(x), 2)), heads(m.v(x), 2)
        return m.o(attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))

    assert plain is not forward
    module.function = forward
    return module


@case({("head", 4): 1, ("head_dim", 5): 1, ("head_dim", 3): 1, ("head_dim", 7): 1, ("hidden", 9): 1}, 2, 6, 11)
def mla() -> nn.Module:
    """DeepSeek: keys and values from a latent under a norm; each key is a part of its own and a rotated part that all heads share."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q = heads(m.q(x), 4)
        q_nope, q_rope = q.split([5, 6], -1)
        latent, k_rope = m.kv_a(x).split([9, 6], -1)
        k_nope, v = heads(m.kv_b(m.norm(latent)), 4).split([5, 7], -1)
        k_rope = rotate(k_rope[:, None]).expand(-1, 4, -1, -1)
        return m.o(attend(torch.cat([q_nope, rotate(q_rope)], -1), torch.cat([k_nope, k_rope], -1), v))

    return Forward(forward, q=linear(11, 44), kv_a=linear(11, 15), norm=nn.RMSNorm(9), kv_b=linear(9, 48), o=linear(28, 5))


@case({("head", 4): 1, ("head_dim", 5): 2}, 2, 7, 11)
def alibi() -> nn.Module:
    """Slopes per head are a constant, cut per use."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x), 4) for p in (m.q, m.k, m.v))
        slopes = 2.0 ** -torch.arange(1, 5)
        bias = slopes[:, None, None] * (torch.arange(7)[None, :] - torch.arange(7)[:, None])
        return m.o(((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))

    return Forward(forward, q=linear(11, 20), k=linear(11, 20), v=linear(11, 20), o=linear(20, 6))


@case({("head", 4): 1, ("head_dim", 5): 2}, 2, 7, 11)
def relative_position_table() -> nn.Module:
    """Swin and T5: a table (distances, heads) read at constant positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x), 4) for p in (m.q, m.k, m.v))
        distance = torch.arange(7)[None, :] - torch.arange(7)[:, None] + 6
        bias = m.table[distance.view(-1)].view(7, 7, 4).permute(2, 0, 1)
        return m.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2).flatten(2))

    return Forward(forward, q=linear(11, 20), k=linear(11, 20), v=linear(11, 20), o=linear(20, 6), table=torch.randn(13, 4))


@case({("head", 3): 1, ("head_dim", 4): 1, ("hidden", 10): 1, ("neuron", 17): 1}, 2, 8, 12, 3)
def window_partition() -> nn.Module:
    """Swin: windows of 4 x 4, shifted by 2, attention inside, back again; the projection's width is under a norm."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        b, h, w, c = x.shape
        y = m.norm(x).roll((-2, -2), (1, 2)).view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = m.qkv(y).reshape(-1, 16, 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = m.out(attend(q, k, v)).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + y.roll((2, 2), (1, 2))
        x = x + m.mlp(m.norm2(x))
        return m.head(x)

    mlp = nn.Sequential(linear(10, 17), nn.GELU(), linear(17, 10))
    norms = {"norm": nn.LayerNorm(10), "norm2": nn.LayerNorm(10)}
    return Forward(forward, embed=linear(3, 10), qkv=linear(10, 36), out=linear(12, 10), mlp=mlp, head=linear(10, 5), **norms)


@case({("head", 3): 1, ("head_dim", 4): 2, ("channel", 10): 1}, 2, 3, 8, 12)
def grid_attention() -> nn.Module:
    """MaxViT: attention between the pixels at the same place of every window."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        b, c, h, w = x.shape
        y = x.reshape(b, c, 4, h // 4, 4, w // 4).permute(0, 3, 5, 2, 4, 1).reshape(-1, 16, c)
        q, k, v = (heads(t, 3) for t in m.qkv(y).chunk(3, -1))
        y = m.out(attend(q, k, v)).reshape(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 3, 1, 4, 2).reshape(b, c, h, w)
        return m.head(x + y)

    return Forward(forward, stem=conv_bn(3, 10), qkv=linear(10, 36), out=linear(12, 10), head=nn.Conv2d(10, 5, 1))


# ---- blocks of language models


@case({("neuron", 15): 1}, 4, 11)
def glu_by_chunk() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate, value = m.up(x).chunk(2, -1)
        return m.down(F.silu(gate) * value)

    return Forward(forward, up=linear(11, 30), down=linear(15, 6))


@case({("neuron", 15): 1}, 4, 11)
def glu_by_two_projections() -> nn.Module:
    return Forward(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), gate=linear(11, 15), up=linear(11, 15), down=linear(15, 6))


@case({("neuron", 15): 1}, 4, 11)
def glu_op() -> nn.Module:
    return nn.Sequential(linear(11, 30), nn.GLU(), linear(15, 6))


@case({("hidden", 10): 1, ("neuron", 17): 1}, 2, 7, 11)
def layer_scale() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return m.head(m.norm2(x + m.scale * m.mlp(m.norm(x))))

    mlp = nn.Sequential(linear(10, 17), nn.GELU(), linear(17, 10))
    return Forward(
        forward,
        embed=linear(11, 10),
        norm=nn.LayerNorm(10),
        mlp=mlp,
        scale=torch.full((10,), 1e-6),
        norm2=nn.LayerNorm(10),
        head=linear(10, 5),
    )


@case({("hidden", 10): 1, ("neuron", 17): 1}, 2, 7, vocab=23)
def tied_embedding() -> nn.Module:
    """One table for the ids that come in and the scores that go out: the vocabulary stays, the width is one group."""
    module = Forward(
        lambda m, x: m.head(m.norm(m.embed(x) + m.mlp(m.embed(x)))),
        embed=nn.Embedding(23, 10), mlp=nn.Sequential(linear(10, 17), nn.ReLU(), linear(17, 10)), norm=nn.RMSNorm(10), head=nn.Linear(10, 23, bias=False),
    )  # fmt: skip
    module.head.weight = module.embed.weight
    return module


@case({("neuron", 13): 1}, 4, 11)
def shared_module() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        return m.last(m.shared(m.shared(x).relu()).relu())

    return Forward(forward, first=linear(11, 13), shared=linear(13, 13), last=linear(13, 5))


def route(m: Any, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, chosen = m.router(x).softmax(-1).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), chosen


@case({("expert", 6): 1, ("neuron", 24): 1}, 12, 16)
def stacked_experts_grouped_matmul() -> nn.Module:
    """Tokens sorted by expert, one grouped product, sorted back; offsets are counts of the chosen experts."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weights, chosen = route(m, x, 2)
        experts, order = chosen.flatten().sort()
        rows = x.bfloat16()[order // 2]
        ends = torch.histc(experts.float(), bins=6, min=0, max=5).cumsum(0, dtype=torch.int32)
        up, down = m.up.bfloat16().transpose(1, 2), m.down.bfloat16().transpose(1, 2)
        y = torch._grouped_mm(F.silu(torch._grouped_mm(rows, up, offs=ends)), down, offs=ends)
        y = y * weights.flatten()[order][:, None]
        return y[order.argsort()].view(12, 2, 8).sum(1)

    return Forward(forward, router=linear(16, 6), up=torch.randn(6, 24, 16), down=torch.randn(6, 8, 24))


@case({("expert", 6): 1, ("neuron", 9): 1}, 12, 11)
def stacked_experts_gathered() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        weights, chosen = route(m, x, 2)
        y = torch.einsum("tkoi,tki->tko", m.down[chosen], F.silu(torch.einsum("tkoi,ti->tko", m.up[chosen], x)))
        return (y * weights[..., None]).sum(1)

    return Forward(forward, router=linear(11, 6), up=torch.randn(6, 9, 11), down=torch.randn(6, 8, 9))


@case({("expert", 6): 1, ("neuron", 9): 1}, 12, 11)
def stacked_experts_all_computed() -> nn.Module:
    """Every expert runs on every token; a scattered matrix of weights picks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weights, chosen = route(m, x, 2)
        dense = torch.zeros(12, 6, dtype=x.dtype).scatter(1, chosen, weights)
        y = torch.bmm(F.silu(torch.bmm(x.expand(6, -1, -1), m.up)), m.down)
        return (y * dense.t()[..., None]).sum(0)

    return Forward(forward, router=linear(11, 6), up=torch.randn(6, 11, 9), down=torch.randn(6, 9, 8))


@case({("neuron", 9): 4, ("neuron", 7): 1}, 12, 11)
def experts_as_modules() -> nn.Module:
    """Each expert a module that one column of the weights addresses: which expert is which is fixed, what is inside each is not. Beside them a shared expert."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weights, chosen = route(m, x, 2)
        picked = F.one_hot(chosen, 4).to(x.dtype).mul(weights[..., None]).sum(1)
        y = m.shared(x)
        for i, expert in enumerate(m.experts):
            y = y + expert(x) * picked[:, i, None]
        return y

    experts = nn.ModuleList(nn.Sequential(linear(11, 9), nn.SiLU(), linear(9, 8)) for _ in range(4))
    return Forward(forward, router=linear(11, 4), experts=experts, shared=nn.Sequential(linear(11, 7), nn.SiLU(), linear(7, 8)))


@case({("expert", 3): 1, ("expert", 4): 1, ("neuron", 9): 1}, 12, 11)
def group_limited_routing() -> nn.Module:
    """DeepSeek-V3: the best 2 of 3 groups of 4 experts by their two best, then the best 3 experts of those."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scores = m.router(x).sigmoid()
        best = scores.view(12, 3, 4).topk(2, -1)[0].sum(-1).topk(2, -1)[1]
        allowed = torch.zeros(12, 3, dtype=x.dtype).scatter(1, best, 1.0)[:, :, None].expand(12, 3, 4).reshape(12, 12)
        chosen = scores.masked_fill(~allowed.bool(), 0.0).topk(3, -1)[1]
        weights = scores.gather(1, chosen)
        y = torch.einsum("tkoi,tki->tko", m.down[chosen], F.silu(torch.einsum("tkoi,ti->tko", m.up[chosen], x)))
        return (y * weights[..., None]).sum(1)

    return Forward(forward, router=linear(11, 12), up=torch.randn(12, 9, 11), down=torch.randn(12, 8, 9))


# ---- state-space and recurrent nets


@case({("channel", 14): 1, ("ssm_state", 4): 1, ("neuron", 3): 1}, 2, 9, 11)
def mamba1() -> nn.Module:
    """in_proj (x | z), a depthwise convolution over positions, x_proj (dt | B | C)."""

    def forward(m: Any, u: Tensor) -> Tensor:
        x, z = m.in_proj(u).transpose(1, 2).chunk(2, 1)
        x = F.silu(m.conv(x)[..., :9])
        dt, B, C = m.x_proj(x.transpose(1, 2)).split([3, 4, 4], -1)
        delta = F.softplus(m.dt_proj(dt)).transpose(1, 2)
        y, _ = selective_scan(x, delta, -m.A_log.exp(), B.transpose(1, 2), C.transpose(1, 2), m.D)
        return m.out_proj((y * F.silu(z)).transpose(1, 2))

    conv = nn.Conv1d(14, 14, 4, padding=3, groups=14)
    parts = {"in_proj": linear(11, 28), "conv": conv, "x_proj": linear(14, 11), "dt_proj": linear(3, 14), "out_proj": linear(14, 6)}
    return Forward(forward, **parts, A_log=torch.rand(14, 4), D=torch.randn(14))


@case({("ssm_head", 2): 1, ("ssm_head", 3): 1, ("head_dim", 5): 1, ("ssm_state", 4): 1}, 2, 9, 11)
def mamba2() -> nn.Module:
    """in_proj (z | x | B | C | dt), one convolution over x, B and C, heads in groups, a gated norm over all channels."""

    def forward(m: Any, u: Tensor) -> Tensor:
        z, mixed, dt = m.in_proj(u).split([30, 46, 6], -1)
        mixed = F.silu(m.conv(mixed.transpose(1, 2))[..., :9].transpose(1, 2))
        x, B, C = mixed.split([30, 8, 8], -1)
        dt = F.softplus(dt + m.dt_bias)
        y, _ = ssd_scan(x.view(2, 9, 6, 5), dt, -m.A_log.exp(), B.view(2, 9, 2, 4), C.view(2, 9, 2, 4), m.D)
        return m.out_proj(m.norm(y.reshape(2, 9, 30) * F.silu(z)))

    conv = nn.Conv1d(46, 46, 4, padding=3, groups=46)
    parts = {"in_proj": linear(11, 82), "conv": conv, "norm": nn.RMSNorm(30, eps=1e-5), "out_proj": linear(30, 6)}
    return Forward(forward, **parts, A_log=torch.rand(6), D=torch.randn(6), dt_bias=torch.rand(6))


@case({("neuron", 14): 1, ("neuron", 9): 1}, 4, 7, 11)
def lstm() -> nn.Module:
    """Stacked and bidirectional: the states of all lie in one tensor, so they lose the same units."""
    return Forward(
        lambda m, x: m.head(m.lstm(m.embed(x))[0]), embed=linear(11, 9), lstm=nn.LSTM(9, 14, 2, bidirectional=True), head=linear(28, 5)
    )


@case({("neuron", 14): 1}, 4, 7, 11)
def gru() -> nn.Module:
    return Forward(lambda m, x: m.head(m.gru(x)[0]), gru=nn.GRU(11, 14, batch_first=True), head=linear(14, 5))


@case({("neuron", 14): 1}, 4, 7, 11)
def rnn() -> nn.Module:
    return Forward(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.RNN(11, 14, batch_first=True), head=linear(14, 5))


# ---- tokens


@case({("token", 4): 1, ("hidden", 10): 1, ("head", 2): 1, ("head_dim", 6): 2}, 2, 7, 11)
def register_tokens() -> nn.Module:
    """Learned tokens beside the patches are an axis of their own, found and named; nothing cuts tokens unless told to."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.registers.expand(2, -1, -1), m.embed(x)], 1)
        y = m.norm(x)
        q, k, v = (heads(t, 2) for t in m.qkv(y).chunk(3, -1))
        x = x + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return m.head(m.norm2(x[:, 4:]))

    norms = {"norm": nn.LayerNorm(10), "norm2": nn.LayerNorm(10)}
    return Forward(
        forward, embed=linear(11, 10), registers=torch.randn(1, 4, 10), qkv=linear(10, 36), out=linear(12, 10), head=linear(10, 5), **norms
    )


# ---- the tests


def captured(name: str) -> Program:
    build, example, _ = CASES[name]
    with seeded(0):
        module, inputs = build().eval(), example()
    return capture_torch(randomise(module, 1, inputs), (inputs,))


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    groups = captured(name).groups
    found = Counter((group.kind, group.size) for group in groups if group.kind != "layer")
    assert dict(found) == CASES[name][2]
    assert not [group.name for group in groups if group.exact is Exactness.APPROXIMATE]


@pytest.mark.parametrize("name", CASES)
def test_pruned_is_masked(name: str) -> None:
    program = captured(name)
    removed = {g.name: range(0, g.size, 3)[: g.size - g.min_keep] for g in program.groups if g.kind not in ("layer", "token")}
    cut = Cut(program.analysis, removed)
    pruned = apply_cut(program, cut)
    certificate = certify(program, pruned, cut)
    assert certificate.passed, certificate
    assert shifted_control(program, pruned, cut) > 1e3 * certificate.tolerance
