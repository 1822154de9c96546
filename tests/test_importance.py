"""Criteria against their formulas written out unit by unit, and what all of them promise: dtype, determinism, untouched random state."""

import logging
from functools import cache

import pytest
import torch
from torch import nn

from graphprune.calibration import Statistics, batches
from graphprune.capture.torch_export import capture_torch
from graphprune.errors import InvalidInput
from graphprune.importance import IMPORTANCES, importance_of, scores_of
from graphprune.program import Program
from graphprune.units import Role
from tests.zoo import TINY


@cache
def program_of(name: str) -> Program:
    case = TINY[name]()
    return capture_torch(case.module, case.args)


def score(name, group, statistics):
    return scores_of(importance_of(name), group, statistics)


def slices(group, tensors=None):
    """Per unit, all weights that write or read it, one after the other: the definition, without the algebra."""
    rows = []
    for unit in range(group.size):
        parts = []
        for member in group.members:
            if member.role is not Role.CARRIER:
                tensor = (tensors or {}).get(member.value, member.value.tensor).detach()
                parts.append(tensor.index_select(member.axis, torch.from_numpy(member.index[unit])).flatten())
        rows.append(torch.cat(parts))
    return rows


@pytest.mark.parametrize("name", ["mlp", "densenet", "gqa", "moe"])
@pytest.mark.parametrize("criterion, norm", [("magnitude", 2), ("magnitude_l1", 1)])
def test_magnitude_is_the_relative_norm_of_what_writes_and_reads(name, criterion, norm):
    program = program_of(name)
    statistics = Statistics(program)
    for group in program.analysis.groups:
        if group.kind != "layer" and any(m.role is not Role.CARRIER for m in group.members):
            expected = torch.stack([row.norm(norm) for row in slices(group)])
            torch.testing.assert_close(score(criterion, group, statistics), expected / expected.mean(), rtol=1e-5, atol=1e-6)


def test_lamp_divides_by_all_larger_ones():
    program = program_of("mlp")
    group = program.analysis.groups[0]
    squares = torch.stack([row.square().sum() for row in slices(group)])
    expected = torch.stack([s / squares[squares >= s].sum() for s in squares])
    found = score("lamp", group, Statistics(program))
    torch.testing.assert_close(found, expected)
    assert float(found.max()) == 1.0


def test_geometric_median_sums_distances_of_writers():
    program = program_of("vgg")
    group = program.analysis.groups[0]
    (writer,) = [m.value.tensor.detach() for m in group.members if m.role is Role.WRITER]
    expected = torch.stack([(writer - writer[i]).flatten(1).norm(dim=1).sum() for i in range(group.size)])
    torch.testing.assert_close(score("fpgm", group, Statistics(program)), expected / expected.mean(), rtol=1e-4, atol=1e-4)


def test_bn_scale_reads_the_scale_and_says_where_there_is_none(caplog):
    program = program_of("mobilenet")
    statistics = Statistics(program)
    widest = next(g for g in program.analysis.groups if any(m.tensor == "body.0.0.weight" and m.axis == 0 for m in g.members))
    with caplog.at_level(logging.WARNING, "graphprune"):
        stem = score("bn_scale", widest, statistics)
        assert not [r for r in caplog.records if r.name == "graphprune"]
        squeezed = next(g for g in program.analysis.groups if ".reduce" in g.name)
        torch.testing.assert_close(score("bn_scale", squeezed, statistics), score("magnitude", squeezed, statistics))
        score("bn_scale", squeezed, statistics)
    assert [squeezed.name in r.getMessage() for r in caplog.records if r.name == "graphprune"] == [True]
    scales = [m.value.tensor.detach().abs() for m in widest.members if m.tensor.endswith(".weight") and m.value.tensor.dim() == 1]
    assert len(scales) == 3
    torch.testing.assert_close(stem, torch.stack(scales).sum(0))


def test_taylor_is_the_change_of_the_loss_to_first_order():
    program = program_of("mlp")
    net, x = program.source.module, program.example_inputs[0]
    data = [x, x.flip(0) * 2]
    statistics = Statistics(program, data)
    group = program.analysis.groups[0]
    expected = torch.zeros(group.size)
    for batch in data:
        parameters = dict(net.named_parameters())
        gradients = torch.autograd.grad(net(batch).square().mean(), list(parameters.values()))
        products = {program.weights[n]: p.detach() * g for (n, p), g in zip(parameters.items(), gradients)}
        for member in group.members:
            if member.role is not Role.CARRIER:
                along = products[member.value].movedim(member.axis, 0).flatten(1).sum(1)
                expected += along[torch.from_numpy(member.index)].sum(1).square() / len(data)
    torch.testing.assert_close(score("taylor", group, statistics), expected, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in net.parameters())


def test_the_users_loss_gets_output_and_batch():
    case = TINY["mlp"]()
    program = capture_torch(case.module, case.args)
    seen = []

    def loss(output, batch):
        seen.append((type(output), batch[1].shape))
        return nn.functional.cross_entropy(output, batch[1])

    x = torch.randn(12, 13)
    labels = torch.arange(12) % 7
    statistics = Statistics(program, [(x, labels)], loss)
    assert score("taylor", program.analysis.groups[0], statistics).gt(0).all()
    assert seen == [(torch.Tensor, (5,)), (torch.Tensor, (5,))], "12 rows are two batches of the captured size, the rest is dropped"


@pytest.mark.parametrize(
    "loss, words", [(lambda out: 3.0, "found a float"), (lambda out: out, "of shape"), (lambda out: out.sum() / 0, "finite")]
)
def test_a_loss_that_is_none(loss, words):
    program = program_of("mlp")
    with pytest.raises(InvalidInput, match=words):
        score("taylor", program.analysis.groups[0], Statistics(program, loss=loss))


@pytest.mark.parametrize("name", ["resnet", "gqa", "lstm"])
@pytest.mark.parametrize("criterion", IMPORTANCES)
def test_scores_are_float32_reproducible_and_leave_the_random_state(name, criterion):
    state = torch.random.get_rng_state()
    program = program_of(name)
    for group in program.analysis.groups:
        first, second = (score(criterion, group, Statistics(program, seed=3)) for _ in range(2))
        assert first.dtype == torch.float32 and first.shape == (group.size,) and torch.equal(first, second)
        if criterion == "random":
            assert not torch.equal(first, score(criterion, group, Statistics(program, seed=4)))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("criterion", ["magnitude", "fpgm", "taylor"])
def test_bfloat16_weights_are_scored_in_float32(criterion):
    case = TINY["mlp"]()
    half = case.module.to(torch.bfloat16)
    program = capture_torch(half, (case.args[0].to(torch.bfloat16),))
    group = program.analysis.groups[0]
    found = score(criterion, group, Statistics(program))
    wide = capture_torch(half.float(), case.args)
    expected = score(criterion, wide.analysis.groups[0], Statistics(wide, [case.args[0].to(torch.bfloat16)]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_scores_of_ones_own():
    program = program_of("mlp")
    group, statistics = program.analysis.groups[0], Statistics(program)
    assert torch.equal(score(lambda g: list(range(g.size)), group, statistics), torch.arange(group.size).float())
    with pytest.raises(InvalidInput, match=r"scores of shape \(3,\), expected \(40,\)"):
        score(lambda g: [1, 2, 3], group, statistics)
    with pytest.raises(InvalidInput, match="the score nan"):
        score(lambda g: torch.full((g.size,), float("nan")), group, statistics)
    with pytest.raises(InvalidInput, match="known are magnitude, magnitude_l1, bn_scale"):
        importance_of("magnitud")
    with pytest.raises(InvalidInput, match="found int"):
        importance_of(3)


def test_calibration_data_that_does_not_fit():
    program = program_of("mlp")
    x = program.example_inputs[0]
    assert len(list(batches(program, torch.cat([x, x])))) == 2
    ((inputs, _),) = batches(program, [{"input": x[:3]}])
    assert torch.equal(inputs[0], x[[0, 1, 2, 0, 1]])
    with pytest.raises(InvalidInput, match="keys pixels, but the model also needs input"):
        list(batches(program, [{"pixels": x}]))
    with pytest.raises(InvalidInput, match=r"shape \(5, 9\).*\(5, 13\)"):
        list(batches(program, [x[:, :9]]))
    with pytest.raises(InvalidInput, match="empty"):
        list(batches(program, iter(())))


def test_weights_without_data_are_named():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        x = torch.randn(2, 4)
    program = capture_torch(net, (x,))
    with pytest.raises(InvalidInput, match=r"0\.weight.*meta device"):
        score("magnitude", program.analysis.groups[0], Statistics(program))
