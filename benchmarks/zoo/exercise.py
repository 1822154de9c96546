"""Is a pruned module still a module? It trains, its state saves and reloads strictly, and its modes differ where they should."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn

from tests.randomise import tensors

STEPS = 20
SLOWEST = 0.4  # seconds of a forward pass on one core: beyond, twenty training steps take a minute and more

STOCHASTIC = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _Resized(Exception):
    """An output has another size after a step of training, as durations of speech have."""


def exercise(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`{"falls", "reloads", "modes"}`: True, False, or a string saying why it was not tried."""
    try:
        module = copy.deepcopy(module)
    except RuntimeError as error:  # a module that keeps results of an earlier call
        return dict.fromkeys(("falls", "reloads", "modes"), f"not tried: {error}"[:120])

    def outputs() -> list[torch.Tensor]:
        with torch.random.fork_rng():  # a model that draws noise draws the same each time
            torch.manual_seed(0)
            return [y for y in tensors(module(*args, **kwargs)) if y.is_floating_point()]

    module.eval()
    start = time.perf_counter()
    with torch.no_grad():
        targets = [y + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)) * y.std() for y in outputs()]
    seconds = time.perf_counter() - start
    reloads = _reloads(module)  # first: a module that keeps results of a call cannot be copied once they have a gradient
    try:
        falls = _falls(module, outputs, targets) if seconds <= SLOWEST else f"not tried: {seconds:.1f} s per call"
    except _Resized:
        falls = "not tried: the weights decide the sizes of the outputs"
    return {"falls": falls, "reloads": reloads, "modes": _modes(module, outputs)}


def _falls(module: nn.Module, outputs: Any, targets: list[torch.Tensor]) -> bool | str:
    """Twenty steps of SGD lower the distance to a perturbed output, at one of three rates."""
    start = copy.deepcopy(module.state_dict())

    spread = [t.var() if t.numel() > 1 else torch.zeros(()) for t in targets]  # an output that is one number, such as a loss, has none

    def loss() -> torch.Tensor:
        found = outputs()
        if any(y.shape != t.shape for y, t in zip(found, targets)):
            raise _Resized
        return sum(((y - t) ** 2).mean() / v for y, t, v in zip(found, targets, spread) if v > 1e-12)  # type: ignore[return-value]

    for rate in (1e-2, 1e-3, 1e-4):
        module.load_state_dict(start)
        parameters = [p.requires_grad_() for p in module.parameters() if p.is_floating_point()]
        optimiser = torch.optim.SGD(parameters, lr=rate)
        before = float(loss().detach())
        for _ in range(STEPS):
            optimiser.zero_grad()
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        if float(loss().detach()) < before:
            return True
    return False


def _reloads(module: nn.Module) -> bool:
    """The state fits another copy strictly, and the copy then holds the same values."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(module.state_dict(), strict=True)
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values()))


def _modes(module: nn.Module, outputs: Any) -> bool | str:
    """Training differs from evaluation where a dropout or a batch norm says so."""
    noisy = any(isinstance(m, STOCHASTIC) and m.p > 0 for m in module.modules())
    if not noisy and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        return "no dropout, no batch norm"
    with torch.no_grad():
        module.eval()
        calm = outputs()
        module.train()
        lively = outputs()
        module.eval()
    return any(not torch.equal(a, b) for a, b in zip(calm, lively))
