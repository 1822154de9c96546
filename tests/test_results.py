"""What is saved comes back the same: modules with odd sizes, tied weights and buffers; ONNX files with their metadata."""

import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from graphprune.capture.onnx_file import capture_onnx
from graphprune.errors import InvalidInput
from graphprune.plan import Plan
from graphprune.report import Footprint, Report
from graphprune.results import RECORD, load_result, save_result
from tests.test_report import onnx_file


class Network(nn.Module):
    """Tied weights, a size kept as an attribute, a buffer that no state dict holds."""

    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(11, width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(width), persistent=False)

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids)).reshape(*ids.shape, self.width) * self.scale)


def result_of(module, program=None, pruned=None):
    """What `save_result` looks at."""
    report = Report(Footprint(1, 4), Footprint(1, 4))
    program = program or SimpleNamespace(source=SimpleNamespace(module=module, args=(), kwargs={}))
    return SimpleNamespace(module=module, program=program, pruned=pruned, plan=Plan(), report=report, certificate=None)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_narrowed_module_comes_back_on_the_code_of_the_original(tmp_path):
    narrow, original = Network(5).eval(), Network(8)
    narrow.inner.in_features = narrow.inner.out_features = 5
    save_result(result_of(narrow), tmp_path / "out")
    weights = original.embed.weight
    again = load_result(tmp_path / "out", original)
    torch.testing.assert_close(again(IDS), narrow(IDS))
    assert again.head.weight is again.embed.weight and again.inner.in_features == 5 and not again.training
    assert original.embed.weight is weights and original.width == 8
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "graphprune.json", "graphprune_buffers.safetensors", "model.safetensors", "plan.json", "report.json",
    ]  # fmt: skip


def test_result_replaces_an_earlier_one(tmp_path):
    for width in (5, 3):
        save_result(result_of(Network(width)), tmp_path / "out")
    assert load_result(tmp_path / "out", Network()).width == 3


def test_plain_module_needs_its_original(tmp_path):
    save_result(result_of(Network(5)), tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"Network: give the original module too"):
        load_result(tmp_path / "out")
    with pytest.raises(InvalidInput, match="saved from another"):
        load_result(tmp_path / "out", nn.Linear(3, 3))


def test_damaged_folder_is_refused(tmp_path):
    save_result(result_of(Network(5)), tmp_path / "out")
    weights: Path = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InvalidInput, match="damaged or cut short"):
        load_result(tmp_path / "out", Network())
    (tmp_path / "out" / RECORD).write_text(json.dumps({"format": 99}))
    with pytest.raises(InvalidInput, match="format 99"):
        load_result(tmp_path / "out", Network())
    with pytest.raises(InvalidInput, match="does not exist"):
        load_result(tmp_path / "nothing")


def llama(**changes):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, pad_token_id=0)).eval()


def test_hugging_face_model_comes_back_without_its_original(tmp_path):
    model = llama(tie_word_embeddings=True)
    mlp = model.model.layers[1].mlp  # another width than layer 0: no config of transformers says that
    for linear, axis in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        linear.weight = nn.Parameter(linear.weight.detach().narrow(axis, 0, 40).clone())
    mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = 40
    save_result(result_of(model), tmp_path / "out")
    again = load_result(tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    made = again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (2, 7)


def test_uniform_checkpoint_loads_by_from_pretrained_too(tmp_path):
    model = llama()
    save_result(result_of(model), tmp_path / "out")
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_onnx_is_saved_with_its_metadata_and_the_plan(tmp_path):
    path = onnx_file(tmp_path / "in.onnx", width=8)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, path)
    program = capture_onnx(path)
    result = result_of(None, program, program)
    save_result(result, tmp_path / "out.onnx")
    saved = onnx.load(tmp_path / "out.onnx")
    assert {p.key: p.value for p in saved.metadata_props} == {"author": "somebody", "graphprune.plan": Plan().hash}
    for part in ("node", "initializer", "input", "output"):
        assert list(getattr(saved.graph, part)) == list(getattr(model.graph, part))
    assert saved.opset_import == model.opset_import and saved.ir_version == model.ir_version
    assert "graphprune.plan" not in program.source.model.metadata_props
    with pytest.raises(InvalidInput, match=r"ends in \.onnx"):
        save_result(result, tmp_path / "folder")
    with pytest.raises(InvalidInput, match="it is the input"):
        save_result(result, path)
