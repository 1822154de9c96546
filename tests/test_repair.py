"""Repairs: held-out error falls, nothing of the user's is written, and where an exact answer exists it is found."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.capture.onnx_file import capture_onnx
from graphprune.capture.torch_export import capture_torch
from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import run
from graphprune.planning import make_plan
from graphprune.program import Program
from graphprune.repair import REPAIRS, repaired
from graphprune.repair.affine import affine
from graphprune.surgery import Cut, apply_cut
from tests.zoo import TINY

BATCHES = 12


def program_of(name: str) -> Program:
    case = TINY[name]()
    return capture_torch(case.module, case.args)


def samples(program: Program, seed: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    (x,) = program.example_inputs
    if x.is_floating_point():
        return [[torch.randn(x.shape, generator=generator)] for _ in range(BATCHES)]
    return [[torch.randint(0, int(x.max()) + 1, x.shape, generator=generator)] for _ in range(BATCHES)]


def error(program: Program, pruned: Program, data) -> float:
    return sum(float((run(program, x)[0] - run(pruned, x)[0]).square().sum()) for x in data)


def cut_of(program: Program, ratio: float = 0.3) -> Cut:
    return Cut(program.analysis, make_plan(program, pruning_ratio=ratio).removed)


@pytest.mark.parametrize(
    "name, repairs, data, factor",
    [
        ("resnet", ("bn",), False, 0.8),
        ("densenet", ("bn",), False, 0.8),
        ("resnet", ("bn",), True, 0.8),
        ("mobilenet", ("bn",), True, 0.6),
        ("resnet", ("bias",), True, 0.1),
        ("vgg", ("bias",), True, 0.1),
        ("vit", ("bias",), True, 0.6),
        ("lstm", ("bias",), True, 0.7),
        ("mlp", ("least_squares",), True, 0.5),
        ("vgg", ("least_squares",), True, 0.1),
        ("unet", ("least_squares",), True, 0.6),
        ("gqa", ("least_squares",), True, 0.6),
        ("vit", ("removed_mean",), True, 0.9),
        ("vit", ("least_squares", "bias"), True, 0.4),
    ],
)
def test_the_error_on_other_data_falls(name, repairs, data, factor):
    program = program_of(name)
    cut, unseen = cut_of(program), samples(program, 1)
    before = error(program, apply_cut(program, cut), unseen)
    after = error(program, repaired(program, cut, apply_cut(program, cut), repairs, samples(program, 0) if data else None), unseen)
    assert after < factor * before


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("repair", [name for name in REPAIRS if name != "norm_width"])  # that one is of streams: tests/test_rotation.py
def test_nothing_of_the_users_is_written_and_no_shape_changes(name, repair):
    state = torch.random.get_rng_state()
    program = program_of(name)
    module = program.source.module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    cut = cut_of(program)
    plain, mended = apply_cut(program, cut), repaired(program, cut, apply_cut(program, cut), (repair,), samples(program, 0))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    moved = {k for k, v in mended.weights.items() if not torch.equal(v.tensor, plain.weights[k].tensor)}
    assert bool(moved) == (repair != "bn" or name == "resnet")
    for key, value in plain.weights.items():
        new = mended.weights[key].tensor
        assert new.shape == value.tensor.shape and new.dtype == value.tensor.dtype and type(new) is type(value.tensor)
        assert new.requires_grad == value.tensor.requires_grad
    kinds = {
        "bn": ("running_mean", "running_var"), "bias": ("bias",), "removed_mean": ("bias", "running_mean"),
        "least_squares": ("weight", "bias"),
    }[repair]  # fmt: skip
    assert all(key.endswith(kinds) for key in moved)
    (x,) = samples(program, 1)[0]
    torch.testing.assert_close(mended.source.graph_module(x), run(mended, [x])[0])


def test_bias_restores_the_mean_of_every_layer():
    program = program_of("vgg")
    cut, data = cut_of(program), samples(program, 0)[:1]
    mended = repaired(program, cut, apply_cut(program, cut), ("bias",), data)

    def means(of: Program):
        found = {}

        def intercept(node, args, compute):
            results = compute(args)
            layer = affine(node)
            if layer is not None and layer.bias is not None:
                axis = layer.channel % results[0].dim()
                found[node.name] = results[0].mean([a for a in range(results[0].dim()) if a != axis])
            return results

        run(of, data[0], intercept=intercept)
        return found

    wanted, got = means(program), means(mended)
    assert len(got) == 4
    for node in program.nodes:
        if node.name in got:
            keep = cut.keep(node.outputs[0], affine(node).channel % len(node.outputs[0].shape))
            expected = wanted[node.name] if keep is None else wanted[node.name][torch.from_numpy(keep)]
            torch.testing.assert_close(got[node.name], expected, rtol=1e-4, atol=1e-5)


def test_removed_mean_adds_what_removed_inputs_gave_and_follows_nothing_else():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
        data = [[torch.randn(16, 3) + 1] for _ in range(3)]
    program = capture_torch(net, (data[0][0],))
    gone = next(g.name for g in program.groups if g.size == 6)
    cut = Cut(program.analysis, {gone: [1, 4]})
    plain = apply_cut(program, cut)
    mended = repaired(program, cut, apply_cut(program, cut), ("removed_mean",), data)
    hidden = net[1](net[0](torch.cat([x for (x,) in data])))
    expected = net[2].bias + net[2].weight[:, [1, 4]] @ hidden[:, [1, 4]].mean(0)
    torch.testing.assert_close(mended.weights["2.bias"].tensor, expected.detach())
    moved = {k for k, v in mended.weights.items() if not torch.equal(v.tensor, plain.weights[k].tensor)}
    assert moved == {"2.bias"}


class Apart(nn.Module):
    """A product whose bias is an addition of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


WITHOUT_BIAS = {
    "batch norm": lambda: (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), (5, 3, 8, 8)),
    "batch norm without scale": lambda: (nn.Linear(3, 6), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4, affine=False), (16, 3)),
    "addition": lambda: (nn.Linear(3, 6), Apart(), nn.Identity(), (16, 3)),
}


@pytest.mark.parametrize("kind", WITHOUT_BIAS)
@pytest.mark.parametrize("dialect", ["aten", "onnx"])
def test_where_a_layer_has_no_bias_what_comes_after_it_takes_up_the_mean(tmp_path, kind, dialect):
    torch.manual_seed(0)
    first, second, third, shape = WITHOUT_BIAS[kind]()
    net = nn.Sequential(first, nn.ReLU(), second, third, nn.ReLU(), nn.Flatten()).eval()
    if hasattr(third, "running_mean"):
        third.running_mean.uniform_(-1, 1)  # zeros would be one constant with the zeros of an absent bias
    data = [[torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1] for seed in range(3)]
    program = capture_torch(net, (data[0][0],))
    if dialect == "onnx":
        torch.onnx.export(net, (data[0][0],), tmp_path / "net.onnx", dynamo=True, verbose=False)
        program = capture_onnx(tmp_path / "net.onnx")
    cut = Cut(program.analysis, {next(g.name for g in program.groups if g.size == 6): [1, 4]})
    pruned = apply_cut(program, cut)
    last = next(node for node in program.nodes if node.op_type in ("relu", "Relu") and node.outputs[0].shape[1] == 4)

    def mean(of: Program) -> torch.Tensor:
        """Of what the second layer and what follows it give, channel by channel."""
        found = []

        def intercept(node, args, compute):
            if node.name == last.name:
                found.append(next(x for x in args.values() if isinstance(x, torch.Tensor)).transpose(0, 1).flatten(1))
            return compute(args)

        for (x,) in data:
            run(of, [x], intercept=intercept)
        return torch.cat(found, 1).mean(1)

    wanted, before = mean(program), mean(pruned)
    after = mean(repaired(program, cut, pruned, ("removed_mean",), data))
    assert (before - wanted).abs().max() > 1e-3
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("answer", (lambda normed, y: normed + y, lambda normed, y: (normed, y)), ids=("an addition", "the caller"))
def test_what_others_read_takes_up_nothing(answer):
    class Twice(nn.Module):
        """The batch norm reads the product, and so does somebody else."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(3, 6), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(self.first(x).relu())
            return answer(self.norm(y), y)

    data = [[torch.randn(16, 3) + 1]]
    program = capture_torch(Twice().eval(), (data[0][0],))
    cut = Cut(program.analysis, {next(g.name for g in program.groups if g.size == 6): [1, 4]})
    plain, mended = apply_cut(program, cut), repaired(program, cut, apply_cut(program, cut), ("removed_mean",), data)
    assert all(torch.equal(v.tensor, plain.weights[k].tensor) for k, v in mended.weights.items())


def test_batch_norm_follows_a_shift_and_a_scale():
    """A removed constant channel shifts the next norm's input, and a mean that moved by as much takes it out again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        with torch.no_grad():
            net[0].weight[2].zero_()
            net[0].bias[2] = 5.0
        program = capture_torch(net, (torch.randn(64, 3),))
    name = next(g.name for g in program.analysis.groups if g.size == 6)
    cut = Cut(program.analysis, {name: [2]})
    mended = repaired(program, cut, apply_cut(program, cut), ("bn",), [program.example_inputs])
    torch.testing.assert_close(mended.weights["2.running_mean"].tensor, net[2].running_mean - 5.0 * net[1].weight[:, 2])
    torch.testing.assert_close(mended.weights["2.running_var"].tensor, net[2].running_var)
    torch.testing.assert_close(run(mended, program.example_inputs)[0], net(*program.example_inputs))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_least_squares_is_exact_where_removed_inputs_depend_on_kept_ones(kind, has_bias, monkeypatch):
    monkeypatch.setattr("graphprune.repair.refit.DAMPING", 1e-8)
    dims = {"linear": 0, "conv1d": 1, "conv2d": 2}[kind]
    first = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}[dims]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = () if dims == 0 else (1,)
        last = first(8, 5, bias=has_bias) if dims == 0 else first(8, 5, 3, stride=2, padding=1, bias=has_bias)
        net = nn.Sequential(first(4, 8, *wide, bias=has_bias), last).eval()
        program = capture_torch(net, (torch.randn(32, 4, *([9] * dims)),))
    name = next(g.name for g in program.analysis.groups if g.size == 8)
    cut = Cut(program.analysis, {name: [1, 6]})
    plain = apply_cut(program, cut)
    mended = repaired(program, cut, apply_cut(program, cut), ("least_squares",), [program.example_inputs])
    before, after = (error(program, p, [program.example_inputs]) for p in (plain, mended))
    assert after < 1e-6 * before


def test_the_onnx_file_is_repaired_alike(tmp_path):
    case = TINY["vgg"]()
    path = tmp_path / "vgg.onnx"
    torch.onnx.export(case.module, case.args, path, dynamo=True, verbose=False)
    ours, theirs = capture_torch(case.module, case.args), capture_onnx(path)
    data = samples(ours, 0)
    plan = make_plan(ours, pruning_ratio=0.3)
    cuts = [Cut(p.analysis, plan.resolve(p)) for p in (ours, theirs)]
    mended = [repaired(p, c, apply_cut(p, c), ("least_squares", "bias"), data) for p, c in zip((ours, theirs), cuts)]
    for x in samples(ours, 1):
        torch.testing.assert_close(run(mended[0], x)[0], run(mended[1], x)[0], rtol=1e-3, atol=1e-4)
    model = mended[1].source.model
    for name, value in mended[1].weights.items():
        if name in model.graph.initializers:
            assert np.array_equal(model.graph.initializers[name].const_value.numpy(), value.tensor.numpy())
    again = capture_onnx(model)
    torch.testing.assert_close(run(again, data[0])[0], run(mended[1], data[0])[0])


def test_bfloat16_stays_bfloat16():
    case = TINY["mlp"]()
    program = capture_torch(case.module.to(torch.bfloat16), (case.args[0].to(torch.bfloat16),))
    cut = cut_of(program)
    mended = repaired(program, cut, apply_cut(program, cut), REPAIRS, [case.args[0]])
    assert {v.tensor.dtype for v in mended.weights.values() if v.is_weight} == {torch.bfloat16}


def pictures(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of noisy, unevenly lit pictures (count, 1, 12, 12), and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 10, (count,), generator=generator)
    shown = torch.randn(10, 1, 12, 12, generator=torch.Generator().manual_seed(99)).abs()[classes]
    light, noise = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator), 0.8 * torch.randn(count, 1, 12, 12, generator=generator)
    return shown * light + noise, classes


@cache
def trained(norms: bool) -> nn.Module:
    """A small network that has learned to tell them apart."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), *([nn.BatchNorm2d(outputs)] if norms else []), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(*block(1, 16, 1), *block(16, 24, 2), *block(24, 32, 2), *head)
        for m in net.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for step in range(150):
            x, classes = pictures(step, 64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), classes).backward()
            optimizer.step()
    return net.eval()


def loss(program: Program) -> float:
    x, classes = pictures(10_000, 500)
    logits = torch.cat([run(program, [part])[0] for part in x.split(50)])
    return float(nn.functional.cross_entropy(logits, classes))


@pytest.mark.parametrize("repairs", [("bn",), ("bias",), ("bn", "bias"), ("least_squares",)])
@pytest.mark.parametrize("ratio", [0.15, 0.25])
@pytest.mark.parametrize("norms", [True, False])
def test_a_trained_network_is_better_after_repair(norms, ratio, repairs):
    program = capture_torch(trained(norms), (torch.randn(8, 1, 12, 12),))
    cut = Cut(program.analysis, make_plan(program, pruning_ratio=ratio, round_to=1).removed)
    data = [pictures(20_000 + i, 64)[0] for i in range(8)]
    before, after = loss(apply_cut(program, cut)), loss(repaired(program, cut, apply_cut(program, cut), repairs, data))
    assert loss(program) + 0.05 < before  # there is something to mend
    if repairs == ("bn",) and not norms:
        assert after == before
    else:
        assert after < before
        assert after < 0.9 * before or not norms


def test_refusals():
    program = program_of("mlp")
    cut = cut_of(program)
    with pytest.raises(InvalidInput, match="no repair is named 'luck'; known are bn, bias, removed_mean, least_squares"):
        repaired(program, cut, apply_cut(program, cut), ("luck",))
    with pytest.raises(InvalidInput, match="repair 'bias' needs calibration_data; without data only bn works"):
        repaired(program, cut, apply_cut(program, cut), ("bias",))
