"""`torch.compile(model, backend="graphprune")`: the pruned network of the same plan, whatever the batch, the mode and the weights."""

import gc

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from graphprune.backends import torch_compile
from graphprune.backends.torch_compile import GraphPruneBackend, last_report
from graphprune.capture.torch_export import capture_torch
from graphprune.execute.interpreter import run
from graphprune.plan import Plan
from graphprune.surgery import Cut, apply_cut

HALF = {"pruning_ratio": 0.5, "round_to": 1}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    torch_compile._backends.clear()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.Sequential(Block(12, 9, 12), Block(12, 14, 20))
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        return self.fc(self.body(torch.relu_(self.stem(x))).mean((2, 3)))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(7, 30), nn.Linear(30, 7)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Broken(nn.Module):
    """A graph break between two blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = MLP(), MLP()

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def images(batch):
    return torch.randn(batch, 3, 8, 8)


def llama():
    transformers = pytest.importorskip("transformers")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(hidden_size=48, intermediate_size=110, num_hidden_layers=2, vocab_size=97, use_cache=False, **heads)
    return transformers.LlamaForCausalLM(config).eval()


def tokens(batch):
    return torch.randint(0, 97, (batch, 7))


def tensor(output):
    return getattr(output, "logits", output)


def pruned(model, plan, x):
    """The same cut through export and surgery."""
    program = capture_torch(model, (x,))
    return run(apply_cut(program, Cut(program.analysis, plan.resolve(program))), (x,))[0]


def assert_runs_pruned(model, compiled, *inputs, report=last_report):
    for x in inputs:
        with torch.no_grad():
            found, dense = tensor(compiled(x)), tensor(model(x))
            torch.testing.assert_close(found, pruned(model, report().plan, x), rtol=1e-4, atol=1e-5)
        assert (found - dense).abs().max() > 1e-3


MODELS = [pytest.param(lambda: ConvNet().eval(), images, id="convnet"), pytest.param(llama, tokens, id="llama")]


@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_two_batch_sizes_agree_with_the_exported_program_under_the_same_plan(make, inputs):
    model = make()
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "aot_eager"}, fullgraph=True)
    assert_runs_pruned(model, compiled, inputs(2), inputs(3), inputs(5))
    static, dynamic = last_report().graphs
    assert (static.status, dynamic.status, static.dynamic, dynamic.dynamic) == ("pruned", "pruned", False, True)
    assert static.plan.removed == dynamic.plan.removed and static.plan.removed
    assert (static.reused, dynamic.reused > 0) == (0, True)
    assert static.params_after == dynamic.params_after < static.params_before
    assert static.certificate.startswith("passed") and dynamic.certificate.startswith("passed")
    assert last_report().graph_breaks == 0 and "dynamic sizes" in str(last_report())


@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_new_weights_take_effect(make, inputs):
    model, x = make(), inputs(2)
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "eager"})
    assert_runs_pruned(model, compiled, x)
    model.load_state_dict({k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()})
    assert_runs_pruned(model, compiled, x)
    with torch.no_grad():
        next(model.parameters()).mul_(-1.0)
    assert_runs_pruned(model, compiled, x)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25
    assert_runs_pruned(model, compiled, x)
    assert len(last_report().graphs) == 1, "none of this recompiles"


@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_a_loss_falls_in_training_and_evaluation_sees_it(make, inputs):
    model, x = make(), inputs(2)
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "aot_eager"})
    assert_runs_pruned(model, compiled, x)
    removed = last_report().plan.removed
    model.train()
    target, losses = torch.randn_like(tensor(model(x))), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(12):
        loss = (tensor(compiled(x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    assert_runs_pruned(model, compiled, x)
    assert last_report().plan.removed == removed and last_report().graphs[-1].gradients


def test_gradients_reach_the_kept_units_only():
    model, x = MLP(), torch.randn(4, 7)
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "aot_eager"})
    compiled(x).square().sum().backward()
    ((_, gone),) = last_report().plan.removed.items()
    kept = [i for i in range(30) if i not in gone]
    assert len(gone) == 15 and model.up.weight.grad[list(gone)].abs().max() == 0 and model.down.weight.grad[:, list(gone)].abs().max() == 0
    up, down = (layer.weight.detach().clone().requires_grad_() for layer in (model.up, model.down))
    y = x + torch.relu(x @ up[kept].T + model.up.bias[kept]) @ down[:, kept].T + model.down.bias
    y.square().sum().backward()
    torch.testing.assert_close(model.up.weight.grad, up.grad)


def test_batch_statistics_are_written_to_the_buffers_of_the_user():
    model, x = ConvNet().train(), images(4)
    reference = ConvNet().train()
    reference.load_state_dict(model.state_dict())
    backend = GraphPruneBackend(**HALF, inner="aot_eager")
    torch.compile(model, backend=backend)(x)
    ours, before = model.state_dict(), reference.state_dict()
    plan = backend.report.plan
    program = capture_torch(reference.eval(), (x,))
    groups = {m.tensor: (g.name, m.index) for g in program.groups if g.kind == "channel" for m in g.members}
    for name in ("body.0.bn1.running_mean", "body.1.bn1.running_var"):
        group, index = groups[name]
        gone = index[list(plan.removed[group])].reshape(-1)
        moved = (ours[name] - before[name]).abs() > 1e-6
        assert not moved[gone].any() and moved.sum() == len(moved) - len(gone)
    assert ours["body.0.bn1.num_batches_tracked"] == 1


def test_inference_tensors_and_inference_mode():
    with torch.inference_mode():
        model = MLP().eval()
        compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "eager"})
        x = torch.randn(3, 7)
        before = compiled(x)
        model.up.weight.mul_(3.0)
        assert (compiled(x) - before).abs().max() > 1e-3


def test_two_instances_of_a_class_keep_units_of_their_own():
    models = [MLP().eval() for _ in range(10)]  # more than Dynamo would recompile one module
    for model in models:
        model.compile(backend="graphprune", options={**HALF, "inner": "eager"})
    x = torch.randn(4, 7)
    removed = []
    for model in models:
        with torch.no_grad():
            found = model(x)
            plan = last_report().graphs[-1].plan
            torch.testing.assert_close(found, pruned(model, plan, x))
        removed.append(plan.removed["up:neuron"])
    assert len(set(removed)) > 1 and len(last_report().graphs) == len(models)


def test_graph_breaks_are_counted_and_both_sides_are_pruned():
    model, x = Broken().eval(), torch.randn(4, 7)
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "eager"})
    assert_runs_pruned(model, compiled, x)
    assert [g.status for g in last_report().graphs] == ["pruned", "pruned"]
    assert last_report().graph_breaks == 1 and "break:" in str(last_report())


def test_a_given_plan_is_applied():
    model, x = ConvNet().eval(), images(2)
    program = capture_torch(model, (x,))
    plan = Plan.of(program, {"body.0.conv1:channel": [0, 4, 5], "body.1.conv1:channel": [13]})
    compiled = torch.compile(model, backend="graphprune", options={"plan": plan, "inner": "eager"})
    assert_runs_pruned(model, compiled, x, images(3))
    assert last_report().plan.removed == plan.removed


def test_layers_go_and_stay_away_for_other_sizes():
    model = nn.Sequential(MLP(), MLP(), MLP()).eval()
    options = {"pruning_ratio": 0.5, "units": ("layer",), "scope": "global", "inner": "eager"}
    compiled = torch.compile(model, backend="graphprune", options=options)
    assert_runs_pruned(model, compiled, torch.randn(2, 7), torch.randn(3, 7))
    assert {g.params_after for g in last_report().graphs} != {last_report().graphs[0].params_before}


class Plain(nn.Module):
    def forward(self, x):
        return x * 2 + 1


def test_a_graph_with_nothing_to_cut_runs_as_it_is():
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(Plain(), backend="graphprune", options={**HALF, "inner": "eager"})(x), x * 2 + 1)
    (graph,) = last_report().graphs
    assert (graph.status, graph.reason) == ("unpruned", "no group can be cut")


class WritesArgument(nn.Module):
    """As a key-value cache: memory of an input is written, and read again under another name."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP()

    def forward(self, x, cache):
        cache[:, 0] = x[:, 0]
        return self.mlp(x + cache)


def test_inputs_may_be_written():
    model, x, cache = WritesArgument().eval(), torch.randn(3, 7), torch.randn(3, 7)
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "aot_eager"})
    with torch.no_grad():
        ours = cache.clone()
        found = compiled(x, ours)
        model(x, cache)
        kept = [i for i in range(30) if i not in last_report().plan.removed["mlp.up:neuron"]]
        up, down, y = model.mlp.up, model.mlp.down, x + cache
        expected = y + torch.relu(y @ up.weight[kept].T + up.bias[kept]) @ down.weight[:, kept].T + down.bias
    torch.testing.assert_close(ours, cache)
    torch.testing.assert_close(found, expected)
    assert len(kept) == 15


class WritesWeight(nn.Module):
    """A buffer is written through a view of it."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP()
        self.register_buffer("table", torch.ones(7))

    def forward(self, x):
        self.table[:3].mul_(2.0)
        return self.mlp(x) * self.table


def test_what_cannot_be_captured_runs_unpruned_and_says_so(caplog):
    model, x = WritesWeight().eval(), torch.randn(3, 7)
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "eager"})
    with torch.no_grad():
        found = compiled(x)
        model.table.div_(torch.tensor([2.0] * 3 + [1.0] * 4))
        torch.testing.assert_close(found, model(x))
    assert "writes to an argument" in last_report().graphs[0].reason and "runs unpruned" in caplog.text


class WritesOwnMemory(nn.Module):
    """As Swin builds its masks: a new tensor is filled slice by slice."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        mask = x.new_zeros(7)
        mask[:3] = 1.0
        mask[3:] = 2.0
        return self.mlp(x) * mask


def test_writes_into_fresh_memory_are_made_functional():
    model = WritesOwnMemory().eval()
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "inner": "eager"})
    assert_runs_pruned(model, compiled, torch.randn(3, 7), torch.randn(4, 7))


class MergedAxis(nn.Module):
    """Batch and heads share an axis, as in nn.MultiheadAttention: its size is symbolic, the heads go all the same."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(30, 30) for _ in range(4))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 5, 6).transpose(1, 2).reshape(b * 5, n, 6) for layer in (self.q, self.k, self.v))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 6**0.5, -1), v)
        return self.out(y.view(b, 5, n, 6).transpose(1, 2).reshape(b, n, 30))


def test_heads_that_share_an_axis_with_a_symbolic_batch():
    model = MergedAxis().eval()
    options = {"pruning_ratio": 0.4, "round_to": 1, "units": ("head",), "inner": "eager"}
    compiled = torch.compile(model, backend="graphprune", options=options)
    assert_runs_pruned(model, compiled, *(torch.randn(b, 9, 30) for b in (2, 3, 4)))
    assert all(g.plan.removed for g in last_report().graphs) and last_report().graphs[1].dynamic


def test_what_is_remembered_of_a_model_dies_with_it():
    gc.collect()
    before = len(torch_compile._slices), len(torch_compile._decisions)
    model = MLP().eval()
    with torch.no_grad():
        torch.compile(model, backend="graphprune", options={**HALF, "inner": "eager"})(torch.randn(2, 7))
    assert len(torch_compile._slices) > before[0]
    del model
    torch.compiler.reset()
    gc.collect()
    assert (len(torch_compile._slices), len(torch_compile._decisions)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratoi": 0.5}, "unknown option 'pruning_ratoi'"),
        ({"calibration_data": []}, "needs data"),
        ({"plan": "plan.json"}, "takes a graphprune.Plan, found str"),
        ({"plan": Plan(), "pruning_ratio": 0.5}, "whole decision"),
        ({"on_unknown": "skip"}, "'freeze' or 'raise'"),
        ({"pruning_ratio": 1.5}, "less than 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(MLP(), backend="graphprune", options=options)(torch.randn(2, 7))


def test_a_wrong_cut_is_caught(monkeypatch):
    real = torch_compile.apply_cut

    def shifted(program, cut):
        result = real(program, cut)
        weight = result.weights["up.weight"].tensor
        weight.data = weight.data.roll(1, 0)
        return result

    monkeypatch.setattr(torch_compile, "apply_cut", shifted)
    with pytest.raises(BackendCompilerFailed, match="is not the masked graph"):
        torch.compile(MLP().eval(), backend="graphprune", options={**HALF, "inner": "eager"})(torch.randn(2, 7))


@pytest.mark.slow
def test_inductor_compiles_the_pruned_graph():
    model = ConvNet().eval()
    compiled = torch.compile(model, backend="graphprune", options=HALF)
    assert_runs_pruned(model, compiled, images(2), images(3))
    model.train()
    compiled(images(3)).sum().backward()
    assert model.stem.weight.grad is not None and last_report().graphs[-1].gradients


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_cuda(make, inputs, mode):
    model = make().cuda()
    compiled = torch.compile(model, backend="graphprune", options={**HALF, "mode": mode})
    for batch in (2, 3):
        x = inputs(batch).cuda()
        for _ in range(3):  # a CUDA graph is captured at the second call
            assert_runs_pruned(model, compiled, x)
    with torch.no_grad():
        next(model.parameters()).mul_(-1.0)
    assert_runs_pruned(model, compiled, x)
    model.train()
    tensor(compiled(x)).square().mean().backward()
    assert next(model.parameters()).grad.is_cuda
