"""Outputs are whole or absent, whatever happens in between."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from graphprune.errors import InvalidInput
from graphprune.files import _exchange, atomic_dir, atomic_path, check_output


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_file_appears_only_when_complete(tmp_path):
    target = tmp_path / "out.onnx"
    with atomic_path(target) as path:
        path.write_bytes(b"model")
        assert not target.exists()
    assert target.read_bytes() == b"model" and names(tmp_path) == ["out.onnx"]


def test_side_files_move_along_under_their_final_names(tmp_path):
    with atomic_path(tmp_path / "out.onnx") as path:
        path.write_bytes(b"refers to out.onnx.data")
        (path.parent / "out.onnx.data").write_bytes(b"weights")
    assert names(tmp_path) == ["out.onnx", "out.onnx.data"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("manager", [atomic_path, atomic_dir])
def test_failure_leaves_the_earlier_output_as_it_was(tmp_path, manager, error):
    target = tmp_path / "out"
    if manager is atomic_path:
        target.write_text("earlier")
    else:
        target.mkdir()
        (target / "plan.json").write_text("earlier")
    with pytest.raises(error), manager(target) as path:
        (path if manager is atomic_path else path / "plan.json").write_text("half")
        raise error
    assert names(tmp_path) == ["out"]
    assert (target if manager is atomic_path else target / "plan.json").read_text() == "earlier"


def test_folder_replaces_an_earlier_result_whole(tmp_path):
    target = tmp_path / "out"
    for generation in ("first", "second"):
        with atomic_dir(target) as path:
            (path / "plan.json").write_text(generation)
            (path / f"{generation}.safetensors").write_text("x")
    assert names(target) == ["plan.json", "second.safetensors"] and names(tmp_path) == ["out"]


def test_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidInput, match="holds no earlier result"), atomic_dir(tmp_path):
        pass
    assert names(tmp_path) == ["thesis.tex"]


def test_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(InvalidInput, match="nothing was written"), atomic_path(tmp_path / "out.onnx"):
        pass
    assert names(tmp_path) == []


def test_killed_process_is_cleaned_up_after(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from graphprune.files import atomic_path
        with atomic_path(sys.argv[1]) as path:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    target = tmp_path / "out.onnx"
    done = subprocess.run([sys.executable, "-c", script, str(target)])
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].endswith(".tmp")
    with atomic_path(target) as path:
        path.write_bytes(b"whole")
    assert names(tmp_path) == ["out.onnx"]


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
import graphprune.files as files
files.ctypes.CDLL = lambda name: None  # a system that cannot exchange two folders in one step
replace = os.replace
def stop(a, b):
    if str(b) == sys.argv[1] and not str(a).endswith(files.EARLIER):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    replace(a, b)
os.replace = stop
with files.atomic_dir(sys.argv[1]) as path:
    (path / "plan.json").write_text("new")
"""


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
def test_folder_that_was_moved_away_when_the_process_ended_comes_back(tmp_path, sent):
    target = tmp_path / "out"
    target.mkdir()
    (target / "plan.json").write_text("earlier")
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, str(target), sent], capture_output=True)
    assert target.exists() == (sent == "SIGINT")  # undone at once where there is time for it
    check_output(target, folder=True)
    assert names(tmp_path) == ["out"] and (target / "plan.json").read_text() == "earlier"


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux")
def test_folders_are_exchanged_in_one_step(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("two steps")

    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", never)
        _exchange(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]


def test_temporary_of_a_living_process_is_left_alone(tmp_path):
    other = tmp_path / f".out.onnx.{os.getppid()}.1f.tmp"
    other.mkdir()
    check_output(tmp_path / "out.onnx")
    assert other.is_dir()


def test_refusals_come_before_any_work(tmp_path):
    source = tmp_path / "in.onnx"
    source.write_bytes(b"x")
    (tmp_path / "link.onnx").symlink_to(source)
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "deep").mkdir(parents=True)
    cases = [
        (tmp_path / "missing" / "out.onnx", False, (), "does not exist"),
        (tmp_path, False, (), "folder where a file is needed"),
        (source, True, (), "file where a folder is needed"),
        (source, False, [source], "it is the input"),
        (tmp_path / "link.onnx", False, [source], "it is the input"),
        (tmp_path, True, [source], "holds the input"),
        (checkpoint / "deep", True, [checkpoint], "inside the input"),
        (Path("/"), True, (), "root of the file system"),
        (Path("/proc/out.onnx"), False, (), "cannot write /proc/out.onnx"),
    ]
    for target, folder, inputs, message in cases:
        with pytest.raises(InvalidInput, match=message):
            check_output(target, inputs, folder=folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write read-only files")
def test_read_only_target_is_refused(tmp_path):
    target = tmp_path / "out.onnx"
    target.write_bytes(b"x")
    target.chmod(0o444)
    with pytest.raises(InvalidInput, match="read-only"):
        check_output(target)
