"""Nothing but the cut changes in an ONNX file, and the check that says so sees each kind of change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphprune as gp
from benchmarks.onnx_prune import differences
from graphprune.errors import NothingToPrune


def network(path: Path) -> Path:
    """Two layers whose biases are one stored tensor (through an Identity), and a reshape by sizes that the file computes."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Identity", ["bias"], ["bias_again"], "shared"),
        helper.make_node("Conv", ["x", "w1", "bias"], ["a"], "first"),
        helper.make_node("Conv", ["x", "w2", "bias_again"], ["b"], "second"),
        helper.make_node("Add", ["a", "b"], ["c"], "sum"),
        helper.make_node("Relu", ["c"], ["d"], "relu"),
        helper.make_node("Shape", ["d"], ["sizes"], "shape"),
        helper.make_node("Gather", ["sizes", "zero"], ["batch"], "gather_batch"),
        helper.make_node("Gather", ["sizes", "one"], ["channels"], "gather_channels"),
        helper.make_node("Concat", ["batch", "channels", "rest"], ["target"], "target", axis=0),
        helper.make_node("Reshape", ["d", "target"], ["e"], "reshape"),
        helper.make_node("ReduceMean", ["e"], ["f"], "mean", axes=[2], keepdims=0),
        helper.make_node("MatMul", ["f", "w3"], ["y"], "head"),
    ]
    integers = [numpy_helper.from_array(np.array([v], np.int64), n) for n, v in (("zero", 0), ("one", 1), ("rest", -1))]
    held = [weight("w1", 8, 3, 1, 1), weight("w2", 8, 3, 1, 1), numpy_helper.from_array(np.full(8, 0.5, np.float32), "bias"), weight("w3", 8, 2)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "network", [x], [y], [*held, *integers])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, producer_name="somebody")
    helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = network(tmp_path / "in.onnx")
    gp.compile(source, pruning_ratio=0.5, round_to=1).save(tmp_path / "out.onnx")
    return source, tmp_path / "out.onnx"


@pytest.mark.parametrize("version", (3, 4))
def test_weights_that_are_all_inputs_are_none_any_more(tmp_path: Path, version: int) -> None:
    """Before IR version 4 they had to be, and a runtime cannot fold what may be fed."""
    old = onnx.load(network(tmp_path / "in.onnx"))
    old.ir_version = version
    old.graph.input.extend(helper.make_tensor_value_info(it.name, it.data_type, it.dims) for it in old.graph.initializer)
    onnx.save(old, tmp_path / "in.onnx")
    result = gp.compile(tmp_path / "in.onnx", pruning_ratio=0.5, round_to=1)
    result.save(tmp_path / "out.onnx")
    new = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(new)
    assert result.certificate.passed and [it.name for it in new.graph.input] == ["x"] and new.ir_version == 4
    assert len(onnx.load(tmp_path / "in.onnx").graph.input) > 1
    x = np.ones((2, 3, 4, 4), np.float32)
    (y,) = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x})
    np.testing.assert_allclose(y, result.module(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_input_with_a_default_stays_one(tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "in.onnx"))
    (bias,) = (it for it in model.graph.initializer if it.name == "w3")
    model.graph.input.append(helper.make_tensor_value_info(bias.name, bias.data_type, bias.dims))
    onnx.save(model, tmp_path / "in.onnx")
    gp.compile(tmp_path / "in.onnx", pruning_ratio=0.5, round_to=1).save(tmp_path / "out.onnx")
    inputs = onnx.load(tmp_path / "out.onnx").graph.input
    assert [it.name for it in inputs] == ["x", "w3"] and [d.dim_value for d in inputs[1].type.tensor_type.shape.dim] == [4, 2]


def test_only_the_cut_changes(pair: tuple[Path, Path]) -> None:
    model = onnx.load(pair[1])
    shapes = {it.name: list(it.dims) for it in model.graph.initializer}
    assert shapes["w1"] == [4, 3, 1, 1] and shapes["bias"] == [4] and "shared" in {n.name for n in model.graph.node}
    assert differences(*pair) == []
    for batch in (1, 3):
        x = np.ones((batch, 3, 4, 4), np.float32)
        assert onnxruntime.InferenceSession(pair[1]).run(None, {"x": x})[0].shape == (batch, 2)


def _rename(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.name == "relu").name = "other"


def _move(model: onnx.ModelProto) -> None:
    weight = next(it for it in model.graph.initializer if it.name == "w3")
    array = numpy_helper.to_array(weight).copy()
    array[1, 1] += 1e-3
    weight.CopyFrom(numpy_helper.from_array(array, "w3"))


def _upgrade(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 14


def _forget(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def _replace(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.name == "relu").op_type = "Sigmoid"


@pytest.mark.parametrize(
    ("change", "seen"),
    [(_rename, "node relu"), (_replace, "node relu"), (_move, "weight w3"), (_upgrade, "opset"), (_forget, "metadata")],
)
def test_every_kind_of_change_is_seen(tmp_path: Path, change, seen: str) -> None:
    source = network(tmp_path / "in.onnx")
    model = onnx.load(source)
    assert differences(source, source) == []
    change(model)
    onnx.save(model, tmp_path / "changed.onnx")
    assert any(line.startswith(seen) for line in differences(source, tmp_path / "changed.onnx"))


def test_a_quantized_network_says_that_it_is(tmp_path: Path) -> None:
    scale, zero = numpy_helper.from_array(np.array(0.1, np.float32), "scale"), numpy_helper.from_array(np.array(0, np.int8), "zero")
    weight = numpy_helper.from_array(np.ones((3, 8), np.int8), "w")
    bias = numpy_helper.from_array(np.arange(8, dtype=np.float32), "bias")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["dequantized"], "weights"),
        helper.make_node("MatMul", ["x", "dequantized"], ["h"], "first"),
        helper.make_node("Add", ["h", "bias"], ["biased"], "bias"),
        helper.make_node("QuantizeLinear", ["biased", "scale", "zero"], ["q"], "narrow"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "widen"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, size]) for n, size in (("x", 3), ("y", 8)))
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [scale, zero, weight, bias]), ir_version=8)
    model.opset_import[0].version = 13
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(NothingToPrune, match=r"weight axes are frozen: .*it is quantized"):
        gp.compile(tmp_path / "in.onnx", pruning_ratio=0.5)
