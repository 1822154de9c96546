"""Backends by name: each lowers a result to something callable like the model. A new one is a file and a line in `BACKENDS`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from graphprune.errors import InvalidInput, MissingExtra
from graphprune.measure import Stats


class Runner(Protocol):
    """What a backend makes: takes the model's inputs, gives its outputs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def measure(self, *args: Any, repeats: int = 20, **kwargs: Any) -> Stats:
        """Latency of a call with these inputs."""
        ...


@dataclass(frozen=True)
class Backend:
    """Where a backend is, and what must be installed for it."""

    target: str  # "module:callable"; callable(result, **options) -> Runner
    needs: str = ""  # an importable module
    extra: str = ""  # the extra that installs it
    decides: bool = False  # its runner has `sparse_layers`: what was chosen for each, which belongs in the report

    def lower(self, result: Any, **options: Any) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)(result, **options)


BACKENDS: Mapping[str, Backend] = {
    "torch": Backend("graphprune.backends.torch:TorchModel"),
    "onnxruntime": Backend("graphprune.backends.onnxruntime:OnnxRuntimeModel", "onnxruntime", "onnxruntime"),
    "triton": Backend("graphprune.backends.triton:sparse_module", "triton", "gpu", decides=True),
}


def check_backend(name: str) -> Backend:
    """The backend of this name, ready to be used.

    Raises:
        InvalidInput: there is none of this name.
        MissingExtra: what it needs is not installed.
    """
    if name not in BACKENDS:
        raise InvalidInput(f"backend is one of {', '.join(BACKENDS)}, found {name!r}")
    backend = BACKENDS[name]
    if backend.needs and importlib.util.find_spec(backend.needs) is None:
        raise MissingExtra(f'the backend {name} needs {backend.needs}: pip install "graphprune[{backend.extra}]"')
    return backend


def lower(result: Any, name: str, **options: Any) -> Callable[..., Any]:
    """The result as a callable that takes the model's inputs; the options are those of the backend's class."""
    return check_backend(name).lower(result, **options)
