"""What the kernel files share: the `Kernel` record, tile configurations, the epilogue, and the definition of their ops.

A kernel file stores the weight W (rows, columns) of `y = act(x W^T + bias)` compressed. Its op runs the Triton kernel on CUDA tensors, and
under TRITON_INTERPRET=1 on CPU tensors; elsewhere it runs the reference, so that a graph with these ops runs on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import InvalidInput, MissingExtra

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no wheel for this platform, or not installed: the ops then run their reference
    triton = tl = gdc_launch_dependents = gdc_wait = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}

ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (gradient of the result, value before the activation)
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}

# Relative error of a product against float64, by dtype: the rounding of the result, with room for the order of float32 sums.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the bare function where there is no Triton."""
    return triton.jit(function) if triton is not None else function


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter; read by Triton when a kernel file is imported."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def launches(x: Tensor) -> bool:
    """Whether an op on `x` launches its Triton kernel; otherwise it runs the reference.

    Raises:
        MissingExtra: `x` is on a GPU and Triton is not installed.
    """
    if x.is_cuda and triton is None:
        raise MissingExtra("sparse kernels on a GPU need Triton: install graphprune[gpu]")
    return x.is_cuda or interpreted()


if interpreted():

    def bound(value: Any) -> int:
        """A loaded value as a loop bound: the interpreter holds scalars as arrays of one element, which newer NumPy refuses to convert."""
        return value if isinstance(value, int) else int(value.handle.data.item())

    def dot(a: Any, b: Any, acc: Any, PRECISION: Any) -> Any:
        """acc + a b, in float32: the interpreter keeps bfloat16 as raw bits, which its own product takes for integers."""
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")

else:

    @jit
    def bound(value):
        """A loaded value as a loop bound."""
        return value

    @jit
    def dot(a, b, acc, PRECISION: tl.constexpr):
        """acc + a b with float32 sums; PRECISION ("ieee" or "tf32") matters for float32 operands only."""
        return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def activate(y, ACTIVATION: tl.constexpr):
    """The epilogue on a float32 tile; names as in ACTIVATIONS."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # 0.5 (1 + tanh z) is sigmoid(2 z)
    return y


@jit
def _add_kernel(
    parts,  # (SPLIT, N, M) float32
    bias,  # (M,) or None
    y,  # (N, M)
    N, M,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(1).to(tl.int64) * M + row
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * tl.cast(N, tl.int64) * M + place, mask=row < M, other=0.0)
    if bias is not None:
        total += tl.load(bias + row, mask=row < M, other=0.0).to(tl.float32)
    tl.store(y + place, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=row < M)


def add_parts(parts: Tensor, bias: Tensor | None, y: Tensor, activation: str, early: int) -> None:
    """y = act(sum of `parts` (splits, tokens, rows) + bias), in the order of the splits."""
    split, tokens, rows = parts.shape
    _add_kernel[(triton.cdiv(rows, 256), tokens)](
        parts, bias, y, tokens, rows, SPLIT=split, BLOCK=256, ACTIVATION=activation, EARLY=bool(early),
        **launch_options({"warps": 4, "early": early}),
    )  # fmt: skip


EXPAND = "expand"  # in place of a tile: the dense product with the expanded weight, where that is faster and the dense one is not at hand


@dataclass(frozen=True)
class Shape:
    """A row of a shape table: y (tokens, rows) = x (tokens, columns) W (rows, columns)^T."""

    name: str
    rows: int
    columns: int
    tokens: tuple[int, ...] = (1, 16, 32)


# Rows from real models; every kernel's tests and benchmark read them, besides awkward ones of its own.
MODEL_SHAPES = (
    Shape("llama3-8b up", 14336, 4096),
    Shape("llama3-8b down", 4096, 14336),
    Shape("llama3-70b up", 28672, 8192),
    Shape("llama3-8b attention", 4096, 4096),
)
AWKWARD_SHAPES = (
    Shape("one", 1, 1, (1,)),
    Shape("primes", 67, 101, (1, 7)),
    Shape("just past a tile", 65, 257, (17,)),
    Shape("one row", 1, 300, (3,)),
    Shape("one column", 130, 1, (2,)),
    Shape("no token", 64, 64, (0,)),
)


@dataclass(frozen=True)
class Packed:
    """A compressed weight: `shape` is (rows, columns) of the dense one; subclasses add their tensors and static numbers."""

    shape: tuple[int, int]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def bytes(self) -> int:
        """What one product reads of the weight."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def clone(self) -> Packed:
        """The same weight in other memory."""
        fields: dict[str, Any] = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, **fields)

    @property
    def work(self) -> float:
        """Share of the dense product's operations that the kernel does; 1 where it expands the weight."""
        return 1.0

    @property
    def width(self) -> int:
        """Numbers of x and y that cross memory for a token of the dense product."""
        return sum(self.shape)

    @property
    def unread(self) -> int:
        """Those of x that only zeros of the weight meet, which the kernel does not read."""
        return 0

    def example(self, tokens: int, like: Tensor) -> Tensor:
        """An x with so many tokens, to measure with."""
        return torch.randn(tokens, self.shape[1], device=like.device, dtype=torch.float32).to(like.dtype)

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product with the weight that is not compressed."""
        return torch.nn.functional.linear(x, weight)


@dataclass(frozen=True)
class Kernel:
    """Everything the gate, the backend, the tests and the benchmark need of a kernel file.

    `linear(x, packed, bias, activation, config)` is the op; `configs(packed, tokens)` lists the tiles worth timing, best guess first;
    `accepts(weight)` says why a weight cannot take this format, or None.
    """

    name: str
    op: Any
    pack: Callable[..., Packed]
    unpack: Callable[[Any], Tensor]
    linear: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    configs: Callable[[Any, int], list[str]]
    accepts: Callable[[Tensor], str | None]
    most_tokens: int | None = None
    shapes: tuple[Shape, ...] = MODEL_SHAPES + AWKWARD_SHAPES


def config(**numbers: int) -> str:
    """A tile configuration as text, so that it can be an argument of an op and a value in a file: `rows=16 warps=4`."""
    return " ".join(f"{name}={number}" for name, number in numbers.items())


def parse(text: str, known: Sequence[str]) -> dict[str, int]:
    """The numbers of a configuration.

    Raises:
        InvalidInput: if a name is not one of `known`, or one is missing.
    """
    pairs = dict(part.partition("=")[::2] for part in text.split())
    if set(pairs) != set(known) or not all(value.isdigit() for value in pairs.values()):
        raise InvalidInput(f"the tile configuration '{text}' is not of the form '{config(**dict.fromkeys(known, 1))}'")
    return {name: int(value) for name, value in pairs.items()}


def launch_options(numbers: Mapping[str, int]) -> dict[str, Any]:
    """What a launch takes beside the kernel's own arguments.

    `early=1` lets a kernel start while its predecessor still runs (programmatic dependent launch, sm_90 and newer): it waits for it just
    before it first reads x, so that only its own start-up is overlapped.
    """
    if interpreted():
        return {}
    return {"num_warps": numbers["warps"], "num_stages": numbers.get("stages", 1), "launch_pdl": bool(numbers.get("early", 0))}


def early_launch(device: torch.device) -> int:
    """1 where programmatic dependent launch exists, as the value of `early` in a configuration."""
    return int(device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9)


def check_linear(name: str, x: Tensor, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, activation: str) -> None:
    """The checks every launcher makes before it allocates.

    Raises:
        InvalidInput: at the first wrong fact.
    """
    rows, columns = shape
    if x.dim() < 1 or x.shape[-1] != columns:
        raise InvalidInput(f"{name}: x has shape {tuple(x.shape)}, expected (..., {columns}) for a weight of shape {shape}")
    if x.dtype != dtype or x.dtype not in DTYPES:
        raise InvalidInput(f"{name}: x is {x.dtype} and the weight {dtype}; both must be one of float16, bfloat16, float32: convert x")
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise InvalidInput(f"{name}: the bias has shape {tuple(bias.shape)} on {bias.device}, expected ({rows},) on {x.device}")
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"{name}: unknown activation '{activation}'; known: {', '.join(filter(None, ACTIVATIONS))}")


def check_weight(weight: Tensor) -> str | None:
    """Why `weight` cannot be compressed by any format, or None."""
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} axes, expected 2"
    if not weight.numel():
        return f"the weight has no entries, its shape is {tuple(weight.shape)}"
    if weight.dtype not in DTYPES:
        return f"the weight is {weight.dtype}, expected float16, bfloat16 or float32"
    return None


def define(
    name: str, reference: Callable[..., Tensor], launch: Callable[..., Tensor], expand: Callable[..., Tensor], gather: Callable[..., Tensor]
) -> Any:
    """Registers `graphprune::<name>` with its fake and its gradient.

    `reference` and `launch` share one signature, whose annotations make the op's schema: `(x, values, ..., bias, rows, columns, ...,
    activation, config)`. `expand(**arguments)` is the dense weight; `gather(dense, **arguments)` reads the kept entries off a dense tensor,
    which is its adjoint: a gradient never reaches a pruned entry, so training goes through the mask.
    """
    signature = inspect.signature(reference)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs).arguments
        if bound["bias"] is not None:
            bound["bias"] = bound["bias"].contiguous()  # kernels step through it one by one
        if bound.get("config") == EXPAND:
            product = torch.nn.functional.linear(bound["x"], expand(**bound).to(bound["x"].dtype))
            return epilogue(product, bound["bias"], bound["activation"], bound["x"].dtype)
        return (launch if launches(bound["x"]) else reference)(**bound)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__annotations__ = reference.__annotations__
    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"graphprune::{name}", forward, mutates_args=(), schema=schema)

    @op.register_fake
    def _(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs).arguments
        return bound["x"].new_empty((*bound["x"].shape[:-1], bound["rows"]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.places = [i for i, item in enumerate(inputs) if isinstance(item, Tensor)]
        ctx.literals = [None if isinstance(item, Tensor) else item for item in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.literals)
        for place, tensor in zip(ctx.places, ctx.saved_tensors):
            inputs[place] = tensor
        bound = dict(zip(signature.parameters, inputs))
        needed = dict(zip(signature.parameters, ctx.needs_input_grad))
        weight = expand(**bound)
        x, bias = bound["x"].reshape(-1, weight.shape[1]), bound["bias"]
        grad = grad.reshape(-1, weight.shape[0])
        if bound["activation"]:
            before = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
            grad = ACTIVATION_GRADIENTS[bound["activation"]](grad, before)
        found = {}
        if needed["x"]:
            found["x"] = (grad @ weight).reshape(bound["x"].shape)
        if needed["values"]:
            found["values"] = gather(grad.T @ x, **bound)
        if bias is not None and needed["bias"]:
            found["bias"] = grad.sum(0).to(bias.dtype)
        return tuple(found.get(parameter) for parameter in signature.parameters)

    op.register_autograd(backward, setup_context=setup_context)
    return op


def epilogue(y: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """What `activate` does, in plain torch, on a float32 (or float64) product."""
    return ACTIVATIONS[activation](y if bias is None else y + bias.to(y.dtype)).to(dtype)
