"""2:4 linear by torch's own library path (cuSPARSELt or CUTLASS), made for many tokens: y = act(x W^T + bias) on sparse tensor cores.

It reads 9/16 of a 16-bit weight and does half the multiplications. At few tokens it loses to dense (every shape that we measured), where
`two_four` wins; so the gate asks both. There is no kernel of ours here, and no reference but the dense product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.backends.kernels import two_four
from graphprune.backends.kernels.base import Kernel, Packed, epilogue
from graphprune.errors import InvalidInput

MULTIPLES = (32, 64)  # of rows and columns, so that either library takes the weight


@dataclass(frozen=True)
class SemiStructured(Packed):
    """`values` is a tensor of a subclass of torch's, which looks dense and is not."""

    values: Tensor

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.values.element_size() * 9 // 16

    @property
    def work(self) -> float:
        return 0.5

    def clone(self) -> SemiStructured:
        return pack(self.values.to_dense())


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
    return SemiStructured((weight.shape[0], weight.shape[1]), torch.sparse.to_sparse_semi_structured(weight.detach().contiguous()))


def unpack(packed: SemiStructured) -> Tensor:
    """The dense weight."""
    return packed.values.to_dense()


def linear(x: Tensor, packed: SemiStructured, bias: Tensor | None = None, activation: str = "", config: str = "") -> Tensor:
    """y = act(x W^T + bias). x: (..., K) -> (..., M)."""
    return epilogue(torch.nn.functional.linear(x, packed.values, bias), None, activation, x.dtype)


def configs(packed: SemiStructured, tokens: int) -> list[str]:
    """The library has its own choice of tiles."""
    return ["library"]


KERNEL = Kernel("two_four_library", torch.nn.functional.linear, pack, unpack, linear, linear, configs, accepts)
