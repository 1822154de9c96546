"""What every test run shares: a torchvision that imports, one thread, fixed randomness, and a rotating sample of the slow tests.

`--slow=N` (default 12) runs N of the tests marked `slow`, other ones every day, so that all of them are met in turn; `--slow=all` and
`--slow=none` do what they say. A test named on the command line by its id always runs.
"""

import hashlib
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # no GPU: kernels run in Triton's interpreter, which has to be known before its import

os.environ.setdefault("GRAPHPRUNE_WIDTHS", "rule")  # what was measured on this machine must not change what tests expect

import torch

import tests.torchvision_ops  # noqa: F401  transformers imports torchvision too, where it is installed

DAY = "GRAPHPRUNE_TEST_DAY"  # in the environment, so that all workers of one run agree on it


def pytest_addoption(parser):
    parser.addoption("--slow", default="12", metavar="all|none|N", help="how many tests marked slow to run: a sample that rotates daily")


def pytest_configure(config):
    os.environ.setdefault(DAY, str(int(time.time()) // 86400))
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    choice = config.getoption("--slow")
    slow = [item for item in items if item.get_closest_marker("slow")]
    if choice == "all" or any("::" in argument for argument in config.args):
        return
    wanted = 0 if choice == "none" else _count(choice)
    chosen = sample([item.nodeid for item in slow], wanted, int(os.environ[DAY]))
    left_out = [item for item in slow if item.nodeid not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws without a seed of its own is the same alone, in any order and on any worker; also in fixtures that it is first to use."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def sample(names: list[str], wanted: int, day: int) -> set[str]:
    """`wanted` of `names`, the next ones every day, neighbours in the list apart from each other."""
    order = sorted(names, key=lambda name: hashlib.sha1(name.encode()).digest())
    return {order[(day * wanted + i) % len(order)] for i in range(min(wanted, len(order)))}


def _count(choice: str) -> int:
    if not choice.isdigit():
        raise pytest.UsageError(f"--slow takes all, none or a number, found {choice!r}")
    return int(choice)
