"""When there is an outer step, what each of its deltas weighs, and when its outcome is published."""

from dataclasses import replace

import pytest

from hetero_async.core import merging
from hetero_async.core.ledger import Ledger
from hetero_async.core.merging import weights_of
from hetero_async.core.pace import Windows
from hetero_async.core.records import Published, RunSettings, Stepped
from hetero_async.core.state import Member, PendingDelta, State

NOW_MS = 1000


def delta(worker: str, steps: int = 4, samples: int = 8) -> PendingDelta:
    return PendingDelta(worker=worker, seq=1, anchor_version=0, steps=steps, samples=samples)


@pytest.mark.parametrize(
    ("merge", "merged", "active", "weight"),
    [
        ("window", [delta("a"), delta("b"), delta("c")], ["a", "b", "c", "d"], 1 / 3),
        ("all", [delta("a"), delta("a"), delta("b")], ["a", "b"], 1 / 2),
        ("window", [delta("a"), delta("b", steps=0)], ["a", "b"], 1.0),
        ("window", [delta("a", steps=0)], [], 1.0),
        ("per-push", [delta("a")], ["a", "b", "c", "d"], 1 / 4),
        ("per-push", [delta("a")], [], 1.0),
    ],
)
def test_workers_are_averaged_and_a_workers_deltas_add_up(
    merge: str, merged: list[PendingDelta], active: list[str], weight: float
) -> None:
    settings = RunSettings(run="r", merge=merge)
    assert weights_of(merged, active, 0, settings) == (weight,) * len(merged)


def weights(*merged: PendingDelta, version: int = 0, **settings: object) -> list[float]:
    return list(weights_of(merged, ["a", "b", "c"], version, replace(RunSettings(run="r"), **settings)))


def test_equal_workers_weigh_the_same_by_tokens_as_by_workers() -> None:
    merged = [delta("a"), delta("b"), delta("c")]
    assert weights(*merged, weights="tokens") == pytest.approx(weights(*merged))


def test_by_tokens_a_slow_worker_does_not_hold_back_what_a_fast_one_has_learned() -> None:
    fast, *slow = merged = [delta("a", 32, 32 * 8), *(delta(worker, 2, 2 * 8) for worker in "bcd")]
    expected = (32**2 + 3 * 2**2) / 38**2
    assert weights(*merged, weights="tokens") == pytest.approx([expected] * 4)
    assert sum(
        weight * pushed.steps for weight, pushed in zip(weights(*merged, weights="tokens"), merged, strict=True)
    ) == pytest.approx(
        (fast.samples * fast.steps + sum(pushed.samples * pushed.steps for pushed in slow))
        / sum(pushed.samples for pushed in merged)
    )


def test_by_tokens_a_delta_weighs_by_its_batch_and_pieces_add_up_to_the_whole() -> None:
    small, large = delta("a", 4, 4 * 8), delta("b", 4, 4 * 24)
    found = weights(small, large, weights="tokens")
    assert found[1] == pytest.approx(3 * found[0])
    halves = weights(delta("a", 2, 2 * 8), delta("a", 2, 2 * 8), large, weights="tokens")
    assert halves == pytest.approx([found[0], found[0], found[1]])


def test_old_deltas_weigh_less_where_that_is_asked_for() -> None:
    old = PendingDelta(worker="a", seq=1, anchor_version=1, steps=4, samples=8)
    assert weights(old, version=4) == [1.0]
    assert weights(old, version=4, staleness_exponent=0.5) == [0.5]


def test_the_first_deltas_of_a_late_joiner_weigh_less() -> None:
    pushed = [PendingDelta(worker="a", seq=1, anchor_version=0, steps=4, samples=8, nth=nth) for nth in range(5)]
    assert [weights(one, warm_up_rounds=2)[0] for one in pushed] == pytest.approx([1.0, 1 / 3, 2 / 3, 1.0, 1.0])
    assert weights(pushed[1], warm_up_rounds=0) == [1.0]


def state_of(
    pushed: str, *, leased: str = "ab", free: bool = True, version: int = 4, publish_version: int = 4
) -> State:
    """Workers a, b and c are active; those who pushed have one delta pending each."""
    return State(
        settings=RunSettings(run="r", max_staleness=3),
        version=version,
        publish=2,
        publish_versions={1: 0, 2: publish_version},
        ledger=Ledger(positions=64, free=((40, 64),) if free else (), leased=dict.fromkeys(leased, ((0, 8),))),
        members={worker: Member(site="s", active=True, merged_seq=ord(worker)) for worker in "abc"},
        pending={10 + index: delta(worker) for index, worker in enumerate(pushed)},
    )


@pytest.mark.parametrize(
    ("merge", "pushed", "free", "merge_ms", "is_due"),
    [
        ("window", "", True, None, False),
        ("window", "a", True, None, False),  # the window is open
        ("window", "ab", True, None, True),  # and nobody is missing
        ("window", "a", True, NOW_MS + 1, False),  # b is waited for
        ("window", "a", True, NOW_MS, True),  # not any longer
        ("window", "ab", True, NOW_MS + 1, True),
        ("window", "", True, NOW_MS, False),
        ("window", "ab", False, None, True),  # nobody can get more: the end
        ("window", "a", False, None, False),
        ("all", "ab", True, None, True),
        ("all", "a", True, None, False),
        ("all", "aab", True, None, True),
        ("all", "", True, None, False),
    ],
)
def test_a_merge_is_due_when_all_who_hold_samples_have_pushed_or_the_grace_is_over(
    merge: str, pushed: str, free: bool, merge_ms: int | None, is_due: bool
) -> None:
    windows = Windows(number=1, deadline_ms=NOW_MS - 100, merge_ms=merge_ms)
    settings = RunSettings(run="r", merge=merge)
    assert merging.is_due(state_of(pushed, free=free), settings, windows, NOW_MS) == is_due
    assert windows.merge_ms == (merge_ms if merge_ms and merge_ms > NOW_MS and not is_due else None)


def test_fewer_than_the_quorum_wait_for_the_next_window_unless_they_are_all() -> None:
    settings = RunSettings(run="r", quorum=2)
    for pushed, leased, is_due in (("a", "ab", False), ("ab", "abc", True), ("a", "a", True)):
        windows = Windows(number=1, deadline_ms=NOW_MS, merge_ms=NOW_MS)
        assert merging.is_due(state_of(pushed, leased=leased), settings, windows, NOW_MS) == is_due
        assert windows.merge_ms is None, "this window is over"


def test_nobody_waits_for_a_worker_that_holds_no_samples() -> None:
    windows = Windows(number=1, deadline_ms=NOW_MS, merge_ms=NOW_MS + 1)
    assert merging.is_due(state_of("a", leased="a"), RunSettings(run="r"), windows, NOW_MS)


def test_a_step_takes_all_that_is_pending() -> None:
    settings = RunSettings(run="r", rule="nesterov", outer_learning_rate=0.25, momentum=0.5)
    assert merging.stepped(state_of("aab"), settings) == Stepped(
        version=5, deltas=(10, 11, 12), weights=(0.5, 0.5, 0.5), decay=0.5, intake=1.0, gain=0.25, pull=0.125
    )


@pytest.mark.parametrize(
    ("merge", "publish_every", "is_trained", "since", "is_due"),
    [
        ("window", 1, False, 0, False),
        ("window", 1, False, 1, True),
        ("window", 3, False, 2, False),
        ("window", 3, False, 3, True),
        ("window", 9, False, 3, False),
        ("window", 9, False, 4, True),  # beyond the staleness bound of 3 nobody could push
        ("window", 9, True, 1, True),  # the last one is waited for
        ("window", 9, True, 0, False),
        ("all", 9, False, 1, True),
    ],
)
def test_a_publish_is_due_as_often_as_asked_and_whenever_somebody_waits_for_it(
    merge: str, publish_every: int, is_trained: bool, since: int, is_due: bool
) -> None:
    settings = RunSettings(run="r", merge=merge, publish_every=publish_every, max_staleness=3, codec_down="fp32")
    state = state_of("", publish_version=4 - since)
    state.settings = settings
    state.ledger.trained = ((0, 64),) if is_trained else ()
    merged = tuple((worker, ord(worker)) for worker in "abc")
    expected = Published(number=3, version=4, codec="fp32", merged=merged) if is_due else None
    assert merging.published(state, settings) == expected
