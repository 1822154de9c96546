"""Recipes where tensors lie on another device: one that computes on the CPU, but refuses what a GPU refuses.

Its tensors report a device of their own, operations that mix them with tensors of the CPU fail, and so do conversions to NumPy and random
generators of the CPU. Programs are captured on the CPU and moved there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import graphprune as gp
from graphprune.decisions import decide
from graphprune.errors import NothingToPrune
from graphprune.execute.interpreter import Execution
from graphprune.program import Program
from graphprune.recipes import RECIPES
from graphprune.repair import REPAIRS
from graphprune.repair.rotation import rotation
from graphprune.sparsity import UPDATES, pattern_of, repair_masked
from graphprune.surgery import Cut, apply_cut

ELSEWHERE = torch.device("lazy:0")  # a type that torch knows and never computes on here; autograd needs no threads of its own for it
MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index.", "aten::index_put")  # between devices; indices of the CPU


class Moved(Tensor):
    """A tensor of the other device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Moved:
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=ELSEWHERE)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> list[Any]:
        return self.detach().cpu().tolist()

    def new_tensor(self, data: Any, **_: Any) -> Tensor:
        return Moved(torch.tensor(data, dtype=self.dtype))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _called(func, args, kwargs or {})


class Checked(TorchDispatchMode):
    """Tensors that are made on the device, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _called(func, args, kwargs or {})


def _called(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    name = f"{func._schema.name}.{func._schema.overload_name}"
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    there = any(isinstance(x, Moved) for x in leaves)
    for x in leaves if there else ():
        if isinstance(x, Tensor) and not isinstance(x, Moved) and x.dim() and not name.startswith(MAY_MIX):
            raise RuntimeError(f"{name}: tensors of two devices")
    if (there or asked == ELSEWHERE.type) and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{name}: a generator of the CPU")
    inner = [x.inner if isinstance(x, Moved) else torch.device("cpu") if isinstance(x, torch.device) and x == ELSEWHERE else x for x in leaves]
    given, named = pytree.tree_unflatten(inner, spec)
    out = func(*given, **named)
    returned = func._schema.returns[0].alias_info if func._schema.returns else None
    if returned is not None and returned.is_write:  # in place
        place, argument = next((i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
        return args[place] if place < len(args) else kwargs[argument.name]
    if not (there if asked is None else asked == ELSEWHERE.type):
        return out
    return pytree.tree_map(lambda x: Moved(x) if isinstance(x, Tensor) and not isinstance(x, Moved) else x, out)


def moved(x: Any) -> Any:
    if isinstance(x, nn.Parameter):
        return nn.Parameter(Moved(x.detach().clone()), requires_grad=x.requires_grad)
    return Moved(x.detach().clone()) if isinstance(x, Tensor) else x


def move(program: Program) -> None:
    """Weights, constants and example inputs of a program."""
    program.example_inputs = [moved(x) for x in program.example_inputs]
    values = dict.fromkeys(program.weights.values())
    for node in program.walk():
        values.update(dict.fromkeys(node.inputs))
    for value in values:
        value.tensor = moved(value.tensor)


def convolutions() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    first, second = ([nn.Conv2d(n, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()] for n in (3, 16))
    module = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    return module, [torch.randn(2, 3, 8, 8) for _ in range(2)]


def decoder() -> tuple[nn.Module, list[Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    module = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, use_cache=False)).eval()
    return module, [{"input_ids": torch.randint(2, 64, (2, 12))} for _ in range(2)]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that was captured on the CPU makes its constants where its inputs are."""
    read = Execution.read

    def follow(self: Execution, leaf: Any) -> Any:
        there = isinstance(leaf, torch.device) and any(isinstance(x, Moved) for x in self._env.values())
        return ELSEWHERE if there else read(self, leaf)

    monkeypatch.setattr(Execution, "read", follow)


@pytest.mark.parametrize("make", [convolutions, decoder])
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("tyr", "icbs")])
def test_recipes_stay_on_the_device(name: str, make: Callable[[], tuple[nn.Module, list[Any]]], elsewhere: None) -> None:
    module, data = make()
    recipe = RECIPES[name]
    captured = [gp.capture(module, kwargs=data[0]) if isinstance(data[0], dict) else gp.capture(module, data[0]) for _ in range(2)]
    program, here = captured
    program.analysis  # noqa: B018
    amount: dict[str, Any] = {"sparsity": 0.5} if recipe.sparse else {"pruning_ratio": 0.5}
    move(program)
    there = pytree.tree_map(moved, data)
    if recipe.prepare:  # surgery between preparation and plan: the preparation alone
        if make is decoder:
            with Checked():
                assert rotation(program, there)
        return
    try:
        with Checked():
            plan = decide(lambda: program, lambda program, **given: None, recipe=name, calibration_data=there, **amount).plan
    except NothingToPrune:
        return
    assert plan.hash == decide(lambda: here, lambda program, **given: None, recipe=name, calibration_data=data, **amount).plan.hash
    cut, pruned = Cut(program.analysis, plan.resolve(program)), apply_cut(here, Cut(here.analysis, plan.resolve(here)))
    move(pruned)
    with Checked():
        for repair in plan.repair:
            if repair in UPDATES:
                found = repair_masked(pruned, plan.masks, UPDATES[repair], pattern_of(plan.settings["pattern"]), there)
            else:
                found = dict(REPAIRS[repair](program, cut, pruned, there))
            assert all(isinstance(x, Moved) for x in found.values())


def test_the_device_refuses_to_mix() -> None:
    x = moved(torch.ones(2, 2))
    with Checked():
        assert (torch.eye(2, device=x.device) @ x).cpu().tolist() == [[1, 1], [1, 1]]
        drawn = lambda: torch.rand(2, device=x.device, generator=torch.Generator())  # noqa: E731
        for wrong in (lambda: x @ torch.ones(2, 2), lambda: torch.zeros(2, 2).add_(x), drawn):
            with pytest.raises(RuntimeError):
                wrong()
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
