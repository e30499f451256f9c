"""How many rounds of a run the core folds in a second: what bounds a server's rate of deltas, and its recovery."""

import time
from collections.abc import Iterator

import pytest

from hetero_async.core.records import (
    Dataset,
    Delta,
    Entry,
    Genesis,
    Joined,
    Leased,
    Published,
    Record,
    RunSettings,
    Stepped,
)
from hetero_async.core.state import State

ROUNDS = 300
ROUND_SAMPLES = 256


def records(workers: int) -> Iterator[Record]:
    """A run without a fault: in each round every worker leases, pushes, and the server steps and publishes."""
    names = [f"site-{number}" for number in range(workers)]
    positions = ROUNDS * workers * ROUND_SAMPLES
    settings = RunSettings(run="bench", samples=positions)
    yield Genesis(key="k", settings=settings, schema_hash=b"schema", parameters_hash=b"parameters")
    yield Dataset(samples=positions, positions=positions)
    yield from (Joined(worker=name, key=f"key of {name}", site="site", incarnation=1, kept=()) for name in names)
    lsn = 2 + workers
    for number in range(1, ROUNDS + 1):
        stretches = [((number - 1) * workers + index) * ROUND_SAMPLES for index in range(workers)]
        for name, start in zip(names, stretches, strict=True):
            taken = ((start, start + ROUND_SAMPLES),)
            yield Leased(worker=name, ranges=taken)
            yield pushed(name, number, taken)
        deltas = tuple(range(lsn + 2, lsn + 2 * workers + 1, 2))
        yield Stepped(version=number, deltas=deltas, weights=(1.0,) * workers, gain=0.7)
        yield Published(number=number, version=number, codec="int8", merged=tuple((name, number) for name in names))
        lsn += 2 * workers + 2


def pushed(worker: str, number: int, taken: tuple[tuple[int, int]]) -> Delta:
    return Delta(
        worker=worker,
        incarnation=1,
        seq=number,
        anchor_version=number - 1,
        steps=32,
        ranges=taken,
        codec="int8",
        norm=1.0,
        payload_hash=b"payload",
    )


@pytest.mark.parametrize("workers", [4, 32, 128])
def test_rounds_folded_in_a_second(workers: int) -> None:
    entries = [Entry(lsn=lsn, term=1, record=record) for lsn, record in enumerate(records(workers), start=1)]
    state = State()
    began = time.perf_counter()
    for entry in entries:
        state.fold(entry)
    seconds = time.perf_counter() - began
    assert state.is_finished
    print(f"\n{workers:4} workers: {ROUNDS / seconds:9,.0f} rounds/s, {len(entries) / seconds:9,.0f} records/s", end="")
    began = time.perf_counter()
    state.digest()
    print(f", state hash in {(time.perf_counter() - began) * 1000:.1f} ms", end="")
