"""Every dim rule of ATen against brute force: remove a unit, run the op, compare with the masked op."""

import pytest
import torch

from graphprune.analysis import analyze
from graphprune.program import Program
from graphprune.rules import RULES
from graphprune.rules.aten import ATEN
from graphprune.rules.aten_elementwise import ELEMENTWISE, opaque, unary
from graphprune.rules.engine import Engine
from graphprune.rules.scans import SCANS
from graphprune.verify.rule_check import Verdict, check_program
from tests.samples_aten import SAMPLES, Sample

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_op_has_a_sample() -> None:
    registered = {("aten", op) for op in ATEN} | {("graphprune", op) for op in SCANS}
    assert registered <= {(s.domain, s.op) for s in SAMPLES}, "each op with a rule needs a row in samples_aten.py"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_rule(sample: Sample) -> None:
    if sample.op == "quantile" and torch.__version__ < "2.13":
        pytest.skip("torch.export of this version rejects torch.quantile: it compares values")
    program = sample.program()
    assert (sample.domain, sample.op) in {node.op for node in program.nodes}, "the sample does not hold its op"
    assert not analyze(program, free_border=True).engine.unknown
    errors = [f for f in check_program(program) if f.is_error and not (sample.blind and f.verdict is Verdict.BLIND)]
    assert not errors, "\n".join(map(str, errors))


@pytest.mark.parametrize("op", [op for op, rule in ELEMENTWISE.items() if rule is unary])
def test_zero_at_zero(op: str) -> None:
    dtype = torch.complex64 if op in ("imag",) else torch.float64
    rest = {"native_dropout": (0.0, False), "dropout": (0.5, False), "feature_dropout": (0.5, False), "alpha_dropout": (0.5, False)}.get(
        op, ()
    )
    result = getattr(torch.ops.aten, op)(torch.zeros(3, dtype=dtype), *rest)
    assert not (result[0] if isinstance(result, tuple) else result).any()


def _sample(name: str) -> Program:
    return next(s for s in SAMPLES if s.name == name).program()


def _equal_sizes_are_equal_axes(engine: Engine, node) -> None:  # type: ignore[no-untyped-def]
    """Wrong: a transposition that keeps the order of the axes."""
    engine.set(node.outputs[0], engine.axes(node["self"]))
    engine.flow(node.outputs[0], [node["self"]])


def _keeps_the_order(engine: Engine, node) -> None:  # type: ignore[no-untyped-def]
    """Wrong: a flip that claims to keep the order of positions."""
    engine.set(node.outputs[0], engine.axes(node["self"]))
    engine.flow(node.outputs[0], [node["self"]])


@pytest.mark.parametrize(
    "name, op, rule, verdict",
    [
        ("flip-0", "flip", _keeps_the_order, Verdict.WRONG),
        ("exp-0", "exp", unary, Verdict.ALIVE),
        ("relu-0", "relu", opaque, Verdict.CAUTIOUS),
        ("sum-2", "sigmoid", unary, Verdict.WRONG),
        ("linear-1", "linear", "input[b i] weight[o j] -> b o", Verdict.BROKEN),
        ("softmax-0", "softmax", _equal_sizes_are_equal_axes, Verdict.WRONG),
    ],
)
def test_wrong_rules_are_found(name: str, op: str, rule, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    program = _sample(name)
    assert verdict not in {f.verdict for f in check_program(program)}
    monkeypatch.setitem(RULES, ("aten", op), rule)
    assert verdict in {f.verdict for f in check_program(program)}
