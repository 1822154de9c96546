"""Brute force for dim rules: remove a unit, run the op, compare with the masked op. Truth is what the op computes, not its rule.

A program of one op or a few is analysed with free borders, so that its inputs are members of groups like weights. For every group and
some of its units: the program on inputs sliced at the kept positions (with the literals that surgery recomputes) must equal the program
on inputs zeroed there (with the neutral elements of masking), at the kept positions of every output. Wrong rules and rules that are
merely too cautious are reported apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from graphprune import axes as ax
from graphprune.analysis import Analysis, analyze
from graphprune.execute.interpreter import run
from graphprune.program import Kind, Program, Value
from graphprune.surgery.cut import Cut
from graphprune.surgery.torch_graph import apply_cut
from graphprune.units import Exactness, Group
from graphprune.verify.masking import run_masked

TOLERANCE = 1e-9  # relative to the largest entry, in float64
Apply = Callable[[Program, Cut], Program]
Keeps = Mapping[Value, Mapping[int, np.ndarray]]  # input -> axis -> kept positions


class Verdict(Enum):
    """What a check found; the first four are errors, the rest is information."""

    WRONG = "pruned and masked disagree"
    BROKEN = "the pruned or the masked program does not run"
    ALIVE = "the result is said to vanish along the axis, and does not"
    BLIND = "a member shifted by one position goes unnoticed"
    CAUTIOUS = "flagged approximate, or not vanishing, and yet it is not"
    MISSING = "frozen, although removing a position gives the right result"


ERRORS = frozenset((Verdict.WRONG, Verdict.BROKEN, Verdict.ALIVE, Verdict.BLIND))


@dataclass(frozen=True)
class Finding:
    """One thing that a rule gets wrong, or could do better."""

    verdict: Verdict
    group: str  # a group, or "input[axis]" of a frozen axis
    detail: str = ""

    @property
    def is_error(self) -> bool:
        return self.verdict in ERRORS

    def __str__(self) -> str:
        return f"{self.group}: {self.verdict.value}" + (f" ({self.detail})" if self.detail else "")


def check_program(program: Program, apply: Apply = apply_cut) -> list[Finding]:
    """Check every group of a small program against brute force, in float64 on its example inputs.

    Args:
        apply: surgery of the program's dialect.
    """
    analysis = analyze(program, free_border=True)
    dense = run(program, program.example_inputs, dtype=torch.float64)
    found = [finding for group in analysis.groups for finding in _check_group(program, analysis, group, apply)]
    return found + list(_missing(program, analysis, dense))


def _check_group(program: Program, analysis: Analysis, group: Group, apply: Apply) -> Iterator[Finding]:
    inputs = program.example_inputs
    dense = run(program, inputs, dtype=torch.float64)
    equal, silent = True, {v: True for v in program.outputs}
    seen = not any(m.value.kind is Kind.INPUT for m in group.members)
    visible = any(group.atom in ax.leaves_of(axis) for value in program.outputs for axis in analysis.axes(value) or ())
    for unit in sorted({0, group.size // 2, group.size - 1}):
        if group.size - 1 < group.min_keep:
            return
        cut = Cut(analysis, {group.name: [unit]})
        shifted = Cut(analysis, {group.name: [(unit + 1) % group.size]})
        keeps = {v: cut.keeps(v) for v in program.inputs}
        try:
            pruned = apply(program, cut)
            outputs = _renumbered(program, cut, run(pruned, sliced(program, inputs, keeps), dtype=torch.float64))
            masked = run_masked(program, cut, zeroed(program, inputs, keeps), torch.float64)
        except Exception as error:  # whatever the op raises is the finding
            yield Finding(
                Verdict.BROKEN,
                group.name,
                f"unit {unit}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            )
            return
        differs = difference(program, cut, outputs, masked)
        equal &= differs is None
        visible |= difference(program, cut, _at_kept(program, cut, dense), masked) is not None
        if differs is not None and group.exact is not Exactness.APPROXIMATE:
            yield Finding(Verdict.WRONG, group.name, f"unit {unit}: {differs}")
        for value, output in zip(program.outputs, masked):
            vanishes = _vanishes(cut, value, output)
            if vanishes is None:
                continue
            silent[value] &= vanishes
            if not vanishes and group.atom in analysis.vanish.get(value, ()):
                yield Finding(Verdict.ALIVE, group.name, f"unit {unit}, output {value.name}")
        for victim in [v for v in program.inputs if keeps[v] and not seen]:
            try:
                moved = run(pruned, sliced(program, inputs, {**keeps, victim: shifted.keeps(victim)}), dtype=torch.float64)
                seen = difference(program, cut, _renumbered(program, cut, moved), masked) is not None
            except Exception:  # noticed in its own way
                seen = True
    if visible and not seen:
        yield Finding(Verdict.BLIND, group.name)
    if equal and group.exact is Exactness.APPROXIMATE:
        yield Finding(Verdict.CAUTIOUS, group.name, f"flagged approximate at {group.note}")
    for value in program.outputs:
        lies_along = any(group.atom in ax.leaves_of(axis) for axis in analysis.axes(value) or ())
        if (
            lies_along
            and value.dtype is not None
            and value.dtype.is_floating_point
            and silent[value]
            and group.atom not in analysis.vanish.get(value, ())
        ):
            yield Finding(Verdict.CAUTIOUS, group.name, f"output {value.name} vanishes")


def sliced(program: Program, inputs: Sequence[Any], keeps: Keeps) -> list[Any]:
    """Inputs at the kept positions."""
    out = list(inputs)
    for i, value in enumerate(program.inputs):
        for axis, keep in keeps.get(value, {}).items():
            out[i] = out[i].index_select(axis, torch.from_numpy(keep))
    return out


def zeroed(program: Program, inputs: Sequence[Any], keeps: Keeps) -> list[Any]:
    """Floating-point inputs, zero where nothing is kept."""
    out = list(inputs)
    for i, value in enumerate(program.inputs):
        for axis, keep in keeps.get(value, {}).items():
            if out[i].is_floating_point():
                gone = torch.ones(out[i].shape[axis], dtype=torch.bool)
                gone[torch.from_numpy(keep)] = False
                out[i] = out[i].index_fill(axis, gone.nonzero().flatten(), 0.0)
    return out


def difference(program: Program, cut: Cut, pruned: Sequence[Any], masked: Sequence[Any]) -> str | None:
    """Where the pruned outputs differ from the masked ones at the kept positions; None when nowhere."""
    for value, a, b in zip(program.outputs, pruned, _at_kept(program, cut, masked)):
        if not isinstance(b, torch.Tensor):
            if a != b:
                return f"output {value.name} is {a}, expected {b}"
            continue
        if a.shape != b.shape:
            return f"output {value.name} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if not close(a, b):
            error = (a.double() - b.double()).abs().nan_to_num().max().item() if not a.is_complex() else (a - b).abs().max().item()
            return f"output {value.name} differs by {error:.2g}"
    return None


def _renumbered(program: Program, cut: Cut, outputs: Sequence[Any]) -> list[Any]:
    """Pruned outputs with indices of a cut axis in the old numbering."""
    out = list(outputs)
    for i, value in enumerate(program.outputs):
        axis = cut.analysis.engine.indexes.get(value)
        stays = cut.mask(axis) if axis is not None else None
        if stays is not None and not out[i].is_floating_point():
            out[i] = torch.from_numpy(np.flatnonzero(stays))[out[i]]
    return out


def _at_kept(program: Program, cut: Cut, outputs: Sequence[Any]) -> list[Any]:
    out = list(outputs)
    for i, value in enumerate(program.outputs):
        for axis, keep in cut.keeps(value).items():
            out[i] = out[i].index_select(axis, torch.from_numpy(keep))
    return out


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding in float64, relative to the largest entry; exactly for integers."""
    if a.shape != b.shape:
        return False
    if not (b.is_floating_point() or b.is_complex()):
        return torch.equal(a, b)
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    scale = b[finite].abs().max().clamp_min(1e-30) if finite.any() else 1.0
    return bool(((a[finite] - b[finite]).abs() <= TOLERANCE * scale).all())


def _vanishes(cut: Cut, value: Value, output: Any) -> bool | None:
    """Is a masked output zero at the positions that are removed? None where none are."""
    keeps = cut.keeps(value)
    if not keeps or not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return None
    for axis, keep in keeps.items():
        gone = np.setdiff1d(np.arange(output.shape[axis]), keep)
        if output.index_select(axis, torch.from_numpy(gone)).count_nonzero():
            return False
    return True


# ---- what is frozen and need not be

_UNSAFE = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))  # torch reads beyond operands whose sizes do not fit


def _missing(program: Program, analysis: Analysis, dense: Sequence[Any]) -> Iterator[Finding]:
    """Frozen factors that could go: the untouched program on sliced inputs gives a part of the dense or of the masked result."""
    if any(node.op_type in _UNSAFE for node in program.nodes):
        return
    frozen = {
        leaf: (v, axis)
        for v in reversed(program.inputs)
        for axis, dim in enumerate(analysis.axes(v) or ())
        for leaf in ax.leaves_of(dim)
        if leaf.frozen is not None
    }
    for leaf, (value, axis) in frozen.items():
        keeps = {
            v: {a: k for a, dim in enumerate(analysis.axes(v) or ()) if len(k := _without(dim, leaf)) < ax.size(dim)}
            for v in program.inputs
        }
        try:
            outputs = run(program, sliced(program, program.example_inputs, keeps), dtype=torch.float64)
            masked = run(program, zeroed(program, program.example_inputs, keeps), dtype=torch.float64)
        except Exception:  # the op does not take another size as it stands
            continue
        if all(_part(a, b) or _part(a, c) for a, b, c in zip(outputs, dense, masked)):
            yield Finding(Verdict.MISSING, f"{value.name}[{axis}]", f"frozen: {leaf.frozen}")


def _without(dim: ax.Axis, leaf: ax.Factor) -> np.ndarray:
    rows = ax.index(dim).get(leaf)
    return np.arange(ax.size(dim)) if rows is None else np.setdiff1d(np.arange(ax.size(dim)), rows[leaf.size // 2])


def _part(small: Any, large: Any) -> bool:
    """Is `small` equal to `large`, or to `large` without some positions of one axis?"""
    if not isinstance(small, torch.Tensor):
        return bool(small == large)
    if small.shape == large.shape:
        return close(small, large)
    shorter = [axis for axis, (m, n) in enumerate(zip(small.shape, large.shape)) if m != n]
    if len(small.shape) != len(large.shape) or len(shorter) != 1 or small.shape[shorter[0]] > large.shape[shorter[0]]:
        return False
    rest = iter(large.unbind(shorter[0]))
    return all(any(close(row, other) for other in rest) for row in small.unbind(shorter[0]))
