"""Timing is fair: two models in turns, medians with spread, and it shows which is slower."""

import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from graphprune import bench
from graphprune.errors import InvalidInput
from graphprune.report import tables
from tests.test_cli import call
from tests.test_report import onnx_file


def test_slower_one_is_seen_and_turns_alternate():
    turns = []

    def model(name, seconds):
        def run():
            turns.append(name)
            time.sleep(seconds)

        return run

    found = bench.compare([model("a", 0.008), model("b", 0.002)], ("a", "b"), "cpu", "sleep", seconds=0.2)
    assert 2.5 < found.speedup < 5.5 and found.low <= found.speedup <= found.high and found.rounds >= 5
    assert found.before.low_ms <= found.before.median_ms <= found.before.high_ms
    assert turns[2:10] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert f"{found.speedup:.2f}x faster" in tables.plain(found)


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
