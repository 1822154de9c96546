"""Imports run downwards only: every file of the package has a place in one order, and imports only what stands below it.

`ORDER` is read from the bottom up; names on one line do not know each other. `python -m pytest tests/test_layers.py` after adding a folder
says where it is missing.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = """
errors
axes files measure cache widths silence
checkpoints
program
units samples linear_maps
report
rules ops
branches
analysis execute blocks
capture
costs
calibration plan
surgery.cut repair.obs
importance
allocation layer_costs
surgery repair
sparsity
verify
surgery.fallback
surgery.write_back
prepare trials
recipes
planning
pass_manager
passes
decisions
backends
results
api
streaming
backends.torch_compile
bench
demo
options
terminal
cli
__main__
"""
LEVEL = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}
BACKENDS_MAY_USE = {"errors", "files", "measure", "cache", "widths", "program", "units", "silence", "capture", "execute", "plan", "ops", "backends"}
FOLDERS = {"graphprune": "", "passes": "passes", "backends": "backends"}

# Upward imports inside functions, each with the reason why it is there.
DEFERRED = {
    ("program", "analysis"): "`program.groups` and `program.explain` are the public way to the analysis",
}


def modules() -> dict[str, Path]:
    """Dotted name below `graphprune` -> file, for all three folders."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*([prefix] if prefix else []), *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def place(module: str) -> str | None:
    """The entry of ORDER that a module belongs to: the longest prefix that has a line."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in LEVEL), None)


def imports(source: str, package: str = "graphprune") -> list[tuple[str, bool, int]]:
    """(imported module below the package, is it deferred into a function, line), without what only type checkers see."""
    found = []

    def visit(node: ast.AST, deferred: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}: relative import"
        found.extend((name.removeprefix(package + "."), deferred, node.lineno) for name in names if name.startswith(package + "."))
        for child in ast.iter_child_nodes(node):
            visit(child, deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))

    visit(ast.parse(source), False)
    return found


def violations(module: str, source: str) -> list[str]:
    """Imports of `module` that point sideways or upwards."""
    own = place(module)
    wrong = []
    for imported, deferred, line in imports(source):
        other = place(imported)
        if other == own or (deferred and (own, other) in DEFERRED) or other is None:
            continue
        if LEVEL[other] >= LEVEL[own]:
            wrong.append(f"{module}:{line} imports {imported}, which stands {'beside' if LEVEL[other] == LEVEL[own] else 'above'} it")
        elif own == "backends" and other not in BACKENDS_MAY_USE:
            wrong.append(f"{module}:{line} imports {imported}; a backend uses {', '.join(sorted(BACKENDS_MAY_USE))} only")
    return wrong


@pytest.mark.parametrize("module", [m for m in modules() if m])
def test_imports_run_downwards(module):
    assert place(module) is not None, f"{module} has no place in ORDER"
    assert violations(module, modules()[module].read_text()) == []


def test_every_place_is_taken_only_once():
    assert sorted(LEVEL) == sorted(ORDER.split())


def test_upward_sideways_and_hidden_imports_are_found():
    assert violations("plan", "from graphprune.surgery.torch import cut") == [
        "plan:1 imports surgery.torch.cut, which stands above it"
    ]
    assert violations("surgery.torch", "def f():\n    from graphprune import verify") != []
    assert violations("calibration", "import graphprune.importance.algebra") != []
    assert violations("backends.triton", "from graphprune.surgery import cut") != []
    assert violations("surgery.torch", "from graphprune.plan import Plan\nfrom graphprune.surgery.onnx import cut") == []
    with pytest.raises(AssertionError, match="relative import"):
        violations("plan", "from . import surgery")
