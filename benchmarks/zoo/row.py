"""One line of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

import tests.torchvision_ops  # noqa: F401  # transformers and timm import torchvision too
from tests.randomise import Case, randomise, seeded


@dataclass(frozen=True)
class Row:
    """A named network. Nothing is imported or built before `build`."""

    name: str  # "timm/swinv2"
    family: str  # rows are counted by family
    build: Callable[[], Case]  # the same weights and inputs each time
    note: str = ""  # why torch.export refuses it, where it does: a miss that reports count


def row(name: str, family: str, network: Callable[[], nn.Module], inputs: Callable[[], Any], note: str = "") -> Row:
    """A row from two closures, both run with the generator seeded by the name.

    Args:
        inputs: one tensor, a tuple of arguments, or a dict of keyword arguments of the network.
    """

    def build() -> Case:
        seed = crc32(name.encode())
        with seeded(seed):
            module, example = network(), inputs()
        args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
        kwargs = example if isinstance(example, dict) else {}
        return Case(randomise(module, seed, *args, **kwargs), args, kwargs)

    return Row(name, family, build, note)


def images(size: int | tuple[int, ...], batch: int = 2, channels: int = 3) -> Callable[[], Tensor]:
    """Normally distributed images (or clips, with `size` = (frames, height, width))."""
    shape = (size, size) if isinstance(size, int) else size
    return lambda: torch.randn(batch, channels, *shape)
