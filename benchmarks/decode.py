"""Decoding with sparse weights, end to end: tokens per second of a Llama-shaped bf16 model, dense against blocks, 2:4, unstructured zeros and
fewer units.

    python -m benchmarks.decode [--layers 8] [--batch 1] [--prompt 2048] [--only block:64x64=0.8,2:4=0.5,structured=0.3] [--json FILE]
    python -m benchmarks.decode --layers 32 --calls decode      prefill is checked but not timed: half of the graphs to compile
    python -m benchmarks.decode --smoke      tiny, on any machine: kernels in Triton's interpreter, correctness only means something

Layers have the sizes of Llama-3-8B, random weights, masks by magnitude; the vocabulary is smaller, so that its head does not hide the
layers. The gate decides by measurement, layer by layer, and its answers are printed. Nothing is timed before every sparse product agreed
with float64, and the logits of prefill and of a decoding step with those of the dense masked model. A decoding step, and prefill of the
whole prompt, are each compiled into one graph (`fullgraph=True`), captured in a CUDA graph with a static cache and replayed, the dense
model's and the sparse one's in turns. Memory is that of all weights on the device: once beside the dense weights, once in their place
(`keep_dense=False`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be known before Triton is imported

import torch
from torch import Tensor, nn

import tests.torchvision_ops  # noqa: F401  transformers imports torchvision too, where it is installed

PATTERNS = "block:64x64=0.8,2:4=0.5,unstructured=0.5,unstructured=0.6,unstructured=0.7,structured=0.3"
SMOKE_PATTERNS = "block:16x16=0.5,2:4=0.5,unstructured=0.5,structured=0.5"
CALLS = ("prefill", "decode")
SPARE = 16  # places in the cache for warming up
LOGITS = {torch.bfloat16: 5e-2, torch.float32: 1e-4}  # relative error of logits: roundings of all layers add up


@dataclass(frozen=True)
class Sizes:
    """Of the model and of the run."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000
    layers: int = 8
    batch: int = 1
    prompt: int = 2048
    steps: int = 64


SMOKE = Sizes(hidden=64, inner=96, heads=4, kv_heads=2, vocab=61, layers=2, batch=1, prompt=5, steps=2)


def make(sizes: Sizes, device: str, dtype: torch.dtype) -> nn.Module:
    """The dense model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, vocab_size=sizes.vocab, max_position_embeddings=sizes.prompt + sizes.steps + SPARE,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


class Decoder:
    """A model with a static cache: prefill, then steps of one token for each sequence, all in the same memory."""

    def __init__(self, model: nn.Module, sizes: Sizes) -> None:
        from transformers import StaticCache

        self.model, self.sizes = model, sizes
        self.cache = StaticCache(config=model.config, max_cache_len=sizes.prompt + sizes.steps + SPARE)
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(0, sizes.vocab, (sizes.batch, sizes.prompt), generator=generator).to(device)
        self.ids = self.prompt[:, -1:].clone()
        self.position = torch.full((sizes.batch, 1), sizes.prompt, device=device)

    def rewind(self) -> None:
        """To the end of the prompt: every step, also a replayed one, takes a place in the cache."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.sizes.prompt)

    def prefill(self) -> Tensor:
        """Logits of the last position, from an empty cache."""
        self.cache.reset()
        return self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits

    def step(self) -> Tensor:
        return self.model(self.ids, position_ids=self.position, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(module: nn.Module, masked: nn.Module, sizes: Sizes, tokens: tuple[int, ...]) -> dict[str, float]:
    """Errors of the sparse module; an assertion fails where one is too large."""
    from graphprune.backends.kernels.base import TOLERANCE
    from graphprune.backends.triton import SparseLinear

    worst = 0.0
    with torch.no_grad():
        for name, layer in module.named_modules():
            if not isinstance(layer, SparseLinear):
                continue
            for count in tokens:
                x = torch.randn(count, layer.in_features, device=layer.weight.device).to(layer.weight.dtype)
                error = relative(layer(x)[:64], torch.nn.functional.linear(x[:64].double(), layer.weight.double()))
                assert error < 2 * TOLERANCE[x.dtype], f"{name} is off by {error:.1e} at {count} tokens: {layer.product}"
                worst = max(worst, error)
        sparse, dense = Decoder(module, sizes), Decoder(masked, sizes)
        errors = {"product": worst, "prefill": relative(sparse.prefill(), dense.prefill()), "step": relative(sparse.step(), dense.step())}
    for what in ("prefill", "step"):
        assert errors[what] < LOGITS[next(module.parameters()).dtype], f"logits of a {what} are off by {errors[what]:.1e}"
    return errors


def graph(call: Callable[[], Tensor], on_gpu: bool) -> Callable[[], Any]:
    """A call compiled into one graph; on a GPU a replay of a CUDA graph."""
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if on_gpu else "aot_eager", dynamic=False)

    def step() -> Tensor:
        with torch.no_grad():
            return compiled()

    step()
    if not on_gpu:
        return step
    from graphprune.backends.timing import capture

    return capture([step]).replay


def device_bytes(module: nn.Module) -> int:
    """Memory of all parameters and buffers that are not on the host, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    parts = [getattr(it, name) for it in tensors if hasattr(it, "__tensor_flatten__") for name in it.__tensor_flatten__()[0]]
    plain = [it for it in (*tensors, *parts) if not hasattr(it, "__tensor_flatten__")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu").type
    return sum({it.data_ptr(): it.untyped_storage().nbytes() for it in plain if it.device.type == device}.values())


def seconds(call: Callable[[], Any], decoder: Decoder, repeats: int) -> float:
    """Of one call."""
    decoder.rewind()
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


class Running:
    """A model ready to be timed: prefill and a step of decoding, each one graph, or one of the two."""

    def __init__(self, model: nn.Module, sizes: Sizes, calls: Sequence[str]) -> None:
        self.decoder = Decoder(model, sizes)
        torch.compiler.reset()  # graphs of earlier models count against a limit; what was captured stays
        both = {"prefill": self.decoder.prefill, "decode": self.decoder.step}
        self.calls = {what: graph(both[what], self.decoder.ids.is_cuda) for what in calls}

    def seconds(self, what: str) -> float:
        return seconds(self.calls[what], self.decoder, 1 if what == "prefill" else self.decoder.sizes.steps)


def compared(dense: Running, pruned: Running) -> dict[str, tuple[float, float]]:
    """Median seconds of (dense, pruned), in turns."""
    turns = range(7 if dense.decoder.ids.is_cuda else 1)
    rounds = {what: [(dense.seconds(what), pruned.seconds(what)) for _ in turns] for what in dense.calls}
    return {what: (statistics.median(a for a, _ in times), statistics.median(b for _, b in times)) for what, times in rounds.items()}


def run(patterns: str, sizes: Sizes, calls: Sequence[str], smoke: bool) -> Iterator[dict[str, Any]]:
    import graphprune as gp
    from graphprune.backends.base import lower
    from graphprune.report import KernelChoice, tables

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dense = make(sizes, device, dtype)
    tokens = tuple(sorted({sizes.batch, sizes.batch * sizes.prompt}))
    ids = torch.ones(2, 4, dtype=torch.long, device=device)
    running = Running(dense, sizes, calls)
    for item in patterns.split(","):
        pattern, _, sparsity = item.partition("=")
        structured = pattern == "structured"
        options = {"pruning_ratio": float(sparsity)} if structured else {"sparsity": float(sparsity), "pattern": pattern}
        print(f"\n== {pattern}, {float(sparsity):.0%}, {sizes.layers} layers, batch {sizes.batch}, {dtype} on {device}")
        result = gp.compile(dense, {"input_ids": ids, "use_cache": False}, verify=structured, progress=False, **options)
        row = {"pattern": pattern, "sparsity": float(sparsity), "sizes": vars(sizes), "device": device}
        row["memory"] = {"dense": device_bytes(dense)}
        if structured:
            assert result.certificate is not None and result.certificate.passed, str(result.certificate)
            module = result.module
            row["errors"] = {"certificate": result.certificate.error}
            row["memory"]["pruned"] = device_bytes(module)
        else:
            module = lower(result, "triton", tokens=tokens, force=smoke)
            print(tables.plain(tables.kernels(KernelChoice.of(module.sparse_layers))))  # type: ignore[arg-type]
            row["errors"] = check(module, result.module, sizes, tokens)
            lean = lower(result, "triton", tokens=tokens, force=smoke, keep_dense=False)
            with torch.no_grad():
                error = relative(Decoder(lean, sizes).prefill(), Decoder(module, sizes).prefill())
            assert error < LOGITS[dtype], f"without the dense weights prefill is off by {error:.1e}"
            row["memory"] |= {"beside the dense weights": device_bytes(module), "in their place": device_bytes(lean)}
            del lean
        print("correct: " + ", ".join(f"{what} off by {error:.1e}" for what, error in row["errors"].items()))
        print("weights on the device: " + ", ".join(f"{what} {size / 2**30:.2f} GiB" for what, size in row["memory"].items()))
        times = compared(running, Running(module, sizes, calls))
        for what, (a, b) in times.items():
            each = sizes.batch * (sizes.prompt if what == "prefill" else 1)
            row[what] = {"dense_tokens_per_s": each / a, "pruned_tokens_per_s": each / b, "speedup": a / b}
            print(f"{what}: dense {each / a:,.1f} tokens/s, pruned {each / b:,.1f} tokens/s, {a / b:.2f}x", flush=True)
        yield row
        del result, module
    if smoke:
        print("\nsmoke test: the numbers of an interpreter say nothing about speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, kernels forced, any machine")
    parser.add_argument("--only", help=f"patterns and sparsities; default {PATTERNS}")
    for name in ("layers", "batch", "prompt", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--calls", default=",".join(CALLS), help="what is timed; default %(default)s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; --smoke runs its code on tiny sizes anywhere")
    given = {name: getattr(options, name) for name in ("layers", "batch", "prompt", "steps") if getattr(options, name) is not None}
    sizes = Sizes(**{**vars(SMOKE if options.smoke else Sizes()), **given})
    torch.set_num_threads(1 if options.smoke else torch.get_num_threads())
    calls = options.calls.split(",")
    if not set(calls) <= set(CALLS):
        parser.error(f"--calls takes {' and '.join(CALLS)}, found {options.calls}")
    for row in run(options.only or (SMOKE_PATTERNS if options.smoke else PATTERNS), sizes, calls, options.smoke):
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
