"""Search over levels: greedy, exchange, annealing and the exact integer program, against brute force; evaluation without surgery."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune as gp
from graphprune.allocation.capacity import pq_index, removable, sparsities, spread
from graphprune.allocation.search import (
    Annealing,
    Evaluated,
    Exchange,
    Ladder,
    Quadratic,
    Remembered,
    cheapest,
    greedy,
    removed,
)
from graphprune.calibration import Statistics
from graphprune.errors import BudgetNotMet, InvalidInput
from graphprune.execute.interpreter import run
from graphprune.plan import Plan
from graphprune.planning import make_masks
from graphprune.recipes import RECIPES
from graphprune.sparsity.swaps import Objective, model
from graphprune.surgery import Cut, apply_cut
from graphprune.verify.candidates import Masked, divergence
from tests.randomise import seeded
from tests.zoo import TINY, Decoder, SwiGLU


def ladders(sizes, rivals=""):
    return [Ladder(f"g{i}", tuple(tuple(range(n)) for n in range(size)), rivals) for i, size in enumerate(sizes)]


def separable(table):
    """An evaluator that adds up a loss per group and number of removed units."""
    return lambda units: sum(row[len(units.get(f"g{i}", ()))] for i, row in enumerate(table))


# ---- greedy


def test_greedy_climbs_the_cheapest_rung_and_counts_its_evaluations():
    table = [[0, 5, 6], [0, 1, 9], [0, 2, 3]]
    evaluate = Remembered(separable(table))
    state = greedy(ladders([3, 3, 3]), evaluate, lambda s: sum(s) == 3)
    assert state == (0, 1, 2)  # 1, then 2, then 3 - 2
    assert len(evaluate.seen) <= 9


def test_greedy_says_when_nothing_is_left():
    with pytest.raises(BudgetNotMet, match="everything that units"):
        greedy(ladders([2, 2]), separable([[0, 1], [0, 1]]), lambda s: sum(s) == 3)
    assert greedy(ladders([2, 2]), separable([[0, 1], [0, 2]]), lambda s: sum(s) == 1, lambda s: s[0] == 0) == (0, 1)


# ---- exchange


@pytest.mark.parametrize("seed", [0, 1])
def test_exchange_keeps_every_total_and_finds_the_best(seed):
    random = np.random.default_rng(seed)
    table = np.sort(random.random((5, 5)) * np.arange(5), 1).tolist()
    rows = [Ladder(row.name, row.rungs, "a" if i < 3 else "b") for i, row in enumerate(ladders([5] * 5))]
    evaluate, start = separable(table), (2, 2, 2, 2, 2)
    search = Exchange(generations=20, offspring=16, survivors=(1,))
    found = search(rows, start, [evaluate], seed)
    assert sum(found[:3]) == 6 and sum(found[3:]) == 4
    every = [s for s in itertools.product(range(5), repeat=5) if sum(s[:3]) == 6 and sum(s[3:]) == 4]
    assert evaluate(removed(rows, found)) == pytest.approx(min(evaluate(removed(rows, s)) for s in every))
    assert search(rows, start, [evaluate], seed) == found


def test_exchange_never_gets_worse_and_passes_children_through_stages():
    calls = {"coarse": 0, "fine": 0}
    table = [[0, 1, 4, 9], [0, 1, 2, 3], [0, 3, 6, 9]]

    def counted(name):
        def evaluate(units):
            calls[name] += 1
            return separable(table)(units)

        return evaluate

    start = (1, 1, 1)
    found = Exchange(generations=5, offspring=6, survivors=(2, 1))(ladders([4, 4, 4]), start, [counted("coarse"), counted("fine")])
    assert separable(table)(removed(ladders([4] * 3), found)) <= separable(table)(removed(ladders([4] * 3), start))
    assert calls["fine"] < calls["coarse"] + 5
    assert Exchange()(ladders([4]), (2,), [separable([[0, 1, 2, 3]])]) == (2,)  # nobody to exchange with
    forbidden = Exchange(generations=3, offspring=4, survivors=(1,))(ladders([4, 4]), (1, 1), [separable(table)], 0, lambda s: s == (1, 1))
    assert forbidden == (1, 1)


def test_exchange_ends_when_nothing_better_comes_and_hands_candidates_over_together():
    handed = []

    class Together:
        def __call__(self, units):
            return separable([[0, 1, 4, 9]] * 4)(units)

        def many(self, candidates):
            handed.append(len(candidates))
            return [self(units) for units in candidates]

    evaluate = Remembered(Together())
    impatient = Exchange(generations=40, offspring=3, survivors=(1,), patience=2)
    assert impatient(ladders([4] * 4), (1, 1, 1, 1), [evaluate]) == (1, 1, 1, 1)  # the best already
    assert handed == [4, 3]  # the parent once


# ---- annealing


def energies(matrix, size):
    n = len(matrix)
    for members in itertools.combinations(range(n), size):
        x = np.isin(np.arange(n), members).astype(float)
        yield x @ matrix @ x


@given(st.integers(0, 10_000), st.integers(3, 9))
@settings(max_examples=25, deadline=None)
def test_changes_of_a_quadratic_are_those_of_its_values(seed, n):
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(n, n))
    matrix = matrix + matrix.T
    chosen = np.arange(n) < n // 2
    energy = Quadratic(matrix, chosen)
    for _ in range(6):
        i, j = random.choice(np.flatnonzero(energy.chosen)), random.choice(np.flatnonzero(~energy.chosen))
        before, change = energy.chosen.astype(float), energy.change(i, j)
        energy.exchange(i, j)
        after = energy.chosen.astype(float)
        assert change == pytest.approx(after @ matrix @ after - before @ matrix @ before, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_annealing_finds_the_best_set_of_its_size(seed):
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(10, 10))
    matrix = (matrix + matrix.T) / 2
    start = np.arange(10) < 4
    found = Annealing(sweeps=4)(Quadratic(matrix, start), start, seed)
    assert found.sum() == 4 and start.sum() == 4 and start[:4].all()
    assert found @ matrix @ found == pytest.approx(min(energies(matrix, 4)))
    assert np.array_equal(found, Annealing(sweeps=4)(Quadratic(matrix, start), start, seed))
    by_values = Evaluated(lambda x: float(x @ matrix @ x), start)
    assert np.array_equal(found, Annealing(sweeps=4)(by_values, start, seed))


# ---- separable


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_integer_program_is_brute_force(seed):
    random = np.random.default_rng(seed)
    losses = [random.random(k).tolist() for k in (3, 4, 2, 3)]
    costs = {"params": [random.integers(1, 1000, len(row)).tolist() for row in losses], "ms": [random.random(len(row)).tolist() for row in losses]}
    limits = {"params": 1800.0, "ms": 2.0}

    def total(table, state):
        return sum(row[level] for row, level in zip(table, state))

    allowed = [s for s in itertools.product(*(range(len(row)) for row in losses)) if all(total(costs[k], s) <= limits[k] for k in limits)]
    if not allowed:
        with pytest.raises(BudgetNotMet):
            cheapest(losses, costs, limits)
        return
    found = cheapest(losses, costs, limits)
    assert found in allowed
    assert total(losses, found) == pytest.approx(min(total(losses, s) for s in allowed), abs=1e-6)


def test_an_integer_program_without_answer_says_what_is_short():
    with pytest.raises(BudgetNotMet, match=r"macs 5 \(at least 7 alone\)"):
        cheapest([[1.0, 2.0], [1.0]], {"macs": [[4, 3], [4]]}, {"macs": 5})
    with pytest.raises(InvalidInput, match="at least one level"):
        cheapest([[1.0], []], {}, {})


# ---- candidates


def test_a_candidate_that_is_no_number_is_the_worst():
    evaluate = Remembered(lambda units: math.nan)
    assert evaluate({"g0": (0,)}) == math.inf


@pytest.mark.parametrize("name", ["resnet", "gqa", "vit"])
def test_candidates_are_judged_as_their_surgery_is(name):
    """What a masked run says of a cut is what the pruned network's outputs say."""
    case = TINY[name]()
    program = gp.capture(case.module, case.args)
    evaluate = Masked(Statistics(program))
    assert evaluate({}) == pytest.approx(0, abs=1e-6)
    group = next(g for g in program.groups if g.kind in ("channel", "neuron") and g.exact.value == "exact" and g.size > 3)
    units = {group.name: (0, 2)}
    pruned = apply_cut(program, Cut(program.analysis, units))
    inputs = list(program.example_inputs)
    expected = divergence(run(program, inputs), run(pruned, inputs))
    assert expected > 1e-6
    assert evaluate(units) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["gqa", "resnet"])
def test_candidates_judged_together_are_judged_as_one_by_one(name):
    case = TINY[name]()
    program = gp.capture(case.module, case.args)
    groups = [g for g in program.groups if g.kind in ("channel", "neuron", "kv_group") and g.size > 1][:3]
    candidates = [{}, *({g.name: (0,)} for g in groups), {groups[0].name: (1,), groups[-1].name: (0,)}]
    statistics = Statistics(program)
    alone, together = Masked(statistics, together=1), Masked(statistics, together=2)
    assert together.many(candidates) == pytest.approx([alone(units) for units in candidates], rel=1e-4, abs=1e-6)
    assert together.together == 2  # every op was batched


def test_divergence_of_logits_and_of_numbers():
    a, b = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    p = torch.softmax(a, -1)[0]
    assert divergence([a], [b]) == pytest.approx(float((p * (p.log() - torch.softmax(b, -1)[0].log())).sum()))
    assert divergence([torch.tensor([[2.0], [0.0]])], [torch.tensor([[1.0], [1.0]])]) == pytest.approx(0.5)
    assert divergence([torch.tensor([1, 2])], [torch.tensor([2, 2])]) == 0


# ---- Tyr: levels


def test_refitted_copies_are_what_the_repair_makes():
    """A masked run with the copies gives what the pruned network gives after least squares."""
    from graphprune.recipes.tyr import Copies

    with seeded(0):
        model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 36, bias=False), nn.ReLU(), nn.Linear(36, 7)).eval()
        data = [torch.randn(32, 12) for _ in range(4)]
    program = gp.capture(model, data[0])
    statistics = Statistics(program, data)
    groups = [g for g in program.groups if g.kind != "layer"]
    units = {groups[0].name: (1, 5, 6, 30), groups[1].name: (0, 2, 35)}
    evaluate = Masked(statistics, tensors=Copies(statistics, groups))
    plan = Plan.of(program, units, ["least_squares"])
    repaired = gp.apply(model, plan, data[0], calibration_data=data, verify=False).module
    with torch.no_grad():
        expected = sum(divergence([model(x)], [repaired(x)]) for x in data) / len(data)
    assert evaluate(units) == pytest.approx(expected, rel=1e-3)
    assert evaluate(units) < Masked(statistics)(units)  # the fit helps


def test_tyr_finds_levels_that_are_better_than_even_ones_at_no_more_parameters():
    with seeded(0):
        model = Decoder(lambda hidden: SwiGLU(hidden, 96), hidden=32, layers=4).eval()
        data = [torch.randint(0, 61, (4, 16)) for _ in range(4)]
        with torch.no_grad():
            for i, block in enumerate(model.blocks):
                block.mlp.down.weight.mul_((0.1, 4, 0.2, 3)[i])  # some layers matter more
    even = gp.compile(model, data[0], recipe="tyr_local", pruning_ratio=0.5, calibration_data=data, units=("neuron",), verify=False)
    allocation = replace(RECIPES["tyr"].allocation, search_by=Exchange(generations=6, offspring=12, survivors=(4, 2, 1)), rounds=2)
    recipe = replace(RECIPES["tyr"], allocation=allocation)
    arguments = {"pruning_ratio": 0.5, "calibration_data": data, "units": ("neuron",)}
    found = gp.compile(model, data[0], recipe=recipe, **arguments)
    assert found.certificate.status == "passed"
    assert found.report.after.params <= even.report.after.params * 1.005
    with torch.no_grad():
        far = [sum(divergence([model(x)], [result.module(x)]) for x in data) for result in (even, found)]
    assert far[1] < 0.8 * far[0]
    removed_of = {int(name.split(".")[1]): len(entry.removed) for name, entry in found.plan.entries.items()}
    assert removed_of.get(0, 0) > removed_of.get(1, 0)
    assert gp.compile(model, data[0], recipe=recipe, **arguments, verify=False).plan.hash == found.plan.hash


def test_tyr_under_a_budget():
    case = TINY["vgg"]()
    quick = replace(RECIPES["tyr"].allocation, search_by=Exchange(2, 4, survivors=(2, 1, 1)), rounds=1)
    recipe = replace(RECIPES["tyr"], allocation=quick, unit=("channel", "neuron"))
    result = gp.compile(case.module, case.args, recipe=recipe, budget={"macs": "60%"}, calibration_data=[case.args])
    assert result.report.after.macs <= 0.6 * result.report.before.macs and result.certificate.status == "passed"


# ---- iCBS: swaps of single weights


def test_the_quadratic_model_of_a_block_is_exact():
    """Numbers worked out apart, and the identity E(x) = L(w0 (1 - x)) - L(w) of a quadratic loss."""
    w0, w, g = np.array([1, -2, 0.5]), np.array([0, -2, 0.5]), np.array([0.1, -0.2, 0.05])
    hessian = np.array([[2, 0.3, 0], [0.3, 1, 0.2], [0, 0.2, 3]])
    matrix, const = model(w0, w, hessian, g)
    np.testing.assert_allclose(matrix, [[-1.1, -0.3, 0], [-0.3, 2.2, -0.1], [0, -0.1, 0.35]], atol=1e-12)
    assert const == pytest.approx(1.1)
    for x, expected in (((1, 0, 0), 0.0), ((0, 1, 0), 3.3), ((0, 0, 1), 1.45)):
        assert np.array(x) @ matrix @ np.array(x) + const == pytest.approx(expected)
    matrix, const = model(w0, w, hessian, g, first=0.7, ridge=0.3)
    for x in itertools.product((0, 1), repeat=3):
        delta = w0 * (1 - np.array(x)) - w
        expected = 0.7 * g @ delta + delta @ hessian @ delta / 2 + 0.3 * delta @ delta
        assert np.array(x) @ matrix @ np.array(x) + const == pytest.approx(expected)


def small_classifier():
    with seeded(3):
        net = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        data = [torch.randn(8, 10) for _ in range(2)]
    return net, data


def test_swaps_lower_the_loss_and_keep_every_count():
    net, data = small_classifier()
    program = gp.capture(net, data[0])
    wanda, _ = make_masks(program, RECIPES["wanda"], sparsity=0.6, calibration_data=data)
    icbs, _ = make_masks(program, RECIPES["icbs"], sparsity=0.6, calibration_data=data)
    assert icbs.masks.keys() == wanda.masks.keys()
    for name, mask in icbs.masks.items():
        assert int(mask.sum()) == int(wanda.masks[name].sum()) and not torch.equal(mask, wanda.masks[name])
    losses = [Objective(program, plan.masks, data, None, 16).value() for plan in (wanda, icbs)]
    assert losses[1] < 0.8 * losses[0]
    again, _ = make_masks(program, RECIPES["icbs"], sparsity=0.6, calibration_data=data)
    assert again.hash == icbs.hash


def test_swaps_follow_the_users_loss():
    net, data = small_classifier()
    pairs = [(x, x[:, :1].long() % 4) for x in data]

    def loss(output, batch):
        return nn.functional.cross_entropy(output, batch[1].flatten().clamp(0, 3))

    program = gp.capture(net, data[0])
    start, _ = make_masks(program, RECIPES["wanda"], sparsity=0.6, calibration_data=pairs)
    result = gp.compile(net, data[0], recipe="icbs", sparsity=0.6, calibration_data=pairs, loss=loss)
    assert result.certificate.status == "passed"
    before, after = (Objective(program, plan.masks, pairs, loss, 16).value() for plan in (start, result.plan))
    assert after < before
    with pytest.raises(InvalidInput, match="single weights"):
        gp.compile(net, data[0], recipe="icbs", pattern="2:4", calibration_data=data)


# ---- PQ index: how much a layer can lose


@pytest.mark.parametrize("p, q", [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)])
@pytest.mark.parametrize("k, d", [(1, 10), (3, 10), (10, 10)])
def test_the_bound_of_k_equal_numbers_is_k(p, q, k, d):
    w = torch.zeros(d)
    w[:k] = -2.5
    assert pq_index(w, p, q) == pytest.approx(1 - (k / d) ** (1 / p - 1 / q), abs=1e-9)
    assert 1 - removable(w, p, q) == pytest.approx(k / d, abs=1e-9)


@pytest.mark.parametrize("draw, p, q, index, kept", [
    (lambda g: torch.randn(400_000, generator=g), 1, 2, 1 - math.sqrt(2 / math.pi), 2 / math.pi),
    (lambda g: torch.randn(400_000, generator=g), 0.5, 1, 0.152, 0.848),
    (lambda g: torch.rand(400_000, generator=g) * 2 - 1, 0.5, 1, 1 / 9, 8 / 9),
    (lambda g: torch.rand(400_000, generator=g) * 2 - 1, 1, 2, 0.134, 0.75),
    (lambda g: torch.empty(400_000).exponential_(generator=g), 1, 2, 1 - math.sqrt(0.5), 0.5),
])  # fmt: skip
def test_pq_index_of_known_distributions(draw, p, q, index, kept):
    w = draw(torch.Generator().manual_seed(0))
    assert pq_index(w, p, q) == pytest.approx(index, abs=2e-3)
    assert 1 - removable(w, p, q) == pytest.approx(kept, abs=3e-3)
    assert pq_index(1e-30 * w.double(), p, q) == pytest.approx(pq_index(w, p, q), abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=8), st.floats(0, 0.95))
@example([(5e-324, 1)], 0.5)
@settings(max_examples=50, deadline=None)
def test_shares_keep_the_average_and_their_order(pairs, ratio):
    fractions, sizes = zip(*pairs)
    found = spread(fractions, sizes, ratio)
    assert all(0 <= f <= 0.99 + 1e-9 for f in found)
    if all(f > 0 for f in fractions):
        assert sum(f * n for f, n in zip(found, sizes)) == pytest.approx(ratio * sum(sizes), abs=1e-6)
    order = sorted(range(len(pairs)), key=lambda i: fractions[i])
    assert all(found[a] <= found[b] + 1e-9 for a, b in itertools.pairwise(order))


def uneven():
    """Two hidden layers: a few units of the first carry all, those of the second are alike."""
    with seeded(0):
        net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
        with torch.no_grad():
            net[0].weight[8:] *= 0.02
            net[2].weight[:, 8:] *= 0.02
            net[2].weight[:, :8] *= 2
    return net, torch.randn(4, 16)


def test_layers_lose_by_what_their_weights_say():
    net, x = uneven()
    result = gp.compile(net, x, recipe="sap", pruning_ratio=0.4, round_to=1)
    lost = {name: len(entry.removed) for name, entry in result.plan.entries.items()}
    first, second = (sum(n for name, n in lost.items() if name.startswith(f"{i}")) for i in (0, 2))
    assert first > 1.5 * second and first + second == pytest.approx(0.4 * 128, abs=2)
    assert result.certificate.status == "passed"
    levels = sparsities(gp.capture(net, x), 0.5)
    sizes = {name: p.numel() for name, p in net.named_parameters() if name in levels}
    assert sum(levels[n] * sizes[n] for n in sizes) == pytest.approx(0.5 * sum(sizes.values()))
    assert levels["0.weight"] > levels["4.weight"]
    masked = gp.compile(net, x, sparsity=levels, targets=["0", "2", "4"])
    assert float(masked.plan.masks["0.weight"].float().mean()) == pytest.approx(1 - levels["0.weight"], abs=0.01)
    with pytest.raises(InvalidInput, match="0 < p < q"):
        pq_index(x, 1, 1)
