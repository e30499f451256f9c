"""Each outer rule is its formula, to the bit."""

import pytest
import torch
from tensors.models import values

from hetero_async.tensors.outer import RULES

NUMEL = 200
ETA, MU = 0.7, 0.9


def trajectory(
    rule_name: str, steps: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rule = RULES[rule_name]
    theta = values(NUMEL, seed=1).to(dtype)
    buffers = [torch.zeros_like(theta) for _ in range(rule.buffers)]
    for number in range(steps):
        g = values(NUMEL, seed=100 + number).to(dtype)
        rule.step(theta, buffers, g, torch.empty_like(g), ETA, MU)
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


def test_each_rule_is_its_formula_to_the_bit() -> None:
    eta, mu, rest = torch.tensor(ETA), torch.tensor(MU), torch.tensor(1 - MU)
    theta = {name: values(NUMEL, seed=1) for name in RULES}
    m = {name: torch.zeros(NUMEL) for name in RULES}
    for number in range(20):
        g = values(NUMEL, seed=100 + number)
        theta["sgd"] = theta["sgd"] - eta * g
        m["nesterov"] = mu * m["nesterov"] + g
        m["lookahead"] = mu * m["lookahead"] + rest * g
        for name in ("nesterov", "lookahead"):
            theta[name] = theta[name] - eta * (g + mu * m[name])
    for name in RULES:
        found, buffers = trajectory(name, 20)
        assert torch.equal(found, theta[name]), name
        assert all(torch.equal(buffer, m[name]) for buffer in buffers)


@pytest.mark.parametrize(("name", "reach"), [("sgd", ETA), ("nesterov", ETA / (1 - MU)), ("lookahead", ETA * (1 + MU))])
def test_a_constant_delta_moves_the_parameters_by_the_rules_gain(name: str, reach: float) -> None:
    rule = RULES[name]
    theta = torch.zeros(1, dtype=torch.float64)
    buffers = [torch.zeros_like(theta) for _ in range(rule.buffers)]
    for _ in range(1000):
        before = theta.clone()
        rule.step(theta, buffers, torch.ones_like(theta), torch.empty_like(theta), ETA, MU)
    assert float(before - theta) == pytest.approx(reach)


@pytest.mark.parametrize("name", sorted(RULES))
def test_blocks_give_the_same_bits_as_the_whole_vector(name: str) -> None:
    rule = RULES[name]
    whole, whole_buffers = trajectory(name, 5)
    theta = values(NUMEL, seed=1)
    buffers = [torch.zeros(NUMEL) for _ in range(rule.buffers)]
    for number in range(5):
        g = values(NUMEL, seed=100 + number)
        for start in range(0, NUMEL, 64):
            piece = slice(start, start + 64)
            views = [buffer[piece] for buffer in buffers]
            rule.step(theta[piece], views, g[piece], torch.empty_like(g[piece]), ETA, MU)
    assert torch.equal(theta, whole)
    assert all(torch.equal(a, b) for a, b in zip(buffers, whole_buffers, strict=True))
