"""The benchmark zoo is what it says: complete, lazy, reproducible, and every row that is tried here is alive."""

import subprocess
import sys
from collections import Counter

import pytest
import torch

import tests.torchvision_ops  # noqa: F401
from benchmarks.zoo_models import ROWS, select
from tests.randomise import check, tensors

_SAMPLE = """
hf/llama-gqa hf/mamba2 hf/qwen3_moe hf/t5 hf/swinv2 torchvision/shufflenet_v2_x0_5 timm/sknet diffusers/dit
""".split()


def _or_skip(name: str) -> None:
    pytest.importorskip({"hf": "transformers"}.get(name.split("/")[0], name.split("/")[0]))


def test_list_is_long_enough_and_lazy() -> None:
    count = Counter(name.split("/")[0] for name in ROWS)
    assert count["torchvision"] > 90 and count["timm"] > 98 and count["hf"] > 200 and count["diffusers"] > 3
    code = "import sys, benchmarks.zoo_models; print(sorted({'torchvision', 'timm', 'transformers', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_float_model_of_torchvision_is_listed() -> None:
    _or_skip("torchvision")
    from torchvision.models import list_models

    two_stage = {"fasterrcnn", "maskrcnn", "keypointrcnn"}
    missing = {m for m in list_models() if not m.startswith("quantized_") and f"torchvision/{m}" not in ROWS}
    assert {m.split("_")[0] for m in missing} == two_stage


def test_every_module_of_timm_is_listed() -> None:
    timm = pytest.importorskip("timm")
    assert not [m for m in timm.list_modules() if f"timm/{m}" not in ROWS]


def test_select() -> None:
    assert [row.name for row in select("hf/gpt2")] == ["hf/gpt2"]
    assert {row.family for row in select("mixture of experts")} == {"mixture of experts"}
    assert select("no such row") == []


@pytest.mark.parametrize("name", _SAMPLE)
def test_row_is_alive_and_reproducible(name: str) -> None:
    _or_skip(name)
    state = torch.random.get_rng_state()
    case = ROWS[name].build()
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module.training for module in case.module.modules())
    first = tensors(check(case))
    for a, b in zip(first, tensors(ROWS[name].build()())):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith(("hf/", "diffusers/"))])
def test_small_row_is_alive(name: str) -> None:
    _or_skip(name)
    check(ROWS[name].build())
