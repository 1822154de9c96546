"""Graphs in which an in-place op writes through a view are functionalised; what evaluation mode makes idle has to survive that."""

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.capture.torch_export import capture_torch
from graphprune.surgery import Cut, apply_cut
from graphprune.surgery.fallback import edited_graph


class Filled(nn.Module):
    """A dropout, then a write through a view of a copy of what it returns."""

    def __init__(self, in_place=False):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(6, 8), nn.Dropout(0.5, in_place), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.up(x)
        held = self.drop(hidden).clone()
        held[:, 2:5].mul_(2.0)
        return self.down(held + hidden)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_dropout_survives_and_follows_the_mode(in_place):
    torch.manual_seed(0)
    module, x = Filled(in_place).eval(), torch.randn(4, 6)
    program = capture_torch(module, (x,))
    (dropout,) = [node for node in program.nodes if node.op_type == "dropout"]
    assert dropout.scope == "drop" and any(node.op_type == "slice_scatter" for node in program.nodes)
    torch.testing.assert_close(program.source.graph_module(x), module(x))
    hidden = next(node for node in program.nodes if node.op_type == "linear").outputs[0]
    assert [node.op_type for node in hidden.uses] == (["dropout"] if in_place else ["dropout", "add"])  # what else reads it is not dropped
    cut = Cut(program.analysis, gp.plan(program, pruning_ratio=0.5, round_to=1).removed)
    graph, _ = edited_graph(module, program, cut, apply_cut(program, cut))
    assert torch.equal(graph.eval()(x), graph(x))
    graph.train()
    torch.manual_seed(0)
    first = graph(x)
    assert not torch.equal(first, graph(x))
