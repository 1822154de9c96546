"""Models that read numbers out of tensors: what no input decides is answered, loops over the experts that were hit visit all of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphprune.capture.known_values import KnownValues
from graphprune.capture.torch_export import capture_torch
from graphprune.errors import CaptureError
from graphprune.planning import make_plan
from graphprune.surgery import Cut, apply_cut
from graphprune.verify.certificate import certify
from tests.randomise import randomise


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Padded(Mlp):
    """A padding computed from integer buffers, with a branch on it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.tensor(4))
        self.register_buffer("stride", torch.tensor(3))

    def forward(self, x):
        extra = (self.kernel - x.shape[1]) % self.stride
        if extra > 0:
            x = F.pad(x, (0, 0, 0, extra))
        return super().forward(x)


class OwnMask(Mlp):
    """Asks a mask that it made itself, and takes sizes from it."""

    def forward(self, x):
        mask = torch.ones(x.shape[:2])
        mask[:, -2:] = 0
        lengths = mask.sum(1).long()
        if (mask == 0).any() and not mask.all():
            x = x[:, : max(lengths.tolist())]
        rows = mask.nonzero()
        first = rows[rows[:, 0] == 0]
        assert len(first) == lengths[0]
        picked = torch.stack([x[i, j] for i, j in rows])
        return super().forward(picked.view(len(x), int(lengths[0]), -1))


class GivenMask(Mlp):
    """Asks an input: that cannot be answered."""

    def forward(self, x):
        return super().forward(x) if (x > 0).any() else x


class Overwritten(Mlp):
    """A mask that the input is written into is not known any more."""

    def forward(self, x):
        mask = torch.zeros(x.shape[:2])
        view = mask[:, 1:]
        view.copy_(x[:, 1:, 0])
        return super().forward(x) if mask.any() else x


class Mixture(nn.Module):
    """Experts that were hit, one after the other, as modules or stacked; the router settles its own type in forward."""

    def __init__(self, spare=0, extra=0.0):
        super().__init__()
        self.spare, self.extra = spare, extra
        self.router = nn.Linear(6, 5)
        self.experts = nn.ModuleDict({f"expert_{i}": Mlp() for i in range(5)})
        self.scale = nn.Parameter(torch.rand(5) + 0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        self.router = self.router.to(self.router.weight.dtype)
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        hot = F.one_hot(chosen, 5 + self.spare).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for row in torch.greater(hot.sum((1, 2)), 0).nonzero():
            expert = row[0]
            place, token = torch.where(hot[expert])
            out.index_add_(0, token, self.experts[f"expert_{expert}"](x[token]) * (weights[token, place] * self.scale[expert])[:, None])
            out = out + self.extra
        return self.head(out)


def settled(module: nn.Module, *inputs):
    return randomise(module.eval(), 0, *inputs), inputs


def proved(module: nn.Module, inputs) -> list[str]:
    """Kinds of the groups that were cut, after the certificate held."""
    program = capture_torch(module, inputs)
    cut = Cut(program.analysis, make_plan(program, pruning_ratio=0.5, round_to=1).removed)
    certificate = certify(program, apply_cut(program, cut), cut, dtype=torch.float64)
    assert certificate.status == "passed", certificate
    torch.testing.assert_close(program.source.graph_module(*inputs), module(*inputs))
    return [program.analysis.by_name[name].kind for name in cut.removed]


@pytest.mark.parametrize("kind", [Padded, OwnMask])
def test_values_that_no_input_decides(kind):
    assert proved(*settled(kind(), torch.randn(2, 5, 6))) == ["neuron"]


class Filled(Mlp):
    """A new tensor, full of something unknown."""

    def forward(self, x):
        return super().forward(x) if x.new_full((3,), 0).bool().any() or torch.full_like(x, x.sum()).any() else x


@pytest.mark.parametrize("kind", [GivenMask, Overwritten, Filled])
def test_values_that_an_input_decides_stay_unknown(kind):
    module, inputs = settled(kind(), torch.randn(2, 5, 6))
    with pytest.raises(CaptureError, match="data-dependent"):
        capture_torch(module, inputs)


@pytest.mark.parametrize("spare", [0, 1], ids=["experts", "one class more than experts"])
def test_experts_that_were_hit(spare):
    module, inputs = settled(Mixture(spare), torch.randn(9, 6))
    assert proved(module, inputs) == ["neuron"] * 5
    few = torch.randn(1, 6).expand(4, 6).clone()  # two experts are hit
    torch.testing.assert_close(capture_torch(module, (few,)).source.graph_module(few), module(few))


def test_a_loop_whose_body_counts_is_refused():
    module, _ = settled(Mixture(extra=0.5), torch.randn(9, 6))
    with pytest.raises(CaptureError, match="visits all positions"):
        capture_torch(module, (torch.randn(1, 6).expand(4, 6).clone(),))


def test_symbolic_sizes_stay_symbolic():
    class Scaled(Mlp):
        def forward(self, x):
            return super().forward(x) / (torch.ones(2) * x.shape[0]).sum()

    module, (x,) = settled(Scaled(), torch.randn(4, 6))
    graph = capture_torch(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).source.graph_module
    torch.testing.assert_close(graph(torch.cat([x, x])), module(torch.cat([x, x])))


def test_nothing_is_left_behind():
    module = Padded()
    original = nn.Module.to
    capture_torch(module, (torch.randn(2, 5, 6),))
    assert nn.Module.to is original
    assert not module._forward_pre_hooks
    with KnownValues(module):
        pass
    assert not module._forward_pre_hooks


def test_sizes_that_data_decides_look_alike_to_nobody():
    class Split(Mlp):
        def forward(self, x):
            positive = (x[:, 0] > 0).sum()
            first, second = x.split([positive.item(), len(x) - positive.item()])
            first = self.up(first).view(positive.item(), 2, -1) * torch.arange(positive.item())[:, None, None]  # its width is cut
            return torch.cat([self.down(first.flatten(1)), super().forward(second)])

    assert proved(*settled(Split(), torch.randn(9, 6))) == ["neuron"]
