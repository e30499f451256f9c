"""A scheduler of torch's in a run of many workers: where it stands, and never back."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from hetero_async.integrations.by_progress import ByProgress

TOTAL = 100


class Told:
    """What the run's progress is said to be."""

    def __init__(self, progress: float = 0.0) -> None:
        self.progress = progress

    def __call__(self) -> float:
        return self.progress


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_it_stands_where_the_run_does_and_goes_on_by_own_steps_in_between() -> None:
    told, inner = Told(), optimizer()
    scheduler = ByProgress(LambdaLR(inner, lambda step: step / TOTAL), TOTAL, told)
    rates = []
    for progress in (0.0, 0.0, 0.2, 0.2, 0.2, 0.21, 0.21, 0.5, 1.0, 1.0):
        told.progress = progress
        inner.step()
        scheduler.step()
        rates.append(round(TOTAL * scheduler.get_last_lr()[0]))
    assert rates == [1, 2, 20, 21, 22, 22, 22, 50, 100, 100]


@pytest.mark.filterwarnings("error")
def test_a_worker_that_joins_late_begins_where_the_run_is() -> None:
    scheduler = ByProgress(LambdaLR(optimizer(), lambda step: step / TOTAL), TOTAL, Told(0.7))
    assert scheduler.get_last_lr() == [pytest.approx(0.7)]


def test_a_schedule_of_so_many_steps_is_not_driven_beyond_its_end() -> None:
    told, inner = Told(), optimizer()
    scheduler = ByProgress(OneCycleLR(inner, max_lr=1.0, total_steps=TOTAL + 1), TOTAL, told)
    for _ in range(3 * TOTAL):
        inner.step()
        scheduler.step()
    assert scheduler.state_dict()["last_epoch"] == TOTAL
