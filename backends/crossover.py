"""Where on a device sparse kernels begin to pay: the gate's answers over densities and numbers of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.backends.gate import Gate
from graphprune.backends.products import FORMATS, TOKENS, Layer
from graphprune.errors import InvalidInput

DENSITIES: Mapping[str, tuple[float, ...]] = {  # kept, by format
    "block_sparse": (0.7, 0.5, 0.3, 0.2, 0.1),
    "two_four": (0.5,),
    "two_four_library": (0.5,),
    "unstructured": (0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    "bitmap": (0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
}
BLOCK = 64


def crossover(rows: int, columns: int, *, tokens: Sequence[int] = TOKENS, gate: Gate | None = None) -> tuple[Layer, ...]:
    """What the gate says about random bfloat16 weights of one size: a `Layer` for each format and density, named after the format.

    Raises:
        InvalidInput: a size is not positive, or there is no device to measure on.
    """
    if min(rows, columns, *tokens) < 1:
        raise InvalidInput(f"rows, columns and tokens must be positive, found {rows}, {columns} and {', '.join(map(str, tokens))}")
    gate = gate or Gate()
    if not gate.can_measure:
        raise InvalidInput("where sparse kernels begin to pay is measured on a CUDA device, and this machine has none that PyTorch can use")
    generator = torch.Generator(gate.device).manual_seed(0)
    found = []
    for name, densities in DENSITIES.items():
        for density in densities:
            weight = random_weight(name, rows, columns, density, generator)
            decisions = gate.crossover(FORMATS[name], lambda _: weight, (density,), tokens)  # type: ignore[misc]
            found.append(Layer(name, (rows, columns), density, tuple(decisions)))
    return tuple(found)


def random_weight(name: str, rows: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """A weight (rows, columns) in bfloat16 on the generator's device, with the zeros that a format is for."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    if name == "block_sparse":
        wanted = uniform(-(-rows // BLOCK), -(-columns // BLOCK))
        kept = (wanted.flatten().argsort().argsort() < round(density * wanted.numel())).reshape(wanted.shape)
        mask = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    elif name.startswith("two_four"):
        mask = (uniform(rows, -(-columns // 4), 4).argsort(-1).argsort(-1) < 2).reshape(rows, -1)[:, :columns]
    else:
        mask = uniform(rows, columns) < density
    return (torch.where(mask, uniform(rows, columns) + 0.5, 0.0)).to(torch.bfloat16)
