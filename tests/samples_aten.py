"""Tiny programs, at least one for every ATen op that has a dim rule: what the rule checker runs.

A row is the op it is for, a function, and its inputs. Weights are inputs too, so that they become members. Sizes are distinct and awkward, so that equal sizes never
stand in for equal axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.capture.torch_export import capture_torch
from graphprune.ops.delta_rule import gated_delta_rule
from graphprune.ops.selective_scan import selective_scan
from graphprune.ops.ssd import ssd_scan
from graphprune.program import Program
from tests.randomise import seeded

aten = torch.ops.aten
Input = tuple[int, ...] | Callable[[], Tensor]  # a shape stands for normal numbers


@dataclass(frozen=True)
class Sample:
    """One op under test, in a program of its own."""

    op: str
    function: Callable[..., Any]
    inputs: tuple[Input, ...]
    name: str
    blind: bool = False  # the result depends on the shape of the input only, so that a shifted cut cannot be noticed
    domain: str = "aten"

    def program(self) -> Program:
        with seeded(crc32(self.name.encode())):
            tensors = tuple(torch.randn(make) if isinstance(make, tuple) else make() for make in self.inputs)
            return capture_torch(_Function(self.function), tensors)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


SAMPLES: list[Sample] = []


def sample(ops: str, function: Callable[..., Any], *inputs: Input, blind: bool = False, domain: str = "aten") -> None:
    """Add a row; for several ops, `function` takes the op first."""
    names = ops.split()
    for op in names:
        call = partial(function, getattr(aten, op)) if len(names) > 1 or ops.endswith(" ") else function
        count = sum(s.op == op for s in SAMPLES)
        SAMPLES.append(Sample(op, call, inputs, f"{op}-{count}", blind, domain))


def ints(high: int, *shape: int) -> Input:
    return lambda: torch.randint(high, shape)


def bools(*shape: int) -> Input:
    return lambda: torch.rand(shape) > 0.4


def positive(*shape: int) -> Input:
    return lambda: torch.rand(shape) + 0.5


def order(*shape: int) -> Input:
    """Permutations of the last axis."""
    return lambda: torch.rand(shape).argsort(-1)


# ---- products and contractions

sample("linear", F.linear, (2, 5, 7), (3, 7), (3,))
sample("linear", F.linear, (5, 7), (3, 7))
sample("linear", lambda x, w, v: F.linear(F.linear(x, w).relu(), v), (5, 7), (11, 7), (3, 11))
sample("matmul", torch.matmul, (2, 3, 5, 7), (2, 3, 7, 11))
sample("matmul", torch.matmul, (2, 3, 5, 7), (7, 11))
sample("matmul", torch.matmul, (5, 7), (2, 3, 7, 11))
sample("matmul", torch.matmul, (2, 3, 5, 7), (3, 7, 11))
sample("matmul", torch.matmul, (2, 1, 5, 7), (1, 3, 7, 11))
sample("matmul", torch.matmul, (2, 5, 7), (7,))
sample("matmul", torch.matmul, (7,), (2, 7, 5))
sample("matmul", torch.matmul, (7,), (7, 5))
sample("matmul", torch.matmul, (7,), (7,))
sample("matmul", torch.matmul, (5, 7), (7,))
sample("mm", torch.mm, (5, 7), (7, 3))
sample("bmm", torch.bmm, (2, 5, 7), (2, 7, 3))
sample("mv", torch.mv, (5, 7), (7,))
sample("dot", torch.dot, (7,), (7,))
sample("vdot", torch.vdot, (7,), (7,))
sample("addmm", torch.addmm, (3,), (5, 7), (7, 3))
sample("addmm", torch.addmm, (5, 3), (5, 7), (7, 3))
sample("addmm", torch.addmm, (5, 1), (5, 7), (7, 3))
sample("addmv", torch.addmv, (5,), (5, 7), (7,))
sample("baddbmm", torch.baddbmm, (2, 5, 3), (2, 5, 7), (2, 7, 3))
sample("baddbmm", torch.baddbmm, (5, 1), (2, 5, 7), (2, 7, 3))
sample("baddbmm", lambda a, b: torch.baddbmm(torch.empty(2, 5, 3, dtype=a.dtype), a, b, beta=0, alpha=0.3), (2, 5, 7), (2, 7, 3))
sample("addbmm", torch.addbmm, (5, 3), (2, 5, 7), (2, 7, 3))
sample("addr", torch.addr, (5, 3), (5,), (3,))
sample("outer", torch.outer, (5,), (7,))
sample("ger", torch.ger, (5,), (7,))
sample("inner", torch.inner, (2, 7), (5, 7))
sample("kron", torch.kron, (2, 3), (5, 7))
sample("tensordot", lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1])), (2, 3, 5), (3, 5, 7))
sample("tensordot", lambda a, b: torch.tensordot(a, b, dims=([0], [2])), (2, 3, 5), (3, 5, 2))
sample("chain_matmul", torch.chain_matmul, (2, 3), (3, 5), (5, 7))
sample("linalg_multi_dot", lambda *x: torch.linalg.multi_dot(x), (2, 3), (3, 5), (5, 7))
sample("einsum", lambda a, b: torch.einsum("bik,bjk->bij", a, b), (2, 5, 7), (2, 3, 7))
sample("einsum", lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), (2, 3, 5, 7), (2, 3, 11, 7))
sample("einsum", lambda a, b: torch.einsum("...k,kj->...j", a, b), (2, 5, 7), (7, 3))
sample("einsum", lambda a, b: torch.einsum("ij,jk", a, b), (5, 7), (7, 3))
sample("einsum", lambda a, b: torch.einsum("b i, b i -> b", a, b), (5, 7), (5, 7))
sample("einsum", lambda a: torch.einsum("bij->bj", a), (2, 5, 7))
sample("einsum", lambda a: torch.einsum("ii->i", a), (5, 5))
sample("einsum", lambda a, b, c: torch.einsum("bk,ok,bo->o", a, b, c), (2, 7), (3, 7), (2, 3))
sample("linalg_matmul", lambda a, b: torch.linalg.matmul(a, b), (2, 5, 7), (2, 7, 3))
sample(
    "linalg_inv inverse linalg_pinv linalg_matrix_exp matrix_exp linalg_det det linalg_qr linalg_svd linalg_inv_ex",
    lambda op, x: op(x),
    (2, 5, 5),
)
sample("linalg_cholesky linalg_eigh linalg_cholesky_ex", lambda op, x: op(x @ x.mT + torch.eye(5, dtype=x.dtype)), (2, 5, 5))
sample("linalg_matrix_power", lambda x: torch.linalg.matrix_power(x, 2), (2, 5, 5))
sample("linalg_solve", torch.linalg.solve, (2, 5, 5), (2, 5, 3))
sample("bilinear", F.bilinear, (5, 3), (5, 7), (2, 3, 7), (2,))
sample("cdist", torch.cdist, (2, 5, 7), (2, 3, 7))
sample("_cdist_forward", lambda x, y: aten._cdist_forward(x, y, 2.0, None), (2, 5, 7), (2, 3, 7))
sample("conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=1), (2, 3, 9), (5, 3, 3), (5,))
sample("conv1d", lambda x, w: F.conv1d(x, w, groups=6), (2, 6, 9), (6, 1, 3))
sample("conv2d", lambda x, w, b: F.conv2d(x, w, b, stride=2), (2, 3, 9, 8), (5, 3, 3, 3), (5,))
sample("conv2d", lambda x, w: F.conv2d(x, w, groups=6), (2, 6, 5, 4), (6, 1, 3, 3))
sample("conv2d", lambda x, w, b: F.conv2d(x, w, b, groups=3), (2, 6, 5, 4), (15, 2, 3, 3), (15,))
sample("conv2d", lambda x, w: F.conv2d(x, w, groups=5), (2, 5, 5, 4), (10, 1, 3, 3))
sample("conv2d", F.conv2d, (3, 9, 8), (5, 3, 3, 3))
sample("conv3d", F.conv3d, (2, 3, 5, 4, 6), (5, 3, 2, 2, 2), (5,))
sample("conv_transpose1d", F.conv_transpose1d, (2, 3, 9), (3, 5, 3), (5,))
sample("conv_transpose2d", lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), (2, 3, 4, 5), (3, 5, 3, 3), (5,))
sample("conv_transpose2d", lambda x, w, b: F.conv_transpose2d(x, w, b, groups=3), (2, 6, 4, 5), (6, 5, 3, 3), (15,))
sample("conv_transpose2d", lambda x, w: F.conv_transpose2d(x, w, groups=6), (2, 6, 4, 5), (6, 1, 3, 3))
sample("conv_transpose3d", F.conv_transpose3d, (2, 3, 4, 5, 3), (3, 5, 2, 2, 2))
sample(
    "convolution", lambda x, w, b: aten.convolution(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 3), (2, 6, 5, 4), (15, 2, 3, 3), (15,)
)
sample("convolution", lambda x, w, b: aten.convolution(x, w, b, [1, 1], [0, 0], [1, 1], True, [0, 0], 3), (2, 6, 4, 5), (6, 5, 3, 3), (15,))
sample(
    "_convolution",
    lambda x, w: aten._convolution(x, w, None, [1], [0], [1], False, [0], 1, False, False, True, True),
    (2, 6, 5),
    (15, 6, 3),
)

# ---- one factor along two axes

sample("linear", lambda x, w: F.linear(x + F.linear(x, w), w).exp().sum(-1), (5, 7), (7, 7))
sample("linear", lambda x, w: (x + F.linear(x, w)).sum(-1), (5, 7), (7, 7))
sample("matmul", lambda x: (x @ x.mT).sum(-1), (2, 5, 7))
sample("matmul", lambda x: (x @ x.mT).exp().sum(-1), (2, 5, 7))
sample("matmul", lambda x: ((x @ x.mT).softmax(-1) @ x).sum(1), (2, 5, 7))
sample("matmul", lambda x, y: (((x @ x.mT).softmax(-1) @ x) * y[:, None]).sum(1), (2, 5, 7), (5,))
sample("mul", lambda x, y: ((x @ x.mT).exp() * y).sum(1), (2, 5, 7), (5,))
sample("mul", lambda x, y: ((x @ x.mT).exp() * y).sum(2), (2, 5, 7), (5,))

# ---- attention

sdpa = F.scaled_dot_product_attention
sample("scaled_dot_product_attention", sdpa, (2, 3, 5, 7), (2, 3, 6, 7), (2, 3, 6, 4))
sample("scaled_dot_product_attention", lambda q, k, v: sdpa(q, k, v, is_causal=True), (2, 3, 5, 7), (2, 3, 5, 7), (2, 3, 5, 7))
sample("scaled_dot_product_attention", lambda q, k, v, m: sdpa(q, k, v, m), (2, 3, 5, 7), (2, 3, 6, 7), (2, 3, 6, 4), (5, 6))
sample("scaled_dot_product_attention", lambda q, k, v, m: sdpa(q, k, v, m), (2, 3, 5, 7), (2, 3, 6, 7), (2, 3, 6, 4), (2, 3, 5, 6))
sample("scaled_dot_product_attention", lambda q, k, v, m: sdpa(q, k, v, m), (2, 3, 5, 7), (2, 3, 6, 7), (2, 3, 6, 4), (1, 3, 1, 6))
sample(
    "scaled_dot_product_attention",
    lambda q, k, v, m: sdpa(q, k, v, m | (torch.arange(6) == 0)),
    (2, 3, 5, 7),
    (2, 3, 6, 7),
    (2, 3, 6, 4),
    bools(2, 1, 5, 6),
)
sample("scaled_dot_product_attention", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (2, 6, 5, 7), (2, 3, 4, 7), (2, 3, 4, 7))
sample("scaled_dot_product_attention", lambda q, k, v: sdpa(q, k, v, scale=0.3), (2, 5, 7), (2, 6, 7), (2, 6, 4))
sample("scaled_dot_product_attention", lambda q, k, v: sdpa(q, k, v), (2, 1, 5, 7), (2, 1, 6, 7), (2, 1, 6, 4))
sample(
    "_grouped_mm",
    lambda x, w: torch._grouped_mm(x.bfloat16(), w.bfloat16(), offs=torch.tensor([3, 5, 9], dtype=torch.int32)),
    (9, 16),
    (3, 16, 8),
)


def _routed(x: Tensor, router: Tensor, w: Tensor) -> Tensor:
    """Rows in the order of the experts they choose; the offsets are counts of the choices."""
    experts, order = (x @ router).argmax(-1).sort()
    ends = torch.histc(experts.float(), bins=3, min=0, max=2).cumsum(0, dtype=torch.int32)
    return torch._grouped_mm(x.bfloat16()[order], w.bfloat16(), offs=ends)


sample("_grouped_mm", _routed, (9, 16), (16, 3), (3, 16, 8))

# ---- norms

sample("batch_norm", lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b), (2, 3, 5, 4), (3,), (3,), (3,), positive(3))
sample("batch_norm", lambda x, m, v: F.batch_norm(x, m, v), (4, 3), (3,), positive(3))
sample("batch_norm", lambda x, w: F.batch_norm(x, None, None, w, training=True), (3, 4, 5), (4,))  # weight standardisation is written so
sample(
    "_native_batch_norm_legit_no_training",
    lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training(x, w, b, m, v, 0.1, 1e-5)[0],
    (2, 3, 5, 4),
    (3,),
    (3,),
    (3,),
    positive(3),
)
sample(
    "native_batch_norm",
    lambda x, w, b, m, v: aten.native_batch_norm(x, w, b, m, v, False, 0.1, 1e-5)[0],
    (2, 3, 5),
    (3,),
    (3,),
    (3,),
    positive(3),
)
sample("_weight_norm", lambda v, g: aten._weight_norm(v, g, 0), (5, 7, 3), positive(5, 1, 1))
sample("_weight_norm", lambda v, g: aten._weight_norm(v, g, 2), (5, 7, 3), positive(1, 1, 3))
sample("native_batch_norm", lambda x, w, b: aten.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)[0], (2, 3, 5), (3,), (3,))
sample("instance_norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (2, 3, 5, 4), (3,), (3,))
sample("instance_norm", lambda x: F.instance_norm(x), (2, 3, 5))
sample("group_norm", lambda x, w, b: F.group_norm(x, 3, w, b), (2, 6, 5, 4), (6,), (6,))
sample("group_norm", lambda x, w, b: F.group_norm(x, 1, w, b), (2, 6, 5), (6,), (6,))
sample("group_norm", lambda x, w, b: F.group_norm(x, 6, w, b), (2, 6, 5), (6,), (6,))
sample("group_norm", lambda x: F.group_norm(x, 2), (2, 6, 5))
sample("native_group_norm", lambda x, w, b: aten.native_group_norm(x, w, b, 2, 6, 20, 3, 1e-5)[0], (2, 6, 5, 4), (6,), (6,))
sample("layer_norm", lambda x, w, b: F.layer_norm(x, (7,), w, b), (2, 5, 7), (7,), (7,))
sample("layer_norm", lambda x, w, b: F.layer_norm(x, (5, 7), w, b), (2, 5, 7), (5, 7), (5, 7))
sample("layer_norm", lambda x: F.layer_norm(x, (7,)), (2, 5, 7))
sample("native_layer_norm", lambda x, w, b: aten.native_layer_norm(x, [7], w, b, 1e-5)[0], (2, 5, 7), (7,), (7,))
sample("rms_norm", lambda x, w: F.rms_norm(x, (7,), w), (2, 5, 7), (7,))
sample("_fused_rms_norm", lambda x, w: aten._fused_rms_norm(x, [7], w, 1e-5)[0], (2, 5, 7), (7,))
sample("softmax", lambda x: x.softmax(-1), (2, 5, 7))
sample("softmax", lambda x: x.softmax(1), (2, 5, 7))
sample("log_softmax", lambda x: x.log_softmax(-1), (2, 5, 7))
sample("_softmax", lambda x: aten._softmax(x, -1, False), (2, 5, 7))
sample("_log_softmax", lambda x: aten._log_softmax(x, -1, False), (2, 5, 7))
sample("_safe_softmax", lambda x: aten._safe_softmax(x, -1), (2, 5, 7))
sample("special_softmax", lambda x: torch.special.softmax(x, -1), (2, 5, 7))
sample("logcumsumexp", lambda x: x.logcumsumexp(-1), (2, 5, 7))
sample("cumsum", lambda x: x.cumsum(-1), (2, 5, 7))
sample("cumprod", lambda x: x.cumprod(-1), (2, 5, 7))
sample("cummax", lambda x: x.cummax(-1), (2, 5, 7))
sample("cummin", lambda x: x.cummin(-1), (2, 5, 7))

# ---- reductions

sample("sum", lambda x: x.sum((1, 2)), (2, 5, 7, 3))
sample("sum", lambda x: x.sum(), (2, 5))
sample("sum", lambda x: x.sigmoid().sum(1), (2, 5))
sample("sum", lambda x, w: (x.exp() * w).sum(1, keepdim=True), (2, 5), (5,))
sample("nansum", lambda x: x.nansum(1), (2, 5))
sample("mean", lambda x: x.mean(-1, keepdim=True), (2, 5, 7))
sample("mean", lambda x: x.mean((-1, -2)), (2, 5, 7, 3))
sample("mean", lambda x: x.mean(), (2, 5))
sample("mean", lambda x: x.mul(x).mean(-1), (2, 5, 7))
sample("var std var_mean std_mean", lambda op, x: op(x, [1]), (2, 5, 7))
sample("var std", lambda op, x: op.correction(x, [1, 2], correction=0, keepdim=True), (2, 5, 7))
sample("amax amin", lambda op, x: op(x, [1], True), (2, 5, 7))
sample("amax amin", lambda op, x: op(x.abs(), [1, 2]), (2, 5, 7))
sample("aminmax", lambda x: torch.aminmax(x, dim=1), (2, 5, 7))
sample("logsumexp", lambda x: x.logsumexp(1), (2, 5, 7))
sample("prod", lambda x: x.prod(1), (2, 5, 7))
sample("any", lambda x: (x.abs() < 0.2).any(1), (4, 5, 7))
sample("all", lambda x: (x.abs() > 0.2).all(1), (4, 5, 7))
sample("any all", lambda op, x: op(x > 0.7), (2, 5, 7), blind=True)
sample("norm", lambda x: aten.norm.ScalarOpt_dim(x, None, [1]), (2, 5, 7))
sample("norm", lambda x: aten.norm.ScalarOpt_dim(x, 3, [1], True), (2, 5, 7))
sample("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True), (2, 5, 7))
sample("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, ord=float("inf"), dim=1), (2, 5, 7))
sample("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, ord=-1, dim=1), (2, 5, 7))
sample("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x.relu(), ord=0, dim=1), (4, 5, 7))
sample("linalg_norm", lambda x: torch.linalg.norm(x, dim=-1), (2, 5, 7))
sample("linalg_norm", lambda x: torch.linalg.norm(x, dim=(-1, -2)), (2, 5, 7))
sample("frobenius_norm", lambda x: aten.frobenius_norm.dim(x, [1]), (2, 5, 7))
sample("max min", lambda op, x: op(x), (2, 5, 7))
sample("max min", lambda op, x: op(x, 1), (2, 5, 7))
sample("max min", lambda op, x: op(x.exp(), -1, True), (2, 5, 7))
sample("max min", lambda op, x, y: op(x, y), (2, 5), (5,))
sample("argmax argmin", lambda op, x: op(x, 1), (2, 5, 7))
sample("argmax argmin", lambda op, x: op(x, -1, True), (2, 5, 7))
sample("argmax argmin", lambda op, x: op(x), (2, 5, 7))
sample("median mode nanmedian", lambda op, x: op(x, 1), (2, 5, 7))
sample("kthvalue", lambda x: torch.kthvalue(x, 2, 1), (2, 5, 7))
sample("quantile", lambda x: torch.quantile(x, 0.3, dim=1), (2, 5, 7))
sample("count_nonzero", lambda x: torch.count_nonzero(x > 0, dim=1), (2, 5, 7))
sample("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, dim=-1), (2, 5, 7), (2, 5, 7))
sample("pairwise_distance", lambda x, y: F.pairwise_distance(x, y), (5, 7), (5, 7))
sample("trace", torch.trace, (5, 5))

# ---- shapes

sample("view", lambda x: x.view(2, 15), (2, 3, 5))
sample("view", lambda x: x.view(2, 3, -1, 7), (2, 3, 35))
sample("view", lambda x: x.view(6, 5, 1), (2, 3, 5))
sample("view", lambda x: x.view(2, 4, 9), (2, 6, 6))  # (2 3) (3 2) -> 2 (2 .)
sample("view", lambda x: x.view(4, 15), (6, 10))  # no common refinement
sample("view", lambda x: x.view(2, 4, 15), (2, 6, 10))
sample("view", lambda x: x.view(3, 2, 4, 5).transpose(1, 2).reshape(3, 40), (3, 40))
sample("view", lambda x, w: F.linear(x, w).view(3, 2, 6), (3, 5), (12, 5))
sample("view", lambda x: x.view(5, 12), (5, 3, 4, 1))
sample("view", lambda x: x.view(dtype=torch.int32), (5, 3))
sample("reshape", lambda x: x.reshape(4, -1), (2, 2, 3, 5))
sample("reshape", lambda x: x.transpose(1, 2).reshape(2, 15), (2, 3, 5))
sample("_unsafe_view", lambda x: aten._unsafe_view(x, [2, 15]), (2, 3, 5))
sample("_reshape_alias", lambda x: aten._reshape_alias(x, [2, 15], [15, 1]), (2, 3, 5))
sample("flatten", lambda x: x.flatten(1), (2, 3, 5))
sample("flatten", lambda x: x.flatten(1, 2), (2, 3, 5, 7))
sample("unflatten", lambda x: x.unflatten(1, (3, -1)), (2, 15, 7))
sample("unflatten", lambda x: x.unflatten(-1, (3, 5)), (2, 15))
sample("squeeze", lambda x: x.squeeze(1), (5, 1, 3))
sample("squeeze", lambda x: x.squeeze(), (5, 1, 2, 1))
sample("unsqueeze", lambda x: x.unsqueeze(-1), (5, 3))
sample("view_as", lambda x, y: x.view_as(y), (2, 15), (2, 3, 5), blind=True)
sample("reshape_as", lambda x, y: x.reshape_as(y), (2, 15), (2, 3, 5), blind=True)
sample("fft_fft fft_ifft fft_rfft fft_ihfft", lambda op, x: op(x, None, 1).abs(), (2, 6, 5))
sample("fft_irfft fft_hfft", lambda op, x: op(x + 0j, None, 1), (2, 6, 5))
sample("fft_fft2 fft_ifft2 fft_rfft2 fft_fftn fft_ifftn fft_rfftn", lambda op, x: op(x, None, [1, 2]).abs(), (2, 6, 5, 3))
sample("fft_irfft2 fft_irfftn", lambda op, x: op(x + 0j, None, [1, 2]), (2, 6, 5, 3))
sample("fft_rfft2", lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho"), s=(6, 5), norm="ortho"), (2, 3, 6, 5))
sample("stft", lambda x: torch.view_as_real(torch.stft(x, 8, return_complex=True, window=torch.ones(8, dtype=x.dtype))), (2, 32))
sample("istft", lambda x: torch.istft(torch.view_as_complex(x), 8, window=torch.ones(8, dtype=x.dtype)), (2, 5, 9, 2))
sample("fft_fftshift fft_ifftshift", lambda op, x: op(x, [1]), (2, 6, 5))
sample("ravel", lambda x: x.ravel(), (2, 5))
sample("atleast_1d atleast_2d", lambda op, x: op(x), (5,))
sample("atleast_3d", lambda x: torch.atleast_3d(x), (5, 3))
sample("transpose", lambda x: x.transpose(1, -1), (2, 3, 5))
sample("transpose", lambda x: x.transpose(0, 1), (2, 3, 5))
sample("swapaxes", lambda x: x.swapaxes(0, 2), (2, 3, 5))
sample("swapdims", lambda x: x.swapdims(0, 2), (2, 3, 5))
sample("t", lambda x: x.t(), (3, 5))
sample("t", lambda x: x.t(), (5,))
sample("mT", lambda x: x.mT, (2, 3, 5))
sample("matrix_H", lambda x: aten.matrix_H(x), (3, 5))
sample("mH", lambda x: x.mH, (2, 3, 5))
sample("adjoint", lambda x: x.adjoint(), (2, 3, 5))
sample("numpy_T", lambda x: x.T, (3, 5))
sample("numpy_T", lambda x: aten.numpy_T(x), (2, 3, 5))
sample("permute", lambda x: x.permute(0, -1, 1), (2, 3, 5))
sample("movedim", lambda x: x.movedim(1, -1), (2, 3, 5))
sample("movedim", lambda x: x.movedim((0, 1), (2, 0)), (2, 3, 5))
sample("moveaxis", lambda x: x.moveaxis((2, 0), (0, 1)), (2, 3, 5))
sample("cat concat concatenate", lambda op, x, y, z: op([x, y, z], 1), (2, 3), (2, 5), (2, 1))
sample("cat", lambda x, y: torch.cat([x, y], -1), (2, 3), (2, 5))
sample("cat", lambda x: torch.cat([x, x], 1), (2, 3))
sample("cat", lambda x, y: torch.cat([x, torch.zeros(2, 4, dtype=x.dtype), y], 1), (2, 3), (2, 5))
sample("cat", lambda x, w: F.linear(torch.cat([x.relu(), x.sigmoid()], 1), w), (2, 3), (4, 6))
sample("cat", lambda x: torch.cat([x[..., :5].relu(), x[..., 5:]], -1), (2, 3, 5))  # the second part is empty
sample("cat", lambda x: torch.cat([torch.tensor([], dtype=x.dtype), x], 1), (2, 3))
sample("split_with_sizes", lambda x: x.split([3, 0, 2], 1)[::2], (2, 5, 4))
sample("hstack", lambda x, y: torch.hstack([x, y]), (2, 3), (2, 5))
sample("vstack", lambda x, y: torch.vstack([x, y]), (2, 3), (4, 3))
sample("stack", lambda x, y: torch.stack([x, y], 1), (2, 3), (2, 3))
sample("stack", lambda x, y: torch.stack([x, y], -1).flatten(-2), (2, 3), (2, 3))  # interleaved
sample("split", lambda x: x.split(3, 1), (2, 8, 5))
sample("split_with_sizes", lambda x: x.split([1, 5, 2], -2), (2, 8, 5))
sample("split_with_sizes", lambda x: aten.split_with_sizes(x, [1, 5, 2], 1), (2, 8, 5))
sample("chunk", lambda x: x.chunk(3, 1), (2, 8, 5))
sample("chunk", lambda x: x.chunk(2, -1), (2, 8, 6))
sample("tensor_split", lambda x: x.tensor_split(3, 1), (2, 8, 5))
sample("tensor_split", lambda x: x.tensor_split([2, 3], 1), (2, 8, 5))
sample("unsafe_split", lambda x: aten.unsafe_split(x, 3, 1), (2, 8, 5))
sample("unsafe_split_with_sizes", lambda x: aten.unsafe_split_with_sizes(x, [1, 7], 1), (2, 8, 5))
sample("split_with_sizes_copy", lambda x: aten.split_with_sizes_copy(x, [1, 7], 1), (2, 8, 5))
sample("unsafe_chunk", lambda x: aten.unsafe_chunk(x, 2, 1), (2, 8, 5))
sample("unbind", lambda x: x.unbind(1), (2, 3, 5))
sample("slice", lambda x: x[:, 2:5], (2, 8, 3))
sample("slice", lambda x: x[:, -3:], (2, 8))
sample("slice", lambda x: x[:, 1::2], (2, 8))
sample("slice", lambda x: x[:, ::3], (2, 8))
sample("slice", lambda x: x[:, 1:7:2], (2, 8))
sample("slice", lambda x: torch.cat([-x[:, 4:], x[:, :4]], 1), (2, 8))
sample("slice", lambda x: torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(-2), (2, 8))
sample("narrow", lambda x: x.narrow(1, 2, 4), (2, 8))
sample("narrow_copy", lambda x: torch.narrow_copy(x, 1, 2, 4), (2, 8))
sample("select", lambda x: x[:, 2], (3, 5, 7))
sample("select", lambda x: x[..., -1], (3, 5, 7))
sample("expand", lambda x: x.expand(4, -1, 3), (5, 3))
sample("expand", lambda x: x.expand(2, 4, 3), (2, 1, 3))
sample("expand", lambda x: x[:, :, None].expand(2, 3, 4, 5).reshape(2, 12, 5), (2, 3, 5))
sample("expand_as", lambda x, y: x.expand_as(y), (1, 3), (5, 3), blind=True)
sample("broadcast_to", lambda x: x.broadcast_to(4, 5, 3), (5, 1))
sample("repeat", lambda x: x.repeat(2, 3), (4, 5))
sample("repeat", lambda x: x.repeat(2, 3, 1), (4, 5))
sample("tile", lambda x: x.tile(3), (4, 5))
sample("repeat_interleave", lambda x: x.repeat_interleave(3, 1), (2, 5, 4))
sample("repeat_interleave", lambda x: x.repeat_interleave(2, -1, output_size=10), (2, 5))
sample("repeat_interleave", lambda x: x.repeat_interleave(3), (2, 5))
sample("pad", lambda x: F.pad(x, (1, 2)), (2, 5))
sample("pad", lambda x: F.pad(x, (0, 0, 2, 0)), (2, 5, 3))
sample("pad", lambda x: F.pad(x, (1, 2), value=3.0), (2, 5))
sample("pad", lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"), (2, 3, 5, 4))
sample("pad", lambda x: F.pad(x, (-1, 2)), (2, 5))
sample("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [1, 0, 0, 3], 0.0), (2, 5))
for _mode in ("reflection", "replication"):
    for _d in (1, 2, 3):
        sample(f"{_mode}_pad{_d}d ", lambda op, x, d=_d: op(x, [1, 2] * d), (2, 3, 5, 4, 6)[: 2 + _d])
sample("roll", lambda x: x.roll(2, 1), (2, 5, 3))
sample("roll", lambda x: x.roll((1, 2), (1, 2)), (2, 5, 3))
sample("roll", lambda x: x.roll(1), (2, 5))
sample("flip", lambda x: x.flip(1), (2, 5, 3))
sample("fliplr flipud", lambda op, x: op(x), (4, 5, 3))
sample("rot90", lambda x: x.rot90(1, [1, 2]), (2, 5, 3))
sample("tril triu", lambda op, x: op(x, 1), (2, 5, 4))
sample("diagonal", lambda x: x.diagonal(0, 1, 2), (2, 5, 4))
sample("diag_embed", lambda x: torch.diag_embed(x), (2, 5))
sample("diag", lambda x: torch.diag(x), (5,))
sample("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), (5,), (3,))
sample("broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), (5, 1), (3,))
sample("as_strided", lambda x: x.as_strided((3, 2), (2, 1)), (6,))
sample("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 1, 2, 5), (2, 8, 3), (2, 3, 3))
sample("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 0) + x, (4, 3), (4, 3))
sample("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 1, 0, 8, 2), (2, 8), (2, 4))
sample("select_scatter", lambda x, y: torch.select_scatter(x, y, 1, 2), (4, 5, 3), (4, 3))
sample("diagonal_scatter", lambda x, y: torch.diagonal_scatter(x, y), (5, 5), (5,))
sample("as_strided_scatter", lambda x, y: torch.as_strided_scatter(x, y, (3, 2), (2, 1)), (6,), (3, 2))
sample("cross linalg_cross", lambda op, x, y: op(x, y, dim=1), (2, 3, 5), (2, 3, 5))
sample("diff", lambda x: torch.diff(x, dim=1), (2, 5))
sample("channel_shuffle", lambda x: F.channel_shuffle(x, 3), (2, 12, 4, 5))
sample("native_channel_shuffle", lambda x: aten.native_channel_shuffle(x, 3), (2, 12, 4, 5))

# ---- pools and resizes

for _d in (1, 2, 3):
    _x = (2, 3, 6, 8, 4)[: 2 + _d]
    sample(f"max_pool{_d}d avg_pool{_d}d", lambda op, x, d=_d: op(x, [2] * d), _x)
    sample(f"adaptive_avg_pool{_d}d", lambda x, d=_d: getattr(F, f"adaptive_avg_pool{d}d")(x, 2), _x)
    sample(f"adaptive_avg_pool{_d}d", lambda x, d=_d: getattr(F, f"adaptive_avg_pool{d}d")(x, 1), _x)
    sample(f"adaptive_max_pool{_d}d", lambda x, d=_d: getattr(F, f"adaptive_max_pool{d}d")(x, 2), _x)
sample("max_pool2d_with_indices max_pool3d_with_indices", lambda op, x: op(x, [2, 2, 2][: x.dim() - 2])[0], (2, 3, 6, 8, 4))
SAMPLES.pop(-2)
sample("max_pool2d_with_indices", lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0], (2, 3, 6, 8))
sample("_adaptive_avg_pool2d", lambda x: aten._adaptive_avg_pool2d(x, [2, 2]), (2, 3, 6, 8))
sample("_adaptive_avg_pool3d", lambda x: aten._adaptive_avg_pool3d(x, [2, 2, 2]), (2, 3, 6, 8, 4))
sample("max_unpool3d", lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), (2, 3, 6, 4, 2))
sample("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (2, 3, 6, 8))
sample("upsample_nearest1d", lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (2, 3, 5))
sample("upsample_nearest2d", lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (2, 3, 5, 4))
sample("upsample_nearest3d", lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (2, 3, 5, 4, 3))
sample("upsample_linear1d", lambda x: F.interpolate(x, size=7, mode="linear"), (2, 3, 5))
sample("upsample_bilinear2d", lambda x: F.interpolate(x, size=(7, 6), mode="bilinear"), (2, 3, 5, 4))
sample("upsample_bicubic2d", lambda x: F.interpolate(x, size=(7, 6), mode="bicubic"), (2, 3, 5, 4))
sample("upsample_trilinear3d", lambda x: F.interpolate(x, size=(7, 6, 5), mode="trilinear"), (2, 3, 5, 4, 3))
sample("_upsample_nearest_exact1d", lambda x: F.interpolate(x, size=7, mode="nearest-exact"), (2, 3, 5))
sample("_upsample_nearest_exact2d", lambda x: F.interpolate(x, size=(7, 6), mode="nearest-exact"), (2, 3, 5, 4))
sample("_upsample_nearest_exact3d", lambda x: F.interpolate(x, size=(7, 6, 5), mode="nearest-exact"), (2, 3, 5, 4, 3))
sample("_upsample_bilinear2d_aa", lambda x: F.interpolate(x, size=(3, 2), mode="bilinear", antialias=True), (2, 3, 5, 4))
sample("_upsample_bicubic2d_aa", lambda x: F.interpolate(x, size=(3, 2), mode="bicubic", antialias=True), (2, 3, 5, 4))
sample("grid_sampler", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), (2, 3, 5, 4), (2, 6, 7, 2))
sample("grid_sampler_2d grid_sampler_3d", lambda op, x, g: op(x, g.tanh(), 0, 0, False), (2, 3, 5, 4, 3), (2, 6, 7, 2, 3))
SAMPLES.pop(-2)
sample("grid_sampler_2d", lambda x, g: aten.grid_sampler_2d(x, g.tanh(), 0, 0, False), (2, 3, 5, 4), (2, 6, 7, 2))
sample("affine_grid_generator", lambda t: F.affine_grid(t, [2, 3, 5, 4]), (2, 2, 3))
sample("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 5))
sample("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), (2, 3, 4, 6))
sample("unfold", lambda x: x.unfold(2, 3, 1), (2, 3, 7))
sample("unfold", lambda x: x.unfold(1, 2, 2), (2, 6, 7))
sample("im2col", lambda x: F.unfold(x, (2, 3)), (2, 3, 5, 4))
sample("col2im", lambda x: F.fold(x, (5, 4), (2, 2)), (2, 12, 12))
sample("glu", lambda x: F.glu(x, 1), (2, 10, 3))
sample("glu", lambda x: F.glu(x, -1), (2, 6))

# ---- indices

sample("topk", lambda x: x.topk(2, -1), (3, 7))
sample("topk", lambda x: x.softmax(-1).topk(2, -1)[0], (3, 7))
sample("topk", lambda x, w: w[x.topk(2, -1)[1]], (3, 7), (7, 5))
sample("gather", lambda x, y: y.gather(1, x.topk(2, -1)[1]), (3, 7), (3, 7))
sample("gather", lambda x, i: x.gather(1, i), (3, 7), ints(7, 3, 4))
sample("gather", lambda x, i: x.gather(1, i[:, :, None].expand(-1, -1, 5)), (3, 7, 5), ints(7, 3, 4))
sample("take_along_dim", lambda x, y: y.exp().take_along_dim(x.argmax(-1, keepdim=True), 1), (3, 7), (3, 7))
sample("take_along_dim", lambda x, i: x.take_along_dim(i, 1), (3, 7), ints(7, 3, 4))
sample("scatter", lambda x: torch.zeros(3, 7, dtype=x.dtype).scatter(1, x.topk(2, -1)[1], 1.0), (3, 7))
sample("scatter", lambda x, y: y.scatter(1, x.topk(2, -1)[1], x.topk(2, -1)[0]), (3, 7), (3, 7))
sample("scatter", lambda x, i, s: x.scatter(1, i, s), (3, 7), lambda: torch.rand(3, 7).argsort(-1)[:, :4], (3, 4))
sample("scatter_add", lambda x, y: y.scatter_add(1, x.topk(2, -1)[1], x.topk(2, -1)[0]), (3, 7), (3, 7))
sample("scatter_reduce", lambda x, y: y.scatter_reduce(1, x.topk(2, -1)[1], x.topk(2, -1)[0], "sum"), (3, 7), (3, 7))
sample("one_hot", lambda x: F.one_hot(x.topk(2, -1)[1], 7), (3, 7))
sample("one_hot", lambda x: F.one_hot(x.argmax(-1), 7).permute(1, 0), (3, 7))
sample("one_hot", lambda i: F.one_hot(i, 7), ints(7, 3))
sample("bincount", lambda x: torch.bincount(x.argmax(-1), minlength=7), (3, 7))
sample("bincount", lambda i: torch.bincount(i, minlength=7), ints(7, 9))
sample("argmax", lambda x: x.argmax(-1) * 2, (3, 7))  # used as a number
sample("argmax", lambda x, y: torch.where((x.argmax(-1, keepdim=True) == 3), y, 0.0), (3, 7), (3, 5))
sample("histc", lambda x: torch.histc(x.topk(2, -1)[1].to(x.dtype), bins=7, min=0, max=6), (3, 7))
sample("sort", lambda x: x.sort(-1), (3, 7))
sample("sort", lambda x: x.argmax(-1).sort(), (5, 7))
sample("argsort", lambda x: x.argsort(-1), (3, 7))
sample("msort", lambda x: x.msort(), (3, 7))
sample("index", lambda x, i: x[i], (7, 5), ints(7, 3, 2))
sample("index", lambda x, i: x[:, i], (3, 7, 5), ints(7, 4))
sample("index", lambda x, i, j: x[i, j], (3, 7, 5), ints(3, 4), ints(7, 4))
sample("index", lambda x, i, j: x[i, :, j], (3, 7, 5), ints(3, 4), ints(5, 4))
sample("index", lambda x, w: w[x.argmax(-1)], (3, 7), (7, 5))
sample("index", lambda x: x[:, [-2]], (3, 7, 5))
sample("index", lambda x: x[:, [1, 2, 5]], (3, 7, 5))
sample("index", lambda x: x[:, [5, 6, 0, 1]] + x[:, [0, 2, 3, 6]], (3, 7, 5))
sample("index", lambda x: x[:, [5, 5, 0]], (3, 7, 5))  # a table
sample("index_select", lambda x: x.index_select(1, torch.tensor([4, 5, 6, 0, 1, 2, 3])), (3, 7, 5))
sample("index_put", lambda x, i, v: x.index_put((i,), v), (7, 5), lambda: torch.tensor([4, 1, 6]), (3, 5))
sample("index_put", lambda x, i, v: x.index_put((i,), v), (7, 5), lambda: torch.tensor([4, 1, 6]), ())
sample("index_put", lambda x, i, v: x.index_put((i, i), v), (7, 5, 3), lambda: torch.tensor([4, 1, 0]), (3, 3))
sample("index_put", lambda x, i, v: aten.index_put(x, [None, i], v), (7, 5, 3), lambda: torch.tensor([4, 1, 0]), (7, 3, 3))
sample("index_put", lambda x, m: x.index_put((m,), torch.tensor(0.0, dtype=x.dtype)), (7, 5), bools(7))
sample("index_put", lambda x, w, v: w.index_put((x.topk(2, -1)[1],), v, accumulate=True), (3, 7), (7, 5), (3, 2, 5))
sample("index_select", lambda x, i: x.index_select(1, i), (3, 7, 5), ints(7, 4))
sample("index_select", lambda x, w: w.index_select(0, x.argmax(-1)), (3, 7), (7, 5))
sample("index_add", lambda x, i, s: x.index_add(0, i, s), (7, 5), ints(7, 4), (4, 5))
sample("index_copy", lambda x, i, s: x.index_copy(0, i, s), (7, 5), lambda: torch.tensor([4, 1, 6]), (3, 5))
sample("index_fill", lambda x, i: x.index_fill(0, i, 2.0), (7, 5), ints(7, 4))
sample("embedding", lambda i, w: F.embedding(i, w), ints(7, 3, 2), (7, 5))
sample("embedding", lambda x, w: F.embedding(x.argmax(-1), w), (3, 7), (7, 5))
sample("_embedding_bag", lambda i, w: aten._embedding_bag(w, i, torch.tensor([0, 2, 3]))[0], ints(7, 6), (7, 5))
sample("embedding_bag", lambda i, w: F.embedding_bag(i, w), ints(7, 3, 2), (7, 5))
sample("take", lambda x, i: x.take(i), (3, 7), ints(21, 4))
sample("masked_scatter", lambda x, m, s: x.masked_scatter(m, s), (3, 7), bools(3, 7), (3, 7))
sample("searchsorted", lambda b, x: torch.searchsorted(b.sort().values, x), (7,), (5, 3))
sample("bucketize", lambda b, x: torch.bucketize(x, b.sort().values), (7,), (5, 3))
sample("nonzero", lambda x: torch.arange(x.nonzero().shape[0]) * 2, (3, 7))
sample("nonzero", lambda x: x.nonzero(), (3, 7))
sample("where", lambda m: torch.where(m)[0], bools(3, 7))
sample("_is_all_true _is_any_true", lambda op, x: op(x), bools(3, 7))
sample("nonzero_static", lambda x: aten.nonzero_static(x, size=9), (3, 7))
sample("masked_select", lambda x, m: x.masked_select(m), (3, 7), bools(3, 7))
sample("_unique2", lambda x: x.unique(), ints(5, 7))
sample("unique_consecutive", lambda x: x.unique_consecutive(), ints(5, 7))
sample("put", lambda x, i, y: aten.put(x, i, y), (3, 7), ints(21, 4), (4,))
sample("index_reduce", lambda x, i, y: x.index_reduce(0, i, y, "mean"), (7, 5), ints(7, 4), (4, 5))
sample("isin", lambda x, y: torch.isin(x, y), ints(9, 5, 3), ints(9, 4))

# ---- elementwise, by how zeros pass

sample("mul multiply", lambda op, x, y: op(x, y), (2, 5, 7), (5, 1))
sample("mul", lambda x: x * 2.5, (5, 7))
sample("mul", lambda x: x * torch.arange(7), (5, 7))
sample("mul", lambda x, m: x * m, (5, 7), bools(7))
sample("logical_and bitwise_and", lambda op, x, y: op(x > 0, y > 0), (5, 7), (7,))
sample("add sub subtract maximum minimum fmax fmin", lambda op, x, y: op(x, y), (2, 5, 7), (5, 1))
sample("hypot", torch.hypot, (5, 7), (7,))
sample("rsub", lambda x: 1.0 - x, (5, 7))
sample("rsub", lambda x, y: aten.rsub(x, y), (5, 7), (7,))
sample("add", lambda x: x + 1.5, (5, 7))
sample("add", lambda x: x + torch.arange(7), (5, 7))
sample("logical_or bitwise_or logical_xor bitwise_xor __or__ __xor__ __and__", lambda op, x, y: op(x > 0, y > 0), (5, 7), (7,))
sample("div divide true_divide floor_divide fmod remainder", lambda op, x, y: op(x, y), (2, 5, 7), positive(5, 1))
sample("div", lambda x: x / 3.0, (5, 7))
sample("div", lambda x, y: x / (y + 1.0), (5, 7), positive(5, 7))
sample("div", lambda x: x / x.sum(-1, keepdim=True), (5, 7))
sample("reciprocal", lambda x: 1.0 / x, positive(5, 7))
sample("copysign", torch.copysign, (5, 7), (7,))
sample("xlogy", torch.xlogy, (5, 7), positive(7))
sample("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.5), (5, 7), (5, 7), (7,))
sample("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.5), (5, 7), (5, 7), positive(7))
sample("lerp", lambda x, y: torch.lerp(x, y, 0.3), (5, 7), (5, 7))
sample("copy", lambda x, y: aten.copy(x, y), (5, 7), (7,), blind=True)
sample("zero", lambda x: aten.zero(x), (5, 7), blind=True)
sample("fill", lambda x: aten.fill(x, 2.0), (5, 7), blind=True)
sample("fill", lambda x: torch.slice_scatter(x, aten.fill(x[:, 2:4], 0.0), 1, 2, 4), (5, 7), blind=True)
sample("lerp", torch.lerp, (5, 7), (5, 7), (7,))
sample("prelu", lambda x, w: F.prelu(x, w), (2, 5, 3), (5,))
sample("prelu", lambda x, w: F.prelu(x, w), (2, 5, 3), (1,))
sample("_prelu_kernel", lambda x, w: aten._prelu_kernel(x, w), (2, 5, 3), (5, 1))
sample("rrelu", lambda x: F.rrelu(x), (5, 7))
sample(
    "relu gelu silu tanh neg negative abs absolute relu6 leaky_relu elu selu celu mish hardswish atanh arctanh erfinv sin asin arcsin tan atan arctan sinh asinh arcsinh erf expm1 "
    "log1p square sign sgn frac softshrink hardshrink nan_to_num positive deg2rad rad2deg",
    lambda op, x: op(0.7 * x.tanh()),
    (5, 7),
)
sample("round floor ceil trunc fix", lambda op, x: op(9 * x), (5, 7))
sample(
    "real imag conj conj_physical resolve_conj resolve_neg", lambda op, x: torch.view_as_real(op(torch.view_as_complex(x)) + 0j), (5, 7, 2)
)
sample("view_as_complex view_as_real", lambda op, x: torch.view_as_real(torch.view_as_complex(x) * 2j), (5, 7, 2))
sample("complex polar", lambda op, x, y: torch.view_as_real(op(x, y)), (5, 7), (5, 7))
sample("bitwise_left_shift bitwise_right_shift", lambda op, x, y: op(x, y), ints(99, 5, 7), ints(3, 7))
sample("native_dropout", lambda x: aten.native_dropout(x, 0.0, False)[0], (5, 7))
sample("threshold", lambda x: F.threshold(x, 0.2, 3.0), (5, 7))
sample("sqrt", lambda x: x.sqrt(), positive(5, 7))
sample("dropout feature_dropout alpha_dropout", lambda op, x: op(x, 0.5, False), (2, 5, 7))
sample("clone", lambda x: x.clone(), (5, 7))
sample("to", lambda x: x.to(torch.float64), (5, 7))
sample("_to_copy", lambda x: aten._to_copy(x, dtype=torch.float64), (5, 7))
sample("contiguous", lambda x: x.transpose(0, 1).contiguous(), (5, 7))
sample("detach alias", lambda op, x: op(x), (5, 7))
sample("type_as", lambda x, y: x.type_as(y), (5, 7), (3,), blind=True)
sample("lift_fresh_copy", lambda x: aten.lift_fresh_copy(x), (5, 7))
sample("sigmoid exp exp2 cos cosh softplus hardsigmoid erfc log_sigmoid", lambda op, x: op(x), (5, 7))
sample("log log2 log10 rsqrt reciprocal", lambda op, x: op(x), positive(5, 7))
sample("acos arccos logit", lambda op, x: op(x.sigmoid()), (5, 7))
sample("less less_equal greater greater_equal", lambda op, x, y: op(x, y), (5, 7), (7,))
sample("lt le gt ge", lambda op, x, y: op(x, y), (5, 7), (7,))
sample("eq ne not_equal", lambda op, x, y: op(x, y), ints(3, 5, 7), ints(3, 7))
sample("isnan isinf isfinite logical_not", lambda op, x: op(x), (5, 7), blind=True)
sample("bitwise_not", lambda x: ~(x > 0), (5, 7))
sample("full_like", lambda x: torch.full_like(x, 3.0), (5, 7), blind=True)
sample("ones_like zeros_like", lambda op, x: op(x), (5, 7), blind=True)
sample("rand_like randn_like empty_like bernoulli", lambda op, x: op(x.sigmoid()) * 0.0, (5, 7), blind=True)
sample("where", lambda c, x, y: torch.where(c, x, y), bools(5, 7), (5, 7), (7,))
sample("where", lambda c, x: torch.where(c, x, 0.0), bools(5, 7), (5, 7))
sample("where", lambda c, x: torch.where(c, x, 1.0), bools(5, 7), (5, 7))
sample("masked_fill", lambda x, m: x.masked_fill(m, 0.0), (2, 5, 7), bools(5, 7))
sample("masked_fill", lambda x, m: x.masked_fill(m, -1e9).softmax(-1), (2, 5, 7), bools(5, 7))
sample("masked_fill", lambda x, m: x.masked_fill(m, torch.tensor(2.0)), (2, 5, 7), bools(5, 7))
sample("clamp clip", lambda op, x: op(x, -0.5, 0.5), (5, 7))
sample("clamp clip", lambda op, x: op(x, 0.5, 0.8), (5, 7))
sample("clamp", lambda x, y: x.clamp(min=y), (5, 7), (7,))
sample("clamp_min", lambda x: x.clamp_min(0.1), (5, 7))
sample("clamp_max", lambda x: x.clamp_max(0.1), (5, 7))
sample("hardtanh", lambda x: F.hardtanh(x), (5, 7))
sample("pow", lambda x: x.pow(2), (5, 7))
sample("pow", lambda x: x.abs().add(0.1).pow(-0.5), (5, 7))
sample("pow", lambda x, y: x.pow(y), positive(5, 7), (7,))
sample("pow", lambda x: 2.0**x, (5, 7))
sample("float_power", lambda x: x.float_power(2), (5, 7))
sample("atan2", torch.atan2, (5, 7), positive(7))
sample("logaddexp", torch.logaddexp, (5, 7), (7,))
sample("nextafter", lambda x, y: torch.nextafter(x, y), (5, 7), (7,), blind=True)

# elementwise by torch.Tag.pointwise alone
sample("acosh digamma i0 lgamma sinc special_entr special_erfcx special_i1", lambda op, x: op(x.abs() + 0.1), (5, 7))
sample("angle isneginf isposinf signbit", lambda op, x: op(x), (5, 7), blind=True)
sample("heaviside ldexp gcd", lambda op, x, y: op(x, y), ints(9, 5, 7), ints(9, 7), blind=True)
sample("frexp", lambda x: x.frexp()[0] + x.frexp()[1], (5, 7))

# ---- recurrent nets and own structures


def _rnn(kind: type[nn.RNNBase], **options: Any) -> None:
    """Weights are inputs: the state dict in order."""
    net = kind(**options)
    shapes = [tuple(p.shape) for p in net.parameters()]
    op = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn_relu" if options.get("nonlinearity") == "relu" else "rnn_tanh"}[kind]
    states = 2 if kind is nn.LSTM else 1
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)

    def call(x: Tensor, *rest: Tensor) -> Any:
        hidden, weights = rest[:states], list(rest[states:])
        function = getattr(torch, op)
        hx = hidden if kind is nn.LSTM else hidden[0]
        flags = (
            options.get("bias", True),
            options.get("num_layers", 1),
            0.0,
            False,
            options.get("bidirectional", False),
            options.get("batch_first", False),
        )
        return function(x, hx, weights, *flags)

    sample(
        op,
        call,
        (4, 3, options["input_size"]),
        *[(layers, 4 if options.get("batch_first") else 3, options["hidden_size"])] * states,
        *shapes,
    )


_rnn(nn.LSTM, input_size=5, hidden_size=7)
_rnn(nn.LSTM, input_size=5, hidden_size=7, num_layers=2, bidirectional=True, batch_first=True)
_rnn(nn.LSTM, input_size=5, hidden_size=7, bias=False)
_rnn(nn.GRU, input_size=5, hidden_size=7)
_rnn(nn.GRU, input_size=5, hidden_size=7, num_layers=2, bidirectional=True)
_rnn(nn.RNN, input_size=5, hidden_size=7)
_rnn(nn.RNN, input_size=5, hidden_size=7, nonlinearity="relu")

# ---- ops of our own

sample(
    "selective_scan",
    lambda x, d, A, B, C: selective_scan(x, F.softplus(d), -A.exp(), B, C),
    (2, 3, 5),
    (2, 3, 5),
    (3, 4),
    (2, 4, 5),
    (2, 4, 5),
    domain="graphprune",
)
sample(
    "selective_scan",
    lambda x, d, A, B, C, D, s: selective_scan(x, F.softplus(d), -A.exp(), B, C, D, s),
    *((2, 3, 5), (2, 3, 5), (3, 4), (2, 4, 5), (2, 4, 5), (3,), (2, 3, 4)),
    domain="graphprune",
)
sample(
    "ssd_scan",
    lambda x, d, A, B, C: ssd_scan(x, F.softplus(d), -A.exp(), B, C),
    *((2, 5, 6, 7), (2, 5, 6), (6,), (2, 5, 3, 4), (2, 5, 3, 4)),
    domain="graphprune",
)
sample(
    "ssd_scan",
    lambda x, d, A, B, C, D, s: ssd_scan(x, F.softplus(d), -A.exp(), B, C, D, s),
    *((2, 5, 6, 7), (2, 5, 6), (6,), (2, 5, 2, 4), (2, 5, 2, 4), (6,), (2, 6, 7, 4)),
    domain="graphprune",
)
sample(
    "gated_delta_rule",
    lambda q, k, v, g, w: gated_delta_rule(q, k, v, -g.abs(), w.sigmoid()),
    *((2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 6, 7), (2, 5, 6), (2, 5, 6)),
    domain="graphprune",
)
sample(
    "gated_delta_rule",
    lambda q, k, v, g, w, s: gated_delta_rule(q, k, v, -g.abs(), w.sigmoid(), s),
    *((2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 3, 7), (2, 5, 3), (2, 5, 3), (2, 3, 4, 7)),
    domain="graphprune",
)
