"""Streaming statistics: `update` with a batch, `merge` with those of another shard, read at any time.

Merging is associative: shards of any size add up to one pass over all data, to rounding. All sums are float64 on the CPU and float32 on
other devices, where float64 is slow; moments are centred (Chan et al. 1983), so that float32 keeps its digits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor

CACHED = 2**16  # numbers of one step on a CPU: several passes go over them, which costs a tenth if they stay in the cache


class Accumulator(Protocol):
    """Statistics of one place of a program."""

    def update(self, *found: Any) -> None: ...

    def merge(self, other: Self) -> None: ...


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.device.type == "cpu" else x.float()


def _counts(rows: Tensor, counts: Tensor | None) -> Tensor:
    """(groups, 1): samples of every group."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    found = rows.new_full((rows.shape[0],), rows.shape[1], dtype=dtype) if counts is None else counts.to(rows.device, dtype)
    return found[:, None]


class _Sums:
    """An accumulator whose state is a handful of tensors that add up."""

    def merge(self, other: Self) -> None:
        for part in fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if theirs is not None:
                setattr(self, part.name, theirs if mine is None else mine + theirs.to(mine.device))


@dataclass
class Moments:
    """Count, mean, centred square, absolute sum and square sum of every column: (groups, columns)."""

    count: Tensor | None = None  # (groups, 1)
    mean: Tensor | None = None
    centred: Tensor | None = None  # sum of squares about the mean
    absolute: Tensor | None = None  # sum of magnitudes

    def update(self, rows: Tensor, counts: Tensor | None = None) -> None:
        """rows: (groups, samples, columns), zero beyond `counts` (groups,)."""
        step = rows.shape[1] if rows.device.type != "cpu" else max(1, CACHED // max(1, rows.shape[0] * rows.shape[2]))
        for start in range(0, max(1, rows.shape[1]), max(1, step)):
            part = _wide(rows[:, start : start + step])
            count = _counts(part, None if counts is None else (counts - start).clamp(0, part.shape[1]))
            mean = part.sum(1) / count.clamp_min(1)
            # rows beyond the counts are zero: what they would add to the centred square is taken off again
            centred = (part - mean[:, None]).square().sum(1) - (part.shape[1] - count) * mean.square()
            self._join(count, mean, centred.clamp_min(0), part.abs().sum(1))

    def merge(self, other: Moments) -> None:
        if other.count is not None:
            self._join(other.count, other.mean, other.centred, other.absolute)  # type: ignore[arg-type]

    def _join(self, count: Tensor, mean: Tensor, centred: Tensor, absolute: Tensor) -> None:
        if self.count is None:
            self.count, self.mean, self.centred, self.absolute = count, mean, centred, absolute
            return
        count, mean, centred, absolute = (t.to(self.count.device) for t in (count, mean, centred, absolute))
        assert self.mean is not None and self.centred is not None and self.absolute is not None
        total = self.count + count
        apart = mean - self.mean
        share = count / total.clamp_min(1)
        self.mean = self.mean + apart * share
        self.centred = self.centred + centred + apart.square() * self.count * share
        self.count, self.absolute = total, self.absolute + absolute

    @property
    def variance(self) -> Tensor:
        """(groups, columns), with n - 1."""
        assert self.count is not None and self.centred is not None
        return self.centred / (self.count - 1).clamp_min(1)

    @property
    def norm(self) -> Tensor:
        """(groups, columns): root of the sum of squares over all samples."""
        assert self.count is not None and self.centred is not None and self.mean is not None
        return (self.centred + self.count * self.mean.square()).sqrt()

    @property
    def mean_absolute(self) -> Tensor:
        assert self.count is not None and self.absolute is not None
        return self.absolute / self.count.clamp_min(1)


@dataclass
class Gram(_Sums):
    """`X^T X`, sum and count of the rows that a weight multiplies: (groups, columns, columns)."""

    count: Tensor | None = None  # (groups, 1)
    total: Tensor | None = None  # (groups, columns)
    square: Tensor | None = None

    def update(self, rows: Tensor, counts: Tensor | None = None) -> None:
        """rows: (groups, samples, columns), zero beyond `counts` (groups,)."""
        if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16):  # products of narrow numbers are exact in float32
            square = torch.bmm(rows.mT, rows, out_dtype=torch.float32)
        else:
            rows = _wide(rows)
            square = rows.mT @ rows
        self.merge(Gram(_counts(rows, counts), rows.sum(1, dtype=square.dtype), square))

    @property
    def mean(self) -> Tensor:
        assert self.count is not None and self.total is not None
        return self.total / self.count.clamp_min(1)

    def hessian(self, damping: float = 0.01) -> Tensor:
        """(groups, columns, columns): mean of `x x^T`, the damping times its mean diagonal added; a column that is never used gets a one.

        The one makes the matrix invertible; the weights of such a column do nothing, and every solver sets them to zero.
        """
        assert self.count is not None and self.square is not None
        mean = self.square / self.count.clamp_min(1)[..., None]
        diagonal = mean.diagonal(dim1=-2, dim2=-1)
        dead = diagonal <= 0
        extra = damping * diagonal.mean(-1, keepdim=True) + dead.to(mean)
        return mean + torch.diag_embed(extra.expand_as(diagonal))

    @property
    def dead(self) -> Tensor:
        """(groups, columns): columns that are zero in every sample."""
        assert self.square is not None
        return self.square.diagonal(dim1=-2, dim2=-1) <= 0


@dataclass
class Mean(_Sums):
    """A mean over samples: sum and count."""

    count: Tensor | None = None
    total: Tensor | None = None

    def update(self, total: Tensor, count: Tensor) -> None:
        """total: a sum over `count` samples."""
        self.merge(Mean(_wide(count), _wide(total)))

    @property
    def mean(self) -> Tensor:
        assert self.count is not None and self.total is not None
        return self.total / self.count.clamp_min(1)


@dataclass
class Gradients(_Sums):
    """Sums of a weight's gradient, of its square, and their number: one update per sample."""

    count: Tensor | None = None
    total: Tensor | None = None  # shape of the weight
    square: Tensor | None = None

    def update(self, gradient: Tensor) -> None:
        self.merge(Gradients(torch.ones(()), gradient, gradient.square()))

    @property
    def mean(self) -> Tensor:
        assert self.count is not None and self.total is not None
        return self.total / self.count

    @property
    def mean_square(self) -> Tensor:
        assert self.count is not None and self.square is not None
        return self.square / self.count


@dataclass
class Similarity(_Sums):
    """How little a branch or block turns what passes it: cosine and angle (as a fraction of half a turn) of input and output, per token."""

    count: Tensor | None = None
    cosines: Tensor | None = None
    angles: Tensor | None = None

    def update(self, before: Tensor, after: Tensor) -> None:
        """before, after: (..., channels)."""
        cosine = torch.cosine_similarity(_wide(before), _wide(after), dim=-1).flatten()
        angle = cosine.clamp(-1, 1).arccos() / torch.pi
        self.merge(Similarity(torch.tensor(float(cosine.numel()), dtype=cosine.dtype), cosine.sum(), angle.sum()))

    @property
    def cosine(self) -> float:
        assert self.count is not None and self.cosines is not None
        return float(self.cosines / self.count)

    @property
    def angle(self) -> float:
        assert self.count is not None and self.angles is not None
        return float(self.angles / self.count)
