"""A checkpoint in many files is pruned block by block: what comes out is what the run in memory gives, and few weights are alive at once."""

from __future__ import annotations

import re
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphprune as gp
from graphprune import streaming
from graphprune.errors import InvalidInput
from graphprune.streaming import FolderReader, Shelf, prune_checkpoint

transformers = pytest.importorskip("transformers")

BLOCKS = 4


def checkpoint(folder: Path, tie: bool = False) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=112, num_hidden_layers=BLOCKS, num_attention_heads=6, num_key_value_heads=2, vocab_size=61,
        tie_word_embeddings=tie, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model, [{"input_ids": torch.randint(0, 61, (2, 9))} for _ in range(3)]


class Alive:
    """Counts the blocks that have a weight in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, int] = {}
        self.most = 0
        read = FolderReader.__call__

        def counted(reader: FolderReader, value) -> torch.Tensor:
            tensor = read(reader, value)
            block = re.search(r"layers\.(\d+)\.", value.name)
            if block:
                self.counts[block[1]] = self.counts.get(block[1], 0) + 1
                self.most = max(self.most, sum(count > 0 for count in self.counts.values()))
                weakref.finalize(tensor.untyped_storage(), self.gone, block[1])
            return tensor

        monkeypatch.setattr(FolderReader, "__call__", counted)

    def gone(self, block: str) -> None:
        self.counts[block] -= 1


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "planning", [{"recipe": "sparsegpt", "sparsity": 0.5}, {"recipe": "wanda", "pattern": "2:4"}, {"recipe": "flap", "pruning_ratio": 0.3}],
    ids=lambda planning: planning["recipe"],
)  # fmt: skip
def test_the_result_is_that_of_the_run_in_memory(planning, tie, tmp_path, monkeypatch):
    model, data = checkpoint(tmp_path / "dense", tie)
    whole = gp.compile(model, data[0], calibration_data=data, verify=False, progress=False, **planning)
    alive = Alive(monkeypatch)
    monkeypatch.setattr(streaming, "SHARD_BYTES", 100_000)
    plan = prune_checkpoint(tmp_path / "dense", tmp_path / "out", calibration_data=data, **planning)
    assert plan.removed == whole.plan.removed and plan.masks.keys() == whole.plan.masks.keys()
    assert plan.hash == whole.plan.hash == gp.Plan.load(tmp_path / "out" / "plan.json").hash
    assert all(torch.equal(mask, whole.plan.masks[name]) for name, mask in plan.masks.items())
    assert 1 <= alive.most <= 2
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    loaded, expected = gp.load(tmp_path / "out"), whole.module.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**data[0]).logits, whole.module(**data[0]).logits, rtol=0, atol=0)


def test_a_tied_weight_may_be_stored_under_its_other_name(tmp_path):
    _, data = checkpoint(tmp_path / "dense", tie=True)
    for file in (tmp_path / "dense").glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = table = tensors.pop("model.embed_tokens.weight")
            save_file(tensors, file, {"format": "pt"})
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", calibration_data=data, pruning_ratio=0.3)
    assert torch.equal(gp.load(tmp_path / "out").lm_head.weight, table)


def test_ties_that_transformers_makes_are_kept(tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=61)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "dense")  # without the decoder's weight and bias, which are tied
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", example_inputs={"input_ids": torch.randint(0, 61, (2, 9))}, pruning_ratio=0.3)
    head = gp.load(tmp_path / "out").cls.predictions
    assert head.decoder.bias is head.bias


def test_an_unknown_argument_is_named(tmp_path):
    checkpoint(tmp_path / "dense")
    with pytest.raises(InvalidInput, match="unknown argument 'backend'; known are budget, "):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", pruning_ratio=0.3, backend="triton")


def test_masks_need_no_code_of_ours_to_be_loaded(tmp_path):
    _, data = checkpoint(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", calibration_data=data, recipe="wanda", sparsity=0.5)
    theirs, ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out"), gp.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(**data[0]).logits, ours(**data[0]).logits)


def test_tensors_wait_in_files(tmp_path):
    shelf = Shelf(tmp_path / "shelf")
    shelf["a"], shelf["b"] = torch.arange(6).reshape(2, 3), torch.tensor([True, False])
    shelf["a"] = shelf["a"] + 1
    assert list(shelf) == ["a", "b"] and len(list((tmp_path / "shelf").iterdir())) == 2
    torch.testing.assert_close(shelf["a"], torch.arange(1, 7).reshape(2, 3))
    del shelf["a"]
    assert "a" not in shelf and shelf["b"].dtype == torch.bool


@pytest.mark.parametrize(
    ("planning", "message"),
    [({"recipe": "slicegpt", "pruning_ratio": 0.2}, "rewrites all weights"), ({"importance": "taylor", "pruning_ratio": 0.2}, "no data")],
)
def test_what_needs_the_whole_network_is_refused_and_nothing_is_written(planning, message, tmp_path):
    _, data = checkpoint(tmp_path / "dense")
    with pytest.raises(InvalidInput, match=message):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", calibration_data=data, **planning)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
