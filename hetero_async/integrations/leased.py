"""A DataLoader's dataset, batch size and collate function, with samples that the run leases to this worker.

What draws ahead of the steps would report samples as trained that are not. So frameworks are given this in the place of
their own loader, and it draws a batch when it is asked for one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from hetero_async.config import RunConfig
from hetero_async.errors import DatasetError, UserError
from hetero_async.session import Session

# They choose no samples, only an order, and that is the run's matter here.
ORDERS = (RandomSampler, SequentialSampler, DistributedSampler)


class LeasedLoader:
    """To be iterated once: until the whole run is finished.

    `session` may be set later than it is made, and before it is iterated. `loader`'s workers are not used: samples are
    loaded in the training loop's own thread.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        session: Session | None = None,
        *,
        move: Callable[[Any], Any] = lambda batch: batch,
        when_finished: Callable[[], None] = lambda: None,
    ) -> None:
        """`move`: what each batch passes through last. Raises DatasetError where the run cannot lease the samples."""
        batch_sampler = getattr(loader, "batch_sampler", None)
        batch_size = loader.batch_size or getattr(batch_sampler, "batch_size", None)
        if not batch_size:
            raise DatasetError("the DataLoader has no batch_size: the run leases samples by the batch")
        if isinstance(loader.dataset, IterableDataset):
            raise DatasetError(
                f"{type(loader.dataset).__name__} has no numbered samples: a map-style dataset is needed"
            )
        sampler = getattr(batch_sampler, "sampler", loader.sampler)
        if not isinstance(sampler, ORDERS):
            raise DatasetError(
                f"the DataLoader's {type(sampler).__name__} chooses samples, which the run does here: leave it out"
            )
        self.dataset: Any = loader.dataset
        self.batch_size: int = batch_size
        self.collate = loader.collate_fn
        self.session = session
        self._move = move
        self._when_finished = when_finished

    def __iter__(self) -> Iterator[Any]:
        if self.session is None:
            raise UserError("the leased loader was iterated before the run was joined")
        for batch in self.session.batches(self.dataset, self.batch_size, self.collate):
            yield self._move(batch)
        self._when_finished()

    def batches_of_run(self, config: RunConfig) -> int:
        """How many batches of this size the whole run has, whoever trains on them."""
        positions = config.run.samples or round(config.run.passes * len(self.dataset))
        return math.ceil(positions / self.batch_size)
