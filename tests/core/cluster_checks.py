"""What a world of test_cluster.py shows of the ledger's books and of evaluations."""

from collections.abc import Mapping, Sequence

from hetero_async.core import ranges
from hetero_async.core.ledger import BOOK_POSITIONS, book_of
from hetero_async.core.records import Dataset, Delta, Entry, Evaluated, Evaluation, Joined, Left, Metric, Published


def check_books(log: Sequence[Entry], places: Mapping[str, tuple[str, str]], positions: int) -> None:
    """Each worker has trained on positions of its own book only; `places`: its site, and what it trains on."""
    opened = [entry.record.book for entry in log if isinstance(entry.record, Dataset)]
    for entry in log:
        if isinstance(entry.record, Delta):
            place, data = places[entry.record.worker]
            first = opened.index(book_of(data, place)) * BOOK_POSITIONS
            assert ranges.contains(((first, first + positions),), entry.record.ranges), "another book's positions"


def check_evaluations(log: Sequence[Entry], seen: Mapping[int, int]) -> None:
    """At most one is under way, but for the last; what was said is what was published, as workers have `seen` it."""
    under_way: Evaluation | None = None
    versions = {entry.record.number: entry.record.version for entry in log if isinstance(entry.record, Published)}
    figures = {(versions[number], float(after)) for number, after in seen.items() if number in versions}
    for entry in log:
        match entry.record:
            case Evaluation() as given:
                assert under_way is None or given.publish == max(versions), "one at a time"
                under_way = given
            case Evaluated() as done:
                assert under_way is not None and under_way.worker == done.worker
                under_way = None
            case Left(worker=worker) | Joined(worker=worker) if under_way is not None and worker == under_way.worker:
                under_way = None
            case Metric() as metric:
                assert (metric.version, metric.value) in figures
