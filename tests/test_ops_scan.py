"""The scans as ops, against the definition and against the models they are taken from; capture of mixers as one node."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from graphprune.capture.scans import scans_captured_whole
from graphprune.errors import CaptureError, InvalidInput
from graphprune.ops import delta_rule, selective_scan, ssd
from tests.randomise import randomise, seeded

transformers = pytest.importorskip("transformers")
hub_errors = pytest.importorskip("huggingface_hub.errors")

OPS = {"selective_scan": (selective_scan, selective_scan.selective_scan), "ssd_scan": (ssd, ssd.ssd_scan)}
GENERAL = dict(vocab_size=40, hidden_size=12, num_hidden_layers=2)
ATTENTION = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=14)
MAMBA1 = dict(state_size=5, time_step_rank=3, expand=2)
MAMBA2 = dict(mamba_n_heads=6, mamba_d_head=4, mamba_n_groups=2, mamba_d_state=5, mamba_expand=2, mamba_chunk_size=4)
DELTA = dict(linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=5, linear_value_head_dim=3, linear_conv_kernel_dim=3)
MODELS = {  # model type -> (options of a tiny config, scan op, how many of them)
    "mamba": (MAMBA1, "selective_scan", 2),
    "falcon_mamba": (MAMBA1, "selective_scan", 2),
    "jamba": (
        dict(ATTENTION, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=3)
        | dict(mamba_d_state=5, mamba_dt_rank=3, num_hidden_layers=3),
        "selective_scan",
        2,
    ),
    "zamba": (
        dict(ATTENTION, mamba_d_state=5, mamba_dt_rank=3, n_mamba_heads=2, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)
        | dict(layer_types=["mamba", "hybrid", "mamba", "hybrid"]),
        "selective_scan",
        8,  # one for each mamba head
    ),
    "mamba2": (
        dict(num_heads=6, head_dim=4, n_groups=2, state_size=5, expand=2, chunk_size=4, time_step_limit=(0.0, 0.5)),
        "ssd_scan",
        2,
    ),
    "bamba": (dict(ATTENTION, **MAMBA2, attn_layer_indices=[1], num_hidden_layers=3), "ssd_scan", 2),
    "zamba2": (
        dict(ATTENTION, n_mamba_heads=6, mamba_headdim=4, mamba_ngroups=2, mamba_d_state=5, mamba_expand=2, chunk_size=4)
        | dict(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"]),
        "ssd_scan",
        3,
    ),
    "falcon_h1": (dict(ATTENTION, **MAMBA2, mamba_d_ssm=24, head_dim=6), "ssd_scan", 2),
    "granitemoehybrid": (
        dict(ATTENTION, **MAMBA2, layer_types=["mamba", "attention", "mamba"], num_hidden_layers=3, shared_intermediate_size=10)
        | dict(num_local_experts=3, num_experts_per_tok=2),
        "ssd_scan",
        2,
    ),
    "nemotron_h": (
        dict(ATTENTION, mamba_num_heads=6, mamba_head_dim=4, n_groups=2, ssm_state_size=5, expand=2, chunk_size=4, head_dim=6)
        | dict(layers_block_type=["mamba", "attention", "mamba"], num_hidden_layers=3),
        "ssd_scan",
        2,
    ),
    "olmo_hybrid": (dict(ATTENTION, **DELTA, pad_token_id=0, layer_types=["linear_attention", "full_attention"]), "gated_delta_rule", 1),
    "qwen3_next": (
        dict(ATTENTION, **DELTA, layer_types=["linear_attention", "full_attention"], num_experts=3, num_experts_per_tok=2)
        | dict(linear_num_key_heads=2, head_dim=8, moe_intermediate_size=6, shared_expert_intermediate_size=8),
        "gated_delta_rule",
        1,
    ),
}


def operands(name: str, dtype=torch.float64, requires_grad=False, seed=0, length=7) -> list[torch.Tensor]:
    """All operands of a scan, decays negative and steps positive."""
    sizes = dict(b=2, d=3, l=length, n=2, h=6, p=2, g=3)
    axes = {
        "selective_scan": ("bdl", "bdl", "dn", "bnl", "bnl", "d", "bdn"),
        "ssd_scan": ("blhp", "blh", "h", "blgn", "blgn", "h", "bhpn"),
    }[name]
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn([sizes[a] for a in axis], generator=generator, dtype=torch.float64) for axis in axes]
    found[1], found[2] = found[1].abs() + 0.1, -found[2].abs() - 0.1
    return [t.to(dtype).requires_grad_(requires_grad) for t in found]


def definition(name, x, delta, A, B, C, D=None, initial_state=None):
    """The formula of the docstrings, one number at a time."""
    if name == "ssd_scan":  # every head and head dim is a channel of its own
        (b, _, h, p), g = x.shape, B.shape[2]
        state = None if initial_state is None else initial_state.flatten(1, 2)
        y, last = torch.empty_like(x), x.new_empty(b, h * p, B.shape[3])
        for head in range(h):
            own = slice(head * p, head * p + p)
            y[:, :, head], last[:, own] = (
                t if i else t.transpose(1, 2)
                for i, t in enumerate(
                    definition(
                        "selective_scan",
                        x[:, :, head].transpose(1, 2),
                        delta[:, :, head, None].expand(-1, -1, p).transpose(1, 2),
                        A[head].expand(p, B.shape[3]),
                        B[:, :, head // (h // g)].transpose(1, 2),
                        C[:, :, head // (h // g)].transpose(1, 2),
                        None if D is None else D[head].expand(p),
                        None if state is None else state[:, own],
                    )
                )
            )
        return y, last.unflatten(1, (h, p))
    y, state = torch.zeros_like(x), torch.zeros(x.shape[0], *A.shape, dtype=x.dtype) if initial_state is None else initial_state.clone()
    for b, d, t in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)).tolist():
        state[b, d] = torch.exp(delta[b, d, t] * A[d]) * state[b, d] + delta[b, d, t] * x[b, d, t] * B[b, :, t]
        y[b, d, t] = state[b, d].dot(C[b, :, t]) + (0 if D is None else D[d] * x[b, d, t])
    return y, state


@pytest.mark.parametrize("present", [5, 6, 7], ids=["plain", "skip", "skip+state"])
@pytest.mark.parametrize("name", OPS)
def test_reference_is_the_definition(name, present, monkeypatch):
    monkeypatch.setattr(ssd, "_CHUNK", 3)
    for found, expected in zip(OPS[name][1](*operands(name)[:present]), definition(name, *operands(name)[:present])):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    off = operands(name)[:present]
    off[3] = off[3] * (1 + 1e-6)
    assert (OPS[name][1](*off)[0] - definition(name, *operands(name)[:present])[0]).abs().max() > 1e-9


@pytest.mark.parametrize("name", OPS)
def test_state_passes_on(name):
    op = OPS[name][1]
    axis = 2 if name == "selective_scan" else 1
    whole = operands(name)
    cut = lambda start, stop: [t.narrow(axis, start, stop - start) if i in (0, 1, 3, 4) else t for i, t in enumerate(whole)]  # noqa: E731
    first, state = op(*cut(0, 4))
    second, last = op(*cut(4, 7)[:6], state)
    torch.testing.assert_close(torch.cat([first, second], axis), op(*whole)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(last, op(*whole)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("present", [5, 7])
@pytest.mark.parametrize("name", OPS)
def test_gradients(name, present, monkeypatch):
    monkeypatch.setattr(ssd, "_CHUNK", 2)
    assert torch.autograd.gradcheck(OPS[name][1], operands(name, requires_grad=True, length=5)[:present], fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype):
    op = OPS[name][1]
    torch.library.opcheck(op, operands(name, dtype, requires_grad=True))
    torch.library.opcheck(op, operands(name, dtype)[:5])


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2])
@pytest.mark.parametrize("name", OPS)
def test_dtypes(name, dtype, expected):
    given = operands(name, dtype, requires_grad=True)
    given[2] = given[2].detach().float()  # as in transformers, which computes the decay in float32
    y, state = OPS[name][1](*given)
    assert y.dtype == state.dtype == expected
    precise = definition(name, *(t.detach().double() for t in given))
    torch.testing.assert_close(y.double(), precise[0], rtol=2e-5, atol=2e-5)
    y.sum().backward()
    assert all(t.grad.dtype == dtype for i, t in enumerate(given) if i != 2)


def test_long_decays_do_not_cancel():
    x, dt, A, *rest = operands("ssd_scan", length=200)
    single = [t.float() for t in (x, dt, 40 * A, *rest)]
    torch.testing.assert_close(ssd.ssd_scan(*single)[0].double(), ssd.ssd_scan(*(t.double() for t in single))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_wrong_shapes_are_named(name):
    wrong = operands(name)
    wrong[2] = torch.cat([wrong[2], wrong[2]])
    with pytest.raises(InvalidInput, match=r"axis .* expected"):
        OPS[name][1](*wrong)
    with pytest.raises(InvalidInput, match=r"shape \(\), expected the"):
        OPS[name][1](*wrong[:4], torch.tensor(1.0))


def delta_operands(dtype=torch.float64, requires_grad=False, length=7, heads=(2, 4)) -> list[torch.Tensor]:
    sizes = dict(zip("blghkv", (2, length, *heads, 3, 5)))
    generator = torch.Generator().manual_seed(0)
    axes = ("blgk", "blgk", "blhv", "blh", "blh", "bhkv")
    found = [torch.randn([sizes[a] for a in axis], generator=generator, dtype=torch.float64) for axis in axes]
    found[1] = found[1] / found[1].norm(dim=-1, keepdim=True)
    found[3], found[4] = -found[3].abs(), found[4].sigmoid()
    return [t.to(dtype).requires_grad_(requires_grad) for t in found]


def delta_definition(query, key, value, decay, beta, state=None):
    """The recurrence of the docstring, one position and head at a time."""
    (b, length, h, v), k, per = value.shape, key.shape[3], value.shape[2] // key.shape[2]
    state, y = torch.zeros(b, h, k, v, dtype=value.dtype) if state is None else state.clone(), torch.empty_like(value)
    for i, t, j in torch.cartesian_prod(torch.arange(b), torch.arange(length), torch.arange(h)).tolist():
        held = decay[i, t, j].exp() * state[i, j]
        state[i, j] = held + torch.outer(key[i, t, j // per], beta[i, t, j] * (value[i, t, j] - held.T @ key[i, t, j // per]))
        y[i, t, j] = state[i, j].T @ query[i, t, j // per]
    return y, state


@pytest.mark.parametrize("heads", [(2, 4), (3, 3)])
@pytest.mark.parametrize("present", [5, 6], ids=["plain", "state"])
def test_delta_rule_is_the_definition(present, heads, monkeypatch):
    monkeypatch.setattr(delta_rule, "_CHUNK", 3)
    given = delta_operands(heads=heads)[:present]
    for found, expected in zip(delta_rule.gated_delta_rule(*given), delta_definition(*given)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    given[4] = given[4] * (1 + 1e-6)
    assert (delta_rule.gated_delta_rule(*given)[0] - delta_definition(*delta_operands(heads=heads)[:present])[0]).abs().max() > 1e-9


def test_delta_rule_as_an_op(monkeypatch):
    monkeypatch.setattr(delta_rule, "_CHUNK", 2)
    assert torch.autograd.gradcheck(delta_rule.gated_delta_rule, delta_operands(requires_grad=True, length=5), fast_mode=True)
    torch.library.opcheck(delta_rule.gated_delta_rule, delta_operands(torch.float32, requires_grad=True))
    y, _ = delta_rule.gated_delta_rule(*delta_operands(torch.bfloat16))
    assert y.dtype == torch.float32
    with pytest.raises(InvalidInput, match=r"axis .* expected"):
        delta_rule.gated_delta_rule(*delta_operands(length=7)[:3], *delta_operands(length=6)[3:5])


def test_macs_by_hand():
    assert delta_rule.macs((2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 6, 7), (2, 5, 6), (2, 5, 6)) == 4 * 2 * 5 * 6 * 4 * 7
    assert selective_scan.macs((1, 3, 5), (1, 3, 5), (3, 2), (1, 2, 5), (1, 2, 5)) == 3 * 5 * (4 * 2 + 2)
    assert ssd.macs((2, 5, 6, 4), (2, 5, 6), (6,), (2, 5, 3, 7), (2, 5, 3, 7)) == 2 * 5 * 6 * 4 * (3 * 7 + 2)


class Net(nn.Module):
    """Logits only, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def build(model_type: str) -> Net:
    options = MODELS[model_type][0]
    with seeded(0):
        try:
            config = transformers.AutoConfig.for_model(model_type, **(GENERAL | options))
        except hub_errors.StrictDataclassClassValidationError as error:
            pytest.skip(f"this transformers refuses its own defaults: {error}")
        return randomise(Net(transformers.AutoModelForCausalLM.from_config(config, experts_implementation="batched_mm")).double(), 0)


@contextmanager
def double_stays_double():
    """The models cast activations to float32 in places, and positions; a comparison in float64 keeps them."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def keep(tensor, *args, **kwargs):
        return tensor if tensor.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()) else to(tensor, *args, **kwargs)

    torch.Tensor.to, torch.Tensor.float = keep, lambda tensor, **kwargs: to(tensor, torch.float64)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, single


def ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(length))


def count(program, name: str) -> int:
    return sum(node.target == getattr(torch.ops.graphprune, name).default for node in program.graph.nodes)


def loss_and_gradients(net: Net, *inputs) -> dict[str, torch.Tensor]:
    net.zero_grad()
    logits = net(*inputs)
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", MODELS)
def test_model_and_gradients_unchanged(model_type):
    net = build(model_type)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for training, *inputs in ((False, ids(9)), (True, ids(9)), (False, ids(9), mask)):
        with double_stays_double():
            expected = loss_and_gradients(net.train(training), *inputs)
            with scans_captured_whole():
                found = loss_and_gradients(net, *inputs)
        assert any("A_log" in name for name in found) and found.keys() == expected.keys()
        for name in expected:
            scale = expected[name].abs().max().clamp(min=1)
            assert (found[name] - expected[name]).abs().max() <= 1e-10 * scale, name
        assert (found["logits"] - expected["logits"].roll(1, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", MODELS)
def test_one_node_per_scan(model_type):
    net, (_, op, scans) = build(model_type), MODELS[model_type]
    with scans_captured_whole():
        programs = [torch.export.export(net, (ids(length),)) for length in (9, 16)]
    for length, program in zip((9, 16), programs):
        assert count(program, op) == scans
        torch.testing.assert_close(program.module()(ids(length)), net(ids(length)), rtol=0, atol=1e-5)  # both cast to float32 in places
    assert len(programs[0].graph.nodes) == len(programs[1].graph.nodes)
    assert {name for name, _ in net.named_parameters()} <= set(programs[0].graph_signature.parameters)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_dynamic_length(model_type):
    net = build(model_type)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    with scans_captured_whole():
        program = torch.export.export(net, (ids(9),), dynamic_shapes=shapes)
        torch.testing.assert_close(program.module()(ids(70, 3)), net(ids(70, 3)), rtol=0, atol=1e-6)
    assert count(program, MODELS[model_type][1]) == 2


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "mamba2", "nemotron_h"])
def test_with_a_cache(model_type):
    net = build(model_type).model
    cache = "cache_params" if model_type in ("mamba", "mamba2") else "past_key_values"

    def continued():
        first = net(input_ids=ids(9), use_cache=True)
        second = net(input_ids=ids(1), use_cache=True, **{cache: first[cache]})  # the one-token step is not patched
        third = net(input_ids=ids(3), use_cache=True, **{cache: second[cache]})
        return torch.cat([first.logits, second.logits, third.logits], 1)

    with torch.no_grad(), double_stays_double():
        expected = continued()
        with scans_captured_whole():
            found = continued()
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_trains_when_compiled():
    net = build("mamba2").train()
    expected = loss_and_gradients(net, ids(9))
    with scans_captured_whole():
        found = loss_and_gradients(torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True), ids(9))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name if name == "logits" else f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)


def test_fused_kernels_are_not_called(monkeypatch):
    from transformers.models.mamba2 import modeling_mamba2

    def kernel(*args, **kwargs):
        raise AssertionError("a CUDA kernel ran")

    for name in ("mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"):
        monkeypatch.setattr(modeling_mamba2, name, kernel)
    net = build("mamba2").train()
    with pytest.raises(AssertionError, match="CUDA"):
        net(ids(9))
    with scans_captured_whole():
        net(ids(9))


def test_packed_sequences_are_refused():
    net = build("mamba2").model
    with scans_captured_whole(), pytest.raises(CaptureError, match="seq_idx"):
        net.backbone.layers[0].mixer(torch.randn(1, 4, 12).double(), seq_idx=torch.zeros(1, 4, dtype=torch.int32))


def test_everything_is_restored():
    from transformers.models.mamba import modeling_mamba as module

    before = dict(vars(module))
    inside, leave = threading.Event(), threading.Event()

    def other():
        with scans_captured_whole():
            inside.set()
            leave.wait(10)

    with pytest.raises(ZeroDivisionError), scans_captured_whole(), scans_captured_whole():
        assert module.mamba_selective_scan is not before["mamba_selective_scan"]
        1 / 0  # noqa: B018
    assert vars(module) == before
    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with scans_captured_whole():
        pass
    assert module.mamba_selective_scan is not before["mamba_selective_scan"]  # the other thread is still inside
    leave.set()
    thread.join()
    assert vars(module) == before
