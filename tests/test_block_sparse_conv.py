"""The block-sparse convolution against `conv2d` in float64 (in Triton's interpreter where there is no GPU), and networks that run by it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu, relu, silu

import graphprune as gp
from graphprune.backends import gate as gates
from graphprune.backends.gate import Gate, Measurement, Roof, Table
from graphprune.backends.kernels import block_sparse
from graphprune.backends.kernels import block_sparse_conv as conv
from graphprune.backends.kernels.base import DTYPES, EXPAND, TOLERANCE, interpreted, triton
from graphprune.backends.triton import FusedSequential, SparseConv2d, sparse_module
from graphprune.errors import InvalidInput
from graphprune.sparsity import pattern_of
from tests.randomise import seeded

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    triton is None or not (torch.cuda.is_available() or interpreted()), reason="no Triton, or neither a GPU nor TRITON_INTERPRET=1"
)


@dataclass(frozen=True)
class Row:
    """A convolution and its input."""

    name: str
    weight: tuple[int, int, int, int]
    x: tuple[int, int, int]  # images, height, width
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    block: int = 16

    @property
    def steps(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


ROWS = (
    Row("3x3", (32, 32, 3, 3), (2, 6, 5), padding=(1, 1)),
    Row("tails of outputs and channels", (40, 24, 3, 3), (1, 5, 7), padding=(1, 1)),
    Row("channels that are no 16 bytes", (17, 19, 3, 3), (1, 5, 5), padding=(1, 1)),
    Row("stride 2", (32, 16, 3, 3), (2, 7, 8), stride=(2, 2), padding=(1, 1)),
    Row("window, strides, padding and dilation that differ", (16, 32, 2, 3), (1, 9, 8), (2, 1), (3, 1), (1, 2)),
    Row("padding wider than the image", (16, 16, 3, 3), (1, 2, 2), padding=(4, 4)),
    Row("first layer", (16, 3, 7, 7), (1, 9, 9), stride=(2, 2), padding=(3, 3)),
    Row("pointwise", (48, 32, 1, 1), (2, 4, 3)),
    Row("pointwise, stride 2", (48, 32, 1, 1), (2, 5, 4), stride=(2, 2)),
    Row("pointwise, padded", (16, 16, 1, 1), (1, 3, 3), padding=(1, 1)),
    Row("one", (1, 1, 1, 1), (1, 1, 1)),
    Row("a row of text", (32, 16, 1, 5), (2, 1, 11), padding=(0, 2)),
    Row("blocks of 32", (32, 64, 3, 3), (1, 4, 4), padding=(1, 1), block=32),
    Row("blocks of 64", (100, 64, 3, 3), (1, 3, 4), padding=(1, 1), block=64),
    Row("no image", (16, 16, 3, 3), (0, 4, 4)),
)


def make(row: Row, dtype: torch.dtype = torch.float32, kept: float = 0.4) -> torch.Tensor:
    """A weight with blocks of zeros, the first block row all zeros and every later one not."""
    rows, channels, *window = row.weight
    mask = torch.rand(-(-rows // row.block), -(-channels // row.block), *window) < kept
    mask[-1, -1, -1, -1] = True
    if mask.shape[0] > 1:
        mask[0] = False
    mask = mask.repeat_interleave(row.block, 0).repeat_interleave(row.block, 1)[:rows, :channels]
    return (torch.randn(row.weight) * mask).to(DEVICE, dtype)


def images(row: Row, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count, high, wide = row.x
    return torch.randn(count, row.weight[1], high, wide, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def exact():  # type: ignore[no-untyped-def]
    """Convolutions to compare with do not round to tf32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_kernel_agrees_with_float64(row: Row, dtype: torch.dtype) -> None:
    torch.manual_seed(ROWS.index(row))
    weight, x = make(row, dtype), images(row, dtype)
    packed = conv.pack(weight, row.block, **row.steps)
    assert torch.equal(conv.unpack(packed), weight)
    bias = torch.randn(row.weight[0], device=DEVICE).to(dtype)
    y = conv.linear(x, packed, bias)
    expected = conv2d(x.double(), weight.double(), bias.double(), **row.steps)
    assert y.shape == expected.shape and y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y, expected) < TOLERANCE[dtype]
    assert torch.equal(y, conv.linear(x.contiguous(), packed, bias)), "two runs, from another layout of x, differ"
    if x.numel() and row.name != "one":
        moved = conv2d(x.double(), torch.roll(weight, 1, 0).double(), bias.double(), **row.steps)
        assert relative(y, moved) > TOLERANCE[dtype], "a comparison that tells nothing"


@needs_triton
@pytest.mark.parametrize("block", block_sparse.BLOCKS)
@pytest.mark.parametrize("stride", (1, 2))
def test_every_tile_gives_the_same_function(block: int, stride: int) -> None:
    torch.manual_seed(block)
    row = Row("", (block + 8, block, 3, 3), (2, 6, 5), (stride, stride), (1, 1), block=block)
    weight, x = make(row, torch.float16), images(row, torch.float16)
    packed = conv.pack(weight, block, **row.steps, size=(6, 5))
    expected = conv2d(x.double(), weight.double(), **row.steps)
    configs = conv.configs(packed, expected[:, 0].numel())
    assert ("tma=1" in configs[0]) == (stride == 1)
    kinds = {config.split("swap")[1]: config for config in configs}
    for config in configs if DEVICE == "cuda" else kinds.values():
        assert relative(conv.linear(x, packed, config=config), expected) < TOLERANCE[torch.float16], config
    for box in ((1, 4, 8), (4, 2, 1), (1, 1, 16), (32, 1, 1)):  # patches past the ends of every axis
        config = " ".join(f"{name}={n}" for name, n in zip(conv.NAMES, (*box, 4, 3, 0, int(stride == 1))))
        assert relative(conv.linear(x, packed, config=config), expected) < TOLERANCE[torch.float16], config


@needs_triton
@pytest.mark.parametrize(
    "activation,function", (("relu", relu), ("silu", silu), ("gelu", gelu), ("gelu_tanh", lambda y: gelu(y, approximate="tanh")))
)
@pytest.mark.parametrize("window", (1, 3))
def test_bias_and_activation_are_fused(activation, function, window: int) -> None:  # type: ignore[no-untyped-def]
    row = Row("", (24, 32, window, window), (1, 4, 5))
    weight, x, bias = make(row), images(row), torch.randn(24, device=DEVICE)
    assert conv._descriptor(x[0][None].permute(0, 2, 3, 1), 1, 1, 1, 16).strides == [640, 160, 32, 1]  # type: ignore[attr-defined]
    y = conv.linear(x[0], conv.pack(weight, 16), bias, activation)  # a single image has no axis for images
    assert relative(y, function(conv2d(x.double(), weight.double(), bias.double()))[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kept", (0.0, 2.0))
@pytest.mark.parametrize("window", (1, 3))
def test_nothing_kept_and_nothing_pruned(kept: float, window: int) -> None:
    row = Row("", (32, 32, window, window), (1, 4, 4))
    weight = torch.randn(row.weight, device=DEVICE) if kept else torch.zeros(row.weight, device=DEVICE)
    packed, x = conv.pack(weight, 16), images(row)
    assert torch.equal(conv.unpack(packed), weight) and packed.work == (1.0 if kept else 0.0)
    assert (conv.linear(x, packed).double() - conv2d(x.double(), weight.double())).abs().max() < 1e-4


def test_a_block_lies_at_one_tap() -> None:
    """Blocks that one group of channels has at one tap are those that are stored; consecutive entries of the weight are not blocks."""
    weight = torch.zeros(32, 32, 3, 3)
    weight[:16, 16:, 1, 2] = 1
    weight[16:, :16, 0, 0] = 1
    packed = conv.pack(weight, 16)
    assert packed.values.shape == (2, 16, 16) and packed.columns.tolist() == [(1 << 24) + (2 << 16) + 1, 0]
    weight = torch.zeros(16, 288)
    weight[:, :16] = 1
    assert conv.pack(weight.reshape(16, 32, 3, 3), 16).values.shape[0] == 9


@pytest.mark.parametrize("lengths", ((64, 56, 56), (64, 28, 28), (64, 14, 14), (64, 7, 7), (1, 7, 7), (3, 5, 1)))
@pytest.mark.parametrize("pixels", (32, 256))
def test_patches_waste_little(lengths: tuple[int, int, int], pixels: int) -> None:
    box = conv.patch(pixels, lengths)
    assert box[0] * box[1] * box[2] == pixels
    number = 1
    for length, part in zip(lengths, box):
        number *= -(-length // part)
    if lengths[0] == 64:
        assert number * pixels <= 64 * lengths[1] * lengths[2] * (1.15 if lengths[1] > 7 else 1.35)


@pytest.mark.parametrize("activation", ("", "silu"))
@pytest.mark.parametrize("row", (ROWS[1], ROWS[4], ROWS[7]), ids=lambda row: row.name)
def test_op_is_registered_in_full(row: Row, activation: str) -> None:
    packed, x = conv.pack(make(row), row.block, **row.steps), images(row).requires_grad_()
    values, bias = packed.values.clone().requires_grad_(), torch.randn(row.weight[0], device=DEVICE, requires_grad=True)
    args = (x, values, packed.columns, packed.schedule, bias, packed.full, 16, *row.steps.values(), activation, "")
    torch.library.opcheck(conv.op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("activation", ("", "relu", "gelu_tanh"))
@pytest.mark.parametrize("row", (ROWS[1], ROWS[4], ROWS[7]), ids=lambda row: row.name)
def test_gradients_are_those_of_the_dense_convolution(row: Row, activation: str) -> None:
    torch.manual_seed(3)
    weight = make(row)
    packed, x = conv.pack(weight, row.block, **row.steps), images(row).requires_grad_()
    values, bias = packed.values.clone().requires_grad_(), torch.randn(row.weight[0], device=DEVICE, requires_grad=True)
    y = conv.op(x, values, packed.columns, packed.schedule, bias, packed.full, row.block, *row.steps.values(), activation, "")
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, values, bias), grad)
    weight.requires_grad_()
    dense = conv.ACTIVATIONS[activation](conv2d(x, weight, bias, **row.steps))
    to_x, to_weight, to_bias = torch.autograd.grad(dense, (x, weight, bias), grad)
    kept = conv.gather(to_weight, packed.columns, packed.schedule, packed.full, row.block)
    for ours, theirs in zip(found, (to_x, kept, to_bias)):
        assert relative(ours, theirs.double()) < 1e-5


def test_compiled_graphs_hold_the_op() -> None:
    row = ROWS[0]
    packed, x = conv.pack(make(row), 16, **row.steps), images(row)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: conv.linear(x, packed, None, "relu"), fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), conv.linear(x, packed, None, "relu")) and "block_sparse_conv" in str(graphs[0].graph)


def test_expanding_equals_the_kernel() -> None:
    row = ROWS[1]
    packed, x, bias = conv.pack(make(row), 16, **row.steps), images(row), torch.randn(40, device=DEVICE)
    y = conv.linear(x, packed, bias, "relu", EXPAND)
    torch.testing.assert_close(y, conv.linear(x, packed, bias, "relu"), rtol=1e-4, atol=1e-4)
    arguments = (packed.values, packed.columns, packed.schedule, bias, packed.full, 16, *row.steps.values(), "relu", "")
    torch.testing.assert_close(conv.reference(x, *arguments), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape,dtype,message", (
    ((4, 4), torch.float32, "has 2 axes, expected 4"),
    ((4, 0, 3, 3), torch.float32, "no entries"),
    ((4, 4, 3, 3), torch.float64, "float64, expected"),
    ((4, 4, 1, 128), torch.float32, "at most 127 x 127"),
))  # fmt: skip
def test_weights_that_are_not_taken(shape, dtype, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput, match=message):
        conv.pack(torch.zeros(shape, dtype=dtype))


@needs_triton
def test_wrong_calls_say_what_is_wrong() -> None:
    packed = conv.pack(torch.ones(16, 16, 3, 3, device=DEVICE), 16)
    x = torch.ones(1, 16, 4, 4, device=DEVICE)
    for args, message in (
        ((x[:, :3], packed), r"expected \(images, 16, height, width\)"),
        ((x.half(), packed), "x is torch.float16 and the weight torch.float32"),
        ((x, packed, torch.ones(3, device=DEVICE)), r"bias has shape \(3,\)"),
        ((x, packed, None, "tanh"), "unknown activation 'tanh'"),
        ((x, packed, None, "", "rows=1"), "is not of the form 'images=1"),
    ):
        with pytest.raises(InvalidInput, match=message):
            conv.linear(*args)
    with pytest.raises(InvalidInput, match="blocks of 48 x 48 have no kernel"):
        conv.pack(torch.ones(16, 16, 3, 3), 48)


# ---- tiles of a convolution


def tiles(mask: torch.Tensor, block: int) -> torch.Tensor:
    """(block rows, blocks of channels, taps): whether a tile stays, of a mask (M, C, *window) that is made of whole tiles."""
    cells = mask.flatten(2).unflatten(1, (-1, block)).unflatten(0, (-1, block)).permute(0, 2, 4, 1, 3).flatten(3)
    assert (cells.all(-1) == cells.any(-1)).all(), "a tile is cut in two"
    return cells.all(-1)


def test_tiles_of_a_convolution_lie_at_one_position_of_its_window() -> None:
    scores = torch.rand(1, 8, 8, 9)
    scores[0, 4:, :4, 7] = 0.0
    keep = pattern_of("block:4x4").keep(scores.flatten(2), 0.5, "layer", 9).reshape(8, 8, 3, 3)
    kept = tiles(keep, 4)
    assert kept.sum() == 18 and not kept[1, 0, 7]
    norms = scores.reshape(2, 4, 2, 4, 9).sum((1, 3))
    assert norms[kept].min() >= norms[~kept].max()
    assert torch.equal(pattern_of("block:4x4").keep(scores.flatten(2), 0.5, "layer"), pattern_of("block:4x4").keep(scores.flatten(2), 0.5, "layer", 1))


@pytest.mark.parametrize("recipe", ("magnitude", "wanda", "sparsegpt", "mrp"))
def test_recipes_make_tiles_of_convolutions(recipe: str) -> None:
    with seeded(0):
        model, x = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten(), nn.Linear(64, 3)).eval(), torch.randn(8, 16, 6, 6)
        options = {} if recipe == "magnitude" else {"recipe": recipe, "calibration_data": [x]}
        result = gp.compile(model, x, sparsity=0.5, pattern="block:8x8", progress=False, **options)
    assert result.certificate.passed
    for name in ("0.weight", "2.weight"):
        kept = tiles(result.plan.masks[name], 8)
        assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.05) and not result.module.get_parameter(name)[~result.plan.masks[name]].any()
    if recipe in ("sparsegpt", "mrp"):
        again = gp.apply(model, result.plan, x, calibration_data=[x])
        for name, weight in result.module.named_parameters():
            torch.testing.assert_close(again.module.get_parameter(name), weight, **CLOSE)


# ---- networks


class Net(nn.Module):
    """A stem with few channels, a plain stack, a convolution that steps and one with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.plain = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(32, 48, 1), nn.SiLU())
        self.grouped = nn.Conv2d(48, 48, 3, 1, 1, groups=3)
        self.steps = nn.Conv2d(48, 64, (3, 1), (2, 1), (1, 0))
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.plain(self.stem(x).relu()))
        return self.head(self.steps(x).relu().mean((2, 3)))


def net(**options):  # type: ignore[no-untyped-def]
    with seeded(0):
        model, x = Net().eval(), torch.randn(2, 3, 10, 12)
        return gp.compile(model, x, sparsity=0.6, pattern="block:16x16", progress=False, **options), x


def paths(module: nn.Module) -> dict[str, set[str]]:
    return {layer.name: {it.path for it in layer.decisions} for layer in module.sparse_layers}  # type: ignore[union-attr]


SPARSE = {"plain.0.weight", "plain.2.weight", "steps.weight"}  # the stem's tiles hold too few channels, and one has groups


def test_convolutions_with_tiles_of_zeros_run_by_the_kernel() -> None:
    result, x = net()
    module = sparse_module(result, force=True, images=(1, 2))
    assert {name for name, path in paths(module).items() if path == {"block_sparse_conv"}} == SPARSE
    assert [it.tokens for it in module.steps.product.decisions] == [18, 36]  # 3 x 6 pixels an image
    assert type(module.plain) is FusedSequential and module.plain.steps == ((0, "relu"), (2, "silu"))
    assert type(module.plain[0]) is SparseConv2d and list(module.state_dict()) == list(result.module.state_dict())
    with torch.no_grad():
        expected = result.module(x)
        torch.testing.assert_close(module(x), expected, **CLOSE)
        torch.testing.assert_close(module.plain[0](torch.ones(32, 5, 5)), result.module.plain[0](torch.ones(32, 5, 5)), **CLOSE)
        torch.testing.assert_close(copy.deepcopy(module).to(memory_format=torch.channels_last)(x), expected, **CLOSE)
        module.plain[0].product.formats["block_sparse_conv"].values.mul_(1.5)
        assert not torch.allclose(module(x), expected, rtol=1e-4), "what is computed with is not what the kernel holds"


def test_convolutions_train_through_their_masks_and_the_kernel_follows() -> None:
    result, x = net()
    module = copy.deepcopy(sparse_module(result, force=True, images=(2,)))
    dense = copy.deepcopy(result.module)
    for it in (module, dense):
        it(x).square().sum().backward()
    mask = result.plan.masks["plain.0.weight"]
    ours, theirs = module.plain[0].weight.grad, dense.plain[0].weight.grad
    assert not ours[~mask].any()
    torch.testing.assert_close(ours, theirs * mask, rtol=1e-4, atol=1e-5)
    before = module(x).detach()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    assert torch.equal(module.plain[0].weight == 0, ~mask)
    plain = Net().eval()
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(x), **CLOSE)
        assert not torch.allclose(module(x), before, rtol=1e-3)
        module.load_state_dict(result.module.state_dict())
        torch.testing.assert_close(module(x), result.module(x), **CLOSE)


def test_dense_convolutions_can_leave_the_device() -> None:
    result, x = net()
    module = sparse_module(result, force=True, images=(2,), keep_dense=False)
    product = module.plain[0].product
    assert product.expands
    with torch.no_grad():
        torch.testing.assert_close(module(x), result.module(x), **CLOSE)
        product.steps = tuple((count, "dense", "") for count, _, _ in product.steps)
        expected = result.module(x)
        module.plain[0].weight.data.fill_(float("nan"))  # not what is multiplied with
        torch.testing.assert_close(module(x), expected, **CLOSE)


def test_compiled_convolutions_are_one_graph() -> None:
    result, x = net()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    module = sparse_module(result, force=True, images=(2,))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=keep)(x), result.module(x), **CLOSE)
    assert len(graphs) == 1 and str(graphs[0].graph).count("block_sparse_conv") >= len(SPARSE)


def test_convolutions_of_an_exported_graph_and_of_an_onnx_file(tmp_path: Path) -> None:
    result, x = net()
    graph = torch.export.export(Net().eval(), (x,)).module()
    graph.load_state_dict(result.module.state_dict())
    found = sparse_module(graph, force=True, images=(2,))  # without a plan, zeros count as masked
    assert {name for name, path in paths(found).items() if path == {"block_sparse_conv"}} == SPARSE
    with torch.no_grad():
        torch.testing.assert_close(found(x), result.module(x), **CLOSE)
    torch.onnx.export(Net().eval(), (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    onnx = gp.compile(tmp_path / "net.onnx", sparsity=0.6, pattern="block:16x16", progress=False)
    found = sparse_module(onnx, force=True, images=(2,))
    assert sum(path == {"block_sparse_conv"} for path in paths(found).values()) == len(SPARSE)
    with torch.no_grad():
        torch.testing.assert_close(found(x), onnx.module(x), **CLOSE)


def test_the_gate_decides_by_images_of_the_example(tmp_path: Path) -> None:
    """At 64 images faster and at one not, and a measurement knows how the convolution steps."""
    asked: list[tuple[tuple[int, ...], int, tuple[int, int]]] = []

    def measure(kernel, packed, weight, tokens):  # type: ignore[no-untyped-def]
        asked.append((packed.full, tokens, packed.stride))
        x = packed.example(tokens, weight)
        y = kernel.linear(x[:1], packed)
        assert y.shape == packed.dense(x[:1], weight).shape and x.shape[0] * y[0, 0].numel() == tokens
        return Measurement(20.0, 10.0 if x.shape[0] > 1 else 19.0, kernel.configs(packed, tokens)[0])

    result, _ = net()
    gate = Gate("cpu", Table(tmp_path, "test"), measure=measure, roof=Roof(1e13, 1e9, 0.0))
    module = sparse_module(result, gate=gate, images=(4, 1))
    assert ((64, 48, 3, 1), 18, (2, 1)) in asked and ((64, 48, 3, 1), 72, (2, 1)) in asked
    assert paths(module)["steps.weight"] == {"dense", "block_sparse_conv"} and paths(module)["stem.weight"] == {"dense"}
    product = module.steps.product
    assert product._path(18)[0] == "dense" and product._path(19)[0] == product._path(999)[0] == "block_sparse_conv"
    asked.clear()
    sparse_module(result, gate=gate, images=(4, 1))
    assert not asked, "measurements are kept"


def test_activations_that_the_cache_holds_cost_nothing() -> None:
    """A product over many pixels with few channels moves activations only: sparse gains nothing, unless they are in the cache."""
    row = Row("", (64, 64, 1, 1), (1, 14, 14))
    weight = torch.block_diag(*torch.randn(4, 16, 16)).half()[:, :, None, None]  # all channels are read, each by one block
    packed = conv.pack(weight, 16, **row.steps, size=(14, 14))
    tokens = 64 * 14 * 14
    allowed = [Gate("cpu", roof=Roof(1e12, 1e15, 0.0, cache)).model(packed, tokens, 2) for cache in (0.0, 1e6, 1e9)]
    assert allowed[0] == pytest.approx(1.0, abs=0.01) and allowed[0] < allowed[1] < 1.01 and allowed[2] > 3
    steps = conv.pack(make(row, torch.float16), 16, (2, 2), size=(14, 14))
    assert steps.width == 64 + 4 * 64, "an output pixel stands for four of the input"


def test_measuring_a_convolution_checks_it_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that stands still: which tiles are timed, and that one whose result is off is left out."""
    row = ROWS[0]
    weight = make(row)
    packed = conv.pack(weight, 16, **row.steps, size=(6, 5))
    monkeypatch.setattr(gates, "time_calls", lambda calls, **_: (calls[0](), gates_timing(5.0))[1])
    monkeypatch.setattr(gates, "copies", lambda *_: 1)
    monkeypatch.setattr("graphprune.backends.timing.copies", lambda *_: 1)
    assert gates.measure_kernel(conv.KERNEL, packed, weight, 60).config in conv.configs(packed, 60)
    packed.values.mul_(1.01)
    assert gates.measure_kernel(conv.KERNEL, packed, weight, 60).config == ""


def gates_timing(median: float):  # type: ignore[no-untyped-def]
    from graphprune.backends.timing import Timing

    return Timing(median, median, median)


def test_channels_that_no_tile_reads_cost_no_traffic():
    """Three of four blocks of channels meet zeros alone: the roofline of a product that is bound by its input allows four times."""
    weight = torch.randn(32, 128, 1, 1)
    weight[:, 32:] = 0
    packed = conv.pack(weight, block=32, stride=(1, 1), padding=(0, 0), dilation=(1, 1), size=(8, 8))
    assert packed.unread == 96 and packed.width == 160
    allowed = Gate("cpu", roof=Roof(1e9, 1e15, 0.0)).model(packed, 1 << 20, 4)
    assert allowed == pytest.approx(160 / 64, rel=0.01)
    assert block_sparse.pack(weight[:, :, 0, 0], 32).unread == 96
