"""Example inputs for Hugging Face models, made from their config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

BATCH, LENGTH = 2, 11  # torch.export specialises sizes 0 and 1


def is_hugging_face(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "main_input_name") and hasattr(module, "save_pretrained")


def forward_defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments that make the graph of a forward pass a function of its tensors: no cache object is taken or returned."""
    if not is_hugging_face(module):
        return {}
    parameters = inspect.signature(module.forward).parameters
    config: Any = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    caches = getattr(text, "use_cache", False) and (text is not config or getattr(module, "can_generate", bool)())
    passed_on = caches and any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # language models inside do not show theirs
    return {"use_cache": False} if "use_cache" in parameters or passed_on else {}


def example_kwargs(module: nn.Module) -> dict[str, Any] | None:
    """Inputs of a plausible kind and size, or None when the config does not say enough.

    Shapes: token ids (BATCH, LENGTH) int64, pixels (BATCH, channels, height, width), audio (BATCH, samples) or (BATCH, mel bins, frames).
    """
    if not is_hugging_face(module):
        return None
    config: Any = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def tokens(length: int = LENGTH) -> torch.Tensor:
        vocabulary: int = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 97
        return torch.randint(3, max(4, vocabulary), (BATCH, length), generator=generator).to(device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    makers = {
        "input_ids": tokens,
        "decoder_input_ids": lambda: tokens(LENGTH - 2),
        "pixel_values": lambda: normal(BATCH, getattr(vision, "num_channels", 3), height, width),
        "input_values": lambda: normal(
            BATCH, getattr(config, "max_length", 0) or 4000, *([config.num_mel_bins] if hasattr(config, "num_mel_bins") else [])
        ),
        "input_features": lambda: normal(BATCH, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 100)),
    }
    parameters = inspect.signature(module.forward).parameters
    wanted: list[Any] = [module.main_input_name]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    if "pixel_values" in parameters and "input_ids" in parameters and hasattr(config, "vision_config"):
        wanted = ["input_ids", "pixel_values"]
        if any(name in vars(config) for name in ("image_token_id", "image_token_index")):
            return None  # the text must hold as many image tokens as the processor puts there
    if not all(name in makers for name in wanted):
        return None
    return {name: makers[name]() for name in dict.fromkeys(wanted)}
