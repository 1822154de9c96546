"""Depth: how much a branch or block turns the stream, and the recipes that remove those that turn it least."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.blocks import named_blocks, stages
from graphprune.calibration import Similarity, Statistics
from graphprune.errors import BudgetNotMet, InvalidInput
from graphprune.importance.depth import angular_distance, block_influence
from graphprune.planning import make_plan
from graphprune.recipes import RECIPES
from graphprune.report import GroupSummary
from graphprune.report.tables import inventory, plain
from graphprune.verify.candidates import Masked
from tests.randomise import seeded
from tests.zoo import TINY, Decoder, SwiGLU


def decoder(layers: int = 5, faint: dict[int, float] | None = None) -> tuple[nn.Module, list[Tensor]]:
    """A decoder whose blocks named in `faint` add that much of what they compute."""
    with seeded(0):
        model = Decoder(lambda hidden: SwiGLU(hidden, 50), layers=layers).eval()
        data = [torch.randint(0, 61, (2, 9)) for _ in range(3)]
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            scale = (faint or {}).get(i, 3.0)
            for weight in (block.attention.o.weight, block.mlp.down.weight):
                weight.mul_(scale)
    return model, data


def blocks_gone(result) -> set[int]:
    return {int(name.split(".")[1]) for name in result.plan.entries}


# ---- scores


def test_an_angle_is_a_fraction_of_half_a_turn():
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.9, math.sqrt(1 - 0.81)]], dtype=torch.float64)
    found = Similarity()
    found.update(a, b)
    assert found.angle == pytest.approx(0.143566, abs=1e-6) and found.cosine == pytest.approx(0.9)


def test_influence_and_angle_of_branches_are_those_of_hooks():
    model, data = decoder(3)
    seen: dict[str, list[Tensor]] = {}

    def hook(name):
        return lambda module, args, output: seen.setdefault(name, []).append((args[0], output))

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(hook(i))
    with torch.no_grad():
        for ids in data:
            model(ids)
    program = gp.capture(model, data[0])
    statistics = Statistics(program, data)
    for stage, i in zip(stages(program), range(3)):
        cosine = torch.cat([torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in seen[i][: len(data)]])
        assert statistics.observed("stages")[stage.end].cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
    for group in (g for g in program.groups if g.kind == "layer"):
        influence, angle = block_influence.score(group, statistics), angular_distance.score(group, statistics)
        assert influence.shape == (1,) and 0 < float(influence) < 2 and 0 < float(angle) < 1


def test_a_score_of_branches_is_of_nothing_else():
    model, data = decoder(2)
    program = gp.capture(model, data[0])
    group = next(g for g in program.groups if g.kind == "neuron")
    with pytest.raises(InvalidInput, match="whole branches"):
        block_influence.score(group, Statistics(program, data))


# ---- recipes


@pytest.mark.parametrize("ratio, gone", [(0.2, {3}), (0.4, {1, 3}), (0.59, {1, 3})])
def test_shortgpt_removes_whole_blocks_of_least_influence(ratio, gone):
    model, data = decoder(5, {1: 0.02, 3: 0.01})
    result = gp.compile(model, data[0], recipe="shortgpt", pruning_ratio=ratio, calibration_data=data)
    assert blocks_gone(result) == gone
    assert len(result.plan.entries) == 2 * len(gone) and result.certificate.status == "passed"


def test_shortgpt_by_budget_removes_as_few_blocks_as_suffice():
    model, data = decoder(5, {1: 0.02, 3: 0.01})
    result = gp.compile(model, data[0], recipe="shortgpt", budget={"params": "75%"}, calibration_data=data, verify=False)
    assert blocks_gone(result) == {1, 3} and result.report.after.params <= 0.75 * result.report.before.params
    with pytest.raises(BudgetNotMet, match="one has to stay"):
        gp.compile(model, data[0], recipe="shortgpt", budget={"params": "1%"}, calibration_data=data, verify=False)


def test_a_run_is_that_between_whose_ends_the_stream_turns_least():
    model, data = decoder(5, {0: 0.01, 2: 0.05, 3: 0.05})
    result = gp.compile(model, data[0], recipe="angular", pruning_ratio=0.4, calibration_data=data, verify=False)
    assert blocks_gone(result) == {2, 3}  # block 0 turns least by itself, but its neighbour turns much
    alone = gp.compile(model, data[0], recipe="angular", pruning_ratio=0.2, calibration_data=data, verify=False)
    assert blocks_gone(alone) == {0}


def test_blockpruner_takes_the_branch_whose_loss_is_least_each_time():
    model, data = decoder(3, {1: 0.05})
    result = gp.compile(model, data[0], recipe="blockpruner", pruning_ratio=0.5, calibration_data=data)
    program = gp.capture(model, data[0])
    evaluate = Masked(Statistics(program, data), "loss")
    names, gone = [g.name for g in program.groups if g.kind == "layer"], []
    for _ in range(3):
        losses = {name: evaluate(dict.fromkeys((*gone, name), (0,))) for name in names if name not in gone}
        gone.append(min(losses, key=losses.get))
    assert set(result.plan.entries) == set(gone) and result.certificate.status == "passed"
    some = [evaluate(dict.fromkeys(pick, (0,))) for pick in itertools.combinations(names, 3)]
    assert evaluate(result.plan.removed) <= sorted(some)[len(some) // 4]


def test_blockpruner_with_the_users_loss():
    model, data = decoder(3)
    pairs = [(ids, ids.roll(-1, 1)) for ids in data]

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), batch[1].flatten())

    result = gp.compile(model, data[0], recipe="blockpruner", pruning_ratio=0.34, calibration_data=pairs, loss=loss, verify=False)
    program = gp.capture(model, data[0])
    evaluate = Masked(Statistics(program, pairs, loss), "loss")
    assert evaluate.by == "loss"
    layers = [g.name for g in program.groups if g.kind == "layer"]
    assert evaluate(result.plan.removed) <= min(evaluate({a: (0,), b: (0,)}) for a, b in itertools.pairwise(layers))


def test_convnets_have_blocks_too():
    case = TINY["resnet"]()
    layers = [g for g in gp.capture(case.module, case.args).groups if g.kind == "layer"]
    if len(layers) < 2:
        pytest.skip("the tiny network has one branch that can go")
    result = gp.compile(case.module, case.args, recipe="shortgpt", pruning_ratio=0.5, calibration_data=[case.args])
    assert 1 <= len(result.plan.entries) < len(layers) and result.certificate.status == "passed"


# ---- blocks by name


def test_a_block_goes_by_its_name():
    model, data = decoder(4)
    program = gp.capture(model, data[0])
    assert list(named_blocks(program)) == [f"blocks.{i}" for i in range(4)]
    branches = ["blocks.2.norm1:layer", "blocks.2.norm2:layer"]
    plan = gp.plan(program, remove={"blocks.2": [0], "blocks.0.norm1:layer": [0]})
    assert list(plan.removed) == [*branches, "blocks.0.norm1:layer"]
    assert make_plan(program, remove={"blocks.2": [0]}).removed == dict.fromkeys(branches, (0,))
    result = gp.apply(model, gp.plan(program, remove={"blocks.2": [0]}), data[0])
    assert result.certificate.status == "passed"
    without = copy.deepcopy(model)
    del without.blocks[2]
    torch.testing.assert_close(result.module(data[1]), without(data[1]))
    with pytest.raises(InvalidInput, match=r"no group or block is named 'blocks\.4'"):
        gp.plan(program, remove={"blocks.4": [0]})
    with pytest.raises(InvalidInput, match=r"units 0\.\.0, found unit 1"):
        gp.plan(program, remove={"blocks.2": [1]})


def test_targets_and_ignore_take_a_block():
    model, data = decoder(4)
    program = gp.capture(model, data[0])
    order = [group.name for group in program.groups]
    given = {"units": "layer", "pruning_ratio": 0.5, "importance": lambda group: [float(order.index(group.name))]}
    assert {name.rpartition(".")[0] for name in gp.plan(program, targets=["blocks.1", "blocks.2"], **given).removed} <= {"blocks.1", "blocks.2"}
    everywhere, spared = ({n.rpartition(".")[0] for n in gp.plan(program, ignore=i, **given).removed} for i in ((), ["blocks.0"]))
    assert "blocks.0" in everywhere and "blocks.0" not in spared


def test_blocks_are_listed():
    model, data = decoder(12)
    program = gp.capture(model, data[0])
    groups = [GroupSummary.of(group) for group in program.groups]
    short, whole = (plain(inventory(groups, (), everything, named_blocks(program))) for everything in (False, True))
    assert "blocks: 12, each all its layers together" in short and "blocks.3  2 layers" in short and "2 more (--all" in short
    assert whole.count("blocks.11.norm2:layer") == 2 and "more (" not in whole


def test_a_name_ends_with_the_number_of_the_block():
    class Sublayers(nn.Module):
        def __init__(self):
            super().__init__()
            parts = [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(2)]
            self.first, self.end = nn.Linear(6, 6), nn.Linear(6, 6)
            self.block = nn.ModuleList(nn.ModuleDict({"layer": part}) for part in parts)

        def forward(self, x):
            x = self.first(x)
            for block in self.block:
                x = x + block["layer"](x)
            return self.end(x)

    program = gp.capture(Sublayers(), torch.randn(2, 6))
    assert named_blocks(program) == {f"block.{i}": [f"block.{i}.layer.0:layer"] for i in range(2)}


def test_parts_that_share_a_path_have_no_name():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.end = (nn.Linear(6, 6) for _ in range(5))

        def forward(self, x):
            x = self.end(x)
            x = x + self.b(self.a(x).relu())
            return self.end(x + self.d(self.c(x).relu()))

    program = gp.capture(Flat(), torch.randn(2, 6))
    assert len(stages(program)) == 2 and named_blocks(program) == {}
    with pytest.raises(InvalidInput, match="no group or block is named ''"):
        gp.plan(program, remove={"": [0]})


def test_a_branch_with_one_number_for_a_weight_is_no_unit():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(6, 8), nn.Parameter(torch.tensor(0.5)), nn.Linear(8, 6)

        def forward(self, x):
            x = self.up(x)
            return self.down(x + self.gate * x.tanh())

    program = gp.capture(Gated(), torch.randn(2, 6))
    assert [group.kind for group in program.groups] == ["neuron"] and named_blocks(program) == {}


def test_depth_recipes_are_listed():
    assert {"shortgpt", "angular", "blockpruner"} <= RECIPES.keys()
    with pytest.raises(InvalidInput, match="needs calibration_data"):
        gp.compile(*decoder(2), recipe="shortgpt")
