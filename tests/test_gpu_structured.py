"""What the benchmark of structured pruning on a GPU says about times: predictions with and without a floor, and kernels by kind."""

import pytest
import torch

from benchmarks.gpu_profile import Profile, kind_of, summary
from benchmarks.gpu_structured import Row, Variant, Work, parsed, show, sizes, wanted
from graphprune.backends import widths as backend

PEAKS = (1e12, 1e14)


def test_no_node_and_no_kernel_beside_them_takes_less_than_the_floor(tmp_path):
    work = (Work(weights=10**6, activations=0, flops=0), Work(weights=10**3, activations=0, flops=10**6))  # 2 us; 2 ns
    variant = Variant(tmp_path, "-", 1.0, work, "", "")
    assert variant.seconds(1, PEAKS) == pytest.approx(2e-6 + 1e-8), "by bandwidth, and by arithmetic"
    assert variant.seconds(1000, PEAKS) == pytest.approx(2e-6 + 1e-5), "weights are read once"
    assert variant.seconds(1, PEAKS, 1e-6) == pytest.approx(2e-6 + 1e-6)
    assert variant.seconds(1, PEAKS, 1e-6, kernels=5) == pytest.approx(2e-6 + 4e-6), "three kernels are none of a node"
    assert variant.seconds(1, PEAKS, 1e-6, kernels=1) == pytest.approx(2e-6 + 1e-6), "fused nodes do not count twice"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("sm90_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16", "products"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>", "layout"),
        ("void onnxruntime::cuda::Transpose3DKernel<short>", "layout"),
        ("triton_poi_fused__native_batch_norm_legit_no_training_convolution_relu_4", "other"),
        ("void onnxruntime::cuda::_UnaryElementWise<__half, __half, OP_Relu>", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_a_profile_is_that_of_one_launch():
    events = [("cutlass_gemm", 0.004), ("cutlass_gemm", 0.002), ("relu", 0.001)] * 5
    found = summary(events, floor=0.0015, repeats=5)
    assert (found.kernels, found.short) == (3, 1) and found.busy == pytest.approx(0.007)
    assert found.by_kind == pytest.approx({"products": 0.006, "layout": 0.0, "other": 0.001})
    assert [(name, count) for name, count, _ in found.longest] == [("cutlass_gemm", 2), ("relu", 1)]


def test_the_tables_show_each_cut_once_and_its_profile(capsys):
    def row(backend, ratio, rounding, speedup, found=None):
        return Row("net", backend, 64, ratio, rounding, "-", 0.0, 1.0, 2.0, 1.5, 1.0, speedup, found)

    made = Profile(3, 1, 0.007, {"products": 0.006, "layout": 0.0, "other": 0.001}, (("cutlass_gemm", 2, 0.006),))
    show([row("compile", 0.0, "", 1.0), row("compile", 0.3, "auto", 1.8), row("ort", 0.3, "auto", 1.6, made), row("ort", 0.3, "8", 1.0)])
    lines = capsys.readouterr().out.splitlines()
    assert "| net | 0.3 by auto | 64 | 1.00 | 2.00 | 1.000 | 1.80 | 90% | 1.000 | 1.60 | 80% |" in lines
    assert "| net | 0.3 by 8 | 64 | 1.00 | 2.00 | | | | 1.000 | 1.00 | 50% |" in lines
    assert "| net | ort | 64 | 0.3 by auto | 3 | 1 | 1.000 | 0.007 | 0.006 | 0.000 | 0.001 | 2.00 | 1.50 | 1.60 |" in lines
    assert any("0.006 ms in   2 of cutlass_gemm" in line for line in lines)


def test_open_axes_get_the_sizes_of_the_data():
    import onnx_ir as ir

    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 3, "side"]))
    model = ir.Model(ir.Graph([given], [], nodes=[], opset_imports={"": 18}), ir_version=9)
    assert sizes(model, (2, 3, 8)) == {"batch": 2, "side": 8}


@pytest.mark.parametrize("convolution", [False, True])
def test_pairs_in_a_row_are_the_function_of_one_applied_again(convolution, monkeypatch):
    """On a GPU ONNX Runtime runs several pairs per call, in half precision: the same graph runs here."""
    shapes = backend.layers(convolution, 16, 24, 24)
    once = backend.onnx_call(shapes, 8)()[0]
    monkeypatch.setitem(backend.REPEATED, "cpu", 3)
    thrice, half = (backend.onnx_call(shapes, 8, dtype=dtype)()[0] for dtype in (torch.float32, torch.float16))
    assert once.shape == thrice.shape == half.shape and half.dtype == "float16"
    assert abs(thrice).max() < abs(once).max() and abs(half - thrice).max() < 1e-2 * abs(thrice).max()


def test_a_case_may_name_its_backends():
    assert parsed("resnet50@64", ["ort", "compile"]) == ("resnet50", 64, ["ort", "compile"])
    assert parsed("bert_base@1=compile/ort_nhwc+bias", ["ort"]) == ("bert_base", 1, ["compile", "ort_nhwc+bias"])
    assert wanted("resnet50", "ort_nhwc+bias") and not wanted("bert_base", "ort_nhwc+bias") and wanted("bert_base", "ort_auto")
