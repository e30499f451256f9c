"""What a worker keeps of its inner optimizer, so that it goes on with it when it is started again.

A copy is taken in the user's thread at the end of a round, once a minute, and written in the background. Adam's moments
are those of some steps ago then, which is as good as those of now; without them its first steps are wild.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from hetero_async.errors import DiskFull, PeerError
from hetero_async.shell.kept import KeptFile
from hetero_async.shell.telemetry import note
from hetero_async.tensors import inner

KEEP_SECONDS = 60.0
KEPT = "optimizer.kept"


class InnerState:
    def __init__(
        self, optimizer: torch.optim.Optimizer, path: Path, worker: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._optimizer = optimizer
        self._file = KeptFile(path)
        self._worker = worker
        self._clock = clock
        self._copied_at = clock()
        self._rounds = 0

    def restore(self) -> bool:
        """Whether the optimizer goes on with what an earlier life of this worker kept; if there was any, it is said."""
        content = self._file.load()
        if content is None:
            return False
        try:
            inner.restore(self._optimizer, content)
        except PeerError as error:
            note(self._worker, f"the optimizer begins anew: {self._file.path}: {error}")
            return False
        note(self._worker, f"the optimizer goes on with {self._file.path}")
        return True

    def copy_if_due(self, rounds: int) -> dict[str, torch.Tensor]:
        """After a step; `rounds` were ended by then. Empty where it is not time for it."""
        return self.copy() if self.is_due(rounds) else {}

    def is_due(self, rounds: int) -> bool:
        """Whether to copy now. It is true once, and then of later rounds."""
        if rounds == self._rounds or self._clock() - self._copied_at < KEEP_SECONDS:
            return False
        self._rounds = rounds
        return True

    def copy(self) -> dict[str, torch.Tensor]:
        self._copied_at = self._clock()
        return inner.packed(self._optimizer)

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """From any thread. Raises DiskFull."""
        self._file.save(inner.to_bytes(tensors))

    def write_last(self) -> None:
        """When the worker leaves; what was kept before will do where there is no space."""
        if tensors := self.copy():
            try:
                self.write(tensors)
            except DiskFull as error:
                note(self._worker, f"the optimizer's state is not kept: {error}")
