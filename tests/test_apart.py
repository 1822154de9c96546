"""Work in a process of its own ends in time, and says how."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.apart import apart


def _hangs(state: Any) -> Any:
    while True:
        state = not state


def _fails(state: Any) -> Any:
    raise ValueError(f"not {state}\nand more")


@pytest.mark.parametrize(
    "work, words",
    [(_hangs, "no result after 1 s"), (_fails, "ValueError: not 3"), (lambda state: os._exit(7), "the process died with code 7")],
)
def test_reasons(work: Any, words: str) -> None:
    assert apart(work, 3, 1) == words


def test_results_and_preparation() -> None:
    assert apart(lambda state: [state, os.getpid()], 3, 1)[1] != os.getpid()
    assert apart(lambda state: state + 1, 3, 1, prepare=lambda state: 10 * state) == 31
    assert apart(lambda state: state, 3, 1, prepare=_fails) == "ValueError: not 3"
