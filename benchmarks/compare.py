"""Torch-Pruning and onnxsim beside us: what is left, what the tool costs, and how fast ONNX Runtime runs the result.

    python -m benchmarks.compare [network ...]          torchvision networks, random weights, 224 x 224, batch 1
    python -m benchmarks.compare --files [id ...]       real ONNX files (benchmarks.onnx_files): ours and onnxsim
    python -m benchmarks.compare --show                 the tables of what was measured before, and what they come to

Torch-Pruning and onnxsim are asked for half of every group, their usual call. Ours is cut twice, to the parameters that each of them left,
so that latencies compare at equal size; a third time to its own half. onnxsim leaves some layers whole and halves others: at its size ours
is cut once more, with groups that may lose UNEVEN times what an even cut takes, where 1.5 times is the default. Every tool runs in a
process of its own, which gives its seconds (`all` with the network made and the file written) and its peak memory; then all files run in
turns in one process, on one thread. Latency is the median, speed-up the median of the ratios of neighbouring runs. `sibling` is a smaller
network of the same family, as it comes; EfficientNet-B0 and DenseNet-121 are the smallest of theirs. `drift` of a file is what its cut did
to its outputs before any training: the norm of the difference over that of what the dense file gives, of the output where it is largest;
the median over DRAWS inputs, the example's and noise, or drawn lines of text where a file reads text (in noise there is none: a detector's
output is zero). What is done lies in `results/compare.jsonl`, a line for each network, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "regnet_y_400mf", "convnext_tiny", "vit_b_16")
SIBLINGS: dict[str, tuple[str, dict[str, Any]]] = {  # names with "timm." are found there
    "resnet18": ("timm.resnet10t", {}),
    "resnet50": ("resnet18", {}),
    "mobilenet_v2": ("mobilenet_v2", {"width_mult": 0.5}),
    "regnet_y_400mf": ("timm.regnety_002", {}),
    "convnext_tiny": ("timm.convnext_nano", {}),
    "vit_b_16": ("timm.vit_small_patch16_224", {}),
}
CUTS_THE_RESIDUAL = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16")
NOT_HERE = ("another export of", "as ", "int8")  # notes of files that are no networks of their own
RATIO = 0.5
SECONDS = 4.0  # of measurement, all files of a network together
PATIENCE = 900.0  # seconds, for one tool
RESULTS = Path(__file__).parent.parent / "results" / "compare.jsonl"
UNEVEN = 4.0  # bound of the second cut at onnxsim's size
DRAWS = 6  # inputs of a file on which drift is measured
LINES = {"ppocr-cls": (1, 192), "ppocr4-det": (2, 320), "ppocr4-rec": (1, 320)}  # of text in one input, cut to so many columns
ALIKE = 1.03  # at equal parameters left, ours may take so many times what the best of the others does


def network(name: str, **options: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    import tests.torchvision_ops  # noqa: F401  # before torchvision

    torch.manual_seed(0)
    if name.startswith("timm."):
        import timm

        return timm.create_model(name.removeprefix("timm."), **options).eval(), torch.randn(1, 3, 224, 224)
    from torchvision import models

    return models.get_model(name, weights=None, **options).eval(), torch.randn(1, 3, 224, 224)


def export(module: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    torch.onnx.export(module, (x,), str(path), dynamo=True, optimize=True, verbose=False, external_data=False)


# ---- the tools: each reads a network, or an ONNX file, writes an ONNX file, and returns the seconds that it took itself


def dense(source: str, out: Path, asked: str) -> float:
    export(*network(source), out)
    return 0.0


def sibling(source: str, out: Path, asked: str) -> float:
    name, options = SIBLINGS[source]
    export(*network(name, **options), out)
    return 0.0


def ours(source: str, out: Path, asked: str) -> float:
    """asked: a fraction of units to remove, or "params=N" to keep, or "params=N uneven=X"."""
    import graphprune as gp
    from graphprune.allocation import Local
    from graphprune.units import DEFAULT_UNITS

    kept, _, uneven = asked.removeprefix("params=").partition(" uneven=")
    arguments: dict[str, Any] = {"pruning_ratio": float(asked)} if kept == asked else {"budget": {"params": int(kept)}}
    if uneven:
        arguments["scope"] = Local(uneven=float(uneven))
    if Path(source).suffix == ".onnx":
        start = time.perf_counter()
        gp.compile(source, **arguments).save(out)
        return time.perf_counter() - start
    units = [*DEFAULT_UNITS, *["hidden"] * (source in CUTS_THE_RESIDUAL)]
    module, x = network(source)
    x = torch.cat([x, x])  # a batch of one would be taken for a size that is always one
    start = time.perf_counter()
    program = gp.capture(module, x, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    result = gp.apply(program, gp.plan(program, units=units, backend="onnxruntime", **arguments))
    spent = time.perf_counter() - start
    export(result.module, x[:1], out)
    return spent


def torch_pruning(source: str, out: Path, asked: str) -> float:
    import torch_pruning as tp

    module, x = network(source)
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    heads = {m.self_attention: m.self_attention.num_heads for m in module.modules() if hasattr(m, "self_attention")}
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        module, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=float(asked), global_pruning=False,
        ignored_layers=last, round_to=8, num_heads=heads, prune_num_heads=True,
    )  # fmt: skip
    pruner.step()
    spent = time.perf_counter() - start
    export(module, x, out)
    return spent


def onnxsim(source: str, out: Path, asked: str) -> float:
    import onnx
    from onnxsim import apply_structured_pruning, simplify

    if Path(source).suffix != ".onnx":
        export(*network(source), out)
        source = str(out)
    start = time.perf_counter()
    model, _ = simplify(source)
    onnx.save(apply_structured_pruning(model, sparsity=float(asked)), out)
    return time.perf_counter() - start


TOOLS: dict[str, Callable[[str, Path, str], float]] = {
    "dense": dense, "sibling": sibling, "ours": ours, "Torch-Pruning": torch_pruning, "onnxsim": onnxsim,
}  # fmt: skip


def tool(name: str, source: str, out: Path, asked: str) -> dict[str, Any]:
    """Run a tool in a process of its own: {"seconds", "all_seconds", "peak_mb"}, or {"why"}."""
    command = [sys.executable, "-m", "benchmarks.compare", "--tool", name, "--source", source, "--out", str(out), "--asked", asked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"why": f"no result after {PATIENCE:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not out.exists():
        return {"why": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:160]}
    return json.loads(lines[-1])


def peak_mb() -> float:
    """Of this process. What `resource` counts where there is no /proc starts with that of the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return float(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# ---- what came out


def size(path: Path) -> dict[str, float]:
    """Parameters and MACs of an ONNX file, counted by one rule for all tools."""
    import graphprune as gp
    from graphprune import costs

    cost = costs.footprint(gp.capture(str(path)))
    return {"params": cost.params, "macs": cost.macs}


def runs(path: Path, inputs: Mapping[str, Any]) -> Callable[..., Any]:
    """A call of a file, with these inputs or with others, that was made once, so that it is known to work."""
    from graphprune.backends.onnxruntime import open_session

    session = open_session(str(path))
    usual = dict(inputs) or {session.get_inputs()[0].name: network("resnet18")[1].numpy()}

    def call(feeds: Mapping[str, Any] = usual) -> Any:
        return session.run(None, feeds)

    call()
    return call


def draws_of(name: str, program: Any) -> list[dict[str, Any]]:
    """Inputs on which the drift of a file is measured."""
    from graphprune.calibration.batches import noise
    from graphprune.demo import drawn

    names = [value.name for value in program.inputs]
    if name in LINES:
        count, width = LINES[name]
        images = [image for _, image in drawn(count * DRAWS, seed=3)]
        return [{names[0]: np.concatenate(images[i::DRAWS], axis=2)[..., :width]} for i in range(DRAWS)]
    return [dict(zip(names, (x.numpy() for x in xs))) for xs in (program.example_inputs, *noise(program, DRAWS - 1))]


def drift(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """How far outputs are from those of the dense file, relative to these; of the output that is farthest."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)]
    floats = [(a, b) for a, b in pairs if b.dtype.kind == "f"]
    return max((float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)) for a, b in floats), default=0.0)


def arms_of(source: str) -> dict[str, tuple[str, str]]:
    """Name in the table -> (tool, what it is asked for), without those that depend on what others left."""
    arms = {"dense": ("dense", "0"), "ours": ("ours", str(RATIO)), "onnxsim": ("onnxsim", str(RATIO))}
    if Path(source).suffix != ".onnx":
        arms["Torch-Pruning"] = ("Torch-Pruning", str(RATIO))
        if source in SIBLINGS:
            arms["sibling"] = ("sibling", "0")
    return arms


def compare(source: str, name: str, folder: Path) -> dict[str, Any]:
    """One network by all tools: a line of the results."""
    on_file = Path(source).suffix == ".onnx"
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[..., Any]] = {}
    inputs: dict[str, Any] = {}
    draws: list[dict[str, Any]] = []
    if on_file:
        import graphprune as gp

        program = gp.capture(source)
        inputs = {value.name: x.numpy() for value, x in zip(program.inputs, program.example_inputs)}
        draws = draws_of(name, program)

    def run(arm: str, by: str, asked: str) -> None:
        path = folder / f"{arm.replace(' ', '_').replace('=', '_')}.onnx"
        if on_file and by == "dense":
            path, found[arm] = Path(source), {}
        else:
            found[arm] = tool(by, source, path, asked)
        if "why" not in found[arm]:
            try:
                found[arm] |= size(path)
                calls[arm] = runs(path, inputs)
            except Exception as error:  # another tool's file may be anything
                found[arm]["why"] = f"its file does not run: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"[:160]

    for arm, (by, asked) in arms_of(source).items():
        run(arm, by, asked)
    for rival in ("onnxsim", "Torch-Pruning"):
        if rival in calls and found[rival]["params"] < found["dense"]["params"]:
            run(f"ours = {rival}", "ours", f"params={found[rival]['params']}")
    if "ours = onnxsim" in found:
        run(f"ours = onnxsim, uneven {UNEVEN:g}", "ours", f"params={found['onnxsim']['params']} uneven={UNEVEN:g}")
    from graphprune.measure import interleaved

    if "dense" in calls:
        times = {arm: stats.times for arm, stats in interleaved(calls, warmup=2, repeats=9, seconds=SECONDS).items()}
        for arm, own in times.items():
            found[arm] |= {"ms": median(own), "speedup": median(a / b for a, b in zip(times["dense"], own))}
            rival = arm.removeprefix("ours = ").partition(",")[0]
            if rival != arm:
                found[arm]["of_rival"] = median(a / b for a, b in zip(own, times[rival]))
        if on_file:
            whole = [calls["dense"](draw) for draw in draws]
            for arm, call in calls.items():
                found[arm]["drift"] = median(drift(call(draw), y) for draw, y in zip(draws, whole))
    versions = {it: version(it) for it in ("torch", "onnxruntime", "onnxsim", "torch-pruning")}
    return {"name": name, "kind": "file" if on_file else "network", "ratio": RATIO, "arms": found, "device": device(), "versions": versions}


def device() -> str:
    from graphprune.backends.widths import device_name

    return f"{device_name('cpu')}, 1 thread, Python {platform.python_version()}"


# ---- tables


HEADER = (
    f"{'network':18} {'tool':24} {'params M':>8} {'left':>6} {'MACs':>6} {'tool s':>7} {'all s':>6} {'peak MB':>7} {'ms':>8} {'speed-up':>8} {'/rival':>6} "
    f"{'drift':>9}"
)


def rows(line: Mapping[str, Any]) -> Iterable[str]:
    """One block of the table; `/rival`: ours at the rival's parameters, its time over the rival's."""
    whole = line["arms"]["dense"]
    for arm, it in line["arms"].items():
        if "why" in it or "ms" not in it:
            yield f"{line['name']:18} {arm:24} {it.get('why', 'not timed: the dense network does not run')}"
            continue
        cost = f"{it['seconds']:7.1f} {it['all_seconds']:6.1f} {it['peak_mb']:7.0f}" if "seconds" in it else f"{'':22}"
        left = f"{it['params'] / 1e6:8.3f} {it['params'] / whole['params']:6.3f} {it['macs'] / max(whole['macs'], 1):6.3f}"
        rival = f" {it['of_rival']:6.2f}" if "of_rival" in it else f" {'':6}"
        far = f" {it['drift']:9.3g}" if "drift" in it and it is not whole else ""
        yield f"{line['name']:18} {arm:24} {left} {cost} {it['ms']:8.2f} {it['speedup']:7.2f}x{rival}{far}".rstrip()


def summary(lines: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What the lines come to, with the names that do not hold."""
    lines = list(lines)
    cells = [(line["name"], arm, it) for line in lines for arm, it in line["arms"].items()]
    mine = [(name, arm, it["speedup"]) for name, arm, it in cells if arm.startswith("ours") and "speedup" in it]
    slow = [f"{name} ({arm}) {x:.2f}x" for name, arm, x in mine if x < 1]
    yield f"ours is as fast as dense or faster in {len(mine) - len(slow)} of {len(mine)} cuts" + "".join(f"; {it}" for it in slow)
    for loose, what in ((False, "at equal parameters"), (True, f"where groups may lose {UNEVEN:g} times what an even cut takes")):
        equal = [(name, arm, it["of_rival"]) for name, arm, it in cells if "of_rival" in it and ("uneven" in arm) == loose]
        behind = [f"{name} ({arm}) {x:.2f}" for name, arm, x in equal if x > ALIKE]
        yield f"{what}, within {ALIKE - 1:.0%} of the rival's time or better in {len(equal) - len(behind)} of {len(equal)}" + "".join(
            f"; {it}" for it in behind
        )
        theirs = {line["name"]: line["arms"]["onnxsim"]["drift"] for line in lines if "drift" in line["arms"].get("onnxsim", {})}
        drifts = [(name, it["drift"]) for name, arm, it in cells if "drift" in it and "= onnxsim" in arm and ("uneven" in arm) == loose]
        farther = [f"{name} {x:.3g} ({theirs[name]:.3g})" for name, x in drifts if x > theirs[name]]
        if drifts:
            yield f"  drift no larger than onnxsim's in {len(drifts) - len(farther)} of {len(drifts)}" + "".join(f"; {it}" for it in farther)
    both = [(x["ours"], x["onnxsim"]) for x in (line["arms"] for line in lines) if all("ms" in x.get(it, {}) for it in ("ours", "onnxsim"))]
    if both:
        share = [b["params"] / a["params"] for a, b in both]
        yield f"onnxsim at ratio {RATIO} leaves {min(share):.2f} to {max(share):.2f} times the parameters of ours, median {median(share):.2f}"
    for rival in ("ours", "onnxsim", "Torch-Pruning"):
        failed = sorted(name for name, arm, it in cells if arm.split(" = ")[0] == rival and "why" in it)
        if failed:
            yield f"{rival} has no result for {', '.join(dict.fromkeys(failed))}"


def kept(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured before, the last line of each network."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {(it["kind"], it["name"]): it for it in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--files", action="store_true", help="real ONNX files in place of torchvision networks")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a JSON line for each network")
    for hidden in ("--tool", "--source", "--out", "--asked"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tool:
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        spent = TOOLS[options.tool](options.source, Path(options.out), options.asked)
        print(json.dumps({"seconds": spent, "all_seconds": time.perf_counter() - start, "peak_mb": peak_mb()}))
        return
    kind = "file" if options.files else "network"
    if options.files:
        from benchmarks.onnx_files import FILES, find

        names = options.names or [name for name, file in FILES.items() if not file.note.startswith(NOT_HERE)]
        sources = {name: str(path) for name in names if (path := Path(name) if options.show else find(name)) is not None}
        for name in (it for it in names if it not in sources):
            print(f"{name} is not here: python -m benchmarks.onnx_files {name}", file=sys.stderr)
    else:
        sources = {name: name for name in options.names or NETWORKS}
    print(HEADER)
    for name, source in sources.items():
        line = kept(options.results).get((kind, name))
        if line is None and options.show:
            continue
        if line is None or (options.again and not options.show):
            with tempfile.TemporaryDirectory() as folder:
                line = compare(source, name, Path(folder))
            options.results.parent.mkdir(exist_ok=True)
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print("\n".join(rows(line)), flush=True)
    done = [line for (of, name), line in kept(options.results).items() if of == kind and name in sources]
    print("\n" + "\n".join(summary(done)))
    print("\n".join(dict.fromkeys(f"{it['device']}, " + ", ".join(f"{k} {v}" for k, v in it["versions"].items()) for it in done)))


if __name__ == "__main__":
    main()
