"""Runs a result by ONNX Runtime: on CUDA where the installed build and the machine have it, else on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphprune.errors import InvalidInput


class OnnxRuntimeModel:
    """Callable like the model: tensors or arrays in, by position or by input name; one tensor or a tuple out."""

    def __init__(self, result: Any) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        available = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            result.save(path)
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.inputs = [it.name for it in self.session.get_inputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        feeds = {**dict(zip(self.inputs, args)), **kwargs}
        if len(args) > len(self.inputs) or set(feeds) != set(self.inputs):
            found = f"{len(args)} by position and {', '.join(kwargs) or 'none'} by name"
            raise InvalidInput(f"the model takes {', '.join(self.inputs)}; found {found}")
        outputs = self.session.run(None, {name: _array(value) for name, value in feeds.items()})
        tensors = tuple(torch.from_numpy(it) if isinstance(it, np.ndarray) else it for it in outputs)
        return tensors[0] if len(tensors) == 1 else tensors


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
