"""The language models that benchmarks train: their faster scan, and what is saved of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import train_small
from tests.randomise import seeded


def test_the_scan_in_training_is_that_of_the_class():
    with seeded(0):
        mixer = train_small.build("mamba2", smoke=True).backbone.layers[1].mixer
        torch.nn.init.normal_(mixer.conv1d.bias)
        u = torch.randn(2, 192, 64)  # three chunks
    expected, found = mixer(u), train_small.chunked(mixer, u)
    assert torch.allclose(expected, found, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), list(mixer.parameters())) for y in (expected, found)]
    for a, b in zip(*gradients):
        assert float((a - b).abs().max()) < 1e-4 * float(a.abs().max())


def test_a_network_comes_back_as_it_was_saved(tmp_path):
    with seeded(0):
        model = train_small.build("decoder", smoke=True).eval()
        for weight in model.parameters():  # what a file holds
            weight.data = weight.data.bfloat16().float()
    train_small.save(model, "decoder", tmp_path, {"steps": 3}, smoke=True)
    loaded, about = train_small.load("decoder", tmp_path)
    ids = torch.randint(0, train_small.VOCABULARY, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert about == {"steps": 3}
