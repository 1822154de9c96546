"""Sparse kernels against dense products in float64 (in Triton's interpreter where there is no GPU), and the gate that picks them."""

import dataclasses
import json
import multiprocessing
import os

import pytest
import torch
from torch.nn.functional import gelu, linear, relu, silu

from graphprune.backends import gate
from graphprune.backends.gate import Decision, Gate, Measurement, Roof, Table
from graphprune.backends.kernels import KERNELS, block_sparse, grouped_gemm, two_four, unstructured
from graphprune.backends.kernels.base import ACTIVATIONS, AWKWARD_SHAPES, DTYPES, TOLERANCE, Shape, interpreted, triton
from graphprune.errors import InvalidInput

OP_CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    triton is None or not (torch.cuda.is_available() or interpreted()), reason="no Triton, or neither a GPU nor TRITON_INTERPRET=1"
)
SHAPES = (*AWKWARD_SHAPES, Shape("two tiles", 128, 320, (5,)), Shape("two panels", 40, 600, (1,)))
PACK = {  # small tiles, so that small weights have several; `bitmap`, which takes 16 bits only, has tests/test_bitmap.py
    "block_sparse": {"block": 16},
    "two_four": {},
    "unstructured": {"tile": 16, "walkers": 4, "panel": 256},
}


def make(kernel: str, rows: int, columns: int, dtype=torch.float32, kept: float = 0.4) -> torch.Tensor:
    """A weight that `kernel` takes, with a row of zeros and a row (where the format has any) without."""
    weight = torch.randn(rows, columns)
    if kernel == "block_sparse":
        mask = (torch.rand(-(-rows // 16), -(-columns // 16)) < kept).repeat_interleave(16, 0).repeat_interleave(16, 1)[:rows, :columns]
    elif kernel == "two_four":
        groups = torch.rand(rows, -(-columns // 4), 4)
        mask = (groups >= groups.topk(2, -1).values[..., 1:]).reshape(rows, -1)[:, :columns]
        mask &= torch.rand(rows, columns) < 0.8  # some groups keep one weight or none
    else:
        mask = torch.rand(rows, columns) < kept
        mask[-1] = True
    if rows > 2:
        mask[: 16 if kernel == "block_sparse" else 1] = False
    return (weight * mask).to(DEVICE, dtype)


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("name", PACK)
def test_kernel_agrees_with_float64(name, shape, dtype):
    torch.manual_seed(hash((shape.rows, shape.columns)) % 1000)
    kernel, weight = KERNELS[name], make(name, shape.rows, shape.columns, dtype)
    packed = kernel.pack(weight, **PACK[name])
    assert torch.equal(kernel.unpack(packed), weight)
    bias = torch.randn(shape.rows, device=DEVICE).to(dtype)
    for tokens in shape.tokens:
        x = torch.randn(tokens, shape.columns, device=DEVICE).to(dtype)
        y = kernel.linear(x, packed, bias)
        assert y.shape == (tokens, shape.rows) and y.dtype == dtype
        assert relative(y, linear(x.double(), weight.double(), bias.double())) < TOLERANCE[dtype]
        assert torch.equal(y, kernel.linear(x, packed, bias)), "two runs differ"
        if tokens:
            assert relative(y, linear(x.double(), torch.roll(weight, 1, 0).double(), bias.double())) > TOLERANCE[dtype] or shape.rows == 1


@needs_triton
@pytest.mark.parametrize("name", PACK)
def test_every_tile_gives_the_same_function(name):
    torch.manual_seed(0)
    kernel, weight = KERNELS[name], make(name, 96, 272, torch.float16)
    packed = kernel.pack(weight, **PACK[name])
    for tokens in (1, 3):
        x = torch.randn(tokens, 272, device=DEVICE).half()
        expected = linear(x.double(), weight.double())
        for config in kernel.configs(packed, tokens)[:: 1 if DEVICE == "cuda" else 3]:
            assert relative(kernel.linear(x, packed, config=config), expected) < TOLERANCE[torch.float16], config


@needs_triton
@pytest.mark.parametrize("block", block_sparse.BLOCKS)
@pytest.mark.parametrize("tokens", (3, 70))
def test_block_sizes_for_few_and_many_tokens(block, tokens):
    torch.manual_seed(1)
    weight = torch.randn(200, 136, device=DEVICE)
    weight[block : 2 * block] = 0
    weight[:, block // 2 : 2 * block] = 0
    packed = block_sparse.pack(weight, block)
    x = torch.randn(tokens, 136, device=DEVICE)
    configs = block_sparse.configs(packed, tokens)
    one_of_each = {tuple(part in c for part in ("part=", "tma=0", "swap=1")): c for c in configs}
    for config in configs if DEVICE == "cuda" else one_of_each.values():
        assert relative(block_sparse.linear(x, packed, config=config), linear(x.double(), weight.double())) < TOLERANCE[torch.float32]


@needs_triton
@pytest.mark.parametrize(
    "activation,function", (("relu", relu), ("silu", silu), ("gelu", gelu), ("gelu_tanh", lambda y: gelu(y, approximate="tanh")))
)
@pytest.mark.parametrize("name", PACK)
def test_bias_and_activation_are_fused(name, activation, function):
    kernel, weight = KERNELS[name], make(name, 70, 90)
    x, bias = torch.randn(2, 3, 90, device=DEVICE), torch.randn(70, device=DEVICE)
    y = kernel.linear(x, kernel.pack(weight, **PACK[name]), bias, activation)
    assert y.shape == (2, 3, 70)
    assert relative(y, function(linear(x.double(), weight.double(), bias.double()))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("kept", ("none", "all"))
def test_nothing_kept_and_nothing_pruned(name, kept):
    kernel = KERNELS[name]
    weight = torch.zeros(33, 70, device=DEVICE)
    if kept == "all":
        weight = torch.randn(33, 70, device=DEVICE)
        if name == "two_four":
            weight[:, 2::4] = weight[:, 3::4] = 0
    packed = kernel.pack(weight, **PACK[name])
    x = torch.randn(2, 70, device=DEVICE)
    assert torch.equal(kernel.unpack(packed), weight)
    assert (kernel.linear(x, packed).double() - linear(x.double(), weight.double())).abs().max() < 1e-4


def test_gaps_longer_than_a_code_are_bridged():
    weight = torch.zeros(3, 4000, device=DEVICE)
    for row, columns in enumerate(((0, 14, 29, 30, 3999), (3998,), (15, 16, 2047, 2048))):
        weight[row, list(columns)] = torch.arange(1.0, len(columns) + 1, device=DEVICE)
    packed = unstructured.pack(weight, tile=4, walkers=2, panel=2048)
    assert torch.equal(unstructured.unpack(packed), weight) and packed.kept == 10
    x = torch.randn(1, 4000, device=DEVICE)
    assert relative(unstructured.linear(x, packed), linear(x.double(), weight.double())) < 1e-6


def test_compressed_bytes():
    """What crosses memory, per dense 16-bit weight: the numbers that the roofline works with."""
    torch.manual_seed(0)
    rows, columns = 512, 4096
    dense = rows * columns * 2
    half = torch.randn(rows, columns).bfloat16() * (torch.rand(rows, columns) < 0.5)
    assert unstructured.pack(half).bytes / dense == pytest.approx(1.25 / 2, rel=0.05)
    groups = torch.rand(rows, columns // 4, 4)
    pairs = torch.randn(rows, columns).bfloat16() * (groups >= groups.topk(2, -1).values[..., 1:]).reshape(rows, columns)
    assert two_four.pack(pairs).bytes == dense * 9 // 16


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PACK)
def test_gradients_go_through_the_mask(name, activation):
    torch.manual_seed(2)
    kernel, weight = KERNELS[name], make(name, 40, 72)
    packed = kernel.pack(weight, **PACK[name])
    x, bias = torch.randn(6, 72, device=DEVICE), torch.randn(40, device=DEVICE)
    leaves = [t.clone().requires_grad_() for t in (x, packed.values, bias)]
    ours = kernel.linear(leaves[0], dataclasses.replace(packed, values=leaves[1]), leaves[2], activation)
    dense = [t.clone().requires_grad_() for t in (x, weight, bias)]
    theirs = ACTIVATIONS[activation](linear(*dense))
    grad = torch.randn_like(theirs)
    ours.backward(grad)
    theirs.backward(grad)
    for mine, wanted in ((leaves[0].grad, dense[0].grad), (leaves[2].grad, dense[2].grad)):
        assert torch.allclose(mine, wanted, atol=1e-4)
    step = dataclasses.replace(packed, values=packed.values - 0.1 * leaves[1].grad)
    mask = weight != 0
    if name == "block_sparse":  # a kept block trains as a whole
        mask = kernel.unpack(dataclasses.replace(packed, values=torch.ones_like(packed.values))) != 0
    assert torch.allclose(kernel.unpack(step), weight - 0.1 * dense[1].grad * mask, atol=1e-4)


@pytest.mark.parametrize("name", PACK)
def test_op_is_well_formed(name):
    """Schema, fake implementation, autograd registration and tracing, by torch's own checker."""
    kernel, weight = KERNELS[name], make(name, 24, 48)
    packed = kernel.pack(weight, **PACK[name])
    arguments = capture_arguments(kernel, packed, torch.randn(3, 48, device=DEVICE, requires_grad=True))
    torch.library.opcheck(kernel.op, arguments, test_utils=OP_CHECKS)


def capture_arguments(kernel, packed, x):
    found = []
    module = {"block_sparse": block_sparse, "two_four": two_four, "unstructured": unstructured}[kernel.name]
    original, module.op = module.op, lambda *args: found.append(args)
    try:
        module.linear(x, packed, torch.zeros(packed.shape[0], device=x.device))
    finally:
        module.op = original
    return found[0]


@pytest.mark.parametrize("name", PACK)
def test_compiles_into_one_graph(name):
    kernel, weight = KERNELS[name], make(name, 24, 48)
    packed = kernel.pack(weight, **PACK[name])
    x = torch.randn(3, 48, device=DEVICE)
    compiled = torch.compile(lambda t: kernel.linear(t * 2, packed, activation="relu") + 1, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), relu(linear(x * 2, weight)) + 1, atol=1e-4)


@pytest.mark.parametrize("name", PACK)
def test_wrong_arguments_are_named(name):
    kernel, weight = KERNELS[name], make(name, 24, 48)
    packed = kernel.pack(weight, **PACK[name])
    x = torch.randn(3, 48, device=DEVICE)
    with pytest.raises(InvalidInput, match=r"shape \(3, 47\), expected \(\.\.\., 48\)"):
        kernel.linear(x[:, :47], packed)
    with pytest.raises(InvalidInput, match=r"float64 and the weight torch\.float32"):
        kernel.linear(x.double(), packed)
    with pytest.raises(InvalidInput, match=r"bias has shape \(48,\)"):
        kernel.linear(x, packed, torch.zeros(48, device=DEVICE))
    with pytest.raises(InvalidInput, match="unknown activation 'tan'"):
        kernel.linear(x, packed, None, "tan")
    with pytest.raises(InvalidInput, match="3 axes"):
        kernel.pack(torch.zeros(2, 2, 2))


def test_formats_refuse_what_they_cannot_hold():
    weight = torch.zeros(4, 8)
    weight[1, 4:7] = 1
    assert two_four.accepts(weight) == "1 groups of four hold more than two non-zero weights"
    with pytest.raises(InvalidInput, match="2:4: 1 groups"):
        two_four.pack(weight)
    with pytest.raises(InvalidInput, match="choose one of"):
        block_sparse.pack(weight, block=48)
    with pytest.raises(InvalidInput, match="powers of two"):
        unstructured.pack(weight, tile=12)


@needs_triton
def test_unknown_tiles_are_refused():
    packed = two_four.pack(torch.zeros(4, 8, device=DEVICE))
    with pytest.raises(InvalidInput, match="is not of the form 'tokens=1 ordered=1"):
        two_four.linear(torch.zeros(1, 8, device=DEVICE), packed, config="rows=3")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", PACK)
def test_runs_in_a_cuda_graph(name):
    kernel, weight = KERNELS[name], make(name, 256, 512, torch.bfloat16)
    packed = kernel.pack(weight)
    x = torch.randn(2, 512, device=DEVICE).bfloat16()
    kernel.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.linear(x, packed)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, kernel.linear(x, packed))


# The gate


SPARSE = KERNELS["unstructured"]
FAST = Roof(bandwidth=1e12, operations=1e15, start=0.0)


def half_empty() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(64, 512).bfloat16() * (torch.rand(64, 512) < 0.3)


def gate_with(tmp_path, measurement: Measurement, calls: list | None = None, **options) -> Gate:
    def measure(*args):
        if calls is not None:
            calls.append(args)
        return measurement

    return Gate("cpu", Table(tmp_path, "test"), measure=measure, roof=FAST, **options)


def test_without_a_gpu_the_gate_answers_dense(tmp_path):
    decision = Gate("cpu", Table(tmp_path)).decide([SPARSE], half_empty(), 1)
    assert not decision.sparse and decision.reason == "unstructured: no CUDA device: nothing to gain"


def test_sparse_only_where_it_was_measured_faster(tmp_path):
    fast = gate_with(tmp_path / "a", Measurement(30.0, 20.0, "tile")).decide([SPARSE], half_empty(), 1)
    assert fast == Decision("unstructured", 1, "measured 1.50x of dense", "tile", 30.0, 20.0)
    slow = gate_with(tmp_path / "b", Measurement(30.0, 28.0, "tile")).decide([SPARSE], half_empty(), 1)
    assert not slow.sparse and "measured 1.07x of dense, 1.10x is asked for" in slow.reason and slow.sparse_us == 28.0
    broken = gate_with(tmp_path / "c", Measurement(30.0, float("inf"), "")).decide([SPARSE], half_empty(), 1)
    assert not broken.sparse and "no tile" in broken.reason


def test_the_fastest_of_several_kernels_is_taken(tmp_path):
    times = {"unstructured": 20.0, "block_sparse": 10.0, "two_four": 5.0}
    judge = Gate("cpu", Table(tmp_path, "test"), measure=lambda kernel, *_: Measurement(30.0, times[kernel.name], "tile"), roof=FAST)
    weight = torch.zeros(64, 256)
    weight[:32, :64] = 1  # blocks, but not 2:4
    assert judge.decide(KERNELS.values(), weight, 1).path == "block_sparse"
    nothing = judge.decide([KERNELS["two_four"]], weight, 1)
    assert not nothing.sparse and "groups of four" in nothing.reason


def test_what_the_roofline_forbids_is_not_measured(tmp_path):
    calls: list = []
    judge = gate_with(tmp_path, Measurement(30.0, 1.0, "tile"), calls)
    weight = torch.randn(64, 512).bfloat16()
    weight[:, 0] = 0  # nearly dense: 2.5 bytes a weight against 2
    decision = judge.decide([SPARSE], weight, 1)
    assert not decision.sparse and "the roofline allows 0." in decision.reason and not calls


def test_decode_and_prefill_are_decided_apart(tmp_path):
    decode, prefill = gate_with(tmp_path, Measurement(30.0, 20.0, "tile")).decide_both([SPARSE], half_empty())
    assert decode.sparse and not prefill.sparse and "at most 4 tokens, not 2048" in prefill.reason


def test_measurements_survive_a_restart_and_belong_to_one_device(tmp_path):
    calls: list = []
    for device, times_measured in (("a", 1), ("a", 1), ("b", 2)):
        judge = Gate("cpu", Table(tmp_path, device), measure=lambda *args: calls.append(args) or Measurement(30.0, 20.0, "tile"), roof=FAST)
        assert judge.decide([SPARSE], half_empty(), 1).sparse
        assert len(calls) == times_measured
    judge.decide([SPARSE], half_empty(), 2)
    assert len(calls) == 3, "another number of tokens is another question"


def test_a_damaged_entry_is_measured_again(tmp_path):
    judge = gate_with(tmp_path, Measurement(30.0, 20.0, "tile"))
    judge.decide([SPARSE], half_empty(), 1)
    (file,) = judge.table.folder.glob("*.json")
    file.write_text(file.read_text()[:20])
    calls: list = []
    assert gate_with(tmp_path, Measurement(30.0, 20.0, "tile"), calls).decide([SPARSE], half_empty(), 1).sparse and len(calls) == 1
    assert json.loads(file.read_text())["measurement"]["config"] == "tile"


def write_many(root, writer: int) -> None:
    table = Table(root, "test")
    for i in range(100):
        table.put("shared", Measurement(float(writer), 1.0, f"writer {writer}"))
        table.put(f"{writer}/{i}", Measurement(float(i), 1.0, "own"))
        found = table.get("shared")
        assert found is not None and found.config == f"writer {found.dense_us:.0f}"


def test_two_processes_may_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    writers = [context.Process(target=write_many, args=(tmp_path, n)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    entries = dict(Table(tmp_path, "test").entries())
    assert len(entries) == 201 and entries["shared"].config in ("writer 1", "writer 2")
    assert not list(Table(tmp_path, "test").folder.glob("*.tmp"))


def test_crossover_lists_every_density_and_token_count(tmp_path):
    judge = gate_with(tmp_path, Measurement(30.0, 20.0, "tile"))
    found = judge.crossover(SPARSE, lambda density: torch.randn(64, 512).bfloat16() * (torch.rand(64, 512) < density), (0.3, 0.9), (1, 2))
    assert [(d.tokens, d.sparse) for d in found] == [(1, True), (2, True), (1, False), (2, False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU")
def test_measures_on_the_device(tmp_path):
    weight = make("block_sparse", 4096, 4096, torch.bfloat16, kept=0.05)
    decision = Gate(table=Table(tmp_path, gate.torch.cuda.get_device_name())).decide([KERNELS["block_sparse"]], weight, 1, block=16)
    assert decision.dense_us and decision.sparse_us


# Expert products


def experts(tokens: int, slots: int, count: int = 5, rows: int = 37, columns: int = 70, dtype=torch.float32):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    weight = torch.randn(count, rows, columns, device=DEVICE).to(dtype)
    ids = torch.rand(tokens, count, device=DEVICE).argsort(1)[:, :slots]
    return x, weight, ids, torch.rand(tokens, slots, device=DEVICE).to(dtype)


def expected_experts(x, weight, places, scale, function=lambda y: y):
    kept = (places >= 0)[..., None]
    picked = weight.double()[places.clamp(min=0).long()]  # (T, S, M, K)
    inputs = x.double()[:, None] if x.dim() == 2 else x.double()
    return function((picked @ inputs.unsqueeze(-1)).squeeze(-1)) * kept * scale.double()[..., None]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,slots", ((0, 2), (1, 1), (3, 2), (40, 3)))
def test_expert_products(tokens, slots, dtype):
    x, weight, ids, scale = experts(tokens, slots, dtype=dtype)
    y = grouped_gemm.grouped_linear(x, weight, ids, None, scale, "silu")
    assert y.shape == (tokens, slots, 37)
    assert tokens == 0 or relative(y, expected_experts(x, weight, ids, scale, silu)) < TOLERANCE[dtype]
    assert torch.equal(y, grouped_gemm.grouped_linear(x, weight, ids, None, scale, "silu"))


@needs_triton
@pytest.mark.parametrize("tokens", (2, 50))
def test_pruned_experts_give_zero_and_ids_stay_those_of_the_router(tokens):
    x, weight, ids, scale = experts(tokens, 2)
    mapping = torch.tensor([1, -1, 0, -1, 2], device=DEVICE, dtype=torch.int32)
    pruned = weight[[2, 0, 4]]
    y = grouped_gemm.grouped_linear(x, pruned, ids, mapping, scale)
    assert relative(y, expected_experts(x, pruned, mapping[ids], scale)) < TOLERANCE[torch.float32]
    assert (y[mapping[ids] < 0] == 0).all()


@needs_triton
def test_each_slot_may_have_its_own_input():
    _, weight, ids, scale = experts(30, 3)
    x = torch.randn(30, 3, 70, device=DEVICE)
    y = grouped_gemm.grouped_linear(x, weight, ids, None, scale)
    assert relative(y, expected_experts(x, weight, ids, scale)) < TOLERANCE[torch.float32]


@needs_triton
def test_alignment_pads_each_expert_to_blocks():
    ids, mapping = torch.tensor([[7, 3], [7, 5], [7, 7], [7, 3]], device=DEVICE), torch.tensor([-1, -1, -1, 0, 1, -1, -1, 2], device=DEVICE)
    slots, owners = grouped_gemm.align(ids, mapping, experts=3, block=4)
    assert slots.tolist() == [1, 7, 8, 8, 0, 2, 4, 5, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8] and owners.tolist() == [0, 2, 2, -1, -1]


def test_expert_gradients():
    x, weight, ids, scale = experts(9, 2)
    mapping = torch.tensor([0, 1, -1, 2, 3], device=DEVICE)
    leaves = [t.clone().requires_grad_() for t in (x, weight[:4], scale)]
    y = grouped_gemm.grouped_linear(leaves[0], leaves[1], ids, mapping, leaves[2], "gelu")
    others = [t.clone().requires_grad_() for t in (x, weight[:4], scale)]
    wanted = expected_experts(others[0], others[1], mapping[ids], others[2], gelu)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad.double())
    for mine, other in zip(leaves, others):
        assert torch.allclose(mine.grad, other.grad, atol=1e-4)


def test_expert_arguments_are_checked():
    x, weight, ids, scale = experts(3, 2)
    with pytest.raises(InvalidInput, match=r"x has shape \(3, 69\), expected \(3, 70\)"):
        grouped_gemm.grouped_linear(x[:, 1:], weight, ids)
    with pytest.raises(InvalidInput, match=r"scale has shape \(3, 1\), expected \(3, 2\)"):
        grouped_gemm.grouped_linear(x, weight, ids, None, scale[:, :1])
    with pytest.raises(InvalidInput, match="must be integers"):
        grouped_gemm.grouped_linear(x, weight, ids.float())
    torch.library.opcheck(grouped_gemm.op, (x.requires_grad_(), weight, ids, None, scale), test_utils=OP_CHECKS)
