"""What gets installed: one import name, and nothing generic in site-packages."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without isolation from a copy, so that the checkout stays as it is."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("graphprune", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("graphprune-*.whl"))


def test_wheel_holds_every_module_and_only_our_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"graphprune"}
    for folder, prefix in {"graphprune": "graphprune", "passes": "graphprune/passes", "backends": "graphprune/backends"}.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in names, f"{path} is missing from the wheel: see pyproject"
    assert {"graphprune/py.typed", *(f"graphprune/report/page.{kind}" for kind in ("html", "css", "js"))} <= set(names)


def test_wheel_imports_from_an_empty_folder(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    script = (
        f"import sys; sys.path[:0] = [{str(target)!r}]; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import graphprune, graphprune.passes, graphprune.backends.kernels, graphprune.cli\n"
        f"assert graphprune.__file__.startswith({str(target)!r}), graphprune.__file__\n"
        "assert graphprune.backends.__file__.endswith('site/graphprune/backends/__init__.py')\n"
        "assert 'passes' not in sys.modules and 'backends' not in sys.modules\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run([sys.executable, "-c", script], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checkout_folders_are_not_imported_under_their_bare_names():
    import graphprune.backends
    import graphprune.passes  # noqa: F401

    assert "passes" not in sys.modules and "backends" not in sys.modules
