"""Where our partition is not Torch-Pruning's it is right, and on a small network the comparison finds the two equal, or sees what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import partition
from graphprune.capture.torch_export import capture_torch
from graphprune.surgery import Cut, apply_cut
from graphprune.verify.certificate import certify
from tests.randomise import Case, randomise, seeded


def grouped() -> Case:
    """A convolution and a norm with groups, inside a residual branch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 10, 3, padding=1)
            self.narrow, self.norm = nn.Conv2d(10, 12, 1), nn.GroupNorm(2, 12)
            self.grouped, self.wide = nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.Conv2d(12, 10, 1)
            self.head = nn.Linear(10, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = x + self.wide(self.grouped(self.norm(self.narrow(x)).relu()).relu())
            return self.head(x.mean((2, 3)))

    with seeded(0):
        module, x = Net(), torch.randn(2, 3, 8, 8)
    return Case(randomise(module, 0, x), (x,))


def test_whole_groups_of_a_convolution_may_go() -> None:
    """The division that Torch-Pruning does not know: brute force says that it is one."""
    case = grouped()
    program = capture_torch(case.module, case.args)
    blocks = [g for g in program.groups if g.size == 2]
    assert len(blocks) == 1
    axis = next(m.index for m in blocks[0].members if m.tensor == "grouped.weight")
    assert axis.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    for unit in range(2):
        cut = Cut(program.analysis, {blocks[0].name: [unit]})
        certificate = certify(program, apply_cut(program, cut), cut)
        assert certificate.status == "passed", str(certificate)


def test_partitions_are_compared_by_unit() -> None:
    pytest.importorskip("torch_pruning", reason="the comparison needs it")
    case = grouped()
    found = partition.compare((case, capture_torch(case.module, case.args)))
    assert (found["ours"], found["theirs"], found["equal"], found["second"]) == (22, 22, 22, 1)
    assert found["differ"] == found["only theirs"] == [] and found["ours left"] == found["theirs left"] < found["params"]


def test_a_unit_that_is_torn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning", reason="the comparison needs it")
    case = grouped()
    program = capture_torch(case.module, case.args)
    right = partition.our_units

    def torn(program: object) -> dict[str, set[frozenset[partition.Entry]]]:
        units = right(program)
        whole = next(unit for unit in units["stem:channel"] if ("stem.weight", 0, 0) in unit)
        part = frozenset(entry for entry in whole if entry[0].startswith("wide"))
        units["stem:channel"] = (units["stem:channel"] - {whole}) | {part, whole - part}
        return units

    monkeypatch.setattr(partition, "our_units", torn)
    found = partition.compare((case, program))
    assert found["equal"] == found["theirs"] - 1 and "wide.weight" in found["differ"]
