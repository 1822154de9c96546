"""Torch-Pruning 1.6.1 on the rows of the zoo: does the network still run after it, and with how many parameters?

    python -m benchmarks.zoo --torch-pruning               all rows that results/torch_pruning.jsonl lacks, then the table
    python -m benchmarks.zoo --torch-pruning 'timm/*'

As its documentation starts a user off: magnitude of each group, ratio 0.5 in every group, the layers that write the output ignored. Those
layers are found here, and outputs are unpacked for it; nothing else is told, neither head counts nor which parameters to leave alone.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.apart import apart
from tests.randomise import Case, tensors

SECONDS = 60  # of processor time for Torch-Pruning, from the built network to the pruned one having run
RATIO = 0.5


def version() -> str:
    from importlib.metadata import version as installed

    return installed("torch-pruning")


def output_layers(case: Case) -> list[nn.Module]:
    """Layers of matrices and kernels between which and the output there is no other: the walk back through autograd ends at them."""
    owner = {p: m for m in case.module.modules() for p in m.parameters(recurse=False) if p.dim() > 1}
    with torch.enable_grad():
        pending = [t.grad_fn for t in tensors(case.module(*case.args, **case.kwargs)) if t.grad_fn is not None]
    found: dict[nn.Module, None] = {}
    seen = set()
    while pending:
        step = pending.pop()
        if step in seen:
            continue
        seen.add(step)
        sources = [source for source, _ in step.next_functions if source is not None]
        direct = [*sources, *(below for s in sources if s.name() == "TBackward0" for below, _ in s.next_functions if below is not None)]
        layers = [owner[leaf.variable] for leaf in direct if hasattr(leaf, "variable") and leaf.variable in owner]
        if layers:
            found.update(dict.fromkeys(layers))
        else:
            pending += sources
    return list(found)


def pruner(case: Case, ignored: list[nn.Module]) -> Any:
    """Torch-Pruning's pruner of a case: uniform ratio, local, magnitude."""
    import torch_pruning as tp

    warnings.simplefilter("ignore")
    return tp.pruner.BasePruner(
        case.module,
        case.args,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        global_pruning=False,
        ignored_layers=ignored,
        forward_fn=lambda module, args: [t for t in tensors(module(*args, **case.kwargs)) if t.grad_fn is not None],
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _build(name: str) -> tuple[Case, list[nn.Module]]:
    from benchmarks.zoo_models import ROWS

    torch.set_num_threads(1)
    case = ROWS[name].build()
    for parameter in case.module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return case, output_layers(case)


def _measure(built: tuple[Case, list[nn.Module]]) -> dict[str, Any]:
    case, ignored = built
    before, shapes = count(case.module), [list(t.shape) for t in tensors(case())]
    record: dict[str, Any] = {"status": "runs", "params": before}
    start = time.thread_time()
    try:
        pruner(case, ignored).step()
    except Exception as error:
        return record | {"status": "pruning fails", "why": _words(error), "seconds": round(time.thread_time() - start, 3)}
    record |= {"seconds": round(time.thread_time() - start, 3), "kept_params": round(count(case.module) / max(before, 1), 4)}
    try:
        after = [list(t.shape) for t in tensors(case())]
    except Exception as error:
        return record | {"status": "does not run after it", "why": _words(error)}
    if count(case.module) == before:
        record["status"] = "nothing removed"
    elif len(after) != len(shapes) or after[0] != shapes[0]:
        record |= {"status": "another output", "why": f"first output {after[:1]}, was {shapes[:1]}"}
    return record


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def run_rows(names: list[str], results: Path) -> None:
    """Adds the rows that the file lacks for the installed version, one after the other."""
    import timm  # noqa: F401  # libraries are imported once, before the forks
    import transformers  # noqa: F401

    import tests.torchvision_ops  # noqa: F401
    from benchmarks.zoo_models import ROWS

    torch.set_num_threads(1)
    done = known(results)
    for name in names:
        if name in done:
            continue
        found = apart(_measure, name, SECONDS, prepare=_build)
        if isinstance(found, str):
            found = {"status": "no result" if found.startswith("no result") else "fails", "why": found}
        with results.open("a") as file:
            file.write(json.dumps({"version": version(), "name": name, "family": ROWS[name].family, **found}) + "\n")
        print(f"{name}: {found['status']} {found.get('kept_params', '')} {found.get('why', '')[:120]}", file=sys.stderr, flush=True)


def known(results: Path) -> dict[str, dict[str, Any]]:
    """Rows measured with the installed version."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {r["name"]: r for r in map(json.loads, lines) if r["version"] == version()}


def table(records: list[dict[str, Any]]) -> str:
    """Rows that run afterwards, by family, and the reasons of the others."""
    families: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        families.setdefault(record["name"].partition("/")[0] + " " + record["family"], []).append(record)
    lines = [f"{'family':34} {'rows':>5} {'run after it':>13} {'parameters left':>16}"]
    for family, rows in [*sorted(families.items()), ("all", records)]:
        good = [r["kept_params"] for r in rows if r["status"] == "runs"]
        lines.append(f"{family:34} {len(rows):5} {len(good):13} {sum(good) / len(good) if good else float('nan'):16.3f}")
    lines += [f"{number:5} {status}" for status, number in Counter(r["status"] for r in records).most_common()]
    return "\n".join(lines)
