"""Structured pruning on a GPU: is what was cut really faster, and how much of the roofline's speed-up arrives?

    python -m benchmarks.gpu_structured [--networks resnet50,bert] [--batches 1,64] [--seconds 500] [--json FILE]

For each network (random weights, fp16) dense and at ratio 0.3 and 0.5: first the certificate, in float64 on the GPU, of the module that is
then timed; then the median time of a call launched by a CUDA graph, eager and through torch.compile. Prediction: sum over nodes of
max(bytes / bandwidth, FLOPs / peak), dense over pruned.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable

import torch
from torch import nn

RATIOS = (0.3, 0.5)
PEAKS = {"H200": (4.8e12, 790e12), "H100": (3.35e12, 790e12)}  # bytes/s, dense fp16 FLOP/s


def vision(name: str) -> Callable[[], tuple[nn.Module, Callable[[int], tuple]]]:
    def make() -> tuple[nn.Module, Callable[[int], tuple]]:
        import torchvision

        return torchvision.models.get_model(name), lambda batch: (torch.randn(batch, 3, 224, 224, device="cuda"),)

    return make


def encoder() -> tuple[nn.Module, Callable[[int], tuple]]:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=768, num_hidden_layers=12), add_pooling_layer=False)
    return model, lambda batch: (torch.randint(0, 30000, (batch, 128), device="cuda"),)


def decoder() -> tuple[nn.Module, Callable[[int], tuple]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        use_cache=False,
    )
    return LlamaForCausalLM(config), lambda batch: (torch.randint(0, 32000, (batch, 128), device="cuda"),)


NETWORKS = {
    "resnet50": vision("resnet50"),
    "vit_b_16": vision("vit_b_16"),
    "convnext_tiny": vision("convnext_tiny"),
    "bert_base": encoder,
    "llama_8x2048": decoder,
}


def roofline(module: nn.Module, inputs: tuple) -> float:
    """Seconds that a call takes at least: every node at the bandwidth or the peak of the device, in fp16."""
    from graphprune.api import capture
    from graphprune.costs import macs

    bandwidth, peak = next((v for k, v in PEAKS.items() if k in torch.cuda.get_device_name()), (2e12, 300e12))
    program = capture(module, inputs)
    total = 0.0
    for node in program.nodes:
        moved = sum(
            v.tensor.numel() if v.tensor is not None else _entries(v.shape)
            for v in dict.fromkeys((*node.inputs, *node.outputs))
            if v.shape is not None
        )
        flops = 2 * macs(node, lambda v: v.shape)
        if flops:  # elementwise nodes are fused into their neighbours
            total += max(2 * moved / bandwidth, flops / peak)
    return total


def _entries(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def milliseconds(function: Callable, inputs: tuple) -> float:
    from graphprune.backends.timing import capture, time_graph

    with torch.no_grad():
        for _ in range(3):
            function(*inputs)
        torch.cuda.synchronize()
        return time_graph(capture([lambda: function(*inputs)]), 1, 50).median / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--json", default="")
    parser.add_argument("--no-compile", action="store_true", help="eager only: torch.compile takes most of the time")
    options = parser.parse_args()
    import graphprune as gp

    deadline = time.monotonic() + options.seconds
    print(f"{torch.cuda.get_device_name()}, fp16, torch {torch.__version__}")
    print(
        f"{'network':14} {'ratio':>5} {'batch':>5} {'certificate':>12} {'MACs':>6} {'predicted':>9} {'eager ms':>9} {'x':>5} {'compiled ms':>11} {'x':>5}"
    )
    for name in options.networks.split(","):
        torch.manual_seed(0)
        module, inputs = NETWORKS[name]()
        module = module.eval().cuda()
        for parameter in module.parameters():
            if not parameter.any():  # a zero-initialised head hides every cut from its certificate
                nn.init.normal_(parameter, std=0.02)
        variants: dict[float, tuple[nn.Module, str, float]] = {0.0: (module, "-", 1.0)}
        for ratio in RATIOS:
            result = gp.compile(module, inputs(2), pruning_ratio=ratio, progress=False)
            assert result.certificate is not None and result.certificate.passed, f"{name}: {result.certificate}"
            kept = (result.report.after.macs or 0) / (result.report.before.macs or 1)
            variants[ratio] = result.module, f"{result.certificate.error:.0e}", kept
        times: dict[tuple[float, int], tuple[float, float]] = {}
        bounds: dict[tuple[float, int], float] = {}
        for ratio, (variant, error, kept) in variants.items():
            half = copy.deepcopy(variant).half()
            for batch in map(int, options.batches.split(",")):
                if time.monotonic() > deadline:
                    print("out of time")
                    return
                data = tuple(x.half() if x.is_floating_point() else x for x in inputs(batch))
                bounds[ratio, batch] = roofline(half, data) if batch > 1 else roofline_of_one(half, data)
                eager = milliseconds(half, data)
                torch._dynamo.reset()
                compiled = float("nan") if options.no_compile else milliseconds(torch.compile(half), data)
                times[ratio, batch] = eager, compiled
                dense = times[0.0, batch]
                predicted = bounds[0.0, batch] / bounds[ratio, batch]
                row = {
                    "network": name,
                    "ratio": ratio,
                    "batch": batch,
                    "error": error,
                    "macs": kept,
                    "predicted": predicted,
                    "eager_ms": eager,
                    "compiled_ms": compiled,
                }
                print(
                    f"{name:14} {ratio:5} {batch:5} {error:>12} {kept:6.2f} {predicted:9.2f} {eager:9.3f} {dense[0] / eager:5.2f} {compiled:11.3f} {dense[1] / compiled:5.2f}",
                    flush=True,
                )
                if options.json:
                    with open(options.json, "a") as file:
                        file.write(json.dumps(row) + "\n")


def roofline_of_one(module: nn.Module, data: tuple) -> float:
    """At batch 1, from two captures: export specialises a batch of one, so the weights' part and the activations' part are told apart by
    batches 2 and 4.
    """
    two, four = (tuple(torch.cat([x] * n) for x in data) for n in (2, 4))
    a, b = roofline(module, two), roofline(module, four)
    return max(a - (b - a) / 2, a / 2)


if __name__ == "__main__":
    main()
