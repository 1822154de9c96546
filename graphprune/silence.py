"""What libraries say about their own work while they do ours, and what is no news to whoever asked us."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_onnxscript() -> Iterator[None]:
    """Without a line for each node that onnxscript does not fold, and torch's word on its own outdated call."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(before)
