"""Timing is fair: two models in turns, medians with spread, and it shows which is slower."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from graphprune import bench, measure
from graphprune.errors import InvalidInput
from graphprune.report import tables
from tests.test_cli import call
from tests.test_report import onnx_file


def test_slower_one_is_seen_and_turns_alternate(monkeypatch):
    """By a clock that the models move, each by what it takes: three times as long in a quarter of the rounds, whatever else runs."""
    turns, now = [], [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def model(name, seconds):
        def run():
            turns.append(name)
            now[0] += seconds * (3 if len(turns) % 8 < 2 else 1)

        return run

    found = bench.compare([model("a", 0.008), model("b", 0.002)], ("a", "b"), "cpu", "none", seconds=0.2)
    assert found.speedup == pytest.approx(4.0) and found.low <= found.speedup <= found.high
    assert 0.2 / (3 * 0.010) < found.rounds < 0.2 / 0.010 + 1
    assert found.before.median_ms == pytest.approx(8.0) and found.after.median_ms == pytest.approx(2.0)
    assert found.before.low_ms <= found.before.median_ms < 24 and found.before.median_ms <= found.before.high_ms
    assert turns[2:10] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert "4.00x faster" in tables.plain(found)


def test_the_clock_runs():
    found = bench.compare([lambda: time.sleep(0.02), lambda: None], ("a", "b"), "cpu", "sleep", seconds=0.05)
    assert found.before.low_ms >= 19 and found.after.median_ms < found.before.median_ms


def test_time_must_be_positive():
    with pytest.raises(InvalidInput, match="positive, found 0"):
        bench.compare([time.time, time.time], ("a", "b"), "cpu", "none", seconds=0)


def test_onnx_call_runs_the_file_and_checks_input_names(tmp_path):
    path = onnx_file(tmp_path / "a.onnx")
    (y,) = bench.onnx_call(path, {"x": np.ones((1, 3), np.float32)})()
    assert y.shape == (1, 2)
    with pytest.raises(InvalidInput, match=r"cannot run a\.onnx on these inputs"):
        bench.onnx_call(path, {"x": np.ones((1, 5), np.float32)})()
    with pytest.raises(InvalidInput, match="takes inputs x; found z"):
        bench.onnx_call(path, {"z": np.ones((1, 3), np.float32)})
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match="ONNX Runtime refuses bad"):
        bench.onnx_call(tmp_path / "bad.onnx", {})


def test_module_call_makes_no_gradients():
    seen = []
    module = nn.Linear(3, 2)
    module.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    bench.module_call(module, (torch.ones(1, 3),))()
    assert seen == [False]


def test_command_line_times_two_files(tmp_path):
    a, b = onnx_file(tmp_path / "a.onnx", width=8), onnx_file(tmp_path / "b.onnx", width=4)
    shown = call("bench", a, b, "--seconds", "0.05", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["names"] == ["a.onnx", "b.onnx"] and found["before"]["device"] == "cpu, 1 thread"
    assert call("bench", a, tmp_path).exit_code == 2
