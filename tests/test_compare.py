"""The comparison with other tools: what ours is asked for, and how far outputs drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import compare
from tests.randomise import seeded


@pytest.fixture(scope="module")
def tapered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions on ever smaller maps, then a wide classifier: a looser bound leaves fewer MACs of as many parameters."""
    path = tmp_path_factory.mktemp("compare") / "tapered.onnx"
    with seeded(0):
        layers: list[nn.Module] = []
        for a, b in ((3, 64), (64, 64), (64, 128)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        compare.export(module, torch.randn(1, 3, 16, 16), path)
    return path


def test_ours_is_asked_for_as_many_parameters_with_a_bound(tapered: Path, tmp_path: Path) -> None:
    dense = compare.size(tapered)
    asked = int(0.8 * dense["params"])
    found = []
    for bound in ("", " uneven=1", " uneven=4"):
        compare.ours(str(tapered), tmp_path / "cut.onnx", f"params={asked}{bound}")
        found.append(compare.size(tmp_path / "cut.onnx"))
    assert all(0.9 * asked < it["params"] <= asked for it in found)
    assert found[2]["macs"] < 0.9 * min(it["macs"] for it in found[:2])


def test_every_arm_of_a_file_has_its_drift(tapered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tool(name: str, source: str, out: Path, asked: str) -> dict[str, Any]:  # in this process; onnxsim's part is played by an even cut
        compare.ours(source, out, asked if name == "ours" else f"params={int(0.8 * compare.size(tapered)['params'])} uneven=1")
        return {"seconds": 1.0, "all_seconds": 1.0, "peak_mb": 1.0}

    monkeypatch.setattr(compare, "tool", tool)
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    monkeypatch.setattr(compare, "version", lambda name: "0")
    line = compare.compare(str(tapered), "tapered", tmp_path)
    arms = line["arms"]
    assert list(arms) == ["dense", "ours", "onnxsim", "ours = onnxsim", "ours = onnxsim, uneven 4"]
    assert arms["dense"]["drift"] == 0 and all(it["drift"] > 0 for arm, it in arms.items() if arm != "dense")
    assert [arm for arm, it in arms.items() if "of_rival" in it] == list(arms)[3:]
    assert sum(f"{arms['onnxsim']['drift']:.3g}" in row for row in compare.rows(line)) >= 1


def test_a_file_that_reads_text_gets_text(tapered: Path) -> None:
    pytest.importorskip("PIL")
    import graphprune as gp

    program = gp.capture(str(tapered))
    (name,) = (value.name for value in program.inputs)
    drawn, noise = compare.draws_of("ppocr4-det", program), compare.draws_of("tapered", program)
    assert [it[name].shape for it in drawn] == [(1, 3, 96, 320)] * compare.DRAWS
    assert all((it[name][:, :, half] < 0).any() for it in drawn for half in (slice(0, 48), slice(48, 96)))  # ink in both lines
    assert [it[name].shape for it in noise] == [(1, 3, 16, 16)] * compare.DRAWS and not (noise[0][name] == noise[1][name]).all()


def test_drift_is_relative_and_of_the_worst_output() -> None:
    whole = [np.array([3.0, 4.0]), np.array([1.0]), np.array([7])]
    assert compare.drift(whole, whole) == 0
    assert compare.drift([np.array([3.0, 3.0]), np.array([1.5]), np.array([8])], whole) == pytest.approx(0.5)
    assert compare.drift([np.array([6.0, 8.0]), np.array([1.0]), np.array([7])], whole) == pytest.approx(1.0)


def test_the_summary_names_what_is_slower_and_what_drifts_farther() -> None:
    def line(name: str, ratio: float, drift: float, loose: float) -> dict[str, Any]:
        arms = {"dense": {}, "onnxsim": {"drift": 0.5}, "ours = onnxsim": {"of_rival": ratio, "drift": drift}}
        return {"name": name, "arms": arms | {"ours = onnxsim, uneven 4": {"of_rival": loose, "drift": 0.4}}}

    text = "\n".join(compare.summary([line("near", 1.02, 0.6, 0.9), line("slow", 1.2, 0.1, 1.1)]))
    assert "at equal parameters, within 3% of the rival's time or better in 1 of 2; slow (ours = onnxsim) 1.20" in text
    assert "times what an even cut takes, within 3% of the rival's time or better in 1 of 2; slow" in text
    assert "in 1 of 2; near 0.6 (0.5)" in text and "onnxsim's in 2 of 2" in text
