"""A `Program` as a torch module, for what needs one: training, gradients, `torch.compile`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import InvalidInput
from graphprune.execute.interpreter import Intercept, run
from graphprune.execute.shape_numbers import with_numbers
from graphprune.program import Kind, Program


class ProgramModule(nn.Module):
    """Runs a program with weights of its own; `names` maps the program's weight names to the module's.

    The weights are copies: training them changes neither the program nor the file behind it.
    """

    intercept: Intercept | None = None  # as `run` takes it

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = with_numbers(program)
        self.names: Mapping[str, str] = _attribute_names(program.weights)
        for name, value in program.weights.items():
            tensor = value.tensor.detach().clone()  # type: ignore[union-attr]
            if value.kind is Kind.PARAMETER and tensor.is_floating_point():
                self.register_parameter(self.names[name], nn.Parameter(tensor))
            else:
                self.register_buffer(self.names[name], tensor)

    def forward(self, *inputs: Tensor, **by_name: Tensor) -> Any:
        """The program's outputs: one tensor, or a tuple. Inputs in the program's order, or by name."""
        ordered = list(inputs) + [by_name[v.name] for v in self.program.inputs[len(inputs) :] if v.name in by_name]
        if len(ordered) != len(self.program.inputs):
            wanted = ", ".join(v.name for v in self.program.inputs)
            raise InvalidInput(f"the program takes {len(self.program.inputs)} inputs ({wanted}), but {len(ordered)} were given")
        tensors = {value: getattr(self, self.names[name]) for name, value in self.program.weights.items()}
        if not torch.is_grad_enabled():
            tensors = {value: tensor.detach() for value, tensor in tensors.items()}
        outputs = run(self.program, ordered, tensors=tensors, intercept=self.intercept)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _attribute_names(names: Mapping[str, Any]) -> dict[str, str]:
    """Names without dots and other marks, distinct again."""
    out: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        safe = "".join(c if c.isalnum() else "_" for c in name)
        safe = f"w_{safe}" if not safe or safe[0].isdigit() or hasattr(nn.Module, safe) else safe
        unique = safe
        while unique in taken:
            unique += "_"
        taken.add(unique)
        out[name] = unique
    return out
