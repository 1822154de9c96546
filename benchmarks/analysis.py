"""How long the analysis takes: on torchvision beside Torch-Pruning, and on Llama as it grows deeper.

    python -m benchmarks.analysis torchvision [pattern]     ours (median of five) and Torch-Pruning 1.6.1, in turns, one process per network
    python -m benchmarks.analysis scaling                   10 to 160 layers of a 70B-shaped GQA Llama on the meta device

Analysis is what lies between the exported graph and the list of groups with all index matrices. Torch-Pruning's time is `build_dependency`
(its trace included) plus
`get_all_groups`; our export is shown in a column of its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from fnmatch import fnmatch
from typing import Any

import torch

LIMIT = 60.0  # seconds for Torch-Pruning, which does not end on some attention graphs


def ours(name: str, pipe: Any) -> None:
    from benchmarks.zoo_models import ROWS
    from graphprune.capture.torch_export import capture_torch

    torch.set_num_threads(1)
    case = ROWS[name].build()
    start = time.perf_counter()
    program = capture_torch(case.module, case.args, case.kwargs)
    capture = time.perf_counter() - start
    pipe.send((capture, statistics.median(_solve(program) for _ in range(5))))


def _solve(program: Any) -> float:
    from graphprune.analysis import analyze

    start = time.perf_counter()
    for group in analyze(program).groups:
        for member in group.members:
            member.index  # noqa: B018
    return time.perf_counter() - start


def theirs(name: str, pipe: Any) -> None:
    import torch_pruning as tp

    from benchmarks.zoo_models import ROWS

    torch.set_num_threads(1)
    case = ROWS[name].build()
    start = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(case.module, example_inputs=case.args[0] if len(case.args) == 1 else case.args)
    for group in graph.get_all_groups():
        len(group)
    pipe.send(time.perf_counter() - start)


def _limited(function: Any, name: str, limit: float) -> Any:
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(name, other))
    process.start()
    other.close()
    try:
        return mine.recv() if mine.poll(limit) else f"> {limit:.0f} s"
    except EOFError:
        return "fails"
    finally:
        process.kill()
        process.join()


def torchvision(pattern: str) -> None:
    from benchmarks.zoo_models import ROWS

    torch.set_num_threads(1)
    total, rival, most = 0.0, 0.0, 0.0
    print(f"{'network':34} {'export s':>9} {'analysis s':>11} {'Torch-Pruning s':>16}")
    for name in ROWS:
        if not (name.startswith("torchvision/") and fnmatch(name, pattern)):
            continue
        our, their = _limited(ours, name, 300.0), _limited(theirs, name, LIMIT)
        if isinstance(our, str):
            print(f"{name:34} {our}")
            continue
        most = max(most, our[1])
        if isinstance(their, float):
            total, rival = total + our[1], rival + their
        print(f"{name:34} {our[0]:9.2f} {our[1]:11.3f} {their if isinstance(their, str) else f'{their:.3f}':>16}", flush=True)
    print(f"where both finish: ours {total:.2f} s, Torch-Pruning {rival:.2f} s; our slowest analysis {most:.3f} s")


def scaling() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import tests.torchvision_ops  # noqa: F401  # transformers imports torchvision
    from graphprune.capture.torch_export import capture_torch

    print(f"{'layers':>6} {'nodes':>6} {'export s':>9} {'analysis s':>11} {'groups':>7}")
    for layers in (10, 20, 40, 80, 160):
        config = LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=layers,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=32000,
            use_cache=False,
        )
        with torch.device("meta"):
            model, tokens = LlamaForCausalLM(config).eval(), torch.zeros(2, 11, dtype=torch.long)
        start = time.perf_counter()
        program = capture_torch(model, (tokens,))
        exported = time.perf_counter() - start
        print(
            f"{layers:6} {len(program.nodes):6} {exported:9.2f} {statistics.median(_solve(program) for _ in range(5)):11.3f} {len(program.groups):7}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["scaling"]:
        scaling()
    elif sys.argv[1:2] == ["torchvision"]:
        torchvision(sys.argv[2] if len(sys.argv) > 2 else "*")
    else:
        sys.exit(__doc__)
