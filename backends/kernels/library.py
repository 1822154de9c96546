"""2:4 linear by torch's own library path (cuSPARSELt), made for many tokens: y = act(x W^T + bias) on sparse tensor cores.

It reads 9/16 of a 16-bit weight and does half the multiplications. At few tokens it loses to dense (every shape that we measured), where
`two_four` wins; so the gate asks both. There is no kernel of ours here, and no reference but the dense product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.kernels import two_four
from graphprune.backends.kernels.base import Kernel, Packed, epilogue
from graphprune.errors import InvalidInput

MULTIPLES = (32, 64)  # of rows and columns
TOKENS = 8  # the product takes multiples


@dataclass(frozen=True)
class SemiStructured(Packed):
    """`values` is the weight as cuSPARSELt keeps it."""

    values: Tensor

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.values.element_size() * 9 // 16

    @property
    def work(self) -> float:
        return 0.5


@torch.library.custom_op("graphprune::two_four_library", mutates_args=())
def product(x: Tensor, values: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """W x^T + bias for x (tokens, columns), tokens a multiple of 8: the layout that the library is fast in."""
    return torch._cslt_sparse_mm(values, x.t(), bias=bias)


@product.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, ctx.rows = inputs
    ctx.columns, ctx.kind = x.shape[1], x.dtype
    ctx.save_for_backward(values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and the bias: what is compressed is not trained."""
    (values,) = ctx.saved_tensors
    x = grad.T @ _dense(values, ctx.rows, ctx.columns, ctx.kind) if ctx.needs_input_grad[0] else None
    return x, None, grad.sum(1) if ctx.needs_input_grad[2] else None, None


product.register_autograd(_backward, setup_context=_setup_context)


def _dense(values: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight: a product with the identity is the only way out."""
    return product(torch.eye(columns, dtype=dtype, device=values.device), values, None, rows)


def accepts(weight: Tensor) -> str | None:
    """Why torch does not take `weight`, or None."""
    if (reason := two_four.accepts(weight)) is not None:
        return reason
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"torch's 2:4 product takes float16 and bfloat16, not {weight.dtype}"
    if any(size % multiple for size, multiple in zip(weight.shape, MULTIPLES)):
        return f"torch's 2:4 product takes multiples of {MULTIPLES[0]} x {MULTIPLES[1]}, not {weight.shape[0]} x {weight.shape[1]}"
    return None


def pack(weight: Tensor) -> SemiStructured:
    """Compresses a weight (M, K) that is 2:4 already.

    Raises:
        InvalidInput: torch does not take it.
    """
    if (reason := accepts(weight)) is not None:
        raise InvalidInput(f"2:4: {reason}")
    return SemiStructured((weight.shape[0], weight.shape[1]), torch._cslt_compress(weight.detach().contiguous()))


def unpack(packed: SemiStructured) -> Tensor:
    """The dense weight."""
    return _dense(packed.values, *packed.shape, packed.values.dtype)


def linear(x: Tensor, packed: SemiStructured, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(x W^T + bias). x: (..., K) -> (..., M)."""
    flat = x.reshape(-1, x.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, 0, 0, -flat.shape[0] % TOKENS))
    y = product(padded, packed.values, bias, packed.shape[0]).t()[: flat.shape[0]].contiguous().reshape(*x.shape[:-1], packed.shape[0])
    return epilogue(y, None, activation, x.dtype)


def configs(packed: SemiStructured, tokens: int) -> list[str]:
    """The library has its own choice of tiles."""
    return ["library"]


KERNEL = Kernel("two_four_library", torch.nn.functional.linear, pack, unpack, linear, linear, configs, accepts)
