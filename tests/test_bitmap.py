"""The bitmap kernel: its packing and its walk on every machine (the walk written out step by step), its products on a GPU."""

import dataclasses

import pytest
import torch
from torch.nn.functional import gelu, linear, relu, silu

from graphprune.backends.gate import Gate, Measurement, Roof, Table
from graphprune.backends.kernels import base, bitmap, nvrtc
from graphprune.backends.kernels.base import AWKWARD_SHAPES, TOLERANCE, epilogue
from graphprune.errors import InvalidInput, MissingExtra

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA C++ runs on a GPU only")
SHAPES = [(s.rows, s.columns) for s in AWKWARD_SHAPES] + [(40, 600), (128, 320), (100, 1040)]


def make(rows: int, columns: int, kept: float = 0.5, dtype=torch.float16, device=DEVICE) -> torch.Tensor:
    """Random zeros, an empty row, a full one, and columns that are emptier than others: chains drift apart."""
    torch.manual_seed(rows + columns)
    mask = torch.rand(rows, columns) < kept
    mask[:, : columns // 3] &= torch.rand(rows, columns // 3) < 0.2
    if rows > 2:
        mask[0], mask[1] = False, True
    return (torch.randn(rows, columns) * mask).to(dtype).to(device)


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def walked(packed: bitmap.Bitmap) -> torch.Tensor:
    """The dense weight as the kernel finds it: every chain takes values from the ring as it was filled AHEAD steps before."""
    (rows, columns), blocks, pairs = packed.shape, *packed.plans.shape[:2]
    span, dense = -(-pairs // packed.splits), torch.zeros(blocks * 16, pairs * 128)
    for run in range(blocks * packed.splits):
        block, first = run // packed.splits, run % packed.splits * span
        begin, end = packed.offsets[run : run + 2].tolist()
        stands = torch.zeros(2, 32, dtype=torch.long)
        there, filled = [], 0
        for step in range(2 * first, 2 * min(first + span, pairs)):
            plan = packed.plans[block, step // 2].tolist()
            base = plan[64 + step % 2]
            filled = max(filled, min(base // bitmap.CHUNK + bitmap.RING // bitmap.CHUNK, end - begin))
            there.append(filled)
            begun = step - 2 * first
            sure = there[begun - bitmap.AHEAD] if begun >= bitmap.AHEAD else min(2 * (begun + 1), end - begin)
            stands.clamp_(min=base)
            for lane in range(32):
                for high in range(2):
                    for place in range(16):
                        if not plan[2 * lane + step % 2] >> (4 * (place % 8) + 2 * (place // 8) + high) & 1:
                            continue
                        slot = int(stands[high, lane])
                        stands[high, lane] += 1
                        assert slot < sure * bitmap.CHUNK, "read before it has arrived"
                        assert slot >= (filled - bitmap.RING // bitmap.CHUNK) * bitmap.CHUNK, "read after it was overwritten"
                        value = packed.values[begin + slot // bitmap.CHUNK, slot % bitmap.CHUNK, lane, high]
                        dense[16 * block + lane // 4 + 8 * high, 64 * step + 32 * (place // 8) + 8 * (lane % 4) + place % 8] = value
    found = packed.order < rows
    return torch.zeros(rows, columns).index_put((packed.order[found].long(),), dense[found][:, :columns])


@pytest.mark.parametrize("splits", (None, 1, 3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_loses_nothing(shape, splits):
    weight = make(*shape)
    packed = bitmap.pack(weight, splits)
    assert torch.equal(bitmap.unpack(packed), weight) and packed.kept == int((weight != 0).sum())


@pytest.mark.parametrize("kept", (0.0, 0.1, 0.5, 0.9, 1.0))
def test_the_walk_of_the_kernel_finds_every_weight_in_time(kept):
    weight = make(18, 900, kept, device="cpu")
    for splits in (1, 2):
        assert torch.equal(walked(bitmap.pack(weight, splits)), weight.float())


def test_chains_that_drift_apart_are_lifted():
    """One lane has all of its places, the others none: the ring cannot hold both ends, so slots stay unused."""
    weight = torch.zeros(16, 4096)
    weight[0].view(-1, 32)[:, :8] = 1.0
    packed = bitmap.pack(weight.half(), 1)
    assert torch.equal(walked(packed), weight)
    assert packed.plans[..., 64:66].max() > 0, "no chain was lifted"


def test_compressed_bytes():
    weight = (torch.randn(512, 8192) * (torch.rand(512, 8192) < 0.5)).bfloat16()
    dense = 2 * weight.numel()
    assert bitmap.pack(weight, 1).bytes / dense == pytest.approx(9 / 16, rel=0.08)
    assert bitmap.pack(weight, 8).bytes > bitmap.pack(weight, 1).bytes, "short chains differ more"


def test_gradients_go_through_the_mask():
    weight = make(40, 72, dtype=torch.bfloat16)
    packed = bitmap.pack(weight)
    x, bias = torch.randn(6, 72, device=DEVICE).bfloat16(), torch.randn(40, device=DEVICE).bfloat16()
    leaves = [t.clone().requires_grad_() for t in (x, packed.values, bias)]
    ours = bitmap.linear(leaves[0], dataclasses.replace(packed, values=leaves[1]), leaves[2], "silu")
    grad = torch.randn_like(ours)
    ours.backward(grad)
    dense = [t.double().requires_grad_() for t in (x, weight, bias)]
    silu(linear(*dense)).backward(grad.double())
    assert relative(leaves[0].grad, dense[0].grad) < 2e-2 and relative(leaves[2].grad, dense[2].grad) < 2e-2
    gradient = bitmap.unpack(dataclasses.replace(packed, values=leaves[1].grad))
    assert relative(gradient, dense[1].grad * (weight != 0)) < 2e-2


def test_op_is_well_formed():
    packed = bitmap.pack(make(24, 48))
    x = torch.randn(3, 48, device=DEVICE).half().requires_grad_()
    arguments = (x, packed.values, packed.plans, packed.offsets, packed.order, None, 24, 48, packed.splits, "", "")
    torch.library.opcheck(bitmap.op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    compiled = torch.compile(lambda t: bitmap.linear(t * 2, packed, activation="relu") + 1, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x.detach()), relu(linear(x.double() * 2, bitmap.unpack(packed).double())) + 1) < 2e-3


def test_what_it_does_not_take_is_named():
    assert "expected float16 or bfloat16" in bitmap.accepts(torch.zeros(4, 8))
    with pytest.raises(InvalidInput, match="float32, expected float16"):
        bitmap.pack(torch.zeros(4, 8))
    with pytest.raises(InvalidInput, match=r"no entries, its shape is \(0, 8\)"):
        bitmap.pack(torch.zeros(0, 8).half())
    with pytest.raises(InvalidInput, match="splits is 9, expected 1 to 8"):
        bitmap.pack(torch.zeros(4, 8).half(), 9)
    with pytest.raises(InvalidInput, match=r"shape \(3, 7\), expected \(\.\.\., 8\)"):
        bitmap.launch(torch.zeros(3, 7).half(), *_arguments(bitmap.pack(torch.ones(4, 8).half())))


def _arguments(packed: bitmap.Bitmap) -> tuple:
    return packed.values, packed.plans, packed.offsets, packed.order, None, *packed.shape, packed.splits, "", ""


def test_the_gate_takes_it_for_tokens_that_the_other_kernel_does_not(tmp_path):
    judge = Gate("cpu", Table(tmp_path), measure=lambda *_: Measurement(30.0, 20.0, "tiles=1"), roof=Roof(1e12, 1e15, 0.0))
    assert judge.decide([bitmap.KERNEL], make(64, 512, device="cpu"), 8).path == "bitmap"
    assert "made for at most 64 tokens" in judge.decide([bitmap.KERNEL], make(64, 512, device="cpu"), 65).reason


def test_programs_fit_and_the_first_is_even():
    for blocks, splits, tokens in ((896, 2, 1), (1792, 1, 16), (256, 8, 32), (1, 1, 64), (8016, 1, 8), (256, 8, 64)):
        configs = bitmap.candidates(blocks, splits, tokens, torch.device("cpu"))
        programs = [base.parse(it, bitmap.NAMES) for it in configs]
        assert programs and len(set(configs)) == len(configs)
        for it in programs:
            assert it["tiles"] <= bitmap.MAX_TILES and splits * it["groups"] <= bitmap.MAX_WARPS
            assert bitmap.shared_bytes(splits, it["tiles"], it["groups"]) <= 227 << 10
    with pytest.raises(InvalidInput, match="tiles=1 groups=1"):
        base.parse("tiles=1", bitmap.NAMES)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_the_compiler_says_what_is_missing():
    with pytest.raises(MissingExtra, match="install a build of torch for CUDA"):
        nvrtc.compiled(bitmap.SOURCE, (), "sm_90")


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_agree_with_float64(shape, dtype):
    weight, bias = make(*shape, dtype=dtype), torch.randn(shape[0], device=DEVICE).to(dtype)
    for splits in (None, 3):
        packed = bitmap.pack(weight, splits)
        for tokens in (0, 1, 7, 17, 64):
            x = torch.randn(tokens, shape[1], device=DEVICE).to(dtype)
            for config in bitmap.configs(packed, tokens):
                y = bitmap.linear(x, packed, bias, config=config)
                assert relative(y, linear(x.double(), weight.double(), bias.double())) < 1.5 * TOLERANCE[dtype]
                assert torch.equal(y, bitmap.linear(x, packed, bias, config=config)), "two runs differ"


@needs_gpu
@pytest.mark.parametrize("activation,function", (("relu", relu), ("silu", silu), ("gelu", gelu), ("gelu_tanh", lambda y: gelu(y, approximate="tanh"))))
def test_activations_are_fused(activation, function):
    weight, x = make(70, 90), torch.randn(2, 3, 90, device=DEVICE).half()
    y = bitmap.linear(x, bitmap.pack(weight), None, activation)
    assert relative(y, function(linear(x.double(), weight.double()))) < 2 * TOLERANCE[torch.float16]


@needs_gpu
def test_runs_in_a_cuda_graph():
    packed, x = bitmap.pack(make(256, 512)), torch.randn(2, 512, device=DEVICE).half()
    bitmap.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bitmap.linear(x, packed)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, bitmap.linear(x, packed))


def test_the_reference_is_the_masked_product():
    weight, x = make(33, 70), torch.randn(4, 70, device=DEVICE).half()
    y = bitmap.reference(x, *_arguments(bitmap.pack(weight)))
    assert torch.equal(y, epilogue(x.float() @ weight.float().T, None, "", torch.float16))
