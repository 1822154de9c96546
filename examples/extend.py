"""Two extensions: a rule for an op of one's own, so that its axes can be cut, and an importance of one's own."""

import torch
from torch import nn

import graphprune as gp
from graphprune.rules import RULES


@torch.library.custom_op("example::scaled_swish", mutates_args=())
def scaled_swish(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(scale * x), one scale per feature."""
    return x * torch.sigmoid(scale * x)


@scaled_swish.register_fake
def _(x, scale):
    return torch.empty_like(x)


# One line says how the axes correspond. The scale stands after ";": it does not decide whether the result vanishes, x does.
RULES["example", "scaled_swish"] = "x[... c]; scale[c] -> ... c"


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 4)
        self.scale = nn.Parameter(torch.rand(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(scaled_swish(self.up(x), self.scale))


def largest_weight(group) -> torch.Tensor:
    """Scores, higher means keep: the largest weight that writes a unit."""
    writers = [m for m in group.members if m.role.value == "writer"]
    rows = [m.value.tensor.movedim(m.axis, 0)[m.index].flatten(1) for m in writers]  # (group.size, entries)
    return torch.cat(rows, 1).abs().amax(1)


def main() -> None:
    torch.manual_seed(0)
    model = Network().eval()

    program = gp.capture(model, torch.randn(2, 16))
    (group,) = program.groups
    print(f"{group.name}: {group.size} units in {', '.join(member.tensor for member in group.members)}")

    result = gp.compile(program, pruning_ratio=0.5, importance=largest_weight)
    print(result.report)
    kept = sorted(set(range(group.size)) - set(result.plan.removed[group.name]))
    best = largest_weight(group).topk(24).indices.sort().values.tolist()
    print("kept by scores of one's own:", kept == best)
    assert kept == best and result.module.scale.shape == (24,)


if __name__ == "__main__":
    main()
