"""A convolutional network: prune it, look at the report, save the smaller one and load it again."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import graphprune as gp


class Block(nn.Module):
    """A residual block: its output channels are tied to those of the sum, its inner ones are free."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def network() -> nn.Sequential:
    stem = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(*stem, Block(32), Block(32), *head).eval()


def main() -> None:
    torch.manual_seed(0)
    model, images = network(), torch.randn(4, 3, 32, 32)

    result = gp.compile(model, images, pruning_ratio=0.5)
    print(result.report)
    print("first convolution:", model[0].weight.shape, "->", result.module[0].weight.shape)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small"
        result.save(path)
        again = gp.load(path, network())  # the code comes from here, the weights from the folder
        torch.testing.assert_close(again(images), result(images))
        print("saved and loaded:", sorted(file.name for file in path.iterdir()))


if __name__ == "__main__":
    main()
