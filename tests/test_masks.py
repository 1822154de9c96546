"""Zeros inside tensors: patterns, optimal brain surgery, masks as plans, and the recipes that make them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import InvalidInput
from graphprune.plan import Plan
from graphprune.recipes import RECIPES
from graphprune.repair import obs
from graphprune.sparsity import Swaps, maskable, pattern_of
from graphprune.sparsity.methods import best_sets
from tests.zoo import TINY

SPARSE = [name for name, recipe in RECIPES.items() if recipe.sparse]
H3 = torch.tensor([[4, 1, 0.5], [1, 3, 1], [0.5, 1, 2]], dtype=torch.float64)[None]
W3 = torch.tensor([[[1, -0.5, 0.8]]], dtype=torch.float64)
H4 = torch.tensor(
    [[7.58, -1.61, 0.31, -5.08], [-1.61, 4.45, 1.39, 3.51], [0.31, 1.39, 2.02, -0.36], [-5.08, 3.51, -0.36, 6.14]], dtype=torch.float64
)[None]
W4 = torch.tensor([[[-0.6, -0.6, -0.3, -0.7]]], dtype=torch.float64)


def fixed(keep: Tensor):
    return lambda start, weight, inner: keep[..., start : start + weight.shape[-1]]


# ---- optimal brain surgery, against numbers computed apart (by hand and with numpy)


def test_joint_and_sequential_repairs_of_one_row():
    keep = torch.tensor([[[False, True, False]]])
    joint, _ = obs.sweep(W3, H3, fixed(keep), 3, joint=True)
    sequential, _ = obs.sweep(W3, H3, fixed(keep), 3, joint=False)
    torch.testing.assert_close(joint, torch.tensor([[[0, 0.1, 0]]], dtype=torch.float64))
    torch.testing.assert_close(sequential, torch.tensor([[[0, -0.2, 0]]], dtype=torch.float64))
    assert float(obs.loss(joint - W3, H3)) == pytest.approx(2.5)
    assert float(obs.loss(sequential - W3, H3)) == pytest.approx(2.635)
    torch.testing.assert_close(obs.refit(W3, keep, H3), joint)


def test_scores_of_single_weights():
    inverse = obs.inverse(H3)[0]
    torch.testing.assert_close(inverse.diagonal(), torch.tensor([0.273973, 0.424658, 0.602740], dtype=torch.float64), atol=1e-6, rtol=0)
    single = W3[0, 0].square() / inverse.diagonal()
    torch.testing.assert_close(single, torch.tensor([3.65, 0.588710, 1.061818], dtype=torch.float64), atol=1e-6, rtol=0)
    seen = []
    obs.sweep(W3, H3, lambda start, weight, inner: seen.append(inner) or torch.ones_like(weight, dtype=torch.bool), 3, joint=False)
    pivots = torch.linalg.cholesky(seen[0]).square().diagonal(dim1=-2, dim2=-1)[0]
    torch.testing.assert_close(W3[0, 0].square() / pivots, torch.tensor([3.65, 0.625, 1.28], dtype=torch.float64))


def test_a_set_is_judged_by_its_joint_loss():
    """Single weights choose to remove {1, 2} of this cell, at 0.7269; the best pair is {2, 3}, at 0.1720."""
    keep = best_sets(W4, obs.inverse(H4), pattern_of("2:4"))
    assert keep.flatten().tolist() == [True, True, False, False]
    losses = {}
    for pair, expected in (((1, 2), 0.726923), ((2, 3), 0.171956), ((0, 1), 1.280715)):
        mask = torch.ones(1, 1, 4, dtype=torch.bool)
        mask[..., list(pair)] = False
        losses[pair] = float(obs.loss(obs.refit(W4, mask, H4) - W4, H4))
        assert losses[pair] == pytest.approx(expected, abs=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 12), st.floats(0.1, 0.9))
@settings(max_examples=40, deadline=None)
def test_joint_is_the_least_squares_answer_and_never_worse_than_sequential(seed, outputs, inputs, sparsity):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inputs, inputs, generator=generator, dtype=torch.float64)
    hessian = (x.T @ x / len(x) + 0.01 * torch.eye(inputs, dtype=torch.float64))[None]
    weight = torch.randn(1, outputs, inputs, generator=generator, dtype=torch.float64)
    keep = torch.rand(weight.shape, generator=generator) > sparsity
    joint, mask = obs.sweep(weight, hessian, fixed(keep), inputs, joint=True)
    sequential, _ = obs.sweep(weight, hessian, fixed(keep), inputs, joint=False)
    assert torch.equal(mask, keep) and not joint[~keep].any() and not sequential[~keep].any()
    torch.testing.assert_close(joint, obs.refit(weight, keep, hessian), atol=1e-8, rtol=1e-6)
    assert (obs.loss(joint - weight, hessian) <= obs.loss(sequential - weight, hessian) + 1e-9).all()


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_sweep_in_steps_changes_only_columns_still_to_come(step):
    """Sequential sweeps are the same whatever the step: the steps only say when later columns hear of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    hessian, weight = (x.T @ x / 40)[None], torch.randn(1, 4, 8, generator=generator, dtype=torch.float64)
    keep = torch.rand(weight.shape, generator=generator) > 0.5
    whole, _ = obs.sweep(weight, hessian, fixed(keep), 8, joint=False)
    torch.testing.assert_close(obs.sweep(weight, hessian, fixed(keep), step, joint=False)[0], whole)


# ---- patterns


def test_patterns_keep_what_they_say():
    scores = torch.rand(2, 6, 10)
    rows = pattern_of("unstructured").keep(scores, 0.35, "row")
    assert (rows.sum(-1) == 7).all()  # int(10 * 0.35) = 3 go
    assert (pattern_of("unstructured").keep(scores, 0.35, "layer").flatten(1).sum(-1) == 39).all()
    cells = pattern_of("2:4").keep(scores, 0.5, "layer")
    assert (cells[..., :8].unflatten(-1, (2, 4)).sum(-1) == 2).all() and cells[..., 8:].all()
    best = scores[..., :4].topk(2).indices.sort().values
    assert torch.equal(cells[..., :4].nonzero()[:, -1].reshape(2, 6, 2), best)


def test_tiles_go_by_their_norm_and_edges_count():
    scores = torch.ones(1, 5, 7)
    scores[0, :2, :3] = 0.0  # one whole tile of nothing
    keep = pattern_of("block:2x3").keep(scores, 2 / 9, "layer")  # 3 x 3 tiles, edge tiles smaller: 2 go
    assert not keep[0, :2, :3].any()
    tiles = [keep[0, r : r + 2, c : c + 3] for r in (0, 2, 4) for c in (0, 3, 6)]
    assert all(t.all() or not t.any() for t in tiles) and sum(not t.any() for t in tiles) == 2
    assert not keep[0, 4:, 6:].any()  # the smallest edge tile has the least norm


@pytest.mark.parametrize("text", ["4:2", "0:4", "block:64", "2;4", "sparse"])
def test_unknown_patterns_are_refused(text):
    with pytest.raises(InvalidInput, match="is not known; write 'unstructured'"):
        pattern_of(text)


# ---- masks as plans


def small() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    return model, [torch.randn(32, 12) for _ in range(3)]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_recipes_make_certified_masks_of_every_pattern(name, pattern):
    if isinstance(RECIPES[name].score, Swaps) and pattern != "unstructured":
        pytest.skip("swaps single weights only, and says so (tests/test_search.py)")
    model, data = small()
    result = gp.compile(model, data[0], recipe=name, pattern=pattern, sparsity=None if pattern == "2:4" else 0.5, calibration_data=data)
    assert result.certificate.passed and set(result.plan.masks) == {"0.weight", "2.weight"}  # not what puts out the result
    for weight, mask in result.plan.masks.items():
        tensor = result.module.get_parameter(weight)
        assert not tensor[~mask].any() and float(mask.float().mean()) == pytest.approx(0.5, abs=0.05)
        changed = not torch.equal(tensor[mask], model.get_parameter(weight)[mask])
        assert changed == (RECIPES[name].score.update is not None)


def test_the_masks_of_wanda_are_those_of_its_formula():
    model, data = small()
    x = torch.cat(data)
    plan = gp.compile(model, data[0], recipe="wanda", sparsity=0.5, calibration_data=data).plan
    score = model[0].weight.detach().abs() * x.norm(dim=0)
    expected = torch.ones_like(score, dtype=torch.bool).scatter(1, score.argsort(dim=1, stable=True)[:, :6], False)
    assert torch.equal(plan.masks["0.weight"], expected)


def test_later_layers_see_what_pruned_ones_give():
    model, data = small()
    result = gp.compile(model, data[0], recipe="wanda", sparsity=0.5, calibration_data=data)
    x = result.module[1](result.module[0](torch.cat(data))).detach()
    score = model[2].weight.detach().abs() * x.norm(dim=0)
    expected = torch.ones_like(score, dtype=torch.bool).scatter(1, score.argsort(dim=1, stable=True)[:, :12], False)
    assert torch.equal(result.plan.masks["2.weight"], expected)


def test_sparsegpt_by_its_formula_on_one_layer():
    """Column after column with the Cholesky factor, written out; equal sparsity, and not a larger error."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 20)
    result = gp.compile(model, x, recipe="sparsegpt", sparsity=0.5, calibration_data=[x])
    weight = model[0].weight.detach().double()
    hessian = x.double().T @ x.double() / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(20)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scores = weight.square() / upper.diagonal().square()
    mask = scores.flatten() > scores.flatten().sort().values[80 - 1]
    mask, now = mask.reshape(8, 20), weight.clone()
    for j in range(20):
        error = torch.where(mask[:, j], 0.0, now[:, j]) / upper[j, j]
        now[:, j:] -= error[:, None] * upper[None, j, j:]
    assert torch.equal(result.plan.masks["0.weight"], mask)
    torch.testing.assert_close(result.module[0].weight.detach().double(), now * mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sparsegpt", "mrp"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_plan_applied_again_repairs_to_the_same_weights(name, pattern, tmp_path):
    """Masks travel as bits beside the plan; the mask never changes by the repair."""
    model, data = small()
    result = gp.compile(model, data[0], recipe=name, pattern=pattern, calibration_data=data)
    result.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.hash == result.plan.hash and all(torch.equal(plan.masks[n], m) for n, m in result.plan.masks.items())
    again = gp.apply(model, plan, data[0], calibration_data=data)
    for (key, a), b in zip(result.module.state_dict().items(), again.module.state_dict().values()):
        torch.testing.assert_close(a, b, msg=key)
    without = gp.apply(model, plan, data[0])
    assert any("repair skipped" in w for w in without.report.warnings)
    for weight, mask in plan.masks.items():
        assert torch.equal(without.module.get_parameter(weight), model.get_parameter(weight) * mask)


def test_masks_are_written_one_by_one(tmp_path):
    class Drawn(Mapping):
        """Masks that are made when asked for; how many are alive."""

        sizes, alive, most = {"a": (3, 5), "b": (64,), "c": (2, 3, 7)}, 0, 0

        def __getitem__(self, name):
            generator = torch.Generator().manual_seed(ord(name))
            mask = torch.rand(self.sizes[name], generator=generator) < 0.5
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(mask, self.gone)
            return mask

        def gone(self):
            self.alive -= 1

        def __iter__(self):
            return iter(self.sizes)

        def __len__(self):
            return len(self.sizes)

    masks = Drawn()
    plan = gp.Plan({}, masks=masks)
    plan.save(tmp_path / "plan.json")
    assert masks.most <= 2  # the next one is made before a loop lets go of the last
    found = gp.Plan.load(tmp_path / "plan.json")
    assert found.hash == plan.hash and list(found.masks) == ["a", "b", "c"]
    assert all(torch.equal(found.masks[name], masks[name]) for name in masks)


def test_a_plan_whose_masks_are_others_is_refused(tmp_path):
    model, data = small()
    for sparsity in (0.5, 0.6):
        gp.compile(model, data[0], sparsity=sparsity).plan.save(tmp_path / f"{sparsity}.json")
    (tmp_path / "0.6.json.masks.safetensors").replace(tmp_path / "0.5.json.masks.safetensors")
    with pytest.raises(InvalidInput, match="does not hold the masks"):
        Plan.load(tmp_path / "0.5.json")
    with pytest.raises(InvalidInput, match="not a graphprune plan"):
        Plan.load(tmp_path / "0.6.json")


def test_a_certificate_of_masks_fails_when_one_kept_weight_moves():
    from graphprune.sparsity import masked_tensors
    from graphprune.surgery import Cut, apply_cut
    from graphprune.verify.certificate import certify

    model, data = small()
    program = gp.capture(model, data[0])
    plan = gp.compile(program, sparsity=0.5).plan
    cut = Cut(program.analysis, {})
    zeroed = masked_tensors(program, plan.masks)
    pruned = apply_cut(program, cut)
    assert certify(program, pruned, cut, zeroed=zeroed).status == "failed"  # nothing masked yet
    from graphprune.repair import replace_weight

    for value, tensor in zeroed.items():
        replace_weight(pruned, value.name, tensor)
    assert certify(program, pruned, cut, zeroed=zeroed).passed
    moved = zeroed[program.weights["2.weight"]].clone()
    place = plan.masks["2.weight"].nonzero()[0]
    moved[tuple(place)] += 1e-3
    replace_weight(pruned, "2.weight", moved)
    assert certify(program, pruned, cut, zeroed=zeroed).status == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("network", TINY)
@pytest.mark.parametrize("name", SPARSE)
def test_every_recipe_masks_every_network(name, network):
    case = TINY[network]()
    program = gp.capture(case.module, case.args)
    least = 1 if isinstance(RECIPES[name].score, Swaps) else 4  # swaps are of single weights, the others make 2:4
    result = gp.compile(program, recipe=name, pattern="unstructured" if least == 1 else "2:4", calibration_data=[case.args])
    assert result.certificate.passed and result.plan.masks
    assert set(result.plan.masks) == {x.weight.name for x in maskable(program) if x.matrix(x.weight.tensor).shape[-1] >= least}


def test_what_cannot_be_is_said():
    model, data = small()
    for arguments, words in (
        ({"sparsity": 1.2}, "sparsity is the fraction of zeros"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "pattern 2:4 has the sparsity 0.5"),
        ({"sparsity": 0.5, "pruning_ratio": 0.5}, "take no pruning_ratio"),
        ({"sparsity": 0.5, "targets": ["nothing"]}, "no weight that can get zeros is named 'nothing'"),
        ({"recipe": "wanda"}, "recipe 'wanda' needs calibration_data"),
        ({"recipe": "wandas", "calibration_data": data}, "did you mean wanda"),
        ({"recipe": "wanda", "importance": "lamp", "calibration_data": data}, "both say what goes"),
    ):
        with pytest.raises(InvalidInput, match=words):
            gp.compile(model, data[0], **arguments)


def test_the_layer_that_puts_out_the_result_can_be_named():
    model, data = small()
    plan = gp.compile(model, data[0], sparsity=0.5, targets=["4"]).plan
    assert set(plan.masks) == {"4.weight"}
