"""The command line as a stranger runs it: every verb in a process of its own, with and without torchvision, interrupted and killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_report import onnx_file
from tests.test_results import llama

ROOT = Path(__file__).parent.parent
ABSENT = 'import sys\nsys.modules["torchvision"] = None  # importing it raises, and importlib does not find it\n'
MENDED = "import tests.torchvision_ops\n"  # a wheel built for CUDA also imports beside the CPU wheel of torch
WAITING = """
import os, time
sync = os.fsync
def fsync(descriptor):
    sync(descriptor)
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if path.endswith(os.environ["WAIT_AT"]):
        print("waiting", flush=True)
        time.sleep(120)
os.fsync = fsync
"""
SMALL = ("--ratio", "0.5", "--units", "neuron,channel", "--round-to", "1")

# verb -> arguments, and what stdout says; {in}, {out}, {again}, {plan} and {group} are filled in
VERBS: dict[str, tuple[tuple[str, ...], str]] = {
    "inspect": (("{in}",), "prunable:"),
    "explain": (("{in}", "{group}"), "units of group"),
    "prune": (("{in}", "-o", "{out}", *SMALL), "certificate  passed"),
    "plan": (("{in}", "-o", "{plan}", *SMALL), "groups"),
    "apply": (("{plan}", "{in}", "-o", "{again}"), "certificate  passed"),
    "verify": (("{in}", "{again}", "--plan", "{plan}"), "passed"),
    "bench": (("{in}", "{out}", "--seconds", "0.1"), "x faster"),
    "diff": (("{out}", "{again}"), "no difference"),
    "recipes": ((), ""),
}


def environment(folder: Path, start: str, **others: str) -> dict[str, str]:
    """Variables for a process that first runs `start`."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(start)
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "COLUMNS": "100", "OMP_NUM_THREADS": "1", **others}


def graphprune(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "graphprune", *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    llama().save_pretrained(folder / "checkpoint")
    return {"onnx": onnx_file(folder / "in.onnx", width=8), "checkpoint": folder / "checkpoint"}


@pytest.mark.slow
@pytest.mark.parametrize("torchvision", ["absent", "present"])
@pytest.mark.parametrize("kind", ["onnx", "checkpoint"])
def test_every_verb(kind: str, torchvision: str, sources: dict[str, Path], tmp_path: Path) -> None:
    if torchvision == "present" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    env = environment(tmp_path / "start", ABSENT if torchvision == "absent" else MENDED)
    here = subprocess.run([sys.executable, "-c", "import torchvision"], env=env, capture_output=True, text=True)
    assert (here.returncode != 0) == (torchvision == "absent"), here.stderr
    ending = ".onnx" if kind == "onnx" else ""
    names = {
        "in": sources[kind], "out": tmp_path / f"out{ending}", "again": tmp_path / f"again{ending}", "plan": tmp_path / "plan.json",
        "group": "a" if kind == "onnx" else "model.layers.0.mlp.up_proj",
    }  # fmt: skip
    for verb, (arguments, said) in VERBS.items():
        done = graphprune(verb, *(a.format(**names) for a in arguments), env=env, cwd=tmp_path)
        assert done.returncode == 0, f"{verb}: {done.stderr}"
        assert said in done.stdout and "Traceback" not in done.stderr and "warning" not in done.stdout, f"{verb}: {done.stdout}{done.stderr}"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["start", f"out{ending}", f"again{ending}", "plan.json"])


def test_the_table_has_every_verb() -> None:
    from tests.test_cli import VERBS as ALL

    assert {*VERBS, "demo"} == {*ALL}  # the demo has a test of its own, and needs a package of models


def test_torchvision_that_does_not_import_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    done = graphprune("inspect", sources["checkpoint"], env=environment(tmp_path, ""))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "operator torchvision::nms does not exist" in done.stderr and "pip uninstall torchvision" in done.stderr


def contents(path: Path) -> dict[str, bytes]:
    """Every file at a path, or below it."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the process is stopped at a file that /proc names")
@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("onnx", signal.SIGINT),
        pytest.param("onnx", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("checkpoint", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_stopped_in_mid_write(kind: str, sent: signal.Signals, sources: dict[str, Path], tmp_path: Path) -> None:
    """The old output stays as it was; what a killed process left goes with the next run."""
    out = tmp_path / ("out.onnx" if kind == "onnx" else "out")
    if kind == "onnx":
        out.write_text("earlier")
    else:
        out.mkdir()
        (out / "plan.json").write_text("earlier")
    env = environment(tmp_path / "start", ABSENT + WAITING, WAIT_AT="out.onnx" if kind == "onnx" else "model.safetensors")
    before, names = contents(out), {p.name for p in tmp_path.iterdir()}
    command = [sys.executable, "-m", "graphprune", "prune", str(sources[kind]), "-o", str(out), *SMALL]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        assert len({p.name for p in tmp_path.iterdir()} - names) == 1 and contents(out) == before
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (130 if sent is signal.SIGINT else -sent), stderr
    assert "Traceback" not in stderr and contents(out) == before
    assert ({p.name for p in tmp_path.iterdir()} == names) == (sent is not signal.SIGKILL)
    if sent is signal.SIGKILL:
        done = graphprune("prune", sources[kind], "-o", out, *SMALL, env=environment(tmp_path / "start", ABSENT))
        assert done.returncode == 0, done.stderr
        assert {p.name for p in tmp_path.iterdir()} == names and contents(out) != before


def test_interrupted_while_it_works(sources: dict[str, Path], tmp_path: Path) -> None:
    """Long before anything is written: the model is being analysed."""
    start = ABSENT + "import time\n" + (
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'graphprune.planning':\n"
        "            print('waiting', flush=True)\n"
        "            time.sleep(120)\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    command = [sys.executable, "-m", "graphprune", "prune", str(sources["onnx"]), "-o", str(tmp_path / "out.onnx")]
    env = environment(tmp_path / "start", start)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and stderr.strip() == "error: interrupted; nothing was written"
    assert [p.name for p in tmp_path.iterdir()] == ["start"]
