"""The command line on real models, from file to file: every verb, every exit code that a network can cause."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import LlamaForCausalLM

import graphprune as gp
from graphprune.report import Report, tables
from tests.test_cli import call
from tests.test_report import onnx_file
from tests.test_results import llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned ONNX file with everything that can be written beside it."""
    folder = tmp_path_factory.mktemp("pruned")
    onnx_file(folder / "in.onnx", width=8)
    files = ("-o", folder / "out.onnx", "--plan-out", folder / "plan.json", "--report", folder / "report.json")
    shown = call("prune", folder / "in.onnx", *files, "--ratio", "0.5", "--round-to", "1")
    assert shown.exit_code == 0, shown.output
    (folder / "shown.txt").write_text(shown.stdout)
    return folder


def test_prune_writes_a_smaller_file_that_runs(folder):
    model = onnx.load(folder / "out.onnx")
    assert [list(it.dims) for it in model.graph.initializer if it.name == "a"] == [[3, 4]] and model.opset_import[0].version == 17
    (y,) = onnxruntime.InferenceSession(folder / "out.onnx").run(None, {"x": np.ones((1, 3), np.float32)})
    assert y.shape == (1, 2)
    shown = (folder / "shown.txt").read_text()
    assert "certificate  passed" in shown and "50.0 %" in shown


def test_report_and_plan_belong_together(folder):
    report, plan = Report.from_json((folder / "report.json").read_text()), gp.Plan.load(folder / "plan.json")
    assert report.plan_hash == plan.hash and report.certificate["plan"] == plan.hash and report.certificate["status"] == "passed"
    assert report.before.params == 40 and report.after.params == 20


def test_plan_then_apply_is_prune(folder):
    shown = call("plan", folder / "in.onnx", "-o", folder / "again.json", "--ratio", "0.5", "--round-to", "1", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["hash"] == gp.Plan.load(folder / "plan.json").hash
    shown = call("apply", folder / "again.json", folder / "in.onnx", "-o", folder / "again.onnx", "--json")
    assert shown.exit_code == 0 and Report.from_json(shown.stdout).after.params == 20
    assert "no difference" in call("diff", folder / "out.onnx", folder / "again.onnx").stdout


def test_verify_passes_what_is_right_and_fails_what_is_not(folder):
    shown = call("verify", folder / "in.onnx", folder / "out.onnx", "--plan", folder / "plan.json")
    assert shown.exit_code == 0 and "passed" in shown.stdout
    model = onnx.load(folder / "out.onnx")
    (weight,) = [it for it in model.graph.initializer if it.name == "a"]
    moved = onnx.numpy_helper.to_array(weight).copy()
    moved[0, 0] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(moved, "a"))
    onnx.save(model, folder / "wrong.onnx")
    shown = call("verify", folder / "in.onnx", folder / "wrong.onnx", "--plan", folder / "plan.json")
    assert shown.exit_code == 5 and "failed" in shown.stdout and "was not shown to be" in shown.stderr


def test_quiet_says_only_the_result(folder):
    loud = call("prune", folder / "in.onnx", "-o", folder / "q.onnx")
    quiet = call("prune", folder / "in.onnx", "-o", folder / "q.onnx", "--quiet", "--json")
    assert "quality is not measured" in loud.stderr
    assert quiet.stderr == "" and Report.from_json(quiet.stdout).plan_hash


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (("--ratio", "0.5", "--ignore", "*"), 3, "ignore"),
        (("--budget", "params=4"), 4, "params"),
        (("--budget", "colour=1"), 2, "colour"),
        (("--ratio", "0.5", "--importance", "taste"), 2, "taste"),
        (("--ratio", "0.5", "--repair", "bias"), 2, "calibration"),
        (("--ratio", "0.5", "--backend", "abacus"), 2, "abacus"),
        (("--ratio", "0.5", "--on-unknown", "shrug"), 2, "shrug"),
    ],
)
def test_exit_codes_of_real_runs(tmp_path, options, code, word):
    source = onnx_file(tmp_path / "in.onnx", width=8)
    shown = call("prune", source, "-o", tmp_path / "out.onnx", *options)
    assert shown.exit_code == code, shown.output
    assert word in shown.stderr and "Traceback" not in shown.output and not (tmp_path / "out.onnx").exists()
    assert len(shown.stderr.strip().splitlines()) == 1


def test_calibration_file_is_used_and_checked(tmp_path):
    source = onnx_file(tmp_path / "in.onnx", width=8)
    np.savez(tmp_path / "good.npz", x=np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32))
    np.savez(tmp_path / "bad.npz", image=np.ones((16, 3), np.float32))
    options = ("--ratio", "0.5", "--repair", "least_squares", "--round-to", "1")
    shown = call("prune", source, "-o", tmp_path / "out.onnx", "--calibration", tmp_path / "good.npz", *options)
    assert shown.exit_code == 0, shown.output
    shown = call("prune", source, "-o", tmp_path / "bad.onnx", "--calibration", tmp_path / "bad.npz", *options)
    assert shown.exit_code == 2 and "expected x, found image" in shown.stderr


def test_checkpoint_folder_in_and_out(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "in")
    shown = call("prune", tmp_path / "in", "-o", tmp_path / "out", "--ratio", "0.5", "--units", "neuron", "--round-to", "1", "-q")
    assert shown.exit_code == 0, shown.output
    small = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert small.config.intermediate_size == 24
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(gp.load(tmp_path / "out")(ids).logits, small(ids).logits)
    assert "24" in call("diff", tmp_path / "in", tmp_path / "out").stdout
    shown = call("verify", tmp_path / "in", tmp_path / "out", "--plan", tmp_path / "out" / "plan.json")
    assert shown.exit_code == 0, shown.output
    shown = call("bench", tmp_path / "in", tmp_path / "out", "--seconds", "0.1")
    assert shown.exit_code == 0 and "torch on cpu, 1 thread" in shown.stdout


def test_folder_of_pickles_is_refused(tmp_path):
    model = llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "in")
    torch.save(model.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    shown = call("inspect", tmp_path / "in")
    assert shown.exit_code == 2 and "would have to be unpickled" in shown.stderr


def test_code_from_a_folder_is_never_run(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config |= {"architectures": ["Evil"], "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "evil.py").write_text("raise SystemExit('was run')")
    shown = call("inspect", tmp_path / "in")
    assert shown.exit_code == 2 and "never run" in shown.stderr


def test_recipes_are_listed():
    shown = call("recipes", "--json")
    rows = {row["name"]: row for row in json.loads(shown.stdout)}
    assert shown.exit_code == 0 and set(rows) == set(gp.recipes())
    assert "<" not in shown.stdout, "an object that is not meant for people"
    assert rows["flap"]["amount"] == "pruning_ratio, budget" and rows["wanda"]["amount"] == "sparsity, pattern"
    assert "An et al. 2023" in call("recipes").stdout
    for width in (80, 120):
        lines = tables.plain(tables.methods(list(rows.values())), width).splitlines()
        assert max(map(len, lines)) <= width and {line.split(" ")[0] for line in lines} >= set(rows)


def test_a_checkpoint_is_calibrated_at_the_length_of_the_samples(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    np.savez(tmp_path / "data.npz", input_ids=np.random.default_rng(0).integers(0, 50, (6, 19)))
    arguments = ("--recipe", "wanda_sp", "--ratio", "0.25", "--calibration", tmp_path / "data.npz")
    shown = call("prune", tmp_path / "in", "-o", tmp_path / "out", *arguments)
    assert shown.exit_code == 0 and "passed" in shown.stdout
    assert gp.load(tmp_path / "out")(torch.zeros(1, 5, dtype=torch.long)).logits.shape[:2] == (1, 5)
    np.savez(tmp_path / "wrong.npz", tokens=np.zeros((6, 19), int))
    refused = call("prune", tmp_path / "in", "-o", tmp_path / "out", "--recipe", "wanda_sp", "--calibration", tmp_path / "wrong.npz")
    assert refused.exit_code == 2 and "expected input_ids, found tokens" in refused.stderr
