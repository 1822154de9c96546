"""State-space mixers captured whole: while a model is traced, the scan of `transformers`' mixers is one node of our own.

Since 5.17 every mixer of `transformers` calls its scan through a function of its modeling file, under one of the names in `_PATCHES`. So
nothing of a mixer is rewritten here: those functions are replaced in the files that are loaded, whatever kernel stands behind them,
and projections, convolution, norms and masks stay the ordinary ops of the model, on its own parameters. The one-token step with a
filled cache is another function, which stays as it is.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphprune.errors import CaptureError
from graphprune.ops.delta_rule import gated_delta_rule
from graphprune.ops.selective_scan import selective_scan
from graphprune.ops.ssd import ssd_scan

_Scan = Tensor | tuple[Tensor, Tensor]


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **options: Any,
) -> _Scan:
    """Mamba-1: bias, softplus and gate around `graphprune::selective_scan`."""
    _refuse_packed(options)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    y, state = selective_scan(hidden_states, dt, A, B, C, D)
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_last_state else y


def _ssd_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **options: Any,
) -> _Scan:
    """Mamba-2: bias, softplus, clamp and gate around `graphprune::ssd_scan`."""
    _refuse_packed(options)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    y, state = ssd_scan(hidden_states, dt, A, B, C, D, initial_states)
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_final_states else y


def _gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet: norms and scale of queries and keys before `graphprune::gated_delta_rule`."""
    _refuse_packed(options)
    dtype, precise = value.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(precise), key.to(precise)
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (query, key))
    y, state = gated_delta_rule(query * query.shape[-1] ** -0.5, key, value, g, beta, initial_state)
    return y.to(dtype), state if output_final_state else None


def _refuse_packed(options: dict[str, Any]) -> None:
    for name in ("seq_idx", "cu_seqlens"):
        if options.get(name) is not None:
            raise CaptureError(f"a state-space mixer got packed sequences ({name}); capture the model with one sequence per row")


def _plain_convolution(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The torch function behind the dispatch to a CUDA package."""
    plain = inspect.unwrap(original)

    def causal_conv1d(*args: Any, **options: Any) -> Tensor:
        _refuse_packed(options)
        return plain(*args, **options)

    return causal_conv1d


def _not_fused(original: Callable[..., Any]) -> Callable[..., None]:
    """A mixer takes its step-by-step path where the function that fuses it whole returns nothing."""
    return lambda *args, **options: None


_PATCHES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {  # function of a modeling file -> what to make of it
    "mamba_selective_scan": lambda original: _selective_scan,  # Mamba, FalconMamba, Jamba, Zamba (one call per mamba head)
    "mamba2_chunk_scan": lambda original: _ssd_scan,  # Mamba2, Bamba, Zamba2, FalconH1, GraniteMoeHybrid, NemotronH
    "torch_chunk_gated_delta_rule": lambda original: _gated_delta_rule,  # Qwen3-Next, Qwen3.5, OLMo hybrid
    "mamba_inner_fn": _not_fused,
    "mamba2_split_conv1d_scan_combined": _not_fused,
    "causal_conv1d_fn": _plain_convolution,
}
_SCANS = ("mamba_selective_scan", "mamba2_chunk_scan", "torch_chunk_gated_delta_rule")
_lock = threading.Lock()
_entered = 0
_originals: list[tuple[ModuleType, str, Any]] = []


@contextmanager
def scans_captured_whole() -> Iterator[None]:
    """Inside, mixers of the `transformers` models that are loaded run their scans as ops of `graphprune`.

    May be nested and entered from several threads: the first entry patches, the last exit restores. Another thread that runs such a
    model meanwhile computes the same, through our reference.
    """
    global _entered
    with _lock:
        if not _entered:
            _patch()
        _entered += 1
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                _restore()


def _patch() -> None:
    for name, module in list(sys.modules.items()):
        attributes = vars(module) if name.startswith("transformers") and isinstance(module, ModuleType) else {}
        if any(scan in attributes for scan in _SCANS):  # other linear attentions use the same convolution and are left alone
            for function, patch in _PATCHES.items():
                if function in attributes:
                    _originals.append((module, function, attributes[function]))
                    setattr(module, function, patch(attributes[function]))


def _restore() -> None:
    while _originals:
        setattr(*_originals.pop())
