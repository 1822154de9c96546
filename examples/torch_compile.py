"""Pruning as a `torch.compile` backend: the model stays as it is, what runs is smaller."""

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)).eval()
    fast = torch.compile(model, backend="graphprune", options={"pruning_ratio": 0.5})

    with torch.no_grad():
        x = torch.randn(8, 64)
        before, after = model(x), fast(x)
        print("outputs:", tuple(after.shape), "moved by", float((after - before).abs().max()))
        assert after.shape == before.shape and not torch.equal(after, before)

        # The user's weights are the source of truth: new ones take effect without compiling again.
        model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
        assert not torch.allclose(fast(x), after)

    # With gradients the pruned graph trains the user's own parameters.
    loss = fast(torch.randn(8, 64)).square().mean()
    loss.backward()
    rows = model[0].weight.grad.abs().sum(1)
    print(f"first layer: {int((rows > 0).sum())} of {len(rows)} neurons receive gradients")


if __name__ == "__main__":
    main()
