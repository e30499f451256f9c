"""A learning-rate scheduler of torch's that follows the run's progress, not the steps of one process."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class ByProgress:
    """In the place of a scheduler that was made for `total` steps: it stands where all workers' steps have come to.

    So it is the same at every site, at whatever speed it trains, and for a worker that joins late. In all but `step` it
    is that scheduler. News of the others come with merges, and in between it goes on with this worker's own steps:
    otherwise a warm-up that begins at 0 would leave everybody's first round without effect.
    """

    def __init__(self, scheduler: LRScheduler, total: int, progress: Callable[[], float]) -> None:
        """`progress` of the run: 0 … 1, never less than before."""
        self._scheduler = scheduler
        self._total = total
        self._progress = progress
        self._told, self._own, self._taken = 0.0, -1, 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.step()

    def step(self) -> None:
        """As many steps as are due after a step of the optimizer: one, none, or several."""
        told = self._progress()
        self._told, self._own = told, (self._own + 1 if told == self._told else 0)
        due = min(self._total, int(told * self._total) + self._own)
        while self._taken < due:
            self._scheduler.step()
            self._taken += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
