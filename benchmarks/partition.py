"""Our groups against Torch-Pruning's, unit by unit, on the torchvision networks without attention.

    python -m benchmarks.partition [pattern]

A unit is the set of (tensor, axis, position) entries that go together. Both partitions are restricted to entries that both tools would cut;
they are equal when the restricted sets are. Differences are printed with the network and the tensors involved.
"""

from __future__ import annotations

import multiprocessing
import sys
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

Entry = tuple[str, int, int]
ATTENTION = ("vit", "swin", "maxvit", "mvit")


def our_units(case: Any) -> set[frozenset[Entry]]:
    from graphprune.capture.torch_export import capture_torch

    units = set()
    for group in capture_torch(case.module, case.args, case.kwargs).groups:
        if group.kind == "layer":
            continue
        for unit in range(group.size):
            units.add(frozenset((tensor, axis, int(p)) for tensor, axis, index in group.members for p in index[unit]))
    return units


def their_units(case: Any) -> set[frozenset[Entry]]:
    import torch_pruning as tp

    names = {module: name for name, module in case.module.named_modules()}
    graph = tp.DependencyGraph().build_dependency(case.module, example_inputs=case.args[0] if len(case.args) == 1 else case.args)
    units: set[frozenset[Entry]] = set()
    for group in graph.get_all_groups():
        found: dict[int, set[Entry]] = {}
        for item in group:
            module = item.dep.target.module
            if not isinstance(module, nn.Module) or module not in names:
                continue
            for tensor, axis in _touched(module, item.dep.handler.__name__):
                for position, root in zip(item.idxs, item.root_idxs):
                    found.setdefault(root, set()).add((f"{names[module]}.{tensor}", axis, position))
        units |= {frozenset(entries) for entries in found.values()}
    return units


def _touched(module: nn.Module, handler: str) -> list[tuple[str, int]]:
    """Tensors of a module that a pruning function cuts, and along which axis."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        names = ("weight", "bias", "running_mean", "running_var")
        return [(name, 0) for name in names if getattr(module, name, None) is not None]
    bias = [("bias", 0)] if getattr(module, "bias", None) is not None else []
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels and module.groups > 1
    if depthwise:
        return [("weight", 0), *bias]
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return [("weight", 0), *bias] if "out" in handler else [("weight", 1)]
    return [("weight", 0), *bias] if hasattr(module, "weight") else []


def compare(name: str, pipe: Any) -> None:
    from benchmarks.zoo_models import ROWS

    torch.set_num_threads(1)
    case = ROWS[name].build()
    ours, theirs = our_units(case), their_units(ROWS[name].build())
    common = set().union(*ours) & set().union(*theirs)
    a = {cut for unit in ours if (cut := frozenset(unit & common))}
    b = {cut for unit in theirs if (cut := frozenset(unit & common))}
    only_theirs = {entry[0] for entry in set().union(*theirs) - common}
    only_ours = {entry[0] for entry in set().union(*ours) - common}
    differing = {entry[0] for unit in a ^ b for entry in unit}
    pipe.send((len(a), len(b), len(a & b), sorted(differing)[:6], sorted(only_ours)[:6], sorted(only_theirs)[:6]))


def main() -> None:
    from benchmarks.zoo_models import ROWS

    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    equal = compared = 0
    print(f"{'network':34} {'our units':>10} {'theirs':>8} {'equal':>8}")
    for name in ROWS:
        short = name.removeprefix("torchvision/")
        if short == name or not fnmatch(name, pattern) or any(word in short for word in ATTENTION):
            continue
        context = multiprocessing.get_context("fork")
        mine, other = context.Pipe(duplex=False)
        process = context.Process(target=compare, args=(name, other))
        process.start()
        other.close()
        try:
            result = mine.recv() if mine.poll(60) else None
        except EOFError:
            result = None
        process.kill()
        process.join()
        if result is None:
            print(f"{name:34} Torch-Pruning does not finish", flush=True)
            continue
        a, b, same, differing, ours_only, theirs_only = result
        compared += 1
        equal += a == b == same
        print(f"{name:34} {a:10} {b:8} {same:8}", *(f"differ at {', '.join(differing)}",) * bool(differing), flush=True)
        if ours_only or theirs_only:
            print(f"{'':34} only ours: {', '.join(ours_only) or '-'}; only theirs: {', '.join(theirs_only) or '-'}")
    print(f"{equal} of {compared} partitions are equal")


if __name__ == "__main__":
    main()
