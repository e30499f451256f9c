"""When the pending deltas are merged into an outer step, with which weights, and when the outcome is published.

Called by core/server.py, which writes down what comes of it: `Stepped` and `Published` are decisions, and whoever
applies them only computes. Deadlines are pace.py's.
"""

from collections.abc import Iterable, Sequence

from hetero_async.core.pace import Windows
from hetero_async.core.records import Published, RunSettings, Stepped
from hetero_async.core.state import PendingDelta, State


def is_due(state: State, settings: RunSettings, windows: Windows, now_ms: int) -> bool:
    """Whether to merge what has arrived. A window that is over is done with, even when nothing has."""
    arrived = {pending.worker: True for pending in state.pending.values()}
    awaited = [worker for worker in state.active if state.ledger.held(worker)]
    have_all = arrived and not any(worker not in arrived for worker in awaited)
    if not (have_all and _ends_early(state, settings)) and not windows.is_due(now_ms, awaited, arrived):
        return False
    windows.merged()
    return bool(arrived)


def _ends_early(state: State, settings: RunSettings) -> bool:
    """Whether all having pushed is reason enough to merge: always in `all`, at the run's end in `window`."""
    return settings.merge == "all" or not state.ledger.free


def stepped(state: State, settings: RunSettings) -> Stepped:
    """One outer step over all pending deltas."""
    weight = weight_of_each(state.pending.values(), state.active, settings.merge)
    return Stepped(
        version=state.version + 1,
        deltas=tuple(state.pending),
        weights=(weight,) * len(state.pending),
        gain=settings.outer_learning_rate,
    )


def weight_of_each(merged: Iterable[PendingDelta], active: Sequence[str], merge: str) -> float:
    """The weight of every delta of one step: the mean over workers of the sum of each worker's deltas.

    A worker's several deltas are one stretch of progress cut in pieces, so they add up; workers are averaged: those of
    the step, or, where each push is a step of its own, all that are active. Also asked by whoever takes deltas out.
    """
    if merge == "per-push":
        return 1.0 / max(1, len(active))
    return 1.0 / max(1, len({delta.worker for delta in merged if delta.steps}))


def published(state: State, settings: RunSettings) -> Published | None:
    """The publish that is due, if one is.

    Looked at with every tick too: a crash may have kept a step without its publish, or the bound has fallen. Every
    worker waits for it in `all` and at the end; beyond the staleness bound none could push anything until it comes.
    """
    is_awaited = settings.merge == "all" or state.is_trained
    limit = 1 if is_awaited else min(settings.publish_every, state.staleness_bound() + 1)
    if state.version - state.publish_versions[state.publish] < limit:
        return None
    merged = tuple((name, member.merged_seq) for name, member in state.members.items())
    return Published(number=state.publish + 1, version=state.version, codec=settings.codec_down, merged=merged)
