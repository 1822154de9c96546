"""Reads Hugging Face checkpoints from a folder: safetensors only, no code from the folder, nothing from the network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from graphprune.errors import InvalidInput, MissingExtra
from graphprune.files import PathLike


def read_config(folder: PathLike) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        InvalidInput: if the folder holds none, or no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InvalidInput(f"{folder} is no checkpoint: it holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{path} holds a {type(config).__name__} where an object is needed")
    return config


def weight_files(folder: PathLike) -> list[Path]:
    """The folder's safetensors files, each with a readable header; masks of a plan are no weights.

    Raises:
        InvalidInput: if there is none, or one is damaged.
    """
    files = sorted(file for file in Path(folder).glob("*.safetensors") if not file.name.endswith(".masks.safetensors"))
    if not files:
        pickled = [p.name for p in sorted(Path(folder).iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        found = f"only {', '.join(pickled)}, which would have to be unpickled" if pickled else "no weights"
        raise InvalidInput(f"{folder} holds {found}; save the model again with save_pretrained(folder), which writes safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InvalidInput(f"{file} is damaged or cut short: {error}") from None
    return files


def shapes(folder: PathLike) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all stored tensors, without reading them."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})
    return found


def model_class(folder: PathLike) -> Any:
    """The transformers class that a folder's `config.json` names.

    Raises:
        InvalidInput: if it names none, or none of transformers' own.
        MissingExtra: if transformers is not installed.
    """
    config = read_config(folder)
    names = config.get("architectures") or []
    if not names:
        raise InvalidInput(f"{folder}/config.json names no class under 'architectures', so it is not known how to build the model")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(f'a Hugging Face checkpoint needs transformers: pip install "graphprune[hf]" ({error})') from None
    try:
        cls = getattr(transformers, names[0], None)
    except (ImportError, RuntimeError) as error:  # it imports the class's file now, and torchvision with it
        raise MissingExtra(f"transformers {transformers.__version__} cannot import {names[0]}: {_root(error)}{_torchvision()}") from error
    if cls is None:
        remote = "; it comes with code of its own, which is never run" if "auto_map" in config else ""
        raise InvalidInput(f"{folder}: transformers {transformers.__version__} has no class {names[0]}{remote}")
    return cls


def _root(error: BaseException) -> str:
    """The first line of what an error came from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _torchvision() -> str:
    """What to do where the installed torchvision was built for another torch: transformers imports it wherever it finds it."""
    if importlib.util.find_spec("torchvision") is None:
        return ""
    try:
        importlib.import_module("torchvision")
        return ""
    except (ImportError, RuntimeError, OSError):
        return f"; torchvision does not fit torch {torch.__version__}: install the one that does, or `pip uninstall torchvision`"


def load_checkpoint(folder: PathLike) -> nn.Module:
    """The model in a folder, of the class that its `config.json` names, in evaluation mode and its own dtype.

    Raises:
        InvalidInput: if the folder is no such checkpoint, or its class is not one of transformers' own.
        MissingExtra: if transformers is not installed.
    """
    read_config(folder)
    weight_files(folder)
    cls = model_class(folder)
    try:
        model = cls.from_pretrained(folder, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder} does not load as {cls.__name__}: {str(error).strip().splitlines()[0]}") from error
    return model.eval()
