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
from graphprune.errors import InvalidInput
from graphprune.planning import make_plan
from graphprune.report import Report, tables
from graphprune.widths import MULTIPLES, RULE, Costs, Sample, Widths, fitted, kept, relative_costs, smallest, widths_of_sample
from tests.test_cli import call

FLAT = (1.0,) * 7
ALL_FLAT = ((512, FLAT),)


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
        assert {smallest(costs) for _, costs in relative_costs(samples)} == {multiple}


def test_without_any_gain_single_units_are_kept_and_small_gains_are_not_worth_a_multiple():
    for penalty, expected in ((1.0, 1), (1.02, 1), (1.3, 8)):
        samples = [Sample(hidden, wanted, where_only(8, penalty)(widths_of_sample(hidden, wanted))) for _, _, hidden, wanted in LINEAR["cuda"]]
        assert {smallest(costs) for _, costs in relative_costs(samples)} == {expected}


def test_costs_are_those_of_the_width_that_a_multiple_leads_to():
    assert widths_of_sample(256, 179) == (179, 180, 184, 192) and kept(256, 179, 64) == 192 and kept(64, 45, 64) == 48
    assert [fitted(64, width) for width in (12, 64, 128, 256, 4096)] == [2, 16, 32, 64, 64] and fitted(8, 3) == fitted(1, 1) == 1
    times = {179: 4.0, 180: 2.0, 184: 2.0, 192: 1.0}
    ((size, costs),) = relative_costs([Sample(256, 179, times), Sample(256, 179, dict.fromkeys(times, 7.0))])
    assert size == 256 and costs == pytest.approx((2, 2**0.5, 2**0.5, 2**0.5, 1, 1, 1)), "samples of one size are averaged"
    same = dict.fromkeys(widths_of_sample(512, 359), 7.0)
    found = dict(relative_costs([Sample(512, 359, same), Sample(256, 179, times)]))
    assert found[256][0] == pytest.approx(4 ** (2 / 3)) and found[512][0] == pytest.approx(4 ** (1 / 3)), "those of another size count less"
    assert smallest((1.5, 1.2, 1.02, 1.0, 1.0, 1.1, 1.2)) == 4 and smallest((1.031, 1.029, 1.0, 1.0, 1.0, 1.0, 1.0)) == 2


def test_the_coarsest_of_several_types_is_taken():
    two, four = (2, 1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1, 1)
    found = Widths.measured([Costs(ALL_FLAT, ((512, four),)), Costs(((512, two),), ALL_FLAT)], "measured")
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
        return Costs(((512, (2, 2, 2, 2, 1, 1, 1)),) if dtype is torch.float16 else ALL_FLAT, ALL_FLAT)

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
        return Costs(((512, (2, 2, 2, 2, 1, 1, 1) if dtype is torch.float16 else FLAT),), ALL_FLAT)

    monkeypatch.setattr(backend, "available", lambda *_: True)
    monkeypatch.setattr(backend, "device_name", lambda device: "Some GPU")
    monkeypatch.setattr(backend.torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(backend, "probe", stands_in)
    found = widths_of(program, "onnxruntime", "cuda")
    assert asked == [("onnxruntime", torch.float32, "cuda"), ("onnxruntime", torch.float16, "cuda")]
    assert found.multiple(False, 512) == 16 and found.source == "measured on Some GPU, onnxruntime, float32 and float16"
    assert widths_of(program, "onnxruntime", "cuda") == found and len(asked) == 2, "once"


@pytest.mark.parametrize("damage", ["half", "short", "text", "negative"])
def test_a_broken_table_is_ignored_with_a_message(store, caplog, damage):
    measured("torch", torch.float32, "cpu", times=where_only(64))
    (file,) = table("torch", "cpu").folder.glob("*.json")
    entry = json.loads(file.read_text())
    entry["measurement"]["linear"] = {"short": [[512, [1.0]]], "text": "fast", "negative": [[512, [-1.0] * 7]]}.get(damage)
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
        assert probe(name, torch.float32, "cpu", clock, seconds=0).linear == ALL_FLAT
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
    assert [(line[2], line[3], line[-1]) for line in lines] == [(k, str(size), "16") for k in sizes for size in sizes[k]]
    for arguments, word in ((("--device", "tpu"), "cpu or cuda"), (("a.onnx",), "takes no models")):
        refused = call("bench", "--widths", *arguments)
        assert refused.exit_code == 2 and word in refused.output
    for given, word in ((("--widths", "--crossover", "64x64"), "one at a time"), (("a.onnx", "b.onnx", "--device", "cuda"), "goes with --widths")):
        refused = call("bench", *given)
        assert refused.exit_code == 2 and word in refused.output
    with pytest.raises(InvalidInput, match="found device 'cuda:7'"):
        bench.widths("cuda:7")
