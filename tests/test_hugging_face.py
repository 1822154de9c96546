"""Networks of transformers as users bring them: language models inside others, and what only runs with a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import CaptureError, InvalidInput
from tests.randomise import randomise, seeded

transformers = pytest.importorskip("transformers")

_TEXT = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 6}


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    """With the four image tokens of one picture in each text."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = transformers.LlamaConfig(**_TEXT, num_key_value_heads=2)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, vision_feature_layer=-1, image_seq_length=4)
    with seeded(0):
        ids = torch.randint(6, 97, (2, 11))
        ids[:, 1:5] = 5
        module = randomise(transformers.LlavaForConditionalGeneration(config), 0)
        return module, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def test_a_language_model_inside_returns_no_cache_to_the_graph() -> None:
    module, inputs = llava()
    result = gp.compile(module, inputs, pruning_ratio=0.5, round_to=1)
    tower, text = result.module.model.vision_tower, result.module.model.language_model
    assert type(result.module) is type(module) and result.certificate.status == "passed"
    assert tower.encoder.layers[0].mlp.fc1.out_features == 28 and text.layers[0].mlp.up_proj.out_features == 56
    cached, plain = (result.module.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


def test_pictures_in_a_text_are_not_made_up() -> None:
    with pytest.raises(InvalidInput, match="example inputs are needed to trace LlavaForConditionalGeneration"):
        gp.capture(llava()[0])


def test_a_kernel_as_long_as_a_group_has_heads_stays() -> None:
    """Eight heads in two groups, cut to four: the length of the convolution, which only decoding reads, is four as well."""
    config = transformers.Mamba2Config(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, state_size=10, expand=2, num_heads=8, head_dim=12, n_groups=2, chunk_size=8
    )
    with seeded(0):
        module, ids = randomise(transformers.Mamba2ForCausalLM(config), 0), torch.randint(3, 97, (2, 9))
    result = gp.compile(module, ids, pruning_ratio=0.5, units=("ssm_head",), round_to=1)
    mixer = result.module.backbone.layers[0].mixer
    assert (mixer.num_heads, mixer.conv_kernel_size, mixer.chunk_size) == (4, 4, 8)
    cached, plain = (result.module.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen2Config"])
def test_heads_that_do_not_divide_the_width_are_saved(name: str, tmp_path: Path) -> None:
    """Such a Llama is one that its config class refuses to describe, so `from_pretrained` refuses as well."""
    config = getattr(transformers, name)(**{**_TEXT, "hidden_size": 64, "num_attention_heads": 8}, num_key_value_heads=4)
    with seeded(0):
        module, ids = randomise(transformers.AutoModelForCausalLM.from_config(config), 0), torch.randint(3, 97, (2, 9))
    result = gp.compile(module, ids, pruning_ratio=0.25, units=("kv_group",), round_to=1)
    assert result.module.config.num_attention_heads == 6
    result.save(tmp_path / "out")
    back = gp.load(tmp_path / "out")
    assert torch.equal(back(ids).logits, result.module(ids).logits)
    if name == "LlamaConfig":
        with pytest.raises(Exception, match=r"not a multiple of the number of attention heads|vary across layers"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def llama(**options: Any) -> nn.Module:
    with seeded(0):
        return randomise(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_TEXT, num_key_value_heads=2, **options)), 0)


@pytest.mark.parametrize("form", [list, iter], ids=["list", "generator"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_first_batch_of_calibration_data_gives_the_inputs(form: Callable[[list], Any], size: int) -> None:
    """Seventeen tokens, not the length that would be made up; labels are left out."""
    with seeded(1):
        ids = [torch.randint(3, 97, (size, 17)) for _ in range(3)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    result = gp.compile(llama(), recipe="flap", pruning_ratio=0.3, calibration_data=form(batches))
    assert [tuple(x.shape) for x in result.program.example_inputs if isinstance(x, Tensor)] == [(max(2, size), 17)] * 2
    assert result.certificate.status == "passed"
    planned = gp.plan(llama(), recipe="flap", pruning_ratio=0.3, calibration_data=form(batches))
    assert planned.entries.keys() == result.plan.entries.keys()


def test_flex_attention_is_refused_with_the_way_out() -> None:
    with pytest.raises(CaptureError, match="set_attn_implementation"):
        gp.capture(llama(attn_implementation="flex_attention"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_own_saving_of_transformers_writes_what_it_reads(ratio: float, inplace: bool, tmp_path: Path) -> None:
    """A Qwen2 leaves the width of a head to be derived from that of the stream, which a cut of heads does not change."""
    config = transformers.Qwen2Config(**{**_TEXT, "hidden_size": 64, "num_attention_heads": 8}, num_key_value_heads=4)
    with seeded(0):
        module, ids = randomise(transformers.AutoModelForCausalLM.from_config(config), 0), torch.randint(3, 97, (2, 9))
    result = gp.compile(module, ids, pruning_ratio=ratio, units=("kv_group",), round_to=1, inplace=inplace)
    assert result.module.config.head_dim == 8 and (result.module is module) == inplace
    assert inplace or getattr(config, "head_dim", None) is None, "the user's own config is left as it was"
    result.module.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(back(ids).logits, result.module(ids).logits)
    result.save(tmp_path / "out")
    assert torch.equal(gp.load(tmp_path / "out")(ids).logits, result.module(ids).logits)
