"""One network as a torch module and as its ONNX export: the same groups under the same names, and one plan cuts both alike."""

from __future__ import annotations

import onnx
import pytest
import torch

from graphprune.capture.onnx_file import capture_onnx
from graphprune.capture.torch_export import capture_torch
from graphprune.execute.interpreter import run
from graphprune.plan import Plan
from graphprune.surgery import Cut, apply_cut
from graphprune.verify.certificate import certify
from tests.zoo import TINY

pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def exported(name: str) -> tuple[torch.nn.Module, tuple, onnx.ModelProto]:
    case = TINY[name]()
    program = torch.onnx.export(case.module.eval(), tuple(case.args), dynamo=True, verbose=False)
    return case.module, tuple(case.args), program.model_proto


APART = {"lstm"}  # the states of both directions lie in one tensor in torch, which ties their units, and apart in ONNX


@pytest.mark.parametrize("name", [name for name in TINY if name not in APART])
def test_one_plan_cuts_both(name: str) -> None:
    module, args, model = exported(name)
    ours, theirs = capture_torch(module, args), capture_onnx(model, list(args))
    assert [(g.name, g.size, g.exact) for g in ours.groups] == [(g.name, g.size, g.exact) for g in theirs.groups]
    plan = Plan.of(ours, {g.name: [0, g.size // 2] for g in ours.groups if g.kind != "layer" and g.size - 2 >= g.min_keep})
    pruned = []
    for program in (ours, theirs):
        cut = Cut(program.analysis, plan.resolve(program))
        pruned.append(apply_cut(program, cut))
        assert certify(program, pruned[-1], cut, seeds=(0,)).passed
    a, b = (run(p, args, dtype=torch.float64)[0] for p in pruned)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # exporters fold constants in float32


@pytest.mark.parametrize("name", sorted(APART))
def test_onnx_is_finer(name: str) -> None:
    module, args, model = exported(name)
    ours, theirs = capture_torch(module, args), capture_onnx(model, list(args))
    assert {(g.name, g.size) for g in ours.groups} < {(g.name, g.size) for g in theirs.groups}
    cut = Cut(theirs.analysis, {g.name: [0] for g in theirs.groups if g.size > 1})
    assert certify(theirs, apply_cut(theirs, cut), cut, seeds=(0,)).passed
