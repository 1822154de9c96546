"""What is saved comes back the same: modules with tied weights, buffers and odd sizes; ONNX files with their metadata."""

import json
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.capture.onnx_file import capture_onnx
from graphprune.errors import CaptureError, InvalidInput
from graphprune.plan import Plan
from graphprune.report import Footprint, Report
from graphprune.results import RECORD, WEIGHTS, _read_shapes, _spelled_shapes, save_result
from tests.test_report import onnx_file

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Network(nn.Module):
    """Tied weights, a size kept as an attribute, a buffer that no state dict holds."""

    def __init__(self, width=12):
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 3 * width)
        self.down = nn.Linear(width, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(width), persistent=False)

    def forward(self, ids):
        a, b, c = self.up(self.embed(ids)).split(self.width, -1)
        return self.head(self.down((a * b + c) * self.scale))


@pytest.fixture
def result():
    torch.manual_seed(0)
    return gp.compile(Network().eval(), IDS, pruning_ratio=0.5)


def test_module_comes_back_on_the_code_of_the_original(tmp_path, result):
    result.save(tmp_path / "out")
    original = Network()
    weights = original.embed.weight
    again = gp.load(tmp_path / "out", original)
    torch.testing.assert_close(again(IDS), result(IDS))
    assert again.width == 6 and again.head.weight is again.embed.weight and again.up.out_features == 18 and not again.training
    assert original.embed.weight is weights and original.width == 12
    again.head.weight.sum().backward()  # it trains
    stored = {"certificate.json", "graphprune.json", "graphprune_buffers.safetensors", "model.safetensors", "plan.json", "report.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == stored
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()).plan_hash == Plan.load(tmp_path / "out" / "plan.json").hash


def test_result_replaces_an_earlier_one(tmp_path, result):
    result.save(tmp_path / "out")
    gp.compile(Network().eval(), IDS, pruning_ratio=0.25).save(tmp_path / "out")
    assert gp.load(tmp_path / "out", Network()).width == 9


def test_plain_module_needs_its_original(tmp_path, result):
    result.save(tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"Network: give the original module too"):
        gp.load(tmp_path / "out")
    with pytest.raises(InvalidInput, match="saved from another"):
        gp.load(tmp_path / "out", nn.Linear(3, 3))


def test_damaged_folder_is_refused(tmp_path, result):
    result.save(tmp_path / "out")
    weights = tmp_path / "out" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InvalidInput, match="damaged or cut short"):
        gp.load(tmp_path / "out", Network())
    (tmp_path / "out" / RECORD).write_text(json.dumps({"format": 99}))
    with pytest.raises(InvalidInput, match="format 99"):
        gp.load(tmp_path / "out", Network())
    with pytest.raises(InvalidInput, match="does not exist"):
        gp.load(tmp_path / "nothing")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_substitutes_come_back(tmp_path):
    model, x = Attention().eval(), torch.randn(2, 5, 16)
    result = gp.compile(model, x, pruning_ratio=0.5, units=("head",), round_to=1)
    assert result.written.substitutes == {"attention": "table"}
    result.save(tmp_path / "out")
    torch.testing.assert_close(gp.load(tmp_path / "out", Attention())(x), result(x))


class Stubborn(nn.Module):
    """Its code names a size that no attribute holds, so the result runs the edited graph."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 24), nn.Linear(24, 4)

    def forward(self, x, factor):
        return self.down(self.up(x).view(x.shape[0], 3, 8).relu().flatten(1)) * factor["by"]


def test_edited_graph_comes_back(tmp_path):
    arguments = torch.randn(2, 4), {"by": torch.tensor(2.0)}
    result = gp.compile(Stubborn().eval(), arguments, pruning_ratio=0.5, round_to=1)
    assert result.written.how == "graph" or "graph" in result.written.substitutes.values()
    result.save(tmp_path / "out")
    torch.testing.assert_close(gp.load(tmp_path / "out", Stubborn())(*arguments), result(*arguments))


def test_an_edited_graph_is_saved_as_onnx_with_the_names_of_the_user(tmp_path):
    x, factor = torch.randn(2, 4), {"by": torch.tensor(2.0)}
    result = gp.compile(Stubborn().eval(), (x, factor), pruning_ratio=0.5, round_to=1)
    assert result.written.how == "graph"
    result.save(tmp_path / "out.onnx")
    session, wide = onnxruntime.InferenceSession(tmp_path / "out.onnx"), torch.randn(5, 4)
    (y,) = session.run(None, {"x": wide.numpy(), "factor_by": factor["by"].numpy()})
    torch.testing.assert_close(torch.from_numpy(y), result(wide, factor).detach())


def test_why_a_module_is_not_saved_as_onnx(tmp_path):
    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 24), nn.Linear(24, 4)

        def forward(self, x):
            return torch.cdist(self.down(self.up(x).relu()), x)

    result = gp.compile(Distance().eval(), torch.randn(5, 4), pruning_ratio=0.5, round_to=1)
    with pytest.raises(CaptureError, match="cdist") as caught:
        result.save(tmp_path / "out.onnx")
    assert "\x1b" not in str(caught.value)


class Steps(nn.Module):
    """As `Stubborn`, over any number of steps."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.down(self.up(x).view(x.shape[0], x.shape[1], 3, 8).relu().flatten(2))


def test_an_edited_graph_is_cut_again_with_the_dynamic_shapes_of_the_user(tmp_path):
    open_axes = ({0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("steps", min=2, max=64)},)
    x, other = torch.randn(2, 5, 4), torch.randn(7, 11, 4)
    first = gp.compile(Steps().eval(), x, pruning_ratio=0.3, round_to=1, dynamic_shapes=open_axes)
    assert first.written.how == "graph"
    first.save(tmp_path / "first")
    again = gp.load(tmp_path / "first", Steps())
    torch.testing.assert_close(again(other), first.module(other))
    for shapes in (open_axes, {"x": open_axes[0]}):
        second = gp.compile(again, x, pruning_ratio=0.3, round_to=1, dynamic_shapes=shapes)
        assert second.report.certificate["status"] == "passed" and second.module(other).shape == (7, 11, 4)
    for name, result in (("first.onnx", first), ("second.onnx", second)):
        result.save(tmp_path / name)
        sizes = onnx.load(tmp_path / name).graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param for d in sizes] == ["batch", "steps", ""]


class Pixels(Stubborn):
    """As `Stubborn`, over images of any height."""

    def forward(self, image):
        x = image.permute(0, 2, 3, 1)
        return self.down(self.up(x).view(*x.shape[:3], 3, 8).relu().flatten(3))


@pytest.mark.parametrize("height", [torch.export.Dim("height", min=2, max=64), torch.export.Dim("height"), torch.export.Dim.AUTO])
def test_an_edited_graph_keeps_the_dynamic_shapes_of_the_user(tmp_path, height):
    image, other = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 9, 5)
    shapes = {"image": {2: height}}
    result = gp.compile(Pixels().eval(), image, pruning_ratio=0.3, round_to=1, dynamic_shapes=shapes)
    assert result.written.how == "graph"
    result.save(tmp_path / "out")
    again = gp.load(tmp_path / "out", Pixels())
    torch.testing.assert_close(again(other), result.module(other))
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert str(_read_shapes(record["dynamic_shapes"])) == str(shapes)
    del record["dynamic_shapes"]  # as an earlier version wrote it
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    torch.testing.assert_close(gp.load(tmp_path / "out", Pixels())(image), result.module(image))


def test_lists_of_dynamic_shapes_stay_lists():
    shapes = {"images": [{0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")}], "size": ({1: torch.export.Dim.AUTO}, None)}
    assert str(_read_shapes(json.loads(json.dumps(_spelled_shapes(shapes))))) == str(shapes)


def test_axes_that_depend_on_others_are_not_saved(tmp_path):
    with pytest.raises(InvalidInput, match="dynamic_shapes holds"):
        _spelled_shapes({"x": {0: 2 * torch.export.Dim("half")}})


def test_names_that_were_added_need_no_dynamic_shapes():
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=2, max=64)}}  # use_cache=False is given by the compiler
    program = gp.capture(llama(), {"input_ids": IDS}, dynamic_shapes=shapes)
    assert any(v.dynamic for node in program.walk() for v in node.outputs)


def llama(**changes):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, pad_token_id=0)).eval()


def test_hugging_face_model_comes_back_without_its_original(tmp_path):
    model = llama(tie_word_embeddings=True)
    ratios = {"model.layers.0*": 0.5, "model.layers.1*": 0.25}  # layers differ: no config of transformers says that
    result = gp.compile(model, pruning_ratio=ratios, units=("neuron", "kv_group"), round_to=1)
    result.save(tmp_path / "out")
    before = torch.random.get_rng_state()
    again = gp.load(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(again(IDS).logits, result.module(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == [24, 36]
    made = again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (2, 7)


def test_uniform_checkpoint_loads_by_from_pretrained_too(tmp_path):
    result = gp.compile(llama(), pruning_ratio=0.5, units=("neuron",), round_to=1)
    result.save(tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.intermediate_size == 24
    torch.testing.assert_close(again(IDS).logits, result.module(IDS).logits)


def test_bfloat16_and_frozen_parameters_survive(tmp_path):
    model = llama().to(torch.bfloat16)
    result = gp.compile(model, pruning_ratio=0.5, units=("neuron",), round_to=1)
    result.save(tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    again = gp.load(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(again(IDS).logits, result.module(IDS).logits)


def test_onnx_is_saved_with_its_metadata_and_the_plan(tmp_path):
    path = onnx_file(tmp_path / "in.onnx", width=8)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, path)
    program = capture_onnx(path)
    report = Report(Footprint(1, 4), Footprint(1, 4))
    result = SimpleNamespace(program=program, pruned=program, plan=Plan(), report=report, certificate=None)
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


def test_torch_result_is_saved_as_onnx(tmp_path, result):
    result.save(tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    assert {p.key for p in model.metadata_props} >= {"graphprune.plan", "graphprune.certificate"}
    (y,) = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {model.graph.input[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), result(IDS).detach(), rtol=1e-4, atol=1e-5)
