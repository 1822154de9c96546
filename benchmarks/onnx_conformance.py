"""How much of ONNX's own backend test suite the torch lowering passes.

    python -m benchmarks.onnx_conformance            # by op, the names that fail, and the totals
    python -m benchmarks.onnx_conformance resize     # only cases whose name holds the word, with what is wrong

Counted are the operator tests (`node`) and the models that the onnx package ships: `simple`, `pytorch-converted`, `pytorch-operator`, and
`light`, nine image classifiers whose weights are fills.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests
from onnx.version_converter import convert_version

from graphprune.capture.onnx_file import OLDEST_OPSET, capture_onnx
from graphprune.capture.onnx_types import to_torch
from graphprune.errors import InvalidInput, UnsupportedOp
from graphprune.execute.interpreter import run
from graphprune.execute.onnx_narrow import decode

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")
TRAINING = "ai.onnx.preview.training"
_NO_TENSOR = ("seq(", "optional(", "map(")


@dataclass(frozen=True)
class Outcome:
    """What became of one case: `state` is "passed", "failed" or "unsupported"; `why` says what is wrong."""

    case: str
    kind: str
    op: str  # for a model, its kind
    state: str
    why: str = ""


def cases(kinds: tuple[str, ...] = KINDS) -> list[TestCase]:
    """The official cases of these kinds, models and data loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference divides by zero on purpose
        found = [case for kind in kinds for case in load_model_tests(kind="real" if kind == "light" else kind)]
    return [_upgraded(case if case.model is not None else _loaded(case)) for case in found]


def _loaded(case: TestCase) -> TestCase:
    if case.kind == "real":
        return _light(case)
    folder = Path(str(case.model_dir))
    sets = [tuple(_protos(part, name) for name in ("input", "output")) for part in sorted(folder.glob("test_data_set_*"))]
    return replace(case, model=onnx.load(folder / "model.onnx"), data_sets=sets)


def _light(case: TestCase) -> TestCase:
    """The expected output lies beside the file; the input counts up from 0 to 1."""
    file = Path(onnx.__file__).parent.parent / str(case.url)
    model = onnx.load(file)
    held = {tensor.name for tensor in model.graph.initializer}
    (entry,) = [value for value in model.graph.input if value.name not in held]
    shape = [size.dim_value or 1 for size in entry.type.tensor_type.shape.dim]
    ramp = (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)
    expected = onnx.TensorProto.FromString(file.with_name(f"{file.stem}_output_0.pb").read_bytes())
    return replace(case, kind="light", model=model, data_sets=[([ramp], [expected])])


def _upgraded(case: TestCase) -> TestCase:
    """The model at the oldest opset that capture reads, converted as its error message says."""
    opset = next((entry.version for entry in case.model.opset_import if not entry.domain), OLDEST_OPSET)
    return case if opset >= OLDEST_OPSET else replace(case, model=convert_version(case.model, OLDEST_OPSET))


def _protos(folder: Path, name: str) -> list[onnx.TensorProto]:
    files = sorted(folder.glob(f"{name}_*.pb"), key=lambda file: int(file.stem.split("_")[1]))
    return [onnx.TensorProto.FromString(file.read_bytes()) for file in files]


def outside(model: onnx.ModelProto) -> bool:
    """Is the case not about tensors? Training-domain ops, and any value that is a sequence, an optional or a map, make it so."""
    if any(not value.type.HasField("tensor_type") for value in (*model.graph.input, *model.graph.output) if value.HasField("type")):
        return True
    return any(node.domain == TRAINING or _needs_no_tensor(node) for node in _nodes(model.graph))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g) if attribute.HasField("g") else ()


def _needs_no_tensor(node: onnx.NodeProto) -> bool:
    """Does an operand or result of this op have to be a sequence, an optional or a map?"""
    try:
        schema = onnx.defs.get_schema(node.op_type, node.domain)
    except onnx.defs.SchemaError:
        return False
    return any(formal.types and all(kind.startswith(_NO_TENSOR) for kind in formal.types) for formal in (*schema.inputs, *schema.outputs))


def tensor(value: Any) -> torch.Tensor:
    """An operand of a case in torch.

    Raises:
        UnsupportedOp: it is a string, a sequence or nothing.
    """
    proto = ir.from_proto(value) if isinstance(value, onnx.TensorProto) else None
    if proto is None and not (isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiubcV"):
        raise UnsupportedOp(f"an operand is a {type(value).__name__}, not a tensor of numbers")
    found = to_torch(proto if proto is not None else ir.tensor(np.asarray(value)))
    if found is None:
        raise UnsupportedOp(f"an operand is of type {proto.dtype if proto is not None else value.dtype}, which torch does not have")
    return found


def check(case: TestCase, dtype: torch.dtype | None = None) -> str:
    """What is wrong with the lowering of a case, "" if nothing is; `dtype` runs it in that floating type.

    Raises:
        UnsupportedOp: it cannot be tried.
    """
    for inputs, expected in case.data_sets:
        tensors, wanted = [tensor(value) for value in inputs], [tensor(value) for value in expected]
        program = capture_onnx(case.model, tensors)
        for want, have in zip(wanted, run(program, program.example_inputs, dtype=dtype), strict=True):
            computed = dtype if dtype is not None and want.is_floating_point() and want.itemsize > 1 else want.dtype
            if have.dtype != computed or have.shape != want.shape:
                return f"{have.dtype} {list(have.shape)} where {computed} {list(want.shape)} is expected"
            coarse = want.dtype in (torch.float16, torch.bfloat16)
            a, b = (decode(t).to(torch.complex128 if t.is_complex() else torch.float64) for t in (have, want))
            rtol, atol = (1e-2, 1e-2) if coarse else (max(case.rtol, 1e-3), max(case.atol, 1e-5))
            if not torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True):
                return f"values differ by {(a - b).abs().max():.2e}"
    return ""


def outcome(case: TestCase) -> Outcome:
    """The case, tried; never raises."""
    op = case.model.graph.node[0].op_type if case.kind == "node" else case.kind
    try:
        why = check(case)
    except (UnsupportedOp, InvalidInput) as error:
        return Outcome(case.name, case.kind, op, "unsupported", _first_line(error))
    except Exception as error:  # whatever a lowering raises is a failure of its case
        return Outcome(case.name, case.kind, op, "failed", _first_line(error))
    return Outcome(case.name, case.kind, op, "failed" if why else "passed", why)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def main(words: list[str]) -> None:
    every = [case for case in cases() if not words or any(word in case.name for word in words)]
    inside = [case for case in every if not outside(case.model)]
    by_op: dict[str, list[Outcome]] = defaultdict(list)
    for case in inside:
        found = outcome(case)
        by_op[found.op].append(found)
    for op, found in sorted(by_op.items()):
        missed = [o for o in found if o.state != "passed"]
        print(f"{op:32} {len(found) - len(missed):4} of {len(found):4}  " + " ".join(o.case.removeprefix("test_") for o in missed))
        for o in missed if words else ():
            print(f"    {o.case}: {o.state}: {o.why}")
    for label, kinds in (("node", ("node",)), ("models", KINDS[1:])):
        states = [o.state for found in by_op.values() for o in found if o.kind in kinds]
        passed, total = states.count("passed"), len(states)
        left_out = sum(case.kind in kinds for case in every) - total
        print(
            f"{label}: {passed} passed / {total - states.count('unsupported')} supported / {total} in all "
            f"({passed / max(total, 1):.1%}); {left_out} left out: training ops, sequences, optionals, maps"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
