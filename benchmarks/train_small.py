"""Two small language models and a sibling of half the size of each, trained on real text: the networks that `benchmarks.methods` prunes.

    python -m benchmarks.text                                   # once, where packages can be had: results/text
    python -m benchmarks.train_small --seconds 70 --out FOLDER  # on one GPU, some minutes; --smoke: seconds, on a CPU

A decoder of Llama's kind (grouped queries; with biases, so that repairs have somewhere to put a mean) and a Mamba-2, 14 million parameters
each, by `transformers`; bf16 autocast, AdamW, the rate by the share of the time that has passed. A model counts if its perplexity on held-out
documents is at most a quarter of a unigram model's. Weights are written in bfloat16, in files of at most 16 MB. The seed is fixed; how many
steps fit into the seconds depends on the machine and is recorded.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WINDOW = 4096, 512
TEST_WINDOWS = 128
FILE_BYTES = 15_900_000
TEXT = Path("results/text")

LLAMA: dict[str, Any] = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "max_position_embeddings": 1024}
MAMBA: dict[str, Any] = {"expand": 2, "head_dim": 64, "n_groups": 1, "chunk_size": 64}
# name -> (class of its configuration, what it says beside the vocabulary, learning rate)
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "decoder": ("Llama", dict(LLAMA, hidden_size=384, intermediate_size=1024, num_hidden_layers=7, num_attention_heads=6), 2e-3),
    "mamba2": ("Mamba2", dict(MAMBA, hidden_size=384, num_heads=12, state_size=64, num_hidden_layers=11), 2e-3),
    "decoder_sibling": ("Llama", dict(LLAMA, hidden_size=256, intermediate_size=688, num_hidden_layers=7, num_attention_heads=4), 2e-3),
    "mamba2_sibling": ("Mamba2", dict(MAMBA, hidden_size=256, num_heads=8, state_size=64, num_hidden_layers=11), 2e-3),
}
TINY = {
    "Llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mamba2": {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16, "num_hidden_layers": 2},
}


def build(name: str, smoke: bool = False) -> nn.Module:
    """The untrained network."""
    family, sizes, _ = MODELS[name]
    return network(family, {**sizes, **(TINY[family] if smoke else {})})


def network(family: str, sizes: dict[str, Any]) -> nn.Module:
    import tests.torchvision_ops  # noqa: F401, I001  # before transformers
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, tie_word_embeddings=False, use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


@cache
def tokens(name: str, folder: Path = TEXT) -> Tensor:
    """The ids of "train" or "test"."""
    return torch.from_numpy(np.frombuffer(lzma.decompress((folder / f"{name}.xz").read_bytes()), np.uint16).astype(np.int64))


def windows(folder: Path = TEXT, count: int = TEST_WINDOWS, length: int = WINDOW) -> Tensor:
    """(count, length): evenly from the held-out documents."""
    ids = tokens("test", folder)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.stack([ids[s : s + length] for s in starts.tolist()])


def perplexity(module: nn.Module, ids: Tensor, batch: int = 16) -> float:
    """Of the next token, in the dtype of the network."""
    device = next(module.parameters()).device
    total = 0.0
    with torch.no_grad():
        for rows in ids.to(device).split(batch):
            logits = module(input_ids=rows, use_cache=False).logits[:, :-1]
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def unigram(folder: Path, ids: Tensor) -> float:
    """Perplexity of the frequencies of the training text."""
    counts = torch.bincount(tokens("train", folder), minlength=VOCABULARY).double() + 1
    return float((-(counts / counts.sum()).log()[ids[:, 1:]]).mean().exp())


def chunked(mixer: Any, u: Tensor) -> Tensor:
    """What a `Mamba2Mixer` with one group of states computes over whole sequences, as products of matrices that autocast takes to bfloat16.

    With s the running sum of dt A inside a chunk, y_t = C_t . (exp(s_t) h + sum over r <= t of exp(s_t - s_r) B_r dt_r x_r), h the state
    that enters the chunk (Dao and Gu 2024, arXiv 2405.21060).
    """
    batch, length, _ = u.shape
    heads, inner, states, size = mixer.num_heads, mixer.intermediate_size, mixer.ssm_state_size, mixer.chunk_size
    gate, mixed, dt = mixer.in_proj(u).split([inner, mixer.conv_dim, heads], -1)
    taps = mixer.conv1d.weight[:, 0]
    padded = F.pad(mixed, (0, 0, taps.shape[1] - 1, 0))
    mixed = F.silu(sum(padded[:, i : i + length] * taps[:, i] for i in range(taps.shape[1])) + mixer.conv1d.bias)
    x, b, c = mixed.split([inner, states, states], -1)
    x = x.unflatten(-1, (heads, -1))
    dt = F.softplus(dt.float() + mixer.dt_bias)
    b, c = (t.unflatten(1, (-1, size))[:, None] for t in (b, c))  # (batch, 1, chunks, size, states)
    values = (x * dt[..., None]).unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).to(gate.dtype)  # (batch, heads, chunks, size, channels)
    sums = (dt * -mixer.A_log.float().exp()).unflatten(1, (-1, size)).permute(0, 3, 1, 2).cumsum(-1)
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(_above(size, 1, u.device), -torch.inf).exp()
    inside = (c @ b.mT * decay).to(values.dtype) @ values
    leaving = values.mT @ (b * (sums[..., -1:] - sums).exp()[..., None]).to(values.dtype)  # (batch, heads, chunks, channels, states)
    ends = sums[..., -1].cumsum(-1)
    since = (F.pad(ends, (1, -1))[..., :, None] - ends[..., None, :]).masked_fill(_above(ends.shape[-1], 0, u.device), -torch.inf).exp()
    entering = (since.to(leaving.dtype) @ leaving.flatten(-2)).view_as(leaving)
    y = inside + (c @ entering.mT) * sums.exp()[..., None]
    y = y.permute(0, 2, 3, 1, 4).reshape(batch, length, heads, -1) + x * mixer.D[:, None]
    return mixer.out_proj(mixer.norm(y.flatten(-2), gate))


def in_training(mixer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **given: Any) -> Tensor:
    return chunked(mixer, hidden_states)


def _above(size: int, diagonal: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(diagonal)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    body = getattr(model, "model", None) or model.backbone
    hidden = body(input_ids=ids[:, :-1], use_cache=False)[0]
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), ids[:, 1:].flatten())


def train(name: str, seconds: float, device: str, folder: Path = TEXT, smoke: bool = False, compiled: bool = True) -> tuple[nn.Module, dict]:
    """The trained network in float32, and what there is to say about the training."""
    torch.manual_seed(0)
    model = build(name, smoke).to(device).train()
    batch, length = (4, 64) if smoke else (64, WINDOW)
    data = tokens("train", folder).to(device)
    random = torch.Generator().manual_seed(0)
    offsets = torch.arange(length + 1, device=device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    rate = MODELS[name][2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.95), fused=device == "cuda",
    )  # fmt: skip

    def step() -> Tensor:
        starts = torch.randint(len(data) - length - 1, (batch, 1), generator=random).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of(model, data[starts + offsets])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    layers = (getattr(model, "model", None) or model.backbone).layers
    mixers = {type(layer.mixer): type(layer.mixer).forward for layer in layers if hasattr(layer, "mixer")}
    for kind in mixers:  # of the class: one function for all layers is compiled once
        kind.forward = in_training
    torch._dynamo.reset()
    began = time.perf_counter()
    for group in optimiser.param_groups:
        group["lr"] = 0.0  # the first steps are there to compile
    if compiled:
        try:
            for layer in layers:
                layer.compile(dynamic=False)
            float(step())
        except Exception as why:  # no compiler on this machine, or a layer that it cannot take
            print(f"{name}: not compiled ({str(why).strip().splitlines()[0][:100]})", flush=True)
            compiled = False
            for layer in layers:
                layer._compiled_call_impl = None
    float(step())
    warm = time.perf_counter() - began
    start = said = time.perf_counter()
    steps, loss = 0, torch.zeros(())
    while (now := time.perf_counter()) < start + seconds:
        share = (now - start) / seconds
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, share / 0.04) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
        loss = step()
        steps += 1
        if steps % 8 == 0:
            float(loss)  # the queue of the device stays short
        if now - said > seconds / 8:
            said = now
            print(f"{name}: {now - start:5.0f} s, {steps} steps, loss {float(loss):.3f}", flush=True)
    for layer in layers:
        layer._compiled_call_impl = None
    for kind, forward in mixers.items():
        kind.forward = forward
    found = {
        "steps": steps, "tokens": steps * batch * length, "seconds": seconds, "warm_up": round(warm, 1), "compiled": compiled,
        "params": sum(p.numel() for p in model.parameters()), "loss": float(loss),
    }  # fmt: skip
    return model.eval(), found


def save(model: nn.Module, name: str, folder: Path, about: dict[str, Any], smoke: bool = False) -> list[Path]:
    """Files of at most 16 MB, bfloat16, with the configuration in each."""
    from safetensors.torch import save_file

    family, sizes, _ = MODELS[name]
    notes = {"family": family, "sizes": json.dumps({**sizes, **(TINY[family] if smoke else {})}), "about": json.dumps(about)}
    parts: list[dict[str, Tensor]] = [{}]
    room = FILE_BYTES
    for key, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        if tensor.nbytes > room:
            parts.append({})
            room = FILE_BYTES
        parts[-1][key] = tensor
        room -= tensor.nbytes
    paths = [folder / f"{name}-{i}.safetensors" for i in range(len(parts))]
    for path, part in zip(paths, parts):
        save_file(part, path, notes)
    return paths


def load(name: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network in float32, and what was recorded of its training.

    Raises:
        FileNotFoundError: it was not trained into this folder.
    """
    from safetensors import safe_open

    state: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        with safe_open(path, "pt") as file:
            notes = file.metadata()
            state |= {key: file.get_tensor(key).float() for key in file.keys()}
    if not state:
        raise FileNotFoundError(f"{folder} holds no {name}-0.safetensors; run python -m benchmarks.train_small --out {folder}")
    model = network(notes["family"], json.loads(notes["sizes"]))
    model.load_state_dict(state)
    return model.eval(), json.loads(notes["about"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=70, help="of training, each")
    parser.add_argument("--out", type=Path, default=Path("results/weights"))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, some seconds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    ids = windows(options.text, 8 if options.smoke else TEST_WINDOWS, 64 if options.smoke else WINDOW)
    bar = unigram(options.text, ids)
    print(f"unigram perplexity {bar:.1f}; {len(tokens('train', options.text)) / 1e6:.2f} million training tokens", flush=True)
    for name in options.models:
        start = time.perf_counter()
        model, about = train(name, options.seconds, options.device, options.text, options.smoke, not options.eager)
        about |= {"unigram": bar, "perplexity": perplexity(model, ids)}
        paths = save(model, name, options.out, about, options.smoke)
        verdict = "counts" if about["perplexity"] <= bar / 4 else "does NOT count: more than a quarter of the unigram's"
        print(
            f"{name}: {about['params'] / 1e6:.2f} M parameters, {about['steps']} steps of {about['tokens'] / max(about['steps'], 1):.0f} tokens, "
            f"warm-up {about['warm_up']} s, perplexity {about['perplexity']:.2f}, {verdict}; "
            f"{sum(p.stat().st_size for p in paths) / 1e6:.1f} MB in {len(paths)} files; {time.perf_counter() - start:.0f} s in all",
            flush=True,
        )
        del model
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
