"""Windows, and how many steps fit into one."""

from dataclasses import replace

import pytest

from hetero_async.core.pace import LONGER_MAX, Windows, reference_rate, rounds_longer, steps_for
from hetero_async.core.records import RunSettings

SETTINGS = RunSettings(run="r", samples=1, steps_per_round=32, grace=0.25)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([], 0.0), ([0.0, 0.0], 0.0), ([5.0], 5.0), ([0.0, 2.0, 8.0], 8.0), ([*([1.0] * 19), 100.0], 1.0)],
)
def test_the_reference_is_the_fastest_but_not_a_lone_outlier_among_many(rates: list[float], expected: float) -> None:
    assert reference_rate(rates) == expected


@pytest.mark.parametrize(("rate", "steps"), [(10.0, 32), (5.0, 16), (2.5, 8), (0.01, 1), (0.0, 32), (20.0, 32)])
def test_steps_follow_speed(rate: float, steps: int) -> None:
    assert steps_for(rate, 10.0, SETTINGS) == steps


def test_steps_of_a_round_given_in_seconds() -> None:
    timed = RunSettings(run="r", samples=1, steps_per_round=32, seconds_per_round=3.0)
    assert [steps_for(rate, 10.0, timed) for rate in (10.0, 0.1, 0.0)] == [30, 1, 32]
    assert Windows.length_ms(10.0, timed) == 3000


def test_a_window_closes_at_its_deadline_and_the_next_is_measured_from_there() -> None:
    windows = Windows()
    assert not windows.advance(0, 0.0, SETTINGS), "nobody's speed is known yet"
    assert windows.advance(1000, 10.0, SETTINGS)
    assert (windows.number, windows.deadline_ms) == (1, 4200)
    assert not windows.advance(4199, 10.0, SETTINGS)
    assert windows.advance(4210, 10.0, SETTINGS)
    assert (windows.number, windows.deadline_ms, windows.merge_ms) == (2, 7400, 5000)


def test_a_closed_window_is_due_when_its_grace_is_over() -> None:
    windows = Windows()
    windows.advance(0, 10.0, SETTINGS)
    assert not windows.is_due(3199), "it is still open"
    windows.advance(3200, 10.0, SETTINGS)
    assert not windows.is_due(3999)
    assert windows.is_due(4000)
    windows.merged()
    assert not windows.is_due(4000)


def test_after_a_long_pause_deadlines_do_not_rush_to_catch_up() -> None:
    windows = Windows()
    windows.advance(0, 10.0, SETTINGS)
    windows.advance(100_000, 10.0, SETTINGS)
    assert windows.deadline_ms is not None
    assert 100_000 < windows.deadline_ms <= 103_200


def test_a_window_that_was_measured_by_the_slowest_is_shortened_when_the_fastest_is_heard() -> None:
    windows = Windows()
    assert windows.advance(0, 0.1, SETTINGS)
    assert windows.deadline_ms == 320_000
    assert windows.advance(1000, 10.0, SETTINGS), "the new deadline is to be told"
    assert (windows.number, windows.deadline_ms) == (1, 4200)
    assert not windows.advance(1001, 11.0, SETTINGS)


def test_when_nobody_trains_no_deadline_stays_due() -> None:
    windows = Windows()
    assert windows.advance(1000, 10.0, SETTINGS)
    assert windows.deadline_ms is not None
    assert not windows.advance(windows.deadline_ms + 1, 0.0, SETTINGS)
    assert windows.deadline_ms is None


@pytest.mark.parametrize(
    ("exchanges", "longer"),
    [
        ([], 1.0),
        ([0.0, 0.0], 1.0),  # nobody knows yet
        ([1.5, 1.6], 1.0),  # half of a round of 3.2 s
        ([3.2, 3.2], 2.0),
        ([0.1, 3.2], 2.0),  # of two, the worse link
        ([0.1, 0.1, 3.2], 1.0),  # of more, not for the few
        ([100.0], LONGER_MAX),
    ],
)
def test_rounds_last_twice_as_long_as_an_exchange_at_least(exchanges: list[float], longer: float) -> None:
    assert rounds_longer(exchanges, 10.0, SETTINGS) == pytest.approx(longer)


def test_where_rounds_have_a_length_of_their_own_links_do_not_change_it() -> None:
    for fixed in (replace(SETTINGS, seconds_per_round=1.0), replace(SETTINGS, merge="per-push")):
        assert rounds_longer([100.0], 10.0, fixed) == 1.0


def test_a_window_is_as_long_as_links_needed_when_it_opened() -> None:
    windows = Windows()
    assert windows.advance(0, 10.0, SETTINGS, [3.2])
    assert (windows.deadline_ms, windows.longer) == (4800, 1.5), "twice would be needed; it grows from one to the next"
    assert windows.advance(4800, 10.0, SETTINGS, [3.2])
    assert (windows.deadline_ms, windows.longer) == (4800 + 6400, 2.0)
    assert [steps_for(rate, 10.0, SETTINGS, windows.longer) for rate in (10.0, 2.5, 0.0)] == [64, 16, 64]
    assert not windows.advance(5000, 10.0, SETTINGS, [0.1])
    assert windows.longer == 2.0
    assert windows.advance(11_200, 10.0, SETTINGS, [0.1])
    assert (windows.deadline_ms, windows.merge_ms, windows.longer) == (14_400, 12_000, 1.0)
