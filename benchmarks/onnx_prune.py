"""The real ONNX files through the command line: `graphprune prune FILE -o OUT --ratio 0.3`, each in a process of its own.

    python -m benchmarks.onnx_prune [id ...]

Per file: exit code, parameters left, certificate, whether ONNX Runtime loads and runs the result, and whether names, opsets and metadata are as they were.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx


def unchanged(before: Path, after: Path) -> bool:
    """Inputs, outputs, node names, opsets and metadata of the original are all in the result."""
    a, b = onnx.load(before, load_external_data=False), onnx.load(after, load_external_data=False)
    names = {n.name for n in a.graph.node} <= {n.name for n in b.graph.node}
    borders = [[v.name for v in it] for it in (a.graph.input, a.graph.output)] == [[v.name for v in it] for it in (b.graph.input, b.graph.output)]
    opsets = {(o.domain, o.version) for o in a.opset_import} <= {(o.domain, o.version) for o in b.opset_import}
    metadata = {(p.key, p.value) for p in a.metadata_props} <= {(p.key, p.value) for p in b.metadata_props}
    return names and borders and opsets and metadata


def main() -> None:
    from benchmarks.onnx_files import FILES, find

    good = 0
    print(f"{'file':20} {'exit':>4} {'params kept':>11} {'certificate':>16} {'error':>8} {'latency x':>9}  unchanged")
    for name in sys.argv[1:] or FILES:
        path = find(name)
        if path is None:
            print(f"{name:20} not fetched: python -m benchmarks.onnx_files")
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "small.onnx"
            command = [sys.executable, "-m", "graphprune", "prune", str(path), "-o", str(out), "--ratio", "0.3", "--json", "--quiet"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                print(f"{name:20} {done.returncode:4} {done.stderr.strip().splitlines()[-1][:150] if done.stderr.strip() else ''}", flush=True)
                continue
            report = json.loads(done.stdout)
            kept = report["after"]["params"] / report["before"]["params"]
            proof = report["certificate"]
            ran = report["after"]["latency"] is not None  # measured by ONNX Runtime on the saved graph
            speed = report["before"]["latency"]["median_ms"] / report["after"]["latency"]["median_ms"] if ran else float("nan")
            same = unchanged(Path(path), out)
            good += kept <= 0.85 and proof["status"] == "passed" and ran and same
            print(f"{name:20} {0:4} {kept:11.3f} {proof['status']:>16} {proof['error']:8.0e} {speed:9.2f}  {'yes' if same else 'NO'}", flush=True)
    print(f"{good} files: 15 % fewer parameters, proved, run by ONNX Runtime, nothing else changed")


if __name__ == "__main__":
    main()
