"""A Hugging Face language model: prune attention and MLP, save it, load it again, generate text.

The model is a small Llama with random weights, so that the example runs anywhere; a checkpoint of yours goes in the same way.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[5, 17, 42, 99, 3]])

    result = gp.compile(model, kwargs={"input_ids": prompt}, pruning_ratio=0.5, units=("neuron", "kv_group"))
    print(result.report)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small-llama"
        result.save(path)
        small = gp.load(path)
        text = small.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert text.shape == (1, 13)
        torch.testing.assert_close(small(input_ids=prompt).logits, result.module(input_ids=prompt).logits)
        print("generated tokens:", text[0, 5:].tolist())


if __name__ == "__main__":
    main()
