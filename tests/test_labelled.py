"""The benchmark of methods on networks with labels: its protocol, on a network of a few channels."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from benchmarks import labelled
from benchmarks.methods import Cell, guarded
from graphprune.recipes import RECIPES


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)).eval()
    images = torch.randn(8, 3, 8, 8)
    labels = network(images).argmax(-1)

    def errors(result):
        module = network if result is None else result.module
        return float((module(images).argmax(-1) != labels).float().mean())

    batches = list(zip(images.split(4), labels.split(4)))
    program = gp.capture(network, batches[0][0])
    return labelled.Subject("tiny", program, batches, errors, lambda output, batch: F.cross_entropy(output, batch[1]))


def test_every_recipe_has_its_levels_and_the_longest_search_comes_last():
    found = labelled.cells("tiny", [])
    assert found[0].recipe == "dense" and found[-1].recipe == "icbs" and len(set(found)) == len(found)
    for name, recipe in RECIPES.items():
        levels = {cell.what for cell in found if cell.recipe == name}
        assert levels == ({"80% left", "50% left"} if not recipe.sparse else {"block 0.5"} if name == "tiles" else {"0.5"})


@pytest.mark.parametrize("recipe", ["group_l2", "wanda_sp", "taylor", "sparsegpt"])
def test_a_cell_says_what_is_left_and_what_it_cost(subject, recipe):
    for cell in labelled.cells("tiny", [recipe]):
        row = labelled.run(cell, subject, argparse.Namespace())
        if cell.recipe == "dense":
            dense = row
            assert row["errors"] == 0
        elif cell.what == "0.5":
            assert row["params"] == dense["params"] and row["zeros"] == (3 * 16 * 9 + 16 * 16 * 9) // 2
        else:
            share = row["macs"] / dense["macs"]
            assert share <= float(cell.what.removesuffix("% left")) / 100 and row["params"] < dense["params"] and share > 0.2
        if cell.recipe != "dense":
            assert row["seconds"] > 0 and row["ms"] > 0 and 0 <= row["errors"] <= 1
            assert f"{row['errors']:.2%}" in labelled.line({"model": "tiny", "recipe": recipe, "what": cell.what, **row})


@pytest.mark.parametrize("how", ["magnitude", "obspa"])
def test_what_a_spread_costs_is_held_against_even_cuts(subject, how):
    rows = list(labelled.spread_rows(subject, how, "70%", uneven=2))
    assert [row["what"] for row in rows][:2] == ["70% alike", "70% up to 2"]
    dense = sum(v.tensor.numel() for v in subject.program.weights.values())
    assert all(0 <= row["errors"] <= 1 and row["params"] <= 0.75 * dense for row in rows[:2])


def test_what_fails_is_a_line_of_the_table(subject):
    row = guarded(Cell("tiny", "slicegpt", (("left", "50%"),)), subject, argparse.Namespace(), 60, labelled.run)
    assert "InvalidInput" in row["why"]
    assert "InvalidInput" in labelled.line({"model": "tiny", "recipe": "slicegpt", "what": "50% left", **row})
