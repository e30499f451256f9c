"""What an outer step merges, and with what weights: decided by the server, and again by whoever takes deltas out."""

from collections.abc import Iterable, Sequence

from hetero_async.core.records import Stepped
from hetero_async.core.state import PendingDelta, State


def next_step(state: State) -> Stepped:
    """One outer step over all pending deltas."""
    assert state.settings is not None and state.pending, "a run that has begun, and something to merge"
    weight = weight_of_each(state.pending.values(), state.active, state.settings.merge)
    return Stepped(
        version=state.version + 1,
        deltas=tuple(state.pending),
        weights=(weight,) * len(state.pending),
        gain=state.settings.outer_learning_rate,
    )


def weight_of_each(merged: Iterable[PendingDelta], active: Sequence[str], merge: str) -> float:
    """The weight of every delta of one step: the mean over workers of the sum of each worker's deltas.

    A worker's several deltas are one stretch of progress cut in pieces, so they add up; workers are averaged: those of
    the step, or, where each push is a step of its own, all that are active.
    """
    if merge == "per-push":
        return 1.0 / max(1, len(active))
    return 1.0 / max(1, len({delta.worker for delta in merged if delta.steps}))
