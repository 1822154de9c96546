"""Latency of the torch.compile backend: dense eager, dense inductor, and `backend="graphprune"` with inductor, in turns on the same inputs.

    python -m benchmarks.compile_backend [--ratio 0.5] [--mode default|reduce-overhead] [--repeats 30]

Prints a row per network: medians in ms (10 to 90 % in brackets), parameters before and after, and the largest relative difference to the
same plan applied by surgery on the exported program. On CUDA networks are bfloat16, on the CPU float32 on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tests.torchvision_ops  # noqa: F401  transformers imports torchvision where it is installed
from graphprune.backends.torch_compile import GraphPruneBackend
from graphprune.capture.torch_export import capture_torch
from graphprune.execute.interpreter import run
from graphprune.measure import interleaved
from graphprune.surgery import Cut, apply_cut


def _resnet(cuda: bool) -> tuple[nn.Module, Tensor]:
    import torchvision

    model = torchvision.models.resnet18()
    for module in model.modules():  # statistics of a real network: an untrained one multiplies its own scale
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model, torch.randn(64 if cuda else 2, 3, 224 if cuda else 64, 224 if cuda else 64)


def _llama(cuda: bool) -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = (4096, 11008, 4, 32, 8, 32000) if cuda else (128, 344, 2, 8, 4, 256)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    model = LlamaForCausalLM(LlamaConfig(**dict(zip(names, size)), use_cache=False))
    return model, torch.randint(0, size[-1], (8 if cuda else 2, 512 if cuda else 32))


MODELS: dict[str, Callable[[bool], tuple[nn.Module, Tensor]]] = {"resnet18": _resnet, "llama": _llama}


def _output(found: Any) -> Tensor:
    return getattr(found, "logits", found)


def measure(name: str, device: str, ratio: float, mode: str, repeats: int) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = MODELS[name](device == "cuda")
    model, x = model.eval().to(device), x.to(device)
    if device == "cuda":
        model = model.bfloat16()
        x = x.bfloat16() if x.is_floating_point() else x
    backend = GraphPruneBackend(pruning_ratio=ratio, mode=mode)
    calls = {
        "eager": model,
        "inductor": torch.compile(model, mode=mode),
        "graphprune": torch.compile(model, backend=backend),
    }
    with torch.no_grad():
        found = _output(calls["graphprune"](x)).clone()
        program = capture_torch(model, (x,))
        expected = run(apply_cut(program, Cut(program.analysis, backend.report.plan.resolve(program))), (x,))[0]
        stats = interleaved({key: lambda call=call: call(x) for key, call in calls.items()}, warmup=5, repeats=repeats, device=device)
    (graph,) = backend.report.graphs
    return {
        "model": name,
        "params": [graph.params_before, graph.params_after],
        "difference": float((found.float() - expected.float()).abs().max() / expected.float().abs().max()),
        "certificate": graph.certificate,
        "compile_seconds": round(graph.seconds, 1),
        **{key: str(value) for key, value in stats.items()},
        "speedup": round(stats["inductor"].median_ms / stats["graphprune"].median_ms, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--mode", default="default")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    for name in options.models:
        print(json.dumps(measure(name, device, options.ratio, options.mode, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
