"""What a server reads off a worker's heartbeats: how its last minute was spent."""

import pytest

from hetero_async.core.heartbeat import LATELY_MS, Lately, Usage


def used(training: float, answer: float = 0.0, samples: float = 0.0, link: float = 0.0) -> Usage:
    return Usage(
        training_seconds=training, answer_wait_seconds=answer, sample_wait_seconds=samples, link_busy_seconds=link
    )


def test_shares_are_of_the_loops_time_since_the_first_heartbeat() -> None:
    lately = Lately()
    assert lately.shares() is None
    lately.note(0, used(10, 1))
    assert lately.shares() is None, "no time has passed between one heartbeat"
    lately.note(1_000, used(10.5, 1.25, 0.25, 0.5))
    assert lately.shares() == {"training": 0.5, "answer_wait": 0.25, "sample_wait": 0.25, "link": 0.5}


def test_what_is_longer_ago_than_a_minute_no_longer_counts() -> None:
    lately = Lately()
    for second in range(300):
        waited = max(0, second - 200)
        lately.note(1000 * second, used(second - waited, waited))
    shares = lately.shares()
    assert shares is not None and shares["answer_wait"] == 1.0 and shares["training"] == 0.0
    assert len(lately._noted) <= LATELY_MS / 5000 + 2, "and it is forgotten"


@pytest.mark.parametrize("usage", [used(20, -5), used(0), used(11, link=1e300)])
def test_shares_stay_between_0_and_1_whatever_a_worker_says(usage: Usage) -> None:
    lately = Lately()
    lately.note(0, used(10))
    lately.note(1_000, usage)
    assert all(0 <= share <= 1 for share in (lately.shares() or {}).values())
