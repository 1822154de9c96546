"""Budgets of parameters: which groups lose more, to which widths, and that the result is the fast one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune.allocation import Local, block_of, spread, whole_blocks
from graphprune.api import apply, plan
from graphprune.capture.torch_export import capture_torch
from graphprune.costs import cost
from graphprune.errors import InvalidInput
from graphprune.planning import make_plan
from graphprune.program import Program
from graphprune.surgery import Cut
from tests.randomise import seeded


def tapered(side: int = 16) -> Program:
    """Convolutions on ever smaller maps, then a wide classifier: parameters are at the end, MACs at the beginning."""
    with seeded(0):
        layers: list[nn.Module] = []
        for a, b in ((3, 64), (64, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(256 * (side // 16) ** 2, 512), nn.ReLU(), nn.Linear(512, 10)]
        return capture_torch(nn.Sequential(*layers).eval(), (torch.randn(2, 3, side, side),))


def perceptron() -> Program:
    with seeded(0):
        return capture_torch(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)), (torch.randn(2, 64),))


def lost(program: Program, budget: dict[str, object], **options: object) -> dict[str, float]:
    """Fraction that goes, by group."""
    plan = make_plan(program, budget=budget, **options)  # type: ignore[arg-type]
    return {g.name: len(plan.removed.get(g.name, ())) / g.size for g in program.analysis.groups}


@pytest.mark.parametrize("kept", [0.5, 0.6, 0.7])
@pytest.mark.parametrize("name", ["params", "memory_mb"])
def test_what_is_poor_in_macs_loses_less_and_the_network_is_faster_for_it(name: str, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    program, dense = tapered(), cost(tapered())
    plan = make_plan(program, budget={name: f"{kept:.0%}"}, round_to=1)
    found = cost(program, Cut(program.analysis, plan.removed))
    assert 0.98 * kept < found.params / dense.params <= kept
    assert "lose less than the others" in plan.settings["spread"]
    by_kind = [len(e.removed) / e.size for e in plan.entries.values() if e.kind == "channel"], [
        len(e.removed) / e.size for e in plan.entries.values() if e.kind == "neuron"
    ]
    assert max(by_kind[1], default=0.0) < max(by_kind[0])
    monkeypatch.setattr(spread, "WORTH", 1.0)  # nothing is worth it: all alike
    even = make_plan(program, budget={name: f"{kept:.0%}"}, round_to=1)
    assert even.settings["spread"] == "every group alike"
    assert found.macs < (1 - 0.1) * cost(program, Cut(program.analysis, even.removed)).macs
    alike = max(len(e.removed) / e.size for e in even.entries.values())
    deepest = max(by_kind[0])
    assert deepest <= Local().uneven * alike + 1e-6


def test_the_bound_of_a_spread_buys_speed() -> None:
    program, budget = tapered(), {"params": "80%"}

    def deepest_and_macs(uneven: float) -> tuple[float, float]:
        plan = make_plan(program, budget=budget, round_to=1, scope=Local(uneven=uneven))
        return max(len(e.removed) / e.size for e in plan.entries.values()), cost(program, Cut(program.analysis, plan.removed)).macs

    (alike, _), *spreads = found = [deepest_and_macs(uneven) for uneven in (1, 1.5, 2, 3, float("inf"))]
    assert all(deepest <= uneven * alike + 0.01 for (deepest, _), uneven in zip(spreads, (1.5, 2, 3)))
    macs = [it for _, it in found]
    assert macs == sorted(macs, reverse=True) and macs[2] < 0.9 * macs[0] and macs[-1] < 0.9 * macs[2]
    assert spreads[-1][0] > 2 * alike
    assert lost(program, budget, scope=Local()) == lost(program, budget)


@pytest.mark.parametrize("uneven", [0.9, 0, -1, float("nan"), "2", None, True])
def test_a_bound_below_an_even_cut_is_refused(uneven: object) -> None:
    with pytest.raises(InvalidInput, match="from 1 to inf"):
        Local(uneven=uneven)  # type: ignore[arg-type]


def test_a_network_of_linear_layers_loses_alike() -> None:
    plan = make_plan(perceptron(), budget={"params": "60%"}, round_to=1)
    assert plan.settings["spread"] == "every group alike"
    ratios = [len(e.removed) / e.size for e in plan.entries.values()]
    assert max(ratios) - min(ratios) < 0.02


def test_a_small_cut_is_a_small_cut_everywhere() -> None:
    program, budget = tapered(), {"params": "95%"}
    plan = make_plan(program, budget=budget, round_to=1)
    assert plan.settings["spread"] == "every group alike"
    assert plan.removed == make_plan(program, budget=budget, round_to=1, scope=Local(uneven=1)).removed


@pytest.mark.parametrize("options", [{"scope": "global"}, {"scope": "isomorphic"}, {"budget": {"params": "60%", "macs": "60%"}}])
def test_where_something_else_decides_nothing_is_spread(options: dict[str, object]) -> None:
    assert "spread" not in make_plan(tapered(), **{"budget": {"params": "60%"}, **options}).settings  # type: ignore[arg-type]


def test_a_ratio_is_what_it_is() -> None:
    plan = make_plan(tapered(), pruning_ratio=0.5, round_to=1)
    assert "spread" not in plan.settings and {len(e.removed) / e.size for e in plan.entries.values()} == {0.5}


def test_the_same_plan_every_time_and_the_report_says_which() -> None:
    program = tapered()
    plans = [make_plan(program, budget={"params": "60%"}) for _ in range(2)]
    assert plans[0].hash == plans[1].hash and plans[0].settings == plans[1].settings
    report = apply(program, plans[0]).report
    assert report.spread == plans[0].settings["spread"] and report.spread in str(report).replace("\n", " ")


def test_a_budget_stops_at_whole_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tapered()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert block_of(program) == 16
    plan = make_plan(program, budget={"params": "60%"})
    convolutions = [e for e in plan.entries.values() if e.kind == "channel"]
    assert convolutions and all((e.size - len(e.removed)) % 16 == 0 for e in convolutions)
    assert "of 16 for convolutions" in plan.settings["rounding"]
    assert "of 16" not in make_plan(program, budget={"params": "60%"}, round_to=4).settings["rounding"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert block_of(program) == 8


def test_whole_blocks_do_not_make_a_budget_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 4, 4)]
        program = capture_torch(nn.Sequential(*layers).eval(), (torch.randn(2, 3, 8, 8),))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    plan = make_plan(program, budget={"params": "15%"})  # less than with 16 channels each
    assert cost(program, Cut(program.analysis, plan.removed)).params <= 0.15 * cost(program).params
    assert "of 16" not in plan.settings["rounding"] and "of 16" in make_plan(program, budget={"params": "50%"}).settings["rounding"]


def test_narrow_layers_keep_every_width() -> None:
    program = tapered()
    narrow, wide, neurons = (next(g for g in program.analysis.groups if g.size == size) for size in (64, 128, 512))
    assert whole_blocks(narrow, range(1, 64), 64) == list(range(1, 64))  # not even two blocks
    assert whole_blocks(wide, range(1, 128), 64) == [64]
    assert whole_blocks(wide, [1, 2], 64) == [1, 2]  # no whole block is allowed
    assert whole_blocks(neurons, range(1, 512), 64) == list(range(1, 512))


def test_a_recipe_cuts_every_group_alike_under_a_budget_too():
    """A published method stays what it is: the spread is for plans of one's own."""
    program, budget = tapered(), {"params": "70%"}
    own = plan(program, budget=budget, round_to=1)
    assert "lose less" in own.settings["spread"]
    for recipe, data in (("group_l2", None), ("llm_pruner", [torch.randn(2, 3, 16, 16)])):  # every group alike, and all but the ends
        found = plan(program, budget=budget, round_to=1, recipe=recipe, calibration_data=data, loss=lambda y: y.square().sum())
        assert "spread" not in found.settings
