"""When there is an outer step, what each of its deltas weighs, and when its outcome is published."""

import pytest

from hetero_async.core import merging
from hetero_async.core.ledger import Ledger
from hetero_async.core.merging import weight_of_each
from hetero_async.core.pace import Windows
from hetero_async.core.records import Published, RunSettings, Stepped
from hetero_async.core.state import Member, PendingDelta, State

NOW_MS = 1000


def delta(worker: str, steps: int = 4) -> PendingDelta:
    return PendingDelta(worker=worker, seq=1, anchor_version=0, steps=steps, samples=8)


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
    assert weight_of_each(merged, active, merge) == weight


def state_of(
    pushed: str, *, leased: str = "ab", free: bool = True, version: int = 4, publish_version: int = 4
) -> State:
    """Workers a, b and c are active; those who pushed have one delta pending each."""
    return State(
        settings=RunSettings(run="r", max_staleness=3),
        version=version,
        publish=2,
        publish_versions={1: 0, 2: publish_version},
        ledger=Ledger(
            samples=64, positions=64, free=((40, 64),) if free else (), leased=dict.fromkeys(leased, ((0, 8),))
        ),
        members={worker: Member(site="s", active=True, merged_seq=ord(worker)) for worker in "abc"},
        pending={10 + index: delta(worker) for index, worker in enumerate(pushed)},
    )


@pytest.mark.parametrize(
    ("merge", "pushed", "free", "merge_ms", "is_due"),
    [
        ("window", "", True, None, False),
        ("window", "ab", True, None, False),  # the window is open
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


def test_nobody_waits_for_a_worker_that_holds_no_samples() -> None:
    windows = Windows(number=1, deadline_ms=NOW_MS, merge_ms=NOW_MS + 1)
    assert merging.is_due(state_of("a", leased="a"), RunSettings(run="r"), windows, NOW_MS)


def test_a_step_takes_all_that_is_pending() -> None:
    settings = RunSettings(run="r", outer_learning_rate=0.25)
    assert merging.stepped(state_of("aab"), settings) == Stepped(
        version=5, deltas=(10, 11, 12), weights=(0.5, 0.5, 0.5), gain=0.25
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
