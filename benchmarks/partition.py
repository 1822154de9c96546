"""Our groups against Torch-Pruning's on torchvision: unit by unit, and in parameters left.

    python -m benchmarks.partition [pattern ...]

A unit is the set of (tensor, axis, position) entries that go together. Both partitions are restricted to entries that both tools would cut,
and leave out the layers that write the output; they are equal when the restricted sets are. Torch-Pruning's units are those that its pruner
takes away at once: where a convolution has groups, one position in every group. Ours may divide such an axis by its groups as well; such a
second division of an axis that is otherwise equal is counted apart.

Parameters are those left at ratio 0.5: magnitude, local, no rounding, and our `hidden` units added where Torch-Pruning cut the residual
stream under norms.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from benchmarks.apart import apart
from benchmarks.zoo.torch_pruning import SECONDS, count, output_layers, pruner
from tests.randomise import Case

Entry = tuple[str, int, int]

ATTENTION = ("vit", "swin", "maxvit", "mvit")  # heads are a matter of hints to Torch-Pruning: not compared

# Where the two are not the same: cause -> networks. The first is proved by removing such units in tests/test_partition.py.
CAUSES: dict[str, tuple[str, ...]] = {
    "ours can also remove whole groups of a convolution or of a group norm (column 2nd)": (
        "regnet_*",
        "resnext*",
        "fcos_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
    ),
    "Torch-Pruning divides by zero where channels are shuffled": ("shufflenet_v2_*",),
    "Torch-Pruning adds None to a position in the recurrent update": ("raft_*",),
}


def our_units(program: Any) -> dict[str, set[frozenset[Entry]]]:
    """The units of each group."""
    return {
        group.name: {
            frozenset((member.tensor, member.axis, int(p)) for member in group.members for p in member.index[unit])
            for unit in range(group.size)
        }
        for group in program.groups
        if group.kind != "layer"
    }


def their_units(module: nn.Module, tool: Any) -> set[frozenset[Entry]]:
    """What Torch-Pruning's pruner would remove together."""
    names = {part: name for name, part in module.named_modules()}
    parameters = {part: name for name, part in module.named_parameters()}
    units: set[frozenset[Entry]] = set()
    for group in tool.DG.get_all_groups(ignored_layers=tool.ignored_layers, root_module_types=tool.root_module_types):
        step = len(group[0].idxs) // tool._get_channel_groups(group)
        found: dict[int, set[Entry]] = {}
        for item in group:
            target = item.dep.target.module
            if isinstance(target, nn.Parameter):
                tensors = [(parameters[target], item.dep.target.pruning_dim % target.dim(), target.shape[item.dep.target.pruning_dim])]
            elif target in names:
                tensors = list(_touched(names[target], target, item.dep.handler.__name__))
            else:
                continue
            for tensor, axis, length in tensors:
                for position, root in zip(item.idxs, item.root_idxs):
                    found.setdefault(root % step, set()).add((tensor, axis, position % length))
        units |= {frozenset(entries) for entries in found.values()}
    return units


def _touched(name: str, module: nn.Module, handler: str) -> Iterator[tuple[str, int, int]]:
    """Tensors of a module that a pruning function cuts, along which axis, and the length of that axis."""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    depthwise = convolution and module.groups == module.out_channels > 1
    if (convolution or isinstance(module, nn.Linear)) and "in" in handler and not depthwise:
        axis = 0 if convolution and module.transposed else 1
        yield f"{name}.weight", axis, module.weight.shape[axis]
        return
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, tensor, None) is not None:
            axis = 1 if convolution and module.transposed and tensor == "weight" else 0
            yield f"{name}.{tensor}", axis, getattr(module, tensor).shape[axis]


def prepare(name: str) -> tuple[Case, Any]:
    from benchmarks.zoo_models import ROWS
    from graphprune.capture.torch_export import capture_torch

    torch.set_num_threads(1)
    case = ROWS[name].build()
    return case, capture_torch(case.module, case.args, case.kwargs)


def compare(prepared: tuple[Case, Any]) -> dict[str, Any]:
    """What the table shows of a network and its capture. Torch-Pruning cuts the network in place."""
    case, program = prepared
    for parameter in case.module.parameters():
        parameter.requires_grad_()
    ours, tool = our_units(program), pruner(case, output_layers(case))
    theirs = their_units(case.module, tool)
    entries = {entry for units in ours.values() for unit in units for entry in unit}
    common = entries & set().union(*theirs)
    restricted = {group: {cut for unit in units if (cut := unit & common)} for group, units in ours.items()}
    b = {cut for unit in theirs if (cut := unit & common)}
    equal = {entry for units in restricted.values() for unit in units & b for entry in unit}
    second = {group for group, units in restricted.items() if not units & b and all(unit <= equal for unit in units) and units}
    a = set().union(*(units for group, units in restricted.items() if group not in second))
    record: dict[str, Any] = {"ours": len(a), "theirs": len(b), "equal": len(a & b), "second": len(second)}
    record["differ"] = sorted({entry[0] for unit in a ^ b for entry in unit})
    record["only ours"] = sorted({f"{t} axis {axis}" for t, axis, _ in entries - common})
    record["only theirs"] = sorted({f"{t} axis {axis}" for t, axis, _ in set().union(*theirs) - common})
    return record | parameters(case, program, tool)


def parameters(case: Case, program: Any, tool: Any) -> dict[str, Any]:
    """Parameters before, left by Torch-Pruning, left by us."""
    from graphprune.planning import make_plan
    from graphprune.program import Kind
    from graphprune.surgery import Cut, apply_cut
    from graphprune.units import DEFAULT_UNITS

    before = count(case.module)
    stream = {(member.tensor, member.axis) for group in program.groups if group.kind == "hidden" for member in group.members}
    tool.step()
    sizes = {name: p.shape for name, p in case.module.named_parameters()}
    cut_stream = any(name in sizes and sizes[name][axis] < program.weights[name].shape[axis] for name, axis in stream)
    units = (*DEFAULT_UNITS, *["hidden"] * cut_stream)
    plan = make_plan(program, pruning_ratio=0.5, units=units, round_to=1)
    weights = apply_cut(program, Cut(program.analysis, plan.removed)).weights.values()
    left = sum(v.tensor.numel() for v in weights if v.kind is Kind.PARAMETER)
    unused = before - sum(v.tensor.numel() for v in program.weights.values() if v.kind is Kind.PARAMETER)
    try:
        with torch.no_grad():
            case.module(*case.args, **case.kwargs)
        runs = ""
    except Exception as error:
        runs = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return {"params": before, "ours left": left + unused, "theirs left": count(case.module), "hidden": cut_stream, "fails": runs}


def main() -> None:
    from benchmarks.zoo_models import ROWS

    patterns = sys.argv[1:] or ["*"]
    equal = compared = explained = failed = fewer = 0
    print(f"{'network':40} {'our units':>9} {'theirs':>8} {'equal':>8} {'2nd':>4} {'params':>11} {'ours':>11} {'theirs':>11} {'ratio':>6}")
    for name in ROWS:
        short = name.removeprefix("torchvision/")
        if short == name or not any(fnmatch(name, p) for p in patterns) or any(word in short for word in ATTENTION):
            continue
        found = apart(compare, name, 2 * SECONDS, prepare=prepare)
        cause = next((cause for cause, networks in CAUSES.items() if any(fnmatch(short, n) for n in networks)), "")
        if isinstance(found, str):
            print(f"{name:40} {found}", flush=True)
            explained += bool(cause)
            failed += 1
            continue
        same = found["ours"] == found["theirs"] == found["equal"]
        compared += 1
        equal += same
        explained += not same and bool(cause)
        ratio = found["ours left"] / found["theirs left"]
        fewer += ratio <= 1.01
        print(
            f"{name:40} {found['ours']:9} {found['theirs']:8} {found['equal']:8} {found['second']:4} {found['params']:11} "
            f"{found['ours left']:11} {found['theirs left']:11} {ratio:6.3f}{' hidden' if found['hidden'] else ''}",
            flush=True,
        )
        if not same:
            print(f"{'':4}differ at {_some(found['differ'])}: {cause or 'unexplained'}")
        for side in ("only ours", "only theirs"):
            if found[side]:
                print(f"{'':4}{side}: {_some(found[side])}")
        if found["fails"]:
            print(f"{'':4}does not run after Torch-Pruning: {found['fails']}")
    print(f"{equal} of {compared} partitions are equal; no more parameters left with ours (within 1 %): {fewer}")
    print(f"Torch-Pruning fails on {failed}; of differences and failures {explained} have a named cause")
    for cause, networks in CAUSES.items():
        print(f"{cause}: {', '.join(networks)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


if __name__ == "__main__":
    main()
