"""Pruned decoders are saved, loaded in a fresh process, and generate; `from_pretrained` builds the same network or fails aloud."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphprune as gp
from tests.test_write_back import DECODERS, decoder

transformers = pytest.importorskip("transformers")

_GLOBAL = {"pruning_ratio": 0.4, "scope": "global", "units": ("neuron", "kv_group", "expert", "ssm_head"), "round_to": 1}
_BY_LAYER = {"pruning_ratio": {"*.0.*": 0.5, "*.1.*": 0.25}, "round_to": 1}
_GQA = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
_SSD = {"n_groups": 2, "state_size": 10, "expand": 2, "chunk_size": 4}

# name -> config, planning; every layer ends with sizes of its own
CASES: dict[str, tuple[dict, dict]] = {
    **{name: (options, _BY_LAYER) for name, options in DECODERS.items()},
    "mistral": ({**_GQA, "sliding_window": 4}, _GLOBAL),
    "qwen3_moe": ({**_GQA, "head_dim": 10, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}, _GLOBAL),
    "mamba2": ({"hidden_size": 48, "num_hidden_layers": 2, "num_heads": 12, "head_dim": 8, **_SSD}, {**_BY_LAYER, "units": ("ssm_head",)}),
    "bamba": (
        {**_GQA, "attn_layer_indices": [1], "mamba_n_heads": 12, "mamba_d_head": 8, **{f"mamba_{k.replace('state_size', 'd_state')}": v for k, v in _SSD.items()}},
        _GLOBAL,
    ),
}

LOAD = """
import sys, torch
import tests.torchvision_ops, graphprune as gp
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    module = gp.load(folder)
    given = torch.load(folder + "/../given.pt", weights_only=True)
    with torch.no_grad():
        logits = module(input_ids=given["ids"]).logits
    made = {c: module.generate(given["ids"], max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=c) for c in (True, False)}
    torch.save({"logits": logits, True: made[True], False: made[False]}, folder + "/../found.pt")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Name -> (result, ids, folder, what a fresh process made of the folder); the layers of each network are cut unevenly."""
    results = {}
    for name, (options, planning) in CASES.items():
        module, ids = decoder(name, **options)
        root = tmp_path_factory.mktemp(name)
        result = gp.compile(module, {"input_ids": ids}, **planning)
        result.save(root / "out")
        torch.save({"ids": ids}, root / "given.pt")
        results[name] = result, ids, root / "out"
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *(str(folder) for *_, folder in results.values())]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (*held, torch.load(held[2].parent / "found.pt", weights_only=True)) for name, held in results.items()}


@pytest.mark.parametrize("name", CASES)
def test_fresh_process(name: str, found: dict[str, tuple]) -> None:
    result, ids, _, made = found[name]
    assert result.written.how == "module"
    with torch.no_grad():
        torch.testing.assert_close(made["logits"], result.module(input_ids=ids).logits)
    assert torch.equal(made[True], made[False])
    assert torch.equal(made[True], result.module.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("name", CASES)
def test_uneven_layers_are_recorded_and_refused_aloud(name: str, found: dict[str, tuple]) -> None:
    result, _, folder, _ = found[name]
    layers = json.loads((folder / "config.json").read_text())["per_layer_config"]
    assert layers["0"] != layers["1"]
    with pytest.raises((RuntimeError, ValueError)):
        type(result.module).from_pretrained(folder)


def test_a_saved_folder_is_captured_again(found: dict[str, tuple]) -> None:
    result, ids, folder, _ = found["llama"]
    program = gp.capture(folder, {"input_ids": ids})
    assert {n: v.shape for n, v in program.weights.items()} == {n: v.shape for n, v in result.pruned.weights.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "mistral", "qwen3_moe"])
def test_even_layers_load_by_from_pretrained(name: str, tmp_path: Path) -> None:
    module, ids = decoder(name, **CASES[name][0])
    result = gp.compile(module, {"input_ids": ids}, pruning_ratio=0.5, round_to=4)
    result.save(tmp_path / "out")
    assert "per_layer_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = type(module).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, result.module(input_ids=ids).logits)
    assert again.num_parameters() < module.num_parameters()


def test_a_config_that_cannot_say_it_is_not_written(tmp_path: Path) -> None:
    module, ids = decoder("gpt2", **DECODERS["gpt2"])  # head width is hidden_size // num_heads there: fewer heads are wider ones
    result = gp.compile(module, {"input_ids": ids}, pruning_ratio=0.5, units=("head",), round_to=1)
    result.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_head"] == 6 and config["per_layer_config"] == {"0": {"n_head": 3}, "1": {"n_head": 3}}
    with torch.no_grad():
        torch.testing.assert_close(gp.load(tmp_path / "out")(input_ids=ids).logits, result.module(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_onnx_takes_any_batch_and_length(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module, ids = decoder(name, **DECODERS[name])
    result = gp.compile(module, {"input_ids": ids}, pruning_ratio=0.4, round_to=1)
    result.save(tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    longer = torch.cat([ids, ids.flip(1)], 1)[:1, :14].repeat(3, 1)
    logits = session.run(None, {session.get_inputs()[0].name: longer.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), result.module(input_ids=longer).logits, atol=1e-4, rtol=1e-4)
    names = {name.removesuffix(".T") for name in gp.capture(tmp_path / "out.onnx").weights}
    assert {n for n, p in result.module.named_parameters() if p.dim() == 2} <= names


@pytest.mark.parametrize(("units", "ratio"), [("neuron", {"*.0.*": 0.3, "*.1.*": 0.15}), ("kv_group", 0.5)])
def test_a_folder_is_cut_again(units: str, ratio: float | dict[str, float], tmp_path: Path) -> None:
    """As it was saved: uneven, by its name alone; and what comes of it is saved, read and cut as well."""
    source, ids = decoder("llama", **DECODERS["llama"])
    given, last = {"input_ids": ids}, source.num_parameters()
    for i, (kind, part) in enumerate([("neuron", {"*.0.*": 0.3, "*.1.*": 0.15}), (units, ratio), ("neuron", 0.25)]):
        result = gp.compile(source, given, pruning_ratio=part, units=(kind,), round_to=1)
        assert result.report.certificate["status"] == "passed"
        result.save(tmp_path / str(i))
        again = gp.load(tmp_path / str(i))
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=ids).logits, result.module(input_ids=ids).logits)
        assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None) for m in (again, result.module)))
        assert again.num_parameters() < last
        source, given, last = tmp_path / str(i), None, again.num_parameters()


def test_a_removed_branch_stays_away(tmp_path: Path) -> None:
    module, ids = decoder("llama", **DECODERS["llama"])
    program = gp.capture(module, {"input_ids": ids})
    branch = next(g.name for g in program.groups if g.kind == "layer" and any("layers.0.self_attn" in m.tensor for m in g.members))
    result = gp.apply(program, gp.plan(program, remove={branch: [0]}))
    result.save(tmp_path / "out")
    again = gp.load(tmp_path / "out")
    assert not [name for name in again.state_dict() if "layers.0.self_attn" in name]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, result.module(input_ids=ids).logits)
    assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None) for m in (again, result.module)))
