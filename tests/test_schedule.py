"""A learning-rate schedule over the run's progress."""

import math

import pytest
import torch

from hetero_async.errors import UserError
from hetero_async.schedule import Schedule


def optimizer(*rates: float | torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def rates(of: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in of.param_groups]


def test_every_group_has_its_share_of_its_own_rate() -> None:
    both = optimizer(0.1, 0.02)
    schedule = Schedule(both, lambda progress: 1 - progress)
    for progress in (0.0, 0.5, 0.75, 1.0):
        schedule.follow(progress)
        assert rates(both) == pytest.approx([0.1 * (1 - progress), 0.02 * (1 - progress)])


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.1)
    captured = optimizer(rate)
    Schedule(captured, lambda _: 0.5).follow(0.0)
    assert captured.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)


@pytest.mark.parametrize("share", [math.nan, math.inf, -0.1])
def test_what_cannot_be_a_share_is_told(share: float) -> None:
    with pytest.raises(UserError, match=r"the learning-rate schedule gives .* at progress 0.25: it must be 0 or more"):
        Schedule(optimizer(0.1), lambda _: share).follow(0.25)
