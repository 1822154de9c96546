"""round_to="auto": what times say about widths, where that is kept, and that plans use it where it was measured, and only there."""

import json
import logging

import onnxruntime  # noqa: F401  its table is used below
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune import bench
from graphprune.allocation import choices, rounding
from graphprune.backends import widths as backend
from graphprune.backends.widths import CONVOLUTION, LINEAR, measured, probe, table, widths_of
from graphprune.decisions import decide
from graphprune.errors import InvalidInput, NothingToPrune
from graphprune.planning import make_plan
from graphprune.report import Report, tables
from graphprune.widths import (
    EIGHTHS,
    MULTIPLES,
    RULE,
    Costs,
    Sample,
    Widths,
    best_multiple,
    fitted,
    kept,
    relative_costs,
    relative_eighths,
    widths_of_sample,
    worth_it,
)  # fmt: skip
from tests.test_cli import call

EVEN = tuple(1 + part / 1000 for part in range(7))  # of a device to which only the number of units matters
ALL_EVEN = ((512, EVEN),)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty cache that plans look into."""
    monkeypatch.delenv(backend.SWITCH, raising=False)
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    return tmp_path


def linear(width: int = 512, dtype: torch.dtype = torch.float32) -> gp.Program:
    return gp.capture(nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4)).to(dtype), torch.randn(3, 16, dtype=dtype))


def both() -> gp.Program:
    net = nn.Sequential(nn.Conv2d(3, 256, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 4))
    return gp.capture(net.eval(), torch.randn(2, 3, 4, 4))


def sizes(plan: gp.Plan) -> list[int]:
    return [entry.size - len(entry.removed) for entry in plan.entries.values()]


def where_only(multiple: int, penalty: float = 1.5):
    """A clock of a device that is fast at multiples of one number, and takes time in proportion to the width besides."""

    def clock(calls):
        return {width: width * (1.0 if width % multiple == 0 else penalty) for width in calls}

    return clock


# ---- what times say


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("multiple", MULTIPLES[:-1])
def test_the_multiple_that_a_device_needs_is_found(multiple, device):
    for rows in (LINEAR[device], CONVOLUTION[device]):
        samples = [
            Sample(hidden, wanted, where_only(multiple)(widths_of_sample(hidden, wanted))) for _, _, hidden, wanted in rows if hidden >= 4 * multiple
        ]
        assert {best_multiple(costs) for _, costs in relative_costs(samples)} == {multiple}


def test_single_units_are_kept_unless_more_of_them_take_less_time():
    for penalty, expected in ((1.0, 1), (1.3, 8)):
        samples = [Sample(hidden, wanted, where_only(8, penalty)(widths_of_sample(hidden, wanted))) for _, _, hidden, wanted in LINEAR["cuda"]]
        assert {best_multiple(costs) for _, costs in relative_costs(samples)} == {expected}


def test_costs_are_those_of_the_width_that_a_multiple_leads_to():
    assert widths_of_sample(256, 179) == (179, 180, 184, 192, 128, 160, 224, 256) and kept(256, 179, 64) == 192 and kept(64, 45, 64) == 48
    assert [fitted(64, width) for width in (12, 64, 128, 256, 4096)] == [2, 16, 32, 64, 64] and fitted(8, 3) == fitted(1, 1) == 1
    times = {179: 4.0, 180: 2.0, 184: 2.0, 192: 1.0}
    ((size, costs),) = relative_costs([Sample(256, 179, times), Sample(256, 179, dict.fromkeys(times, 7.0))])
    assert size == 256 and costs == pytest.approx((2, 2**0.5, 2**0.5, 2**0.5, 1, 1, 1)), "samples of one size are averaged"
    same = dict.fromkeys(widths_of_sample(512, 359), 7.0)
    found = dict(relative_costs([Sample(512, 359, same), Sample(256, 179, times)]))
    assert found[256][0] == pytest.approx(4 ** (2 / 3)) and found[512][0] == pytest.approx(4 ** (1 / 3)), "those of another size count less"


def test_of_multiples_that_are_fast_enough_it_is_the_coarsest_that_costs_no_more():
    assert best_multiple((1.5, 1.2, 1.02, 1.01, 1.0, 1.1, 1.2)) == 16 and best_multiple((1.5, 1.2, 1.02, 1.03, 1.04, 1.1, 1.2)) == 4
    assert best_multiple((1.031, 1.029, 1.03, 1.03, 1.0, 1.03, 1.03)) == 16, "1.03 is within the tolerance and costs more than 1.029"


def test_the_coarsest_of_several_types_is_taken():
    two, four = (2, 1, 2, 2, 2, 2, 2), (2, 2, 1, 2, 2, 2, 2)
    found = Widths.measured([Costs(ALL_EVEN, ((512, four),)), Costs(((512, two),), ALL_EVEN)], "measured")
    assert (found.linear, found.convolution) == (((512, 2),), ((512, 4),))
    assert str(found) == "multiples of 2 (linear) and 4 (convolutions), measured"


def test_a_layer_follows_the_size_next_to_its_own():
    found = Widths(((512, 8), (2048, 64)), ((64, 4),), "measured")
    assert [found.multiple(False, width) for width in (64, 512, 1000, 1100, 9000)] == [8, 8, 8, 64, 64]
    assert found.multiple(True, 4096) == 4 and found.coarsest == 64
    assert str(found) == "multiples of 8 at 512, 64 at 2048 (linear) and 4 (convolutions), measured"
    finer = found.finer()
    assert [finer.multiple(False, width) for width in (512, 2048)] == [8, 32] and finer.finer().finer().coarsest == 8
    (narrow,), (wide,) = linear(512).groups, linear(2048).groups
    assert rounding(narrow, "auto", found) == 8 and rounding(wide, "auto", found) == 64


# ---- which widths pay at all


def measured_at(times: dict[int, float], size: int) -> Widths:
    """A device that runs convolutions of `size` in these times, those of other widths in that of the whole, in multiples of 16."""
    eighths = tuple(times.get(size * part // 8, times[size]) / times[size] for part in EIGHTHS)
    linear = ((512, (0.5, 0.6, 0.7, 0.8)),)
    return Widths.measured([Costs(((size, EVEN),), ((size, (9, 9, 9, 9, 1, 2, 2)),), linear, ((size, eighths),))], "x")


def two_convolutions(width: int) -> gp.Program:
    net = nn.Sequential(nn.Conv2d(8, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    return gp.capture(net.eval(), torch.randn(2, 8, 4, 4))


def left(program: gp.Program, widths: Widths, ratio: float) -> list[int]:
    return [kept for kept in sizes(make_plan(program, pruning_ratio={"*": ratio}, units=["channel"], widths=widths)) if kept >= 16]


@pytest.mark.parametrize(
    "times, paying",
    [
        ((0.5, 0.6, 0.7, 0.8), (4, 5, 6, 7)),
        ((0.5, 1.2, 1.3, 1.1), (4,)),  # only half of it is faster
        ((0.9, 0.6, 0.7, 0.8), (5, 6, 7)),  # nothing narrower than 5 / 8 is
        ((1.0, 1.0, 1.0, 1.0), ()),
        ((0.99, 0.99, 0.99, 0.98), ()),  # not clearly
        ((0.92, 0.94, 0.96, 0.98), (4, 6)),  # in steps that are clear
        ((0.70, 0.71, 0.90, 0.69), (7,)),
    ],
)
def test_only_the_lower_envelope_pays(times, paying):
    assert worth_it(times) == paying


def test_where_48_channels_are_slower_than_64_all_64_stay_until_32_are_asked_for():
    found = measured_at({64: 1.0, 48: 2.0, 32: 0.6}, 64)
    assert [found.pays(True, 64, width) for width in (48, 32, 16)] == [False, True, True]
    program = two_convolutions(64)
    (group,) = (group for group in program.groups if group.size == 64)
    assert left(program, found, 0.5) == [32] and choices(group, "auto", found, 1, 0.3) == []
    assert [64 - n for n in choices(group, "auto", found, 1, 0.9)] == [32, 16]
    assert group.name not in make_plan(program, pruning_ratio=0.3, widths=found).entries
    with pytest.raises(NothingToPrune):
        make_plan(program, pruning_ratio={group.name: 0.3, "*": 0}, widths=found)
    assert sizes(make_plan(program, pruning_ratio=0.3, round_to=16, widths=found))[0] == 48, "what was asked for is kept to"
    assert str(found) == "multiples of 1 (linear) and 16 (convolutions), not 56, 48, 40 of 64 (convolutions), x"


def test_where_96_channels_are_faster_than_128_they_are_cut():
    found = measured_at({128: 1.0, 112: 1.2, 96: 0.8, 80: 1.1, 64: 0.5}, 128)
    program = two_convolutions(128)
    assert [left(program, found, ratio) for ratio in (0.3, 0.4, 0.5)] == [[96], [96], [64]], "and not to 80, which is slower"
    assert left(program, measured_at({128: 1.0, 96: 1.2, 80: 1.1, 64: 0.5}, 128), 0.5) == [64]


def test_other_layers_follow_the_share_of_the_size_next_to_their_own_and_linear_ones_their_own_table():
    found = measured_at({64: 1.0, 48: 2.0, 32: 0.6}, 64)
    assert not found.pays(True, 64, 60) and found.pays(False, 512, 500), "less than an eighth off counts as that"
    assert [found.pays(True, 96, width) for width in (72, 49, 48, 24)] == [False, False, True, True]
    assert all(found.pays(False, 512, width) for width in (448, 360, 100)), "linear layers"
    assert RULE.pays(True, 64, 48), "nothing was measured"
    narrow = two_convolutions(48).groups[0]
    assert choices(narrow, "auto", found, 1, 0.5), "layers narrower than 64 are not judged by it"


def test_units_of_several_positions_are_judged_by_the_width_that_they_leave():
    """Heads: what counts is what the projections keep."""
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(128, 128) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (8, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    (group,) = (g for g in gp.capture(Attention().eval(), torch.randn(1, 5, 128)).groups if g.kind == "head")
    assert choices(group, "auto", Widths(8, 8, "x"), 1, 0.5) == [1, 2, 3, 4]
    found = Widths(8, 8, "x", linear_paying=((128, (4, 6)),))
    assert choices(group, "auto", found, 1, 0.5) == [2, 4], "6 and 4 of 8 heads"


def test_what_pays_in_one_type_alone_does_not_and_samples_of_a_size_are_averaged():
    half, full = (0.5, 0.6, 0.7, 0.8), (0.5, 1.1, 0.7, 0.8)
    found = Widths.measured([Costs(ALL_EVEN, ALL_EVEN, ((512, half),), ()), Costs(ALL_EVEN, ALL_EVEN, ((512, full),), ())], "x")
    assert found.linear_paying == ((512, (4, 6, 7)),) and found.convolution_paying == () and found.pays(True, 512, 320)
    times = {16: 2.0, 14: 1.0, 12: 1.0, 10: 1.0, 8: 1.0}
    samples = [Sample(16, 11, times), Sample(16, 11, {width: 2.0 for width in times}), Sample(32, 22, dict.fromkeys((32, 28, 24, 20, 16), 3.0))]
    assert relative_eighths(samples) == ((16, pytest.approx((0.5**0.5,) * 4)), (32, (1.0,) * 4))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_with_a_slow_width_is_found_out_by_the_probe(device, monkeypatch):
    """Everything else takes time in proportion to its width."""
    monkeypatch.setattr(backend, "torch_call", lambda *_, **__: lambda: None)
    found = probe("torch", torch.float32, device, lambda calls: {w: 400.0 if w == 48 else float(w) for w in calls}, seconds=100)
    here = Widths.measured([found], "x")
    assert {size for size, _ in here.convolution_paying} == {hidden for _, _, hidden, _ in CONVOLUTION[device]}
    assert dict(here.convolution_paying)[64] == (4, 5, 7) and dict(here.convolution_paying)[128] == dict(here.linear_paying)[512] == EIGHTHS


def test_the_table_keeps_what_pays(store):
    kept_there = measured("torch", torch.float32, "cpu", times=lambda calls: {w: 999.0 if w in (384, 360, 359) else float(w) for w in calls})
    assert widths_of(linear()).linear_paying == Widths.measured([kept_there], "").linear_paying
    assert dict(widths_of(linear()).linear_paying)[512] == (4, 5, 7)
    assert sizes(gp.plan(linear(), pruning_ratio=0.3)) == [400], "359 to 384 of 512 are slow: the next multiple beyond"


# ---- what plans do with it


@pytest.mark.parametrize("multiple, left", [(1, 359), (4, 360), (8, 360), (64, 384)])
def test_a_plan_keeps_the_multiples_that_it_is_given(multiple, left):
    plan = make_plan(linear(), pruning_ratio=0.3, widths=Widths(multiple, 8, "measured on a device"))
    assert sizes(plan) == [left] and plan.settings["rounding"].endswith("measured on a device")


def test_convolutions_and_linear_layers_have_their_own():
    assert sizes(make_plan(both(), pruning_ratio=0.3, widths=Widths(2, 32, "x"))) == [192, 360]
    assert sizes(make_plan(both(), pruning_ratio=0.3)) == [184, 360]


def test_a_multiple_never_keeps_a_cut_from_happening():
    (group,) = linear(256).groups
    coarse = Widths(64, 64, "x")
    assert rounding(group, "auto", coarse) == 64 and choices(group, "auto", coarse, 1, 0.3) == [64]
    assert choices(group, "auto", coarse, 1, 0.1) == [16], "of 25 units that may go"
    assert choices(group, "auto", coarse, 1, 0.02) == choices(group, "auto", RULE, 1, 0.02) == []
    assert choices(group, 64, coarse, 1, 0.1) == [], "what was asked for is kept to"
    (narrow,) = linear(63).groups
    assert rounding(narrow, "auto", coarse) == 1


def test_narrow_convolutions_keep_what_onnx_runtime_needs():
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
    program = gp.capture(net, torch.randn(2, 3, 4, 4))
    assert sizes(gp.plan(program, pruning_ratio=0.45)) == [18, 7]
    assert sizes(gp.plan(program, pruning_ratio=0.45, backend="onnxruntime")) == [20, 8]
    assert [rounding(group, "auto", Widths(8, 64, "x", narrow=8)) for group in program.groups] == [8, 2]


def test_only_auto_asks_what_was_measured():
    asked = []

    def widths(program):
        asked.append(program)
        return Widths(64, 64, "x")

    def decided(**given):
        return decide(linear, lambda *_, **__: None, widths=widths, pruning_ratio=0.3, **given).plan

    assert sizes(decided(round_to=2)) == [360] and not asked
    assert sizes(decided()) == [384] and len(asked) == 1


def test_the_report_says_what_was_rounded_to_and_a_plan_gives_the_same_cut_anywhere(store, tmp_path):
    program = linear()
    ruled = gp.compile(program, pruning_ratio=0.3)
    assert ruled.report.rounding == "multiples of 8, by rule (graphprune bench --widths measures this device)"
    measured("torch", torch.float32, "cpu", times=where_only(64))
    result = gp.compile(program, pruning_ratio=0.3)
    assert sizes(result.plan) == [384] and sizes(ruled.plan) == [360]
    assert result.report.rounding.startswith("multiples of") and "measured on" in result.report.rounding
    assert "torch, float32" in " ".join(tables.plain(result.report).split()) and result.report.rounding in result.report.to_json()
    assert Report.from_json(result.report.to_json()).rounding == result.report.rounding
    result.report.save(tmp_path / "page.html")
    assert result.report.rounding in (tmp_path / "page.html").read_text()
    ruled.plan.save(tmp_path / "plan.json")
    again = gp.apply(program, gp.Plan.load(tmp_path / "plan.json"))
    assert again.plan.hash == ruled.plan.hash and again.report.rounding == ruled.report.rounding
    assert gp.compile(program, pruning_ratio=0.3, round_to=4).report.rounding == "multiples of 4, as asked"


# ---- the table


def test_a_plan_on_a_cpu_reads_the_table_and_never_measures(store, monkeypatch):
    assert widths_of(linear()).source == "by rule (graphprune bench --widths measures this device)" and not list(store.iterdir())
    measured("torch", torch.float32, "cpu", times=where_only(32))
    found = widths_of(linear())
    assert {found.multiple(kind, width) for kind in (False, True) for width in (128, 512)} == {32} and found.source.startswith("measured on ") and found.source.endswith("torch, float32")
    assert sizes(gp.plan(linear(), pruning_ratio=0.3)) == [384]
    assert widths_of(linear(), "onnxruntime").linear == 8, "another backend has a table of its own"
    measured("onnxruntime", torch.float32, "cpu", times=where_only(4))
    assert widths_of(linear(), "onnxruntime").multiple(False, 512) == 4
    assert "nothing is measured for torch on cpu in bfloat16" in widths_of(linear(dtype=torch.bfloat16)).source
    monkeypatch.setenv(backend.SWITCH, "rule")
    assert widths_of(linear()).linear == 8 and "GRAPHPRUNE_WIDTHS=rule" in widths_of(linear()).source


def test_a_gpu_is_measured_once_and_says_so(store, monkeypatch, caplog):
    """With the processor in the place of a GPU: what decides is the device of the weights."""
    asked = []

    def stands_in(name, dtype, device, times=None, seconds=None):
        asked.append(dtype)
        return Costs(((512, (2, 2, 2, 2, 1, 2, 2)),) if dtype is torch.float16 else ALL_EVEN, ALL_EVEN)

    monkeypatch.setattr(backend, "probe", stands_in)
    monkeypatch.setattr(backend, "device_name", lambda device: "Some GPU")
    found = [backend._costs("torch", dtype, "cuda", measure, None) for measure in (False, True, True) for dtype in (torch.float32, torch.float16)]
    assert found[:2] == [None, None] and asked == [torch.float32, torch.float16]
    assert Widths.measured(found[2:4], "").linear == ((512, 16),)
    assert [tuple(costs) for _, costs in found[5].linear] == [costs for _, costs in found[3].linear]
    assert caplog.text.count("measuring once which widths suit Some GPU") == 2

    def busy(*_):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(backend, "measured", lambda *_, **__: busy())
    assert backend._costs("torch", torch.bfloat16, "cuda", True, None) is None and "the rule is kept: out of memory" in caplog.text


def test_a_plan_for_a_runtime_on_a_gpu_reads_the_table_of_that(store, monkeypatch):
    program = linear()
    assert "onnxruntime does not run on cuda here" in widths_of(program, "onnxruntime", "cuda").source, "no CUDA in this build"
    asked = []

    def stands_in(name, dtype, device, times=None, seconds=None):
        asked.append((name, dtype, device))
        return Costs(((512, (2, 2, 2, 2, 1, 2, 2) if dtype is torch.float16 else EVEN),), ALL_EVEN)

    monkeypatch.setattr(backend, "available", lambda *_: True)
    monkeypatch.setattr(backend, "device_name", lambda device: "Some GPU")
    monkeypatch.setattr(backend.torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(backend, "probe", stands_in)
    found = widths_of(program, "onnxruntime", "cuda")
    assert asked == [("onnxruntime", torch.float32, "cuda"), ("onnxruntime", torch.float16, "cuda")]
    assert found.multiple(False, 512) == 16 and found.source == "measured on Some GPU, onnxruntime, float32 and float16"
    assert widths_of(program, "onnxruntime", "cuda") == found and len(asked) == 2, "once"


@pytest.mark.parametrize("damage", ["half", "short", "text", "negative", "eighths"])
def test_a_broken_table_is_ignored_with_a_message(store, caplog, damage):
    measured("torch", torch.float32, "cpu", times=where_only(64))
    (file,) = table("torch", "cpu").folder.glob("*.json")
    entry = json.loads(file.read_text())
    entry["measurement"]["linear"] = {"short": [[512, [1.0]]], "text": "fast", "negative": [[512, [-1.0] * 7]]}.get(damage, ALL_EVEN)
    entry["measurement"]["linear_eighths"] = [[512, [1.0] * 7]] if damage == "eighths" else []
    file.write_text(file.read_text()[:30] if damage == "half" else json.dumps(entry))
    with caplog.at_level(logging.WARNING, "graphprune"):
        assert sizes(gp.plan(linear(), pruning_ratio=0.3)) == [360]
    assert "is unreadable" in caplog.text and file.name in caplog.text
    measured("torch", torch.float32, "cpu", times=where_only(64))
    assert sizes(gp.plan(linear(), pruning_ratio=0.3)) == [384], "and measured again where one measures"


def test_the_probe_runs_what_it_names():
    """Both backends make the widths asked for; a time limit ends it after whole networks."""
    seen = []

    def clock(calls):
        seen.append({width: call() for width, call in calls.items()})
        return dict.fromkeys(calls, 1.0)

    for name in ("torch", "onnxruntime"):
        seen.clear()
        assert probe(name, torch.float32, "cpu", clock, seconds=0).linear == ((512, (1.0,) * 7),)
        (outer, rows, hidden, wanted), (channels, side, *_) = LINEAR["cpu"][0], CONVOLUTION["cpu"][0]
        assert len(seen) == 2 and set(seen[0]) == set(widths_of_sample(hidden, wanted))
        outputs = [(it if name == "torch" else it[0]).shape for found in seen for it in found.values()]
        assert set(outputs) == {(rows, outer), (1, channels, side, side)}


def test_the_command_prints_the_table_and_keeps_it(store, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_times", where_only(16))
    shown = call("bench", "--widths", "--json")
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["rows"]
    sizes = {"linear": (256, 512, 1024), "conv": (64, 128, 256)}
    expected = [(b, k, size) for b in ("torch", "onnxruntime") for k in ("linear", "conv") for size in sizes[k]]
    assert [(row["backend"], row["layers"], row["size"]) for row in rows] == expected
    assert all(row["multiple"] == 16 for row in rows) and widths_of(linear()).multiple(False, 512) == 16
    lines = [line.split() for line in tables.plain(bench.widths("cpu")).splitlines() if "onnxruntime float32" in line]
    assert [(line[2], line[3], line[-1]) for line in lines[:6]] == [(k, str(size), "16") for k in sizes for size in sizes[k]]
    assert lines[6:] == [["onnxruntime", "float32,", "conv", "64:", "56,", "40"]], "no multiples of 16"
    for arguments, word in ((("--device", "tpu"), "cpu or cuda"), (("a.onnx",), "takes no models")):
        refused = call("bench", "--widths", *arguments)
        assert refused.exit_code == 2 and word in refused.output
    for given, word in ((("--widths", "--crossover", "64x64"), "one at a time"), (("a.onnx", "b.onnx", "--device", "cuda"), "goes with --widths")):
        refused = call("bench", *given)
        assert refused.exit_code == 2 and word in refused.output
    with pytest.raises(InvalidInput, match="found device 'cuda:7'"):
        bench.widths("cuda:7")
