"""The real ONNX files through the command line: `graphprune prune FILE -o OUT --ratio 0.3`, each in a process of its own.

    python -m benchmarks.onnx_prune [id ...]

Per file: exit code, parameters left, certificate, whether ONNX Runtime loads and runs the result, and whether all else (names, opsets, metadata,
weights that were not cut) is as it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def differences(before: Path, after: Path) -> list[str]:
    """What the cut changed besides sizes: inputs, outputs, opsets, metadata, nodes, weights that kept their shape.

    A node may go where all that it computes is sizes: after a cut they are written as constants, or would be wrong.
    """
    a, b = onnx.load(before), onnx.load(after)
    found = []
    for what, of in BORDERS.items():
        lost = [item for item in of(a) if item not in of(b)]
        found += [f"{what} {item}" for item in lost]
    nodes, kept = list(_walk(a.graph)), {node.name: node for node in _walk(b.graph) if node.name}
    producers = {name: node for node in nodes for name in node.output}
    integers = {it.name for it in a.graph.initializer if it.data_type in INTEGERS}
    for node in nodes:
        twin = kept.get(node.name)
        fine = twin.op_type == node.op_type if twin is not None else not node.name or _is_size(node, producers, integers)
        if not fine:
            found.append(f"node {node.name} ({node.op_type})")
    weights = {it.name: it for it in b.graph.initializer}
    for it in a.graph.initializer:
        same = weights.get(it.name)
        if it.data_type not in INTEGERS and (
            same is None or (same.dims == it.dims and not np.array_equal(numpy_helper.to_array(same), numpy_helper.to_array(it), equal_nan=True))
        ):
            found.append(f"weight {it.name}")
    return found


BORDERS: dict[str, Callable[[onnx.ModelProto], list]] = {
    "input": lambda m: [v.name for v in m.graph.input if v.name not in {it.name for it in m.graph.initializer}],
    "output": lambda m: [v.name for v in m.graph.output],
    "opset": lambda m: [(o.domain, o.version) for o in m.opset_import],
    "metadata": lambda m: [(p.key, p.value) for p in m.metadata_props],
    "header": lambda m: [("IR", max(m.ir_version, 4)), ("producer", m.producer_name, m.producer_version), ("graph", m.graph.name)],
}
INTEGERS = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


def _walk(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk(attribute.g)


def _is_size(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], integers: set[str]) -> bool:
    """Does a node compute with sizes and integer constants only?"""
    if node.op_type in ("Shape", "Size"):
        return True
    if node.op_type == "Constant":
        held = node.attribute[0]
        return held.t.data_type in INTEGERS if held.name == "value" else held.name in ("value_int", "value_ints")
    return bool(node.input) and all(
        not name or name in integers or (name in producers and _is_size(producers[name], producers, integers)) for name in node.input
    )


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
                print(f"{name:20} {done.returncode:4} {done.stderr.strip().splitlines()[-1][:250] if done.stderr.strip() else ''}", flush=True)
                continue
            report = json.loads(done.stdout)
            kept = report["after"]["params"] / report["before"]["params"]
            proof = report["certificate"]
            ran = report["after"]["latency"] is not None  # measured by ONNX Runtime on the saved graph
            speed = report["before"]["latency"]["median_ms"] / report["after"]["latency"]["median_ms"] if ran else float("nan")
            changed = differences(Path(path), out)
            good += kept <= 0.85 and proof["status"] == "passed" and ran and not changed
            same = f"NO: {', '.join(changed[:3])}" if changed else "yes"
            print(f"{name:20} {0:4} {kept:11.3f} {proof['status']:>16} {proof['error']:8.0e} {speed:9.2f}  {same}", flush=True)
    print(f"{good} files: 15 % fewer parameters, proved, run by ONNX Runtime, nothing else changed")


if __name__ == "__main__":
    main()
