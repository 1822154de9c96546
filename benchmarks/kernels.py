"""Sparse kernels against dense cuBLAS and against torch's own sparse paths: correctness first, then time.

    python3 benchmarks/kernels.py [--only block two_four unstructured bitmap grouped conv resnet compiled] [--quick] [--seconds 500] [--json FILE]

Each row is one weight shape (rows x columns), sparsity and number of tokens, in bf16: median time of a call inside a CUDA graph, with so
many copies of the weight in turn that none is in the L2 cache. All tile configurations of the kernel are timed, the best once more. `bound` is
what the traffic or, for many tokens, the arithmetic would allow; `torch` is torch's own kernel for the format, where it runs.
A row is timed only after its result agreed with float64 and was bit-equal in a second run. Expert products (grouped) are measured against
torch's grouped product on slots that are sorted already; ours sorts in the time given.

Convolutions (conv) are those of ResNet-50 on 64 images, channels last, against cuDNN with its own search (`torch` is cuBLAS, where a
convolution is a product). `resnet` is the whole network at block:64x64, 80 % zeros, fp16, 64 images in a CUDA graph: dense masked module
against the module that the backend makes, with batch normalisation as it is and folded into the convolutions; `compiled` is the latter
with torch.compile around both.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphprune as gp
from graphprune.backends.gate import Gate
from graphprune.backends.kernels import KERNELS, block_sparse_conv, grouped_gemm
from graphprune.backends.kernels.base import MODEL_SHAPES, TOLERANCE, Kernel, Packed, Shape
from graphprune.backends.timing import capture, copies, dense_calls, time_calls, time_graph
from graphprune.backends.triton import sparse_module

SHAPES = {f"{s.rows}x{s.columns}": s for s in MODEL_SHAPES}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table before it is measured."""

    kernel: str
    shape: Shape
    sparsity: float
    tokens: int
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""


def block_mask(rows: int, columns: int, sparsity: float, block: int, device: str) -> Tensor:
    high, wide = -(-rows // block), -(-columns // block)
    kept = torch.zeros(high * wide, dtype=torch.bool, device=device)
    kept[torch.randperm(high * wide, device=device)[: round((1 - sparsity) * high * wide)]] = True
    return kept.reshape(high, wide).repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]


def two_four_mask(rows: int, columns: int, device: str) -> Tensor:
    kept = torch.rand(rows, columns // 4, 4, device=device).topk(2, -1).indices
    return torch.zeros(rows, columns // 4, 4, dtype=torch.bool, device=device).scatter_(-1, kept, True).reshape(rows, columns)


def make_weight(case: Case, device: str) -> Tensor:
    rows, columns = case.shape.rows, case.shape.columns
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=device) / columns**0.5
    if case.kernel == "block_sparse":
        return weight * block_mask(rows, columns, case.sparsity, dict(case.options)["block"], device)
    if case.kernel == "two_four":
        return weight * two_four_mask(rows, columns, device)
    return weight * (torch.rand(rows, columns, device=device) >= case.sparsity)


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Relative error of the first 64 rows against float64."""
    y, x = y[:64].double(), x[:64].double()
    expected = torch.cat([x @ part.double().T for part in weight.split(4096)], 1)
    return float((y - expected).norm() / expected.norm())


def rotated(kernel: Kernel, packed: Packed, x: Tensor, config: str) -> list[Callable[[], Tensor]]:
    clones = [packed.clone() for _ in range(copies(packed.bytes, x.device))]
    return [lambda p=p: kernel.linear(x, p, config=config) for p in clones]


def torch_calls(case: Case, weight: Tensor, x: Tensor) -> list[Callable[[], Any]]:
    """torch's own sparse path for the format of `case`."""
    if case.kernel == "block_sparse":
        from torch.sparse._triton_ops import bsr_dense_addmm

        bsr = weight.to_sparse_bsr(dict(case.options)["block"])
        number = copies(bsr.values().numel() * 2, x.device)
        clones = [
            torch.sparse_bsr_tensor(bsr.crow_indices().clone(), bsr.col_indices().clone(), bsr.values().clone(), bsr.shape)
            for _ in range(number)
        ]
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 16))
        bias = weight.new_zeros(weight.shape[0], padded.shape[0])
        return [lambda w=w: bsr_dense_addmm(bias, w, padded.T, beta=0) for w in clones]
    if case.kernel == "two_four":
        from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Library

        clones = [Library.from_dense(weight) for _ in range(copies(weight.numel(), x.device))]
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 16))
        return [lambda w=w: torch.nn.functional.linear(padded, w) for w in clones]
    return []


def cases(only: list[str], quick: bool) -> Iterator[Case]:
    big = [SHAPES["14336x4096"], SHAPES["4096x14336"]]
    shapes = big if quick else [*big, SHAPES["28672x8192"], SHAPES["4096x4096"]]
    for shape in shapes:
        if "block" in only:
            for sparsity in (0.8, 0.9):
                for tokens in (1, 32, 4096) if quick else (1, 16, 32, 4096):
                    yield Case("block_sparse", shape, sparsity, tokens, (("block", 64),), "block 64")
        if "two_four" in only:
            for tokens in (1, 32) if quick else (1, 16, 32):
                yield Case("two_four", shape, 0.5, tokens, (), "2:4")
        if "unstructured" in only:
            for sparsity in (0.5, 0.6, 0.7) if quick else (0.4, 0.5, 0.6, 0.7, 0.8):
                for tokens in (1, 2) if not quick else (1,):
                    yield Case("unstructured", shape, sparsity, tokens, (), "unstructured")
        if "bitmap" in only:
            for sparsity in (0.5, 0.6, 0.7) if quick else (0.4, 0.5, 0.6, 0.7, 0.8):
                for tokens in (1, 16, 32) if quick else (1, 2, 8, 16, 32, 64):
                    yield Case("bitmap", shape, sparsity, tokens, (), "bitmap")


def measure(case: Case, dense: dict[tuple[str, int], float], log: list[dict[str, Any]]) -> dict[str, Any]:
    """Checks and times one case; `dense` keeps the dense times between cases."""
    device = "cuda"
    kernel, shape = KERNELS[case.kernel], case.shape
    weight = make_weight(case, device)
    packed = kernel.pack(weight, **dict(case.options))
    x = torch.randn(case.tokens, shape.columns, dtype=torch.bfloat16, device=device)
    key = (shape.name, case.tokens)
    if key not in dense:
        dense[key] = time_calls(dense_calls(weight, x)).median
    times: dict[str, float] = {}
    found = 0.0
    for config in kernel.configs(packed, case.tokens):
        try:
            y = kernel.linear(x, packed, config=config)
            found = error(y, x, weight)
            if not found < TOLERANCE[x.dtype]:
                raise SystemExit(f"{case}: relative error {found:.2e} against float64 with '{config}'")
            if not torch.equal(y, kernel.linear(x, packed, config=config)):
                raise SystemExit(f"{case}: two runs of '{config}' differ")
            times[config] = time_calls(rotated(kernel, packed, x, config), repeats=9).median
        except (RuntimeError, torch.OutOfMemoryError) as problem:  # a tile that does not fit this device
            log.append({"case": str(case), "config": config, "problem": str(problem)[:200]})
    best = min(times, key=times.__getitem__)
    spread = time_calls(rotated(kernel, packed, x, best))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = torch_calls(case, weight, x)
            torch_us = time_calls(own, repeats=9).median if own else None
    except Exception as problem:
        torch_us = None
        log.append({"case": str(case), "torch": repr(problem)[:200]})
    dense_bytes = weight.numel() * 2
    return {
        "kernel": case.label, "shape": f"{shape.rows}x{shape.columns}", "sparsity": case.sparsity, "tokens": case.tokens,
        "dense_us": round(dense[key], 2), "us": round(spread.median, 2), "low": round(spread.low, 2), "high": round(spread.high, 2),
        "speedup": round(dense[key] / spread.median, 2), "torch_us": torch_us and round(torch_us, 2),
        "bound": round(dense_bytes / packed.bytes if case.tokens < 256 else 1 / packed.work, 2),
        "TB/s": round(packed.bytes / spread.median / 1e6, 2), "error": float(f"{found:.1e}"), "config": best,
        "all": {c: round(t, 2) for c, t in sorted(times.items(), key=lambda item: item[1])},
    }  # fmt: skip


def grouped_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Expert products of a Qwen3-30B-A3B layer (2048 -> 1536, 8 of 128 experts a token), whole and pruned to 64 experts."""
    rows, columns, slots = 1536, 2048, 8
    for experts in (64,) if quick else (128, 64):
        weight = torch.randn(experts, rows, columns, dtype=torch.bfloat16, device="cuda") / columns**0.5
        for tokens in (1, 32, 4096) if quick else (1, 8, 32, 128, 4096):
            x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
            turns = [torch.rand(tokens, experts, device="cuda").argsort(1)[:, :slots].contiguous() for _ in range(8 if tokens < 128 else 2)]
            touched = sum(len(ids.unique()) for ids in turns) / len(turns)
            times = {}
            for config in grouped_gemm.candidates(turns[0].shape, experts, x):
                y = grouped_gemm.grouped_linear(x, weight, turns[0], config=config)
                picked = torch.stack([x[:4].double() @ weight[e].double().T for e in range(experts)])  # (E, 4, M)
                expected = picked[turns[0][:4], torch.arange(min(4, tokens), device="cuda")[:, None]]
                found = float((y[:4].double() - expected).norm() / expected.norm())
                if not found < TOLERANCE[x.dtype] or not torch.equal(y, grouped_gemm.grouped_linear(x, weight, turns[0], config=config)):
                    raise SystemExit(f"grouped, {experts} experts, {tokens} tokens, '{config}': error {found:.2e}, or two runs differ")
                calls = [lambda i=ids, x=x, w=weight, c=config: grouped_gemm.grouped_linear(x, w, i, config=c) for ids in turns]
                times[config] = time_calls(calls, repeats=9).median
            best = min(times, key=times.__getitem__)
            order = [ids.flatten().sort(stable=True) for ids in turns]
            sorted_x = [x[places // slots] for _, places in order]
            ends = [torch.bincount(values, minlength=experts).cumsum(0).int() for values, _ in order]
            calls = [lambda a=a, e=e, w=weight: torch._grouped_mm(a, w.transpose(1, 2), offs=e) for a, e in zip(sorted_x, ends)]
            dense = time_calls(calls).median
            moved = touched * rows * columns * 2 + tokens * slots * (rows + columns) * 2
            yield {
                "kernel": "grouped", "shape": f"{experts}x{rows}x{columns}", "sparsity": 1 - experts / 128, "tokens": tokens,
                "dense_us": round(dense, 2), "us": round(times[best], 2), "speedup": round(dense / times[best], 2), "bound": None,
                "torch_us": round(dense, 2), "TB/s": round(moved / times[best] / 1e6, 2), "error": found, "config": best, "all": times,
            }  # fmt: skip


CONVOLUTIONS = (  # outputs, channels, window, stride, size of the images
    (64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7),
    (64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (256, 1024, 1, 1, 14), (1024, 256, 1, 1, 14), (512, 2048, 1, 1, 7), (2048, 512, 1, 1, 7),
    (256, 256, 3, 2, 28), (2048, 1024, 1, 2, 14),
)  # fmt: skip
IMAGES = 64


def conv_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Convolutions of ResNet-50: fp16 with blocks of 64 first, then blocks of 32, then bf16."""
    gate = Gate()
    kinds = [(torch.float16, 64, 0.8), (torch.float16, 64, 0.9), (torch.float16, 32, 0.8), (torch.float16, 32, 0.9), (torch.bfloat16, 64, 0.8)]
    for dtype, block, sparsity in kinds[:1] if quick else kinds:
        for shape in CONVOLUTIONS:
            yield conv_row(dtype, block, sparsity, *shape, gate=gate)


def conv_row(
    dtype: torch.dtype, block: int, sparsity: float, rows: int, channels: int, window: int, stride: int, size: int, gate: Gate,
    images: int = IMAGES, device: str = "cuda",
) -> dict[str, Any]:  # fmt: skip
    kernel, columns = block_sparse_conv.KERNEL, channels * window**2
    mask = block_mask(rows, columns, sparsity, block, device).reshape(rows, window, window, channels).permute(0, 3, 1, 2)
    weight = torch.randn(rows, channels, window, window, device=device) / columns**0.5
    weight = (weight * mask).to(dtype).contiguous(memory_format=torch.channels_last)
    padding = window // 2
    steps = {name: (n, n) for name, n in {"stride": stride, "padding": padding, "dilation": 1, "size": size}.items()}
    packed = kernel.pack(weight, block=block, **steps)
    pixels = images * (-(-size // stride)) ** 2
    x = packed.example(pixels, weight)
    dense = time_calls(dense_calls(weight, x, packed.dense)).median
    own = None
    if window == stride == 1:
        flat = x.permute(0, 2, 3, 1).reshape(-1, channels)
        own = round(time_calls(dense_calls(weight.reshape(rows, channels), flat)).median, 2)
    expected = torch.nn.functional.conv2d(x[:2].double(), weight.double(), None, stride, padding)
    times, found = {}, 0.0
    for config in kernel.configs(packed, pixels):
        try:
            y = kernel.linear(x, packed, config=config)
            found = float((y[:2].double() - expected).norm() / expected.norm().clamp(min=1e-30))  # all tiles may be zero
            if not found < TOLERANCE[dtype] or not torch.equal(y, kernel.linear(x, packed, config=config)):
                raise SystemExit(f"conv {tuple(weight.shape)}@{size}, blocks of {block}, '{config}': error {found:.2e}, or two runs differ")
            times[config] = time_calls(rotated(kernel, packed, x, config), repeats=9).median
        except (RuntimeError, torch.OutOfMemoryError) as problem:  # a tile that does not fit this device
            print(f"    '{config}' does not run: {str(problem).strip().splitlines()[0][:120]}")
    best = min(times, key=times.__getitem__)
    spread = time_calls(rotated(kernel, packed, x, best))
    moved = packed.bytes + pixels * packed.width * x.element_size()
    return {
        "kernel": f"{str(dtype).removeprefix('torch.')} b{block}", "shape": f"{rows}x{channels}x{window}" + ("/2" if stride > 1 else "") + f"@{size}",
        "sparsity": sparsity, "tokens": pixels, "dense_us": round(dense, 2), "us": round(spread.median, 2), "low": round(spread.low, 2),
        "high": round(spread.high, 2), "speedup": round(dense / spread.median, 2), "torch_us": own,
        "bound": round(gate.model(packed, pixels, x.element_size()), 2), "TB/s": round(moved / spread.median / 1e6, 2),
        "error": float(f"{found:.1e}"), "config": best, "all": {c: round(t, 2) for c, t in sorted(times.items(), key=lambda item: item[1])},
    }  # fmt: skip


def folded(model: torch.nn.Module) -> torch.nn.Module:
    """torchvision's ResNet in evaluation mode with each batch normalisation in the convolution before it."""
    for part in list(model.modules()):
        names = list(part._modules)
        for first, second in itertools.pairwise(names):
            conv, norm = part._modules[first], part._modules[second]
            if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                part._modules[first], part._modules[second] = torch.nn.utils.fuse_conv_bn_eval(conv, norm), torch.nn.Identity()
    return model


def resnet_rows(
    labels: Sequence[str], images: int = IMAGES, device: str = "cuda", size: int = 224, backend: str = "inductor"
) -> Iterator[dict[str, Any]]:
    """ResNet-50 with tiles of zeros."""
    import tests.torchvision_ops  # noqa: F401, I001  # before torchvision
    from torchvision.models import resnet50

    for label in labels:
        torch.manual_seed(0)
        model = resnet50().eval().to(device)
        model = folded(model) if label != "resnet50" else model
        example = torch.randn(2, 3, size, size, device=device)
        result = gp.compile(model, example, sparsity=0.8, pattern="block:64x64", ignore=["conv1"], progress=False)
        if not result.certificate.passed:
            raise SystemExit(f"{label}: the certificate of the masks did not pass")
        dense = result.module.to(dtype=torch.float16, memory_format=torch.channels_last)
        begin = time.monotonic()
        module = sparse_module(result, images=(images,))
        sparse = [it for it in module.sparse_layers if any(d.sparse for d in it.decisions)]  # type: ignore[union-attr]
        seconds = time.monotonic() - begin
        runner: Callable[..., Tensor] = module
        if label == "compiled":
            dense, runner = (torch.compile(it, backend=backend, fullgraph=True) for it in (dense, module))
        x = torch.randn(images, 3, size, size, device=device).half().contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            found, expected = runner(x).double(), dense(x).double()
            off = float((found - expected).norm() / expected.norm())
            if not off < 2e-2 or not torch.equal(found, runner(x).double()):
                raise SystemExit(f"{label}: the sparse network is off by {off:.1e}, or two runs differ")
            times = [time_graph(capture([lambda it=it: it(x)]), 1) for it in (dense, runner)]
        print(f"    {label}: {len(sparse)} of {len(module.sparse_layers)} layers sparse, decided in {seconds:.0f} s")  # type: ignore[arg-type]
        for (shape, one), count in Counter((it.shape, it.decisions[0]) for it in module.sparse_layers).items():  # type: ignore[union-attr]
            found_us = f"{one.dense_us or 0:7.1f} {one.sparse_us or 0:7.1f}"
            print(f"      {count} of {shape!s:22} {one.tokens:>7} {one.path:18} {found_us} {one.reason if not one.sparse else one.config}")
        yield {
            "kernel": label, "shape": f"{images}x3x{size}", "sparsity": 0.8, "tokens": images, "dense_us": round(times[0].median, 1),
            "us": round(times[1].median, 1), "low": round(times[1].low, 1), "high": round(times[1].high, 1), "bound": None,
            "speedup": round(times[0].median / times[1].median, 2), "torch_us": None, "TB/s": None, "error": float(f"{off:.1e}"),
            "config": f"{len(sparse)} layers sparse", "all": {it.name: [str(d) for d in it.decisions] for it in sparse},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=["block", "two_four", "unstructured", "bitmap", "grouped"])
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer tokens")
    parser.add_argument("--seconds", type=float, default=500, help="stop after this time")
    parser.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "kernels.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure (correctness on the CPU is tests/test_kernels.py)")
    begin, rows, log, dense = time.monotonic(), [], [], {}
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    header = ("kernel", "shape", "sparsity", "tokens", "dense_us", "us", "speedup", "bound", "torch_us", "TB/s", "config")
    print("".join(f"{name:>13}" for name in header[:-1]), header[-1])

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        tile = " ".join(re.sub(r"^(..)[a-z]*=", r"\1", part) for part in row["config"].split())
        print("".join(f"{row[name]!s:>{max(13, len(str(row[name])) + 1)}}" for name in header[:-1]), tile, flush=True)
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "log": log}
        args.json.write_text(json.dumps(found, indent=1))

    def late() -> bool:
        return time.monotonic() - begin > args.seconds

    for case in cases(args.only, args.quick):
        if late():
            print(f"stopped after {args.seconds:.0f} s, before {case}")
            break
        keep(measure(case, dense, log))
    parts = {"grouped": lambda: grouped_rows(args.quick), "conv": lambda: conv_rows(args.quick)}
    parts |= {"resnet": lambda: resnet_rows(("resnet50", "folded")), "compiled": lambda: resnet_rows(("compiled",))}
    for row in (row for name, part in parts.items() if name in args.only and not late() for row in part()):
        keep(row)
        if late():
            break


if __name__ == "__main__":
    main()
