"""Hugging Face architectures as tiny random configurations.

Two layers; sizes that are free differ from each other (hidden 48, MLP 112, 6 heads on 2 KV heads, head_dim 10, vocabulary 97, 11 tokens),
so that a wrong correspondence of axes shows as a wrong size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.row import Row, images, row

Options = dict[str, Any]

_TOKENS: Options = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
_WIDTH: Options = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
_TEXT: Options = {**_TOKENS, **_WIDTH, "intermediate_size": 112, "max_position_embeddings": 64}
_GQA: Options = {**_TEXT, "num_key_value_heads": 2}
_HEAD: Options = {**_GQA, "head_dim": 10}
_GPT: Options = {**_TOKENS, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 112}
_MLA: Options = {
    **_TEXT, "num_key_value_heads": 6,
    "q_lora_rank": 26, "kv_lora_rank": 22, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12,
}
_MOE: Options = {"moe_intermediate_size": 28, "num_experts_per_tok": 3}
_SSM: Options = {"mamba_d_state": 14, "mamba_d_conv": 3, "mamba_expand": 2}

# name -> model type, options. One decoder a line: plain and grouped-query attention first.
_DECODERS: dict[str, tuple[str, Options]] = {
    "llama": ("llama", {**_TEXT, "num_key_value_heads": 6}),
    "llama-gqa": ("llama", _HEAD),
    "llama-mqa": ("llama", {**_HEAD, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {**_HEAD, "tie_word_embeddings": True}),
    "apertus": ("apertus", _GQA),
    "arcee": ("arcee", _HEAD),
    "bitnet": ("bitnet", _GQA),
    "biogpt": ("biogpt", _TEXT),
    "bloom": ("bloom", {**_TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "codegen": ("codegen", {**_GPT, "n_head": 4, "rotary_dim": 6}),  # its fused projection is laid out for four shards
    "cohere": ("cohere", {**_GQA, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**_GQA, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "ctrl": ("ctrl", {**_TOKENS, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6, "dff": 112}),
    "diffllama": ("diffllama", {**_GQA, "head_dim": 8}),
    "ernie4_5": ("ernie4_5", _HEAD),
    "exaone4": ("exaone4", {**_HEAD, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "falcon-alibi": ("falcon", {**_TOKENS, **_WIDTH, "alibi": True, "multi_query": False, "ffn_hidden_size": 112, "bias": True}),
    "falcon-mqa": ("falcon", {**_TOKENS, **_WIDTH, "ffn_hidden_size": 112}),
    "falcon-new": ("falcon", {**_TOKENS, **_WIDTH, "ffn_hidden_size": 112, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": ("gemma", _HEAD),
    "gemma2": ("gemma2", {**_HEAD, "sliding_window": 5, "query_pre_attn_scalar": 10}),
    "gemma3": ("gemma3_text",
        {**_HEAD, "sliding_window": 5, "query_pre_attn_scalar": 10, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm": ("glm", {**_HEAD, "head_dim": 12}),
    "glm4": ("glm4", {**_HEAD, "head_dim": 12}),
    "gpt2": ("gpt2", _GPT),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "gpt_neo": ("gpt_neo", {**_TOKENS, "hidden_size": 48, "num_layers": 2, "num_heads": 6, "intermediate_size": 112, "window_size": 5,
                            "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": ("gpt_neox", _TEXT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 6}),
    "granite": ("granite", _GQA),
    "helium": ("helium", {**_GQA, "head_dim": 8}),
    "hunyuan": ("hunyuan_v1_dense", _HEAD),
    "ministral": ("ministral", _HEAD),
    "minicpm3-mla": ("minicpm3", _MLA),
    "mistral": ("mistral", {**_HEAD, "sliding_window": 5}),
    "mpt": ("mpt", {**_TOKENS, "d_model": 48, "n_heads": 6, "n_layers": 2, "expansion_ratio": 3, "max_seq_len": 64}),
    "nanochat": ("nanochat", _GQA),
    "nemotron": ("nemotron", {**_HEAD}),
    "olmo": ("olmo", {**_GQA, "clip_qkv": 2.5}),
    "olmo2": ("olmo2", _GQA),
    "olmo3": ("olmo3", {**_GQA, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "openai-gpt": ("openai-gpt", {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6}),
    "opt": ("opt", {**_TOKENS, **_WIDTH, "ffn_dim": 112, "max_position_embeddings": 64, "word_embed_proj_dim": 34}),
    "persimmon": ("persimmon", _TEXT),
    "phi": ("phi", {**_GQA, "qk_layernorm": True}),
    "phi3": ("phi3", _GQA),
    "qwen2": ("qwen2", _GQA),
    "qwen3": ("qwen3", _HEAD),
    "seed_oss": ("seed_oss", _HEAD),
    "smollm3": ("smollm3", _GQA),
    "stablelm": ("stablelm", {**_GQA, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {**_GQA, "sliding_window": 5}),
    "vaultgemma": ("vaultgemma", {**_HEAD, "query_pre_attn_scalar": 10}),
    "xglm": ("xglm", {**_TOKENS, "d_model": 48, "ffn_dim": 112, "num_layers": 2, "attention_heads": 6, "max_position_embeddings": 64}),
}

_MIXTURES: dict[str, tuple[str, Options]] = {
    "afmoe": ("afmoe", {**_HEAD, **_MOE, "num_experts": 7, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 5,
                        "layer_types": ["sliding_attention", "full_attention"]}),
    "dbrx": ("dbrx", {**_TOKENS, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 2.5},
        "ffn_config": {"ffn_hidden_size": 28, "moe_num_experts": 7, "moe_top_k": 3, "hidden_size": 48}}),
    "deepseek_v2": ("deepseek_v2", {**_MLA, **_MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
                                    "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "deepseek_v3": ("deepseek_v3", {**_MLA, **_MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4,
                                    "topk_group": 2}),
    "dots1": ("dots1", {**_GQA, **_MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1}),
    "ernie4_5_moe": ("ernie4_5_moe", {**_GQA, "moe_intermediate_size": 28, "moe_k": 3, "moe_num_experts": 7, "moe_num_shared_experts": 2}),
    "flex_olmo": ("flex_olmo", {**_GQA, "num_experts": 7, "num_experts_per_tok": 3}),
    "glm4_moe": ("glm4_moe", {**_HEAD, **_MOE, "n_routed_experts": 8, "n_shared_experts": 1, "use_qk_norm": True}),
    "gpt_oss": ("gpt_oss", {**_HEAD, "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 5}),
    "granitemoe": ("granitemoe", {**_GQA, "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 3}),
    "granitemoeshared": ("granitemoeshared", {**_GQA, "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 3,
                                              "shared_intermediate_size": 36}),
    "hunyuan_moe": ("hunyuan_v1_moe", {**_HEAD, "intermediate_size": 28, "num_experts": 7, "moe_topk": [3, 3]}),
    "jetmoe": ("jetmoe", {**_TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 10,
                          "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 3, "max_position_embeddings": 64}),
    "llama4": ("llama4_text", {**_HEAD, "intermediate_size": 28, "intermediate_size_mlp": 112, "num_local_experts": 7,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 16}),
    "minimax": ("minimax", {**_HEAD, "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 3, "block_size": 4,
                            "layer_types": ["linear_attention", "full_attention"]}),
    "mixtral": ("mixtral", {**_HEAD, "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 3}),
    "olmoe": ("olmoe", {**_GQA, "intermediate_size": 28, "num_experts": 7, "num_experts_per_tok": 3}),
    "phimoe": ("phimoe", {**_GQA, "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_GQA, **_MOE, "num_experts": 7, "shared_expert_intermediate_size": 36}),
    "qwen3_moe": ("qwen3_moe", {**_HEAD, **_MOE, "num_experts": 7}),
    "qwen3_moe-batched": ("qwen3_moe", {**_HEAD, **_MOE, "num_experts": 7, "experts_implementation": "batched_mm"}),
}

_STATE_SPACE: dict[str, tuple[str, Options]] = {
    "mamba": ("mamba", {**_TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 14, "conv_kernel": 3, "time_step_rank": 5}),
    "falcon_mamba": ("falcon_mamba", {**_TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 14, "conv_kernel": 3,
        "time_step_rank": 5}),
    "mamba2": ("mamba2", {**_TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 14, "conv_kernel": 3, "num_heads": 8,
        "head_dim": 12, "n_groups": 2, "chunk_size": 4}),
    "bamba": ("bamba", {**_GQA, **_SSM, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_chunk_size": 4,
                        "attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", {**_HEAD, **_SSM, "mamba_d_ssm": 72, "mamba_n_heads": 6, "mamba_d_head": 12, "mamba_n_groups": 2,
                                "mamba_chunk_size": 4}),
    "granitemoehybrid": ("granitemoehybrid", {**_GQA, **_SSM, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2,
        "mamba_chunk_size": 4, "intermediate_size": 28, "num_local_experts": 7, "num_experts_per_tok": 3, "shared_intermediate_size": 36,
        "layer_types": ["mamba", "attention"]}),
    "jamba": ("jamba", {**_GQA, **_SSM, "mamba_dt_rank": 5, "intermediate_size": 28, "num_experts": 7, "num_experts_per_tok": 3,
                        "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "lfm2": ("lfm2", {**_GQA, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}),
    "nemotron_h": ("nemotron_h", {**_HEAD, "mamba_num_heads": 8, "mamba_head_dim": 12, "ssm_state_size": 14, "n_groups": 2,
        "conv_kernel": 3, "chunk_size": 4, "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3}),
    "olmo_hybrid": ("olmo_hybrid", {**_GQA, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 10,
                                    "linear_value_head_dim": 12, "layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_next": ("qwen3_next", {**_HEAD, **_MOE, "num_experts": 7, "shared_expert_intermediate_size": 36, "linear_num_key_heads": 2,
                                  "linear_num_value_heads": 4, "linear_key_head_dim": 10, "linear_value_head_dim": 12,
                                  "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_5": ("qwen3_5_text", {**_HEAD, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 10,
        "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention"]}),
    "recurrent_gemma": ("recurrent_gemma", {**_GQA, "lru_width": 60, "attention_window_size": 8, "conv1d_width": 3,
                                            "block_types": ["recurrent", "attention"]}),
    "rwkv": ("rwkv", {**_TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "attention_hidden_size": 48, "intermediate_size": 112,
                      "context_length": 16, "rescale_every": 0}),
    "xlstm": ("xlstm", {**_TOKENS, "hidden_size": 48, "embedding_dim": 48, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4}),
    "zamba": ("zamba", {**_TEXT, **_SSM, "num_key_value_heads": 6, "n_mamba_heads": 2, "mamba_dt_rank": 5, "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"], "attention_hidden_size": 96, "attention_head_dim": 16,
        "use_mamba_kernels": False}),
    "zamba2": ("zamba2", {**_TEXT, **_SSM, "num_key_value_heads": 6, "n_mamba_heads": 8, "mamba_headdim": 12, "mamba_ngroups": 2,
        "chunk_size": 4, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 6, "use_mamba_kernels": False}),
}

_ENCODERS: dict[str, tuple[str, Options]] = {
    "albert": ("albert", {**_TEXT, "embedding_size": 20}),
    "bert": ("bert", _TEXT),
    "big_bird": ("big_bird", {**_TEXT, "attention_type": "original_full"}),
    "camembert": ("camembert", _TEXT),
    "convbert": ("convbert", {**_TEXT, "embedding_size": 20, "conv_kernel_size": 5}),
    "data2vec-text": ("data2vec-text", _TEXT),
    "deberta": ("deberta", {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 9}),
    "deberta-v2": ("deberta-v2", {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 7,
        "norm_rel_ebd": "layer_norm", "share_att_key": True}),
    "distilbert": ("distilbert", {**_TOKENS, "dim": 48, "hidden_dim": 112, "n_layers": 2, "n_heads": 6, "max_position_embeddings": 64}),
    "electra": ("electra", {**_TEXT, "embedding_size": 20}),
    "ernie": ("ernie", _TEXT),
    "esm": ("esm", {**_TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    "eurobert": ("eurobert", _GQA),
    "fnet": ("fnet", _TEXT),
    "funnel": ("funnel", {"vocab_size": 97, "block_sizes": [1, 1], "d_model": 48, "n_head": 6, "d_head": 10, "d_inner": 112,
        "num_decoder_layers": 1}),
    "ibert": ("ibert", _TEXT),
    "layoutlm": ("layoutlm", _TEXT),
    "longformer": ("longformer", {**_TEXT, "attention_window": 4}),
    "megatron-bert": ("megatron-bert", _TEXT),
    "mobilebert": ("mobilebert", {**_TEXT, "embedding_size": 20, "intra_bottleneck_size": 24, "true_hidden_size": 24,
        "num_feedforward_networks": 2}),
    "modernbert": ("modernbert", {**_TEXT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4,
                                  "layer_types": ["full_attention", "sliding_attention"]}),
    "mpnet": ("mpnet", _TEXT),
    "nomic_bert": ("nomic_bert", _TEXT),
    "rembert": ("rembert", {**_TEXT, "input_embedding_size": 20, "output_embedding_size": 26}),
    "roberta": ("roberta", _TEXT),
    "roformer": ("roformer", {**_TEXT, "embedding_size": 20}),
    "squeezebert": ("squeezebert", {**_TEXT, "embedding_size": 48}),
    "xlm-roberta": ("xlm-roberta", _TEXT),
    "yoso": ("yoso", {**_TEXT, "use_expectation": True}),
}

_SEQ2SEQ: Options = {
    **_TOKENS, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112, "decoder_ffn_dim": 104, "max_position_embeddings": 64, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}
_T5: Options = {**_TOKENS, "d_model": 48, "d_kv": 10, "d_ff": 112, "num_layers": 2, "num_heads": 6, "decoder_start_token_id": 0}

_ENCODER_DECODERS: dict[str, tuple[str, Options]] = {
    "bart": ("bart", _SEQ2SEQ),
    "blenderbot": ("blenderbot", _SEQ2SEQ),
    "blenderbot-small": ("blenderbot-small", _SEQ2SEQ),
    "bigbird_pegasus": ("bigbird_pegasus", {**_SEQ2SEQ, "attention_type": "original_full"}),
    "led": ("led", {**_SEQ2SEQ, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}),
    "m2m_100": ("m2m_100", _SEQ2SEQ),
    "marian": ("marian", _SEQ2SEQ),
    "mbart": ("mbart", _SEQ2SEQ),
    "mt5": ("mt5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "mvp": ("mvp", _SEQ2SEQ),
    "nllb-moe": ("nllb-moe", {**_SEQ2SEQ, "num_experts": 7, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    "pegasus": ("pegasus", _SEQ2SEQ),
    "pegasus_x": ("pegasus_x", {**_SEQ2SEQ, "block_size": 4, "num_global_tokens": 3, "stagger_local_blocks": False}),
    "plbart": ("plbart", _SEQ2SEQ),
    "prophetnet": ("prophetnet", {**_TOKENS, "hidden_size": 48, "encoder_ffn_dim": 112, "decoder_ffn_dim": 104, "num_encoder_layers": 2,
                                  "num_decoder_layers": 2, "num_encoder_attention_heads": 6, "num_decoder_attention_heads": 4,
                                  "max_position_embeddings": 64, "decoder_start_token_id": 1}),
    "t5": ("t5", _T5),
    "umt5": ("umt5", {**_T5, "feed_forward_proj": "gated-gelu"}),
}

_PATCHES: Options = {**_WIDTH, "intermediate_size": 112, "image_size": 32, "patch_size": 8, "num_labels": 10}
_STAGES: Options = {"hidden_sizes": [16, 24, 40, 56], "depths": [1, 1, 2, 1], "num_labels": 10}
_PYRAMID: Options = {**_STAGES, "num_attention_heads": [1, 2, 5, 7], "mlp_ratios": [3, 3, 2, 2], "decoder_hidden_size": 36}
_WINDOWS: Options = {
    "image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4, "num_labels": 10,
}

# name -> model type, options, image size
_VISION: dict[str, tuple[str, Options, int]] = {
    "beit": ("beit", {**_PATCHES, "use_relative_position_bias": True}, 32),
    "bit": ("bit", {**_STAGES, "hidden_sizes": [32, 48, 64, 96], "embedding_size": 16, "num_groups": 4}, 64),
    "convnext": ("convnext", _STAGES, 64),
    "convnextv2": ("convnextv2", _STAGES, 64),
    "cvt": ("cvt", {"embed_dim": [16, 24, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "num_labels": 10}, 64),
    "data2vec-vision": ("data2vec-vision", {**_PATCHES, "use_relative_position_bias": True}, 32),
    "dinov2": ("dinov2", {**_PATCHES, "mlp_ratio": 2}, 32),
    "dinov2-swiglu": ("dinov2", {**_PATCHES, "mlp_ratio": 3, "use_swiglu_ffn": True}, 32),
    "dinov2_with_registers": ("dinov2_with_registers", {**_PATCHES, "mlp_ratio": 2, "num_register_tokens": 3}, 32),
    "efficientnet": ("efficientnet", {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640,
        "num_labels": 10}, 64),
    "focalnet": ("focalnet", {"image_size": 32, "patch_size": 2, "embed_dim": 12, "hidden_sizes": [12, 24], "depths": [1, 1],
        "focal_levels": [2, 2], "focal_windows": [3, 3], "num_labels": 10, "use_layerscale": True}, 32),
    "hiera": ("hiera", {"embed_dim": 12, "image_size": [64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8],
        "masked_unit_size": [8, 8], "num_labels": 10}, 64),
    "ijepa": ("ijepa", _PATCHES, 32),
    "mobilenet_v1": ("mobilenet_v1", {"depth_multiplier": 0.25, "num_labels": 10}, 64),
    "mobilenet_v2": ("mobilenet_v2", {"depth_multiplier": 0.25, "num_labels": 10}, 64),
    "mobilevit": ("mobilevit", {"image_size": 128, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 60],
                                "num_attention_heads": 4, "num_labels": 10}, 128),
    "mobilevitv2": ("mobilevitv2", {"image_size": 128, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "num_labels": 10}, 128),
    "poolformer": ("poolformer", _STAGES, 64),
    "pvt": ("pvt", {**_PYRAMID, "image_size": 64}, 64),
    "pvt_v2": ("pvt_v2", {**_PYRAMID, "image_size": 64}, 64),
    "regnet": ("regnet", {**_STAGES, "embedding_size": 16, "hidden_sizes": [16, 24, 40, 56], "groups_width": 8}, 64),
    "resnet": ("resnet", {**_STAGES, "embedding_size": 16, "hidden_sizes": [32, 48, 64, 96]}, 64),
    "segformer": ("segformer", _PYRAMID, 64),
    "swiftformer": ("swiftformer", {"image_size": 64, "embed_dims": [16, 24, 40, 56], "depths": [1, 1, 2, 1], "num_labels": 10}, 64),
    "swin": ("swin", _WINDOWS, 32),
    "swinv2": ("swinv2", _WINDOWS, 32),
    "textnet": ("textnet", {"num_labels": 10}, 64),
    "vit": ("vit", _PATCHES, 32),
    "vit_msn": ("vit_msn", _PATCHES, 32),
}

_SEGMENTERS: dict[str, tuple[str, Options, int]] = {
    "beit-upernet": ("beit", {**_PATCHES, "num_hidden_layers": 4, "use_relative_position_bias": True, "out_indices": [1, 2, 3, 4],
        "pool_scales": [1, 2]}, 32),
    "dpt": ("dpt", {**_PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [12, 16, 20, 24],
                    "fusion_hidden_size": 26}, 32),
    "mobilenet_v2-deeplab": ("mobilenet_v2", {"depth_multiplier": 0.25, "num_labels": 10}, 64),
    "mobilevit-deeplab": ("mobilevit", {"image_size": 128, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 60],
                                        "num_attention_heads": 4, "aspp_out_channels": 22, "num_labels": 10}, 128),
    "segformer-mlp": ("segformer", _PYRAMID, 64),
}

_SPEECH: Options = {
    **_WIDTH, "vocab_size": 32, "intermediate_size": 112, "conv_dim": [20, 24, 28], "conv_stride": [5, 4, 4], "conv_kernel": [10, 5, 3],
    "num_conv_pos_embeddings": 6,
    "apply_spec_augment": False, "layerdrop": 0.0,
}

_AUDIO: dict[str, tuple[str, Options]] = {
    "data2vec-audio": ("data2vec-audio", {**_SPEECH, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}),
    "hubert": ("hubert", _SPEECH),
    "sew": ("sew", _SPEECH),
    "sew-d": ("sew-d", {**_SPEECH, "position_buckets": 8}),
    "unispeech": ("unispeech", _SPEECH),
    "unispeech-sat": ("unispeech-sat", _SPEECH),
    "wav2vec2": ("wav2vec2", _SPEECH),
    "wav2vec2-stable": ("wav2vec2", {**_SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "wav2vec2-conformer": ("wav2vec2-conformer", {**_SPEECH, "conv_depthwise_kernel_size": 5}),
    "wavlm": ("wavlm", {**_SPEECH, "num_buckets": 16, "max_bucket_distance": 20}),
}

_TOWER: Options = {**_WIDTH, "intermediate_size": 112}
_TEXT_TOWER: Options = {**_TOWER, "vocab_size": 97, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96}
_IMAGE_TOWER: Options = {**_TOWER, "hidden_size": 36, "intermediate_size": 84, "image_size": 32, "patch_size": 8}
_TWO_TOWERS: Options = {"text_config": _TEXT_TOWER, "vision_config": _IMAGE_TOWER, "projection_dim": 26}

_SWIN_SR: Options = {"image_size": 16, "patch_size": 1, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4}
_CLIP_VIDEO: Options = {**_PATCHES, "num_frames": 4}


def tokens(seq_len: int = 11, vocab: int = 97) -> Tensor:
    """Token ids of a batch of two, without the special ones."""
    return torch.randint(5, vocab - 1, (2, seq_len))


def _text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def _pair() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


def _masked_pair() -> dict[str, Tensor]:
    return {**_pair(), "attention_mask": torch.ones(2, 11), "decoder_attention_mask": torch.ones(2, 7)}


def _image(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": images(size)()}


def _towers() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "pixel_values": images(32)()}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 1200)}


def _features(frames: int, bins: int, name: str = "input_features", **more: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(2, frames, bins), **{key: make() for key, make in more.items()}}


# name -> family, class, model type, options, inputs: architectures with a head or with inputs of their own
_OTHERS: dict[str, tuple[str, str, str, Options, Callable[[], dict[str, Tensor]]]] = {
    "bert-classifier": ("encoder", "AutoModelForSequenceClassification", "bert", {**_TEXT, "num_labels": 5}, _text),
    "roberta-tagger": ("encoder", "AutoModelForTokenClassification", "roberta", {**_TEXT, "num_labels": 5}, _text),
    "electra-qa": ("encoder", "AutoModelForQuestionAnswering", "electra", {**_TEXT, "embedding_size": 20}, _text),
    "nystromformer": ("encoder", "AutoModelForMaskedLM", "nystromformer", {**_TEXT, "num_landmarks": 4, "segment_means_seq_len": 12},
                      lambda: {"input_ids": tokens(12)}),
    "splinter": ("encoder", "AutoModelForQuestionAnswering", "splinter", {**_TEXT, "question_token_id": 3}, _text),
    "xlnet": ("encoder", "AutoModelForSequenceClassification", "xlnet",
              {"vocab_size": 97, "d_model": 48, "n_layer": 2, "n_head": 6, "d_inner": 112, "use_mems_eval": False, "num_labels": 5}, _text),
    "canine": ("encoder", "AutoModelForTokenClassification", "canine",
        {**_TEXT, "num_hash_buckets": 23, "num_hash_functions": 4, "downsampling_rate": 2, "local_transformer_stride": 4,
        "num_labels": 5}, lambda: {"input_ids": tokens(16)}),
    "llama-classifier": ("decoder", "AutoModelForSequenceClassification", "llama", {**_HEAD, "num_labels": 5}, _text),
    "opt-base": ("decoder", "AutoModel", "opt", {**_TOKENS, **_WIDTH, "ffn_dim": 112, "max_position_embeddings": 64}, _text),
    "clip": ("two towers", "AutoModel", "clip", _TWO_TOWERS, _towers),
    "clipseg": ("two towers", "CLIPSegForImageSegmentation", "clipseg",
        {**_TWO_TOWERS, "extract_layers": [0, 1], "reduce_dim": 20, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 30},
        _towers),
    "altclip": ("two towers", "AutoModel", "altclip", {**_TWO_TOWERS, "text_config": {**_TEXT, "project_dim": 26}}, _towers),
    "chinese_clip": ("two towers", "AutoModel", "chinese_clip", _TWO_TOWERS, _towers),
    "siglip": ("two towers", "AutoModel", "siglip",
        {"text_config": {**_TEXT_TOWER, "projection_size": 36}, "vision_config": _IMAGE_TOWER}, _towers),
    "siglip-vision": ("vision", "AutoModelForImageClassification", "siglip", {"vision_config": _IMAGE_TOWER, "num_labels": 10}, _image(32)),
    "vilt": ("two towers", "AutoModel", "vilt", {**_TEXT, "image_size": 32, "patch_size": 8, "max_image_length": -1}, _towers),
    "whisper": ("encoder-decoder", "AutoModelForSpeechSeq2Seq", "whisper",
                {**_SEQ2SEQ, "num_mel_bins": 14, "max_source_positions": 16, "max_target_positions": 20, "begin_suppress_tokens": None},
                _features(14, 32, decoder_input_ids=lambda: tokens(7))),
    "speech_to_text": ("encoder-decoder", "AutoModelForSpeechSeq2Seq", "speech_to_text",
        {**_SEQ2SEQ, "input_feat_per_channel": 14, "conv_channels": 20, "max_source_positions": 40, "max_target_positions": 20},
        _features(24, 14, decoder_input_ids=lambda: tokens(7))),
    "moonshine": ("encoder-decoder", "AutoModelForSpeechSeq2Seq", "moonshine",
                  {**_TOKENS, "hidden_size": 48, "intermediate_size": 112, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
                   "encoder_num_attention_heads": 6, "decoder_num_attention_heads": 6, "max_position_embeddings": 64},
                  lambda: {"input_values": torch.randn(2, 4000), "decoder_input_ids": tokens(7)}),
    "ast": ("audio", "AutoModelForAudioClassification", "audio-spectrogram-transformer",
            {**_TOWER, "patch_size": 8, "frequency_stride": 6, "time_stride": 6, "max_length": 32, "num_mel_bins": 24, "num_labels": 10},
            _features(32, 24, "input_values")),
    "wav2vec2-classifier": ("audio", "AutoModelForAudioClassification", "wav2vec2", _SPEECH, _wave),
    "wav2vec2-bert": ("audio", "AutoModelForCTC", "wav2vec2-bert",
        {**_SPEECH, "feature_projection_input_dim": 22, "conv_depthwise_kernel_size": 5}, _features(24, 22)),
    "encodec": ("audio", "AutoModel", "encodec", {"num_filters": 4, "upsampling_ratios": [4, 2], "hidden_size": 24, "codebook_size": 16,
                                                  "num_lstm_layers": 1}, lambda: {"input_values": torch.randn(2, 1, 320)}),
    "dac": ("audio", "AutoModel", "dac", {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size": 24,
                                          "upsampling_ratios": [4, 2], "n_codebooks": 2, "codebook_size": 16, "codebook_dim": 6},
            lambda: {"input_values": torch.randn(2, 1, 320)}),
    "vits": ("audio", "AutoModel", "vits", {"vocab_size": 38, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "ffn_dim": 40, "flow_size": 24, "spectrogram_bins": 24, "upsample_initial_channel": 24, "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "prior_encoder_num_flows": 2,
        "duration_predictor_filter_channels": 20}, lambda: {"input_ids": tokens(9, 38)}),
    "longt5": ("encoder-decoder", "AutoModelForSeq2SeqLM", "longt5", {**_T5, "local_radius": 3}, _masked_pair),
    "switch_transformers": ("encoder-decoder", "AutoModelForSeq2SeqLM", "switch_transformers",
        {**_T5, "num_experts": 7, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}, _masked_pair),
    "videomae": ("video", "AutoModelForVideoClassification", "videomae", _CLIP_VIDEO,
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
    "timesformer": ("video", "AutoModelForVideoClassification", "timesformer", _CLIP_VIDEO,
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
    "vivit": ("video", "AutoModelForVideoClassification", "vivit", {**_CLIP_VIDEO, "tubelet_size": [2, 8, 8]},
              lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
    "yolos": ("vision", "AutoModelForObjectDetection", "yolos", {**_PATCHES, "image_size": [32, 40], "num_detection_tokens": 7},
              lambda: {"pixel_values": images((32, 40))()}),
    "dpt-depth": ("vision", "AutoModelForDepthEstimation", "dpt",
                  {**_PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [12, 16, 20, 24],
                   "fusion_hidden_size": 28}, _image(32)),
    "deit": ("vision", "DeiTForImageClassification", "deit", _PATCHES, _image(32)),
    "dinov3_vit": ("vision", "AutoModel", "dinov3_vit", {**_PATCHES, "num_register_tokens": 3}, _image(32)),
    "levit": ("vision", "LevitForImageClassification", "levit",
              {"image_size": 64, "hidden_sizes": [24, 40, 56], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [6, 6, 6],
               "num_labels": 10}, _image(64)),
    "glpn": ("vision", "AutoModelForDepthEstimation", "glpn", _PYRAMID, _image(64)),
    "swin2sr": ("vision", "AutoModelForImageToImage", "swin2sr", _SWIN_SR, _image(16)),
    "vitmae-encoder": ("vision", "AutoModel", "vit_mae", {**_PATCHES, "mask_ratio": 0.0},
                       lambda: {"pixel_values": images(32)(), "noise": torch.rand(2, 16)}),
    "patchtst": ("time series", "AutoModel", "patchtst", {"num_input_channels": 3, "context_length": 24, "patch_length": 6,
        "patch_stride": 6, "num_hidden_layers": 2, "d_model": 48, "num_attention_heads": 6, "ffn_dim": 112, "use_cls_token": True},
        lambda: {"past_values": torch.randn(2, 24, 3)}),
    "patchtsmixer": ("time series", "AutoModel", "patchtsmixer", {"num_input_channels": 3, "context_length": 24, "patch_length": 6,
        "patch_stride": 6, "num_layers": 2, "d_model": 20}, lambda: {"past_values": torch.randn(2, 24, 3)}),
    "decision_transformer": ("decoder", "AutoModel", "decision_transformer",
                             {"state_dim": 9, "act_dim": 5, "hidden_size": 48, "max_ep_len": 32, "n_layer": 2, "n_head": 6, "n_inner": 112,
                              "n_positions": 64},
                             lambda: {"states": torch.randn(2, 5, 9), "actions": torch.randn(2, 5, 5), "rewards": torch.randn(2, 5, 1),
                                      "returns_to_go": torch.randn(2, 5, 1), "timesteps": torch.arange(5).repeat(2, 1),
                                      "attention_mask": torch.ones(2, 5)}),
}

# name -> why torch.export refuses it
_REFUSED: dict[str, str] = {
    "nystromformer": "a mask over all tokens is added to scores of landmarks; it only runs where an all-ones mask is skipped, as export does not",
}


def _network(head: str, model_type: str, options: Options) -> Callable[[], nn.Module]:
    """Builds `head` (an Auto class, or a class of its own) from a configuration; `experts_implementation` is an argument of the model."""

    def network() -> nn.Module:
        import transformers

        how = {key: options[key] for key in options if key == "experts_implementation"}
        config = transformers.AutoConfig.for_model(model_type, **{key: options[key] for key in options if key not in how})
        chosen = getattr(transformers, head)
        return chosen.from_config(config, **how) if head.startswith("Auto") else chosen(config)

    return network


def _rows() -> list[Row]:
    def entry(name: str, family: str, head: str, model_type: str, options: Options, inputs: Callable[[], Any]) -> Row:
        return row(f"hf/{name}", family, _network(head, model_type, options), inputs, _REFUSED.get(name, ""))

    text = [
        (_DECODERS, "decoder", "AutoModelForCausalLM", _text),
        (_MIXTURES, "mixture of experts", "AutoModelForCausalLM", _text),
        (_STATE_SPACE, "state space", "AutoModelForCausalLM", _text),
        (_ENCODERS, "encoder", "AutoModelForMaskedLM", _text),
        (_ENCODER_DECODERS, "encoder-decoder", "AutoModelForSeq2SeqLM", _pair),
        (_AUDIO, "audio", "AutoModelForCTC", _wave),
    ]
    vision = [(_VISION, "AutoModelForImageClassification"), (_SEGMENTERS, "AutoModelForSemanticSegmentation")]
    return [
        *[entry(name, family, head, *spec, inputs) for table, family, head, inputs in text for name, spec in table.items()],
        *[entry(name, "vision", head, *spec, _image(size)) for table, head in vision for name, (*spec, size) in table.items()],
        *[entry(name, *spec) for name, spec in _OTHERS.items()],
    ]


ROWS = _rows()
