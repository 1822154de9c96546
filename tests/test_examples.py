"""Every example runs as it is, in a process of its own, and stays short enough to read at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {  # a line that only a run which got to its end prints
    "cnn": "saved and loaded",
    "extend": "scores of one's own",
    "finetune": "pruned and fine-tuned",
    "hf_decoder": "generated tokens",
    "onnx_file": "outputs of the smaller file",
    "torch_compile": "neurons receive gradients",
}


def test_every_example_has_a_line_here():
    assert {path.stem for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    script = f"import tests.torchvision_ops, runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout
    assert [p.name for p in tmp_path.iterdir() if p.name != "inductor"] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60
