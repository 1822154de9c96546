"""Structured pruning on a GPU: is what was cut really faster, and how much of the roofline's speed-up arrives?

    python -m benchmarks.gpu_structured [--backends ort,ort_nhwc,compile,eager] [--networks resnet50,bert_base] [--seconds 500] [--json FILE]
    python -m benchmarks.gpu_structured --smoke     # tiny networks on the CPU: does all of it run?

For each network (random weights, fp16) dense and at ratio 0.3 and 0.5: the certificate of the cut in float64, the module and the ONNX file
that `result.save` writes (dense by the same path); then, backend by backend, the error against the float64 module, and only then the time:
dense and pruned in turns, median, launched by a CUDA graph. ONNX Runtime: fused, sizes fixed, I/O binding. It waits for each replay, so
its times hold that of an empty graph, which is printed first.
Prediction: sum over nodes of max(bytes / bandwidth, FLOPs / peak), dense over pruned. Share: measured speed-up over predicted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

with contextlib.suppress(ImportError):  # the CPU build of torchvision needs two operators declared before its import
    import tests.torchvision_ops  # noqa: F401

RATIOS = (0.0, 0.3, 0.5)
PEAKS = {"H200": (4.8e12, 790e12), "H100": (3.35e12, 790e12)}  # bytes/s, dense fp16 FLOP/s
WRONG = 5e-2  # a backend that is further from the float64 module is not timed
BACKENDS = ("ort", "ort_nhwc", "compile", "eager")


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


@dataclass(frozen=True)
class Variant:
    """A network at one ratio, ready to be run."""

    folder: Path
    certificate: str
    macs: float  # left
    work: tuple[Work, ...]  # of the nodes that multiply; elementwise nodes are fused into their neighbours

    def module(self) -> nn.Module:
        return torch.load(self.folder / "module.pt", weights_only=False)  # written by `prepare` just now

    def seconds(self, batch: int, bandwidth: float, peak: float) -> float:
        return sum(work.seconds(batch, bandwidth, peak) for work in self.work)


def prepare(name: str, ratio: float, folder: Path, threads: int) -> Variant:
    """Cut, certify, save and export; runs in a process of its own, on the CPU."""
    import graphprune as gp
    from graphprune.costs import macs

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = (NETWORKS | SMOKE)[name]
    module = network.make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.abs().max() < 1e-3:  # zero-initialised heads and layer scales hide every cut from its certificate
                nn.init.normal_(parameter, std=0.02 if parameter.dim() == 1 else 0.2)
    few = network.inputs(2, 16 if network.ids else None)
    result = gp.compile(module, few, pruning_ratio=ratio, progress=False)
    if ratio:
        assert result.certificate is not None and result.certificate.passed, f"{name} at {ratio}: {result.certificate}"
    folder = folder / f"{name}_{ratio}"
    folder.mkdir(parents=True)
    result.save(folder / "model.onnx")
    torch.save(result.module, folder / "module.pt")
    program = gp.capture(result.module, network.inputs(2))
    work = []
    for node in program.nodes:
        if flops := 2 * macs(node, lambda v: v.shape):
            values = [v for v in dict.fromkeys((*node.inputs, *node.outputs)) if v.shape is not None]
            weights = sum(v.tensor.numel() for v in values if v.tensor is not None)
            work.append(Work(weights, sum(torch.Size(v.shape).numel() for v in values if v.tensor is None) / 2, flops / 2))
    kept = (result.report.after.macs or 0) / (result.report.before.macs or 1)
    return Variant(folder, f"{result.certificate.error:.0e}" if ratio else "-", kept, tuple(work))


class Runner:
    """Opens a variant on a backend: the outputs for its data, and a call that launches it once more on the same data."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    def open(self, variant: Variant, data: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
        if self.backend.startswith("ort"):
            return self._onnxruntime(variant, data)
        data = data.half() if data.is_floating_point() else data
        module = variant.module().eval().to(self.device).half()
        call = module
        if self.backend == "compile":
            torch._dynamo.reset()
            call = torch.compile(module, backend="inductor" if self.device == "cuda" else "aot_eager")
        with torch.no_grad():
            found = first(call(data))
        if self.device == "cpu":
            return found, lambda: call(data)
        from graphprune.backends.timing import capture

        graph = capture([lambda: call(data)])
        return found, graph.replay

    def _onnxruntime(self, variant: Variant, data: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
        import onnx_ir as ir

        from graphprune.backends.onnxruntime import OnnxRuntimeModel

        options: dict[str, Any] = {"device": self.device, "precision": "float16", "fuse": True, "keep_io_types": False, "check": False}
        if self.device == "cuda":
            chosen = {"cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": str(int(self.backend == "ort_nhwc"))}
            options |= {"cuda_graph": True, "provider_options": chosen}
        shape = ir.load(variant.folder / "model.onnx").graph.inputs[0].shape
        sizes = {str(axis.value): size for axis, size in zip(shape, data.shape) if isinstance(axis, ir.SymbolicDim)}
        model = OnnxRuntimeModel(variant.folder / "model.onnx", sizes=sizes, **options)
        print(f"    {self.backend} fused: {', '.join(f'{n} {op}' for op, n in model.fused.items()) or 'nothing'}", flush=True)
        if self.device == "cpu":
            return first(model(data)), lambda: model(data)
        captured = model.capture(data)
        model.launch(captured)
        return captured.outputs[0].clone(), lambda: model.launch(captured)


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
    certificate: str
    error: float  # of the backend against the float64 module
    macs: float  # left
    predicted: float  # speed-up
    ms: float
    speedup: float

    @property
    def share(self) -> float:
        return self.speedup / self.predicted


def measure(name: str, variants: Mapping[float, Variant], backend: str, batch: int, device: str, peaks: tuple[float, float]) -> list[Row]:
    """Errors first; a variant that is wrong is an error, not a time."""
    data = (NETWORKS | SMOKE)[name].inputs(batch).to(device)
    launches, errors, runner = {}, {}, Runner(backend, device)
    for ratio, variant in variants.items():
        reference = expected(variant, data, device)
        found, launches[ratio] = runner.open(variant, data)
        errors[ratio] = float((found.double() - reference).abs().max() / reference.abs().max())
        del reference, found
        if not errors[ratio] <= WRONG:
            raise ArithmeticError(f"ratio {ratio}: error {errors[ratio]:.1e} against the float64 module")
    times = in_turns(launches, device)
    bounds = {ratio: variant.seconds(batch, *peaks) for ratio, variant in variants.items()}
    return [
        Row(name, backend, batch, ratio, v.certificate, errors[ratio], v.macs, bounds[0.0] / bounds[ratio], times[ratio], times[0.0] / times[ratio])
        for ratio, v in variants.items()
    ]


def show(rows: list[Row]) -> None:
    """All backends side by side: speed-up, and its share of the prediction."""
    names = [b for b in BACKENDS if any(row.backend == b for row in rows)]
    print("\n| network | ratio | batch | MACs left | predicted |" + "".join(f" {b} ms | x | share |" for b in names))
    print("|---" * (5 + 3 * len(names)) + "|")
    for key in dict.fromkeys((row.network, row.ratio, row.batch) for row in rows):
        mine = {row.backend: row for row in rows if (row.network, row.ratio, row.batch) == key}
        some = next(iter(mine.values()))
        cells = [f" {r.ms:.3f} | {r.speedup:.2f} | {r.share:.0%} |" if (r := mine.get(b)) else " | | |" for b in names]
        print(f"| {some.network} | {some.ratio} | {some.batch} | {some.macs:.2f} | {some.predicted:.2f} |" + "".join(cells))
    print(flush=True)


def _on_cpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="")
    parser.add_argument("--batches", default="")
    parser.add_argument("--backends", default="")
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--json", default="", help="append a line per row")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU")
    options = parser.parse_args()
    start = time.monotonic()
    device = "cpu" if options.smoke else "cuda"
    names = options.networks.split(",") if options.networks else list(SMOKE if options.smoke else NETWORKS)
    batches = [int(it) for it in (options.batches or ("1,3" if options.smoke else "64,1")).split(",")]
    backends = options.backends.split(",") if options.backends else list(BACKENDS)
    title = "CPU" if options.smoke else torch.cuda.get_device_name()
    peaks = next((v for k, v in PEAKS.items() if k in title), (2e12, 300e12))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.workers, get_context("spawn"), _on_cpu) as pool:
        waiting: dict[tuple[str, float], Future[Variant]] = {
            (name, ratio): pool.submit(prepare, name, ratio, Path(folder), 2 if not options.smoke else 1) for name in names for ratio in RATIOS
        }
        print(f"{title}, fp16, torch {torch.__version__}", flush=True)
        if any(b.startswith("ort") for b in backends):
            import onnxruntime

            print(f"onnxruntime {onnxruntime.__version__}; an empty graph takes {1e3 * empty_graph(device):.1f} us", flush=True)
        for backend in backends:
            for name in names:
                if backend == "ort_nhwc" and (options.smoke or name not in ("resnet50", "convnext_tiny")):
                    continue  # a layout of convolutions
                for batch in batches:
                    if time.monotonic() - start > options.seconds:
                        print("out of time", flush=True)
                        break
                    try:
                        variants = {ratio: waiting[name, ratio].result() for ratio in RATIOS}
                        found = measure(name, variants, backend, batch, device, peaks)
                    except Exception as problem:  # the other rows are still worth having
                        print(f"{name} {backend} batch {batch}: {type(problem).__name__}: {str(problem).strip()[:300]}", flush=True)
                        continue
                    rows += found
                    for row in found:
                        print(
                            f"[{time.monotonic() - start:4.0f} s] {row.network:14} {row.backend:8} batch {row.batch:3} ratio {row.ratio:3} "
                            f"certificate {row.certificate:>5} error {row.error:.0e} MACs {row.macs:.2f} predicted {row.predicted:.2f}x "
                            f"{row.ms:8.3f} ms {row.speedup:.2f}x share {row.share:.0%}",
                            flush=True,
                        )
                        if options.json:
                            with open(options.json, "a") as file:
                                file.write(json.dumps(asdict(row) | {"share": row.share}) + "\n")
                    if device == "cuda":
                        torch.cuda.empty_cache()
        show(rows)
        for future in waiting.values():
            future.cancel()


if __name__ == "__main__":
    main()
