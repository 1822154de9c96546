"""The zoo: is every network of the list captured, cut, proved and written back, without a hint?

    python -m benchmarks.zoo                       all rows that the results file lacks, then the table
    python -m benchmarks.zoo 'torchvision/*' hf/llama --results results/zoo.jsonl
    python -m benchmarks.zoo --torch-pruning       Torch-Pruning on the same rows, into torch_pruning.jsonl beside the results

Each row runs in a process of its own with a time limit. At ratio 0.5 with the default units, and once more with `hidden`: certificate of
all groups at once on three inputs in float64, a negative control (one member shifted by one position must fail), and write-back. The
results file is JSON lines, keyed by row and code version; a second run only adds what is missing. Where Torch-Pruning's file lies beside
it, the table has a column of the rows that run after Torch-Pruning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

SECONDS = 900  # per row: three proofs in float64 of a video network take most of it; the compiler itself has 60 beyond capture
UNIT_SETS = {
    "default": ("channel", "neuron", "head", "kv_group", "expert"),
    "hidden": ("channel", "neuron", "head", "kv_group", "expert", "hidden"),
}


def code_version() -> str:
    """A hash of the compiler's sources: results of other code do not count."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in ("graphprune", "passes"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def measure(name: str) -> dict[str, Any]:
    """Everything the table shows of one row."""
    import torch

    from benchmarks.zoo.exercise import exercise
    from benchmarks.zoo_models import ROWS
    from graphprune.capture.torch_export import capture_torch

    torch.set_num_threads(1)
    record: dict[str, Any] = {"name": name, "family": ROWS[name].family}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        record[stage] = round(now - clock, 3)
        clock = now

    case = ROWS[name].build()
    record["params"] = sum(p.numel() for p in case.module.parameters())
    lap("build_s")
    program = capture_torch(case.module, case.args, case.kwargs)
    record["nodes"] = len(program.nodes)
    lap("capture_s")
    analysis = program.analysis
    record["groups"] = dict(Counter(g.kind for g in analysis.groups))
    record["unknown"] = sorted(f"{domain}::{op}" for domain, op in analysis.engine.unknown)
    lap("analysis_s")
    for label, units in UNIT_SETS.items():
        try:
            record[label], module = prune(program, units)
            if label == "default" and module is not None:
                clock = time.perf_counter()
                record["exercise"] = exercise(module, case.args, dict(case.kwargs))
                lap("exercise_s")
        except Exception as error:
            record[label] = {"status": "error", "why": f"{type(error).__name__}: {error}"[:400], "where": traceback.format_exc()[-600:]}
    return record


def prune(program: Any, units: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    """What the table shows of one cut, and the pruned module."""
    import torch

    from graphprune.errors import NothingToPrune
    from graphprune.planning import make_plan
    from graphprune.surgery import Cut, apply_cut
    from graphprune.surgery.write_back import write_back
    from graphprune.verify.certificate import certify, shifted_control

    start = time.perf_counter()
    try:
        plan = make_plan(program, pruning_ratio=0.5, units=units, round_to=1)
    except NothingToPrune as error:
        return {"status": "nothing", "why": str(error)[:300]}, None
    cut = Cut(program.analysis, plan.removed)
    pruned = apply_cut(program, cut)
    cut_s = time.perf_counter() - start
    before = sum(v.tensor.numel() for v in program.weights.values())
    dtype = torch.float64 if before <= 200e6 else torch.float32
    certificate = certify(program, pruned, cut, dtype=dtype, seeds=(0, 1, 2))
    control = shifted_control(program, pruned, cut, dtype, tries=5)
    verify_s = time.perf_counter() - start - cut_s
    written = write_back(program, cut, pruned)
    status = certificate.status
    if status == "passed" and control <= certificate.tolerance:
        status = "control did not fail"
    record = {
        "status": status,
        "error": certificate.error,
        "floor": certificate.floor,
        "effect": certificate.effect,
        "control": control,
        "cut_groups": len(cut.removed),
        "kept_params": round(sum(v.tensor.numel() for v in pruned.weights.values()) / max(before, 1), 4),
        "module": written.how,
        "notes": [str(note)[:200] for note in written.notes][:3],
        "cut_s": round(cut_s, 3),
        "verify_s": round(verify_s, 3),
        "write_s": round(time.perf_counter() - start - cut_s - verify_s, 3),
    }
    return record, written.module


def _child(name: str, pipe: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        pipe.send(measure(name))
    except BaseException as error:
        pipe.send({"name": name, "why": f"{type(error).__name__}: {error}"[:400], "where": traceback.format_exc()[-600:]})


def run_rows(names: list[str], results: Path, jobs: int) -> None:
    """Fork one process per row, `jobs` at a time; libraries are imported once, here."""
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    import tests.torchvision_ops  # noqa: F401  # before anything that imports torchvision
    from benchmarks.zoo_models import ROWS

    torch.set_num_threads(1)
    version = code_version()
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, theirs))
            process.start()
            running[name] = process, ours, time.monotonic() + SECONDS
        for name, (process, pipe, deadline) in list(running.items()):
            record = None
            if pipe.poll(0.05):
                try:
                    record = pipe.recv()
                except EOFError:
                    record = {"name": name, "why": "the process died"}
            elif not process.is_alive():
                record = {"name": name, "why": f"the process died with code {process.exitcode}"}
            elif time.monotonic() > deadline:
                record = {"name": name, "why": f"no result after {SECONDS} s"}
            if record is not None:
                process.kill()
                process.join()
                del running[name]
                record = {"code": version, "family": ROWS[name].family, **record}
                with results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{name}: {verdict(record)}", file=sys.stderr, flush=True)


def verdict(record: dict[str, Any]) -> str:
    if "why" in record:
        return record["why"].splitlines()[0][:150]
    tried = record.get("exercise", {})
    wrong = [name for name, value in tried.items() if value is False]
    return (f"does not hold: {', '.join(wrong)}; " if wrong else "") + "; ".join(
        f"{label} {record[label]['status']}, {record[label].get('module', '')} {str(record[label].get('why', ''))[:120]}"
        for label in UNIT_SETS
    )


def passed(record: dict[str, Any]) -> bool:
    """Proved with the default units; `hidden` may find nothing more to cut, but nothing may be wrong."""
    return (
        "why" not in record
        and record["default"]["status"] in ("passed",)
        and record["hidden"]["status"] in ("passed", "ill-conditioned")
        and False not in record.get("exercise", {}).values()
    )


def table(records: list[dict[str, Any]], rival: dict[str, dict[str, Any]]) -> str:
    """Rows that pass, by family, and what the others failed at; `rival` is what Torch-Pruning made of them, by name."""
    families: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        families.setdefault(record["name"].partition("/")[0] + " " + record["family"], []).append(record)
    lines = [f"{'family':34} {'rows':>5} {'passed':>7} {'module':>7} {'graph':>6} {'analysis s (max)':>17}"]
    lines[0] += f"{'Torch-Pruning runs':>20}" if rival else ""
    for family, rows in sorted(families.items()):
        good = [r for r in rows if passed(r)]
        modules = sum(r["default"].get("module") == "module" for r in good)
        slowest = max((r.get("analysis_s", 0.0) for r in rows), default=0.0)
        lines.append(f"{family:34} {len(rows):5} {len(good):7} {modules:7} {len(good) - modules:6} {slowest:17.2f}{_rival(rows, rival)}")
    good = [r for r in records if passed(r)]
    lines.append(f"{'all':34} {len(records):5} {len(good):7}{'':32}{_rival(records, rival)}")
    lines += [f"miss: {r['name']}: {verdict(r)}" for r in records if not passed(r)]
    return "\n".join(lines)


def _rival(rows: list[dict[str, Any]], rival: dict[str, dict[str, Any]]) -> str:
    tried = [rival[r["name"]]["status"] for r in rows if r["name"] in rival]
    told = f"{tried.count('runs')} of {len(tried)}"
    return f"{told:>20}" if rival else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="globs over row names")
    parser.add_argument("--results", type=Path, default=Path("results/zoo.jsonl"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--any-code", action="store_true", help="accept results of other versions of the sources")
    parser.add_argument("--torch-pruning", action="store_true", help="run Torch-Pruning on the rows instead")
    options = parser.parse_args()
    from benchmarks.zoo import torch_pruning
    from benchmarks.zoo_models import ROWS

    options.results.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in ROWS if any(fnmatch(name, pattern) for pattern in options.patterns)]
    rival = options.results.with_name("torch_pruning.jsonl")
    if options.torch_pruning:
        torch_pruning.run_rows(names, rival)
        print(torch_pruning.table([r for name, r in torch_pruning.known(rival).items() if name in names]))
        return
    version = code_version()

    def known() -> dict[str, dict[str, Any]]:
        lines = options.results.read_text().splitlines() if options.results.exists() else []
        found = [json.loads(line) for line in lines]
        return {r["name"]: r for r in found if r["name"] in names and (options.any_code or r["code"] == version)}

    run_rows([name for name in names if name not in known()], options.results, options.jobs)
    print(table(list(known().values()), torch_pruning.known(rival)))


if __name__ == "__main__":
    main()
