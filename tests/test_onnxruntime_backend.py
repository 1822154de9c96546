"""Backends: each gives what the pruned network gives, and says plainly what it cannot do."""

import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune import measure
from graphprune.backends.base import BACKENDS, check_backend, lower
from graphprune.backends.onnxruntime import OnnxRuntimeModel, open_session
from graphprune.backends.torch import TorchModel
from graphprune.errors import InvalidInput, MissingExtra
from graphprune.report import Report
from tests.test_report import onnx_file

needs_cuda = pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="ONNX Runtime without CUDA")


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 17, 3, padding=1), nn.BatchNorm2d(17), nn.ReLU(), nn.Conv2d(17, 5, 1)).eval()


@pytest.fixture(scope="module")
def result():
    return gp.compile(small(), torch.randn(2, 3, 8, 8), pruning_ratio=0.5, round_to=1)


@pytest.fixture
def exported(tmp_path):
    """A network with a dynamic batch axis, and what torch makes of it."""
    model, path = small(), tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(2, 3, 8, 8),), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    return model, path


def test_every_backend_gives_the_output_of_the_pruned_module(result):
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = result.module(x)
        for name in BACKENDS:
            torch.testing.assert_close(lower(result, name)(x), expected, rtol=1e-4, atol=1e-5)


def test_the_comparison_sees_one_moved_weight(result):
    x, run = torch.randn(2, 3, 8, 8), lower(result, "onnxruntime")
    weight = next(result.module.parameters())
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1.0
        try:
            assert not torch.allclose(run(x), result.module(x), rtol=1e-4, atol=1e-5)
        finally:
            weight[0, 0, 0, 0] -= 1.0


@pytest.mark.parametrize("binding", [False, True])
def test_sizes_that_are_dynamic_in_the_file_are_dynamic_at_run_time(exported, binding):
    model, path = exported
    run = OnnxRuntimeModel(path, io_binding=binding)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_io_binding_takes_the_types_and_layouts_that_come(exported):
    model, path = exported
    run = OnnxRuntimeModel(path, io_binding=True)
    x = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(run(x.double()), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(x.numpy()), model(x), rtol=1e-4, atol=1e-5)


def test_inputs_by_name_arrays_and_programs(tmp_path):
    path = onnx_file(tmp_path / "in.onnx", width=8)
    x = np.ones((1, 3), np.float32)
    expected = OnnxRuntimeModel(path)(x)
    for model in (gp.capture(path), gp.capture(path).source.model, gp.compile(path, pruning_ratio=0.0)):
        torch.testing.assert_close(OnnxRuntimeModel(model)(x=torch.from_numpy(x)), expected)


def test_saving_for_the_session_leaves_the_model_in_memory_as_it_was(tmp_path):
    program = gp.capture(onnx_file(tmp_path / "in.onnx", width=8))
    before = {name: type(v.const_value) for name, v in program.source.model.graph.initializers.items()}
    OnnxRuntimeModel(program)
    assert {name: type(v.const_value) for name, v in program.source.model.graph.initializers.items()} == before


def test_float16_arithmetic_keeps_the_types_of_inputs_and_outputs(exported):
    x = torch.randn(2, 3, 8, 8)
    half, full = OnnxRuntimeModel(exported[1], float16=True)(x), OnnxRuntimeModel(exported[1])(x)
    assert half.dtype == torch.float32
    error = (half - full).abs().max()
    assert 0 < error < 2e-2


def test_wrong_inputs_are_named(exported):
    run = OnnxRuntimeModel(exported[1])
    with pytest.raises(InvalidInput, match=r"the model takes .*; found 0 by position and y by name"):
        run(y=torch.zeros(1))


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this build has CUDA")
def test_cuda_is_never_replaced_by_the_cpu(exported):
    with pytest.raises(MissingExtra, match=r'graphprune\[gpu\]'):
        open_session(exported[1], device="cuda")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this build has CUDA")
@pytest.mark.parametrize("call", ["compile", "apply"])
def test_cuda_that_is_missing_is_said_before_any_work(tmp_path, call, monkeypatch):
    path = onnx_file(tmp_path / "in.onnx", width=8)
    plan = gp.plan(path, pruning_ratio=0.5)
    monkeypatch.setattr("graphprune.api.capture", None)  # no work
    with pytest.raises(MissingExtra, match=r"graphprune\[gpu\]"):
        if call == "compile":
            gp.compile(path, pruning_ratio=0.5, backend="onnxruntime", device="cuda")
        else:
            gp.apply(path, plan, backend="onnxruntime", device="cuda")


@pytest.mark.parametrize("call", ["compile", "apply"])
def test_latency_is_that_of_the_backend(call):
    model, x = small(), torch.randn(2, 3, 8, 8)
    model[1].train()  # modes are the user's
    plan = gp.plan(model, x, pruning_ratio=0.5, round_to=1)
    for backend in BACKENDS:
        options = {"backend": backend, "verify": False}
        if call == "compile":
            result = gp.compile(model, x, pruning_ratio=0.5, round_to=1, **options)
        else:
            result = gp.apply(model, plan, x, **options)
        for side in (result.report.before, result.report.after):
            assert side.latency.backend == backend and 0 < side.latency.low_ms <= side.latency.median_ms <= side.latency.high_ms
        assert result.report.seconds["measure"] > 0
    assert model[1].training and not model[0].training


def test_latency_is_in_the_report_that_is_saved(tmp_path):
    path = onnx_file(tmp_path / "in.onnx", width=8)
    result = gp.apply(path, gp.plan(path, pruning_ratio=0.5))
    result.report.save(tmp_path / "report.json")
    read = Report.from_json((tmp_path / "report.json").read_text())
    assert read.after.latency == result.report.after.latency and read.after.latency.backend == "onnxruntime"
    model = small()
    result = gp.apply(model, gp.plan(model, torch.randn(2, 3, 8, 8), pruning_ratio=0.5), torch.randn(2, 3, 8, 8))
    result.save(tmp_path / "out")
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()).after.latency.backend == "torch"


@pytest.mark.parametrize("source", ["file", "module"])
def test_devices_that_are_not_there_are_refused(tmp_path, source):
    model = onnx_file(tmp_path / "in.onnx", width=8) if source == "file" else small()
    with pytest.raises(InvalidInput, match="'tpu'"):
        gp.compile(model, torch.randn(2, 3, 8, 8) if source == "module" else None, pruning_ratio=0.5, device="tpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "runs on cpu, cuda"),
        ({"device": "cuda:x"}, "found device 'cuda:x'"),
        ({"cuda_graph": True}, "needs device='cuda'"),
    ],
)
def test_options_that_make_no_sense_are_refused(exported, options, message):
    with pytest.raises(InvalidInput, match=message):
        open_session(exported[1], **options)


def test_a_model_that_onnx_runtime_refuses_and_a_missing_file(tmp_path):
    path = onnx_file(tmp_path / "bad.onnx", width=8)
    model = onnx.load(path)
    model.graph.node[1].op_type = "Nonsense"
    onnx.save(model, path)
    with pytest.raises(InvalidInput, match=r"refuses bad\.onnx"):
        open_session(path)
    with pytest.raises(InvalidInput, match="no ONNX file at"):
        open_session(tmp_path / "none.onnx")


def test_unknown_backends_say_what_there_is():
    with pytest.raises(InvalidInput, match="one of torch, onnxruntime, triton, found 'tensorrt'"):
        check_backend("tensorrt")


def test_measured_latency_follows_the_work():
    slow = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    fast = nn.Linear(8, 8)
    x, y = torch.randn(64, 512), torch.randn(1, 8)
    assert TorchModel(fast).measure(y).median_ms < TorchModel(slow).measure(x).median_ms


def test_onnx_runtime_measures_a_call(exported):
    stats = OnnxRuntimeModel(exported[1]).measure(torch.randn(2, 3, 8, 8), repeats=7)
    assert stats.n == 7 and 0 < stats.p10 <= stats.median_ms <= stats.p90


def test_interleaved_runs_take_turns_and_rotate():
    order = []
    found = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.002))}, warmup=1, repeats=4)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert found["a"].median_ms < found["b"].median_ms >= 2 and found["a"].n == len(found["a"].times) == 4
    with pytest.raises(InvalidInput, match="at least one call"):
        measure.interleaved({})


@needs_cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_cuda_session_and_graph(result, cuda_graph):
    run = OnnxRuntimeModel(result, device="cuda", cuda_graph=cuda_graph)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(run(x).cpu(), result.module(x.cpu()), rtol=1e-2, atol=1e-2)
    if cuda_graph:
        with pytest.raises(InvalidInput, match="fixed sizes"):
            run(torch.randn(3, 3, 8, 8, device="cuda"))
