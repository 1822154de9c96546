"""The tiny zoo is fit for testing: small, alive, reproducible, exportable, and nothing in it is zero or one by initialisation."""

import pytest
import torch
from torch import nn

from tests.randomise import Case, check, randomise, tensors
from tests.zoo import TINY


@pytest.mark.parametrize("name", TINY)
def test_case_is_alive_and_exports(name: str) -> None:
    state = torch.random.get_rng_state()
    case = TINY[name]()
    assert sum(p.numel() for p in case.module.parameters()) < 200_000
    output = check(case)
    with torch.no_grad():
        exported = torch.export.export(case.module, case.args, dict(case.kwargs), strict=False)
        torch.testing.assert_close(exported.module()(*case.args, **case.kwargs), output)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", TINY)
def test_case_is_reproducible(name: str) -> None:
    for first, second in zip(tensors(TINY[name]()()), tensors(TINY[name]()())):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", TINY)
def test_no_parameter_is_constant(name: str) -> None:
    for path, parameter in TINY[name]().module.named_parameters():
        assert float(parameter.detach().std()) > 0.01, path


def test_batch_norms_are_calibrated() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 40 + 9 * torch.randn(4, 3, 9, 9)
    randomise(net, 0, x)
    raw = net[0](x).detach()
    assert float((net[1].running_var / raw.var((0, 2, 3))).min()) > 0.1 and not net[1].training and net[1].momentum == 0.1
    assert float(net(x).detach().abs().max()) < 20


@pytest.mark.parametrize("fault, words", [(float("nan"), "not finite"), (1e9, "as large as"), (0.0, "does not depend")])
def test_check_refuses(fault: float, words: str) -> None:
    case = TINY["mlp"]()
    with torch.no_grad():
        case.module[-1].weight.fill_(fault)
    with pytest.raises(AssertionError, match=words):
        check(Case(case.module, case.args))
