"""Backends by name: known ones run the result, unknown ones are refused with the list."""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch

from graphprune.backends.base import BACKENDS, check_backend, lower
from graphprune.errors import InvalidInput, MissingExtra
from tests.test_report import onnx_file


def test_onnxruntime_takes_tensors_by_position_or_name(tmp_path):
    path = onnx_file(tmp_path / "a.onnx")
    model = lower(SimpleNamespace(save=lambda target: shutil.copy(path, target)), "onnxruntime")
    x = torch.randn(1, 3)
    assert model(x).shape == (1, 2)
    torch.testing.assert_close(model(x), model(x=x.numpy()))
    with pytest.raises(InvalidInput, match="takes x; found 2 by position"):
        model(x, x)
    with pytest.raises(InvalidInput, match="takes x; found 0 by position and z by name"):
        model(z=x)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(InvalidInput, match=f"one of {', '.join(BACKENDS)}, found 'tensorflow'"):
        check_backend("tensorflow")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install \"graphprune\[onnxruntime\]\""):
        check_backend("onnxruntime")
