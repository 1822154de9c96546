"""Passes print and parse, each is verified and timed, and a planted wrong one is found by bisection."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphprune as gp
from graphprune.errors import InvalidInput, VerificationFailed
from graphprune.execute.interpreter import run
from graphprune.execute.likeness import distance
from graphprune.pass_manager import Pass, PassManager, State, Step, bisect, parse
from graphprune.passes import PASSES
from graphprune.passes.cleanup import CleanupPass
from graphprune.passes.structured import StructuredPass
from graphprune.plan import Plan

WORDS = st.sampled_from(["channel", "a.b.weight", "none", "true", "features.*", "re:^x{2,}$", "", 'say "so"', "12", "a,b", "a+b", "näh"])
SCALARS = WORDS | st.booleans() | st.none() | st.integers(-9, 9**9) | st.floats(allow_nan=False)


class Deep(nn.Module):
    """Five blocks, so that there are enough steps to bisect, and a table that is read in part."""

    def __init__(self):
        super().__init__()
        widths = (9, 11, 13, 15, 17, 19)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1], 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
            x = x + torch.arange(x.shape[1]) * 0.01
            x = x[:].reshape(x.shape)
        unused = x.sum()  # noqa: F841
        return self.last(x)


@pytest.fixture
def program():
    torch.manual_seed(0)
    return gp.capture(Deep(), torch.randn(4, 9))


@given(st.builds(
    StructuredPass,
    ratio=st.none() | st.floats(0, 0.99) | st.dictionaries(WORDS, st.floats(0, 0.99), max_size=3),
    budget=st.none() | st.dictionaries(WORDS, SCALARS, max_size=2),
    units=st.lists(WORDS, max_size=3).map(tuple),
    importance=WORDS,
    ignore=st.lists(WORDS, max_size=2).map(tuple),
    round_to=st.just("auto") | st.integers(1, 64),
))  # fmt: skip
def test_a_pass_is_what_its_text_says(each):
    assert parse(str(each), PASSES) == (each,)


@given(st.lists(SCALARS, max_size=4).map(tuple))
def test_every_kind_of_value_survives(values):
    assert parse(str(StructuredPass(ignore=values)), PASSES) == (StructuredPass(ignore=values),)


def test_a_pipeline_reads_as_it_prints():
    text = "prune{ratio=0.5,units=channel+head},cleanup,verify"
    manager = PassManager.parse(text, PASSES)
    assert str(manager) == text
    assert manager.passes[0] == StructuredPass(ratio=0.5, units=("channel", "head"))
    assert PassManager.parse(" prune { ratio = 0.5 , units = channel + head } , cleanup , verify ", PASSES) == manager


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prun", "no pass is named 'prun'; known are prune"),
        ("prune{rate=1}", "no option 'rate'; it has ratio"),
        ("prune{ratio=0.5", "expected , before"),
        ("prune{ratio}", "expected = before"),
        ("prune;verify", "';' at position 5"),
        ("prune,", "found 'the end'"),
        ("cleanup{rewrites=scrub+}", "knows the rewrites"),
        ("prune{ignore=a+b:1}", "expected , before"),
    ],
)
def test_what_is_no_pipeline_is_refused(text, message):
    with pytest.raises(InvalidInput, match=message):
        parse(text, PASSES)


def test_each_pass_is_timed_measured_and_verified(program):
    outcome = PassManager.parse("prune{ratio=0.4,round_to=1},cleanup,verify", PASSES).run(program)
    prune, cleanup, verify = outcome.runs
    assert prune.after.params < prune.before.params and prune.after.macs < prune.before.macs
    assert len(prune.steps) == 5 and prune.certificate.passed and prune.seconds > 0
    assert cleanup.steps == ("fold", "identity", "dead") and cleanup.nodes[1] < cleanup.nodes[0]
    assert cleanup.after.params == prune.after.params and cleanup.certificate.passed
    assert verify.certificate.passed and len(verify.certificate.seeds) == 3 and verify.effect == "nothing changed"
    assert "parameters 1" in prune.effect and "nodes" in cleanup.record.effect and "5 steps" in str(outcome)
    assert outcome.state.plans[0].removed == outcome.state.cut.removed


def test_cleanup_leaves_what_is_computed_and_can_be_trained(program):
    state = PassManager.parse("prune{ratio=0.4,round_to=1},cleanup", PASSES).run(program).state
    before = PassManager.parse("prune{ratio=0.4,round_to=1}", PASSES).run(program).state
    x = torch.randn(4, 9)
    assert torch.equal(run(state.program, (x,))[0], run(before.program, (x,))[0])
    module = state.program.source.graph_module
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in before.program.source.graph_module.named_parameters()}
    names = {n.target._schema.name for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert names & {"aten::index_select", "aten::reshape", "aten::slice", "aten::sum"} == set()
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_passes_after_each_other_cut_more(program):
    text = "prune{ratio=0.3,round_to=1},cleanup,prune{ratio=0.3,round_to=1,importance=random},verify"
    outcome = PassManager.parse(text, PASSES).run(program)
    params = [run.after.params for run in outcome.runs]
    assert params[0] > params[2] and len(outcome.state.plans) == 2 and outcome.state.certificate.passed


def test_a_saved_plan_is_a_pass(program, tmp_path):
    Plan.of(program, {"layers.0:neuron": [1, 2], "layers.3:neuron": [0]}).save(tmp_path / "plan.json")
    outcome = PassManager.parse(f'apply{{path="{tmp_path}/plan.json"}}', PASSES).run(program)
    assert outcome.state.cut.removed == {"layers.0:neuron": (1, 2), "layers.3:neuron": (0,)} and outcome.state.certificate.passed


def test_fuel_stops_a_pipeline_anywhere(program):
    for fuel, cut, cleaned in ((0, 0, 0), (3, 3, 0), (5, 5, 0), (6, 5, 1), (99, 5, 3)):
        manager = replace(PassManager.parse("prune{ratio=0.4,round_to=1},cleanup", PASSES), fuel=fuel)
        outcome = manager.run(program)
        assert (len(outcome.state.cut.removed), len(outcome.runs[1].steps)) == (cut, cleaned)


@dataclass(frozen=True)
class OffByOnePass(Pass):
    """Scales nothing, step by step, but one step shifts a weight by one position."""

    name: ClassVar[str] = "off_by_one"
    wrong: int = 2

    def steps(self, state: State) -> Sequence[Step]:
        return [Step(name, i) for i, name in enumerate(state.program.weights) if name.endswith("weight")]

    def apply(self, state: State, steps: Sequence[Step]) -> State:
        module = state.program.source.graph_module
        for step in steps:
            if step.what == self.wrong:
                parameter = module.get_parameter(step.name)
                weights = {**dict(module.named_parameters()), **dict(module.named_buffers()), step.name: nn.Parameter(parameter.roll(1, 0))}
                return _with_weights(state, weights)
        return state


def _with_weights(state, weights):
    from graphprune.capture.torch_export import from_graph_module

    old = state.program.source.graph_module
    module = torch.fx.GraphModule(weights, old.graph, "Edited")
    source = replace(state.program.source, graph_module=module, values={})
    return replace(state, program=from_graph_module(module, state.program.example_inputs, source))


@pytest.mark.parametrize("wrong", [0, 2, 6, 10])
def test_bisection_finds_the_planted_step(program, wrong):
    passes = (StructuredPass(ratio=0.4, round_to=1), OffByOnePass(wrong), CleanupPass())
    with pytest.raises(VerificationFailed, match=r"after off_by_one.*bisect"):
        PassManager(passes).run(program)
    found = bisect(passes, program)
    # ten weights and biases in the order of the module, each second a weight; five steps of pruning come before
    assert (found.name, found.index) == (str(passes[1]), 5 + wrong // 2)
    assert found.step == [n for n in program.weights if n.endswith("weight")][wrong // 2] and "VerificationFailed" in found.error


def test_bisection_of_a_right_pipeline_finds_nothing(program):
    assert bisect((StructuredPass(ratio=0.4, round_to=1), CleanupPass()), program) is None


def test_a_fault_in_surgery_is_found_at_its_group(program, monkeypatch):
    """One group's cut keeps the position after the one it should, in one tensor."""
    from graphprune.surgery import torch_graph

    real = torch_graph.sliced_weights

    def shifted(program, cut):
        out = real(program, cut)
        for value, tensor in out.items():
            if value.name == "layers.3.bias" and "layers.3:neuron" in cut.removed:
                out[value] = nn.Parameter(tensor.roll(1, 0))
        return out

    monkeypatch.setattr(torch_graph, "sliced_weights", shifted)
    found = bisect((StructuredPass(ratio=0.4, round_to=1),), program)
    assert (found.step, found.index) == ("layers.3:neuron", 3)


# ---- ONNX


@pytest.fixture
def file(tmp_path):
    """y = relu(x @ (a + a0)) @ b through an Identity, with a dead node and a metadata entry."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("a", (5, 8)), ("b", (8, 3)), ("unused", (4,)))}
    nodes = [
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.array(0.5, np.float32))),
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2.0, np.float32))),
        helper.make_node("Mul", ["half", "two"], ["one"], name="folds"),
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Mul", ["h", "one"], ["scaled"]),
        helper.make_node("Identity", ["scaled"], ["same"]),
        helper.make_node("Relu", ["same"], ["r"]),
        helper.make_node("Neg", ["r"], ["dead"]),
        helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 5), ("y", 3))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(w, name) for name, w in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def test_onnx_is_cleaned_and_what_stays_keeps_names_opset_and_metadata(file, tmp_path):
    program = gp.capture(file)
    outcome = PassManager.parse("prune{ratio=0.5,round_to=1},cleanup,verify", PASSES).run(program)
    model = outcome.state.program.source.model
    assert [n.op_type for n in model.graph] == ["MatMul", "Mul", "Relu", "MatMul"]
    assert {n.name for n in model.graph} >= {"first", "second"} and set(model.graph.initializers) == {"a", "b", "one"}
    assert model.opset_imports[""] == 13 and model.metadata_props["author"] == "somebody" and model.ir_version == 8
    assert outcome.state.certificate.passed and outcome.runs[1].nodes[1] < outcome.runs[1].nodes[0]
    assert len(program.source.model.graph) == 9, "the user's model is left as it was"
    ir.save(model, tmp_path / "out.onnx")
    x = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x})
    assert distance([torch.from_numpy(found)], run(outcome.state.program, (torch.from_numpy(x),))) < 1e-5
