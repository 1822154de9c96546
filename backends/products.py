"""One product `y = act(x W^T + bias)` with masked weights, of one layer or of several side by side; or one convolution.

It takes the path that was decided for the number of tokens at hand: dense, or a kernel with the weight stored compressed.

The weight stays the parameter of its layer. While it is trained, a product is `x (W * mask)^T`, so zeros stay zeros; else it reads the
compressed copy, which follows the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.backends.gate import Decision, Gate
from graphprune.backends.kernels import KERNELS, block_sparse, block_sparse_conv, library
from graphprune.backends.kernels.base import ACTIVATIONS, EXPAND, Kernel, Packed

FORMATS: Mapping[str, Kernel] = {**KERNELS, library.KERNEL.name: library.KERNEL}
TOKENS = (1, 8, 16, 32, 2048)  # where it is decided: one sequence and three sizes of batch that decode, and prefill
IMAGES = (1, 8, 64)  # the same for convolutions, whose tokens are pixels of their results
WASTE = 1.1  # blocks may store so many times the weights that are kept
EACH = "each"  # the path of weights side by side where one product each is faster


@dataclass(frozen=True)
class Layer:
    """One masked weight, or several side by side, and what was decided about it, by number of tokens."""

    name: str  # of several: joined by " + "
    shape: tuple[int, ...]
    density: float
    decisions: tuple[Decision, ...]



@dataclass(frozen=True)
class Site:
    """A product with a weight: who holds it, whether as (columns, rows), and how (the nth part of) another one takes its place.

    Columns of a convolution are channels and a window, and `steps` its stride, padding and dilation.
    """

    owner: nn.Module
    attribute: str
    transposed: bool
    place: Callable[[Product, int], None]
    steps: Mapping[str, Any] | None = None

    @property
    def held(self) -> Tensor:
        return getattr(self.owner, self.attribute)

    @property
    def weight(self) -> Tensor:
        """(rows, columns)."""
        return self.held.T if self.transposed else self.held


@dataclass(frozen=True, eq=False)
class Factor:
    """A masked weight and everything that multiplies with it."""

    name: str
    mask: Tensor  # (rows, columns)
    sites: list[Site]

    @property
    def weight(self) -> Tensor:
        """(rows, columns)."""
        return self.sites[0].weight

    @property
    def kind(self) -> tuple[Any, ...]:
        """Weights of the same kind can be laid side by side."""
        held = self.sites[0].held
        return self.mask.shape[1], held.dtype, held.device


@dataclass(frozen=True)
class Choice:
    """What was decided about a weight, by number of tokens, and options of `pack` of each format that this takes."""

    decisions: tuple[Decision, ...]
    packing: Mapping[str, dict[str, Any]]

    @classmethod
    def of(cls, weight: Tensor, tokens: Sequence[int], gate: Gate, force: str | bool, **given: Any) -> Choice:
        """For a weight with zeros; see `sparse_module`. What is given are more options of `pack`."""
        takes = [(kernel, {**options, **given}) for kernel, options in _formats(weight) if force in (False, True, kernel.name)]
        if not takes and not force:
            why = "no kernel takes its type and the places of its zeros" + (", which are no tiles of channels" if weight.dim() == 4 else "")
            return cls(tuple(Decision("dense", count, why) for count in tokens), {})
        decisions = (_forced(takes, weight, count) if force else gate.decide(takes, weight, count) for count in tokens)
        return cls(tuple(decisions), {kernel.name: options for kernel, options in takes})

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        paths = {it.path for it in self.decisions}
        return {name: options for name, options in self.packing.items() if name in paths}

    def only(self, tokens: Collection[int]) -> Choice:
        return replace(self, decisions=tuple(it for it in self.decisions if it.tokens in tokens))

    def gains(self, single: Sequence[Choice]) -> dict[int, float]:
        """How many times faster than one product for each weight it was measured to be, by number of tokens; 0 where that is unknown."""
        found = {}
        for together, *each in zip(self.decisions, *(it.decisions for it in single)):
            if together.sparse:
                times = [it.sparse_us if it.sparse else it.dense_us for it in each]
                known = [it for it in times if it is not None]
                found[together.tokens] = sum(known) / together.sparse_us if together.sparse_us and len(known) == len(times) else 0.0
            else:
                found[together.tokens] = 0.0 if any(it.sparse for it in each) else 1.0
        return found


class Stored(nn.Module):
    """A compressed weight whose tensors are buffers that no state dict holds; kernels read it like the `Packed` that it came from."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        for name, value in vars(packed).items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def take(self, packed: Packed) -> None:
        """Other numbers; in place where the sizes are the same, so that compiled code sees them."""
        for name, value in vars(packed).items():
            old = getattr(self, name)
            same = type(value) is Tensor and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device)
            if same and not old.is_inference():
                old.copy_(value)
            else:
                setattr(self, name, value)


class Product(nn.Module):
    """y = act(x W^T + bias) for masked weights: of one layer, or of several that read the same x, side by side."""

    bits: Tensor

    def __init__(self, factors: Sequence[Factor], choice: Choice) -> None:
        super().__init__()
        self.sites = tuple(it.sites[0] for it in factors)  # a tuple, so that the owners do not become parts
        ends = [*accumulate(it.mask.shape[0] for it in factors)]
        self.rows = tuple(zip((0, *ends), ends))  # of each weight
        self.register_buffer("bits", _packed_bits(torch.cat([it.mask.to(self.sites[0].held.device) for it in factors])), persistent=False)
        self.convolution = self.sites[0].steps
        self.expands = False  # dense products from the compressed weight, because the dense one is not on the device
        self.shared: tuple[Tensor, int, Tensor] | None = None  # an x, its version and the product, until all layers took their part
        self.decisions, self.options = choice.decisions, choice.options
        self.steps = tuple((d.tokens, d.path, d.config) for d in self.decisions)
        self.each: Any = ()  # products of each weight alone
        self.formats = nn.ModuleDict({name: Stored(packed) for name, packed in self._packed().items()})
        self.state = self._state()
        for site in self.sites:
            site.owner.register_load_state_dict_post_hook(functools.partial(_loaded, self))

    def leave(self, single: Sequence[Product]) -> None:
        """Leaves the numbers of tokens that were decided for each weight alone to those products."""
        self.each = nn.ModuleList(single)
        self.steps = tuple(sorted((*self.steps, *((it.tokens, EACH, "") for each in single[:1] for it in each.decisions))))

    @property
    def weight(self) -> Tensor:
        """(rows, columns), of all layers."""
        weights = [site.weight for site in self.sites]
        return torch.cat(weights) if len(weights) > 1 else weights[0]

    def mask(self, part: int | None = None) -> Tensor:
        """(rows, columns) bool, of all layers or of one, on the weight's device."""
        flags = (self.bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=self.bits.device)) & 1
        shape = self.rows[-1][1], *self.sites[0].weight.shape[1:]
        whole = flags.bool().flatten()[: prod(shape)].reshape(shape)
        return whole if part is None else whole[slice(*self.rows[part])]

    def forward(self, x: Tensor, bias: Tensor | None = None, activation: str = "", part: int = 0) -> Tensor:
        """The rows of one layer, the nth `part`."""
        weight = self.sites[part].weight
        trains, compiling = torch.is_grad_enabled() and weight.requires_grad, torch.compiler.is_compiling()
        if trains and (compiling or self.training or not self.formats):
            return ACTIVATIONS[activation](self.dense(x, weight * self.mask(part), bias))
        if not compiling:
            self.refresh()
        if trains:
            return SparseForwards.apply(x, weight, bias, self, activation, part)
        tokens = self.tokens(x)
        path, config = self._path(tokens)
        if path == EACH:
            if not self.expands or self.each[part]._path(tokens)[0] != "dense":
                return self.each[part](x, bias, activation)
            path = "dense"
        if path == "dense" and self.expands:
            path, config = next(iter(self.options)), EXPAND
        if path == "dense" or x.dtype != weight.dtype:  # autocast chooses the type of a dense product
            if self.expands:
                name = next(iter(self.options))
                weight = FORMATS[name].unpack(self.formats[name])[slice(*self.rows[part])]
            return ACTIVATIONS[activation](self.dense(x, weight, bias))
        if len(self.sites) == 1:
            return FORMATS[path].linear(x, self.formats[path], bias, activation, config)
        y = self._shared(x, path, config, part)[..., slice(*self.rows[part])].contiguous()
        return ACTIVATIONS[activation](y if bias is None else y + bias)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias) if self.convolution is None else F.conv2d(x, weight, bias, **self.convolution)

    def tokens(self, x: Tensor) -> int:
        """Rows of the product."""
        if self.convolution is None:
            return x.numel() // max(1, x.shape[-1])
        images = x.shape[0] if x.dim() == 4 else 1
        return images * prod(block_sparse_conv.outputs(x.shape[-2:], self.sites[0].weight.shape, **self.convolution))

    def _shared(self, x: Tensor, path: str, config: str, part: int) -> Tensor:
        """The product for all layers: the first that is called with an x computes it, the last lets go of it."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version  # x may be written between two layers
        held = self.shared
        if held is None or held[0] is not x or held[1] != version:
            held = x, version, FORMATS[path].linear(x, self.formats[path], None, "", config)
        self.shared = held if part < len(self.sites) - 1 else None
        return held[2]

    def _path(self, tokens: int) -> tuple[str, str]:
        for most, path, config in self.steps:
            if tokens <= most:
                return path, config
        return self.steps[-1][1:]

    def train(self, mode: bool = True) -> Product:
        if not mode:
            self.refresh()
        return super().train(mode)

    def refresh(self) -> None:
        """Compress the weights again if one changed, and mask what was written over zeros."""
        if self.sites[0].held.is_meta or self._state() == self.state:
            return
        for name, packed in self._packed().items():
            self.formats[name].take(packed)  # type: ignore[operator]
        self.settle()

    def settle(self) -> None:
        """The weights as they are now are those that are compressed."""
        self.state, self.shared = self._state(), None

    @torch.no_grad()
    def _packed(self) -> dict[str, Packed]:
        for part, site in enumerate(self.sites):
            mask = self.mask(part).to(site.held.device)
            if bool((site.weight[~mask] != 0).any()):
                site.weight.mul_(mask)
        if not self.options:
            return {}
        full = full_weight(self.weight.detach().to(self.bits.device), self.mask())
        return {name: FORMATS[name].pack(full, **options) for name, options in self.options.items()}

    def _state(self) -> tuple[Any, ...]:
        """Changes whenever the numbers may have changed."""
        held = [site.held for site in self.sites]
        return tuple((-1 if it.is_inference() else it._version, it.data_ptr(), it.dtype, it.device) for it in held)

    def extra_repr(self) -> str:
        return ", ".join(f"{path} to {most}" for most, path, _ in self.steps) + " tokens"


class SparseForwards(torch.autograd.Function):
    """A product in evaluation mode where gradients happen to be enabled: by the kernel; backwards, if ever, as the dense masked product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, activation: str, part: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.product, ctx.activation, ctx.part = product, activation, part
        return product(x, bias, activation, part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            pairs = zip(ctx.saved_tensors, ctx.needs_input_grad)
            leaves: list[Any] = [None if tensor is None else tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
            y = ACTIVATIONS[ctx.activation](ctx.product.dense(leaves[0], leaves[1] * ctx.product.mask(ctx.part), leaves[2]))
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grads))
        return *(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves), None, None, None


def _loaded(product: Product, module: nn.Module, keys: Any) -> None:
    product.refresh()


def full_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with no zero where the mask keeps it: kernels store what is not zero, and the places must not depend on values."""
    info = torch.finfo(weight.dtype)
    least = max(info.smallest_normal * info.eps, 2.0**-126)  # of what is not zero in any arithmetic
    return torch.where(mask, torch.where(weight == 0, least, weight), 0.0).to(weight.dtype)


def _packed_bits(mask: Tensor) -> Tensor:
    """A bool tensor as uint8, eight entries each, lowest bits first."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1).to(torch.uint8)


def _formats(weight: Tensor) -> list[tuple[Kernel, dict[str, Any]]]:
    """Formats worth asking about, with options of `pack`: the largest blocks that store few zeros, else 2:4, else any zeros."""
    convolves = weight.dim() == 4
    blocks = KERNELS["block_sparse_conv" if convolves else "block_sparse"]
    if blocks.accepts(weight) is not None:
        return []
    kept = weight != 0
    count = int(kept.sum())
    for block in sorted(block_sparse.BLOCKS, reverse=True):
        flat = block_sparse_conv.matrix(kept, block) if convolves else kept
        padded = F.pad(flat, (0, -flat.shape[1] % block, 0, -flat.shape[0] % block))
        tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(3).any(1)
        if block <= max(weight.shape[:2]) and int(tiles.sum()) * block * block <= WASTE * count < weight.numel():
            return [(blocks, {"block": block})]
    if convolves:
        return []
    pairs = [FORMATS["two_four"], FORMATS["two_four_library"]] if FORMATS["two_four"].accepts(weight) is None else []
    return [(kernel, {}) for kernel in (*pairs, KERNELS["bitmap"], KERNELS["unstructured"])]


def _forced(takes: Sequence[tuple[Kernel, dict[str, Any]]], weight: Tensor, tokens: int) -> Decision:
    for kernel, _ in takes:
        if kernel.accepts(weight) is None and (kernel.most_tokens is None or tokens <= kernel.most_tokens) and kernel is not library.KERNEL:
            return Decision(kernel.name, tokens, "forced")
    return Decision("dense", tokens, "no kernel that was forced takes this weight and number of tokens")
