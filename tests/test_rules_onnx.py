"""Every dim rule of ONNX against brute force: remove a unit, run the operator, compare with the masked operator."""

import pytest

from graphprune.capture.onnx_file import capture_onnx
from graphprune.program import Program
from graphprune.rules import RULES
from graphprune.rules.engine import Engine
from graphprune.rules.onnx import ONNX
from graphprune.surgery.cut import Cut
from graphprune.surgery.onnx_graph import apply_cut
from graphprune.verify.rule_check import Verdict, check_program, sliced
from tests.samples_onnx import SAMPLES, Sample

pytestmark = pytest.mark.filterwarnings("ignore")


def cut_and_capture(program: Program, cut: Cut) -> Program:
    """Surgery and capture again, at inputs of the sizes that are left."""
    return capture_onnx(apply_cut(program, cut), sliced(program, program.example_inputs, {v: cut.keeps(v) for v in program.inputs}))


def test_every_op_has_a_sample() -> None:
    assert set(ONNX) == {s.op for s in SAMPLES}, "each operator of rules.onnx.ONNX needs a row in samples_onnx.py"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_rule(sample: Sample) -> None:
    program = sample.program()
    errors = [f for f in check_program(program, cut_and_capture) if f.is_error and not (sample.blind and f.verdict is Verdict.BLIND)]
    assert not errors, "\n".join(map(str, errors))


def _program(name: str) -> Program:
    return next(s for s in SAMPLES if s.name == name).program()


def _untouched(engine: Engine, node) -> None:  # type: ignore[no-untyped-def]
    """Wrong: the result has the axes of the first operand, in their order."""
    engine.set(node.outputs[0], engine.axes(node.inputs[0]))
    engine.flow(node.outputs[0], [node.inputs[0]])


@pytest.mark.parametrize(
    "name, op, verdict",
    [
        ("Exp-0", "Exp", Verdict.ALIVE),
        ("Softmax-0", "Softmax", Verdict.WRONG),
        ("CumSum-0", "CumSum", Verdict.ALIVE),
        ("Trilu-0", "Trilu", Verdict.WRONG),
    ],
)
def test_wrong_rules_are_found(name: str, op: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program(name)
    assert verdict not in {f.verdict for f in check_program(program, cut_and_capture)}
    monkeypatch.setitem(RULES, ("", op), _untouched)
    assert verdict in {f.verdict for f in check_program(program, cut_and_capture)}
