"""Parts of diffusion pipelines as tiny random configurations of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.row import Row, row

_Inputs = Callable[[], dict[str, Tensor]]

_UNET: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (24, 36), "layers_per_block": 1, "norm_num_groups": 6, "attention_head_dim": 6,
}
_VAE: dict[str, Any] = {"block_out_channels": (24, 36), "norm_num_groups": 6, "latent_channels": 4}


def _noise(channels: int, size: int = 16, **more: Callable[[], Tensor]) -> _Inputs:
    fixed = {"sample": lambda: torch.randn(2, channels, size, size), "timestep": lambda: torch.tensor([7, 90])}
    return lambda: {key: make() for key, make in {**fixed, **more}.items()}


def _text(width: int, seq_len: int = 11) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, seq_len, width)


# name -> class, options, inputs
_MODELS: dict[str, tuple[str, dict[str, Any], _Inputs]] = {
    "unet2d": ("UNet2DModel", {**_UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, _noise(3)),
    "unet2d_condition": ("UNet2DConditionModel",
                         {**_UNET, "cross_attention_dim": 20, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                          "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
                         _noise(4, encoder_hidden_states=_text(20))),
    "unet2d_condition-linear": ("UNet2DConditionModel",
                                {**_UNET, "cross_attention_dim": 20, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                                 "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
                                 "transformer_layers_per_block": 2},
                                _noise(4, encoder_hidden_states=_text(20))),
    "controlnet": ("ControlNetModel", {"block_out_channels": (24, 36), "layers_per_block": 1, "norm_num_groups": 6,
        "attention_head_dim": 6, "cross_attention_dim": 20, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (8, 12)},
        _noise(4, encoder_hidden_states=_text(20), controlnet_cond=lambda: torch.randn(2, 3, 32, 32))),
    "dit": ("DiTTransformer2DModel", {"num_attention_heads": 4, "attention_head_dim": 10, "num_layers": 2, "sample_size": 8,
        "num_embeds_ada_norm": 17, "norm_num_groups": 4},
        lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 11]), "class_labels": torch.tensor([1, 5])}),
    "pixart": ("PixArtTransformer2DModel", {"num_attention_heads": 4, "attention_head_dim": 10, "num_layers": 2, "sample_size": 8,
        "cross_attention_dim": 40, "caption_channels": 22, "norm_num_groups": 4},
        lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 11]),
        "encoder_hidden_states": torch.randn(2, 11, 22)}),
    "sd3": ("SD3Transformer2DModel", {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 10,
        "num_attention_heads": 4, "joint_attention_dim": 22, "caption_projection_dim": 40, "pooled_projection_dim": 26, "out_channels": 4,
        "pos_embed_max_size": 12}, lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 11, 22),
        "pooled_projections": torch.randn(2, 26), "timestep": torch.tensor([3.0, 11.0])}),
    "flux": ("FluxTransformer2DModel", {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 22, "pooled_projection_dim": 26, "axes_dims_rope": (4, 4, 8)},
        lambda: {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 11, 22),
        "pooled_projections": torch.randn(2, 26), "timestep": torch.tensor([0.3, 0.9]), "img_ids": torch.randint(9, (16, 3)).float(),
        "txt_ids": torch.zeros(11, 3)}),
    "sana": ("SanaTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 10,
        "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 20, "cross_attention_dim": 40,
        "caption_channels": 22, "sample_size": 8},
        lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 11, 22),
        "timestep": torch.tensor([3, 11])}),
    "autoencoder_kl": ("AutoencoderKL",
        {**_VAE, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": torch.randn(2, 3, 32, 32)}),
    "autoencoder_tiny": ("AutoencoderTiny", {"encoder_block_out_channels": (12, 12), "decoder_block_out_channels": (12, 12),
                                             "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)},
                         lambda: {"sample": torch.rand(2, 3, 32, 32)}),
    "vq_model": ("VQModel", {"block_out_channels": (24, 36), "norm_num_groups": 6, "latent_channels": 4, "num_vq_embeddings": 13,
                             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
                 lambda: {"sample": torch.randn(2, 3, 32, 32)}),
}

# name -> why torch.export refuses it
_REFUSED: dict[str, str] = {}


def _network(kind: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def network() -> nn.Module:
        import diffusers

        return getattr(diffusers, kind)(**options)

    return network


ROWS: list[Row] = [
    row(f"diffusers/{name}", "diffusion", _network(kind, options), inputs, _REFUSED.get(name, ""))
    for name, (kind, options, inputs) in _MODELS.items()
]
