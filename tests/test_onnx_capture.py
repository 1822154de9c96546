"""Capture of ONNX files: arguments by their newest names, weights wherever they lie, shapes, folding, control flow, bad input."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphprune as gp
from graphprune.capture.onnx_file import capture_onnx
from graphprune.errors import CaptureError, GraphPruneError, InvalidInput
from graphprune.execute.interpreter import run
from graphprune.execute.module import ProgramModule
from graphprune.program import Kind

FLOAT = TensorProto.FLOAT


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32), name)


def info(name: str, shape, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def build(nodes, inputs, outputs, weights=(), opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def reference(model: onnx.ModelProto, program) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {v.name: x.numpy() for v, x in zip(program.inputs, program.example_inputs)})


def agree(model: onnx.ModelProto, program) -> None:
    for want, have in zip(reference(model, program), run(program, program.example_inputs)):
        assert want.shape == tuple(have.shape)
        np.testing.assert_allclose(want, have.numpy(), rtol=1e-4, atol=1e-5)


def node(program, op_type: str):
    return next(n for n in program.walk() if n.op_type == op_type)


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
def test_old_forms_get_the_newest_names(opset):
    axes = numpy_helper.from_array(np.array([1]), "axes")
    halves = numpy_helper.from_array(np.array([3, 5]), "halves")
    operands = opset >= 13
    nodes = [
        helper.make_node("Split", ["x", "halves"], ["a", "b"], axis=1)
        if operands
        else helper.make_node("Split", ["x"], ["a", "b"], axis=1, split=[3, 5]),
        helper.make_node("ReduceSum", ["a", "axes"], ["s"], keepdims=1)
        if operands
        else helper.make_node("ReduceSum", ["a"], ["s"], axes=[1], keepdims=1),
        helper.make_node("Squeeze", ["s", "axes"], ["t"]) if operands else helper.make_node("Squeeze", ["s"], ["t"], axes=[1]),
        helper.make_node("Softmax", ["b"], ["y"], axis=1),
    ]
    model = build(nodes, [info("x", ["n", 8])], [info("t", ["n"]), info("y", ["n", 5])], [axes, halves] if operands else [], opset)
    program = capture_onnx(model)
    assert list(node(program, "Split").args)[:2] == ["input", "split"]
    assert "axes" in node(program, "Squeeze").args
    assert ("to_end" in node(program, "Softmax").args) == (opset < 13)
    agree(model, program)


def test_softmax_before_opset_13_runs_over_all_later_axes():
    model = build([helper.make_node("Softmax", ["x"], ["y"])], [info("x", [2, 3, 4])], [info("y", [2, 3, 4])], opset=11)
    program = capture_onnx(model)
    assert torch.allclose(run(program, program.example_inputs)[0].sum((1, 2)), torch.ones(2))
    agree(model, program)


def test_weights_are_found_wherever_they_lie():
    nodes = [
        helper.make_node("Constant", [], ["k"], value=weight("k", 8, 6)),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Identity", ["k"], ["k2"]),
        helper.make_node("MatMul", ["a", "k2"], ["b"]),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["b", "two"], ["y"]),
    ]
    model = build(nodes, [info("x", ["n", 4]), info("w", [4, 8])], [info("y", None)], [weight("w", 4, 8)], opset=13, ir_version=3)
    program = capture_onnx(model)
    assert [v.name for v in program.inputs] == ["x"]
    assert set(program.weights) == {"w", "k"}
    assert [n.op_type for n in program.nodes] == ["MatMul", "Identity", "MatMul", "Mul"]
    assert node(program, "Mul")["B"].kind is Kind.CONSTANT
    assert program.inputs[0].dynamic == {0} and program.outputs[0].dynamic == {0}
    agree(model, program)


def test_external_weights_are_mapped_and_not_read(tmp_path):
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x", [2, 4])], [info("y", None)], [weight("w", 4, 8)])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    program = capture_onnx(tmp_path / "m.onnx")
    mapped = program.source.model.graph.initializers["w"].const_value
    assert isinstance(mapped, ir.ExternalTensor)
    assert program.weights["w"].tensor.data_ptr() == mapped.numpy().ctypes.data


def test_external_weights_that_are_mapped_are_saved(tmp_path):
    """Large ones and small ones, cut or not."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "c"], ["y"]),
    ]
    weights = [weight("w", 4, 96), weight("b", 96), weight("v", 96, 8), weight("c", 8)]
    model = build(nodes, [info("x", [2, 4])], [info("y", None)], weights)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    result = gp.compile(tmp_path / "m.onnx", pruning_ratio=0.5)
    assert result.report.before.latency is not None
    result.save(tmp_path / "out.onnx")
    saved = {w.name: list(w.dims) for w in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert saved == {"w": [4, 48], "b": [48], "v": [48, 8], "c": [8]}


def test_shape_arithmetic_is_folded_where_it_does_not_vary():
    last = numpy_helper.from_array(np.array(1), "last")
    tail = numpy_helper.from_array(np.array([2, 4]), "tail")
    first = numpy_helper.from_array(np.array(0), "first")
    zero = numpy_helper.from_array(np.array([0]), "zero")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("Gather", ["s", "last"], ["width"]),
        helper.make_node("Cast", ["width"], ["f"], to=FLOAT),
        helper.make_node("Sqrt", ["f"], ["root"]),
        helper.make_node("Div", ["h", "root"], ["d"]),
        helper.make_node("Gather", ["s", "first"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "zero"], ["n1"]),
        helper.make_node("Concat", ["n1", "tail"], ["shape"], axis=0),
        helper.make_node("Reshape", ["d", "shape"], ["y"]),
    ]
    model = build(nodes, [info("x", ["n", 4])], [info("y", None)], [weight("w", 4, 8), last, tail, first, zero])
    program = capture_onnx(model)
    assert [n.op_type for n in program.nodes] == ["MatMul", "Shape", "Div", "Gather", "Unsqueeze", "Concat", "Reshape"]
    assert node(program, "Div")["B"].kind is Kind.CONSTANT
    assert node(program, "Reshape")["shape"].kind is Kind.RESULT
    agree(model, program)


def branch(name: str, *nodes) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [info(f"{name}_out", None)], [weight(f"{name}_w", 4, 8)])


def test_both_branches_have_weights_and_shapes():
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node(
            "If",
            ["c"],
            ["y"],
            then_branch=branch("yes", helper.make_node("MatMul", ["x", "yes_w"], ["yes_out"])),
            else_branch=branch("no", helper.make_node("MatMul", ["x", "no_w"], ["t"]), helper.make_node("Relu", ["t"], ["no_out"])),
        ),
    ]
    model = build(nodes, [info("x", ["n", 4])], [info("y", None)], [numpy_helper.from_array(np.array(0, np.float32), "zero")])
    program = capture_onnx(model)
    assert set(program.weights) == {"yes_w", "no_w"}
    assert len(node(program, "If").blocks) == 2
    assert all(v.shape == (2, 8) for n in program.walk() if n.op_type in ("MatMul", "Relu") for v in n.outputs)
    agree(model, program)


def test_loop_runs_its_body():
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "lw"], ["h2"]), helper.make_node("Identity", ["go"], ["go2"])],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h", None)],
        [info("go2", [], TensorProto.BOOL), info("h2", None)],
        [weight("lw", 4, 4)],
    )
    model = build(
        [helper.make_node("Loop", ["m", ""], ["y"], body=body)],
        [info("x", ["n", 4])],
        [info("y", None)],
        [numpy_helper.from_array(np.array(3), "m")],
    )
    model.graph.node[0].input.append("x")
    program = capture_onnx(model)
    assert set(program.weights) == {"lw"}
    agree(model, program)


def test_nodes_without_a_lowering_do_not_stop_capture():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mystery", ["h"], ["m"], domain="com.example"),
        helper.make_node("Relu", ["m"], ["y"]),
    ]
    model = build(nodes, [info("x", ["n", 4])], [info("y", ["n", 8])], [weight("w", 4, 8)])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.value_info.append(info("m", ["n", 8]))
    program = capture_onnx(model)
    assert node(program, "Relu").outputs[0].shape == (2, 8)
    with pytest.raises(GraphPruneError, match=r"com\.example::Mystery"):
        run(program, program.example_inputs)


def test_example_inputs_by_name_and_in_order():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    model = build(nodes, [info("x", ["n", 4]), info("b", ["n", 8])], [info("y", None)], [weight("w", 4, 8)])
    x, b = torch.randn(5, 4), torch.randn(5, 8)
    for given in ((x, b), {"b": b, "x": x.numpy()}):
        program = capture_onnx(model, given)
        assert program.outputs[0].shape == (5, 8)
        assert program.outputs[0].dynamic == {0}
    with pytest.raises(InvalidInput, match="unknown: z"):
        capture_onnx(model, {"x": x, "b": b, "z": b})
    with pytest.raises(InvalidInput, match="2 inputs"):
        capture_onnx(model, x)
    with pytest.raises(InvalidInput, match=r"axis 1\)"):
        capture_onnx(model, (torch.randn(5, 3), b))
    with pytest.raises(CaptureError, match="does not run"):
        capture_onnx(model, (torch.randn(5, 4), torch.randn(3, 8)))


def test_the_sizes_that_work_are_searched_for():
    shape = numpy_helper.from_array(np.array([-1, 96]), "shape")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    model = build(nodes, [info("x", ["n", "t"])], [info("y", None)], [shape, weight("w", 96, 8)])
    program = capture_onnx(model)
    assert program.example_inputs[0].shape[1] % 48 == 0
    impossible = numpy_helper.from_array(np.array([-1, 97]), "shape")
    model = build(nodes, [info("x", ["n", "t"])], [info("y", None)], [impossible, weight("w", 97, 8)])
    with pytest.raises(CaptureError, match=r"'x' has \[n,t\] \(give axis 0, axis 1\)"):
        capture_onnx(model)


def test_bad_files_are_one_clear_error(tmp_path):
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x", ["n", 400])], [info("y", None)], [weight("w", 400, 8)])
    whole = tmp_path / "whole.onnx"
    onnx.save(model, whole, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert capture_onnx(whole).weights["w"].shape == (400, 8)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:-8])
    with pytest.raises(InvalidInput, match="truncated"):
        capture_onnx(whole)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InvalidInput, match="which does not exist"):
        capture_onnx(whole)
    with pytest.raises(InvalidInput, match="no ONNX file"):
        capture_onnx(tmp_path / "absent.onnx")
    for i, junk in enumerate((b"", b"not a model at all", whole.read_bytes()[:40])):
        (tmp_path / f"{i}.onnx").write_bytes(junk)
        with pytest.raises(InvalidInput):
            capture_onnx(tmp_path / f"{i}.onnx")
    model.opset_import[0].version = 5
    with pytest.raises(InvalidInput, match="opset 5"):
        capture_onnx(model)


def test_program_module_trains():
    nodes = [helper.make_node("Gemm", ["x", "fc.1/w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    model = build(nodes, [info("x", ["n", 4])], [info("y", None)], [weight("fc.1/w", 4, 8), weight("b", 8)])
    program = capture_onnx(model)
    module = ProgramModule(program)
    assert module.names["fc.1/w"] == "fc_1_w"
    before = program.weights["b"].tensor.clone()
    module(*program.example_inputs).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert module.fc_1_w.grad.abs().sum() > 0
    assert torch.equal(program.weights["b"].tensor, before)
    assert module(x=program.example_inputs[0]).shape == (2, 8)
    with pytest.raises(InvalidInput, match="takes 1 inputs"):
        module()


def test_quantized_graphs_are_captured_and_run():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["wq", "wscale"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(0.02, np.float32), "scale"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        numpy_helper.from_array(np.arange(32, dtype=np.int8).reshape(4, 8), "wq"),
        weight("wscale", 8),
    ]
    model = build(nodes, [info("x", ["n", 4])], [info("y", None)], constants)
    program = capture_onnx(model)
    assert len(program.nodes) == 4
    agree(model, program)


def test_tables_and_fills_that_several_nodes_read_tie_nothing():
    """One table for two layers, one initial value for two norms: the layers keep groups of their own."""
    ones = numpy_helper.from_array(np.ones(8, np.float32), "ones")
    nodes = []
    for i, (x, y) in enumerate((("x", "m"), ("m", "y"))):
        nodes += [
            helper.make_node("MatMul", [x, f"up{i}"], [f"h{i}"]),
            helper.make_node("Mul", [f"h{i}", "ones"], [f"s{i}"]),
            helper.make_node("Add", [f"s{i}", "table"], [f"t{i}"]),
            helper.make_node("MatMul", [f"t{i}", f"down{i}"], [y]),
        ]
    weights = [weight(f"{n}{i}", *shape) for i in (0, 1) for n, shape in (("up", (4, 8)), ("down", (8, 4)))]
    model = build(nodes, [info("x", [3, 4])], [info("y", [3, 4])], [*weights, ones, weight("table", 3, 8)])
    program = capture_onnx(model)
    assert set(program.weights) == {"up0", "up1", "down0", "down1"}
    assert [(g.name, g.size) for g in program.groups if g.size == 8] == [("up0:neuron", 8), ("up1:neuron", 8)]


def test_weights_without_a_name_are_called_after_their_module():
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["h"], name="/layers/layers.0/up/MatMul"),
        helper.make_node("Add", ["h", "12"], ["a"], name="/layers/layers.0/up/Add"),
        helper.make_node("MatMul", ["a", "mine"], ["y"], name="/layers/layers.0/down/MatMul"),
    ]
    model = build(nodes, [info("x", ["n", 4])], [info("y", None)], [weight("onnx::MatMul_7", 4, 8), weight("12", 8), weight("mine", 8, 4)])
    assert set(capture_onnx(model).weights) == {"layers.0.up.weight", "layers.0.up.bias", "mine"}
