"""Modules that torch.export rejects: one line with the place in the user's code, and everything is as it was."""

import copy
import dataclasses
import logging
import sys

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import CaptureError, InvalidInput


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)


class Branching(Mlp):
    def forward(self, x):
        hidden = self.up(x)
        if hidden.sum() > 0:
            hidden = 2 * hidden
        return self.down(hidden)


class Looping(Mlp):
    def forward(self, x):
        hidden = self.up(x)
        while float(hidden.norm()) > 1:
            hidden = hidden / 2
        return self.down(hidden)


class Leaving(Mlp):
    def forward(self, x):
        return self.down(torch.from_numpy(self.up(x).numpy()))


class Broken(Mlp):
    def forward(self, x):
        print("the user's own line", file=sys.stderr)
        raise RuntimeError("it never worked\nand never will")


# module -> the line it stops at, why
REJECTED = {
    Branching: ("if hidden.sum() > 0:", "its control flow is data-dependent"),
    Looping: ("while float(hidden.norm()) > 1:", "its control flow is data-dependent"),
    Leaving: ("return self.down(torch.from_numpy(self.up(x).numpy()))", "numpy"),
    Broken: (r'raise RuntimeError("it never worked\nand never will")', "it never worked"),
}


@pytest.mark.parametrize("function", [gp.capture, gp.plan, gp.compile])
@pytest.mark.parametrize("kind", REJECTED)
def test_one_line_says_where_and_why(kind, function, capfd):
    module = kind().train()
    module.down.eval()
    state = copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    arguments = {} if function is gp.capture else {"pruning_ratio": 0.5}
    if function is gp.compile:
        arguments["inplace"] = True
    with pytest.raises(CaptureError) as raised:
        function(module, torch.ones(4, 6), **arguments)
    line, why = REJECTED[kind]
    said = str(raised.value)
    assert said.startswith(f"torch.export rejects {kind.__name__} at test_rejection.py:") and f"({line}): " in said and why in said
    assert "\n" not in said and raised.value.exit_code == 2
    assert ("torch.where" in said) == ("data-dependent" in said)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.splitlines() == (["the user's own line"] if kind is Broken else [])
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), state.values(), strict=True))
    assert module.training and module.up.training and not module.down.training and not module._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_logs_and_stderr_are_as_they_were():
    stream, filters = sys.stderr, list(logging.getLogger("torch.export._trace").filters)
    with pytest.raises(CaptureError):
        gp.capture(Branching(), torch.ones(4, 6))
    assert sys.stderr is stream and logging.getLogger("torch.export._trace").filters == filters


def test_a_place_in_nobodys_code_is_left_out():
    with pytest.raises(CaptureError, match=r"^torch\.export rejects Linear: "):
        gp.capture(nn.Linear(6, 8), torch.ones(4, 5))


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


class Dataclass(Mlp):
    def forward(self, x):
        hidden = self.up(x)
        return Pair(hidden, self.down(hidden))


def test_an_output_of_a_class_of_its_own_is_to_be_registered():
    with pytest.raises(CaptureError, match=r"rejects Dataclass: .* torch\.export\.register_dataclass\(Pair\)"):
        gp.capture(Dataclass(), torch.ones(4, 6))


def test_quantized_modules_are_refused_in_one_line():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.ao.nn.quantized.dynamic.Linear(6, 8)

    with pytest.raises(InvalidInput, match="the model is quantized; prune the full-precision model"):
        gp.capture(nn.Sequential(Quantized()), torch.ones(4, 6))
