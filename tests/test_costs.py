"""Costs against torch's own counters, and under a cut against the pruned network, exactly."""

import random
from collections.abc import Mapping
from functools import cache

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graphprune.capture.onnx_file import capture_onnx
from graphprune.capture.torch_export import capture_torch
from graphprune.costs import BYTES_PER_MB, MACS, CostModel, alive, by_node, cost, footprint, macs
from graphprune.errors import InvalidInput
from graphprune.program import Program
from graphprune.surgery import Cut, apply_cut
from tests.zoo import TINY

COUNTED = ("mlp", "vgg", "resnet", "densenet", "mobilenet", "shufflenet", "unet", "shared")  # torch's counter misses fused attention


@cache
def program_of(name: str) -> Program:
    case = TINY[name]()
    return capture_torch(case.module, case.args)


def random_cut(program: Program, seed: int) -> dict[str, list[int]]:
    choice = random.Random(seed)
    removed = {}
    for group in program.analysis.groups:
        count = choice.randint(0, group.size - max(group.min_keep, group.kind != "layer"))
        removed[group.name] = choice.sample(range(group.size), count)
    return removed


@pytest.mark.parametrize("name", TINY)
def test_cost_is_that_of_the_parameters(name):
    case = TINY[name]()
    found = cost(capture_torch(case.module, case.args))
    parameters = {id(p): p for p in case.module.parameters()}.values()
    buffers = [b for b in case.module.buffers() if b.is_floating_point()]
    assert found.params == sum(p.numel() for p in parameters)
    assert found.bytes == sum(t.numel() * t.element_size() for t in (*parameters, *buffers))
    assert found.memory_mb == found.bytes / BYTES_PER_MB


@pytest.mark.parametrize("name", COUNTED)
def test_macs_are_half_of_torchs_flops(name):
    case = TINY[name]()
    with FlopCounterMode(display=False) as counter:
        case()
    assert cost(capture_torch(case.module, case.args)).macs * 2 == counter.get_total_flops() > 0


def test_attention_counts_scores_and_sum():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    program = capture_torch(Attention(), (torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 11)))
    assert cost(program).macs == 2 * 6 * 5 * 7 * (8 + 11)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("seed", range(3))
def test_cost_under_a_cut_is_that_of_the_pruned_network(name, seed):
    program = program_of(name)
    removed = random_cut(program, seed)
    try:
        cut = Cut(program.analysis, removed)
    except InvalidInput:  # fewer experts than the router chooses
        pytest.skip("this random cut leaves a top-k too few")
    kept = {g.atom: g.size - len(removed[g.name]) for g in program.analysis.groups}
    found = cost(program, cut)
    assert found == cost(apply_cut(program, cut)) == CostModel(program.analysis).cost(kept)
    assert found.params < cost(program).params
    assert footprint(program, cut).macs == found.macs


def test_the_share_of_a_group_is_the_difference_it_makes():
    program = program_of("mobilenet")
    model = CostModel(program.analysis)
    kept = {g.atom: max(1, g.size - 2) for g in program.analysis.groups if g.kind != "layer"}
    for group in program.analysis.groups:
        if group.kind != "layer":
            more = {**kept, group.atom: group.size}
            assert model.cost(more) - model.cost(kept) == model.part(group.atom, more) - model.part(group.atom, kept)


def test_rows_add_up_and_shared_weights_count_once():
    program = program_of("shared")
    rows = by_node(program)
    assert sum(row.cost.params for row in rows) == sum(p.numel() for p in TINY["shared"]().module.parameters())
    shared = [row.cost for row in rows if row.scope == "shared"]
    assert [row.params > 0 for row in shared] == [True, False] and shared[0].macs == shared[1].macs > 0


def test_what_a_branch_alone_needs_dies_with_it():
    program = program_of("resnet")
    layer = next(g for g in program.analysis.groups if g.kind == "layer")
    cut = Cut(program.analysis, {layer.name: [0]})
    gone = {node for node in program.nodes} - set(alive(program, cut.bypassed))
    assert gone == {layer.atom.join, *layer.atom.region}


def test_einsum_contracts_from_left_to_right():
    class Product(nn.Module):
        def forward(self, a, b, c):
            return torch.einsum("...ij,jk,kl->...il", a, b, c)

    program = capture_torch(Product(), (torch.randn(2, 3, 4), torch.randn(4, 5), torch.randn(5, 7)))
    assert cost(program).macs == 2 * 3 * 4 * 5 + 2 * 3 * 5 * 7


def _onnx(op: str, inputs: Mapping[str, tuple[tuple[int, ...], bool]], **attributes) -> Program:
    """A model of one node; True marks a weight."""
    tensors, graph_inputs = [], []
    for name, (shape, is_weight) in inputs.items():
        if is_weight:
            tensors.append(helper.make_tensor(name, TensorProto.FLOAT, shape, torch.randn(shape).flatten().tolist()))
        else:
            graph_inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    node = helper.make_node(op, list(inputs), ["y"], **attributes)
    graph = helper.make_graph([node], "g", graph_inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)
    return capture_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize(
    "op, inputs, attributes, expected",
    [
        ("Conv", {"x": ((2, 6, 9, 9), False), "w": ((8, 3, 3, 3), True)}, {"group": 2}, 2 * 8 * 7 * 7 * 27),
        ("ConvTranspose", {"x": ((2, 6, 5, 5), False), "w": ((6, 4, 2, 2), True)}, {"strides": [2, 2]}, 2 * 6 * 25 * 16),
        ("Gemm", {"x": ((5, 3), False), "w": ((5, 7), True)}, {"transA": 1}, 3 * 7 * 5),
        ("MatMul", {"x": ((2, 4, 5), False), "w": ((5, 7), True)}, {}, 2 * 4 * 5 * 7),
        ("Einsum", {"x": ((2, 4, 5), False), "w": ((5, 7), True)}, {"equation": "bij,jk->bik"}, 2 * 4 * 5 * 7),
        ("GRU", {"x": ((6, 2, 5), False), "w": ((1, 12, 5), True), "r": ((1, 12, 4), True)}, {"hidden_size": 4}, 12 * 12 * (5 + 4)),
    ],
)
def test_onnx_rows(op, inputs, attributes, expected):
    program = _onnx(op, inputs, **attributes)
    (node,) = [n for n in program.nodes if n.op_type == op]
    assert macs(node, lambda value: value.shape or ()) == expected == cost(program).macs


def test_the_same_network_costs_the_same_in_both_dialects(tmp_path):
    case = TINY["vgg"]()
    path = tmp_path / "m.onnx"
    torch.onnx.export(case.module, case.args, path, dynamo=True, verbose=False)
    assert onnx.load(path, load_external_data=False).graph.node
    ours, theirs = cost(capture_torch(case.module, case.args)), cost(capture_onnx(path))
    assert (ours.macs, ours.params) == (theirs.macs, theirs.params)


def test_scans_are_priced_by_their_own_formula():
    from graphprune.ops import selective_scan as module

    shapes = {"x": (2, 6, 5), "delta": (2, 6, 5), "A": (6, 3), "B": (2, 3, 5), "C": (2, 3, 5)}

    class Scan(nn.Module):
        def forward(self, *operands):
            return torch.ops.graphprune.selective_scan(*operands)[0]

    program = capture_torch(Scan(), tuple(torch.rand(shape) for shape in shapes.values()))
    assert cost(program).macs == module.macs(*shapes.values()) == 2 * 6 * 5 * (4 * 3 + 2)
    assert ("graphprune", "ssd_scan") in MACS
