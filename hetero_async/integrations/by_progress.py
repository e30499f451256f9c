"""A learning-rate scheduler of torch's that follows the run's progress, not the steps of one process."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class ByProgress:
    """In the place of a scheduler that was made for `total` steps: it stands where all workers' steps have come to.

    So it is the same at every site, at whatever speed it trains, and for a worker that joins late. In all but `step` it
    is that scheduler.
    """

    def __init__(self, scheduler: LRScheduler, total: int, progress: Callable[[], float]) -> None:
        """`progress` of the run: 0 … 1, never less than before."""
        self._scheduler = scheduler
        self._total = total
        self._progress = progress
        self._taken = 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.step()

    def step(self) -> None:
        """As many steps as the run has made since the last call: none, or several."""
        due = int(self._progress() * self._total)
        while self._taken < due:
            self._scheduler.step()
            self._taken += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
