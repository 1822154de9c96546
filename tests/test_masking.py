"""The masked network: what is zero in it, and what its reductions do where units are gone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.analysis import analyze
from graphprune.capture.torch_export import capture_torch
from graphprune.errors import VerificationFailed
from graphprune.execute.interpreter import run
from graphprune.program import Program
from graphprune.surgery.cut import Cut
from graphprune.verify import masking
from graphprune.verify.masking import NEUTRAL, run_masked
from graphprune.verify.rule_check import check_program
from tests.samples_aten import SAMPLES

KEPT, GONE = [0, 1, 3, 5], [2, 4]


class _Two(nn.Module):
    """A layer, some function of its features, and what reads them."""

    def __init__(self, function):  # type: ignore[no-untyped-def]
        super().__init__()
        self.first, self.last, self.function = nn.Linear(5, 6), nn.Linear(6, 3, bias=False), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def _masked(function) -> tuple[_Two, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """A network, what its first layer leaves at the kept units, and the masked output."""
    torch.manual_seed(0)
    module, x = _Two(function).double(), torch.randn(4, 5).double()
    program = capture_torch(module, (x,))
    (group,) = [g for g in program.groups if g.kind != "layer"]
    (output,) = run_masked(program, Cut(program.analysis, {group.name: GONE}), [x])
    with torch.no_grad():
        return module, module.first(x)[:, KEPT], output


@pytest.mark.parametrize(
    "function, on_kept",
    [
        (torch.relu, torch.relu),
        (torch.sigmoid, torch.sigmoid),
        (lambda x: x.softmax(-1), lambda x: x.softmax(-1)),
        (lambda x: x.log_softmax(-1), lambda x: x.log_softmax(-1)),
        (lambda x: F.layer_norm(x, (6,)), lambda x: F.layer_norm(x, (4,))),
        (lambda x: F.rms_norm(x, (6,), eps=1e-6), lambda x: F.rms_norm(x, (4,), eps=1e-6)),
        (lambda x: x - x.mean(-1, keepdim=True), lambda x: x - x.mean(-1, keepdim=True)),
        (lambda x: x * x.var(-1, keepdim=True), lambda x: x * x.var(-1, keepdim=True)),
        (lambda x: x * x.exp().amax(-1, keepdim=True), lambda x: x * x.exp().amax(-1, keepdim=True)),
        (lambda x: x * x.amin(-1, keepdim=True), lambda x: x * x.amin(-1, keepdim=True)),
        (lambda x: x * x.logsumexp(-1, keepdim=True), lambda x: x * x.logsumexp(-1, keepdim=True)),
        (lambda x: x / x.sum(-1, keepdim=True), lambda x: x / x.sum(-1, keepdim=True)),
        (lambda x: x / x.abs(), lambda x: x / x.abs()),  # 0 / 0 where a unit is gone
    ],
)
def test_the_formula_over_kept_units(function, on_kept) -> None:  # type: ignore[no-untyped-def]
    module, kept, output = _masked(function)
    with torch.no_grad():
        expected = on_kept(kept) @ module.last.weight[:, KEPT].T
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_constants_are_zero_for_the_use_that_is_cut() -> None:
    """A sum of a constant and an exponential of features: the constant of a removed unit is gone with it, the other use keeps its own."""
    table = torch.arange(1.0, 7.0).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) * table).sum(-1, keepdim=True) + self.last(self.b(x) + table)

    torch.manual_seed(0)
    module, x = Net().double(), torch.randn(4, 5).double()
    program = capture_torch(module, (x,))
    group = next(g for g in program.groups if g.name.startswith("a:"))
    (output,) = run_masked(program, Cut(program.analysis, {group.name: GONE}), [x])
    with torch.no_grad():
        expected = (module.a(x) * table)[:, KEPT].sum(-1, keepdim=True) + module.last(module.b(x) + table)
    torch.testing.assert_close(output, expected)


def test_nothing_removed_is_the_network_itself() -> None:
    torch.manual_seed(0)
    module, x = _Two(torch.tanh).double(), torch.randn(4, 5).double()
    program = capture_torch(module, (x,))
    torch.testing.assert_close(run_masked(program, Cut(program.analysis, {}), [x])[0], run(program, [x])[0], rtol=0, atol=0)


def test_a_reduction_without_neutral_form_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(NEUTRAL, ("aten", "softmax"))
    with pytest.raises(VerificationFailed, match="softmax at softmax runs over a cut axis and has no neutral form"):
        _masked(lambda x: x.softmax(-1))


@pytest.mark.parametrize("op", [op for domain, op in NEUTRAL if domain == "aten"])
def test_every_neutral_form_is_exercised(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sample of the op runs through its row, and would be wrong without it."""
    row, met = NEUTRAL[("aten", op)], []

    def recorded(args, gone, compute):  # type: ignore[no-untyped-def]
        met.append(gone)
        return row(args, gone, compute)

    monkeypatch.setitem(NEUTRAL, ("aten", op), recorded)
    programs = [s.program() for s in SAMPLES if s.op == op]
    assert not [f for program in programs for f in check_program(program) if f.is_error and f.verdict.name != "BLIND"]
    assert met
    if row is not masking.as_is:
        monkeypatch.setitem(NEUTRAL, ("aten", op), masking.as_is)
        assert any(_is_wrong(program) for program in programs)


def _is_wrong(program: Program) -> bool:
    return bool(analyze(program, free_border=True).groups) and any(
        f.verdict.name in ("WRONG", "ALIVE", "BROKEN") for f in check_program(program)
    )
