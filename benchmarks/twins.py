"""One network, two captures: through torch.export, and through its own ONNX export. Same groups, and one plan cuts both alike.

    python -m benchmarks.twins [pattern ...]

For every network: number of groups, kinds, sizes and the partition into units agree (on weights that carry the same name on both sides),
and one plan made on the torch side, applied to both, gives the same outputs in float64.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import apart

SECONDS = 300

NETWORKS = (
    "torchvision/alexnet torchvision/vgg11_bn torchvision/resnet18 torchvision/resnet50 torchvision/resnext50_32x4d torchvision/densenet121 torchvision/squeezenet1_1 "
    "torchvision/mobilenet_v2 torchvision/mobilenet_v3_small torchvision/efficientnet_b0 torchvision/regnet_y_400mf torchvision/mnasnet0_5 torchvision/googlenet "
    "torchvision/shufflenet_v2_x0_5 torchvision/convnext_tiny torchvision/vit_b_16 torchvision/swin_t torchvision/fcn_resnet50 torchvision/lraspp_mobilenet_v3_large "
    "timm/sknet timm/levit timm/ghostnet timm/mlp_mixer timm/metaformer hf/llama-gqa hf/gpt2 hf/bert hf/opt hf/qwen3 hf/vit hf/t5 hf/phi3 hf/gpt_neox hf/distilbert"
).split()


def units(program: Any, names: set[str]) -> tuple[Counter, set[frozenset]]:
    """(kind, size) of every group, and the partition of the entries of the named weights."""
    sizes: Counter = Counter()
    partition = set()
    for group in program.groups:
        members = [m for m in group.members if m.tensor in names]
        if group.kind == "layer" or not members:
            continue
        sizes[group.kind, group.size] += 1
        for unit in range(group.size):
            partition.add(frozenset((m.tensor, m.axis, int(p)) for m in members for p in m.index[unit]))
    return sizes, partition


def compare(name: str) -> tuple[bool, bool, int, int, float, int, int, str]:
    from benchmarks.zoo_models import ROWS
    from graphprune.capture.huggingface import forward_defaults
    from graphprune.capture.onnx_file import capture_onnx
    from graphprune.capture.torch_export import capture_torch
    from graphprune.execute.interpreter import run
    from graphprune.execute.likeness import distance
    from graphprune.planning import make_plan
    from graphprune.surgery import Cut, apply_cut

    torch.set_num_threads(1)
    case = ROWS[name].build()
    kwargs = {**forward_defaults(case.module), **case.kwargs}
    ours = capture_torch(case.module, case.args, kwargs)
    inputs = [x for x in ours.example_inputs if isinstance(x, torch.Tensor)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin.onnx"
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            torch.onnx.export(case.module, case.args, str(path), kwargs=kwargs, dynamo=True, optimize=False, verbose=False)
        twin = capture_onnx(path, inputs)
        common = {n for n, v in ours.weights.items() if n in twin.weights and twin.weights[n].shape == v.shape}
        (sizes, cells), (sizes2, cells2) = units(ours, common), units(twin, common)
        plan = make_plan(ours, pruning_ratio=0.3, round_to=1)
        a = run(apply_cut(ours, Cut(ours.analysis, plan.removed)), ours.example_inputs, dtype=torch.float64)
        b = run(apply_cut(twin, Cut(twin.analysis, plan.resolve(twin))), inputs, dtype=torch.float64)
    which = str(dict((sizes - sizes2) + (sizes2 - sizes)))
    return (
        sizes == sizes2,
        cells == cells2,
        len(cells),
        len(cells ^ cells2),
        distance(b[: len(a)], a),
        len(common),
        len(ours.weights),
        which,
    )


def main() -> None:
    patterns = sys.argv[1:] or ["*"]
    good = total = 0
    print(f"{'network':38} {'groups':>7} {'units':>8} {'differ':>7} {'same plan, distance':>20}")
    import transformers  # noqa: F401  # once, before the forks

    import tests.torchvision_ops  # noqa: F401  # before anything that imports torchvision

    for name in NETWORKS:
        if not any(fnmatch(name, p) for p in patterns):
            continue
        found = apart(compare, name, SECONDS)
        total += 1
        if isinstance(found, str):
            print(f"{name:38} {found}", flush=True)
            continue
        sizes, cells, count, differ, gap, common, weights, which = found
        good += sizes and cells and gap <= 1e-5
        print(
            f"{name:38} {'equal' if sizes else 'differ':>7} {count:8} {differ:7} {gap:20.1e}   {common} of {weights} weights by name"
            f"{'' if sizes else ' ' + which}",
            flush=True,
        )
    print(f"{good} of {total} agree")


if __name__ == "__main__":
    main()
