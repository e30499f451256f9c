"""How many positions a worker is leased when it asks: enough never to wait, and no more than it can train on in time.

Called by core/server.py, which records what comes of it. What a worker holds nobody else can train on, so a slow one
must not be given at its joining, when its speed is unknown, what would take it to the run's end and beyond.
"""

from collections.abc import Mapping

from hetero_async.core import ranges
from hetero_async.core.ledger import PRIVATE, SHARED, STREAM, Ledger, book_of
from hetero_async.core.messages import LeaseRequest
from hetero_async.core.ranges import Ranges
from hetero_async.core.records import Dataset, RunSettings

# Rounds that may lie ready: the present one stretched to four times its steps, two ahead of it, one for the way.
ROUNDS_MAX = 7
# Steps for a worker whose speed nobody knows; it is known after two of them.
FIRST_STEPS = 4


def opened(ledger: Ledger, site: str, request: LeaseRequest, settings: RunSettings) -> Dataset | str | None:
    """The book that is opened by this request, if one is; a text: why the worker's data cannot be trained on here."""
    if request.data not in (SHARED, PRIVATE, STREAM):
        return f'data is "{request.data}": must be {SHARED}, {PRIVATE} or {STREAM}'
    book = book_of(request.data, site)
    if known := ledger.books.get(book):
        if request.dataset_samples == known.samples:
            return None
        whose = "the run's" if request.data == SHARED else f"the other workers' at {site}"
        return f"the dataset has {request.dataset_samples} samples here, but {whose} has {known.samples}"
    if request.data != SHARED and not settings.samples:
        return f"data that only {site} sees has no passes that others could count: give the run samples = … instead"
    if request.dataset_samples == 0:
        return None
    positions = settings.samples or max(1, round(settings.passes * request.dataset_samples))
    return Dataset(samples=request.dataset_samples, positions=positions, book=book)


def granted(
    ledger: Ledger, worker: str, book: str, request: LeaseRequest, rates: Mapping[str, float], steps_per_round: int
) -> Ranges | None:
    """New positions of that book for it, or none where none is free; None: not yet, let it ask again.

    `rates`: steps per second of all active workers, 0 where unknown; `steps_per_round`: those assigned to this one.
    """
    free = ledger.free_of(book)
    rate, batch = rates.get(worker, 0.0), max(1, request.batch)
    most = batch * (ROUNDS_MAX * steps_per_round if rate > 0 else FIRST_STEPS)
    room = most - request.undrawn
    if room <= 0 and free:
        return None
    size = ledger.lease_size(min(request.samples, max(batch, room)), batch, _share(rate, rates))
    return ranges.take(free, size)[0]


def _share(rate: float, rates: Mapping[str, float]) -> float:
    """Of all the work that is done: by speed where all are known, else an even one."""
    if not rates or not all(rates.values()):
        return 1.0 / max(1, len(rates))
    return rate / sum(rates.values())
