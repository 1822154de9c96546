"""The block-sparse convolution against `conv2d` in float64 (in Triton's interpreter where there is no GPU)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import conv2d, gelu, relu, silu

from graphprune.backends.kernels import block_sparse
from graphprune.backends.kernels import block_sparse_conv as conv
from graphprune.backends.kernels.base import DTYPES, EXPAND, TOLERANCE, interpreted, triton
from graphprune.errors import InvalidInput

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
