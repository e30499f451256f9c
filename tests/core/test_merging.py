"""What each delta of an outer step weighs."""

import pytest

from hetero_async.core.merging import weight_of_each
from hetero_async.core.state import PendingDelta


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
