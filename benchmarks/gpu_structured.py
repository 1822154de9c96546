"""Structured pruning on a GPU: is what was cut really faster, how much of the roofline's speed-up arrives, and what takes the rest?

    python -m benchmarks.gpu_structured [--backends ort,ort_nhwc,compile,eager] [--networks resnet50,bert_base] [--seconds 500] [--json FILE]
    python -m benchmarks.gpu_structured --cases resnet50@64,llama_8x2048@1 --rounding auto,64   # in this order
    python -m benchmarks.gpu_structured --smoke     # tiny networks on the CPU: does all of it run?

For each network (random weights, fp16) dense and at ratio 0.3 and 0.5: the certificate of the cut in float64, the module and the ONNX file
that `result.save` writes (dense by the same path); then, backend by backend, the error against the float64 module, and only then the time:
dense and pruned in turns, median, launched by a CUDA graph. ONNX Runtime: fused, sizes fixed, I/O binding. It waits for each replay, so
its times hold that of an empty graph, which is printed first. `+search` after a backend lets cuDNN time its algorithms, `+tune` lets
torch.compile fold norms and time kernels of its own that hold what follows a product, which takes minutes, `+bias` lets ONNX Runtime add
biases in the convolution's kernel, `ort_auto` is what `OnnxRuntimeModel` does by itself. Networks are cut and exported, and what is for
torch.compile is compiled once, by processes beside each other before anything is timed: what is timed finds it in Inductor's cache.
Rounding "auto" keeps multiples of what this GPU was measured to run well in fp16 by the library at hand, before anything is cut.
Prediction: sum over nodes of max(bytes / bandwidth, FLOPs / peak), dense over pruned. Share: measured speed-up over predicted. With the
floor, no node takes less than a kernel in a CUDA graph does, nor do the kernels that a profile finds besides those of the nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_profile import KINDS, Profile, floor_of_a_kernel, profile
from graphprune.widths import RULE, Widths

with contextlib.suppress(ImportError):  # the CPU build of torchvision needs two operators declared before its import
    import tests.torchvision_ops  # noqa: F401

RATIOS = (0.0, 0.3, 0.5)
PEAKS = {"H200": (4.8e12, 790e12), "H100": (3.35e12, 790e12)}  # bytes/s, dense fp16 FLOP/s
WRONG = 5e-2  # a backend that is further from the float64 module is not timed
BACKENDS = (  # by default without extras
    "compile", "compile+search", "compile+tune", "ort", "ort_auto", "ort_nhwc", "ort_nhwc+bias",
    "ort_nhwc+search+bias", "eager",
)  # fmt: skip
PRELOAD = ("torch", "graphprune", "graphprune.planning", "benchmarks.gpu_structured", "torch.onnx", "onnxscript", "transformers", "torch._dynamo")
TUNED = {"max_autotune": True, "freezing": True}  # options of Inductor
CONVOLUTIONAL = ("resnet50", "convnext_tiny", "resnet18")


@dataclass(frozen=True)
class Network:
    """How to make one, and what it is called with."""

    make: Callable[[], nn.Module]
    size: int  # of an image, or tokens
    ids: int = 0  # how many token ids there are; 0 where it takes images

    def inputs(self, batch: int, size: int | None = None) -> torch.Tensor:
        size, generator = size or self.size, torch.Generator().manual_seed(batch)
        if self.ids:
            return torch.randint(0, self.ids, (batch, size), generator=generator)
        return torch.randn(batch, 3, size, size, generator=generator)


def vision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name)

    return make


def encoder(width: int = 768, layers: int = 12) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width)
    return BertModel(config, add_pooling_layer=False)


def decoder(width: int = 2048, layers: int = 8, vocabulary: int = 32000) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        vocab_size=vocabulary,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def small_encoder() -> nn.Module:
    return encoder(256, 2)


def small_decoder() -> nn.Module:
    return decoder(512, 2, 500)


NETWORKS = {
    "bert_base": Network(encoder, 128, ids=30000),
    "vit_b_16": Network(vision("vit_b_16"), 224),
    "resnet50": Network(vision("resnet50"), 224),
    "llama_8x2048": Network(decoder, 128, ids=32000),
    "convnext_tiny": Network(vision("convnext_tiny"), 224),
}
SMOKE = {"resnet18": Network(vision("resnet18"), 32), "bert": Network(small_encoder, 16, ids=30000), "llama": Network(small_decoder, 16, ids=500)}


@dataclass(frozen=True)
class Work:
    """What one node does for a batch of one; weights are read whatever the batch is."""

    weights: int  # entries
    activations: float  # entries
    flops: float

    def seconds(self, batch: int, bandwidth: float, peak: float) -> float:
        return max(2 * (self.weights + self.activations * batch) / bandwidth, self.flops * batch / peak)


Opened = tuple[torch.Tensor, Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Cut:
    """What is taken from a network, and in which steps."""

    ratio: float
    rounding: str = ""  # "auto", or a number
    library: str = "torch"  # whose measured widths "auto" means

    def __str__(self) -> str:
        return f"{self.ratio} by {self.rounding}" if self.ratio else "0.0"


@dataclass(frozen=True)
class Variant:
    """A network at one ratio, ready to be run."""

    folder: Path
    certificate: str
    macs: float  # left
    work: tuple[Work, ...]  # of the nodes that multiply; elementwise nodes are fused into their neighbours
    kept: str  # widths before and after
    spent: str  # seconds that preparing it took, step by step

    def module(self) -> nn.Module:
        return torch.load(self.folder / "module.pt", weights_only=False)  # written by `prepare` just now

    def seconds(self, batch: int, peaks: tuple[float, float], floor: float = 0.0, kernels: int = 0) -> float:
        """No node takes less than the floor, nor does a kernel that is none of a node."""
        others = max(0, kernels - len(self.work)) if floor else 0
        return sum(max(floor, work.seconds(batch, *peaks)) for work in self.work) + floor * others


def prepare(name: str, ratio: float, widths: Widths | int, folder: Path, threads: int, export: bool) -> Variant:
    """Cut, certify, save and, for ONNX Runtime, export; runs in a process of its own, on the CPU."""
    clock = [("import", time.monotonic())]

    def step(what: str) -> None:
        clock.append((what, time.monotonic()))

    import graphprune as gp
    from graphprune.costs import macs
    from graphprune.planning import make_plan

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = (NETWORKS | SMOKE)[name]
    module = network.make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.abs().max() < 1e-3:  # zero-initialised heads and layer scales hide every cut from its certificate
                nn.init.normal_(parameter, std=0.02 if parameter.dim() == 1 else 0.2)
    step("make")
    few = network.inputs(2, 16 if network.ids else None)
    program = gp.capture(module, few)
    if isinstance(widths, int):
        plan = make_plan(program, pruning_ratio=ratio, round_to=widths)
    else:
        plan = make_plan(program, pruning_ratio=ratio, widths=widths)
    step("capture and plan")
    result = gp.apply(program, plan)
    step("cut and certify")
    if ratio:
        assert result.certificate is not None and result.certificate.passed, f"{name} at {ratio}: {result.certificate}"
    folder = Path(tempfile.mkdtemp(prefix=f"{name}_{ratio}_", dir=folder))
    if export:
        result.save(folder / "model.onnx")
        step("export")
    torch.save(result.module, folder / "module.pt")
    program = gp.capture(result.module, network.inputs(2))
    work = []
    for node in program.nodes:
        if flops := 2 * macs(node, lambda v: v.shape):
            values = [v for v in dict.fromkeys((*node.inputs, *node.outputs)) if v.shape is not None]
            weights = sum(v.tensor.numel() for v in values if v.tensor is not None)
            work.append(Work(weights, sum(torch.Size(v.shape).numel() for v in values if v.tensor is None) / 2, flops / 2))
    left = (result.report.after.macs or 0) / (result.report.before.macs or 1)
    widths_kept = Counter((entry.size, entry.size - len(entry.removed)) for entry in plan.entries.values())
    kept = ", ".join(f"{before}->{after}" + (f" (x{n})" if n > 1 else "") for (before, after), n in sorted(widths_kept.items()))
    step("count")
    spent = ", ".join(f"{what} {after - before:.0f} s" for (_, before), (what, after) in pairwise(clock))
    return Variant(folder, f"{result.certificate.error:.0e}" if ratio else "-", left, tuple(work), kept, spent)


def narrowed(source: Path, shape: Sequence[int]) -> tuple[Path, dict[str, int]]:
    """The ONNX file ready for ONNX Runtime in fp16 at these sizes; in a process of its own."""
    import onnx_ir as ir

    from graphprune.backends import onnx_tuning

    torch.set_num_threads(1)
    model = ir.load(source)
    onnx_tuning.fix_sizes(model, sizes(model, shape))
    fused = onnx_tuning.fuse(model)
    onnx_tuning.narrow(model, "float16", keep_io=False)
    file = source.with_name(f"narrowed_{'x'.join(map(str, shape))}.onnx")
    ir.save(model, file, external_data=f"{file.name}.data")
    return file, fused


def sizes(model: Any, shape: Sequence[int]) -> dict[str, int]:
    """What the open axes of the first input get."""
    return {str(axis.value): size for axis, size in zip(model.graph.inputs[0].shape, shape) if not isinstance(axis, int)}


class Runner:
    """Opens a variant on a backend: the outputs for its data, and two calls that launch it once more on them: timed, and without a CUDA graph."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, *extras = backend.split("+")
        self.search, self.bias, self.tune, self.device = "search" in extras, "bias" in extras, "tune" in extras, device

    def open(self, variant: Variant, data: torch.Tensor, file: tuple[Path, dict[str, int]] | None) -> Opened:
        if self.backend == "ort_auto":
            return self._by_default(variant, data)
        if self.backend.startswith("ort"):
            assert file is not None
            return self._onnxruntime(variant, data, *file)
        torch.backends.cudnn.benchmark = self.search
        data = data.half() if data.is_floating_point() else data
        module = variant.module().eval().to(self.device).half()
        call = module
        if self.backend == "compile":
            torch._dynamo.config.recompile_limit = 64  # variants are modules of one class; a reset between them would free kernels in use
            options = TUNED if self.tune else None
            call = torch.compile(module, backend="inductor" if self.device == "cuda" else "aot_eager", dynamic=False, options=options)
        with torch.no_grad():
            found = first(call(data))
        if self.device == "cpu":
            return found, lambda: call(data), lambda: call(data)
        from graphprune.backends.timing import capture

        graph = capture([lambda: call(data)])
        return found, graph.replay, lambda: call(data)

    def _onnxruntime(self, variant: Variant, data: torch.Tensor, file: Path, fused: Mapping[str, int]) -> Opened:
        import onnx_ir as ir

        from graphprune.backends.onnxruntime import NO_KERNEL, OnnxRuntimeModel
        from graphprune.errors import InvalidInput

        options: dict[str, Any] = {"device": self.device}
        if self.device == "cuda":
            algorithms = "EXHAUSTIVE" if self.search else "HEURISTIC"
            chosen = {"cudnn_conv_algo_search": algorithms, "prefer_nhwc": str(int(self.backend == "ort_nhwc")), "fuse_conv_bias": str(int(self.bias))}
            options |= {"cuda_graph": True, "provider_options": chosen}
        try:
            model = OnnxRuntimeModel(file, **options)
        except InvalidInput as problem:
            if NO_KERNEL.search(str(problem)) is None:
                raise
            wide = variant.folder / "model.onnx"  # with the operator that has no 16-bit kernel here left in float32
            given = sizes(ir.load(wide), data.shape)
            model = OnnxRuntimeModel(wide, sizes=given, precision="float16", fuse=True, keep_io_types=False, check=False, **options)
        print(f"    {self.backend} fused: {', '.join(f'{n} {op}' for op, n in fused.items()) or 'nothing'}", flush=True)
        return self._opened(model, data)

    def _by_default(self, variant: Variant, data: torch.Tensor) -> Opened:
        """By what the class chooses; the caller compares with float64."""
        import onnx_ir as ir

        from graphprune.backends.onnxruntime import OnnxRuntimeModel

        wide, options = variant.folder / "model.onnx", {"cuda_graph": True} if self.device == "cuda" else {}
        model = OnnxRuntimeModel(
            wide, device=self.device, sizes=sizes(ir.load(wide), data.shape), precision="float16", fuse=True, keep_io_types=False, check=False, **options
        )
        chosen = next(iter(model.session.get_provider_options().values()))
        told = ", ".join(f"{key}={chosen[key]}" for key in ("prefer_nhwc", "fuse_conv_bias") if key in chosen)
        print(f"    {self.backend}: {told or 'no options'}; fused: {', '.join(f'{n} {op}' for op, n in model.fused.items()) or 'nothing'}", flush=True)
        return self._opened(model, data)

    def _opened(self, model: Any, data: torch.Tensor) -> Opened:
        if self.device == "cpu":
            return first(model(data)), lambda: model(data), lambda: model(data)
        import onnxruntime

        captured = model.capture(data)
        model.launch(captured)
        plain = onnxruntime.RunOptions()
        plain.add_run_config_entry("gpu_graph_id", "-1")
        return captured.outputs[0].clone(), lambda: model.launch(captured), lambda: model.session.run_with_iobinding(captured.binding, plain)


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


def expected(variant: Variant, data: torch.Tensor, device: str) -> torch.Tensor:
    """What the float64 module gives."""
    module = variant.module().eval().to(device).double()
    with torch.no_grad():
        return first(module(data.double() if data.is_floating_point() else data))


def in_turns(launches: Mapping[Any, Callable[[], Any]], device: str, rounds: int = 40) -> dict[Any, float]:
    """Median milliseconds. The GPU is kept busy while a launch is made, so that the launch itself is not timed."""
    times: dict[Any, list[float]] = {key: [] for key in launches}
    for turn in range(rounds + 3):
        for key, launch in launches.items():
            with torch.no_grad():
                if device == "cuda":
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    torch.cuda._sleep(200_000)
                    start.record()
                    launch()
                    end.record()
                    end.synchronize()
                    spent = start.elapsed_time(end)
                else:
                    begin = time.perf_counter()
                    launch()
                    spent = 1e3 * (time.perf_counter() - begin)
            if turn >= 3:
                times[key].append(spent)
    return {key: statistics.median(values) for key, values in times.items()}


def empty_graph(device: str) -> float:
    """Milliseconds of an ONNX Runtime graph that does next to nothing."""
    import onnx
    import onnx_ir as ir
    from onnx import TensorProto, helper

    from graphprune.backends.onnxruntime import OnnxRuntimeModel

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "empty", [x], [y])
    model = OnnxRuntimeModel(
        ir.from_proto(helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)), device=device, cuda_graph=device == "cuda"
    )
    data = torch.ones(1, device=device)
    if device == "cpu":
        return in_turns({0: lambda: model(data)}, device)[0]
    captured = model.capture(data)
    return in_turns({0: lambda: model.launch(captured)}, device)[0]


@dataclass(frozen=True)
class Row:
    network: str
    backend: str
    batch: int
    ratio: float
    rounding: str
    certificate: str
    error: float  # of the backend against the float64 module
    macs: float  # left
    predicted: float  # speed-up
    floored: float  # the same where no kernel is shorter than the floor; 0 without a profile
    ms: float
    speedup: float
    profile: Profile | None

    @property
    def share(self) -> float:
        return self.speedup / self.predicted

    @property
    def cut(self) -> str:
        return f"{self.ratio} by {self.rounding}" if self.ratio else "0.0"


@dataclass(frozen=True)
class Bench:
    """Where rows are measured."""

    device: str
    peaks: tuple[float, float]
    floor: float  # ms; 0 where no profile can be taken
    start: float  # on the clock of this machine

    def measure(self, name: str, variants: Mapping[Cut, Variant], files: Mapping[Cut, Any], backend: str, batch: int) -> list[Row]:
        """Errors first; a variant that is wrong is an error, not a time. Then times, all told, then profiles."""
        data = (NETWORKS | SMOKE)[name].inputs(batch).to(self.device)
        launches, plain, errors, runner = {}, {}, {}, Runner(backend, self.device)
        for cut, variant in variants.items():
            try:
                found, launch, plain[cut] = runner.open(variant, data, files.get(cut))
                reference = expected(variant, data, self.device)
                errors[cut] = float((found.double() - reference).abs().max() / reference.abs().max())
                if not errors[cut] <= WRONG:
                    raise ArithmeticError(f"error {errors[cut]:.1e} against the float64 module")
            except Exception as problem:  # the others are still worth having
                if not cut.ratio:
                    raise
                print(f"{name} {backend} batch {batch} ratio {cut}: {type(problem).__name__}: {str(problem).strip()[:300]}", flush=True)
                continue
            launches[cut] = launch
            del reference, found
        times = in_turns(launches, self.device)
        dense = next(cut for cut in launches if not cut.ratio)
        rows = []
        for cut in launches:
            v, predicted = variants[cut], variants[dense].seconds(batch, self.peaks) / variants[cut].seconds(batch, self.peaks)
            speedup = times[dense] / times[cut]
            row = Row(name, backend, batch, cut.ratio, cut.rounding, v.certificate, errors[cut], v.macs, predicted, 0.0, times[cut], speedup, None)
            rows.append(row)
            print_row(row, time.monotonic() - self.start)
        profiles = [self._profile(plain[cut]) for cut in launches] if self.floor else []
        if not profiles or not all(profiles):
            return rows
        floored = [variants[cut].seconds(batch, self.peaks, self.floor / 1e3, found.kernels) for cut, found in zip(launches, profiles) if found]
        rows = [replace(row, floored=floored[0] / it, profile=found) for row, it, found in zip(rows, floored, profiles)]
        for row in rows:
            print_profile(row)
        return rows

    def _profile(self, launch: Callable[[], Any]) -> Profile | None:
        try:
            found = profile(launch, self.floor)
        except Exception as problem:  # the times are still worth having
            print(f"    no profile: {type(problem).__name__}: {str(problem).strip()[:200]}", flush=True)
            return None
        return found if found.kernels else None


def show(rows: list[Row]) -> None:
    """All backends side by side: speed-up, and its share of the prediction; then what the launches were made of."""
    names = [b for b in BACKENDS if any(row.backend == b for row in rows)]
    print("\n| network | ratio | batch | MACs left | predicted |" + "".join(f" {b} ms | x | share |" for b in names))
    print("|---" * (5 + 3 * len(names)) + "|")
    for key in dict.fromkeys((row.network, row.cut, row.batch) for row in rows):
        mine = {row.backend: row for row in rows if (row.network, row.cut, row.batch) == key}
        some = next(iter(mine.values()))
        cells = [f" {r.ms:.3f} | {r.speedup:.2f} | {r.share:.0%} |" if (r := mine.get(b)) else " | | |" for b in names]
        print(f"| {some.network} | {some.cut} | {some.batch} | {some.macs:.2f} | {some.predicted:.2f} |" + "".join(cells))
    profiled = [(row, row.profile) for row in rows if row.profile]
    if profiled:
        print("\n| network | backend | batch | ratio | kernels | below the floor | ms | busy | products | layout | other | predicted | with floor | measured |")
        print("|---" * 14 + "|")
    for row, found in profiled:
        kinds = " | ".join(f"{found.by_kind[kind]:.3f}" for kind in (*KINDS, "other"))
        speed = f"{row.predicted:.2f} | {row.floored:.2f} | {row.speedup:.2f}"
        what = f"{row.network} | {row.backend} | {row.batch} | {row.cut}"
        print(f"| {what} | {found.kernels} | {found.short} | {row.ms:.3f} | {found.busy:.3f} | {kinds} | {speed} |")
    for row, found in profiled:
        if row.batch > 1 and (row.ratio, row.rounding) in ((0.0, ""), (0.3, "auto")):
            print(f"{row.network} {row.backend} batch {row.batch} ratio {row.cut}, the longest:")
            for name, count, ms in found.longest:
                print(f"    {ms:.3f} ms in {count:3} of {name[:150]}")
    print(flush=True)


def print_row(row: Row, clock: float) -> None:
    print(
        f"[{clock:4.0f} s] {row.network:14} {row.backend:15} batch {row.batch:3} ratio {row.cut:11} certificate {row.certificate:>5} error {row.error:.0e} "
        f"MACs {row.macs:.2f} predicted {row.predicted:.2f}x {row.ms:8.3f} ms {row.speedup:.2f}x share {row.share:.0%}",
        flush=True,
    )


def print_profile(row: Row) -> None:
    found = row.profile
    assert found is not None
    kinds = " ".join(f"{kind} {ms:.3f}" for kind, ms in found.by_kind.items())
    print(f"    ratio {row.cut:11} {found.kernels} kernels ({found.short} short) busy {found.busy:.3f}: {kinds}; with floor {row.floored:.2f}x", flush=True)


def widths_here(library: str, device: str) -> Widths:
    """What "auto" means for fp16 on this device: measured now, if it was not before."""
    from graphprune.backends.widths import measured, probe

    try:
        if device == "cpu":
            return Widths.measured([probe(library, torch.float32, "cpu", seconds=0)], "measured here")
        return Widths.measured([measured(library, torch.float16, "cuda")], f"measured here, {library}, float16")
    except Exception as problem:
        print(f"widths of {library} cannot be measured: {type(problem).__name__}: {str(problem).strip()[:300]}", flush=True)
        return RULE


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own, so that a fault on the GPU ends one case alone; the libraries are imported once for all."""
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        return pool.submit(call, *args).result()


def warm(variant: Variant, name: str, batch: int, backend: str, threads: int) -> None:
    """Compile a variant, so that what measures it finds that in Inductor's cache."""
    from torch._inductor import config

    torch.set_num_threads(1)
    config.compile_threads = threads
    Runner(backend, "cuda").open(variant, (NETWORKS | SMOKE)[name].inputs(batch).to("cuda"), None)
    torch.cuda.synchronize()


def parsed(case: str, backends: Sequence[str]) -> tuple[str, int, list[str]]:
    """NETWORK@BATCH or NETWORK@BATCH=BACKEND/BACKEND."""
    what, _, chosen = case.partition("=")
    name, _, batch = what.partition("@")
    return name, int(batch), chosen.split("/") if chosen else list(backends)


def wanted(name: str, backend: str) -> bool:
    """Layouts and algorithms are of convolutions."""
    return name in CONVOLUTIONAL or not any(it in backend for it in ("nhwc", "+search", "+bias"))


def _on_cpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="")
    parser.add_argument("--batches", default="")
    parser.add_argument("--cases", default="", help="NETWORK@BATCH,... in this order, in place of networks and batches; resnet50@64=compile/ort: by these backends")
    parser.add_argument("--backends", default="", help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--rounding", default="auto", help="auto, or a number; others after a comma, auto,64, are tried on convolutional networks")
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--json", default="", help="append a line per row")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--compilers", type=int, default=5, help="processes of torch.compile beside each other; what times its kernels wants one")
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU")
    options = parser.parse_args()
    start = time.monotonic()
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}  # a profiler that comes and goes breaks CUDA graphs
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    device = "cpu" if options.smoke else "cuda"
    names = options.networks.split(",") if options.networks else list(SMOKE if options.smoke else NETWORKS)
    batches = [int(it) for it in (options.batches or ("1,3" if options.smoke else "64,1")).split(",")]
    cases = options.cases.split(",") if options.cases else [f"{name}@{batch}" for name in names for batch in batches]
    backends = options.backends.split(",") if options.backends else [b for b in BACKENDS if "+" not in b and not (options.smoke and "nhwc" in b)]
    chosen = [parsed(case, backends) for case in cases]
    work = [(name, batch, backend) for name, batch, mine in chosen for backend in mine if wanted(name, backend)]
    title = "CPU" if options.smoke else torch.cuda.get_device_name()
    bench = Bench(device, next((v for k, v in PEAKS.items() if k in title), (2e12, 300e12)), 0.0 if options.smoke else floor_of_a_kernel(), start)
    print(f"{title}, fp16, torch {torch.__version__}; a kernel of a CUDA graph takes at least {1e3 * bench.floor:.2f} us", flush=True)
    libraries = {"onnxruntime" if backend.startswith("ort") else "torch" for _, _, backend in work}
    exported = {name for name, _, backend in work if backend.startswith("ort")}
    if "onnxruntime" in libraries:
        import onnxruntime

        print(f"onnxruntime {onnxruntime.__version__}; an empty graph takes {1e3 * empty_graph(device):.1f} us", flush=True)
    roundings = options.rounding.split(",")
    here: dict[str, Widths] = {}
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(64) as waits,
        ProcessPoolExecutor(options.workers, context, _on_cpu) as pool, ProcessPoolExecutor(options.compilers, context) as compilers,
    ):  # fmt: skip
        cutting: dict[Any, Future[Variant]] = {}
        narrowing: dict[Any, Future[tuple[Path, dict[str, int]]]] = {}
        warming: dict[Any, Future[None]] = {}
        threads = max(3, options.workers // options.compilers)

        def variant(name: str, cut: Cut) -> Future[Variant]:
            widths = int(cut.rounding or 1) if cut.rounding != "auto" else here[cut.library]
            key = (name, cut.ratio, widths if isinstance(widths, int) else replace(widths, source=""))
            if key not in cutting:
                cutting[key] = pool.submit(prepare, name, cut.ratio, widths, Path(folder), 1 if options.smoke else 2, name in exported)
            return cutting[key]

        def file(name: str, cut: Cut, batch: int) -> Future[tuple[Path, dict[str, int]]]:
            before, key = variant(name, cut), (name, cut, batch)
            if key not in narrowing:
                shape = tuple((NETWORKS | SMOKE)[name].inputs(batch).shape)
                narrowing[key] = waits.submit(lambda: pool.submit(narrowed, before.result().folder / "model.onnx", shape).result())
            return narrowing[key]

        def compiled(name: str, cut: Cut, batch: int, backend: str) -> None:
            before, key = variant(name, cut), (name, variant(name, cut), batch, backend)
            if key not in warming:
                warming[key] = waits.submit(lambda: compilers.submit(warm, before.result(), name, batch, backend, threads).result())

        def cuts(name: str, backend: str) -> list[Cut]:
            library = "onnxruntime" if backend.startswith("ort") else "torch"
            return [Cut(0.0), *(Cut(ratio, it, library) for it in (roundings if name in CONVOLUTIONAL else roundings[:1]) for ratio in RATIOS if ratio)]

        def ready(backend: str) -> bool:
            return backend.startswith("ort") and backend != "ort_auto"  # which makes its own file

        for name in dict.fromkeys(name for name, _, _ in work):  # cut while widths are measured
            for cut in (Cut(0.0), *(Cut(ratio, it) for it in roundings[1:] for ratio in RATIOS if ratio and name in CONVOLUTIONAL)):
                variant(name, cut)
        for library in sorted(libraries) if "auto" in roundings else ():
            here[library] = widths_here(library, device)
            print(f"[{time.monotonic() - start:4.0f} s] {here[library]}", flush=True)
        for name, batch, backend in work:
            for cut in cuts(name, backend):
                variant(name, cut)
                if ready(backend):
                    file(name, cut, batch)
                if backend.startswith("compile") and device == "cuda":
                    compiled(name, cut, batch, backend)
        pending = wait((*cutting.values(), *narrowing.values(), *warming.values()), timeout=start + options.seconds / 2 - time.monotonic())
        print(f"[{time.monotonic() - start:4.0f} s] prepared and compiled: {len(pending.done)}, not yet: {len(pending.not_done)}", flush=True)
        for key, future in warming.items():
            if future.done() and (problem := future.exception()):  # what measures it compiles it once more
                print(f"compiling {key[0]} beforehand: {type(problem).__name__}: {str(problem).strip()[:300]}", flush=True)
        told: set[Path] = set()
        for name, batch, backend in work:
            if time.monotonic() - start > options.seconds:
                print(f"out of time for {name} {backend} batch {batch}", flush=True)
                continue
            try:
                variants = {cut: variant(name, cut).result() for cut in cuts(name, backend)}
                files = {cut: file(name, cut, batch).result() for cut in variants} if ready(backend) else {}
                for cut, made in variants.items():
                    if made.folder not in told:
                        print(f"    {name} {cut} ({cut.library}): {made.kept or 'whole'}; {made.spent}", flush=True)
                        told.add(made.folder)
                found_rows = apart(bench.measure, name, variants, files, backend, batch)
                rows += found_rows
                for row in found_rows:
                    if options.json:
                        with open(options.json, "a") as log:
                            log.write(json.dumps(asdict(row) | {"share": row.share}) + "\n")
            except Exception as problem:  # the other rows are still worth having
                print(f"{name} {backend} batch {batch}: {type(problem).__name__}: {str(problem).strip()[:300]}", flush=True)
        show(rows)
        if bench.floor:
            print(f"a kernel of a CUDA graph takes {1e3 * floor_of_a_kernel():.2f} us after the profiles, {1e3 * bench.floor:.2f} us before them", flush=True)
        for future in (*cutting.values(), *narrowing.values(), *warming.values()):
            future.cancel()
        for processes in (pool, compilers):
            processes.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
