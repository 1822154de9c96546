"""Random weights under which nothing can hide: what the zoos of tests and benchmarks hand to the pruner.

Freshly built networks are full of exact zeros and ones: norm scales, biases, LayerScale, zero-initialised gates, class tokens. A cut that
forgets one of those is right by accident. `randomise` gives each of them a value, keeps signals of order one through the network, and
sets the statistics of batch norms from data.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_leaves, tree_map

_TABLES = ("pos", "table", "token", "embed", "query", "latent", "memory", "mean", "template")  # parameters that are data, not a map


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode and the arguments that one forward call takes."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.module(*self.args, **self.kwargs)


@contextmanager
def seeded(seed: int):
    """The global CPU generator at `seed`, and back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomise(module: nn.Module, seed: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Fills `module` in place as the docstring of this file says, in evaluation mode; the global random state is left alone.

    Args:
        module: any network, freshly built.
        seed: of the generator that all values are drawn from.
        *args: with `**kwargs`, a call of the module. Needed to calibrate batch norms; without it they get plausible statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    module.eval()
    with torch.no_grad():
        for path, owner in module.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.numel():
                    _fill(parameter, name, path, owner, generator)
            for name, buffer in owner.named_buffers(recurse=False):
                if name.endswith(("bias", "embed")) and buffer.is_floating_point() and not buffer.any():  # of routers, of codebooks
                    buffer.normal_(0, 0.1 if name.endswith("bias") else 1, generator=generator)
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if norms:
            with seeded(seed):
                _calibrate(module, norms, args, kwargs)
            for norm in norms:
                _jitter(norm, generator)
    module.train()  # drops what some networks keep in evaluation mode, such as tables of attention biases that were looked up
    return module.eval()


def _fill(p: Tensor, name: str, path: str, owner: nn.Module, generator: torch.Generator) -> None:
    """Replaces what is constant or faint in one parameter; what its own initialisation made loud enough stays as it is."""

    def normal(mean: float, std: float) -> None:
        p.normal_(mean, std, generator=generator)

    sample = p.detach().flatten()[:: max(1, p.numel() // 4096)].float()
    low, high, spread = float(sample.min()), float(sample.max()), float(sample.std(correction=0))
    peak = max(abs(low), abs(high))
    is_bias = name.endswith("bias")
    if name == "weight" and isinstance(owner, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        p.uniform_(0.5, 1.5, generator=generator)  # whatever it was: some start at zero, some near it
        return
    if is_bias and "dt_" in f"{path}.{name}":  # of a state space's time steps: long enough for the input to steer the state
        p.uniform_(-1.5, 0.5, generator=generator)
        return
    constant = high - low <= 1e-6 * peak
    is_norm = "norm" in type(owner).__name__.lower()
    is_table = isinstance(owner, nn.Embedding) or (not name.endswith("weight") and any(word in name.lower() for word in _TABLES))
    if constant and peak >= 0.2:  # a scale: of a norm, a skip connection, logits (there given as a logarithm, so it stays near)
        width = 0.5 if peak <= 1.5 else 0.1
        p.copy_(low * (1 + width * (2 * torch.rand(p.shape, generator=generator, dtype=torch.float32) - 1)))
    elif sum(size > 1 for size in p.shape) <= 1 and not is_table:
        if peak < 1e-3 and (is_bias or is_norm):  # zero-centred norm scales add one themselves
            p.copy_(torch.rand(p.shape, generator=generator) - 0.5) if is_norm and not is_bias else normal(0, 0.1)
        elif constant or peak < 1e-3:  # LayerScale, residual gates
            normal(0.5, 0.2)
    elif is_table:
        if spread < 0.3:
            normal(0, 0.5)
            padding = getattr(owner, "padding_idx", None)
            if padding is not None:
                p[padding].zero_()
    else:
        loud = _fan_in(p, owner) ** -0.5
        if spread < 0.4 * loud:
            normal(0, 0.7 * loud)


def _fan_in(p: Tensor, owner: nn.Module) -> int:
    """How many terms one output element sums: exact for linear and conv weights, the longer side for stacks of matrices."""
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return p.shape[0] // owner.groups * p[0, 0].numel()
    if p.ndim == 3 and not isinstance(owner, nn.modules.conv._ConvNd):
        return max(p.shape[1:])
    return max(1, p[0].numel())


def _calibrate(module: nn.Module, norms: list[_BatchNorm], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Statistics of all batch norms from one call (and of noise of the same shape), each norm fed by calibrated ones; or plausible ones."""
    if not args and not kwargs:
        for norm in norms:
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    module(*args, **kwargs)
    noise = tree_map(lambda t: torch.randn_like(t) if isinstance(t, Tensor) and t.is_floating_point() else t, (args, dict(kwargs)))
    module(*noise[0], **noise[1])
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()


def _jitter(norm: _BatchNorm, generator: torch.Generator) -> None:
    """Moves means by a tenth of the deviation; lifts small variances, which a batch of two pixels measures near zero by chance."""
    var = norm.running_var
    var.mul_(0.5 + 0.5 * torch.rand(var.shape, generator=generator)).add_(0.5 * var.mean().clamp(min=1e-3))
    norm.running_mean.add_(0.1 * var.sqrt() * torch.randn(var.shape, generator=generator))


def tensors(output: Any) -> list[Tensor]:
    """Floating-point tensors of any nest of outputs."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def check(case: Case, limit: float = 1e4) -> Any:
    """Runs the case; its output.

    Raises:
        AssertionError: if an output is not finite, is larger than `limit`, or does not depend on the inputs.
    """
    before = case()
    outputs = tensors(before)
    assert outputs, "no floating-point output"
    for i, out in enumerate(outputs):
        assert bool(torch.isfinite(out).all()), f"output {i} {list(out.shape)} is not finite"
        assert float(out.abs().max()) < limit, f"output {i} {list(out.shape)} is as large as {float(out.abs().max()):.3g}"
    with seeded(1):
        args, kwargs = tree_map(_disturbed, (case.args, dict(case.kwargs)))
    after = tensors(Case(case.module, args, kwargs)())
    assert any(a.shape != b.shape or bool((a - b).abs().max() > 1e-4 * b.abs().max()) for a, b in zip(after, outputs)), \
        "the output does not depend on the input"
    return before


def _disturbed(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dtype == torch.bool:
        return leaf
    return leaf + 0.5 * torch.randn_like(leaf) if leaf.is_floating_point() else leaf.flip(-1)
