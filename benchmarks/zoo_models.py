"""The benchmark zoo, and a smoke run over it: does every network build, run, and export?

    python -m benchmarks.zoo_models                      list the rows
    python -m benchmarks.zoo_models 'hf/*' --export      build, run and export those, each in a process of its own
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.zoo import diffusers, timm, torchvision, transformers
from benchmarks.zoo.row import Row

_FILES = (torchvision, timm, transformers, diffusers)
ROWS: dict[str, Row] = {row.name: row for file in _FILES for row in file.ROWS}
assert len(ROWS) == sum(len(file.ROWS) for file in _FILES), "two rows have one name"


def select(pattern: str = "*") -> list[Row]:
    """Rows whose name matches a glob, or whose family is `pattern`."""
    return [row for row in ROWS.values() if fnmatch(row.name, pattern) or row.family == pattern]


def smoke(name: str, export: bool) -> str:
    """Builds one row, checks that its output is alive, exports it if asked to; one line with parameters and seconds."""
    import torch

    from tests.randomise import check

    torch.set_num_threads(1)
    clock = [time.perf_counter()]
    case = ROWS[name].build()
    clock.append(time.perf_counter())
    check(case)
    clock.append(time.perf_counter())
    nodes = ""
    if export:
        with torch.no_grad():
            exported = torch.export.export(case.module, case.args, dict(case.kwargs), strict=False)
        nodes = f"{len(exported.graph.nodes)} nodes"
        clock.append(time.perf_counter())
    steps = zip(("build", "run", "export"), clock, clock[1:])
    seconds = " ".join(f"{step} {end - start:.1f}s" for step, start, end in steps)
    return f"{sum(p.numel() for p in case.module.parameters()) / 1e6:.3f}M {seconds} {nodes}".rstrip()


def _in_process(name: str, export: bool, limit: float) -> tuple[bool, str]:
    """`smoke` in a process that may crash or hang; whether it passed, and the line (or the last line of its traceback)."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo_models", name, "--here", *["--export"] * export]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1])
    except subprocess.TimeoutExpired:
        return False, f"no result after {limit:.0f} s"
    if done.returncode == 0:
        return True, done.stdout.strip().splitlines()[-1]
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    told = [line for line in lines if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception", "Unsupported"))]
    return False, (told or lines or [f"exit {done.returncode}"])[-1][:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", help="a glob over names, or a family")
    parser.add_argument("--export", action="store_true", help="run torch.export as well")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each row")
    parser.add_argument("--here", action="store_true", help="one row, in this process, with its traceback")
    options = parser.parse_args()
    if options.pattern is None:
        for row in ROWS.values():
            print(f"{row.name:60} {row.family:20} {row.note}")
        return 0
    if options.here:
        print(*(smoke(row.name, options.export) for row in select(options.pattern)), sep="\n")
        return 0
    count: Counter[tuple[str, bool]] = Counter()
    for row in select(options.pattern):
        start = time.perf_counter()
        passed, line = _in_process(row.name, options.export, options.limit)
        count[row.family, passed] += 1
        print(f"{'ok ' if passed else 'ERR'} {row.name:48} {time.perf_counter() - start:6.1f}s  {line}", flush=True)
    for family in dict.fromkeys(family for family, _ in count):
        print(f"{family:24} {count[family, True]} ok, {count[family, False]} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
