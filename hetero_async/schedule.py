"""Learning rates that follow the whole run's progress, whoever does how much of it."""

import math
from collections.abc import Callable

import torch

from hetero_async.errors import UserError


class Schedule:
    def __init__(self, optimizer: torch.optim.Optimizer, share: Callable[[float], float]) -> None:
        """`share`: of each parameter group's own learning rate, at a progress of 0 … 1."""
        self._optimizer = optimizer
        self._share = share
        self._rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]

    def follow(self, progress: float) -> None:
        """Set what the next step is taken with. Raises UserError for a share that cannot be one."""
        share = self._share(progress)
        if not (math.isfinite(share) and share >= 0):
            raise UserError(f"the learning-rate schedule gives {share} at progress {progress:g}: it must be 0 or more")
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(share * rate)  # a compiled or captured optimizer reads this very tensor
            else:
                group["lr"] = share * rate
