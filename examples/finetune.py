"""Fine-tuning after pruning: the result is an ordinary module, so the training loop stays the one you have."""

import torch
from torch import nn

import graphprune as gp


def batches(count: int, seed: int):
    """Noisy pictures of a bar that is either upright or flat."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, 2, (32,), generator=generator)
        images = 0.5 * torch.randn(32, 1, 16, 16, generator=generator)
        at = torch.randint(2, 14, (32,), generator=generator)
        for image, label, position in zip(images, labels, at):
            (image[0, :, position] if label else image[0, position]).add_(1.0)
        yield images, labels


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for images, labels in batches(steps, seed=0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in batches(10, seed=1)) / 10


def main() -> None:
    torch.manual_seed(0)
    convs = (nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
    model = nn.Sequential(*convs, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    train(model, 80)

    result = gp.compile(model, torch.randn(2, 1, 16, 16), pruning_ratio=0.75)
    pruned = accuracy(result.module)
    train(result.module, 40)

    print(result.report)
    print(f"accuracy: dense {accuracy(model):.3f}, pruned {pruned:.3f}, pruned and fine-tuned {accuracy(result.module):.3f}")


if __name__ == "__main__":
    main()
