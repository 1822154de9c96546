"""The operator tests that the onnx package ships, run through capture and the torch lowering."""

from __future__ import annotations

import re
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import torch

from graphprune.capture.onnx_file import capture_onnx
from graphprune.capture.onnx_types import to_torch
from graphprune.errors import UnsupportedOp
from graphprune.execute.interpreter import run
from graphprune.execute.onnx_ops import ONNX_OPS

# Cases that are meant to differ: pattern -> why.
EXPECTED = {
    r"test_bernoulli": "drawn from another generator",
    r"test_not_[234]d$": "opset 1",
    r"test_resize_downsample_scales_(linear|cubic)_align_corners": "with the whole output size, as ONNX Runtime, not the fractional one",
}


def _cases():
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model_tests(kind="node")


def _operators(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {("" if node.domain == "ai.onnx" else node.domain, node.op_type) for node in model.graph.node} - {("", "Constant")}


def _tensor(array) -> torch.Tensor | None:
    array = np.asarray(array) if isinstance(array, np.generic) else array
    return to_torch(ir.tensor(array)) if isinstance(array, np.ndarray) and array.dtype.kind in "fiubV" else None


def _check(case) -> str:
    """What is wrong with the lowering of a case, "" if nothing is.

    Raises:
        UnsupportedOp: it cannot be tried.
    """
    for inputs, expected in case.data_sets:
        tensors = [_tensor(array) for array in inputs]
        wanted = [_tensor(array) for array in expected]
        if any(t is None for t in (*tensors, *wanted)):
            raise UnsupportedOp("sequences, strings and missing inputs are not tried here")
        program = capture_onnx(case.model, tensors)
        for want, have in zip(wanted, run(program, program.example_inputs)):
            if have.dtype != want.dtype or have.shape != want.shape:
                return f"{have.dtype} {list(have.shape)} where {want.dtype} {list(want.shape)} is expected"
            coarse = want.dtype in (torch.float16, torch.bfloat16)
            a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (have, want))
            if not torch.allclose(a, b, rtol=1e-2 if coarse else 1e-3, atol=1e-2 if coarse else 1e-5, equal_nan=True):
                return f"values differ by {(a - b).abs().max():.2e}"
    return ""


def _try(case) -> str | None:
    """As `_check`; None if torch or the lowering lacks something that the case needs."""
    try:
        return _check(case)
    except UnsupportedOp:
        return None
    except Exception as error:
        if "not implemented for 'UInt" in str(error):  # torch has hardly any arithmetic on uint16, uint32 and uint64
            return None
        return f"{type(error).__name__}: {error}"


def test_official_node_tests():
    cases = [case for case in _cases() if _operators(case.model) <= set(ONNX_OPS)]
    results = {case.name: _try(case) for case in cases}
    wrong = {name: what for name, what in results.items() if what and not any(re.match(pattern, name) for pattern in EXPECTED)}
    assert not wrong
    assert sum(what == "" for what in results.values()) > 1350
    for pattern in EXPECTED:  # an entry that no longer fails must go
        assert any(what for name, what in results.items() if re.match(pattern, name)), pattern


def test_a_wrong_lowering_is_noticed(monkeypatch):
    case = next(case for case in _cases() if case.name == "test_relu")
    assert _check(case) == ""
    monkeypatch.setitem(ONNX_OPS, ("", "Relu"), lambda X: torch.relu(X) + 1)
    assert "differ" in _check(case)
