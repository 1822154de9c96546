"""Backends by name: what runs a result. One row each; a backend is a function from a result to something callable like the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphprune.errors import InvalidInput, MissingExtra


@dataclass(frozen=True)
class Backend:
    """How a result is run, and what must be installed for it."""

    lower: Callable[[Any], Callable[..., Any]]
    needs: str = ""  # an importable module
    extra: str = ""  # the extra that installs it


def _torch(result: Any) -> Callable[..., Any]:
    return result.module


def _onnxruntime(result: Any) -> Callable[..., Any]:
    from graphprune.backends.onnxruntime import OnnxRuntimeModel

    return OnnxRuntimeModel(result)


BACKENDS = {
    "torch": Backend(_torch),
    "onnxruntime": Backend(_onnxruntime, "onnxruntime", "onnxruntime"),
}


def check_backend(name: str) -> Backend:
    """The backend of this name, ready to be used.

    Raises:
        InvalidInput: if there is none.
        MissingExtra: if what it needs is not installed.
    """
    if name not in BACKENDS:
        raise InvalidInput(f"backend is one of {', '.join(BACKENDS)}, found {name!r}")
    backend = BACKENDS[name]
    if backend.needs and importlib.util.find_spec(backend.needs) is None:
        raise MissingExtra(f'the backend {name} needs {backend.needs}: pip install "graphprune[{backend.extra}]"')
    return backend


def lower(result: Any, name: str) -> Callable[..., Any]:
    """The result as a callable that takes the model's inputs."""
    return check_backend(name).lower(result)
