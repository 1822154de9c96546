"""What to say where `torch.export` gives up: one line with the reason, the line of the user's code and the way out."""

from __future__ import annotations

import contextlib
import linecache
import logging
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LIBRARY = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))  # code that is not the user's
_STANDARD = sysconfig.get_paths()["stdlib"]
_LOGGERS = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")
DATA_DEPENDENT = (
    "its control flow is data-dependent, a value in a tensor decides what runs; compute both ways and choose with torch.where, take the "
    "value as an argument that is a number, or give the network as an ONNX file"
)
UNKNOWN_TYPE = (
    "it takes or gives objects of a class whose tensors torch cannot see; make the class known, a dataclass by "
    "torch.export.register_dataclass({}), another by torch.utils._pytree.register_pytree_node, or return a tuple or a dict"
)


def rejection(module: nn.Module, error: Exception) -> str:
    """One line: which module, where in its code, why."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    unknown = re.match(r"Found <class '(?:.*\.)?(\w+)'> in .*not a known type", first)
    why = DATA_DEPENDENT if "data-dependent" in first else UNKNOWN_TYPE.format(unknown[1]) if unknown else first
    if getattr(getattr(module, "config", None), "_attn_implementation", None) == "flex_attention":
        why += '; flex_attention cannot be traced: model.set_attn_implementation("sdpa") first'
    return f"torch.export rejects {type(module).__name__}{_place(error)}: {why}"


def _place(error: Exception) -> str:
    """The innermost line of code that is neither torch's nor ours, with its source; empty where there is none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        line = "" if _foreign(file) else linecache.getline(file, trace.tb_lineno).strip()
        if line:
            found = f" at {Path(file).name}:{trace.tb_lineno} ({line})"
        trace = trace.tb_next
    return found


def _foreign(file: str) -> bool:
    return file.startswith(_LIBRARY) or (file.startswith(_STANDARD) and "-packages" not in file)


class _WithoutGraph:
    """A stream that leaves out the graph which `torch.export` prints when it gives up, and passes on the rest."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if hasattr(sys.exc_info()[1], "partial_fx_graph") else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While `torch.export` runs: what it reports of its own failure is left to the error."""

    def below_warnings(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(below_warnings)
    try:
        with contextlib.redirect_stderr(_WithoutGraph(sys.stderr)):  # type: ignore[type-var]
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(below_warnings)
