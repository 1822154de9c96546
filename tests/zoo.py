"""Tiny models in plain torch, one per structure that a pruner must understand; a row here buys every test of the matrix.

Sizes that are free are distinct and odd, so that equal sizes never stand in for equal axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.randomise import Case, randomise, seeded


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *[nn.ReLU(inplace=True)] * act)


class Pooled(nn.Module):
    """A body of convolutions, then average pooling and a classifier."""

    def __init__(self, body: nn.Module, channels: int, classes: int = 10):
        super().__init__()
        self.body = body
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """A bottleneck block, with a projection on the skip where the shape changes."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1):
        super().__init__()
        wider = width + 2
        self.branch = nn.Sequential(conv_bn(inputs, width, 1), conv_bn(width, wider, 3, stride), conv_bn(wider, outputs, 1, act=False))
        self.skip = conv_bn(inputs, outputs, 1, stride, act=False) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += self.skip(x)
        return F.relu_(y)


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all before it, each through a batch norm of its own."""

    def __init__(self, inputs: int, growth: int, layers: int):
        super().__init__()
        widths = [inputs + i * growth for i in range(layers)]
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1)) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * scale.sigmoid()


class InvertedResidual(nn.Module):
    """MobileNet: expand, depthwise, squeeze-excite, project, with a skip."""

    def __init__(self, channels: int, expanded: int, squeezed: int):
        super().__init__()
        self.layers = nn.Sequential(
            conv_bn(channels, expanded, 1), conv_bn(expanded, expanded, groups=expanded), SqueezeExcite(expanded, squeezed),
            conv_bn(expanded, channels, 1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Shuffle(nn.Module):
    """ShuffleNet: half of the channels pass, the other half is convolved in groups, then both are interleaved."""

    def __init__(self, half: int, groups: int):
        super().__init__()
        depthwise = conv_bn(half, half, groups=half, act=False)
        self.branch = nn.Sequential(conv_bn(half, half, 1, groups=groups), depthwise, conv_bn(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class FusedAttention(nn.Module):
    """Self-attention of a ViT: one projection laid out as (3 heads head_dim)."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class ViTBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = FusedAttention(hidden, heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, intermediate), nn.GELU(), nn.Linear(intermediate, hidden))
        self.scale = nn.Parameter(torch.full((hidden,), 1e-6))  # LayerScale

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.scale * self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, hidden: int = 36, heads: int = 4, intermediate: int = 70, patch: int = 4, image: int = 12, classes: int = 10):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, hidden, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, hidden))
        self.blocks = nn.Sequential(*[ViTBlock(hidden, heads, intermediate) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def rotate(x: Tensor, base: float = 1e4) -> Tensor:
    """RoPE by halves. x: (batch, heads, seq_len, head_dim)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class GroupedQueryAttention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        widths = heads * head_dim, kv_heads * head_dim, kv_heads * head_dim
        self.q, self.k, self.v = (nn.Linear(hidden, width, bias=False) for width in widths)
        self.o = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
        q, k = rotate(q), rotate(k)
        k, v = (
            t[:, :, None].expand(b, self.kv_heads, self.heads // self.kv_heads, n, self.head_dim).reshape(b, self.heads, n, self.head_dim)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, intermediate, bias=False), nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ChunkGLU(nn.Module):
    """One projection whose halves are gate and value."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 2 * intermediate), nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.gelu(gate) * value)


class MixtureOfExperts(nn.Module):
    """Top-k routing over experts that lie stacked in two tensors; each token gathers the matrices of its experts."""

    def __init__(self, hidden: int, intermediate: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(num_experts, 2 * intermediate, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, intermediate) * intermediate**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, expert = self.router(x).softmax(-1).topk(self.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        gate, up = torch.einsum("bnkih,bnh->bnki", self.gate_up[expert], x).chunk(2, -1)
        y = torch.einsum("bnkhi,bnki->bnkh", self.down[expert], F.silu(gate) * up)
        return (y * weight[..., None]).sum(-2)


class DecoderBlock(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A causal language model with grouped queries; `mlp` builds the feed-forward part of each block."""

    def __init__(self, mlp: Callable[[int], nn.Module], hidden: int = 44, layers: int = 2, vocab: int = 61, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.blocks = nn.Sequential(*[DecoderBlock(GroupedQueryAttention(hidden, 6, 2, 10), mlp(hidden), hidden) for _ in range(layers)])
        self.norm, self.lm_head = nn.RMSNorm(hidden), nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.blocks(self.embed(ids))))


class SharedLayer(nn.Module):
    """One linear layer is called twice, between layers of their own."""

    def __init__(self, inputs: int = 13, width: int = 30, outputs: int = 7):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))


class UNet(nn.Module):
    """Group norms, a transposed convolution on the way up and a skip by concatenation."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(12, 20, 3, 2, padding=1), nn.GroupNorm(5, 20), nn.SiLU())
        self.up = nn.ConvTranspose2d(20, 14, 2, 2)
        self.merge = nn.Sequential(nn.Conv2d(12 + 14, 18, 3, padding=1), nn.GroupNorm(3, 18), nn.SiLU(), nn.Conv2d(18, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x)
        return self.merge(torch.cat([high, self.up(self.down2(high))], 1))


class Tagger(nn.Module):
    """A bidirectional LSTM of two layers between an embedding and a classifier."""

    def __init__(self, vocab: int = 53, embed: int = 18, hidden: int = 22, classes: int = 9):
        super().__init__()
        self.embed = nn.Embedding(vocab, embed)
        self.lstm = nn.LSTM(embed, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(13, 40), nn.ReLU(), nn.Linear(40, 28), nn.BatchNorm1d(28), nn.GELU(), nn.Linear(28, 7))


def _resnet() -> nn.Module:
    body = nn.Sequential(conv_bn(3, 16), Residual(16, 8, 16), Residual(16, 12, 26, stride=2), Residual(26, 12, 26))
    return Pooled(body, 26)


def _densenet() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 14, 3, padding=1), Dense(14, 6, 3), conv_bn(32, 20, 1), nn.MaxPool2d(2), Dense(20, 8, 2))
    return Pooled(nn.Sequential(body, nn.BatchNorm2d(36)), 36)


def _mobilenet() -> nn.Module:
    blocks = InvertedResidual(12, 40, 6), InvertedResidual(12, 56, 10)
    return Pooled(nn.Sequential(conv_bn(3, 12, stride=2), *blocks, conv_bn(12, 30, 1)), 30)


def _shufflenet() -> nn.Module:
    return Pooled(nn.Sequential(conv_bn(3, 24), Shuffle(12, 1), Shuffle(12, 2), conv_bn(24, 34, 1)), 34)


def _vgg() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 18, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(18, 22, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(22 * 6, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))


def _floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def _ids(vocab: int, seq_len: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocab, (2, seq_len))


_TABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (_mlp, _floats(5, 13)),
    "vgg": (_vgg, _floats(2, 3, 17, 19)),  # flatten before a classifier
    "resnet": (_resnet, _floats(2, 3, 16, 16)),
    "densenet": (_densenet, _floats(2, 3, 12, 12)),
    "mobilenet": (_mobilenet, _floats(2, 3, 16, 16)),
    "shufflenet": (_shufflenet, _floats(2, 3, 12, 12)),
    "unet": (UNet, _floats(2, 3, 12, 12)),
    "vit": (ViT, _floats(2, 3, 12, 12)),
    "gqa": (lambda: Decoder(lambda hidden: SwiGLU(hidden, 70)), _ids(61)),
    "glu": (lambda: Decoder(lambda hidden: ChunkGLU(hidden, 54)), _ids(61)),
    "moe": (lambda: Decoder(lambda hidden: MixtureOfExperts(hidden, 26, 7, 3)), _ids(61)),
    "tied": (lambda: Decoder(lambda hidden: SwiGLU(hidden, 70), layers=1, tied=True), _ids(61)),
    "shared": (SharedLayer, _floats(5, 13)),
    "lstm": (Tagger, _ids(53)),
}


def _case(name: str) -> Callable[[], Case]:
    def build() -> Case:
        network, example = _TABLE[name]
        with seeded(0):
            module, args = network(), (example(),)
        return Case(randomise(module, 1, *args), args)

    return build


TINY: dict[str, Callable[[], Case]] = {name: _case(name) for name in _TABLE}
