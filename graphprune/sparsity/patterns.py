"""Which weights of a matrix may go together: any, N of M neighbours, or whole tiles.

A pattern turns scores (groups, outputs, inputs) into a mask of the same shape, True where a weight stays. The inputs of a convolution are
its channels times the `window` positions of its window, which are innermost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import InvalidInput

COMPARE = ("row", "layer")


@dataclass(frozen=True)
class Unstructured:
    """Any weight; the smallest of every row, or of the whole matrix, go."""

    def __str__(self) -> str:
        return "unstructured"

    def keep(self, scores: Tensor, sparsity: float, compare: str, window: int = 1) -> Tensor:
        pool = scores if compare == "row" else scores.flatten(1)
        return _all_but_smallest(pool, int(pool.shape[-1] * sparsity + 1e-9)).reshape(scores.shape)


@dataclass(frozen=True)
class NOfM:
    """`kept` of every `of` consecutive inputs of a row stay; a shorter rest at the end of a row stays whole."""

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.of

    def keep(self, scores: Tensor, sparsity: float, compare: str, window: int = 1) -> Tensor:
        whole = scores.shape[-1] // self.of * self.of
        cells = scores[..., :whole].unflatten(-1, (-1, self.of))
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask[..., :whole] = _all_but_smallest(cells, self.of - self.kept).flatten(-2)
        return mask

    def sets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Every way to remove the others: (sets, of) bool, and (sets, of - kept) their columns."""
        return _sets(self.kept, self.of, device)


@dataclass(frozen=True)
class Tiles:
    """Whole tiles of `rows` outputs times `columns` inputs; the tiles of least norm of a matrix go (an edge tile counts as a whole one).

    A tile of a convolution (without groups) lies at one position of the window, and its inputs are channels: so a kernel can skip it.
    """

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"

    def keep(self, scores: Tensor, sparsity: float, compare: str, window: int = 1) -> Tensor:
        cells = scores.double().unflatten(2, (-1, window))  # (groups, outputs, inputs, window)
        outputs, inputs = cells.shape[1:3]
        padded = F.pad(cells, (0, 0, 0, -inputs % self.columns, 0, -outputs % self.rows))
        tiles = padded.unflatten(2, (-1, self.columns)).unflatten(1, (-1, self.rows)).sum((2, 4))
        stay = _all_but_smallest(tiles.flatten(1), int(tiles[0].numel() * sparsity + 1e-9)).reshape(tiles.shape)
        return stay.repeat_interleave(self.rows, 1).repeat_interleave(self.columns, 2)[:, :outputs, :inputs].flatten(2)


Pattern = Unstructured | NOfM | Tiles


def pattern_of(text: str | Pattern) -> Pattern:
    """"unstructured", "2:4" (two of four stay), "block:64x64" (outputs times inputs).

    Raises:
        InvalidInput: none of these.
    """
    if not isinstance(text, str):
        return text
    if text == "unstructured":
        return Unstructured()
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(found[1]) < int(found[2]):
        return NOfM(int(found[1]), int(found[2]))
    if (found := re.fullmatch(r"block:(\d+)x(\d+)", text)) and int(found[1]) > 0 and int(found[2]) > 0:
        return Tiles(int(found[1]), int(found[2]))
    raise InvalidInput(f"pattern {text!r} is not known; write 'unstructured', '2:4' (kept:of) or 'block:64x64' (outputs x inputs)")


@cache
def _sets(kept: int, of: int, device: torch.device) -> tuple[Tensor, Tensor]:
    members = torch.tensor(list(combinations(range(of), of - kept)), device=device)
    return torch.zeros(len(members), of, dtype=torch.bool, device=device).scatter_(1, members, True), members


def _all_but_smallest(scores: Tensor, count: int) -> Tensor:
    """Along the last axis; of equal scores the first go."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    order = scores.argsort(dim=-1, stable=True)
    return mask.scatter_(-1, order[..., :count], False)
