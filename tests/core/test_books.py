"""Books of the ledger: data that all share, that one site has, and that only their worker sees, within one run."""

from dataclasses import replace

import pytest
from core.test_server import HELLO, SETTINGS, Bench, told_to

from hetero_async.core import ranges
from hetero_async.core.events import Received
from hetero_async.core.ledger import BOOK_POSITIONS, PRIVATE, SHARED, STREAM, sample_at
from hetero_async.core.messages import Lease, LeaseRequest, Message, Refused, Welcome
from hetero_async.core.records import Dataset


class Sites(Bench):
    """A bench whose workers are at the sites that they are named after: a1 is at a."""

    def step(self, event: object) -> list[tuple[str, Message]]:
        told = super().step(replace(event, site=event.worker[0]) if isinstance(event, Received) else event)
        assert self.server.state.ledger.is_exact()
        return told

    def ask(self, worker: str, data: str, samples: int, dataset_samples: int = 64) -> ranges.Ranges:
        told = self.told(worker, data, samples, dataset_samples)
        [lease] = told_to(worker, Lease, told)
        return lease.ranges

    def told(self, worker: str, data: str, samples: int, dataset_samples: int = 64) -> list[tuple[str, Message]]:
        ledger = self.server.state.ledger
        held = ledger.held(worker)
        request = LeaseRequest(
            incarnation=self.server.state.members[worker].incarnation, number=1, held=held, samples=samples, batch=4,
            dataset_samples=dataset_samples, data=data,
        )  # fmt: skip
        return self.say(worker, request)


def bench(*workers: str, **changes: object) -> Sites:
    begun = Sites(**changes)
    begun.begin(*workers)
    return begun


def test_each_sites_private_data_has_an_order_of_its_own() -> None:
    sites = bench("a1", "a2", "b1", samples=640)
    first, second, other = sites.ask("a1", PRIVATE, 4), sites.ask("a2", PRIVATE, 4, 64), sites.ask("b1", PRIVATE, 4, 20)
    assert (first, second) == (((0, 4),), ((4, 8),)), "the workers of one site share its book"
    assert other == ((BOOK_POSITIONS, BOOK_POSITIONS + 4),)
    assert sites.records(Dataset) == [
        Dataset(samples=64, positions=640, book="private a"),
        Dataset(samples=20, positions=640, book="private b"),
    ]
    numbers = [sample_at(BOOK_POSITIONS + position, 20, seed=0) for position in range(20)]
    assert sorted(numbers) == list(range(20)), "every pass over it holds each of its samples once"


def test_all_books_together_have_no_more_than_the_run() -> None:
    sites = bench("a1", "b1", "c1", samples=24)
    taken = [sites.ask("a1", SHARED, 4), sites.ask("b1", PRIVATE, 4), sites.ask("c1", STREAM, 4, 1)]
    assert all(taken)
    for _ in range(20):
        taken += [sites.ask("a1", SHARED, 4), sites.ask("b1", PRIVATE, 4), sites.ask("c1", STREAM, 4, 1)]
    assert sum(map(ranges.size, taken)) == 24
    for worker in ("a1", "b1", "c1"):
        sites.push(worker)
    assert sites.server.state.is_trained


def test_what_others_could_not_lease_is_not_claimed() -> None:
    sites = bench("a1", "b1", samples=8)
    mine = sites.ask("a1", PRIVATE, 4)
    sites.wait(6_000)  # both are given up
    hello = replace(HELLO, claims=mine, life=b"second")
    assert told_to("b1", Welcome, sites.say("b1", hello))[0].granted == (), "another site's data"
    sites.ask("b1", SHARED, 4), sites.ask("b1", SHARED, 4)
    for _ in range(4):
        sites.ask("b1", SHARED, 4)
    assert ranges.size(sites.server.state.ledger.held("b1")) == 8
    [welcome] = told_to("a1", Welcome, sites.say("a1", hello))
    assert welcome.granted == (), "it is free, and the run has no more to train on"


@pytest.mark.parametrize(
    ("data", "dataset_samples", "changes", "reason"),
    [
        (SHARED, 63, {}, "the dataset has 63 samples here, but the run's has 64"),
        (PRIVATE, 63, {}, "the dataset has 63 samples here, but the other workers' at a has 64"),
        (PRIVATE, 64, {"samples": 0, "passes": 2.0}, "give the run samples = "),
        ("mine", 64, {}, "must be shared, private or stream"),
    ],
)
def test_data_that_cannot_be_counted_are_refused(
    data: str, dataset_samples: int, changes: dict[str, object], reason: str
) -> None:
    sites = bench("a1", "a2", **changes)
    if not changes:
        sites.ask("a1", data if data in (SHARED, PRIVATE) else SHARED, 4)
    [refused] = told_to("a2", Refused, sites.told("a2", data, 4, dataset_samples))
    assert reason in refused.reason


def test_passes_are_of_the_shared_dataset() -> None:
    sites = bench("a1", samples=0, passes=1.5)
    sites.ask("a1", SHARED, 4, 64)
    assert sites.server.state.ledger.positions == 96
    assert SETTINGS.samples == 64
