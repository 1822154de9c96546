"""The proof that comes with every result: the pruned network is the masked network.

Both are run on random inputs, in float64 where affordable, and compared in their outputs and in the results of every node that reads a cut
weight. Errors are measured against the scale of what is compared, and against a noise floor (the effect of a relative perturbation of 2e-16
of every weight). A cut that does not move the output, or a group with a weight to which nothing but zeros comes, is `not tested`, never
passed. Gates that saturate and thresholds that nothing reaches hide a cut, so inputs of other scales are tried before that is said.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from graphprune.errors import InvalidInput, UnsupportedOp
from graphprune.execute.interpreter import run
from graphprune.execute.likeness import distance, floating, random_inputs
from graphprune.program import Program, Value
from graphprune.surgery import Cut, apply_cut
from graphprune.verify.masking import masked, observed, run_masked
from graphprune.verify.sites import Seen, Sites

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest masked output
NOISE = {torch.float64: 2e-16, torch.float32: 1e-7}
FLOOR_FACTOR = 30.0
ILL_CONDITIONED = 1e-6
OUTPUTS = "the outputs"
VISIBLE = 1e-4  # a smaller effect of masking proves nothing
SCALES = (1.0, 0.1, 10.0, 0.01, 100.0)  # of random inputs: gates that saturate, or a threshold that nothing reaches, hide any cut


@dataclass(frozen=True)
class Certificate:
    """What was verified, on which inputs, with which error."""

    status: str  # "passed" | "failed" | "not tested" | "ill-conditioned"
    error: float  # largest |pruned - masked| relative to the largest |masked|, over outputs and nodes that read cut weights
    tolerance: float
    floor: float  # the effect of rounding noise in the weights
    effect: float  # largest |masked - dense| relative to the largest |masked|
    dtype: str
    seeds: tuple[int, ...]
    groups: int
    exact: bool  # all groups are exact; otherwise the stated formula (kept-only statistics) was checked
    plan: str = ""  # hash of the plan
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        errors = f"error {self.error:.1e} (tolerance {self.tolerance:.1e}), effect of the cut {self.effect:.1e}"
        return f"{self.status}: {errors}, {self.groups} groups, {self.dtype}, {len(self.seeds)} inputs"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def certify(
    program: Program,
    pruned: Program,
    cut: Cut,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    dtype: torch.dtype = torch.float64,
    plan_hash: str = "",
    seconds: float = float("inf"),
    zeroed: Mapping[Value, torch.Tensor] | None = None,
) -> Certificate:
    """Compare the pruned program with the masked original on several random inputs; after `seconds` no further input is begun.

    Inputs are drawn at a scale at which the cut moves the output, where there is one.

    Args:
        zeroed: the weights that a plan puts zeros into, as they then are, at their original shapes.

    Raises:
        InvalidInput: there are no seeds.
    """
    if not seeds:
        raise InvalidInput("a cut is proved on at least one random input, found none")
    zeroed = dict(zeroed or {})
    sites = Sites(program, pruned, cut, (*cut.weights, *zeroed))
    network, start, shows = masked(program, cut, dtype, zeroed), time.perf_counter(), bool(cut.removed or zeroed)

    def reference(seed: int, scale: float) -> Run:
        inputs, seen = random_inputs(program, seed, scale), Seen()
        return Run(inputs, network(inputs, sites.masked(seen)), seen)

    def late() -> bool:
        return time.perf_counter() - start > seconds

    try:
        scale, first, effect = _telling(program, seeds[0], dtype, late, reference, shows)
    except UnsupportedOp as why:  # an op that is left alone, and that nothing here can run
        name, exact = str(dtype).removeprefix("torch."), all(cut.analysis.by_name[g].exact.value == "exact" for g in cut.removed)
        return Certificate("not tested", 0.0, TOLERANCE[dtype], 0.0, 0.0, name, (), len(cut.removed), exact, plan_hash, (str(why),))

    def runs() -> Iterator[tuple[int, Run]]:
        """Of the masked network while there is time: the seeds that were asked for, then other scales for groups that nothing reached."""
        yield seeds[0], first
        yield from ((seed, reference(seed, scale)) for seed in seeds[1:] if not late())
        for other in SCALES if effect >= VISIBLE and _floating(first.inputs) else ():
            if other != scale and sites.unreached and not late():
                again = reference(seeds[0], other)
                if all(bool(torch.isfinite(x).all()) for x in floating(again.outputs)):
                    yield seeds[0], again

    errors: dict[str, float] = {}
    done: list[int] = []
    answer = None
    for seed, expected in runs():
        found = _pruned(pruned, expected.inputs, sites, dtype)
        answer = answer or found
        for where, error in {OUTPUTS: distance(found.outputs, expected.outputs), **sites.errors(found.seen, expected.seen)}.items():
            errors[where] = max(errors.get(where, 0.0), error)
        sites.idle -= expected.seen.reached
        done.append(seed)
    assert answer is not None
    error = max(errors.values())
    floor = _floor(program, pruned, cut, dtype, zeroed, sites, first, answer, seed=seeds[0], agrees=error <= TOLERANCE[dtype])
    tolerance = max(TOLERANCE[dtype], FLOOR_FACTOR * floor)
    unreached = sites.unreached
    notes = [f"inputs at {scale:g} times the usual scale, at which the cut does not move the output"] if scale != 1.0 else []
    if not error <= tolerance:
        status = "failed"
        inside = next((where for where, error in errors.items() if where != OUTPUTS and not error <= tolerance), OUTPUTS)
        notes = [f"wrong on its own: {name}" for name in blame(program, cut, dtype, scale=scale)] + [f"first differs at: {inside}"] + notes
    elif floor > ILL_CONDITIONED and dtype is torch.float64:
        status = "ill-conditioned"
    elif shows and not effect >= VISIBLE:
        status = "not tested"
    elif unreached:
        status = "not tested"
        more = f" and {len(unreached) - 3} more groups" if len(unreached) > 3 else ""
        notes.append(
            f"nothing but zeros comes to weights of {', '.join(unreached[:3])}{more} at any of the inputs tried; "
            "an example input that reaches them (more tokens, where experts are chosen) lets them be tested"
        )
    else:
        status = "passed"
    groups = [cut.analysis.by_name[name] for name in cut.removed]
    return Certificate(
        status,
        error,
        tolerance,
        floor,
        effect,
        str(dtype).removeprefix("torch."),
        tuple(done),
        len(groups),
        all(g.exact.value == "exact" for g in groups),
        plan_hash,
        tuple(notes),
    )


@dataclass(frozen=True)
class Run:
    """A network at some inputs: what came out, and what was seen inside."""

    inputs: list[Any]
    outputs: list[Any]
    seen: Seen


def _pruned(
    program: Program, inputs: list[Any], sites: Sites, dtype: torch.dtype, tensors: Mapping[Value, torch.Tensor] | None = None
) -> Run:
    seen = Seen()
    return Run(inputs, run(program, inputs, tensors=tensors, dtype=dtype, intercept=observed(sites.pruned(seen))), seen)


def _telling(
    program: Program, seed: int, dtype: torch.dtype, late: Callable[[], bool], reference: Callable[[int, float], Run], shows: bool
) -> tuple[float, Run, float]:
    """Scale, run of the masked network and effect of the cut, at the first of `SCALES` where it shows, else at the usual one.

    Args:
        reference: runs the masked network on the inputs of a seed at a scale.
        shows: is there anything that could show?
    """
    first, usual = None, None
    for scale in SCALES:
        dense = run(program, random_inputs(program, seed, scale), dtype=dtype)
        if first is not None and usual is not None and distance(dense, usual) == 0.0:
            continue  # not even the inputs move the output: a head of zeros, or a threshold that these do not reach either
        expected = reference(seed, scale)
        found = scale, expected, distance(dense, expected.outputs)
        first, usual = first or found, usual or dense
        if found[-1] >= VISIBLE or not shows:
            return found
        if late() or not _floating(expected.inputs):
            break
    assert first is not None
    return first


def _floating(inputs: Sequence[Any]) -> bool:
    """Can they be scaled?"""
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs)


def _floor(
    program: Program,
    pruned: Program,
    cut: Cut,
    dtype: torch.dtype,
    zeroed: Mapping[Value, torch.Tensor],
    sites: Sites,
    expected: Run,
    answer: Run,
    *,
    seed: int,
    agrees: bool,
) -> float:
    """How far rounding noise in the weights moves what is compared.

    Where the two networks agree to the tolerance anyway, that of the pruned network says it, at a fraction of the cost. Where they do not,
    the floor decides whether that is rounding, and the network under test may have no say: it is that of the masked one.
    """
    noise = torch.Generator().manual_seed(seed)

    def shaken(weights: Iterable[Value], given: Mapping[Value, torch.Tensor]) -> dict[Value, torch.Tensor]:
        tensors = {v: given.get(v, v.tensor) for v in weights if v.is_weight and v.tensor is not None}
        return {v: _shaken(t.to(dtype), noise) for v, t in tensors.items()}  # type: ignore[union-attr]

    if agrees:
        found, steady = _pruned(pruned, answer.inputs, sites, dtype, shaken(pruned.weights.values(), {})), answer
    else:
        seen = Seen()
        network = masked(program, cut, dtype, shaken(program.weights.values(), zeroed))
        found, steady = Run(expected.inputs, network(expected.inputs, sites.masked(seen)), seen), expected
    return max(distance(found.outputs, steady.outputs), *sites.errors(found.seen, steady.seen).values(), 0.0)


def _shaken(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A weight under rounding noise; the generator is on the CPU, whatever the device."""
    noise = torch.randn(tensor.shape, generator=generator).to(tensor)
    return noise.mul_(NOISE[tensor.dtype]).add_(1).mul_(tensor)


def blame(program: Program, cut: Cut, dtype: torch.dtype = torch.float64, limit: int = 3, scale: float = 1.0) -> list[str]:
    """Groups whose cut alone fails, found by bisection; empty when only their combination does."""
    inputs = random_inputs(program, 0, scale)

    def wrong(names: Sequence[str]) -> bool:
        try:
            part = Cut(cut.analysis, {name: cut.removed[name] for name in names})
            expected = run_masked(program, part, inputs, dtype)
            return not distance(run(apply_cut(program, part), inputs, dtype=dtype), expected) <= TOLERANCE[dtype]
        except Exception:  # whatever breaks here broke because of these groups
            return True

    def search(names: Sequence[str]) -> list[str]:
        if not wrong(names):
            return []
        if len(names) == 1:
            return list(names)
        half = len(names) // 2
        return search(names[:half]) + search(names[half:])

    return search(list(cut.removed))[:limit]


def shifted_control(program: Program, pruned: Program, cut: Cut, dtype: torch.dtype = torch.float64, tries: int = 5) -> float:
    """The negative control: the error after one member's kept positions move by one. It must be far above the tolerance, or the certificate
    proves nothing.

    Returns the largest error of `tries` members; nan when no member can be shifted.
    """
    network = masked(program, cut, dtype)

    def reference(seed: int, scale: float) -> Run:
        inputs = random_inputs(program, seed, scale)
        return Run(inputs, network(inputs), Seen())

    _, found, _ = _telling(program, 0, dtype, lambda: False, reference, bool(cut.removed))
    worst = float("nan")
    order = torch.randperm(len(cut.weights), generator=torch.Generator().manual_seed(0)).tolist()
    members = list(cut.weights.items())
    for i in order:
        value, keeps = members[i]
        twin = pruned.weights.get(value.name)
        if twin is None or not value.is_weight or tries == 0:
            continue
        axis, keep = next(iter(keeps.items()))
        moved = (torch.from_numpy(keep) + 1) % value.shape[axis]  # type: ignore[index]
        tensor = value.tensor
        for other, positions in keeps.items():
            tensor = tensor.index_select(other, (moved if other == axis else torch.from_numpy(positions)).to(tensor.device))  # type: ignore[union-attr]
        if torch.equal(tensor, twin.tensor):  # type: ignore[arg-type]
            continue
        tries -= 1
        error = distance(run(pruned, found.inputs, tensors={twin: tensor}, dtype=dtype), found.outputs)
        worst = error if worst != worst else max(worst, error)
    return worst
