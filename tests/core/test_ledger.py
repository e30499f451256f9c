"""The order of samples, and the sets of positions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.core import ranges
from hetero_async.core.ledger import Ledger, sample_at

STRETCHES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda pair: (pair[0], sum(pair))), max_size=8
)


def positions(of: ranges.Ranges) -> set[int]:
    return {position for start, stop in of for position in range(start, stop)}


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 64, 1000])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_pass_holds_every_sample_once(samples: int, seed: int) -> None:
    for run_pass in range(3):
        start = run_pass * samples
        assert sorted(sample_at(start + index, samples, seed) for index in range(samples)) == list(range(samples))


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    def order(start: int, seed: int) -> list[int]:
        return [sample_at(start + index, 1000, seed) for index in range(1000)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1000, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != sorted(order(0, 0))


@given(STRETCHES, STRETCHES, st.integers(0, 80))
def test_ranges_are_sets(left_drawn: list[tuple[int, int]], right_drawn: list[tuple[int, int]], count: int) -> None:
    left, right = ranges.normal(left_drawn), ranges.normal(right_drawn)
    assert positions(left) == positions(tuple(left_drawn))
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(left)), "melted"
    assert positions(ranges.union(left, right)) == positions(left) | positions(right)
    assert positions(ranges.intersection(left, right)) == positions(left) & positions(right)
    assert positions(ranges.difference(left, right)) == positions(left) - positions(right)
    assert ranges.contains(left, right) == (positions(right) <= positions(left))
    taken, rest = ranges.take(left, count)
    assert sorted(positions(taken)) == sorted(positions(left))[:count]
    assert positions(rest) == positions(left) - positions(taken)


def test_a_position_is_trained_once_and_only_by_who_holds_it() -> None:
    ledger = Ledger()
    ledger.open("shared", samples=10, positions=10)
    ledger.lease("a", ((0, 4),))
    with pytest.raises(AssertionError, match="only free positions"):
        ledger.lease("b", ((3, 6),))
    with pytest.raises(AssertionError, match="only leased positions"):
        ledger.train("b", ((0, 1),))
    ledger.train("a", ((0, 2),))
    with pytest.raises(AssertionError, match="only leased positions"):
        ledger.train("a", ((0, 1),))
    ledger.release("a")
    assert (ledger.free, ledger.trained, ledger.leased) == (((2, 10),), ((0, 2),), {})
    assert ledger.is_exact()
