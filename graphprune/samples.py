"""Calibration samples from a `.npz` file: one array per model input, samples along the first axis."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from graphprune.errors import InvalidInput
from graphprune.files import PathLike
from graphprune.program import Value

BATCH = 8  # samples per call where the model leaves the batch size open


def read_samples(path: PathLike, inputs: Sequence[Value]) -> list[dict[str, torch.Tensor]]:
    """Calls for a model that takes `inputs`: input name -> (batch, ...) in the dtype that the model takes.

    Raises:
        InvalidInput: if the file is no such archive, or its arrays do not fit the inputs.
    """
    arrays = _arrays(path)
    wanted = {value.name: value for value in inputs if value.shape is not None}
    if set(arrays) != set(wanted):
        found = ", ".join(sorted(arrays)) or "none"
        raise InvalidInput(f"{path} must hold one array per model input: expected {', '.join(wanted)}, found {found}")
    tensors = {name: _fit(path, arrays[name], value) for name, value in wanted.items()}
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InvalidInput(f"{path}: all arrays need the same number of samples along the first axis, found {listed}")
    count, fixed = min(counts.values(), default=0), _batch(inputs)
    if count < (fixed or 1):
        raise InvalidInput(f"{path} holds {count} samples; the model takes {fixed or 'one or more'} at once")
    batch = fixed or min(count, BATCH)
    starts = range(0, count - batch + 1, batch)  # a rest that does not fill a batch is left out
    return [{name: tensor[start : start + batch] for name, tensor in tensors.items()} for start in starts]


def first_samples(path: PathLike, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Two samples in place of inputs that were made up, `like`: for a capture at the sizes of the file. None where they do not fit."""
    arrays = _arrays(path)
    if set(arrays) != set(like) or any(len(array) < 2 or array.ndim != like[name].ndim for name, array in arrays.items()):
        return None
    return {name: torch.from_numpy(np.ascontiguousarray(array[:2])).to(like[name]) for name, array in arrays.items()}


def _arrays(path: PathLike) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist") from None
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise InvalidInput(f"{path} is not a readable .npz archive of plain arrays: {error}") from None


def _fit(path: PathLike, array: np.ndarray, value: Value) -> torch.Tensor:
    assert value.shape is not None and value.dtype is not None
    fits = array.ndim == len(value.shape) and all(
        axis == 0 or axis in value.dynamic or found == size for axis, (found, size) in enumerate(zip(array.shape, value.shape))
    )
    if not fits:
        expected = ["samples", *("any" if axis in value.dynamic else str(size) for axis, size in enumerate(value.shape) if axis)]
        raise InvalidInput(f"{path}: input {value.name} has shape ({', '.join(expected)}), found {tuple(array.shape)}")
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if tensor.dtype.is_floating_point != value.dtype.is_floating_point:
        raise InvalidInput(f"{path}: input {value.name} is {value.dtype}, found {tensor.dtype}")
    return tensor.to(value.dtype)


def _batch(inputs: Sequence[Value]) -> int | None:
    """The batch size that the model insists on."""
    sizes = [value.shape[0] for value in inputs if value.shape and 0 not in value.dynamic]
    return sizes[0] if sizes else None
