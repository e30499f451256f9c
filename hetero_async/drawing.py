"""Where batches come from: a map-style dataset's samples by their positions, or a stream in the order that it has.

Called by session.py in the user's thread. Positions are drawn from the desk; a sample that was fetched ahead is drawn
when its batch is handed out, so what was fetched in vain counts nowhere.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from hetero_async.core.ledger import sample_at
from hetero_async.desk import Desk
from hetero_async.errors import DatasetError

Collate = Callable[[list[Any]], Any]
# Positions for a batch, which it waits for; None: the run is finished.
Draw = Callable[[], list[int] | None]


class Dataset(Protocol):
    """A map-style dataset: `len(dataset)` samples, `dataset[i]` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def check(dataset: object, batch_size: int) -> None:
    """Raises DatasetError."""
    if batch_size < 1:
        raise DatasetError(f"batch_size is {batch_size}, it must be at least 1")
    if is_stream(dataset):
        return
    if not isinstance(dataset, Sized):
        raise DatasetError(f"{type(dataset).__name__} has neither a length nor an iterator: it is no dataset")
    if len(dataset) < batch_size:
        raise DatasetError(f"the dataset has {len(dataset)} samples, fewer than one batch of {batch_size}")


def is_stream(dataset: object) -> bool:
    """Whether its samples can be had one after another only."""
    is_map_style = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    return isinstance(dataset, IterableDataset) or (isinstance(dataset, Iterable) and not is_map_style)


def fetched(dataset: Dataset, collate: Collate, desk: Desk, draw: Draw) -> Iterator[Any]:
    """Batches of the samples at the positions that are drawn."""
    while (positions := draw()) is not None:
        yield collate([dataset[sample] for sample in _samples(positions, desk)])


def prefetched(
    dataset: Dataset,
    collate: Collate,
    desk: Desk,
    batch_size: int,
    reserve: Draw,
    workers: int,
    pin_memory: bool,
) -> Iterator[Any]:
    """The same, fetched ahead by so many processes.

    They are asked for as many batches as there are positions for at the moment; `reserve` waits for more.
    """
    sampler = _Reserved(desk, batch_size)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # which needs no more of it than we do
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=True,
        generator=torch.Generator(),  # else it would draw from the script's own
    )
    while (positions := reserve()) is not None:
        sampler.first = positions
        for batch in loader:
            if desk.consume(sampler.ahead.popleft()):
                yield batch


class _Reserved:
    """A batch sampler that ends when there are no positions at the moment. `ahead`: those of batches under way."""

    def __init__(self, desk: Desk, batch_size: int) -> None:
        self.first: list[int] | None = None
        self.ahead: deque[list[int]] = deque()
        self._desk = desk
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        positions = self.first
        while positions:
            self.ahead.append(positions)
            yield _samples(positions, self._desk)
            positions = self._desk.reserve(self._batch_size)


def _samples(positions: Sequence[int], desk: Desk) -> list[int]:
    return [sample_at(position, desk.samples, desk.seed) for position in positions]


# --- streams ---


def counted(dataset: Iterable[Any], batch_size: int, collate: Collate, workers: int, pin_memory: bool) -> Iterable[Any]:
    """Batches of a stream's samples, each with their number; once through it."""
    return DataLoader(
        dataset if isinstance(dataset, IterableDataset) else _Streamed(dataset),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Counted(collate),
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


def passes(batches: Iterable[Any]) -> Iterator[Any]:
    """Again and again, where it begins anew when asked; an iterator comes to an end."""
    while True:
        began_anew = iter(batches)
        count = 0
        for count, batch in enumerate(began_anew, 1):  # noqa: B007, it is wanted behind the loop
            yield batch
        if count == 0 or began_anew is batches:
            return


def leading(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor, or of what else it holds. Raises DatasetError."""
    if isinstance(batch, Mapping):
        return leading(next(iter(batch.values()), None))
    if isinstance(batch, torch.Tensor) and batch.dim() > 0:
        return len(batch)
    if isinstance(batch, tuple | list) and batch:
        return leading(batch[0]) if isinstance(batch[0], torch.Tensor | Mapping | tuple | list) else len(batch)
    raise DatasetError(f"cannot see how many samples a {type(batch).__name__} holds: give session.stream samples=…")


class _Streamed(IterableDataset[Any]):
    def __init__(self, samples: Iterable[Any]) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self._samples)


class _Counted:
    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> tuple[int, Any]:
        return len(samples), self._collate(samples)
