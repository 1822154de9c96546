"""Surgery on ONNX models: what is cut is cut where it lies, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune import axes as ax
from graphprune.capture.onnx_file import capture_onnx
from graphprune.execute.interpreter import run
from graphprune.program import Program
from graphprune.surgery import Cut, apply_cut
from graphprune.surgery.onnx_graph import apply_cut as cut_model
from graphprune.verify.certificate import certify
from tests.test_onnx_capture import branch, build, info, weight


def constant(name: str, value, dtype=np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype=dtype), name)


def cut_all(program: Program, units: int = 1) -> Cut:
    """The first units of every group that is not a whole branch."""
    return Cut(program.analysis, {g.name: range(units) for g in program.analysis.groups if g.kind != "layer" and g.size > units})


def check(model: onnx.ModelProto, units: int = 1, inputs=None) -> tuple[onnx.ModelProto, Program]:
    """Cut, certify, and run the result in ONNX Runtime; the original must not have moved."""
    source = ir.from_proto(model)
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    program = capture_onnx(source, inputs)
    cut = cut_all(program, units)
    assert cut.removed, "nothing to cut"
    pruned = apply_cut(program, cut)
    certificate = certify(program, pruned, cut)
    assert certificate.passed, str(certificate)
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before
    result = ir.to_proto(pruned.source.model)
    onnx.checker.check_model(result, full_check=True)
    onnxruntime = pytest.importorskip("onnxruntime", reason="the result is run by ONNX Runtime")
    session = onnxruntime.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {v.name: x.numpy() for v, x in zip(pruned.inputs, pruned.example_inputs)})
    for want, have in zip(outputs, run(pruned, pruned.example_inputs)):
        np.testing.assert_allclose(want, have.numpy(), rtol=1e-4, atol=1e-5)
    return result, pruned


def mlp(*middle: onnx.NodeProto, width: int = 12, extra=(), opset: int = 17, **options) -> onnx.ModelProto:
    """x -> MatMul a -> h -> the nodes given, up to r -> MatMul b -> y."""
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), *middle, helper.make_node("MatMul", ["r", "b"], ["y"])]
    weights = [weight("a", 5, width), weight("b", width, 4), *extra]
    return build(nodes, [info("x", ["n", 5])], [info("y", ["n", 4])], weights, opset, **options)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


def test_only_what_is_cut_changes():
    model = mlp(helper.make_node("Relu", ["h"], ["r"], name="act"), opset=13)
    model.graph.value_info.append(info("h", ["n", 12]))
    model.metadata_props.add(key="author", value="someone")
    model.graph.doc_string = "kept"
    result, _ = check(model, 2)
    assert shapes(result) == {"a": (5, 10), "b": (10, 4)}
    assert [n.name for n in result.graph.node] == [n.name for n in model.graph.node]
    assert result.opset_import[0].version == 13 and result.ir_version == model.ir_version
    assert result.metadata_props[0].value == "someone" and result.graph.doc_string == "kept"
    declared = next(v for v in result.graph.value_info if v.name == "h").type.tensor_type.shape.dim
    assert (declared[0].dim_param, declared[1].dim_value) == ("n", 10)
    a = numpy_helper.to_array(model.graph.initializer[0])
    assert np.array_equal(numpy_helper.to_array(result.graph.initializer[0]), a[:, 2:])


def test_uncut_tensors_are_shared():
    nodes = [helper.make_node("MatMul", ["x", "c"], ["z"]), helper.make_node("MatMul", ["z", "a"], ["h"])]
    nodes += [helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", "b"], ["y"])]
    weights = [weight("c", 5, 5), weight("a", 5, 12), weight("b", 12, 4)]
    model = build(nodes, [info("x", [2, 5])], [info("y", [2, 4]), info("z", [2, 5])], weights)
    source = ir.from_proto(model)
    program = capture_onnx(source)
    result = cut_model(program, cut_all(program))
    assert result.graph.initializers["c"].const_value is source.graph.initializers["c"].const_value
    assert source.graph.initializers["a"].shape == [5, 12]


def test_weights_in_constant_nodes_and_listed_as_inputs():
    nodes = [
        helper.make_node("Constant", [], ["a"], value=weight("a", 5, 12)),
        helper.make_node("Constant", [], ["bias"], value_floats=np.linspace(-1, 1, 12).tolist()),
        helper.make_node("MatMul", ["x", "a"], ["m"]),
        helper.make_node("Add", ["m", "bias"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    model = build(nodes, [info("x", ["n", 5]), info("b", [12, 4])], [info("y", ["n", 4])], [weight("b", 12, 4)], 13, 3)
    result, _ = check(model)
    assert [len(n.output) for n in result.graph.node] == [1] * 6
    assert [it.name for it in result.graph.input] == ["x"] and list(result.graph.initializer[0].dims) == [11, 4]


@pytest.mark.parametrize("opset", [9, 13, 18])
def test_split_and_slice_literals(opset):
    splits = [constant("parts", [7, 5])] if opset >= 13 else []
    split = helper.make_node("Split", ["h", *["parts"] * bool(splits)], ["p", "q"], axis=1, **({} if splits else {"split": [7, 5]}))
    bounds = [constant(name, [v]) for name, v in (("zero", 0), ("two", 2), ("one", 1), ("all", 2**40))] if opset >= 10 else []
    if opset >= 10:
        left = helper.make_node("Slice", ["p", "zero", "two", "one"], ["pl"])
        right = helper.make_node("Slice", ["p", "two", "all", "one"], ["pr"])
    else:
        left = helper.make_node("Slice", ["p"], ["pl"], axes=[1], starts=[0], ends=[2])
        right = helper.make_node("Slice", ["p"], ["pr"], axes=[1], starts=[2], ends=[2**40])
    middle = [split, left, right, helper.make_node("Concat", ["pr", "q", "pl"], ["c"], axis=1), helper.make_node("Relu", ["c"], ["r"])]
    result, pruned = check(mlp(*middle, extra=[*splits, *bounds], opset=opset))
    assert [v.shape[1] for v in next(n for n in pruned.nodes if n.op_type == "Split").outputs] == [5, 4]  # one unit of each of three parts
    assert len(result.graph.node) == len(middle) + 2
    if opset >= 10:
        assert "all" in shapes(result)  # a bound beyond the end needs no change


def test_a_split_into_equal_parts_becomes_explicit():
    model = mlp(
        helper.make_node("Split", ["h"], ["p", "q", "s"], axis=1, num_outputs=3),
        helper.make_node("Mul", ["p", "q"], ["pq"]),
        helper.make_node("Concat", ["pq", "s"], ["r"], axis=1),
        opset=18,
    )
    model.graph.initializer[1].CopyFrom(weight("b", 8, 4))
    program = capture_onnx(ir.from_proto(model))
    first, second = (g.name for g in program.analysis.groups)
    cut = Cut(program.analysis, {first: [1, 2], second: [0]})
    pruned = apply_cut(program, cut)
    assert certify(program, pruned, cut).passed
    split = next(n for n in pruned.source.model.graph if n.op_type == "Split")
    assert "num_outputs" not in split.attributes and len(split.inputs) == 2


def test_a_computed_shape_gets_new_entries_where_axes_changed():
    """Reshape(h, Concat(batch, -1, 3)): one unit in three heads goes, the batch stays symbolic."""
    middle = [
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("Gather", ["s", "first"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "zero"], ["n1"]),
        helper.make_node("Concat", ["n1", "tail"], ["shape"], axis=0),
        helper.make_node("Reshape", ["h", "shape"], ["g"]),
        helper.make_node("Softmax", ["g"], ["q"], axis=2),
        helper.make_node("Mul", ["q", "g"], ["w"]),
        helper.make_node("Reshape", ["w", "flat"], ["r"]),
    ]
    extra = [constant("first", 0), constant("zero", [0]), constant("tail", [4, 3]), constant("flat", [0, 12])]
    result, _ = check(mlp(*middle, extra=extra))
    assert [n.op_type for n in result.graph.node].count("Where") == 1
    onnxruntime = pytest.importorskip("onnxruntime", reason="the result is run by ONNX Runtime")
    session = onnxruntime.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((7, 5), np.float32)})[0].shape == (7, 4)  # another batch size
    assert shapes(result)["flat"] == (2,)


def test_a_scale_computed_from_a_size_keeps_the_old_size():
    middle = [
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("Gather", ["s", "last"], ["width"]),
        helper.make_node("Cast", ["width"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["f"], ["root"]),
        helper.make_node("Div", ["h", "root"], ["r"]),
    ]
    result, _ = check(mlp(*middle, extra=[constant("last", 1)]))
    assert [n.op_type for n in result.graph.node] == ["MatMul", "Div", "MatMul"]  # what computed the size is of no more use
    assert "root_cut" in shapes(result)


def test_a_constant_is_cut_for_each_use_by_itself():
    """Two branches scale by one constant table; only one of them loses units."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Mul", ["h", "table"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
        helper.make_node("Mul", ["x2", "table"], ["z"]),
        helper.make_node("Cast", ["ids"], ["table"], to=TensorProto.FLOAT),
    ]
    nodes = [nodes[-1], *nodes[:-1]]
    inputs = [info("x", ["n", 5]), info("x2", ["n", 12])]
    weights = [weight("a", 5, 12), weight("b", 12, 4), constant("ids", np.arange(1, 13))]
    model = build(nodes, inputs, [info("y", ["n", 4]), info("z", ["n", 12])], weights)
    result, _ = check(model)
    assert shapes(result)["ids"] == (12,) and shapes(result)["table_cut"] == (11,)


def test_weights_inside_one_branch_of_an_if():
    then = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "ta"], ["th"]),
            helper.make_node("Tanh", ["th"], ["tr"]),
            helper.make_node("MatMul", ["tr", "tb"], ["tout"]),
        ],
        "then",
        [],
        [info("tout", None)],
        [weight("ta", 4, 9), weight("tb", 9, 8)],
    )
    other = branch("no", helper.make_node("MatMul", ["x", "no_w"], ["no_out"]))
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    model = build(nodes, [info("x", ["n", 4])], [info("y", ["n", 8])], [constant("zero", -1e9, np.float32)])
    result, _ = check(model)
    bodies = {a.name: a.g for a in result.graph.node[2].attribute}
    assert {t.name: tuple(t.dims) for t in bodies["then_branch"].initializer} == {"ta": (4, 8), "tb": (8, 8)}
    assert {t.name: tuple(t.dims) for t in bodies["else_branch"].initializer} == {"no_w": (4, 8)}


def test_a_whole_branch_goes():
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["f"]),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    model = build(nodes, [info("x", ["n", 5])], [info("y", ["n", 5])], [weight("a", 5, 12), weight("b", 12, 5)])
    program = capture_onnx(ir.from_proto(model))
    layer = next(g for g in program.analysis.groups if g.kind == "layer")
    cut = Cut(program.analysis, {layer.name: [0]})
    pruned = apply_cut(program, cut)
    assert certify(program, pruned, cut).passed
    result = ir.to_proto(pruned.source.model)
    onnx.checker.check_model(result, full_check=True)
    assert [n.op_type for n in result.graph.node] == ["Identity"] and not result.graph.initializer and result.graph.output[0].name == "y"


def test_grouped_convolution_and_recurrent_attributes():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Conv", ["h", "d"], ["g"], group=6, pads=[1, 1]),
        helper.make_node("Transpose", ["g"], ["t"], perm=[2, 0, 1]),
        helper.make_node("GRU", ["t", "W", "R"], ["u"], hidden_size=7),
        helper.make_node("Squeeze", ["u", "one"], ["v"]),
        helper.make_node("MatMul", ["v", "b"], ["y"]),
    ]
    weights = [weight("w", 6, 3, 1), weight("d", 6, 1, 3), weight("W", 1, 21, 6), weight("R", 1, 21, 7), weight("b", 7, 4)]
    model = build(nodes, [info("x", ["n", 3, "t"])], [info("y", ["t", "n", 4])], [*weights, constant("one", [1])])
    result, _ = check(model)
    attributes = {n.op_type + n.output[0]: {a.name: a.i for a in n.attribute if a.type == 2} for n in result.graph.node}
    assert attributes["Convg"]["group"] == 5 and attributes["GRUu"]["hidden_size"] == 6


def test_frames_that_overlap_do_not_hang():
    """x[:-4] and x[4:] in frames of four, side by side: the axis of frames is a shifted copy of itself."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Slice", ["h", "zero", "back", "one"], ["p"]),
        helper.make_node("Slice", ["h", "four", "all", "one"], ["q"]),
        helper.make_node("Reshape", ["p", "frames"], ["pf"]),
        helper.make_node("Reshape", ["q", "frames"], ["qf"]),
        helper.make_node("Concat", ["pf", "qf"], ["y"], axis=2),
    ]
    numbers = [constant(n, [v]) for n, v in (("zero", 0), ("back", -4), ("one", 1), ("four", 4), ("all", 8000))]
    model = build(nodes, [info("x", [2, 5])], [info("y", None)], [weight("w", 5, 4000), constant("frames", [2, 999, 4]), *numbers])
    program = capture_onnx(model)
    assert not [g for g in program.analysis.groups if g.size > 4]
    assert all(leaf.frozen for leaf in ax.leaves_of(program.analysis.axes(program.weights["w"])[1]))


def test_a_shifted_slice_is_caught():
    """The certificate sees surgery that takes the wrong rows."""
    model = ir.from_proto(mlp(helper.make_node("Relu", ["h"], ["r"])))
    program = capture_onnx(model)
    cut = cut_all(program)
    wrong = cut_model(program, cut)
    b = wrong.graph.initializers["b"]
    b.const_value = ir.Tensor(np.roll(b.const_value.numpy(), 1, 0), name="b")
    assert certify(program, capture_onnx(wrong, list(program.example_inputs)), cut).status == "failed"
