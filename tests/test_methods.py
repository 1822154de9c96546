"""The benchmark of methods: what is read out of its lines, and the time it predicts."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from benchmarks import methods
from tests.zoo import Decoder, SwiGLU


def row(recipe, what, perplexity, times, seed=0, **other):
    return {"model": "decoder", "recipe": recipe, "what": what, "seed": seed, "perplexity": perplexity, "dense_ms": 10.0, "ms": 10 / times, **other}


def test_at_equal_latency_only_cuts_of_ours_that_are_as_fast_count():
    found = {("flap", "85% left"): (20.0, 1.25), ("slicegpt", "85% left"): (12.0, 1.1), ("tyr", "61% left"): (30.0, 2.0)}
    ours = {("slice_refit", "85% left"): (11.0, 1.1), ("slice_refit", "1.2x"): (21.0, 1.2), ("slice_refit", "1.3x"): (19.0, 1.249)}
    lines = methods.equal_latency("decoder", found | ours)
    assert ["not better" not in line for line in lines[:-1]] == [True, True, False]  # in order of speed; 1.249 is as good as 1.25
    assert "slice_refit (1.3x) 19.00" in lines[1] and "(none)" in lines[2]
    assert lines[-1].endswith("better than 2 of 3 cuts")
    assert methods.equal_latency("decoder", found) == []


def test_claims_are_held_against_equal_draws():
    rows = [row("tyr", "85% left", 13.0, 1), row("tyr_local", "85% left", 13.1, 1), *(row("tyr_local", "85% left", 12.0, 1, seed) for seed in (1, 2))]
    assert "tyr 13.00 <= tyr_local 13.10: holds" in methods.checks(rows)


def test_a_line_that_time_ran_out_hides_no_other():
    good, late = row("flap", "85% left", 13.0, 1), {**row("flap", "85% left", 0, 1), "why": "OutOfTime: not done after 3 s"}
    assert methods.latest([good, late]) == [good]
    assert methods.latest([good, late | {"why": "ValueError: x"}])[0]["why"] == "ValueError: x"


def test_time_is_predicted_from_cuts_that_were_timed():
    torch.manual_seed(0)
    program = gp.capture(Decoder(lambda hidden: SwiGLU(hidden, 70), hidden=44, layers=2).eval(), torch.randint(0, 61, (2, 9)))
    names = [g.name for g in program.analysis.groups if g.kind in ("neuron", "hidden")]
    kinds = {name: program.analysis.by_name[name].kind for name in names}

    def share(gone):  # a neuron takes a thousandth of the time, a direction nothing
        return 1 - sum(count for name, count in gone.items() if kinds[name] == "neuron") / 1000

    cuts = [{name: count} for name in names for count in (5, 10, 20)] + [dict.fromkeys(names, 7)]
    rows = [{"model": "tiny", "gone": gone, "ms": 3 * share(gone), "dense_ms": 3.0} for gone in cuts]
    predicted = methods.Predicted(program, rows)
    asked = {name: list(range(15)) for name in names}
    assert predicted("latency_ms", asked) == (pytest.approx(100 * share({name: 15 for name in names}), abs=0.1), 100.0)
    assert predicted("latency_ms", {}) == (pytest.approx(100), 100.0)
    known = methods.Predicted(program, [*rows, {**rows[-1], "gone": dict.fromkeys(names, 9), "ms": 1.2}])
    assert known("latency_ms", dict.fromkeys(names, range(9)))[0] == pytest.approx(40)  # what was timed is not predicted
    with pytest.raises(ValueError, match="2 cuts were timed"):
        methods.Predicted(program, rows[:2])
