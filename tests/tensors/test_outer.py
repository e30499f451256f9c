"""The outer step is its formula, to the bit."""

import pytest
import torch
from tensors.models import at_merge, values

from hetero_async.core.outer import RULES
from hetero_async.core.records import RunSettings
from hetero_async.tensors import outer

NUMEL = 200
ETA, MU = 0.7, 0.9
SETTINGS = RunSettings(run="r", outer_learning_rate=ETA, momentum=MU)


def trajectory(rule: str, steps: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    theta = values(NUMEL, seed=1).to(dtype)
    buffers = [torch.zeros_like(theta) for _ in range(outer.buffers_of(rule))]
    for version in range(steps):
        g = values(NUMEL, seed=100 + version).to(dtype)
        coefficients = RULES[rule].coefficients(at_merge(version), SETTINGS)
        outer.step(theta, buffers, g, torch.empty_like(g), coefficients)
    return theta, buffers


def test_nesterov_is_torchs_sgd_with_nesterov() -> None:
    parameter = torch.nn.Parameter(values(NUMEL, seed=1).double())
    optimizer = torch.optim.SGD([parameter], lr=ETA, momentum=MU, nesterov=True)
    for number in range(20):
        parameter.grad = values(NUMEL, seed=100 + number).double()
        optimizer.step()
    theta, _ = trajectory("nesterov", 20, torch.float64)
    torch.testing.assert_close(theta, parameter.detach(), rtol=1e-13, atol=1e-15)
    single, _ = trajectory("nesterov", 20)
    torch.testing.assert_close(single.double(), theta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_momentum", [False, True])
def test_each_product_is_rounded_before_it_is_added(with_momentum: bool) -> None:
    found, reference = values(NUMEL, seed=1), values(NUMEL, seed=1)
    buffers, m = [torch.zeros(NUMEL)] * with_momentum, torch.zeros(NUMEL)
    for number in range(20):
        g = values(NUMEL, seed=100 + number)
        decay, intake, gain, pull = (torch.tensor(value * (1 + number / 100)) for value in (0.8, 0.3, 0.7, 0.6))
        m = decay * m + intake * g
        reference = reference - (gain * g + pull * m if with_momentum else gain * g)
        outer.step(
            found, buffers, g.clone(), torch.empty(NUMEL), (float(decay), float(intake), float(gain), float(pull))
        )
    assert torch.equal(found, reference)
    assert all(torch.equal(buffer, m) for buffer in buffers)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_blocks_give_the_same_bits_as_the_whole_vector(rule: str) -> None:
    whole, whole_buffers = trajectory(rule, 5)
    theta = values(NUMEL, seed=1)
    buffers = [torch.zeros(NUMEL) for _ in range(outer.buffers_of(rule))]
    for version in range(5):
        g = values(NUMEL, seed=100 + version)
        coefficients = RULES[rule].coefficients(at_merge(version), SETTINGS)
        for start in range(0, NUMEL, 64):
            piece = slice(start, start + 64)
            views = [buffer[piece] for buffer in buffers]
            outer.step(theta[piece], views, g[piece], torch.empty_like(g[piece]), coefficients)
    assert torch.equal(theta, whole)
    assert all(torch.equal(a, b) for a, b in zip(buffers, whole_buffers, strict=True))
