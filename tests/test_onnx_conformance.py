"""The tests that the onnx package ships for backends, run through capture and the torch lowering: as they are, in float64, with
gradients, and whole files under `torch.compile`."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from benchmarks.onnx_conformance import KINDS, TRAINING, cases, check, outcome, outside, tensor
from graphprune.capture.onnx_file import capture_onnx
from graphprune.execute.interpreter import run
from graphprune.execute.module import ProgramModule
from graphprune.execute.onnx_ops import ONNX_OPS
from graphprune.execute.shape_numbers import with_numbers
from graphprune.program import Value
from graphprune.rules.onnx_literals import LITERAL_OPERANDS

# Cases that are not passed: pattern -> why. What is left out beforehand is said by `benchmarks.onnx_conformance.outside`.
EXPECTED = {
    r"test_(string_|strnorm|regex_full_match|equal_string|ai_onnx_ml_label_encoder)": "torch has no strings",
    r"test_image_decoder": "a file format, decoded before the network",
    r"test_bernoulli": "drawn from another generator",
    r"test_training_dropout_(default|mask)|test_training_dropout$": "noise; a network is pruned as it is run",
    r"test_resize_downsample_scales_(linear|cubic)_align_corners": "with the whole output size, as ONNX Runtime, not the fractional one",
    r"test_PReLU_[123]d_multiparam": "opset 6: onnx's converter leaves the slope at the last axis",
}
# In float64 every float of the network is one: its bits are others, and a scale found on the way rounds a tie the other way.
NOT_IN_DOUBLE = r"test_bitcast_(\w*float32_to_int32|int32_to_float32)|test_dynamicquantizelinear(_expanded)?$"
# Differentiable in ONNX's schema, but without effect here, or given at a point where there is a kink.
NO_GRADIENT = r"test_hardmax|test_batchnorm_\w+_training_mode"
KINKS = (
    r"test_(elu|leakyrelu|selu|thresholdedrelu)_example|test_reduce_min_default_axes_keepdims_example|test_mod_float_edge_cases_fmod_0"
    r"|test_maxpool_3d_dilations|test_l2normalization_axis_0"
)
PARTS = 8


@cache
def _inside(kind: str):
    return [case for case in cases((kind,)) if not outside(case.model)]


@pytest.mark.parametrize(
    "kinds, step, floor",
    [
        pytest.param(("node",), 1, 0.97, id="node", marks=pytest.mark.slow),
        pytest.param(("node",), 4, 0.96, id="every fourth node"),
        pytest.param(KINDS[1:], 1, 0.93, id="models"),
    ],
)
def test_official_cases(kinds, step, floor):
    found = [outcome(case) for kind in kinds for case in _inside(kind)[::step]]
    missed = {o.case: o.why for o in found if o.state != "passed"}
    assert {name: why for name, why in missed.items() if not any(re.match(pattern, name) for pattern in EXPECTED)} == {}
    assert len(found) - len(missed) >= floor * len(found)
    assert len(found) > (1800 if kinds == ("node",) else 130) // step


@pytest.mark.parametrize("pattern", EXPECTED)
def test_what_is_expected_to_fail_still_does(pattern):
    states = [outcome(case).state for kind in KINDS for case in _inside(kind) if re.match(pattern, case.name)]
    assert states and set(states) <= {"failed", "unsupported"}


def test_what_is_left_out_is_training_sequences_optionals_and_maps():
    left_out = [case for case in cases(("node",)) if outside(case.model)]
    assert len(left_out) < 45
    for case in left_out:
        kinds = {value.type.WhichOneof("value") for value in (*case.model.graph.input, *case.model.graph.output)}
        ops = " ".join(node.op_type for node in case.model.graph.node)
        assert kinds != {"tensor_type"} or re.search("Sequence|Optional", ops) or case.model.graph.node[0].domain == TRAINING


def _part(part: int):
    """Every eighth case that passes."""
    return [case for case in _inside("node")[part::PARTS] if not any(re.match(pattern, case.name) for pattern in EXPECTED)]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_in_float64(part):
    """No step of a lowering forces float32: certificates in float64 are as fine as they say."""
    wrong = {case.name: check(case, torch.float64) for case in _part(part) if not re.match(NOT_IN_DOUBLE, case.name)}
    assert {name: why for name, why in wrong.items() if why} == {}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_gradients_where_the_operator_has_them(part):
    """Whatever ONNX's schema calls differentiable has the derivative that a difference in float64 finds."""
    found = {case.name: _gradient_fault(case) for case in _part(part) if not re.match(f"{NO_GRADIENT}|{KINKS}", case.name)}
    assert {name: why for name, why in found.items() if why} == {}


def _differentiable(formals, names, exists) -> list[str]:
    wanted = onnx.defs.OpSchema.DifferentiationCategory.Differentiable
    last = len(formals) - 1  # a variadic one stands for all that follow
    return [n for i, n in enumerate(names) if n in exists and formals[min(i, last)].differentiation_category == wanted]


def _gradient_fault(case, step: float = 1e-6) -> str:
    """What is wrong with the gradients of a case of one node, "" if nothing is: one direction for all operands together."""
    graph = case.model.graph
    node = graph.node[0]
    schema = onnx.defs.get_schema(node.op_type, node.domain)
    tensors = dict(zip([value.name for value in graph.input], map(tensor, case.data_sets[0][0])))
    learned = [n for n in _differentiable(schema.inputs, node.input, tensors) if tensors[n].is_floating_point() and tensors[n].itemsize > 1]
    if len(graph.node) > 1 or not learned or not all(tensors[n].numel() for n in learned):
        return ""
    program = capture_onnx(case.model, list(tensors.values()))
    wanted = _differentiable(schema.outputs, node.output, [value.name for value in graph.output])
    generator = torch.Generator().manual_seed(0)
    start = {name: tensors[name].double().requires_grad_() for name in learned}
    direction = {name: torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.1 for name, x in start.items()}
    weights: dict[str, torch.Tensor] = {}

    def total(operands) -> torch.Tensor:
        results = dict(zip([value.name for value in graph.output], run(program, list((tensors | operands).values()), dtype=torch.float64)))
        smooth = {n: y for n in wanted if (y := results[n]).is_floating_point() and y.itemsize > 1 and y.numel()}
        for name, y in smooth.items():
            weights.setdefault(name, torch.rand(y.shape, generator=generator, dtype=torch.float64))
        return sum(((y.nan_to_num(0, 0, 0) * weights[name]).sum() for name, y in smooth.items()), torch.zeros(()))

    with torch.enable_grad():
        y = total(start)
        if not y.requires_grad:
            return "" if not weights else "no gradient"
        found = torch.autograd.grad(y, list(start.values()), allow_unused=True)
    if any(gradient is None for gradient in found):
        return f"no gradient for {[name for name, gradient in zip(start, found) if gradient is None]}"
    slope = float(sum((gradient * direction[name]).sum() for name, gradient in zip(start, found)))
    with torch.no_grad():
        ahead, behind = (float(total({n: x + sign * step * direction[n] for n, x in start.items()})) for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    return (
        ""
        if abs(difference - slope) <= 1e-4 * max(abs(slope), abs(difference), 1e-2)
        else f"gradient {slope:.6g}, difference {difference:.6g}"
    )


def test_a_wrong_lowering_is_noticed(monkeypatch):
    case = next(case for case in _inside("node") if case.name == "test_sigmoid")
    assert check(case) == "" and _gradient_fault(case) == ""
    monkeypatch.setitem(ONNX_OPS, ("", "Sigmoid"), lambda X: torch.sigmoid(X) + 1)
    assert "differ" in check(case) and outcome(case).state == "failed"
    monkeypatch.setitem(ONNX_OPS, ("", "Sigmoid"), lambda X: torch.sigmoid(X).detach())
    assert _gradient_fault(case) == "no gradient"
    monkeypatch.setitem(ONNX_OPS, ("", "Sigmoid"), lambda X: torch.sigmoid(X.float()).to(X.dtype))  # float32 in between
    assert check(case) == "" and "difference" in _gradient_fault(case)
    monkeypatch.delitem(ONNX_OPS, ("", "Sigmoid"))
    assert outcome(case).state == "unsupported"


# --- torch.compile ------------------------------------------------------------------------------------------------------------


def _cnn() -> tuple[onnx.ModelProto, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    return torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto, [x]


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, ids):
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        return self.head(self.block(self.embed(ids), src_mask=mask))


def _transformer() -> tuple[onnx.ModelProto, list[torch.Tensor]]:
    torch.manual_seed(0)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    ids = [torch.randint(0, 50, shape) for shape in ((2, 7), (3, 9), (5, 4))]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = torch.onnx.export(_Decoder().eval(), (ids[0],), dynamo=True, verbose=False, dynamic_shapes=sizes).model_proto
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return model, ids


def _quantized() -> tuple[onnx.ModelProto, list[torch.Tensor]]:
    """Activations through uint8, a weight in blocks of int4, and integer products with scales found on the way."""
    int4 = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [8, 6], [(5 * i) % 16 - 8 for i in range(48)])
    scales = onnx.numpy_helper.from_array(np.linspace(0.1, 0.4, 24, dtype=np.float32).reshape(4, 6), "ws")
    int8 = onnx.numpy_helper.from_array(np.arange(-9, 9, dtype=np.int8).reshape(6, 3), "w8")
    graph = onnx.parser.parse_graph("""
        g (float[N, 8] x) => (float[N, 3] y)
        <float xs = {0.05}, uint8 xz = {120}, float s8 = {0.02}>
        {
            q = QuantizeLinear(x, xs, xz)
            d = DequantizeLinear(q, xs, xz)
            wd = DequantizeLinear <axis = 0, block_size = 2> (w, ws)
            h = MatMul(d, wd)
            a, hs, hz = DynamicQuantizeLinear(h)
            p = MatMulInteger(a, w8, hz)
            f = Cast <to = 1> (p)
            t = Mul(hs, s8)
            y = Mul(f, t)
        }""")
    graph.initializer.extend([int4, scales, int8])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return model, [torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (4, 7)]


FILES = {"cnn": _cnn, "transformer": _transformer, "quantized": _quantized}


@pytest.mark.parametrize(
    "name, backend",
    [pytest.param(n, b, marks=[pytest.mark.slow] * (b == "inductor" or n == "transformer")) for b in ("eager", "inductor") for n in FILES],
)
def test_lowerings_compile_without_a_break(name, backend):
    model, inputs = FILES[name]()
    program = capture_onnx(model, inputs[:1])
    module = ProgramModule(program)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for x in inputs:  # the further ones at other sizes
        (expected,) = run(program, [x])
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    if name != "quantized":
        compiled(inputs[0]).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_the_quantized_file_is_what_onnxruntime_computes():
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = _quantized()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in inputs:
        (expected,), (have,) = session.run(None, {"x": x.numpy()}), run(capture_onnx(model, [x]), [x])
        torch.testing.assert_close(have, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_shape_arithmetic_becomes_numbers_and_nothing_else_changes():
    model, inputs = _transformer()
    program = capture_onnx(model, inputs[:1])
    assert sum(node.op_type == "Shape" for node in program.nodes) > 0
    rewritten = with_numbers(program)
    literals = [
        (node.name, argument)
        for node in rewritten.nodes
        for argument in LITERAL_OPERANDS.get(node.op_type, ())
        if isinstance(value := node.args.get(argument), Value) and not isinstance(_result(rewritten, value, inputs[0]), (int, list))
    ]
    assert literals == []
    for x in inputs:
        assert torch.equal(run(rewritten, [x])[0], run(program, [x])[0])


def _result(program, wanted, x):
    found = []

    def note(node, args, compute):
        results = compute(args)
        found.extend(result for value, result in zip(node.outputs, results) if value is wanted)
        return results

    run(program, [x], intercept=note)
    return found[0]


def test_graphs_with_control_flow_stay_as_they_are_and_run():
    case = next(case for case in _inside("node") if case.name == "test_loop11")
    operands = [tensor(value) for value in case.data_sets[0][0]]
    program = capture_onnx(case.model, operands)
    assert with_numbers(program) is program
    for have, want in zip(ProgramModule(program)(*operands), case.data_sets[0][1]):
        torch.testing.assert_close(have, tensor(want))


def test_a_definition_by_other_operators_runs_in_float64_and_gives_gradients():
    case = next(case for case in _inside("node") if case.name == "test_flexattention_soft_cap")
    assert (case.model.graph.node[0].domain, case.model.graph.node[0].op_type) not in ONNX_OPS
    operands = [tensor(value).double() for value in case.data_sets[0][0]]
    program = capture_onnx(case.model, [x.float() for x in operands])
    assert torch.autograd.gradcheck(lambda *x: run(program, x, dtype=torch.float64)[0], [x.requires_grad_() for x in operands])
