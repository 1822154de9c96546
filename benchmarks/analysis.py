"""How long the analysis takes: on torchvision beside Torch-Pruning, and on Llama as it grows deeper.

    python -m benchmarks.analysis torchvision [pattern]     ours and Torch-Pruning 1.6.1 in turns, medians of five, one process per network
    python -m benchmarks.analysis scaling                   10 to 160 layers of a 70B-shaped GQA Llama on the meta device

Analysis is what lies between the exported graph and the list of groups with all index matrices. Torch-Pruning's time is `build_dependency`
(its trace included) plus `get_all_groups`; our export is shown in a column of its own. Analyses are timed in processor seconds of one
thread, as the machine may have other work; its load is printed. Export is in seconds of the clock.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
import warnings
from fnmatch import fnmatch
from typing import Any

import torch

from benchmarks.apart import apart

LIMIT = 60.0  # seconds for one analysis by Torch-Pruning, which does not end on some graphs
RUNS = 5


def captured(name: str) -> tuple[Any, Any, float]:
    """A network, our capture of it, and the seconds that took."""
    from benchmarks.zoo_models import ROWS
    from graphprune.capture.torch_export import capture_torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = ROWS[name].build()
    start = time.perf_counter()
    program = capture_torch(case.module, case.args, case.kwargs)
    return case, program, time.perf_counter() - start


def ours(program: Any) -> float:
    """Seconds of one analysis by us."""
    from graphprune.analysis import analyze

    start = time.thread_time()
    for group in analyze(program).groups:
        for member in group.members:
            member.index  # noqa: B018
    return time.thread_time() - start


def theirs(case: Any) -> float:
    """Seconds of one analysis by Torch-Pruning."""
    import torch_pruning as tp

    start = time.thread_time()
    graph = tp.DependencyGraph().build_dependency(case.module, example_inputs=case.args[0] if len(case.args) == 1 else case.args)
    for group in graph.get_all_groups():
        len(group)
    return time.thread_time() - start


def in_turns(prepared: tuple[Any, Any, float]) -> tuple[float, float, float | None, str]:
    """Seconds of the export, of our analysis, of Torch-Pruning's, or why that has none."""
    case, program, export = prepared

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {LIMIT:.0f} s")

    signal.signal(signal.SIGPROF, stop)
    mine, rival, why = [], [], ""
    for _ in range(RUNS):
        mine.append(ours(program))
        if why:
            continue
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            rival.append(theirs(case))
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        signal.setitimer(signal.ITIMER_PROF, 0)
    return export, statistics.median(mine), None if why else statistics.median(rival), why


def torchvision(pattern: str) -> None:
    from benchmarks.zoo_models import ROWS

    total = rival = 0.0
    slower, slowest = [], (0.0, "")
    print(f"{'network':40} {'export s':>9} {'analysis s':>11} {'Torch-Pruning s':>16}   load")
    for name in ROWS:
        if not (name.startswith("torchvision/") and fnmatch(name, pattern)):
            continue
        found = apart(in_turns, name, LIMIT * (1 + RUNS), prepare=captured)
        if isinstance(found, str):
            print(f"{name:40} {found}", flush=True)
            continue
        export, mine, other, why = found
        slowest = max(slowest, (mine, name))
        if other is not None:
            total, rival = total + mine, rival + other
            slower += [name] * (mine > other)
        told = why[:60] if other is None else f"{other:16.3f}"
        print(f"{name:40} {export:9.2f} {mine:11.3f} {told:>16}   {os.getloadavg()[0]:.1f}", flush=True)
    print(f"where both finish: ours {total:.2f} s, Torch-Pruning {rival:.2f} s; ours is slower on {', '.join(slower) or 'none'}")
    print(f"our slowest analysis: {slowest[0]:.3f} s, {slowest[1]}; {os.cpu_count()} cores")


def scaling() -> None:
    import tests.torchvision_ops  # noqa: F401, I001  # before transformers, which imports torchvision
    from transformers import LlamaConfig, LlamaForCausalLM

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
            f"{layers:6} {len(program.nodes):6} {exported:9.2f} {statistics.median(ours(program) for _ in range(RUNS)):11.3f} {len(program.groups):7}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["scaling"]:
        scaling()
    elif sys.argv[1:2] == ["torchvision"]:
        torchvision(sys.argv[2] if len(sys.argv) > 2 else "*")
    else:
        sys.exit(__doc__)
