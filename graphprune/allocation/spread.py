"""Under a budget of sizes, which groups lose more than others, and to which widths: of networks with equally many parameters, a fast one.

A parameter of an early convolution is used at every place of a large map, one of a classifier once. So under a budget that asks for
parameters or bytes alone, groups with few MACs per parameter lose less, and the others, all alike, so much more. How much less follows one
curve, `pace = min(1, MACs per parameter / ceiling) ** steepness`; of all ceilings and steepnesses the one that leaves the fewest MACs is
taken under which no group loses more than `Local.uneven` times what an even spread would take: accuracy pays for what groups lose, and more
than in proportion. A spread that saves less than `WORTH` of the MACs is not worth it: all lose alike, as in networks of linear layers.

Convolutions on a CPU work on blocks of channels, in PyTorch and in ONNX Runtime: 40 channels take as long as 48 where a vector holds 16
numbers. Widths between blocks cost weights and save no time, so a budget does not stop there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from graphprune.allocation.allocate import Candidate, Local, Scope, Steps, kept_of, limits_of, shortest, unit_cost, within
from graphprune.allocation.limits import in_grouped_convolution
from graphprune.analysis import Analysis
from graphprune.branches import Branch
from graphprune.costs import CostModel
from graphprune.program import Program
from graphprune.units import Group

CEILINGS = 24  # tried, evenly spaced in the logarithm
FINALISTS = 6  # are filled up to the budget and compared
STEEPNESSES = (0.25, 0.5, 1, 4)  # from gradual to nearly a threshold
WORTH = 0.1  # of the MACs

_SLACK = 1e-9


def fastest(
    analysis: Analysis, candidates: Sequence[Candidate], scope: Scope, budget: Mapping[str, Any] | None
) -> tuple[list[Candidate], str]:
    """The candidates with the pace at which each loses, and one line that says so; unchanged where something else decides.

    Something else decides where the budget names MACs, where the scope lets groups compete or lose alike, and where a recipe paces them.

    Raises:
        BudgetNotMet: the smallest network that the candidates allow costs more.
    """
    given = list(candidates)
    if not budget or "macs" in budget or not isinstance(scope, Local) or scope.uneven == 1 or any(c.pace != 1.0 for c in given):
        return given, ""
    model = CostModel(analysis)
    limits, price = limits_of(budget, model.cost({})), unit_cost(model)
    costs = [price(c.group) for c in given]
    density = np.array([cost.macs / max(cost.params, 1) for cost in costs])
    given = [replace(c, density=float(d)) for c, d in zip(given, density)]
    even = Steps(analysis, candidates, scope, price)
    count = shortest(model, even, limits)
    sliced = np.array([not isinstance(c.group.atom, Branch) for c in given])
    if not count or not density[sliced].any():
        return given, ""
    bound = scope.uneven * even[count - 1].turn + _SLACK
    found = density[sliced & (density > 0)]
    spreads: list[tuple[float, float, Steps]] = []  # MACs left, ceiling
    for ceiling in np.geomspace(found.min(), found.max(), CEILINGS):
        for steepness in STEEPNESSES:
            pace = np.where(sliced, np.minimum(1.0, density / ceiling) ** steepness, 1.0)
            steps = Steps(analysis, [replace(c, pace=max(float(p), _SLACK)) for c, p in zip(given, pace)], scope, price)
            count = shortest(model, steps, limits)
            if steps[count - 1].turn <= bound:
                spreads.append((model.cost(steps.kept(count)).macs, float(ceiling), steps))

    def filled(steps: Steps) -> int:
        return model.cost(kept_of(given, within(model, steps, limits))).macs

    finalists = [(filled(steps), ceiling, steps) for _, ceiling, steps in sorted(spreads, key=lambda it: it[:2])[:FINALISTS]]
    macs, ceiling, steps = min(finalists, key=lambda it: it[:2], default=(0, 0.0, even))
    slow = sum(c.pace < 1 for c in steps.candidates)
    if not slow or macs > (1 - WORTH) * filled(even):
        return list(candidates), "every group alike"
    least = f"those with fewer than {ceiling:.0f} MACs per parameter"
    return list(steps.candidates), f"{slow} of {len(given)} groups lose less than the others, {least}, for speed"


def block_of(program: Program) -> int:
    """The channels that a convolution works on at a time where the weights lie; 1 on other devices than a CPU."""
    device = next((v.tensor.device for v in program.weights.values() if v.is_weight and v.tensor is not None), None)
    if device is None or device.type != "cpu":
        return 1
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def whole_blocks(group: Group, removals: Sequence[int], block: int) -> list[int]:
    """Of the removals those that leave convolutions whole blocks of channels, where they have several; all where none would be left."""
    step = 1
    for member in group.members:
        width = member.index.shape[1]
        convolution = any("onv" in node.op_type for node in member.value.uses) and not in_grouped_convolution(member.value)
        if convolution and group.size * width >= 2 * block:
            step = math.lcm(step, block // math.gcd(block, width))
    return [count for count in removals if (group.size - count) % step == 0] or list(removals)
