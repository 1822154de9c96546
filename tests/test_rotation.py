"""Rotating the residual stream: the same network in another basis, then a cut of its weakest directions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import BudgetNotMet, InvalidInput
from graphprune.execute.interpreter import run
from graphprune.prepare import rotated
from graphprune.recipes import together
from graphprune.repair.rotation import principal, stream_of
from graphprune.verify.candidates import divergence
from tests.randomise import randomise, seeded
from tests.zoo import TINY, ChunkGLU, Decoder, SwiGLU


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(0):
        return randomise(transformers.LlamaForCausalLM(config), 1), torch.randint(0, 97, (2, 11))


def plain(mlp):
    with seeded(0):
        return randomise(Decoder(mlp, hidden=44, layers=2), 1), torch.randint(0, 61, (2, 9))


NETS = {
    "swiglu": partial(plain, lambda hidden: SwiGLU(hidden, 70)),
    "chunked": partial(plain, lambda hidden: ChunkGLU(hidden, 54)),  # biases write the stream, too
    "llama": llama,
}


def data(x: Tensor, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, int(x.max()) + 1, x.shape, generator=generator) for _ in range(count)]


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / x.norm()) for x, y in zip(a, b) if isinstance(x, Tensor) and x.is_floating_point())


@pytest.mark.parametrize("name", NETS)
def test_a_rotated_network_is_the_same_network(name):
    model, x = NETS[name]()
    program = gp.capture(model.double(), x)
    weights = {n: v.tensor.clone() for n, v in program.weights.items()}
    turned = rotated(program, data(x))
    inputs = list(program.example_inputs)
    before, after = (run(it, inputs, dtype=torch.float64) for it in (program, turned))
    assert relative(before, after) < 1e-12
    assert all(torch.equal(v.tensor, weights[n]) for n, v in program.weights.items())  # the one given stays
    moved = [n for n, v in turned.weights.items() if not torch.equal(v.tensor, weights[n])]
    assert len(moved) > 8
    other = torch.linalg.qr(torch.randn(stream_of(program).group.size, stream_of(program).group.size, dtype=torch.float64))[0]
    assert relative(before, run(rotated(program, basis=other), inputs, dtype=torch.float64)) < 1e-12
    assert relative(before, run(rotated(program, basis=2 * other), inputs, dtype=torch.float64)) > 1e-3  # what is no rotation shows


def test_the_basis_is_that_of_what_the_norms_put_out():
    model, x = NETS["swiglu"]()
    program = gp.capture(model.double(), x)
    stream, items = stream_of(program), data(x)
    assert len(stream.norms) == 5 and stream.group.size == 44
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda m, args, y: seen.append((y / m.weight).detach().reshape(-1, 44)))
    with torch.no_grad():
        for item in items:
            model(item)
    rows = torch.cat(seen)
    basis = principal(program, stream, items)
    variances = (rows @ basis).square().sum(0)
    torch.testing.assert_close(variances, torch.linalg.eigvalsh(rows.T @ rows).flip(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETS)
def test_slicing_is_a_proven_cut_of_the_rotated_network(name):
    model, x = NETS[name]()
    result = gp.compile(model, x, recipe="slicegpt", pruning_ratio=0.25, calibration_data=data(x), round_to=4)
    assert result.certificate.status == "passed"
    (entry,) = result.plan.entries.values()
    assert entry.kind == "hidden" and entry.removed == tuple(range(entry.size - len(entry.removed), entry.size))
    size, kept = entry.size, entry.size - len(entry.removed)
    scales = [w for n, w in result.module.named_parameters() if "norm" in n]
    for scale in scales:
        torch.testing.assert_close(scale.detach(), torch.full((kept,), math.sqrt(size / kept)))
    again = gp.apply(model, result.plan, x, calibration_data=data(x), verify=False)
    with torch.no_grad():
        a, b = (r.module(x) for r in (result, again))
    a, b = (getattr(y, "logits", y) for y in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(InvalidInput, match="calibration_data it was made with"):
        gp.apply(model, result.plan, x, verify=False)


def test_a_stream_of_low_rank_is_sliced_without_loss():
    """A quarter of the directions is never used: slicing them away changes nothing, cutting as many channels does."""
    model, x = NETS["swiglu"]()
    with torch.no_grad():
        low = torch.linalg.qr(torch.randn(44, 44, generator=torch.Generator().manual_seed(0)))[0][:, :33]
        keep = low @ low.T
        model.embed.weight.copy_(model.embed.weight @ keep)
        for block in model.blocks:
            for weight in (block.attention.o.weight, block.mlp.down.weight):
                weight.copy_(keep @ weight)
        dense = model(x)
    sliced = gp.compile(model, x, recipe="slicegpt", pruning_ratio=0.25, calibration_data=data(x, 8), round_to=1)
    plain = gp.compile(model, x, units=("hidden",), pruning_ratio=0.25, round_to=1)
    with torch.no_grad():
        errors = [float((r.module(x) - dense).norm() / dense.norm()) for r in (sliced, plain)]
    assert sliced.module.embed.weight.shape == (61, 33)
    assert errors[0] < 1e-3 < 0.1 < errors[1]


@pytest.mark.parametrize("name, why", [("tied", "tied weights"), ("vit", "conv2d"), ("mlp", "no group of kind hidden")])
def test_streams_that_cannot_be_rotated_say_why(name, why):
    case = TINY[name]()
    with pytest.raises(InvalidInput, match=why):
        rotated(gp.capture(case.module, case.args))


def test_layer_norms_do_not_commute():
    model, x = NETS["swiglu"]()
    model.blocks[1].norm1 = nn.LayerNorm(44)
    with pytest.raises(InvalidInput, match=r"layer_norm at blocks\.1\.norm1 does not commute with a rotation: only RMS norms do"):
        rotated(gp.capture(model, x))


# ---- our own composition


@pytest.mark.parametrize("name", ["swiglu", "llama"])
def test_stream_and_insides_are_cut_together_by_measured_loss(name):
    model, x = NETS[name]()
    calibration = data(x, 8)
    arguments = {"budget": {"params": "60%"}, "calibration_data": calibration, "round_to": 1, "verify": False}
    ours = gp.compile(model, x, recipe="slice_refit", **arguments)
    sliced = gp.compile(model, x, recipe="slicegpt", **arguments)
    assert ours.report.after.params <= 0.6 * ours.report.before.params
    with torch.no_grad():
        far = [sum(divergence(model(y), it.module(y)) for y in calibration) for it in (ours, sliced)]
    assert far[0] < far[1]
    by_ratio = gp.compile(model, x, recipe="slice_refit", pruning_ratio=0.2, calibration_data=calibration, round_to=1)
    assert by_ratio.certificate.status == "passed"
    lost = [len(e.removed) / e.size for e in by_ratio.plan.entries.values()]
    assert max(lost) > 0.2, "a ratio is that of all groups together: the search has room"
    assert by_ratio.report.after.params < 0.75 * by_ratio.report.before.params  # 0.739 where every group loses a fifth


def test_copies_of_the_readers_are_held_for_one_width_at_a_time(monkeypatch):
    held = []

    class Counted(together.Copies):
        def __call__(self, removed):
            found = super().__call__(removed)
            held.append(max(sum(weight is key[0] for key in self.known) for weight in self.readers))
            return found

    monkeypatch.setattr(together, "Copies", Counted)
    model, x = plain(lambda hidden: SwiGLU(hidden, 70))
    gp.compile(model, x, recipe="slice_refit", budget={"params": "60%"}, calibration_data=data(x, 8), round_to=1, verify=False)
    levels = len(together.Together().levels)
    assert len(held) > 2 * (levels + 2) and max(held) <= levels + 2  # each alone, and two whole candidates


def test_a_budget_that_no_levels_meet_is_an_error():
    model, x = plain(lambda hidden: SwiGLU(hidden, 70))
    with pytest.raises(BudgetNotMet):
        gp.compile(model, x, recipe="slice_refit", budget={"params": "1%"}, calibration_data=data(x))


@pytest.mark.parametrize("slow", ["neuron", "hidden"])
def test_under_a_budget_of_latency_goes_what_takes_time(slow):
    model, x = NETS["swiglu"]()
    program = gp.capture(model, x)
    sizes = {g.name: g.size for g in program.analysis.groups if g.kind == slow}
    asked = []

    def measure(name, removed):  # half of the time is spent on one kind of unit
        asked.append(removed)
        return 10 - 5 * sum(len(removed.get(group, ())) for group in sizes) / sum(sizes.values()), 10.0

    arguments = {"recipe": "slice_refit", "calibration_data": data(x, 8), "round_to": 1, "measure": measure}
    plan = gp.plan(program, budget={"latency_ms": "80%"}, **arguments)
    assert 0.7 < measure("latency_ms", plan.removed)[0] / 10 <= 0.8
    assert {program.analysis.by_name[name].kind for name in plan.removed} == {slow}
    assert plan.settings["measured"]["latency_ms"] == [10.0, measure("latency_ms", plan.removed)[0]]
    both = gp.plan(program, budget={"latency_ms": "80%", "params": "60%"}, **arguments)
    assert measure("latency_ms", both.removed)[0] <= 8
    sizes_of = gp.apply(program, both, calibration_data=data(x, 8), verify=False).report
    assert sizes_of.after.params <= 0.6 * sizes_of.before.params
    with pytest.raises(BudgetNotMet):
        gp.plan(program, budget={"latency_ms": "30%"}, **arguments)


def test_other_searches_take_no_budget_of_latency():
    model, x = NETS["swiglu"]()
    with pytest.raises(InvalidInput, match="searches by itself"):
        gp.plan(model, x, recipe="tyr", budget={"latency_ms": "50%"}, calibration_data=data(x))
