"""Plans: ratios, budgets, rounding, selection, products of groups, and every refusal."""

import logging
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.allocation import Global, one_per_product, rounding
from graphprune.allocation.allocate import BUDGETS
from graphprune.capture.torch_export import capture_torch
from graphprune.costs import cost
from graphprune.errors import BudgetNotMet, InvalidInput, NothingToPrune
from graphprune.plan import Plan
from graphprune.planning import make_plan
from graphprune.program import Program
from graphprune.report import GroupSummary
from graphprune.report.tables import explanation, inventory, plain
from graphprune.surgery import Cut, apply_cut
from graphprune.units import UNITS
from graphprune.verify.certificate import certify
from tests.zoo import TINY

CUTTABLE = tuple(unit for unit in UNITS if unit != "token")


@cache
def program_of(name: str) -> Program:
    case = TINY[name]()
    return capture_torch(case.module, case.args)


def capture(*layers: nn.Module, inputs: tuple[int, ...] = (2, 5)) -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture_torch(nn.Sequential(*layers), (torch.randn(inputs),))


@pytest.fixture(scope="module")
def mlp() -> Program:
    return program_of("mlp")


def after(program: Program, plan: Plan):
    return cost(program, Cut(program.analysis, plan.removed))


# ---- ratios


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_no_group_loses_more_than_the_ratio_and_the_network_runs(name, ratio):
    program = program_of(name)
    plan = make_plan(program, pruning_ratio=ratio, units=CUTTABLE, round_to=1)
    for group_name, entry in plan.entries.items():
        group = program.analysis.by_name[group_name]
        if group.kind != "layer":
            allowed = min(math.floor(group.size * ratio + 1e-9), group.size - group.min_keep)
            assert len(entry.removed) == allowed
    cut = Cut(program.analysis, plan.removed)
    assert certify(program, apply_cut(program, cut), cut, seeds=(0,)).passed


def test_the_weakest_units_go_and_ties_go_in_order(mlp):
    name = mlp.analysis.groups[0].name
    plan = make_plan(mlp, pruning_ratio={name: 0.25}, importance=lambda g: np.where(np.arange(g.size) % 2, 0.0, 1.0))
    assert plan.removed == {name: tuple(range(1, 20, 2))}


def test_plans_repeat():
    for scope in ("local", "global", "isomorphic"):
        first, second = (make_plan(program_of("densenet"), pruning_ratio=0.4, scope=scope).hash for _ in range(2))
        assert first == second


def test_without_ratio_or_budget_a_quarter_goes_and_one_line_says_so(mlp, caplog):
    with caplog.at_level(logging.WARNING, "graphprune"):
        plan = make_plan(mlp)
    (notice,) = [r.getMessage() for r in caplog.records if r.name == "graphprune"]
    assert notice.startswith("no pruning_ratio or budget is given: 25%")
    assert plan.hash == make_plan(mlp, pruning_ratio=0.25).hash


def test_ratios_by_pattern_the_last_match_counts():
    program = program_of("resnet")
    plan = make_plan(program, pruning_ratio={"body.1": 0.25, "body.1.branch.0.0": 0.5, "body.3.*": 0.0})
    widths = [g for g in program.analysis.groups if g.kind != "layer"]
    by_tensor = {m.tensor: len(plan.removed.get(g.name, ())) for g in widths for m in g.members if m.axis == 0}
    assert by_tensor["body.1.branch.0.0.weight"] == 4, "half of 8"
    assert by_tensor["body.1.branch.1.0.weight"] == 2, "a quarter of 10"
    assert by_tensor["body.2.branch.0.0.weight"] == 0, "no pattern matches"
    plan = make_plan(program, pruning_ratio={"body.1.branch.0.0": 0.0, "*": 0.5})
    assert plan.removed and not any("body.1.branch.0" in name for name in plan.removed)


def test_nothing_asked_nothing_cut(mlp):
    assert make_plan(mlp, pruning_ratio=0.0).removed == {}


# ---- scopes


def test_global_takes_the_lowest_of_all(mlp):
    first, second = mlp.analysis.groups
    plan = make_plan(mlp, pruning_ratio=0.25, scope="global", importance=lambda g: np.arange(g.size) + (100 if g is first else 0))
    assert plan.removed == {second.name: tuple(range((first.size + second.size) // 4))}


def test_global_by_cost_takes_the_expensive_units():
    program = capture(nn.Linear(200, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3), inputs=(2, 200))
    wide, _ = program.analysis.groups
    equal = lambda g: np.ones(g.size)  # noqa: E731
    by_cost = make_plan(program, pruning_ratio=0.5, scope=Global(per="params"), importance=equal)
    assert {wide.name: 29} == {name: len(units) for name, units in by_cost.removed.items()}, "all of them come before the narrow layer's"
    with pytest.raises(InvalidInput, match="no budget is named 'joules'"):
        make_plan(program, pruning_ratio=0.5, scope=Global(per="joules"))


def test_isomorphic_compares_equal_structures_only():
    program = program_of("gqa")
    neurons = [g for g in program.analysis.groups if g.kind == "neuron"]
    others = [g for g in program.analysis.groups if g.kind == "kv_group"]
    scores = {neurons[0].name: 0.0, neurons[1].name: 10.0, others[0].name: 1e6, others[1].name: 2e6}
    rising = lambda g: scores.get(g.name, 0.0) + np.arange(g.size) / g.size  # noqa: E731
    plan = make_plan(program, pruning_ratio=0.25, scope="isomorphic", round_to=1, importance=rising)
    assert plan.removed == {neurons[0].name: tuple(range(35)), others[0].name: (0,)}


# ---- budgets

BUDGET_CASES = [
    ({"params": "60%"}, "local"),
    ({"macs": "50%"}, "global"),
    ({"memory_mb": "70%"}, "isomorphic"),
    ({"params": 0.7, "macs": "55%"}, "global"),
]


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "densenet", "mobilenet", "shufflenet", "unet", "vit", "gqa"])
@pytest.mark.parametrize("budget, scope", BUDGET_CASES)
def test_budgets_hold_and_would_not_with_one_unit_more(name, budget, scope):
    program = program_of(name)
    dense = cost(program)
    plan = make_plan(program, budget=budget, scope=scope, round_to=1)
    limits = {key: BUDGETS[key](dense) * (float(v[:-1]) / 100 if isinstance(v, str) else v) for key, v in budget.items()}

    def met(removed) -> bool:
        found = cost(program, Cut(program.analysis, removed))
        return all(BUDGETS[key](found) <= limit for key, limit in limits.items())

    assert plan.removed and met(plan.removed)
    for group, units in plan.removed.items():
        assert not met({**plan.removed, group: units[:-1]}), f"a unit of {group} fits as well"


def test_the_best_units_come_back_first(mlp):
    plan = make_plan(mlp, budget={"params": "60%"}, importance=lambda g: np.arange(g.size), round_to=1)
    assert all(units == tuple(range(len(units))) for units in plan.removed.values())


def test_absolute_budgets(mlp):
    dense = cost(mlp)
    plan = make_plan(mlp, budget={"params": 1000, "memory_mb": 0.006})
    assert after(mlp, plan).params <= 1000 and after(mlp, plan).bytes <= 6000
    assert after(mlp, make_plan(mlp, budget={"macs": dense.macs // 2})).macs <= dense.macs // 2


def test_a_budget_that_is_met_removes_nothing(mlp, caplog):
    with caplog.at_level(logging.WARNING, "graphprune"):
        assert make_plan(mlp, budget={"params": "100%"}).removed == {}
    assert any("met by the network as it is" in r.getMessage() for r in caplog.records)


def test_the_ratio_is_the_most_that_a_group_loses_under_a_budget(mlp):
    plan = make_plan(mlp, budget={"params": "60%"}, pruning_ratio=0.45, scope="global")
    assert after(mlp, plan).params <= 0.6 * cost(mlp).params
    assert all(len(e.removed) <= 0.45 * e.size for e in plan.entries.values())
    with pytest.raises(BudgetNotMet, match=r"params 393 of 1,967 was asked for, [\d,]+ is the smallest") as error:
        make_plan(mlp, budget={"params": "20%"}, pruning_ratio=0.45)
    assert error.value.exit_code == 4
    smallest = after(mlp, make_plan(mlp, pruning_ratio=0.45)).params
    assert f"{smallest:,} is the smallest" in str(error.value)


def test_branches_count_towards_a_budget():
    program = program_of("resnet")
    plan = make_plan(program, budget={"macs": "70%"}, units=("layer",))
    removed = dict(plan.removed)
    assert removed and after(program, plan).macs <= 0.7 * cost(program).macs
    for name in removed:
        fewer = {k: v for k, v in removed.items() if k != name}
        assert cost(program, Cut(program.analysis, fewer)).macs > 0.7 * cost(program).macs


# ---- rounding and what must stay


@pytest.mark.parametrize("width, ratio, kept", [(64, 0.3, 48), (100, 0.5, 56), (63, 0.5, 32), (128, 0.5, 64), (66, 0.01, 66)])
def test_auto_keeps_multiples_of_eight_of_wide_layers(width, ratio, kept):
    program = capture(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
    if kept == width:
        with pytest.raises(NothingToPrune, match=r"leave no unit to remove.*multiples of 8.*round_to=1 keeps any number"):
            make_plan(program, pruning_ratio=ratio)
    else:
        (units,) = make_plan(program, pruning_ratio=ratio).removed.values()
        assert width - len(units) == kept


def test_rounding_counts_positions():
    """Flattened maps of 9 positions give the reader a multiple of 8 only with 8 channels at a time; a head of 16 is one already."""
    program = capture(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 9, 4), inputs=(2, 3, 5, 5))
    (group,) = program.analysis.groups
    assert {m.index.shape[1] for m in group.members} == {1, 9}
    assert rounding(group, "auto") == 8 and rounding(group, 12) == 12 and rounding(group, 1) == 1
    heads = next(g for g in program_of("vit").analysis.groups if g.kind == "head")
    width = max(m.index.shape[1] for m in heads.members)
    assert rounding(heads, 9) == 1 and width % 9 == 0


def test_grouped_convolutions_are_not_rounded_and_cut_inside_their_groups():
    layers = nn.Conv2d(3, 128, 1), nn.Conv2d(128, 128, 3, groups=16), nn.Conv2d(128, 5, 1)
    program = capture(*layers, inputs=(2, 3, 6, 6))
    outer = next(g for g in program.analysis.groups if g.size == 16)
    inner = [g for g in program.analysis.groups if g.size == 8]
    assert len(inner) == 2 and [rounding(g, "auto") for g in inner] == [1, 1]
    plan = make_plan(program, pruning_ratio=0.5)
    assert {name: len(units) for name, units in plan.removed.items()} == {g.name: 4 for g in inner}
    coarse = make_plan(program, pruning_ratio=0.1)
    assert list(coarse.removed) == [outer.name], "an eighth of 8 is more than the ratio, one of 16 is not"


def test_fixed_rounding_and_its_refusals(mlp):
    kept = {e.size - len(e.removed) for e in make_plan(mlp, pruning_ratio=0.5, round_to=10).entries.values()}
    assert kept == {20}
    for wrong in (0, "eight", 2.5, True):
        with pytest.raises(InvalidInput, match="round_to is 'auto' or a positive number"):
            make_plan(mlp, pruning_ratio=0.5, round_to=wrong)


def test_min_keep_and_top_k():
    program = program_of("moe")
    plan = make_plan(program, pruning_ratio=0.95, units=("expert", "head"), min_keep=2)
    for entry in plan.entries.values():
        assert entry.size - len(entry.removed) == (3 if entry.kind == "expert" else 2)
    with pytest.raises(InvalidInput, match="min_keep is a number of units"):
        make_plan(program, min_keep=0)


def test_a_top_k_over_a_product_keeps_enough():
    class Routed(nn.Module):
        """Experts in 3 routing groups of 4: 5 of the 12 are chosen."""

        def __init__(self) -> None:
            super().__init__()
            self.scores, self.experts = nn.Linear(6, 12), nn.Linear(6, 12)

        def forward(self, x):
            s = (self.scores(x).unflatten(-1, (3, 4)) * 1.0).flatten(-2)
            chosen = torch.topk(s, 5, dim=-1)
            mask = torch.zeros_like(s).scatter(-1, chosen.indices, 1.0)
            return (self.experts(x) * mask).sum(-1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = capture_torch(Routed(), (torch.randn(7, 6),))
    product = [axis for axis, _, _ in program.analysis.engine.limits]
    groups = [g for g in program.analysis.groups if g.size in (3, 4)]
    if not groups:
        pytest.skip("the scatter freezes the axis, so no product limit arises")
    assert product
    plan = make_plan(program, pruning_ratio=0.8, units=CUTTABLE)
    kept = math.prod(g.size - len(plan.removed.get(g.name, ())) for g in groups)
    assert kept >= 5


def test_of_groups_that_multiply_one_is_cut():
    program = program_of("gqa")
    plan = make_plan(program, pruning_ratio=0.5)
    assert {e.kind for e in plan.entries.values()} == {"kv_group", "neuron"}
    plan = make_plan(program, pruning_ratio=0.34, round_to=1)
    assert {e.kind for e in plan.entries.values()} == {"head", "neuron"}, "a third of two groups is none, of three heads it is one"
    heads = [g for g in program.analysis.groups if g.kind in ("head", "kv_group", "head_dim")]
    kept = one_per_product(program.analysis, heads)
    for value in {m.value for g in heads for m in g.members}:
        for axis in range(value.tensor.dim()):
            along = [g for g in kept if any(m.value is value and m.axis == axis for m in g.members)]
            assert len(along) <= 1


def test_experts_and_their_neurons_are_cut_together():
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up, self.down = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 6))

        def forward(self, x):
            gate = self.router(x).softmax(-1).t()[:, :, None]
            return (torch.bmm(torch.relu(torch.bmm(x.expand(4, -1, -1), self.up)), self.down) * gate).sum(0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = capture_torch(Stacked(), (torch.randn(5, 6),))
    plan = make_plan(program, pruning_ratio=0.5, units=CUTTABLE)
    assert sorted(e.size for e in plan.entries.values()) == [4, 10]


# ---- selection


def test_ignore_leaves_a_module_as_it_is():
    program = program_of("resnet")
    cut = Cut(program.analysis, make_plan(program, pruning_ratio=0.5, ignore=["body.1.branch"]).removed)
    changed = {v.name for v in cut.weights}
    assert changed and not any(name.startswith("body.1.branch") for name in changed)


@pytest.mark.parametrize("end", ["", ".weight", ":channel", ".*", "re"])
def test_targets_cut_what_a_layer_produces(end):
    pattern = r"re:body\.2\.branch\.1\.0" if end == "re" else "body.2.branch.1.0" + end
    program = program_of("resnet")
    plan = make_plan(program, pruning_ratio=0.5, targets=[pattern])
    assert list(plan.removed) == ["body.2.branch.1.0:channel"]


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time, whose frequencies the code makes, through a small network."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, time):
        angles = time[:, None] * torch.exp(-torch.arange(6) / 6)
        return self.down(torch.relu(self.up(torch.cat([angles.sin(), angles.cos()], -1))))


def test_an_axis_that_constants_make_is_cut_only_where_it_is_named():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = capture_torch(TimeEmbedding(), (torch.tensor([0.5, 7.0]),))
    hidden, made = "up:neuron", "up:neuron.2"
    assert program.analysis.by_name[made].spared and not program.analysis.by_name[hidden].spared
    assert [m.tensor for m in program.analysis.by_name[made].members] == ["up.weight"]
    for given in ({"pruning_ratio": 0.5}, {"pruning_ratio": {"*": 0.5}}, {"budget": {"params": "80%"}}, {"pruning_ratio": 0.5, "targets": ["up"]}):
        assert list(make_plan(program, **given).removed) == [hidden]
    for given in ({"pruning_ratio": 0.5, "targets": [made]}, {"pruning_ratio": {made: 0.5}}, {"pruning_ratio": 0.5, "targets": ["*:neuron.2"]}):
        plan = make_plan(program, **given)
        assert list(plan.removed) == [made]
    cut = Cut(program.analysis, plan.removed)
    assert certify(program, apply_cut(program, cut), cut, seeds=(0,)).passed
    with pytest.raises(NothingToPrune, match="no weight makes it, constants in the code do; cut only where targets"):
        make_plan(program, pruning_ratio=0.5, ignore=["down"])
    (kept,) = [row for row in explanation(program.explain("up.weight")) if row["axis"] == 1]
    assert kept["prunable"] and "constants in the code do" in kept["why"]
    shown = plain(inventory([GroupSummary.of(group) for group in program.groups], ()))
    assert " ".join(shown.split()).count("cut only where targets or") == 1


def test_op_patterns_know_both_dialects():
    program = program_of("vgg")
    kinds = {g.name: g.kind for g in program.analysis.groups}
    for pattern in ("op:Conv", "op:conv2d"):
        assert {kinds[name] for name in make_plan(program, pruning_ratio=0.5, targets=pattern).removed} == {"channel"}
    with pytest.raises(NothingToPrune, match="ignore covers all"):
        make_plan(program, pruning_ratio=0.5, ignore=["op:linear", "op:conv2d"])
    with pytest.raises(InvalidInput, match="close ops: op:conv2d"):
        make_plan(program, ignore=["op:konv2d"])


def test_tied_names_are_known():
    program = program_of("tied")
    alias, name = next(iter(program.aliases.items()))
    with_alias = make_plan(program, pruning_ratio=0.5, units="hidden", targets=[alias.rpartition(".")[0]])
    assert with_alias.removed == make_plan(program, pruning_ratio=0.5, units="hidden", targets=[name]).removed != {}


@pytest.mark.parametrize("argument", ["ignore", "targets", "pruning_ratio"])
def test_unknown_names_are_refused_with_close_ones(argument):
    program = program_of("resnet")
    value = {"body.1.brunch": 0.5} if argument == "pruning_ratio" else ["body.1.brunch"]
    with pytest.raises(InvalidInput, match=r"matches 'body.1.brunch'; close names: body.1.branch"):
        make_plan(program, **{argument: value})
    with pytest.raises(InvalidInput, match="is not a regular expression"):
        make_plan(program, ignore=["re:("])


# ---- refusals


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"pruning_ratio": 1.2}, "at least 0 and less than 1, found 1.2"),
        ({"pruning_ratio": 1.0}, "less than 1"),
        ({"pruning_ratio": -0.1}, "at least 0"),
        ({"pruning_ratio": "half"}, "found 'half'"),
        ({"pruning_ratio": {"0": 2}}, "of '0' is the fraction"),
        ({"units": "chanel"}, "known kinds are channel, neuron"),
        ({"units": ()}, "units is empty"),
        ({"units": "token"}, "token axes are found, but cutting them is not implemented yet"),
        ({"units": "kv"}, "cannot be cut yet"),
        ({"scope": "galactic"}, "known are local, global, isomorphic"),
        ({"scope": 3}, "found int"),
        ({"budget": {"watts": "5%"}}, "no budget is named 'watts'; known are params, macs, memory_mb"),
        ({"budget": {"params": "half"}}, "is not an amount"),
        ({"budget": {"params": "120%"}}, "at most 100%"),
        ({"budget": {"params": 0}}, "more than zero"),
        ({"budget": {}}, "budget says what is kept"),
        ({"budget": "60%"}, "budget says what is kept"),
        ({"budget": {"params": "1%"}}, "the budget cannot be met"),
        ({"remove": {"nowhere": [0]}}, "nowhere"),
    ],
)
def test_wrong_arguments(mlp, arguments, words):
    error = BudgetNotMet if "cannot be met" in words else InvalidInput
    with pytest.raises(error, match=words):
        make_plan(mlp, **arguments)


def test_nothing_to_prune_says_why():
    frozen = capture(nn.Linear(5, 7))
    with pytest.raises(NothingToPrune, match=r"frozen: it is an axis of a model (input|output) \(\d+\); it is an axis of a model") as error:
        make_plan(frozen)
    assert error.value.exit_code == 3
    with pytest.raises(NothingToPrune, match="groups found: 2 neuron; none is of the kinds in units"):
        make_plan(program_of("mlp"), units="channel")
    with pytest.raises(NothingToPrune, match="targets names none that units allows"):
        make_plan(program_of("mlp"), targets=["5"])


def test_default_units_give_way_where_there_are_none(caplog):
    class Residual(nn.Sequential):
        def forward(self, x):
            first, norm, mix, last = self
            x = first(x)
            return last(norm(x + mix(norm(x))))

    program = capture(Residual(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)))
    assert {g.kind for g in program.analysis.groups} == {"hidden", "layer"}
    plan = make_plan(program, pruning_ratio=0.5)
    assert {program.analysis.by_name[name].kind for name in plan.removed} == {"hidden"}
    assert "no group of the default units; those of kind hidden are cut" in caplog.text
    with pytest.raises(NothingToPrune, match="none is of the kinds in units"):
        make_plan(program, units=("neuron", "channel"))


def test_explicit_units_and_settings(mlp):
    name = mlp.analysis.groups[0].name
    assert make_plan(mlp, remove={name: [3, 1]}, repair=("bn",)).removed == {name: (1, 3)}
    plan = make_plan(mlp, pruning_ratio=0.5, importance="lamp", repair=("bias",), seed=7)
    assert plan.repair == ("bias",)
    assert plan.settings["importance"] == "lamp" and plan.settings["seed"] == 7 and plan.settings["pruning_ratio"] == 0.5


def test_one_name_is_a_list_of_one():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    options = {"pruning_ratio": 0.5, "round_to": 1}
    named = gp.compile(net, torch.randn(2, 8), units="neuron", ignore="0", repair="bn", **options)
    assert named.plan.removed == gp.compile(net, torch.randn(2, 8), units=["neuron"], ignore=["0"], repair=["bn"], **options).plan.removed
    assert named.module[0].out_features == 16 and named.module[2].out_features == 8 and named.plan.repair == ("bn",)


def test_what_is_made_in_inference_mode_can_be_trained():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(2, 8)
    with torch.inference_mode():
        results = [gp.compile(net, x, pruning_ratio=0.5), gp.apply(net, gp.plan(net, x, pruning_ratio=0.5), x)]
    for result in results:
        result.module(x).sum().backward()
        assert all(p.grad is not None for p in result.module.parameters())
