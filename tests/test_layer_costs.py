"""Costs by layer add up to the network's, and measuring changes nothing."""

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune import costs
from graphprune.layer_costs import layer_costs, op_times
from graphprune.surgery import Cut, apply_cut


class Net(nn.Module):
    """Two convolutions beside a skip connection, a transposed weight, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 1)
        self.table = nn.Parameter(torch.randn(6, 5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).mean((2, 3))
        return self.drop(x) @ self.table


def cut_net(train: bool = False):
    torch.manual_seed(0)
    net = Net().train(train)
    program = gp.capture(net, torch.randn(2, 3, 6, 6))
    group = next(g for g in program.groups if g.size == 8)
    cut = Cut(program.analysis, {group.name: (0, 3, 5)})
    return net, program, cut, apply_cut(program, cut)


def test_layers_add_up_and_have_widths():
    _, program, cut, pruned = cut_net()
    times, line = op_times(program, pruned)
    rows = layer_costs(program, cut, times)
    for i, whole in enumerate((costs.cost(program), costs.cost(program, cut))):
        assert sum(row.params[i] for row in rows) == whole.params
        assert sum(row.macs[i] for row in rows) == whole.macs
    by_name = {row.name: row for row in rows}
    assert by_name["first"].width == (8, 5) and by_name["first"].op == "conv2d"
    assert by_name["first"].params == (8 * 27 + 8, 5 * 27 + 5) and by_name["first"].macs == (2 * 36 * 8 * 27, 2 * 36 * 5 * 27)
    assert by_name["second"].width == (6, 6) and by_name["second"].params == (6 * 8 + 6, 6 * 5 + 6)
    assert by_name["norm"].width is None and by_name["norm"].params == (16, 10)
    assert next(row for row in rows if row.op == "matmul").width == (5, 5)
    assert all(row.ms is not None and min(row.ms) > 0 for row in rows) and "each op run by itself" in line


def test_a_removed_branch_costs_nothing_after():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(x + self.inner(x).relu())

    program = gp.capture(Skip().eval(), torch.randn(2, 4))
    branch = next(g for g in program.groups if g.kind == "layer")
    rows = {row.name: row for row in layer_costs(program, Cut(program.analysis, {branch.name: (0,)}))}
    assert rows["inner"].params == (20, 0) and rows["inner"].macs == (32, 0) and rows["inner"].width == (4, 0)
    assert rows["last"].params == (10, 10) and rows["last"].ms is None


def test_measuring_changes_neither_weights_nor_statistics_nor_the_random_state():
    net, program, _, pruned = cut_net(train=True)
    before = {name: it.clone() for name, it in net.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    times, _ = op_times(program, pruned)
    assert times and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(it, before[name]) for name, it in net.state_dict().items())


def test_what_cannot_run_is_not_measured_and_says_so(monkeypatch):
    _, program, _, pruned = cut_net()

    def refuse(**_):
        raise NotImplementedError("no kernel for this dtype\nmore")

    monkeypatch.setattr(program.nodes[0], "call", refuse)
    assert op_times(program, pruned) == ({}, "not measured: no kernel for this dtype")


def test_meta_weights_are_not_measured():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        program = gp.capture(net, torch.empty(2, 4, device="meta"))
    assert op_times(program, program) == ({}, "not measured: the weights are on the meta device")


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_at_least_one_and_few_rounds(seconds):
    _, program, _, pruned = cut_net()
    _, line = op_times(program, pruned, seconds)
    assert line.endswith("median of 1 runs" if seconds == 0 else "median of 5 runs")
