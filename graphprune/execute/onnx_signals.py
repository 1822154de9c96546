"""ONNX operators on signals and token streams: Fourier transforms, windows, mel filters, n-gram counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import UnsupportedOp
from graphprune.rules.onnx_literals import ints, numbers


def _dft(input: Tensor, dft_length: Any = None, axis: Any = None, inverse: int = 0, onesided: int = 0) -> Tensor:
    (dim,) = ints(axis) or (-2,)
    dim = dim % input.dim()
    lengths = ints(dft_length)
    signal = torch.view_as_complex(input.contiguous()) if input.shape[-1] == 2 else input[..., 0]
    if onesided and inverse:
        return torch.fft.irfft(signal, lengths[0] if lengths else None, dim).unsqueeze(-1)
    length = lengths[0] if lengths else signal.shape[dim]
    spectrum = (torch.fft.ifft if inverse else torch.fft.fft)(signal, length, dim)
    return torch.view_as_real(spectrum.narrow(dim, 0, length // 2 + 1) if onesided else spectrum)


def _stft(signal: Tensor, frame_step: Any, window: Tensor | None = None, frame_length: Any = None, onesided: int = 1) -> Tensor:
    (step,) = ints(frame_step) or (1,)
    length = (ints(frame_length) or [window.shape[0] if window is not None else 0])[0]
    real = signal.dim() == 2 or signal.shape[-1] == 1
    x = signal if signal.dim() == 2 else signal[..., 0] if real else torch.view_as_complex(signal.contiguous())
    frames = x.unfold(1, length, step)
    frames = frames if window is None else frames * window
    spectrum = torch.fft.fft(frames, dim=-1)
    return torch.view_as_real(spectrum[..., : length // 2 + 1] if onesided and real else spectrum)


def _cosine_window(*terms: float) -> Callable[..., Tensor]:
    def run(size: Any, periodic: int = 1, output_datatype: torch.dtype | None = torch.float32) -> Tensor:
        (count,) = ints(size) or (0,)
        phase = 2 * math.pi * torch.arange(count, dtype=torch.float64) / (count if periodic else count - 1)
        return sum((term * torch.cos(i * phase) for i, term in enumerate(terms)), torch.zeros_like(phase)).to(output_datatype)

    return run


def _mel_weight_matrix(
    num_mel_bins: Any,
    dft_length: Any,
    sample_rate: Any,
    lower_edge_hertz: Any,
    upper_edge_hertz: Any,
    output_datatype: torch.dtype | None = torch.float32,
) -> Tensor:
    """Triangles of height 1 whose corners are evenly spaced in mel: (dft_length // 2 + 1, num_mel_bins)."""
    operands = (num_mel_bins, dft_length, sample_rate, lower_edge_hertz, upper_edge_hertz)
    bins, length, rate, lower, upper = ((numbers(operand) or [0])[0] for operand in operands)
    low, high = (2595 * math.log10(1 + edge / 700) for edge in (lower, upper))
    mel = low + torch.arange(bins + 2, dtype=torch.float64) * (high - low) / (bins + 2)  # not bins + 1: so the standard has it
    corner = ((length + 1) * 700 * (10 ** (mel / 2595) - 1) / rate).floor()
    left, centre, right = corner[:-2], corner[1:-1], corner[2:]
    at = torch.arange(length // 2 + 1, dtype=torch.float64)[:, None]
    rising = torch.where((at >= left) & (at <= centre), (at - left) / (centre - left).clamp(min=1), 0.0)
    falling = torch.where((at > centre) & (at < right), (right - at) / (right - centre).clamp(min=1), 0.0)
    return torch.where((at == centre), torch.ones_like(at), rising + falling).to(output_datatype)


def _tf_idf(
    X: Tensor,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] | None = None,
    pool_strings: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """How often each n-gram of the pool occurs in a row, its tokens side by side or as many as `max_skip_count` skipped between two."""
    if pool_int64s is None or pool_strings is not None:
        raise UnsupportedOp("ai.onnx::TfIdfVectorizer over strings; torch has no strings")
    tokens = X.reshape(-1, X.shape[-1]).long()
    length, ends, first = tokens.shape[1], [*ngram_counts[1:], len(pool_int64s)], 0
    out = torch.zeros(tokens.shape[0], max(ngram_indexes) + 1, device=X.device)
    for n, (start, end) in enumerate(zip(ngram_counts, ends), 1):
        pool = torch.tensor(pool_int64s[start:end], dtype=torch.int64, device=X.device).reshape(-1, n)
        columns = list(ngram_indexes[first : first + len(pool)])
        first += len(pool)
        if not min_gram_length <= n <= max_gram_length or not columns:
            continue
        for skip in range(max_skip_count + 1 if n > 1 else 1):
            step = skip + 1
            places = torch.arange(max(length - (n - 1) * step, 0), device=X.device)[:, None] + torch.arange(n, device=X.device) * step
            found = (tokens[:, places][:, :, None] == pool).all(-1).sum(1)
            out[:, columns] += found.to(out.dtype)
    if mode != "TF":
        weight = torch.ones(out.shape[1], device=X.device)
        weight[list(ngram_indexes)] = torch.tensor(list(weights or [1.0] * len(ngram_indexes)), device=X.device)
        out = (out if mode == "TFIDF" else (out > 0).to(out.dtype)) * weight
    return out.reshape(*X.shape[:-1], out.shape[1])


SIGNAL_OPS: dict[str, Callable[..., Any]] = {
    "BlackmanWindow": _cosine_window(0.42, -0.5, 0.08),
    "DFT": _dft,
    "HammingWindow": _cosine_window(25 / 46, -21 / 46),
    "HannWindow": _cosine_window(0.5, -0.5),
    "MelWeightMatrix": _mel_weight_matrix,
    "STFT": _stft,
    "TfIdfVectorizer": _tf_idf,
}
