"""Calibration over several processes: every rank passes its shard, and all come to the plan of one pass over the whole."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.calibration import Statistics


def network(device: str = "cpu") -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)).double().eval()
    return model.to(device), [torch.randn(6, 12).double().to(device) for _ in range(4)]


def rank(index: int, ranks: int, out: str, backend: str = "gloo") -> None:
    """One process: its share of the batches, its statistics, its masks."""
    torch.set_num_threads(1)
    local = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if local:  # the host's own name may lead nowhere
        os.environ["GLOO_SOCKET_IFNAME"] = local[0]
    device = f"cuda:{index}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(index)
    torch.distributed.init_process_group(backend, f"file://{out}/meeting", timedelta(seconds=300), ranks, index)
    model, data = network(device)
    found = {name: tensor.cpu() for name, tensor in results(model, data[index::ranks]).items()}
    torch.save(found, f"{out}/{index}.pt")
    torch.distributed.destroy_process_group()


def results(model: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    program = gp.capture(model, data[0])
    statistics = Statistics(program, data, needs=("moments", "gram"))
    weight = program.weights["2.weight"]
    masked = gp.compile(program, recipe="sparsegpt", sparsity=0.5, calibration_data=data, verify=False)
    gradients = statistics.gradients(weight)
    assert gradients is not None
    return {
        "variance": statistics.observed("moments")[weight].variance,
        "gram": statistics.observed("gram")[weight].square,
        "gradient": gradients.mean_square,
        "mask": masked.plan.masks["2.weight"],
        "repaired": masked.module.get_parameter("2.weight").detach(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_come_to_what_one_pass_comes_to(ranks, tmp_path):
    meet(ranks, tmp_path, "gloo")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins two GPUs or more")
def test_gpus_come_to_what_one_pass_comes_to(tmp_path):
    meet(2, tmp_path, "nccl")


def meet(ranks: int, tmp_path, backend: str) -> None:
    torch.multiprocessing.spawn(rank, (ranks, str(tmp_path), backend), ranks)  # not forked: threads of tests before would be missing
    whole = {name: tensor.cpu() for name, tensor in results(*network("cuda" if backend == "nccl" else "cpu")).items()}
    close = {"rtol": 1e-4, "atol": 1e-5} if backend == "nccl" else {"rtol": None, "atol": None}  # sums on a GPU are float32
    for index in range(ranks):
        found = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, **close, msg=f"{name} of rank {index}")
