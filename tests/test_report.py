"""Reports survive JSON, fit 80 columns, and say what happened."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import InvalidInput, NotPrunable, Reason
from graphprune.report import Footprint, Frozen, GroupSummary, Latency, LayerCost, PassRecord, Report, TensorChange, changes, tables
from graphprune.report.compare import compare


def example(groups: int = 30, layers: int = 40) -> Report:
    latency = Latency(33.1, 32.0, 34.0, "cpu, 1 thread", "onnxruntime")
    return Report(
        before=Footprint(25_557_032, 102_400_000, 4_089_000_000, latency),
        after=Footprint(13_000_000, 52_400_000, 2_089_000_000, Latency(17.1, 16.0, 18.0, "cpu, 1 thread", "onnxruntime")),
        model="resnet50.onnx",
        plan_hash="3fa9c1d2" * 8,
        layers=tuple(
            TensorChange(f"model.encoder.stages.{i}.layers.0.conv{i}.weight", (64, 64, 3, 3), (48, 48, 3, 3)) for i in range(layers)
        ),
        costs=(LayerCost("conv1", "Conv", (9408, 7056), (10, 5), (64, 48), (0.3, 0.2)), LayerCost("add", "Add", (0, 0), (0, 0))),
        timing="cpu, 1 thread",
        groups=tuple(
            GroupSummary(f"g{i}", "channel", 64, 48, "exact" if i % 3 else "renormalised", 1234, ("a[0] writer", "b[1] reader"))
            for i in range(groups)
        ),
        not_prunable=(
            Frozen.of("fc.weight[0]", NotPrunable(Reason.OUTPUT, "fc")),
            Frozen.of("x[1]", NotPrunable(Reason.NO_RULE, "n", "add one")),
        ),
        passes=(PassRecord("structured", 0.31, "36 groups cut"),),
        quality={"top-1": (0.761, 0.702)},
        certificate={"status": "passed", "error": 1e-12, "tolerance": 1e-9, "exact": True, "notes": ["in float64"]},
        warnings=("quality was not measured",),
        seconds={"capture": 1.2},
    )


def test_json_and_back_is_the_same_report():
    report = example()
    assert Report.from_json(report.to_json()) == report


def test_reports_without_costs_by_layer_are_read():
    text = json.loads(example().to_json())
    del text["costs"], text["timing"]
    assert Report.from_json(json.dumps(text)) == replace(example(), costs=(), timing="")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "before": 3}', '{"format": 1, "colour": 1}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(InvalidInput, match="no report that graphprune wrote"):
        Report.from_json(text)


def test_text_fits_80_columns_and_holds_the_facts():
    text = str(example())
    assert max(map(len, text.splitlines())) <= 80
    facts = "25.56 M|50.9 %|1.94x|102.4 MB|0.761|30 more|20 exact|certificate  passed|error 1.0e-12|in float64|warning: qual|3fa9c1d23fa9"
    for fact in facts.split("|"):
        assert fact in text, fact
    assert "\x1b" not in text


def test_inventory_is_short_unless_all_is_asked_for():
    report = example()
    short = tables.plain(tables.inventory(report.groups, report.not_prunable))
    whole = tables.plain(tables.inventory(report.groups, report.not_prunable, everything=True))
    assert "20 more (--all shows them)" in short and "g29" not in short
    assert "g29" in whole and "b[1] reader" in whole and "more (" not in whole
    assert "hint: add one" in short and "an op has no dim rule" in short
    assert max(map(len, short.splitlines())) <= 80


def test_report_is_saved_as_json_or_html(tmp_path):
    report = example()
    report.save(tmp_path / "r.json")
    report.save(tmp_path / "r.html")
    assert Report.from_json((tmp_path / "r.json").read_text()) == report
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(InvalidInput, match=r"\.json or \.html"):
        report.save(tmp_path / "r.pdf")


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (999, "999"), (1000, "1 k"), (25_557_032, "25.56 M"), (4.089e9, "4.089 G"), (3e15, "3000 T")],
)
def test_counts(number, text):
    assert tables.count(number) == text


def test_changes_name_what_appears_and_goes():
    found = changes({"a": (1, 2), "b": (3,), "c": ()}, {"a": (1, 2), "b": (2,), "d": (4,)})
    assert found == (TensorChange("b", (3,), (2,)), TensorChange("c", (), None), TensorChange("d", None, (4,)))


def onnx_file(path, width=4, scale=1.0, opset=17):
    """y = relu(x @ a) @ b, with `b` in a Constant node."""
    rng = np.random.default_rng(0)
    a = scale * rng.standard_normal((3, 8)).astype(np.float32)[:, :width]
    b = rng.standard_normal((8, 2)).astype(np.float32)[:width]
    nodes = [
        helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(b)),
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 3), ("y", 2))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(a, "a")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def test_compare_tells_shapes_values_and_interface_apart(tmp_path):
    base = onnx_file(tmp_path / "a.onnx")
    assert compare(base, onnx_file(tmp_path / "same.onnx")).empty
    narrow = compare(base, onnx_file(tmp_path / "b.onnx", width=3))
    assert narrow.shapes == (TensorChange("a", (3, 4), (3, 3)), TensorChange("b", (4, 2), (3, 2)))
    assert narrow.parameters == (20, 15) and not narrow.values and not narrow.facts
    scaled = compare(base, onnx_file(tmp_path / "c.onnx", scale=2.0))
    assert scaled.values == ("a",) and scaled.equal == 1
    assert compare(base, onnx_file(tmp_path / "d.onnx", opset=18)).facts == {"opset ai.onnx": ("17", "18")}


def test_compare_refuses_what_is_no_model(tmp_path):
    good, bad = onnx_file(tmp_path / "a.onnx"), tmp_path / "bad.onnx"
    bad.write_bytes(good.read_bytes()[:100])
    with pytest.raises(InvalidInput, match="not a readable ONNX file"):
        compare(good, bad)
    with pytest.raises(InvalidInput, match="does not exist"):
        compare(good, tmp_path / "missing.onnx")
    with pytest.raises(InvalidInput, match="no weights"):
        compare(tmp_path, tmp_path)
    with pytest.raises(InvalidInput, match=r"two \.onnx files or two folders"):
        compare(good, tmp_path)
