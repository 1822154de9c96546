"""The property everything rests on: the pruned network is the masked network, for every tiny model and every group, and one index off is
seen.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.axes import leaves_of
from graphprune.capture.torch_export import capture_torch
from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import run
from graphprune.execute.likeness import distance, random_inputs
from graphprune.program import Program
from graphprune.surgery import Cut, apply_cut, torch_graph
from graphprune.verify import certificate as certificate_file
from graphprune.verify.certificate import certify, shifted_control
from graphprune.verify.masking import masked, observed
from graphprune.verify.sites import Seen, Sites
from tests.zoo import TINY


@cache
def program(name: str) -> Program:
    case = TINY[name]()
    return capture_torch(case.module, case.args, case.kwargs)


def some_units(program: Program, share: float, seed: int = 0, kinds: tuple[str, ...] | None = None) -> dict[str, list[int]]:
    """Random units of every group, as many as its own and its top-k limit allow."""
    rng = np.random.default_rng(seed)
    removed = {}
    for group in program.groups:
        if group.kind == "layer" or (kinds and group.kind not in kinds):
            continue
        count = min(max(1, int(group.size * share)), group.size - group.min_keep)
        if count:
            removed[group.name] = sorted(rng.permutation(group.size)[:count].tolist())
    return removed


@pytest.mark.parametrize("name", TINY)
def test_all_groups_at_once(name: str) -> None:
    original = program(name)
    cut = Cut(original.analysis, some_units(original, 0.34))
    certificate = certify(original, apply_cut(original, cut), cut)
    assert certificate.status == "passed", str(certificate)
    assert certificate.error <= 1e-9


@pytest.mark.parametrize("name", TINY)
def test_each_group_alone(name: str) -> None:
    original = program(name)
    for group, units in some_units(original, 0.5, seed=1).items():
        cut = Cut(original.analysis, {group: units})
        certificate = certify(original, apply_cut(original, cut), cut, seeds=(0,))
        assert certificate.status == "passed", f"{group}: {certificate}"


@pytest.mark.parametrize("name", TINY)
def test_keep_one_and_remove_none(name: str) -> None:
    original = program(name)
    most = {g.name: list(range(g.min_keep, g.size)) for g in original.groups if g.kind != "layer" and g.size > g.min_keep}
    cut = Cut(original.analysis, most)
    certificate = certify(original, apply_cut(original, cut), cut, seeds=(0,))
    dead = (
        certificate.status == "not tested" and certificate.error < 1e-9 and "nothing but zeros" in certificate.notes[-1]
    )  # the last unit may be
    assert dead or certificate.status in ("passed", "ill-conditioned"), f"{certificate} {certificate.notes}"
    nothing = Cut(original.analysis, {})
    certificate = certify(original, apply_cut(original, nothing), nothing, seeds=(0,))
    assert certificate.error < 1e-14 and certificate.effect < 1e-14
    with pytest.raises(InvalidInput, match="at least one random input"):
        certify(original, apply_cut(original, nothing), nothing, seeds=())


@pytest.mark.parametrize("name", TINY)
def test_layers(name: str) -> None:
    original = program(name)
    for group in original.groups:
        if group.kind == "layer":
            cut = Cut(original.analysis, {group.name: [0]})
            pruned = apply_cut(original, cut)
            assert certify(original, pruned, cut, seeds=(0,)).status == "passed"
            assert not {m.tensor for m in group.members} & set(pruned.weights)


@pytest.mark.parametrize("name", TINY)
def test_one_position_off_is_seen(name: str) -> None:
    original = program(name)
    cut = Cut(original.analysis, some_units(original, 0.34))
    assert shifted_control(original, apply_cut(original, cut), cut) > 1e-6


def test_planted_fault_in_surgery_is_seen_and_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = program("resnet")
    cut = Cut(original.analysis, some_units(original, 0.34))
    honest = torch_graph.sliced_weights

    def off_by_one(program: Program, cut: Cut) -> dict:
        tensors = honest(program, cut)
        value, keeps = next((v, k) for v, k in cut.weights.items() if v.name.endswith("weight") and len(v.shape) == 4)
        axis, keep = next(iter(keeps.items()))
        moved = torch.from_numpy((keep + 1) % value.shape[axis])
        shifted = value.tensor.detach().index_select(axis, moved)
        for other, positions in keeps.items():
            if other != axis:
                shifted = shifted.index_select(other, torch.from_numpy(positions))
        return {**tensors, value: torch.nn.Parameter(shifted)}

    monkeypatch.setattr(torch_graph, "sliced_weights", off_by_one)
    certificate = certify(original, torch_graph.apply_cut(original, cut), cut)
    assert certificate.status == "failed"
    assert certificate.notes


class Faint(nn.Module):
    """A gate that closes at inputs of the usual size (`threshold` > 0), or never opens (`threshold` < 0)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.up, self.down, self.threshold = nn.Linear(4, 8), nn.Linear(8, 3), threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(200 * (self.threshold - x.square().mean(-1, keepdim=True)))
        return x[:, :3] + gate * self.down(self.up(x))


def faint(threshold: float) -> tuple[Program, Cut]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = capture_torch(Faint(threshold).eval(), (torch.randn(2, 4) + 3 * torch.tensor([[1.0], [-1.0]]),))
    return original, Cut(original.analysis, {g.name: [0, 3] for g in original.groups if g.kind != "layer"})


def test_inputs_are_drawn_at_a_scale_at_which_the_cut_shows() -> None:
    original, cut = faint(0.5)
    pruned = apply_cut(original, cut)
    certificate = certify(original, pruned, cut)
    assert certificate.passed and certificate.effect > 1e-3 and "0.1 times the usual scale" in certificate.notes[0]
    assert shifted_control(original, pruned, cut) > 1e-6
    weight = pruned.weights["up.weight"]
    with torch.no_grad():
        weight.tensor[0, 0] += 0.01  # type: ignore[index]
    assert certify(original, pruned, cut).status == "failed"


def test_a_cut_that_shows_at_no_scale_is_not_tested() -> None:
    original, cut = faint(-1.0)
    certificate = certify(original, apply_cut(original, cut), cut)
    assert certificate.status == "not tested" and not certificate.notes


class Hidden(nn.Module):
    """Two branches: one shows at any input, the other only where inputs pass a bar."""

    def __init__(self, bar: float) -> None:
        super().__init__()
        self.up, self.down, self.bar = nn.Linear(4, 8), nn.Linear(8, 3), bar
        self.rise, self.fall = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) + self.fall(torch.relu(self.rise(x) - self.bar))


def hidden(bar: float) -> tuple[Program, Cut]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = capture_torch(Hidden(bar).eval(), (torch.randn(8, 4),))
    return original, Cut(original.analysis, {g.name: [0, 3] for g in original.groups if g.kind != "layer"})


def test_a_group_that_others_outshine_is_reached_at_another_scale() -> None:
    original, cut = hidden(20.0)
    pruned = apply_cut(original, cut)
    certificate = certify(original, pruned, cut)
    assert certificate.passed and len(certificate.seeds) > 3 and not certificate.notes, f"{certificate} {certificate.notes}"
    weight = pruned.weights["fall.weight"].tensor
    with torch.no_grad():
        weight.copy_(weight.roll(1, 1))  # type: ignore[union-attr]
    certificate = certify(original, pruned, cut)
    assert certificate.status == "failed" and any("fall.weight" in note for note in certificate.notes)


def test_a_group_that_nothing_reaches_is_not_tested() -> None:
    original, cut = hidden(1e9)
    certificate = certify(original, apply_cut(original, cut), cut)
    assert certificate.status == "not tested" and certificate.effect > 1e-3
    assert "fall" in certificate.notes[-1] or "rise" in certificate.notes[-1]


def test_an_error_behind_a_closed_gate_is_seen_where_it_happens() -> None:
    """At the usual scale the gate of `Faint` is closed, and the output is right whatever is behind it."""
    original, cut = faint(0.5)
    pruned = apply_cut(original, cut)
    inputs = random_inputs(original, 0)
    seen, twin = Seen(), Seen()
    sites = Sites(original, pruned, cut, cut.weights)
    expected = masked(original, cut)(inputs, sites.masked(seen))

    def inside() -> dict[str, float]:
        found = run(pruned, inputs, dtype=torch.float64, intercept=observed(sites.pruned(twin)))
        assert distance(found, expected) < 1e-12  # the outputs agree in any case
        return sites.errors(twin, seen)

    assert set(inside()) == {"up.weight + up.bias", "down.weight"} and max(inside().values()) < 1e-12
    weight = pruned.weights["up.weight"].tensor
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))  # type: ignore[union-attr]
    assert min(inside().values()) > 1e-3


class Barred(nn.Module):
    """A threshold that inputs of the usual size do not reach: until then the output is a constant."""

    def __init__(self, bar: float) -> None:
        super().__init__()
        self.up, self.down, self.bar = nn.Linear(4, 8), nn.Linear(8, 3, bias=False), bar

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x) - self.bar))


@pytest.mark.parametrize("bar, status, runs", [(20.0, "passed", 2), (1e9, "not tested", 1)])
def test_where_inputs_do_not_move_the_output_the_masked_network_is_not_run_again(
    bar: float, status: str, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = capture_torch(Barred(bar).eval(), (torch.randn(2, 4),))
    cut = Cut(original.analysis, {g.name: [0, 3] for g in original.groups if g.kind != "layer"})
    made, done = certificate_file.masked, []

    def counted(*arguments: object) -> object:
        network = made(*arguments)  # type: ignore[arg-type]
        return lambda *given: (done.append(1), network(*given))[1]

    monkeypatch.setattr(certificate_file, "masked", counted)
    certificate = certify(original, apply_cut(original, cut), cut, seeds=(0,))
    assert certificate.status == status and len(done) == runs, str(certificate)


def test_a_wrong_network_has_no_say_in_what_counts_as_rounding() -> None:
    """A pruned network that magnifies rounding is judged by the floor of the masked one."""
    original = program("mlp")
    cut = Cut(original.analysis, some_units(original, 0.34))
    pruned = apply_cut(original, cut)
    honest = certify(original, pruned, cut)
    assert honest.passed and honest.floor < 1e-12
    steep = max((v for v in pruned.weights.values() if v.is_weight), key=lambda v: v.tensor.numel())  # type: ignore[union-attr]
    with torch.no_grad():
        steep.tensor.mul_(1e12)  # type: ignore[union-attr]
    wrong = certify(original, pruned, cut)
    assert wrong.status == "failed" and wrong.floor < 1e-12


def test_permuting_units_changes_nothing() -> None:
    """The units of a group have no order: a permutation of all members leaves the output as it is."""
    for name in TINY:
        original = program(name)
        inputs = random_inputs(original, 0)
        dense = run(original, inputs, dtype=torch.float64)
        tables = {leaf for dims in original.analysis.engine.constants.values() for dim in dims for leaf in leaves_of(dim)}
        for group in original.groups:
            if group.kind == "layer" or group.atom in tables:  # a folded table along the axis would have to be permuted too
                continue
            order = np.random.default_rng(0).permutation(group.size)
            tensors = {}
            for member in group.members:
                tensor = tensors.get(member.value, member.value.tensor.detach())
                positions = np.arange(member.value.shape[member.axis])
                positions[member.index] = member.index[order]
                tensors[member.value] = tensor.index_select(member.axis, torch.from_numpy(positions))
            assert distance(run(original, inputs, tensors=tensors, dtype=torch.float64), dense) < 1e-9, f"{name}: {group.name}"


def test_distance_sees_one_moved_weight_and_one_infinity() -> None:
    a = torch.ones(3, 4)
    b = a.clone()
    assert distance([a], [b]) == 0.0
    b[1, 2] += 1e-6
    assert distance([a], [b]) > 1e-7
    b[1, 2] = torch.inf
    assert distance([a], [b]) == float("inf")
    assert distance([a[:2]], [a]) == float("inf")
