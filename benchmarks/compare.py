"""Torch-Pruning and onnxsim beside us: what is left, what the tool costs, and how fast ONNX Runtime runs the result.

    python -m benchmarks.compare [network ...]          torchvision networks, random weights, 224 x 224, batch 1
    python -m benchmarks.compare --files [id ...]       real ONNX files (benchmarks.onnx_files): ours and onnxsim

Torch-Pruning and onnxsim are asked for half of every group, their usual call. Ours is cut twice, to the parameters that each of them left, so
that latencies compare at equal size; a third time to its own half. Every tool runs in a process of its own, which gives its seconds and its
peak memory (reading the network and writing the file included); then all files run in turns in one process, one thread, median. `sibling`
is a smaller network of the same family, as it comes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "regnet_y_400mf", "convnext_tiny", "vit_b_16")
SIBLINGS: dict[str, tuple[str, dict[str, Any]]] = {"resnet50": ("resnet18", {}), "mobilenet_v2": ("mobilenet_v2", {"width_mult": 0.5})}
CUTS_THE_RESIDUAL = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16")
FILES = ("ppocr4-rec", "ppocr4-det", "ppocr-cls", "centerface", "magika", "vgg16-mri", "basic-pitch", "dnsmos", "romanizer-enc")
RATIO = 0.5
SECONDS = 4.0  # of measurement, all files of a network together


def network(name: str, **options: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    import tests.torchvision_ops  # noqa: F401, I001  # before torchvision
    from torchvision import models

    torch.manual_seed(0)
    return models.get_model(name, weights=None, **options).eval(), torch.randn(1, 3, 224, 224)


def export(module: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    torch.onnx.export(module, (x,), str(path), dynamo=True, optimize=True, verbose=False, external_data=False)


# ---- the tools: each reads a network, or an ONNX file, and writes an ONNX file


def dense(source: str, out: Path, asked: str) -> None:
    export(*network(source), out)


def sibling(source: str, out: Path, asked: str) -> None:
    name, options = SIBLINGS[source]
    export(*network(name, **options), out)


def ours(source: str, out: Path, asked: str) -> None:
    """asked: a fraction of units to remove, or "params=N" to keep."""
    import graphprune as gp
    from graphprune.units import DEFAULT_UNITS

    kept = asked.removeprefix("params=")
    arguments: dict[str, Any] = {"pruning_ratio": float(asked)} if kept == asked else {"budget": {"params": int(kept)}}
    if Path(source).suffix == ".onnx":
        gp.compile(source, **arguments).save(out)
        return
    units = [*DEFAULT_UNITS, *["hidden"] * (source in CUTS_THE_RESIDUAL)]
    module, x = network(source)
    x = torch.cat([x, x])  # a batch of one would be taken for a size that is always one
    result = gp.compile(module, x, units=units, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), **arguments)
    export(result.module, x[:1], out)


def torch_pruning(source: str, out: Path, asked: str) -> None:
    import torch_pruning as tp

    module, x = network(source)
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    heads = {m.self_attention: m.self_attention.num_heads for m in module.modules() if hasattr(m, "self_attention")}
    pruner = tp.pruner.BasePruner(
        module, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=float(asked), global_pruning=False,
        ignored_layers=last, round_to=8, num_heads=heads, prune_num_heads=True,
    )  # fmt: skip
    pruner.step()
    export(module, x, out)


def onnxsim(source: str, out: Path, asked: str) -> None:
    import onnx
    from onnxsim import apply_structured_pruning, simplify

    if Path(source).suffix != ".onnx":
        export(*network(source), out)
        source = str(out)
    model, _ = simplify(source)
    onnx.save(apply_structured_pruning(model, sparsity=float(asked)), out)


TOOLS: dict[str, Callable[[str, Path, str], None]] = {
    "dense": dense, "sibling": sibling, "ours": ours, "Torch-Pruning": torch_pruning, "onnxsim": onnxsim,
}  # fmt: skip


def tool(name: str, source: str, out: Path, asked: str) -> dict[str, Any]:
    """Run a tool in a process of its own: {"seconds", "peak_mb"}, or {"why"}."""
    command = [sys.executable, "-m", "benchmarks.compare", "--tool", name, "--source", source, "--out", str(out), "--asked", asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not out.exists():
        return {"why": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    return json.loads(lines[-1])


def size(path: Path) -> tuple[int, float]:
    """Parameters and MACs of an ONNX file, counted by one rule for all tools."""
    import graphprune as gp
    from graphprune import costs

    cost = costs.footprint(gp.capture(str(path)))
    return cost.params, cost.macs


def latencies(files: dict[str, Path], inputs: dict[str, Any]) -> dict[str, float]:
    """Median ms by name, in turns, one thread."""
    from graphprune.backends.onnxruntime import open_session
    from graphprune.measure import interleaved

    sessions = {name: open_session(str(path)) for name, path in files.items()}

    def call(session: Any) -> Callable[[], Any]:
        return lambda: session.run(None, inputs or {session.get_inputs()[0].name: network("resnet18")[1].numpy()})

    found = interleaved({name: call(s) for name, s in sessions.items()}, warmup=2, repeats=9, seconds=SECONDS)
    return {name: stats.median_ms for name, stats in found.items()}


def compare(source: str, folder: Path) -> None:
    """One block of the table."""
    on_file = Path(source).suffix == ".onnx"
    arms = {"dense": ("dense", "0"), "ours": ("ours", str(RATIO)), "onnxsim": ("onnxsim", str(RATIO))}
    if not on_file:
        arms["Torch-Pruning"] = ("Torch-Pruning", str(RATIO))
        if source in SIBLINGS:
            arms["sibling"] = ("sibling", "0")
    costs: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    sizes: dict[str, tuple[int, float]] = {}

    def run(arm: str, name: str, asked: str) -> None:
        path = folder / f"{arm.replace(' ', '_').replace('=', '_')}.onnx"
        if on_file and name == "dense":
            path, costs[arm] = Path(source), {}
        else:
            costs[arm] = tool(name, source, path, asked)
        if "why" not in costs[arm]:
            files[arm], sizes[arm] = path, size(path)

    for arm, (name, asked) in arms.items():
        run(arm, name, asked)
    for rival in ("onnxsim", "Torch-Pruning"):
        if rival in sizes and sizes[rival][0] < sizes["dense"][0]:
            run(f"ours = {rival}", "ours", f"params={sizes[rival][0]}")
    inputs = {}
    if on_file:
        import graphprune as gp

        program = gp.capture(source)
        inputs = {value.name: x.numpy() for value, x in zip(program.inputs, program.example_inputs)}
    times = latencies(files, inputs)
    whole, fastest = sizes["dense"], times["dense"]
    for arm in costs:
        if arm not in files:
            print(f"{Path(source).name:18} {arm:22} {costs[arm]['why']}", flush=True)
            continue
        params, macs = sizes[arm]
        spent = costs[arm]
        cost = f"{spent['seconds']:7.1f} {spent['peak_mb']:8.0f}" if spent else f"{'':16}"
        print(
            f"{Path(source).name:18} {arm:22} {params / 1e6:8.3f} {params / whole[0]:6.3f} {macs / max(whole[1], 1):6.3f} {cost} "
            f"{times[arm]:8.2f} {fastest / times[arm]:6.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--files", action="store_true", help="real ONNX files in place of torchvision networks")
    for hidden in ("--tool", "--source", "--out", "--asked"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        start = time.perf_counter()
        TOOLS[options.tool](options.source, Path(options.out), options.asked)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak}))
        return
    print(f"{'network':18} {'tool':22} {'params M':>8} {'left':>6} {'MACs':>6} {'tool s':>7} {'peak MB':>8} {'ms':>8} {'speed-up':>7}")
    if options.files:
        from benchmarks.onnx_files import find

        sources = [str(path) for name in options.names or FILES if (path := find(name)) is not None]
    else:
        sources = list(options.names or NETWORKS)
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            compare(source, Path(folder))


if __name__ == "__main__":
    main()
