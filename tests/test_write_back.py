"""The pruned network as the user's own module: right, the same class and names, sharing what was not cut; and the edited graph where
that cannot be.
"""

import copy
import pickle
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.capture.torch_export import capture_torch
from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import run
from graphprune.execute.likeness import distance
from graphprune.program import Program
from graphprune.surgery import write_back as module_under_test
from graphprune.surgery.cut import Cut
from graphprune.surgery.fallback import EditedGraph, edited_graph
from graphprune.surgery.substitutes import MultiheadAttention, substitute_for
from graphprune.surgery.torch_graph import apply_cut
from graphprune.surgery.write_back import WriteBack, copied, named_replacements, write_back
from graphprune.units import DEFAULT_UNITS
from graphprune.verify.module import Reference, cached_decoding_error
from tests.randomise import randomise, seeded
from tests.zoo import TINY

GRAPHS = {"shufflenet", "vit"}  # their code takes sizes from inputs: halves of the channels, `c // heads`


def cut_of(program: Program, units=DEFAULT_UNITS, seed: int = 0, part: float = 0.4) -> Cut:
    rng = random.Random(seed)
    removed = {}
    for group in program.groups:
        count = min(max(1, int(group.size * part)), group.size - group.min_keep)
        if count > 0 and (units is None or group.kind in units):
            removed[group.name] = rng.sample(range(group.size), count)
    return Cut(program.analysis, removed)


def written(module: nn.Module, args: tuple, units=DEFAULT_UNITS, inplace: bool = False, **kwargs) -> tuple[WriteBack, Program, Cut, Program]:
    program = capture_torch(module, args, kwargs)
    cut = cut_of(program, units)
    pruned = apply_cut(program, cut)
    return write_back(program, cut, pruned, inplace), program, cut, pruned


def outputs(module: nn.Module, *args, **kwargs) -> list[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(module(*args, **kwargs))


@pytest.mark.parametrize("name", TINY)
def test_zoo(name: str) -> None:
    case = TINY[name]()
    before = {key: value.clone() for key, value in case.module.state_dict().items()}
    result, program, cut, pruned = written(case.module, case.args, **case.kwargs)
    assert result.how == "module" and ("graph" in result.substitutes.values()) == (name in GRAPHS), result.notes
    assert distance(outputs(result.module, *case.args), run(pruned, program.example_inputs)) < 1e-5
    assert list(result.module.state_dict()) == list(before)
    original = dict(case.module.named_parameters())
    removed = {v.name for v in cut.weights} | {alias for alias, name in program.aliases.items() if program.weights[name] in cut.weights}
    for key, parameter in result.module.named_parameters():
        assert (parameter is original[key]) == (key not in removed), key
    for key, value in case.module.state_dict().items():
        assert torch.equal(value, before[key])
    copy.deepcopy(result.module).load_state_dict(result.module.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet", "shufflenet", "vit", "gqa"])
def test_any_batch_size(name: str) -> None:
    case = TINY[name]()
    result, *_ = written(case.module, case.args)
    (x,) = case.args
    whole = outputs(result.module, torch.cat([x, x.flip(0), x]))[0]
    assert distance([whole[len(x) : 2 * len(x)]], [outputs(result.module, x.flip(0))[0]]) < 1e-4


def test_a_wrong_weight_is_found_and_placed() -> None:
    case = TINY["resnet"]()
    result, program, _, pruned = written(case.module, case.args)
    reference = Reference(program, pruned)
    assert reference.failure(result.module) is None
    wrong = copy.deepcopy(result.module)
    with torch.no_grad():
        wrong.get_submodule("body.2.branch.1.0").weight[0, 0, 0, 0] += 1
    failure = reference.failure(wrong)
    assert failure is not None and failure.suspects[0].startswith("body.2.branch.1")


class Attention(nn.Module):
    """Heads and head width are equal and their names say nothing; the scale is the old one."""

    def __init__(self, width: int = 16, a: int = 4, b: int = 4):
        super().__init__()
        self.b, self.a, self.scale = b, a, b**-0.5
        self.qkv, self.out = nn.Linear(width, 3 * a * b), nn.Linear(a * b, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.a, self.b)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Some body between two linear layers."""

    def __init__(self, *body: nn.Module, inputs: int = 9, width: int = 16):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(inputs, width), nn.Sequential(*body), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def net(*body: nn.Module) -> tuple[nn.Module, Tensor]:
    with seeded(3):
        x = torch.randn(2, 6, 9)
        return randomise(Net(*body), 3, x), x


def test_the_run_decides_between_equal_sizes() -> None:
    with seeded(0):
        module, x = net(Attention(), Attention())
    result, _, _, pruned = written(module, (x,), units=("head",))
    assert result.how == "module" and not result.substitutes
    for layer in result.module.body:
        assert (layer.a, layer.b, layer.scale) == (3, 4, 0.5)
    assert distance(outputs(result.module, x), run(pruned, [x])) < 1e-5


class Configured(nn.Module):
    """Reads its sizes from a config that all layers share."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(16, 2 * config.intermediate_size), nn.Linear(config.intermediate_size, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).split([self.config.intermediate_size, self.config.intermediate_size], -1)
        return self.down(F.silu(gate) * value)


def test_each_layer_gets_a_config_of_its_own() -> None:
    config = SimpleNamespace(intermediate_size=24, eos_token_id=24)
    with seeded(0):
        module, x = net(Configured(config), Configured(config))
    program = capture_torch(module, (x,))
    neurons = [g.name for g in program.groups if g.size == 24]
    cut = Cut(program.analysis, {neurons[0]: range(4), neurons[1]: range(9)})
    result = write_back(program, cut, apply_cut(program, cut))
    assert result.how == "module" and not result.substitutes
    assert [layer.config.intermediate_size for layer in result.module.body] == [20, 15]
    assert {layer.config.eos_token_id for layer in result.module.body} == {24}
    assert config.intermediate_size == 24


class Hard(nn.Module):
    """Its code holds sizes as constants, at the top, between layers that behave differently in training."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.drop, self.down = nn.Linear(9, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 9)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, double: bool = False) -> dict[str, Tensor]:
        y = self.drop(self.norm(self.up(x))).view(-1, 4, 6).mul(2).view(-1, 24)
        y = self.down(y) if scale is None else self.down(y) * scale
        return {"out": y * 2 if double else y}


def hard(part: float = 0.4) -> tuple[WriteBack, Program, Program, Tensor]:
    with seeded(0):
        module, x = Hard(), torch.randn(6, 9)
        randomise(module, 0, x)
    program = capture_torch(module, (x,), {"scale": torch.tensor(3.0)})
    cut = cut_of(program, None, part=part)
    pruned = apply_cut(program, cut)
    return write_back(program, cut, pruned), program, pruned, x


def test_fallback_is_a_module_like_the_original() -> None:
    result, program, pruned, x = hard()
    original = program.source.module
    assert result.how == "graph" and "Hard" in result.notes[0]
    assert list(result.module.state_dict()) == list(original.state_dict())
    expected = run(pruned, program.example_inputs)
    assert torch.equal(result.module(x, scale=torch.tensor(3.0))["out"], expected[0])
    assert torch.equal(result.module(x, torch.tensor(3.0))["out"], expected[0])
    assert torch.equal(copy.deepcopy(result.module)(x, scale=torch.tensor(3.0))["out"], expected[0])
    assert result.module(torch.randn(11, 9), scale=torch.tensor(3.0))["out"].shape == (11, 9)
    with pytest.raises(InvalidInput, match="without the argument 'double'"):
        result.module(x, scale=torch.tensor(3.0), double=True)
    with pytest.raises(InvalidInput, match="was captured with the arguments"):
        result.module(x)


def test_fallback_is_pickled() -> None:
    result, _, _, x = hard()
    before = list(warnings.filters)
    again = pickle.loads(pickle.dumps(result.module))
    assert warnings.filters == before
    scale = torch.tensor(3.0)
    assert torch.equal(again(x, scale=scale)["out"], result.module(x, scale=scale)["out"])
    assert not torch.equal(again.train()(x, scale=scale)["out"], again(x, scale=scale)["out"])  # dropout follows the mode


def test_fallback_trains() -> None:
    result, program, _, x = hard()
    module, scale = result.module, torch.tensor(3.0)
    norm = module.get_submodule("norm")
    tracked = int(norm.num_batches_tracked)
    with seeded(0):
        assert not torch.equal(module.train()(x, scale=scale)["out"], module(x, scale=scale)["out"])
    assert int(norm.num_batches_tracked) == tracked + 2
    assert not torch.equal(norm.running_mean, program.source.module.norm.running_mean[: len(norm.running_mean)])
    norm.eval()  # a user freezes one layer
    held = norm.running_mean.clone()
    module(x, scale=scale)["out"].sum().backward()
    assert torch.equal(norm.running_mean, held)
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    assert torch.equal(module(x, scale=scale)["out"], module(x, scale=scale)["out"])


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(12), nn.BatchNorm2d(12, track_running_stats=False)], ids=lambda n: type(n).__name__)
def test_fallback_keeps_norms_without_running_statistics(norm: nn.Module) -> None:
    """They take those of their input in both modes."""
    with seeded(0):
        module, x = nn.Sequential(nn.Conv2d(3, 12, 3), norm, nn.ReLU(), nn.Conv2d(12, 4, 1)), torch.randn(2, 3, 8, 8)
    program = capture_torch(module.eval(), (x,))
    cut = cut_of(program, None)
    pruned = apply_cut(program, cut)
    graph, _ = edited_graph(copy.deepcopy(write_back(program, cut, pruned).module), program, cut, pruned)
    expected = run(pruned, [x])[0]
    for training in (False, True):
        assert distance([graph.train(training)(x)], [expected]) < 1e-5


def test_fallback_trains_like_the_module() -> None:
    case = TINY["resnet"]()
    result, program, cut, pruned = written(case.module, case.args)
    shell = copy.deepcopy(result.module)
    graph, sizes = edited_graph(shell, program, cut, pruned)
    assert isinstance(graph, EditedGraph) and sizes == "any batch size"
    module = result.module
    with torch.no_grad():
        assert distance([graph.train()(*case.args)], [module.train()(*case.args)]) < 1e-5
    for (name, a), (_, b) in zip(graph.named_buffers(), module.named_buffers()):
        assert torch.allclose(a.float(), b.float(), atol=1e-5), name


def test_what_the_user_set_stays() -> None:
    case = TINY["resnet"]()
    module = case.module.to(memory_format=torch.channels_last)
    module.body[0][0].weight.requires_grad_(False)
    module.body[0][0].weight._no_weight_decay = True
    module.body[1].train()
    seen: list[str] = []
    module.body[2].register_forward_hook(lambda *_: seen.append("hook"))
    result, *_ = written(module, case.args)
    seen.clear()
    outputs(result.module, *case.args)
    assert seen == ["hook"]
    for old, new in zip(module.modules(), result.module.modules()):
        assert type(old) is type(new) and old.training == new.training
    weight = result.module.body[0][0].weight
    assert not weight.requires_grad and isinstance(weight, nn.Parameter) and weight._no_weight_decay
    assert weight.shape != module.body[0][0].weight.shape and weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_stay_tied() -> None:
    case = TINY["tied"]()
    result, *_ = written(case.module, case.args, units=("neuron", "head", "hidden"))
    assert result.module.lm_head.weight is result.module.embed.weight
    assert result.module.embed.embedding_dim == result.module.lm_head.in_features == result.module.embed.weight.shape[1] < 44


@pytest.mark.parametrize("name", ["resnet", "gqa", "vit"])
def test_inplace(name: str) -> None:
    case = TINY[name]()
    result, program, _, pruned = written(case.module, case.args, inplace=True)
    assert result.module is case.module
    expected = run(pruned, program.example_inputs)
    assert distance(outputs(case.module, *case.args), expected) < 1e-5


def test_inplace_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TINY["gqa"]()
    program = capture_torch(case.module, case.args)
    cut = cut_of(program)
    pruned = apply_cut(program, cut)
    before = {name: vars(m).copy() for name, m in case.module.named_modules()}
    weights = dict(case.module.named_parameters())
    expected = case()
    real = module_under_test.apply_edits

    def fails(root: nn.Module, edits) -> None:
        real(root, list(edits)[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(module_under_test, "apply_edits", fails)
    with pytest.raises(KeyboardInterrupt):
        write_back(program, cut, pruned, inplace=True)
    for name, m in case.module.named_modules():
        assert [k for k, v in before[name].items() if vars(m)[k] is not v] == [] and vars(m).keys() == before[name].keys(), name
    assert all(p is weights[name] for name, p in case.module.named_parameters())
    assert torch.equal(case(), expected)


def test_inplace_leaves_the_module_where_only_the_graph_will_do() -> None:
    with seeded(0):
        module, x = randomise(Hard(), 0, torch.randn(6, 9)), torch.randn(6, 9)
    result, *_ = written(module, (x,), units=None, inplace=True)
    assert result.how == "graph" and module.up.out_features == 24 and any("left as it was" in note for note in result.notes)


def test_a_module_that_cannot_be_copied() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle 'lock' object")

    with seeded(0):
        module, x = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), Locked(20, 4)), torch.randn(3, 9)
    program = capture_torch(module, (x,))
    cut = cut_of(program, None)
    with pytest.raises(TypeError):
        copied(module, named_replacements(program, cut, apply_cut(program, cut)))


# ---- substitutes


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 12}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "float", "bool", "per head", "padding"])
def test_attention_substitute_is_attention(options: dict, need_weights: bool, mask: str) -> None:
    with seeded(0):
        module = randomise(nn.MultiheadAttention(24, 4, **options), 0)
        query, key, value = torch.randn(5, 3, 24), torch.randn(7, 3, options.get("kdim", 24)), torch.randn(7, 3, options.get("vdim", 24))
    if options.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    masks = {
        "none": {},
        "float": {"attn_mask": torch.linspace(-1, 1, 35).view(5, 7)},
        "bool": {"attn_mask": torch.arange(35).view(5, 7) % 3 == 1},
        "per head": {"attn_mask": torch.linspace(-1, 1, 12 * 35).view(12, 5, 7)},
        "padding": {"key_padding_mask": torch.arange(21).view(3, 7) % 4 == 3},
    }[mask]
    new = substitute_for(copy.deepcopy(module))
    assert type(new) is MultiheadAttention and list(new.state_dict()) == list(module.state_dict())
    expected, got = (m(query, key, value, need_weights=need_weights, **masks) for m in (module, new))
    torch.testing.assert_close(got, expected)


def test_attention_substitute_without_a_batch() -> None:
    with seeded(0):
        module, x = nn.MultiheadAttention(24, 4), torch.randn(5, 24)
    torch.testing.assert_close(substitute_for(copy.deepcopy(module))(x, x, x), module(x, x, x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_fewer_heads_in_torchs_encoder(norm_first: bool) -> None:
    with seeded(0):
        layer = nn.TransformerEncoderLayer(24, 4, 50, batch_first=True, norm_first=norm_first)
        module, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 24)
        randomise(module, 0)
    result, _, _, pruned = written(module, (x,), units=("head", "neuron"))
    assert result.how == "module" and set(result.substitutes.values()) == {"table"}
    attention = result.module.layers[0].self_attn
    assert attention.num_heads == 3 and attention.in_proj_weight.shape == (54, 24) and attention.head_dim == 6
    assert distance(outputs(result.module, x), run(pruned, [x])) < 1e-5


# ---- transformers


def decoder(name: str, **options) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    with seeded(0):
        return randomise(transformers.AutoModelForCausalLM.from_config(config), 0), torch.randint(3, 97, (2, 9))


_SIZES = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 6}
DECODERS = {
    "llama": {**_SIZES, "num_key_value_heads": 2},
    "qwen3": {**_SIZES, "num_key_value_heads": 2, "head_dim": 10},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 112},
    "opt": {"hidden_size": 48, "ffn_dim": 112, "num_hidden_layers": 2, "num_attention_heads": 6, "word_embed_proj_dim": 34},
    "gpt_neox": _SIZES,
    "mixtral": {**_SIZES, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate_with_a_cache(name: str) -> None:
    module, ids = decoder(name, **DECODERS[name])
    result, *_ = written(module, (), input_ids=ids, use_cache=False)
    assert result.how == "module" and not result.substitutes and not result.notes
    assert cached_decoding_error(result.module, ids) == ""
    first = result.module.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    second = result.module.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(first, second)
    assert result.module.config.eos_token_id == 2 and result.module.config.num_hidden_layers == 2


def test_fallback_of_a_decoder_returns_its_output_class() -> None:
    module, ids = decoder("llama", **DECODERS["llama"])
    result, program, cut, pruned = written(module, (), input_ids=ids, use_cache=False)
    graph, sizes = edited_graph(copied(module, named_replacements(program, cut, pruned)), program, cut, pruned)
    assert sizes == "any batch size and length"
    longer = torch.cat([ids, ids.flip(1)], 1)[:, :13]
    torch.testing.assert_close(graph(input_ids=longer).logits, result.module(input_ids=longer).logits, atol=1e-4, rtol=1e-4)


def test_meta_weights_are_written_back_without_a_run() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODERS["llama"], vocab_size=97, use_cache=False)).eval()
        ids = torch.zeros(2, 9, dtype=torch.int64)
    result, *_ = written(module, (), units=("neuron", "kv_group"), input_ids=ids)
    assert result.how == "module" and "meta" in result.notes[0]
    assert result.module.model.layers[0].self_attn.k_proj.out_features == 8 and result.module.config.num_key_value_heads == 1


# ---- removed branches


@pytest.mark.parametrize("name, branch", [("resnet", "body.1."), ("mobilenet", "body.2."), ("vit", "blocks.1.mlp"), ("gqa", "blocks.0.attention")])
def test_a_removed_branch_leaves_with_its_weights(name: str, branch: str) -> None:
    case = TINY[name]()
    program = capture_torch(case.module, case.args)
    group = next(g.name for g in program.groups if g.kind == "layer" and any(m.tensor.startswith(branch) for m in g.members))
    cut = Cut(program.analysis, {group: [0]})
    pruned = apply_cut(program, cut)
    result = write_back(program, cut, pruned)
    assert result.how == "module" and set(result.substitutes.values()) == {"absent"}
    (x,) = case.args
    assert distance(outputs(result.module, x), run(pruned, [x])) < 1e-5
    assert outputs(result.module, torch.cat([x, x]))[0].shape[0] == 2 * len(x)
    left = set(result.module.state_dict())
    assert not any(key.startswith(branch) and not key.endswith("scale") for key in left) and left < set(case.module.state_dict())
    graph, _ = edited_graph(copied(case.module, {}), program, cut, pruned)
    assert distance(outputs(graph, x), run(pruned, [x])) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_counts_the_layers_that_are_left(name: str, layer: int) -> None:
    module, ids = decoder(name, **DECODERS[name])
    attention = {"llama": "model.layers.{}.", "gpt2": "transformer.h.{}."}[name].format(layer)
    program = capture_torch(module, (), {"input_ids": ids, "use_cache": False})
    groups = [g for g in program.groups if g.kind == "layer" and any("attn" in m.tensor and m.tensor.startswith(attention) for m in g.members)]
    cut = Cut(program.analysis, {groups[0].name: [0]})
    result = write_back(program, cut, apply_cut(program, cut))
    assert result.how == "module" and cached_decoding_error(result.module, ids) == "" and result.module.config.use_cache is not False
    cached, plain = (result.module.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
