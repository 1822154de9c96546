"""Compressed weights in ONNX files: smaller, the same outputs in ONNX Runtime, read back as they were."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.capture import onnx_zeros
from graphprune.errors import InvalidInput


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """(result, its file, the same compressed, inputs)"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("zeros")
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU(), nn.Linear(64, 5))
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    result = gp.compile(model, x, sparsity=0.7, pattern="unstructured", progress=False)
    result.save(folder / "whole.onnx")
    result.save(folder / "small.onnx", compress=True)
    return result, folder / "whole.onnx", folder / "small.onnx", x


def run(path, x):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_the_file_is_smaller_and_says_the_same(masked):
    result, whole, small, x = masked
    assert small.stat().st_size < 0.4 * whole.stat().st_size  # 30 % of the values and a bit for each
    onnx.checker.check_model(onnx.load(small), full_check=True)
    assert np.array_equal(run(whole, x), run(small, x))
    torch.testing.assert_close(torch.from_numpy(run(small, x)), result.module(x), rtol=1e-4, atol=1e-5)


def test_it_is_read_back_as_it_was(masked):
    _, whole, small, _ = masked
    first, second = gp.capture(whole), gp.capture(small)
    assert set(first.weights) == set(second.weights)
    assert [group.name for group in first.groups] == [group.name for group in second.groups]
    again = gp.compile(small, pruning_ratio=0.25, progress=False)
    assert again.certificate.passed and not again.pruned.source.model.functions


@pytest.mark.parametrize("opset", (11, 17, 20))
@pytest.mark.parametrize("dtype", (np.float32, np.float16, np.float64))
@pytest.mark.parametrize("shape", ((5000,), (64, 65), (16, 3, 17, 9)))
def test_every_shape_and_type_survives(dtype, shape, opset):
    rng = np.random.default_rng(0)
    array = (rng.standard_normal(shape) * (rng.random(shape) < 0.3)).astype(dtype)
    array.flat[3] = -0.0
    model = one_weight(array, opset)
    assert onnx_zeros.compress(model) == ["w"]
    found = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {})[0]
    assert np.array_equal(found, array)
    onnx_zeros.expand(model)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), array) and set(model.graph.initializers) == {"w"}


def test_weights_in_constant_nodes_too():
    array = np.eye(100, dtype=np.float32)
    held = onnx.helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(array))
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, array.shape)
    graph = onnx.helper.make_graph([held, onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [out])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9))
    assert onnx_zeros.compress(model) == ["w"] and "Constant" not in {node.op_type for node in model.graph}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    assert np.array_equal(session.run(None, {})[0], array)


def test_what_would_not_get_smaller_stays(tmp_path):
    rng = np.random.default_rng(0)
    for array in (rng.standard_normal((100, 100)).astype(np.float32), np.zeros((4, 4), np.float32), np.zeros((100, 100), np.int64)):
        model = one_weight(array)
        assert onnx_zeros.compress(model) == [] and not model.functions


def test_old_opsets_are_refused():
    with pytest.raises(InvalidInput, match="opset 11 and newer, this one has 10"):
        onnx_zeros.compress(one_weight(np.zeros((100, 100), np.float32), opset=10))


def test_a_folder_takes_no_compression(tmp_path, masked):
    with pytest.raises(InvalidInput, match="only ONNX files"):
        masked[0].save(tmp_path / "folder", compress=True)
    assert not (tmp_path / "folder").exists()


def one_weight(array: np.ndarray, opset: int = 17) -> ir.Model:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", kind, array.shape)
    graph = onnx.helper.make_graph([node], "g", [], [out], [onnx.numpy_helper.from_array(array, "w")])
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9))
