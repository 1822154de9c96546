"""Output that is either whole or absent.

Everything is written into a hidden folder beside the target, `.<name>.<pid>.<time>.tmp/`, and renamed when it is complete. A failure of
any kind, Ctrl-C included, removes the folder; what a killed process left is removed by the next run on the same target. Inside the folder
a file has its final name already, so files that refer to each other by name (an ONNX model and its external data) move together.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from graphprune.errors import InvalidInput

PathLike = str | os.PathLike[str]

EARLIER = "earlier.replaced"
MARKERS = ("plan.json", "certificate.json")  # an existing folder is replaced only if one of these shows that it is an earlier result


@contextmanager
def atomic_path(target: PathLike, inputs: Iterable[PathLike] = ()) -> Iterator[Path]:
    """A path to write the file `target` to; side files written beside it move along, the main file last.

    Raises:
        InvalidInput: at once, if `target` cannot be written or is one of `inputs`.
    """
    target = check_output(target, inputs)
    with _temporary(target) as folder:
        yield folder / target.name
        if not (folder / target.name).is_file():
            raise InvalidInput(f"nothing was written to {target}: the writer left no file of that name")
        for file in sorted(folder.iterdir(), key=lambda f: f.name == target.name):
            _sync(file)
            os.replace(file, target.parent / file.name)
        _sync(target.parent)


@contextmanager
def atomic_dir(target: PathLike, inputs: Iterable[PathLike] = ()) -> Iterator[Path]:
    """A fresh folder that becomes `target`, taking the place of an earlier result if there is one.

    Raises:
        InvalidInput: at once, if `target` cannot be written, is or holds one of `inputs`, or is a folder of something else.
    """
    target = check_output(target, inputs, folder=True)
    with _temporary(target) as temporary:
        fresh = temporary / target.name
        fresh.mkdir()
        yield fresh
        for file in fresh.rglob("*"):
            _sync(file)
        _sync(fresh)
        if target.exists():
            _exchange(fresh, target, temporary / EARLIER)
        else:
            os.replace(fresh, target)
        _sync(target.parent)


def check_output(target: PathLike, inputs: Iterable[PathLike] = (), folder: bool = False) -> Path:
    """`target` as an absolute path, after making sure before any work that it can be written and is none of `inputs`.

    Raises:
        InvalidInput: if it cannot.
    """
    path = Path(os.path.abspath(target))
    if not path.name:
        raise InvalidInput(f"cannot write to {target}: it is the root of the file system")
    if not path.parent.is_dir():
        raise InvalidInput(f"cannot write {target}: the folder {path.parent} does not exist; create it first")
    for source in inputs:
        _refuse_input(path, Path(source))
    if path.is_dir() and not folder:
        raise InvalidInput(f"cannot write {target}: it is a folder where a file is needed; name a file in it, as in {path / 'out.onnx'}")
    if path.exists() and not path.is_dir() and folder:
        raise InvalidInput(f"cannot write {target}: it is a file where a folder is needed; choose another name")
    if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in MARKERS):
        raise InvalidInput(f"cannot write {target}: the folder is not empty and holds no earlier result; choose another or empty it")
    if path.exists() and not os.access(path, os.W_OK):
        raise InvalidInput(f"cannot write {target}: it is read-only")
    _remove_stale(path)
    with _temporary(path):  # the only honest test of a writable folder
        return path


def _refuse_input(target: Path, source: Path) -> None:
    source, target = source.resolve(), target.resolve()
    if source == target:
        raise InvalidInput(f"cannot write {target}: it is the input; choose another output")
    if target in source.parents and target.is_dir():
        raise InvalidInput(f"cannot write {target}: it holds the input {source}; choose another output")
    if source in target.parents:
        raise InvalidInput(f"cannot write {target}: it lies inside the input {source}; choose another output")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    folder = target.parent / f".{target.name}.{os.getpid()}.{time.monotonic_ns():x}.tmp"
    try:
        folder.mkdir()
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror or error}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(fresh: Path, target: Path, earlier: Path) -> None:
    """Put `fresh` in the place of `target`: in one step where the system has one for folders (Linux), else in two that are undone."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, both_ways = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(here, os.fsencode(fresh), here, os.fsencode(target), both_ways) == 0:
        return
    try:
        os.replace(target, earlier)
        os.replace(fresh, target)
    finally:
        if not target.exists():
            os.replace(earlier, target)


def _remove_stale(target: Path) -> None:
    """Remove what killed processes left; an output that one of them had just moved away goes back to its place."""
    prefix = f".{target.name}."
    for folder in target.parent.iterdir():
        if not (folder.name.startswith(prefix) and folder.name.endswith(".tmp")):
            continue
        pid, _, _ = folder.name[len(prefix) :].partition(".")
        if pid.isdigit() and not _alive(int(pid)):
            if (folder / EARLIER).is_dir() and not target.exists():
                os.replace(folder / EARLIER, target)
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's process
        return True
    return True


def _sync(path: Path) -> None:
    """Flush to the disk, so that a rename never overtakes the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
