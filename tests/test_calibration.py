"""Statistics: what is added up is what the formula says, shards add up to one pass, and every linear map is the product that its node computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration import Gram, Moments, Similarity, Statistics, layerwise, samples, tapped
from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import run
from graphprune.linear_maps import linear_maps
from tests.zoo import TINY


@pytest.mark.parametrize("name", TINY)
def test_a_linear_map_is_the_product_of_its_node(name):
    """rows @ matrix^T gives the entries of the node's result, bias taken off; and a matrix goes back into its tensor."""
    case = TINY[name]()
    program = gp.capture(case.module, case.args, case.kwargs)
    maps, checked = linear_maps(program), []

    def intercept(node, args, compute):
        results = compute(args)
        linear = maps.get(node)
        if linear is not None:
            weight = args[next(key for key, value in node.args.items() if value is linear.weight)]
            matrix = linear.matrix(weight)
            assert torch.equal(linear.tensor(matrix), weight)
            rows, counts = linear.rows(args)
            product = rows @ matrix.mT
            bias = args.get("bias")
            plain = results[0] if bias is None else results[0] - bias.reshape(-1, *[1] * linear_rank(node))
            assert counts is None or int(counts.sum()) == plain.shape[0]
            torch.testing.assert_close(product.square().sum(), plain.square().sum())
            torch.testing.assert_close(product.sum(), plain.sum())
            checked.append(node)
        return results

    run(program, program.example_inputs, intercept=intercept, dtype=torch.float64)
    assert checked


def linear_rank(node) -> int:
    return len(node.outputs[0].shape) - 2 if "conv" in node.op_type else 0


def test_convolutions_are_unfolded_with_stride_padding_dilation_and_groups():
    conv = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False)
    x = torch.randn(2, 6, 9, 8)
    program = gp.capture(conv, x)
    (linear,) = linear_maps(program).values()
    rows, _ = linear.rows({**linear.node.args, "input": x})
    product = (rows @ linear.matrix(conv.weight).mT).detach()  # (groups, batch * places, outputs / groups)
    out = conv(x).detach()
    expected = out.permute(1, 0, 2, 3).reshape(2, 4, -1).mT
    torch.testing.assert_close(product, expected)


ROWS = st.integers(1, 9)


@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("make", [Moments, Gram], ids=lambda c: c.__name__)
def test_shards_add_up_to_one_pass(make, sizes, seed):
    """Whatever the shards, and in whatever order they are merged."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, sum(sizes), 4, generator=generator, dtype=torch.float64) * 3 + 5
    whole, joined = make(), make()
    whole.update(rows)
    for part in reversed(rows.split(sizes, 1)):
        shard = make()
        shard.update(part)
        joined.merge(shard)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(joined, name), value, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[2**16, 6], ids=["at once", "in steps"])
def cached(request, monkeypatch):
    """How many numbers are summed in one step."""
    monkeypatch.setattr("graphprune.calibration.accumulators.CACHED", request.param)


def test_moments_are_those_of_the_rows(cached):
    rows = torch.tensor([[1, 0, 2], [3, 0, 2], [1, 2, 2], [3, 2, 4]], dtype=torch.float64)
    moments = Moments()
    moments.update(rows[None])
    torch.testing.assert_close(moments.mean[0], torch.tensor([2.0, 1.0, 2.5], dtype=torch.float64))
    torch.testing.assert_close(moments.variance[0], torch.tensor([4 / 3, 4 / 3, 1], dtype=torch.float64))
    torch.testing.assert_close(moments.norm[0], rows.norm(dim=0))
    torch.testing.assert_close(moments.mean_absolute[0], rows.abs().mean(0))


def test_rows_beyond_the_count_of_a_group_do_not_count(cached):
    full, padded = torch.randn(1, 5, 3, dtype=torch.float64), torch.zeros(2, 5, 3, dtype=torch.float64)
    padded[0], padded[1, :2] = full[0], full[0, :2]
    moments, short = Moments(), Moments()
    moments.update(padded, torch.tensor([5, 2]))
    short.update(full[:, :2])
    torch.testing.assert_close(moments.variance[1], short.variance[0])
    torch.testing.assert_close(moments.mean[1], short.mean[0])


def test_a_group_without_rows_has_no_moments():
    moments = Moments()
    moments.update(torch.zeros(2, 0, 3), torch.tensor([0, 0]))
    assert moments.count.tolist() == [[0], [0]] and not moments.norm.any() and moments.norm.shape == (2, 3)


def test_columns_that_are_never_used_leave_the_hessian_invertible():
    gram = Gram()
    gram.update(torch.tensor([[[1.0, 0, 2], [2, 0, 1]]]))
    hessian = gram.hessian(0.01)[0]
    assert gram.dead[0].tolist() == [False, True, False]
    torch.testing.assert_close(hessian[1], torch.tensor([0.0, 1 + 0.01 * (2.5 + 0 + 2.5) / 3, 0.0], dtype=hessian.dtype))
    torch.linalg.cholesky(hessian)


def test_similarity_of_equal_and_of_opposite():
    x = torch.randn(2, 7, 5)
    same, turned = Similarity(), Similarity()
    same.update(x, 3 * x)
    turned.update(x, -x)
    assert same.cosine == pytest.approx(1) and turned.cosine == pytest.approx(-1) and turned.angle == pytest.approx(1)


def test_the_gradients_of_samples_are_those_of_a_loop():
    """One backward pass per sample, although the network was captured with a batch of five."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 1).double()

    def loss(output: Tensor, batch) -> Tensor:
        return (output - batch[1]).square().mean()

    program = gp.capture(model, x)
    statistics = Statistics(program, [(x, y)], loss)
    expected = torch.stack([torch.autograd.grad(loss(model(x[i : i + 1]), (None, y[i : i + 1])), model[0].weight)[0] for i in range(5)])
    found = statistics.gradients(program.weights["0.weight"])
    torch.testing.assert_close(found.mean, expected.mean(0))
    torch.testing.assert_close(found.mean_square, expected.square().mean(0))


def test_samples_are_batches_of_copies():
    model = nn.Linear(4, 3)
    x = torch.randn(3, 4)
    program = gp.capture(model, x)
    found = [flat[0] for flat, _ in samples(program, [x])]
    assert [f.shape for f in found] == [(3, 4)] * 3
    assert all(torch.equal(f, x[i : i + 1].expand(3, 4)) for i, f in enumerate(found))


def test_one_pass_feeds_all_statistics(monkeypatch):
    passes = []
    from graphprune.calibration import statistics as module

    monkeypatch.setattr(module, "tapped", lambda *args: passes.append(args[2]) or tapped(*args))
    case = TINY["vit"]()
    found = Statistics(gp.capture(case.module, case.args), needs=("moments", "gram", "similarity"))
    found.observed("gram"), found.observed("moments"), found.observed("similarity")
    assert passes == [["gram", "moments", "similarity"]]


def test_a_wrong_activation_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    program = gp.capture(model, torch.randn(3, 4))
    with pytest.raises(InvalidInput, match=r"the input of linear 1 is not finite .*3 of 12 entries"):
        Statistics(program).observed("moments")


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_layers_are_visited_in_order_with_the_inputs_asked_for(inputs):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False)).double()
    data = [torch.randn(3, 4).double() for _ in range(2)]
    program = gp.capture(model, data[0])
    seen = {}

    def decide(linear, weight, gram):
        seen[linear.weight.name] = gram.square[0]
        return 2 * weight

    layerwise(program, data, decide, make=Gram, inputs=inputs)
    x = torch.cat(data)
    torch.testing.assert_close(seen["0.weight"], x.T @ x)
    y = model[0](x).detach() * (2 if inputs == "pruned" else 1)
    torch.testing.assert_close(seen["1.weight"], y.T @ y)


def test_weights_are_read_layer_by_layer_from_elsewhere():
    """A network without data: what is loaded is forgotten after its last use."""
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    program = gp.capture(empty, torch.zeros(3, 4, device="meta"))
    state, x, asked, seen = model.state_dict(), torch.randn(3, 4), [], {}

    def load(value):
        asked.append(value.name)
        return state[value.name]

    layerwise(
        program, [x], lambda linear, w, gram: seen.update({linear.weight.name: gram.square[0]}), make=Gram,
        device=torch.device("cpu"), load=load,
    )
    hidden = model[1](model[0](x)).detach().double()
    torch.testing.assert_close(seen["2.weight"], hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    assert asked == ["0.weight", "0.bias", "2.weight", "2.bias"]
