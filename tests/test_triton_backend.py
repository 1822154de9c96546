"""The backend of sparse kernels: masks to packed weights to a module that computes what the dense masked module computes.

There is no speed on a machine without a GPU, so kernels are forced here and run in Triton's interpreter; what the gate would say is tested
with measurements that are given to it.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune import bench
from graphprune.backends import products
from graphprune.backends.base import lower
from graphprune.backends.crossover import DENSITIES, random_weight
from graphprune.backends.gate import Gate, Measurement, Roof, Table
from graphprune.backends.kernels import library
from graphprune.backends.products import FORMATS, TOKENS, Product
from graphprune.backends.triton import FusedSequential, SparseLinear, sparse_module
from graphprune.errors import InvalidInput
from graphprune.report import Report, tables
from tests.randomise import seeded
from tests.test_cli import call

PATTERNS = {"block:16x16": "block_sparse", "2:4": "two_four", "unstructured": "unstructured"}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Mlp(nn.Module):
    """A gated MLP, whose end is a plain stack, and a head that is not masked."""

    def __init__(self, width: int = 48, inner: int = 80):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.gate = nn.Linear(width, inner, bias=False)
        self.down = nn.Sequential(nn.Linear(inner, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


def pruned(pattern: str = "block:16x16", model: nn.Module | None = None, inputs=None, **options):
    with seeded(0):
        model, inputs = model or Mlp().eval(), torch.randn(3, 48) if inputs is None else inputs
        return gp.compile(model, inputs, sparsity=0.5, pattern=pattern, backend="triton", progress=False, **options)


@pytest.fixture(scope="module", params=PATTERNS)
def result(request):
    return pruned(request.param)


def forced(result) -> nn.Module:
    return lower(result, "triton", force=True, tokens=(1, 4))


def kernels_of(module: nn.Module) -> set[str]:
    return {d.path for layer in module.sparse_layers for d in layer.decisions}


def weights_of(module: nn.Module) -> set[str]:
    return {name for layer in module.sparse_layers for name in layer.name.split(" + ")}


# ---- dense and sparse compute the same


def test_without_a_gpu_every_layer_is_dense_and_the_report_says_why(result):
    x = torch.randn(2, 48)
    torch.testing.assert_close(result(x), result.module(x))
    rows = result.report.kernels
    assert {row.path for row in rows} == {"dense"} and all("no CUDA device: nothing to gain" in row.reason for row in rows)
    assert {row.name for row in rows} == set(result.plan.masks) and {row.tokens for row in rows} == set(TOKENS)
    assert "no CUDA device" in str(result.report) and Report.from_json(result.report.to_json()).kernels == rows


@pytest.mark.parametrize("tokens", (1, 3))
def test_sparse_module_equals_the_dense_masked_module(result, tokens):
    module, kernel = forced(result), PATTERNS[result.plan.settings["pattern"]]
    assert kernels_of(module) == {kernel} and weights_of(module) == set(result.plan.masks)
    x = torch.randn(tokens, 48)
    with torch.no_grad():
        torch.testing.assert_close(module(x), result.module(x), **CLOSE)
        module.up.product.formats[kernel].values.mul_(1.1)
        assert not torch.allclose(module(x), result.module(x), rtol=1e-3), "what is computed with is not what the kernel holds"


# ---- layers that read the same value


@pytest.fixture
def launched(monkeypatch):
    """Rows of every sparse product that is computed."""
    rows: list[int] = []
    for name, kernel in list(FORMATS.items()):

        def linear(x, packed, *rest, kernel=kernel):
            rows.append(packed.shape[0])
            return kernel.linear(x, packed, *rest)

        monkeypatch.setitem(FORMATS, name, replace(kernel, linear=linear))
    return rows


def test_layers_that_read_the_same_value_are_one_product(result, launched):
    module, x = forced(result), torch.randn(2, 48)
    assert module.up.product is module.gate.product and module.up.product.rows == ((0, 80), (80, 160))
    assert "gate.weight + up.weight" in {layer.name for layer in module.sparse_layers}
    with torch.no_grad():
        torch.testing.assert_close(module(x), result.module(x), **CLOSE)
        assert launched == [160, 48, 48] and module.up.product.shared is None
        torch.testing.assert_close(module.up(x), result.module.up(x), **CLOSE)  # on its own it stays a linear layer
        gate, up = module.gate(x), module.up(x.clone())
        torch.testing.assert_close((gate, up), (result.module.gate(x), result.module.up(x)), **CLOSE)
        module.gate(x)
        x.mul_(2)
        torch.testing.assert_close(module.up(x), result.module.up(x), **CLOSE)  # x was written since


def test_one_graph_computes_the_common_product_once(result):
    module, x = forced(result), torch.randn(2, 48)
    graphs: list = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend=keep)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), result.module(x), **CLOSE)
    ops = [str(node.target) for graph in graphs for node in graph.graph.nodes if "graphprune" in str(node.target)]
    assert len(graphs) == 1 and len(ops) == 3, ops
    assert module.up.product.shared is None


@pytest.mark.parametrize("faster, joined", ((1.2, True), (0.9, False)))
def test_weights_lie_side_by_side_only_where_that_is_faster(tmp_path, faster, joined):
    def measure(kernel, packed, weight, tokens):
        return Measurement(weight.shape[0] * 2.0, weight.shape[0] / (faster if weight.shape[0] > 80 else 1.0), "tile")

    gate = Gate("cpu", Table(tmp_path, "test"), measure=measure, roof=Roof(1e9, 1e10, 0.0))
    module = sparse_module(pruned(), gate=gate, tokens=(1,))
    assert (module.up.product is module.gate.product) is joined and kernels_of(module) == {"block_sparse"}


def test_what_dense_takes_is_known_where_no_kernel_is_faster(tmp_path):
    """Two kernels take zeros anywhere; without the time of dense, one weight alone could not be held against several side by side."""
    weight = torch.randn(256, 512).bfloat16() * (torch.rand(256, 512) < 0.4)
    times = {"bitmap": Measurement(6.0, 6.0, "tile"), "unstructured": Measurement(5.0, 7.0, "tile")}
    gate = Gate("cpu", Table(tmp_path, "test"), measure=lambda kernel, *_: times[kernel.name], roof=Roof(1e9, 1e10, 0.0))
    decision = gate.decide([FORMATS["bitmap"], FORMATS["unstructured"]], weight, 1)
    assert (decision.path, decision.dense_us) == ("dense", 5.0), decision


@pytest.mark.parametrize("keep_dense", (True, False))
def test_side_by_side_for_few_tokens_and_apart_for_many(tmp_path, launched, keep_dense):
    def measure(kernel, packed, weight, tokens):
        together = weight.shape[0] > 80
        return Measurement(50.0, 10.0 if tokens == 1 else 20.0 * (3 if together else 1), "tile")  # together: 10 against 20, 60 against 40

    gate = Gate("cpu", Table(tmp_path, "test"), measure=measure, roof=Roof(1e9, 1e10, 0.0))
    result = pruned()
    module = sparse_module(result, gate=gate, tokens=(1, 8), keep_dense=keep_dense)
    product = module.up.product
    assert product is module.gate.product and [it.path for it in product.decisions] == ["block_sparse"]
    assert [(layer.name, [d.tokens for d in layer.decisions]) for layer in module.sparse_layers if "up" in layer.name] == [
        ("gate.weight + up.weight", [1]), ("up.weight", [8])
    ]  # fmt: skip
    product.steps = tuple((count, path, "") for count, path, _ in product.steps)  # a tile that exists
    for it in product.each:
        it.steps = tuple((count, path, "") for count, path, _ in it.steps)
    for count, rows in ((1, [160]), (8, [80, 80])):
        x = torch.randn(count, 48)
        launched.clear()
        with torch.no_grad():
            torch.testing.assert_close(module.gate(x) * module.up(x), result.module.gate(x) * result.module.up(x), **CLOSE)
        assert launched == rows


def test_few_and_many_tokens_take_different_paths():
    module = lower(pruned("unstructured"), "triton", force=True, tokens=(1, 64))
    up = module.up.product
    assert up._path(1)[0] == "unstructured" and up._path(2)[0] == up._path(64)[0] == up._path(9999)[0] == "dense"
    reasons = {d.tokens: d.reason for d in up.decisions}
    assert reasons == {1: "forced", 64: "no kernel that was forced takes this weight and number of tokens"}


def test_activation_of_a_plain_stack_is_handed_to_the_layer_before_it(result):
    module, x = forced(result), torch.randn(2, 80)
    assert type(module.down) is FusedSequential and module.down.steps == ((0, "gelu_tanh"), (2, ""))
    with torch.no_grad():
        torch.testing.assert_close(module.down(x), result.module.down(x), **CLOSE)
        torch.testing.assert_close(module.down[0](x), result.module.down[0](x), **CLOSE)  # on its own it stays a linear layer
        module.down.append(nn.Identity())
        torch.testing.assert_close(module.down(x), result.module.down(x), **CLOSE)
    seen: list = []
    hooked = copy.deepcopy(result.module)
    hooked.down[0].register_forward_hook(lambda *args: seen.append(args))
    assert type(sparse_module(hooked, force=True).down) is nn.Sequential, "a hook would see what is behind the activation"


# ---- weights stay the parameters


def test_names_and_tensors_are_those_of_the_original(result, tmp_path):
    module = forced(result)
    assert list(module.state_dict()) == list(result.module.state_dict()) and type(module) is Mlp
    assert module.up.weight is result.module.up.weight and isinstance(module.up, nn.Linear)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    fresh = Mlp()
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    torch.testing.assert_close(fresh(torch.ones(1, 48)), result.module(torch.ones(1, 48)))
    result.save(tmp_path / "out")
    again = gp.load(tmp_path / "out", Mlp())
    assert kernels_of(sparse_module(again, force=True, tokens=(1,))) == kernels_of(module), "masks are read off the zeros"


def test_gradients_keep_zeros_and_the_kernel_follows_the_weights(result):
    module = copy.deepcopy(forced(result))
    mask = result.plan.masks["up.weight"]
    with torch.no_grad():
        module.up.weight.view(-1)[mask.flatten().nonzero()[0]] = 0.0  # a kept weight that happens to be zero trains too
    before, x = module.up.weight.detach().clone(), torch.randn(4, 48)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    module(x).square().mean().backward()
    assert not module.up.weight.grad[~mask].any() and module.up.weight.grad.flatten()[mask.flatten().nonzero()[0]] != 0
    optimizer.step()
    assert torch.equal(module.up.weight == 0, ~mask) and not torch.equal(module.up.weight, before)
    dense = Mlp()
    dense.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x[:3]), dense(x[:3]), **CLOSE)
    assert not torch.allclose(dense(x), result.module(x), rtol=1e-3), "the step changed nothing"


def test_gradients_of_the_input_go_through_the_kernel(result):
    module = copy.deepcopy(forced(result)).requires_grad_(False)
    grads = []
    for it in (module, result.module):
        x = torch.linspace(-1, 1, 96).reshape(2, 48).requires_grad_()
        it(x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.parametrize("training", (False, True))
def test_gradients_are_those_of_the_dense_masked_module(result, training):
    module, dense = copy.deepcopy(forced(result)).train(training), copy.deepcopy(result.module)
    outputs, grads = [], []
    for it in (module, dense):
        x = torch.linspace(-1, 1, 96).reshape(2, 48).requires_grad_()
        outputs.append(it(x))
        outputs[-1].square().sum().backward()
        grads.append([x.grad, *(p.grad for p in it.parameters())])
    torch.testing.assert_close(*outputs, **CLOSE)
    masks = [None, *(result.plan.masks.get(name) for name, _ in dense.named_parameters())]
    for ours, theirs, mask in zip(*grads, masks):
        torch.testing.assert_close(ours, theirs if mask is None else theirs * mask, rtol=1e-4, atol=1e-4)
    next(iter(module.up.product.formats.values())).values.mul_(1.1)
    assert torch.allclose(module(x), outputs[0]) == training, "in evaluation mode the kernel computes, with or without gradients"


def test_dense_weights_can_leave_the_device(result):
    module = lower(result, "triton", force=True, tokens=(1, 64), keep_dense=False)
    up, x = module.up, torch.randn(64, 48)
    assert up.product.expands and not up.weight.requires_grad and up.weight is not result.module.up.weight
    before = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    up.product.steps = tuple((count, "dense", "") for count, _, _ in up.product.steps)
    with torch.no_grad():
        expected, twice = result.module(x), 2 * F.linear(x, result.module.up.weight) + 2 * result.module.up.bias
        up.weight.data.fill_(float("nan"))  # not what is multiplied with
        torch.testing.assert_close(module(x), expected, **CLOSE)
        module.load_state_dict({name: 2 * tensor for name, tensor in before.items()})
        torch.testing.assert_close(module.up(x), twice, **CLOSE)


def test_what_left_the_device_is_neither_compressed_again_nor_read_by_autocast(monkeypatch):
    result = pruned()
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as from another device
    module = lower(result, "triton", force=True, tokens=(1, 64), keep_dense=False)
    monkeypatch.setattr(products.Stored, "take", lambda *_: pytest.fail("weights that only moved are compressed again"))
    x = torch.randn(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(module(x), result.module(x), **CLOSE)
        expected = [F.linear(x, layer.weight, layer.bias) for layer in (result.module.gate, result.module.up)]
        for name in ("gate", "up"):
            module.get_parameter(f"{name}.weight").data.fill_(float("nan"))
        with torch.autocast("cpu", torch.bfloat16):
            found = [layer(x.bfloat16()) for layer in (module.gate, module.up)]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.float(), b, rtol=3e-2, atol=3e-2)


def test_weights_that_are_loaded_are_masked_and_compressed(result):
    module = copy.deepcopy(forced(result))
    with seeded(7):
        other = Mlp()
    module.load_state_dict(other.state_dict())
    with torch.no_grad():
        for name, mask in result.plan.masks.items():
            other.get_parameter(name).mul_(mask)
        torch.testing.assert_close(module(torch.ones(2, 48)), other(torch.ones(2, 48)), **CLOSE)


def test_module_is_one_graph(result):
    module, x = copy.deepcopy(forced(result)), torch.randn(2, 48)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), result.module(x), **CLOSE)
        module.load_state_dict({name: 2 * tensor for name, tensor in module.state_dict().items()})
        torch.testing.assert_close(compiled(x), module(x), **CLOSE)
        assert not torch.allclose(compiled(x), result.module(x), rtol=1e-3)
    torch.compiler.reset()
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert not module.up.weight.grad[module.up.weight == 0].any()


def test_module_can_be_moved_to_another_type():
    module = copy.deepcopy(forced(pruned())).half()
    assert module.up.product.formats["block_sparse"].values.dtype is torch.float16
    x = torch.randn(2, 48).half()
    with torch.no_grad():
        expected = F.linear(x, module.up.weight, module.up.bias)
        torch.testing.assert_close(module.up(x), expected, rtol=2e-3, atol=2e-3)


# ---- other forms of a network


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=37,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with seeded(1):
        return LlamaForCausalLM(config).eval()


def test_a_language_model_generates_with_sparse_layers():
    ids = torch.tensor([[3, 5, 7]])
    result = pruned(model=llama(), inputs=ids.repeat(2, 1))
    module = forced(result)
    assert isinstance(module, LlamaForCausalLM) and sum(isinstance(m, SparseLinear) for m in module.modules()) == 14
    assert kernels_of(module) == {"block_sparse"}
    arguments = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(module.generate(ids, **arguments), result.module.generate(ids, **arguments))


def test_weights_that_are_stored_transposed_run_sparse():
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    with seeded(2):
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=41, n_positions=16, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[3, 5, 7], [2, 4, 6]])
    result = pruned("unstructured", model, {"input_ids": ids, "use_cache": False})
    module = lower(result, "triton", force=True, tokens=(4,))
    layer = module.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D) and layer.product.weight.shape == (128, 32) and kernels_of(module) == {"unstructured"}
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), result.module.transformer.h[0].mlp.c_fc(x), **CLOSE)
        torch.testing.assert_close(module(ids[:1]).logits, result.module(ids[:1]).logits, **CLOSE)


@pytest.mark.slow
def test_decoding_benchmark_runs_on_any_machine():
    command = [sys.executable, "-m", "benchmarks.decode", "--smoke", "--only", "block:16x16=0.5"]
    shown = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "block_sparse: forced" in shown.stdout and "correct: product off by" in shown.stdout and "decode: dense" in shown.stdout and "in their place" in shown.stdout


def onnx_mlp(path) -> None:
    rng = np.random.default_rng(0)
    weights = {"up": (48, 80), "down": (48, 80), "bias": (48,)}
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "down", "bias"], ["y"], transB=1), helper.make_node("Softmax", ["y"], ["z"]),
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name) for name, shape in weights.items()]
    put = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])  # noqa: E731
    graph = helper.make_graph(nodes, "mlp", [put("x", 48)], [put("z", 48)], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_an_onnx_network_runs_its_products_sparse(tmp_path):
    onnx_mlp(tmp_path / "in.onnx")
    result = gp.compile(tmp_path / "in.onnx", sparsity=0.5, pattern="block:16x16", targets=["up", "down"], backend="triton", progress=False)
    module, x = forced(result), torch.randn(3, 48)
    products = [m for m in module.modules() if isinstance(m, Product)]
    assert len(products) == 2 and kernels_of(module) == {"block_sparse"} and {it.name for it in module.sparse_layers} == {"up", "down"}
    with torch.no_grad():
        expected = result.module(x)
        torch.testing.assert_close(module(x), expected, **CLOSE)
        products[0].formats["block_sparse"].values.mul_(1.1)
        assert not torch.allclose(module(x), expected, rtol=1e-3)


def test_a_graph_in_place_of_a_module_runs_sparse():
    class Odd(nn.Module):
        """Its code holds sizes, so a cut leaves a graph."""

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 48)

        def forward(self, x):
            return self.down(self.up(x).relu())

    model = Odd().eval()
    graph = torch.export.export(model, (torch.randn(3, 48),)).module()
    masked = pruned(model=model)
    graph.load_state_dict(masked.module.state_dict())
    module = sparse_module(graph, force=True, tokens=(4,))
    assert kernels_of(module) == {"block_sparse"}
    assert [n.op for n in module.graph.nodes if "product" in str(n.target)] == ["call_module"] * len(masked.plan.masks)
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(module(x), masked.module(x), **CLOSE)


def test_what_no_kernel_takes_is_listed_as_dense():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
    )  # fmt: skip
    result = pruned("unstructured", model.eval(), torch.randn(2, 3, 6, 6))
    rows = {row.name: row.reason for row in result.report.kernels}
    assert "no tiles of channels" in rows["0.weight"] and "no plain convolution" in rows["2.weight"] and "no CUDA" in rows["4.weight"]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(result(x), result.module(x))


# ---- what the gate says


def judge(tmp_path, times, **options) -> Gate:
    """A gate on a slow device that needs `times[tokens]` microseconds for a sparse product, and 30 for a dense one."""

    def measure(kernel, packed, weight, tokens):
        return Measurement(30.0, times[tokens], kernel.configs(packed, tokens)[0])

    return Gate("cpu", Table(tmp_path, "test"), measure=measure, roof=Roof(1e9, 1e10, 0.0), **options)


def test_each_number_of_tokens_has_a_measured_answer(tmp_path):
    result = pruned()
    module = lower(result, "triton", gate=judge(tmp_path, {1: 10.0, 2: 28.0}), tokens=(2, 1))
    for layer in module.sparse_layers:
        few, many = layer.decisions
        assert (few.tokens, few.path, few.sparse_us) == (1, "block_sparse", 10.0) and few.config
        assert (many.tokens, many.path, many.sparse_us) == (2, "dense", 28.0) and "1.07x of dense, 1.10x is asked for" in many.reason
    x = torch.randn(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([module(x[:1]), module(x[1:])]), result.module(x), **CLOSE)
    from graphprune.report import KernelChoice

    shown = str(Report(result.report.before, result.report.after, kernels=KernelChoice.of(module.sparse_layers)))
    assert "block_sparse" in shown and "3.00x" in shown and "10.0 us" in shown


def library_on_cpu(monkeypatch) -> None:
    """cuSPARSELt takes CUDA tensors only."""
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda values, xt, bias: F.linear(xt.T, values, bias).T.contiguous())


def test_the_library_is_asked_for_many_tokens_of_2_to_4_weights(tmp_path, monkeypatch):
    library_on_cpu(monkeypatch)
    with seeded(0):
        model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64)).to(torch.bfloat16)
    result = pruned("2:4", model, torch.randn(3, 256).bfloat16(), targets="0")
    module = lower(result, "triton", gate=judge(tmp_path, {1: 20.0, 2048: 20.0}), tokens=(1, 2048))
    assert [d.path for d in module.sparse_layers[0].decisions] == ["two_four", "two_four_library"]
    x = torch.randn(2, 256).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(module(x), result.module(x))


def test_gradients_pass_through_the_library_to_what_comes_before(monkeypatch):
    library_on_cpu(monkeypatch)
    weight = random_weight("two_four_library", 64, 128, 0.5, torch.Generator().manual_seed(0))
    x, bias = torch.randn(2, 3, 128).bfloat16(), torch.randn(64).bfloat16()
    packed, found, expected = library.pack(weight), [], []
    for run, out in ((lambda x, b: library.linear(x, packed, b, "relu"), found), (lambda x, b: F.linear(x, weight, b).relu(), expected)):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        run(*leaves).square().sum().backward()
        out += [leaf.grad for leaf in leaves]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-1)
    assert library.linear(x[:0], packed).shape == (0, 3, 64)


def test_wrong_options_are_named():
    model = Mlp()
    with pytest.raises(InvalidInput, match="force names a kernel, one of block_sparse"):
        sparse_module(model, force="csr")
    with pytest.raises(InvalidInput, match="each at least 1, found"):
        sparse_module(model, tokens=())


def test_crossover_asks_for_every_format_density_and_number_of_tokens(tmp_path, monkeypatch):
    library_on_cpu(monkeypatch)
    asked: list = []

    def measure(kernel, packed, weight, tokens):
        asked.append((kernel.name, tokens))
        return Measurement(30.0, 20.0 if tokens == 1 else 40.0, "tile")

    found = bench.crossover("256x512", [1, 2], Gate("cpu", Table(tmp_path, "test"), measure=measure, roof=Roof(1e9, 1e10, 0.0)))
    assert {row["kernel"] for row in found.rows} == {*FORMATS} - {"block_sparse_conv"} == {name for name, _ in asked}
    assert all(row["sparse"] == (row["tokens"] == 1) for row in found.rows if row["dense_us"] is not None)
    assert [row["kept"] for row in found.rows if row["kernel"] == "block_sparse"][::2] == [0.7, 0.5, 0.3, 0.2, 0.1]
    assert len({(row["kernel"], row["kept"], row["tokens"]) for row in found.rows}) == len(found.rows) == 38
    shown = tables.plain(found)
    assert "1.50x" in shown and "0.75x" in shown and "block_sparse" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_library_that_does_not_know_the_device_is_left_out(tmp_path):
    weight = random_weight("two_four_library", 64, 256, 0.5, torch.Generator().manual_seed(0))
    decision = judge(tmp_path, {1: 10.0}).decide([FORMATS["two_four_library"]], weight, 1)
    assert not decision.sparse and "cannot be packed" in decision.reason and "CUDA" in decision.reason

    def fails(*args):
        raise RuntimeError("out of memory")

    silent = Gate("cpu", Table(tmp_path, "other"), measure=fails, roof=Roof(1e9, 1e10, 0.0))
    decision = silent.decide([FORMATS["two_four"]], weight, 1)
    assert not decision.sparse and decision.reason == "two_four: it cannot be measured: out of memory" and not list(silent.table.entries())


@pytest.mark.parametrize("name", DENSITIES)
def test_random_weights_have_the_zeros_that_a_format_is_for(name):
    weight = random_weight(name, 256, 512, 0.5, torch.Generator().manual_seed(0))
    assert FORMATS[name].accepts(weight) is None and float((weight != 0).float().mean()) == pytest.approx(0.5, abs=0.02)


# ---- the command line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_bench_says_that_a_crossover_needs_a_gpu():
    shown = call("bench", "--crossover", "256x512")
    assert shown.exit_code == 2 and "CUDA device" in shown.output and "Traceback" not in shown.output
    for arguments, word in ((("--crossover", "256"), "rows x columns"), ((), "two models"), (("--crossover", "2x2", "--tokens", "a"), "--tokens")):
        shown = call("bench", *arguments)
        assert shown.exit_code == 2 and word in shown.output


def test_prune_writes_zeros_into_an_onnx_file_and_keeps_its_names(tmp_path):
    onnx_mlp(tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).normal(size=(8, 48)).astype(np.float32))
    shown = call(
        "prune", tmp_path / "in.onnx", "-o", tmp_path / "out.onnx", "--sparsity", "0.5", "--pattern", "block:16x16", "--backend", "triton",
        "--targets", "up", "--targets", "down", "--recipe", "wanda", "--calibration", tmp_path / "data.npz", "--report", tmp_path / "report.html",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "no CUDA device" in shown.stdout and "certificate  passed" in shown.stdout
    assert "How products with zeros in their weights run" in (tmp_path / "report.html").read_text()
    before, after = (onnx.load(tmp_path / name) for name in ("in.onnx", "out.onnx"))
    assert [(it.name, it.dims) for it in before.graph.initializer] == [(it.name, it.dims) for it in after.graph.initializer]
    assert [it.name for it in before.graph.node] == [it.name for it in after.graph.node]
    for old, new in zip(before.graph.initializer, after.graph.initializer):
        old, new = numpy_helper.to_array(old), numpy_helper.to_array(new)
        tiles = [(new[i : i + 16, j : j + 16] != 0).any() for i in range(0, old.shape[0], 16) for j in range(0, old.shape[-1], 16) if old.ndim == 2]
        assert old.ndim == 1 or (sum(tiles) == 8 and np.array_equal(new[new != 0], old[new != 0]))
    assert onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": np.ones((1, 48), np.float32)})[0].shape == (1, 48)


def test_prune_writes_zeros_into_a_checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    shown = call("prune", tmp_path / "in", "-o", tmp_path / "out", "--sparsity", "0.5", "--pattern", "2:4", "--backend", "triton", "--json")
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["kernels"]
    assert len(rows) == len(TOKENS) * 14 and {row["path"] for row in rows} == {"dense"}
    module = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    weight = module.model.layers[0].mlp.up_proj.weight
    assert ((weight.reshape(64, 8, 4) == 0).sum(-1) == 2).all() and module.lm_head.weight.all()
    assert kernels_of(sparse_module(module, force=True, tokens=(1,))) == {"two_four"}
