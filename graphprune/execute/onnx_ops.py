"""ONNX operators in torch: differentiable, in any float type, on any device, and shape-only on the meta device.

`ONNX_OPS` maps `(domain, op_type)` to a function of the arguments under their newest schema names; capture brings the forms of older
opsets to those names. Element-wise, logical and reducing operators are in this file; the other families have a file each.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import UnsupportedOp
from graphprune.execute.onnx_attention import ATTENTION_OPS
from graphprune.execute.onnx_images import IMAGE_OPS
from graphprune.execute.onnx_ml import ML_OPS
from graphprune.execute.onnx_narrow import bits, encode, known, moved_as_bytes, widened
from graphprune.execute.onnx_nn import NN_OPS
from graphprune.execute.onnx_quantized import QUANTIZED_OPS
from graphprune.execute.onnx_recurrent import RECURRENT_OPS
from graphprune.execute.onnx_signals import SIGNAL_OPS
from graphprune.execute.onnx_tensors import TENSOR_OPS
from graphprune.program import leaves, substitute
from graphprune.rules.onnx_literals import LITERAL_OPERANDS, ints, numbers

# Attributes that change no result here: hints and redundant sizes.
IGNORED = frozenset("kernel_shape seed stash_type hidden_size consumed_inputs spatial chunk_size precision output_sequence type".split())


def lower(domain: str, op_type: str, arguments: Mapping[str, Any], num_outputs: int) -> Callable[..., Any]:
    """The `call` of a node with these arguments; what has no lowering gets a call that raises `UnsupportedOp`."""
    function = ONNX_OPS.get((domain, op_type))
    where = f"{domain or 'ai.onnx'}::{op_type}"
    if function is None:
        return _unsupported(f"{where} has no lowering to torch; its axes can only be frozen")
    parameters = inspect.signature(function).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [k for k, v in arguments.items() if not free and k not in parameters and k not in IGNORED and v is not None]
    if unknown:
        return _unsupported(f"the lowering of {where} to torch does not know {', '.join(unknown)}; its axes can only be frozen")
    accepted = None if free else frozenset(parameters)
    return _Call(function, accepted, frozenset(LITERAL_OPERANDS.get(op_type, ())), num_outputs)


class _Call:
    """Runs a lowering: gathers its operands on one device and hands back one tensor, or as many as the node has outputs."""

    def __init__(self, function: Callable[..., Any], accepted: frozenset[str] | None, literals: frozenset[str], num_outputs: int) -> None:
        self.function, self.accepted, self.literals, self.num_outputs = function, accepted, literals, num_outputs

    def __call__(self, **arguments: Any) -> Any:
        # Shapes computed on the way are CPU tensors wherever the model runs: literal operands stay so, the others follow the data.
        operands = {k: v for k, v in arguments.items() if k not in self.literals}
        devices = {t.device for t in leaves(operands.values()) if isinstance(t, Tensor)}
        if len(devices) > 1:
            away = next(device for device in devices if device.type != "cpu")
            arguments |= substitute(operands, lambda t: t.to(away) if isinstance(t, Tensor) else t)
        if self.accepted is not None:
            arguments = {k: v for k, v in arguments.items() if k in self.accepted}
        result = self.function(**arguments)
        if isinstance(result, list):  # a sequence is one value
            return (result,)
        if isinstance(result, tuple):
            result = result[: self.num_outputs] + (None,) * (self.num_outputs - len(result))
            return result[0] if self.num_outputs == 1 else result
        return result if self.num_outputs == 1 else (result,) + (None,) * (self.num_outputs - 1)


def _unsupported(message: str) -> Callable[..., Any]:
    def call(**_: Any) -> Any:
        raise UnsupportedOp(message)

    return call


def _positional(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of the operands in schema order, whatever their names."""
    return lambda **arguments: function(*arguments.values())


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda data_0: reduce(function, data_0)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _pow(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y if y.dtype == x.dtype or not x.dtype.is_floating_point else y.to(x.dtype)).to(x.dtype)


def _mod(A: Tensor, B: Tensor, fmod: int = 0) -> Tensor:
    return torch.fmod(A, B) if fmod else torch.remainder(A, B)


def _clip(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if min is not None:
        input = torch.maximum(input, torch.as_tensor(min, dtype=input.dtype, device=input.device))
    if max is not None:
        input = torch.minimum(input, torch.as_tensor(max, dtype=input.dtype, device=input.device))
    return input


def _prelu(X: Tensor, slope: Tensor) -> Tensor:
    return torch.where(X < 0, X * slope, X)


def _isinf(X: Tensor, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    found = torch.isinf(X)
    return found & (((X < 0) & bool(detect_negative)) | ((X > 0) & bool(detect_positive)))


def _cast(input: Tensor, to: torch.dtype | None, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return encode(input, known(to, "Cast"), bool(saturate), round_mode)


def _cast_like(input: Tensor, target_type: Tensor, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return encode(input, target_type.dtype, bool(saturate), round_mode)


def _bit_shift(X: Tensor, Y: Tensor, direction: str) -> Tensor:
    return X << Y if direction == "LEFT" else X >> Y


def _shrink(input: Tensor, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros_like(input)
    return torch.where(input < -lambd, input + bias, torch.where(input > lambd, input - bias, zero))


def _dropout(data: Tensor, ratio: Any = None, training_mode: Any = None) -> tuple[Tensor, Tensor]:
    """Inference only: a graph is pruned as it is run, without noise."""
    if any(numbers(training_mode) or ()) and (numbers(ratio) or [0.5])[0] != 0:
        raise UnsupportedOp("ai.onnx::Dropout in training mode; export the model for inference")
    return data, torch.ones_like(data, dtype=torch.bool)


def _reduction(
    function: Callable[[Tensor, tuple[int, ...], bool], Tensor], identity: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[..., Tensor]:
    def run(data: Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        over = tuple(ints(axes) or ())
        if not over and noop_with_empty_axes:
            return identity(data)
        if not over and data.dim() == 0:
            return function(data[None], (0,), False)
        return function(data, over or tuple(range(data.dim())), bool(keepdims)).to(data.dtype)

    return run


def _fold(step: Callable[[Tensor, int, bool], Tensor]) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    """A reduction over several axes from one over a single axis."""

    def run(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
        for axis in sorted((a % x.dim() for a in axes), reverse=True):
            x = step(x, axis, keepdims)
        return x

    return run


def _extremum(function: Callable[..., Tensor], empty: float) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    def run(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
        if x.numel():
            return function(x.to(torch.uint8) if x.dtype == torch.bool else x, dim=axes, keepdim=keepdims)
        shape = x.sum(dim=axes, keepdim=keepdims).shape
        if x.dtype.is_floating_point:
            return x.new_full(shape, empty)
        info = torch.iinfo(torch.uint8 if x.dtype == torch.bool else x.dtype)
        return x.new_full(shape, info.max if empty > 0 else info.min)

    return run


def _sum(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return x.sum(dim=axes, keepdim=keepdims)


def _mean(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return x.mean(dim=axes, keepdim=keepdims)
    return torch.div(_sum(x, axes, keepdims), math.prod(x.shape[a] for a in axes), rounding_mode="trunc")


def _argument(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(data: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if not select_last_index:
            return function(data, dim=axis, keepdim=bool(keepdims))
        return data.shape[axis] - 1 - function(data.flip(axis), dim=axis, keepdim=bool(keepdims))

    return run


def _softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Softmax over `axis`, or over all axes from `axis` on (`to_end`, the meaning before opset 13)."""

    def run(input: Tensor, axis: int = -1, to_end: bool = False) -> Tensor:
        if not to_end:
            return function(input, dim=axis)
        return function(input.flatten(axis), dim=-1).reshape(input.shape)

    return run


def _hardmax(x: Tensor, dim: int) -> Tensor:
    return torch.zeros_like(x).scatter(dim, x.argmax(dim, keepdim=True), 1)


def _cumulative(function: Callable[..., Tensor], start: float) -> Callable[..., Tensor]:
    def run(x: Tensor, axis: Any, exclusive: int = 0, reverse: int = 0) -> Tensor:
        (dim,) = ints(axis) or (0,)
        x = x.flip(dim) if reverse else x
        if exclusive:
            first = torch.full_like(x.narrow(dim, 0, 1), start)
            x = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        total = function(x, dim).to(x.dtype)
        return total.flip(dim) if reverse else total

    return run


def _lp_normalization(input: Tensor, axis: int = -1, p: int = 2) -> Tensor:
    norm = input.norm(p, dim=axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(input), input / torch.where(norm == 0, torch.ones_like(norm), norm))


def _mean_variance_normalization(X: Tensor, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    deviation = X - X.mean(dim=tuple(axes), keepdim=True)
    return deviation / (deviation.square().mean(dim=tuple(axes), keepdim=True).sqrt() + 1e-9)


def _random(draw: Callable[[Tensor, float, float], Tensor], first: str, second: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Random operators, fixed to the generator's seed 0: a network is compared with itself."""

    def filled(shape: Sequence[int], dtype: torch.dtype, arguments: dict[str, Any]) -> Tensor:
        return draw(torch.empty(tuple(shape), dtype=dtype), arguments[first], arguments[second])

    def plain(shape: Sequence[int], dtype: torch.dtype = torch.float32, **arguments: Any) -> Tensor:
        return filled(shape, dtype, arguments)

    def like(input: Tensor, dtype: torch.dtype | None = None, **arguments: Any) -> Tensor:
        return filled(input.shape, dtype or input.dtype, arguments).to(input.device)

    return plain, like


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


_normal, _normal_like = _random(lambda out, mean, scale: out.normal_(mean, scale, generator=_seeded()), "mean", "scale")
_uniform, _uniform_like = _random(lambda out, low, high: out.uniform_(low, high, generator=_seeded()), "low", "high")

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Det": torch.det,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Log": torch.log,
    "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": lambda x: F.softplus(x, threshold=30.0),
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "And": torch.logical_and, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "Div": _divide, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul, "Or": torch.logical_or, "Pow": _pow,
    "Sub": torch.sub, "Xor": torch.logical_xor, "PRelu": _prelu,
}  # fmt: skip

ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Bernoulli": lambda input, dtype=None: torch.bernoulli(input.cpu(), generator=_seeded()).to(input.device, dtype or input.dtype),
    "BitCast": lambda input, to: bits(input).view(to),
    "BitShift": _bit_shift,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": lambda X, alpha=1.0: F.celu(X, alpha),
    "Clip": _clip,
    "Dropout": _dropout,
    "Elu": lambda X, alpha=1.0: F.elu(X, alpha),
    "Gelu": lambda X, approximate="none": F.gelu(X, approximate=approximate),
    "HardSigmoid": lambda X, alpha=0.2, beta=0.5: torch.clamp(alpha * X + beta, 0, 1),
    "Identity": lambda input: input,
    "IsInf": _isinf,
    "LeakyRelu": lambda X, alpha=0.01: F.leaky_relu(X, alpha),
    "Max": _variadic(torch.maximum),
    "Mean": lambda data_0: reduce(torch.add, data_0) / len(data_0),
    "Min": _variadic(torch.minimum),
    "Mod": _mod,
    "Selu": lambda X, alpha=1.6732632, gamma=1.0507009: gamma * torch.where(X > 0, X, alpha * (torch.exp(X.clamp(max=0)) - 1)),
    "Shrink": _shrink,
    "Sum": _variadic(torch.add),
    "SwiGLU": lambda A, B, alpha=1.0: A * torch.sigmoid(alpha * A) * B,
    "Swish": lambda X, alpha=1.0: X * torch.sigmoid(alpha * X),
    "Multinomial": lambda input, sample_size=1, dtype=torch.int32: torch.multinomial(
        torch.softmax(input.cpu(), -1), sample_size, replacement=True, generator=_seeded()
    ).to(input.device, dtype),
    "OptionalGetElement": lambda input: input,
    "OptionalHasElement": lambda input=None: torch.tensor(input is not None),
    "ThresholdedRelu": lambda X, alpha=1.0: torch.where(X > alpha, X, torch.zeros_like(X)),
    "Where": lambda condition, X, Y: torch.where(condition, X, Y),
    "RandomNormal": _normal,
    "RandomNormalLike": _normal_like,
    "RandomUniform": _uniform,
    "RandomUniformLike": _uniform_like,
}

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(x.abs(), axes, keep), torch.abs),
    "ReduceL2": _reduction(lambda x, axes, keep: _sum(x.square(), axes, keep).sqrt(), torch.abs),
    "ReduceLogSum": _reduction(lambda x, axes, keep: _sum(x, axes, keep).log(), torch.log),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    "ReduceMax": _reduction(_extremum(torch.amax, -math.inf)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extremum(torch.amin, math.inf)),
    "ReduceProd": _reduction(_fold(lambda x, axis, keep: x.prod(dim=axis, keepdim=keep))),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x.square(), axes, keep), torch.square),
    "ArgMax": _argument(torch.argmax),
    "ArgMin": _argument(torch.argmin),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Hardmax": _softmax(_hardmax),
    "CumSum": _cumulative(torch.cumsum, 0),
    "CumProd": _cumulative(torch.cumprod, 1),
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
}


_FAMILIES: tuple[Mapping[str, Callable[..., Any]], ...] = (
    {name: widened(_positional(function)) for name, function in (UNARY | BINARY).items()},
    ELEMENTWISE | {name: widened(ELEMENTWISE[name]) for name in ("BitShift", "Clip", "Max", "Min", "Mod", "Sum")},
    REDUCTIONS,
    {name: moved_as_bytes(function) for name, function in TENSOR_OPS.items()},
    NN_OPS,
    IMAGE_OPS,
    SIGNAL_OPS,
    ATTENTION_OPS,
    RECURRENT_OPS,
    QUANTIZED_OPS,
)

ONNX_OPS: dict[tuple[str, str], Callable[..., Any]] = {("", name): function for family in _FAMILIES for name, function in family.items()}
ONNX_OPS |= {("ai.onnx.ml", name): function for name, function in ML_OPS.items()}
