"""The command line as a user meets it: help, exit codes, one line per mistake, data on stdout, nothing half-written."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar
from typer.testing import CliRunner

from graphprune import errors, options, terminal
from graphprune.cli import app
from graphprune.program import Kind, Value
from graphprune.samples import read_samples
from tests.test_report import onnx_file
from tests.test_results import llama

VERBS = ("prune", "inspect", "explain", "plan", "apply", "verify", "bench", "diff", "recipes", "demo")
ROOT = Path(__file__).parent.parent


def call(*arguments, **environment):
    """Run the command line in this process."""
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb", **environment}).invoke(app, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path):
    return onnx_file(tmp_path / "in.onnx", width=8)


def with_unknown_op(path):
    """x @ a, relu, @ b, an op that nothing knows, relu, @ c: of the op not even the shape of what it makes is known."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 8), "b": (8, 6), "c": (6, 4)}
    weights = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], "first"),
        helper.make_node("Relu", ["p"], ["q"], "relu"),
        helper.make_node("MatMul", ["q", "b"], ["s"], "second"),
        helper.make_node("Mystery", ["s"], ["m"], "odd", domain="com.acme"),
        helper.make_node("Relu", ["m"], ["k"], "after"),
        helper.make_node("MatMul", ["k", "c"], ["y"], "last"),
    ]
    x, y = (helper.make_tensor_value_info(name, 1, [2, size]) for name, size in (("x", 3), ("y", 4)))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.acme", 1)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=opsets, ir_version=8), path)
    return path


def of_two_minds(forward):
    """`forward`, but what it returns depends on the sign of a sum: no graph can hold that."""

    @functools.wraps(forward)
    def branching(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.logits.sum() > 0:
            output.logits = 2 * output.logits
        return output

    return branching


def test_an_unknown_op_is_left_alone_and_named(tmp_path):
    source = with_unknown_op(tmp_path / "in.onnx")
    shown = call("prune", source, "-o", tmp_path / "out.onnx", "--ratio", "0.5", "--round-to", "1")
    assert shown.exit_code == 0, shown.output
    assert {it.name: list(it.dims) for it in onnx.load(tmp_path / "out.onnx").graph.initializer} == {"a": [3, 4], "b": [4, 6], "c": [6, 4]}
    assert "certificate  not tested" in shown.stdout and "com.acme::Mystery" in shown.stdout
    rows = json.loads(call("explain", source, "b", "--json").stdout)
    assert [row["prunable"] for row in rows] == [True, False] and "odd" in json.dumps(rows[1])


def test_help_names_every_verb():
    shown = call("--help")
    assert shown.exit_code == 0
    for verb in VERBS:
        assert f" {verb} " in shown.stdout, verb


def test_version():
    assert call("--version").stdout == f"graphprune {version('graphprune')}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    shown = call(verb, "--help")
    assert shown.exit_code == 0 and f"Example: graphprune {verb}" in " ".join(shown.stdout.split())


def test_help_answers_without_loading_torch():
    lines = ("import sys", "from graphprune.cli import app", "try: app(['prune', '--help'])", "except SystemExit: pass")
    script = "\n".join([*lines, "assert 'torch' not in sys.modules"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "IN", "-o", "OUT", "--ratio", "1"), "less than 1"),
        (("prune", "IN", "-o", "OUT", "--ratio", "-0.1"), "at least 0"),
        (("prune", "IN", "-o", "OUT", "--ratio", "half"), "takes a number"),
        (("prune", "IN", "-o", "OUT", "--budget", "macs"), "name=value"),
        (("prune", "IN", "-o", "OUT", "--budget", "macs=lots"), "takes a number"),
        (("prune", "IN", "-o", "OUT", "--round-to", "0"), "positive number"),
        (("prune", "IN", "-o", "IN"), "it is the input"),
        (("prune", "IN", "-o", "no/such/folder/out.onnx"), "does not exist"),
        (("prune", "IN", "-o", "OUT", "--report", "no/such/folder/r.json"), "does not exist"),
        (("prune", "missing.onnx", "-o", "OUT"), "missing.onnx does not exist"),
        (("prune", "FOLDER", "-o", "OUT"), "holds no config.json"),
        (("inspect", "README"), "neither an .onnx file nor a folder"),
        (("inspect", "TRUNCATED"), "truncated.onnx"),
        (("explain", "IN", "nothing.of.the.sort"), "nothing.of.the.sort"),
        (("prune", "IN", "-o", "OUT", "--calibration", "missing.npz"), "missing.npz does not exist"),
        (("prune", "IN", "-o", "OUT", "--recipe", "no-such-recipe"), "no-such-recipe"),
        (("prune", "IN", "-o", "OUT", "--ratio", "0.3", "--units", "chanel"), "chanel"),
        (("apply", "README", "IN", "-o", "OUT"), "README.md"),
        (("bench", "IN", "missing.onnx"), "missing.onnx does not exist"),
        (("diff", "IN", "README"), "not a readable ONNX file"),
        (("prune", "IN", "-o", "OUT", "--ratio", "1.2"), "less than 1, found 1.2"),
        (("prune", "IN", "-o", "OUT", "--ratio", "0.3", "--ignore", "no.such.layer"), "matches 'no.such.layer'"),
        (("prune", "IN", "-o", "/proc/out.onnx"), "cannot write /proc/out.onnx"),
        (("prune", "IN", "-o", "OUT", "--calibration", "KEYS"), "expected x, found image"),
        (("prune", "IN", "-o", "OUT", "--device", "tpu"), "'tpu'"),
        (("prune", "TRUNCATED", "-o", "OUT"), "truncated.onnx"),
        (("prune", "EMPTY", "-o", "OUT"), "holds no graph"),
        (("prune", "LONELY", "-o", "OUT"), "lonely.bin, which does not exist"),
        (("prune", "SHORT", "-o", "OUT"), "the file is truncated"),
        (("prune", "UNKNOWN", "-o", "OUT", "--on-unknown", "raise"), "no dim rule for com.acme::Mystery (node 'odd')"),
        (("prune", "DATA", "-o", "OUT_FOLDER", "--ratio", "0.5"), "(if output.logits.sum() > 0:): its control flow is data-dependent"),
        (("inspect", "DATA"), "torch.export rejects LlamaForCausalLM at test_cli.py:"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, model, arguments, message, monkeypatch):
    (tmp_path / "truncated.onnx").write_bytes(model.read_bytes()[:120])
    (tmp_path / "folder").mkdir()
    names = {"IN": model, "OUT": tmp_path / "out.onnx", "FOLDER": tmp_path / "folder", "README": ROOT / "README.md"}
    for name in ("truncated", "empty", "lonely", "short", "unknown"):
        names[name.upper()] = tmp_path / f"{name}.onnx"
    names["EMPTY"].write_bytes(b"")
    for name in ("lonely", "short"):
        onnx.save(onnx.load(model), names[name.upper()], save_as_external_data=True, location=f"{name}.bin", size_threshold=0)
    (tmp_path / "lonely.bin").unlink()
    (tmp_path / "short.bin").write_bytes((tmp_path / "short.bin").read_bytes()[:10])
    with_unknown_op(names["UNKNOWN"])
    names["KEYS"] = tmp_path / "keys.npz"
    np.savez(names["KEYS"], image=np.ones((4, 3), np.float32))
    if "DATA" in arguments:
        names |= {"DATA": tmp_path / "data", "OUT_FOLDER": tmp_path / "out"}
        llama().save_pretrained(names["DATA"])
        disable_progress_bar()  # a process of its own does so before it imports transformers
        monkeypatch.setattr(LlamaForCausalLM, "forward", of_two_minds(LlamaForCausalLM.forward))
    before = sorted(tmp_path.rglob("*"))
    shown = call(*(names.get(a, a) for a in arguments))
    assert shown.exit_code == 2, shown.output
    assert message in shown.stderr and "Traceback" not in shown.output
    assert len(shown.stderr.strip().splitlines()) == 1 and shown.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_use_is_exit_code_2(model):
    assert call("prune", model).exit_code == 2  # no --out
    assert call("prun").exit_code == 2
    assert call("prune", model, "-o", "x.onnx", "--ration", "1").exit_code == 2


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (errors.InvalidInput("a"), 2, "error: a"),
        (errors.CaptureError("b"), 2, "error: b"),
        (errors.UnsupportedOp("c"), 2, "error: c"),
        (errors.MissingExtra("d"), 2, "error: d"),
        (errors.NothingToPrune("e"), 3, "error: e"),
        (errors.BudgetNotMet("f [not markup]"), 4, "error: f [not markup]"),
        (errors.VerificationFailed("g"), 5, "error: g"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Permission denied: /x"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ZeroDivisionError("h"), 1, "internal error, ZeroDivisionError: h (set GRAPHPRUNE_DEBUG=1"),
    ],
)
def test_every_error_has_its_exit_code(raised, code, line, capsys, monkeypatch):
    monkeypatch.delenv(terminal.DEBUG, raising=False)

    def fail():
        raise raised

    assert terminal._guarded(fail) == code
    shown = capsys.readouterr()
    assert line in shown.err and len(shown.err.strip().splitlines()) == 1 and shown.out == ""


def test_debug_shows_where(monkeypatch):
    monkeypatch.setenv(terminal.DEBUG, "1")
    with pytest.raises(ZeroDivisionError):
        terminal._guarded(lambda: 1 / 0)


def test_option_texts_become_arguments():
    planning = options.Planning(
        ratio=["0.3", "layer4*=0.5"], budget=["macs=50%", "latency_ms=5"], units="channel, head", round_to="8", seed=3
    )
    assert planning.arguments() == {
        "pruning_ratio": {"*": 0.3, "layer4*": 0.5},
        "budget": {"macs": "50%", "latency_ms": 5.0},
        "units": ("channel", "head"),
        "round_to": 8,
        "seed": 3,
    }
    assert options.Planning(ratio=["0.3"]).arguments() == {"pruning_ratio": 0.3}
    assert options.Planning().arguments() == {}


INPUTS = (
    Value("x", Kind.INPUT, (2, 3), torch.float32),
    Value("ids", Kind.INPUT, (2, 5), torch.int64, frozenset({1})),
)


def test_calibration_file_becomes_calls(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((5, 3)), ids=np.ones((5, 7), np.int32))
    calls = read_samples(tmp_path / "d.npz", INPUTS)
    assert [set(c) for c in calls] == [{"x", "ids"}] * 2  # two at a time, as the model wants; the fifth is left out
    assert calls[0]["x"].dtype == torch.float32 and calls[0]["ids"].dtype == torch.int64 and calls[0]["ids"].shape == (2, 7)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((4, 3))}, "expected x, ids, found x"),
        ({"x": np.ones((4, 3)), "ids": np.ones((3, 5), int)}, "same number of samples"),
        ({"x": np.ones((4, 4)), "ids": np.ones((4, 5), int)}, r"shape \(samples, 3\), found \(4, 4\)"),
        ({"x": np.ones((4, 3)), "ids": np.ones((4, 5))}, "ids is torch.int64, found torch.float64"),
        ({"x": np.ones((1, 3)), "ids": np.ones((1, 5), int)}, "holds 1 samples"),
        ({"x": np.array([object()]), "ids": np.ones((1, 5), int)}, "not a readable .npz"),
    ],
)
def test_calibration_file_that_does_not_fit_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(errors.InvalidInput, match=message):
        read_samples(tmp_path / "d.npz", INPUTS)


def test_diff_as_text_and_as_json(tmp_path, model):
    other = onnx_file(tmp_path / "other.onnx", width=5)
    text, data = call("diff", model, other), call("diff", model, other, "--json")
    assert text.exit_code == 0 and "3x8" in text.stdout and "3x5" in text.stdout
    assert [row["name"] for row in json.loads(data.stdout)["shapes"]] == ["a", "b"]


def test_explain_says_yes_and_no(model):
    shown = call("explain", model, "a")
    assert shown.exit_code == 0 and "8 units of group" in shown.stdout and "model input" in shown.stdout
    rows = json.loads(call("explain", model, "a", "--json").stdout)
    assert [(row["axis"], row["prunable"]) for row in rows] == [(0, False), (1, True)]


def test_inspect_lists_groups_and_reasons(model):
    shown = call("inspect", model)
    assert shown.exit_code == 0 and "prunable: 1 group" in shown.stdout and "it is an axis of a model output: 1" in shown.stdout
    found = json.loads(call("inspect", model, "--json").stdout)
    assert [group["size"] for group in found["groups"]] == [8] and len(found["not_prunable"]) == 2


def test_piped_output_is_plain_and_no_color_is_honoured(tmp_path, model):
    piped = subprocess.run([sys.executable, "-m", "graphprune", "diff", model, model], capture_output=True, text=True)
    assert piped.returncode == 0 and "\x1b" not in piped.stdout + piped.stderr and "no difference" in piped.stdout
    other = onnx_file(tmp_path / "other.onnx", width=5)
    coloured = call("diff", model, other, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")
    assert "\x1b[3" not in coloured.stdout


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_leaves_nothing_behind(tmp_path, sent, code):
    script = (
        "import time, graphprune.cli as cli\n"
        "from graphprune.files import atomic_path\n"
        "@cli.verb('wait', 'graphprune wait')\n"
        "def wait() -> None:\n"
        "    with atomic_path('out.onnx') as path:\n"
        "        path.write_bytes(b'half')\n"
        "        print('written', flush=True)\n"
        "        time.sleep(60)\n"
        "import sys; sys.argv = ['graphprune', 'wait']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    assert os.listdir(tmp_path) != []
    time.sleep(0.1)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=120)  # seconds; a bound for a process that hangs
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr and os.listdir(tmp_path) == []


def test_reader_that_leaves_early_is_no_error(model):
    command = f"{sys.executable} -m graphprune diff {model} {model} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "error" not in done.stderr
