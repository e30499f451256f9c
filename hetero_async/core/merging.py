"""When the pending deltas are merged into an outer step, with which weights, and when the outcome is published.

Called by core/server.py, which writes down what comes of it: `Stepped` and `Published` are decisions, and whoever
applies them only computes. Deadlines are pace.py's, the step's coefficients are outer.py's.
"""

from collections.abc import Collection, Sequence

from hetero_async.core.outer import RULES
from hetero_async.core.pace import Windows
from hetero_async.core.records import Published, RunSettings, Stepped
from hetero_async.core.state import PendingDelta, State


def is_due(state: State, settings: RunSettings, windows: Windows, now_ms: int) -> bool:
    """Whether to merge what has arrived: when all have pushed, or their window is over.

    Workers push ahead of the deadline by as much as their way takes, so nothing is gained by waiting for it when all
    are there. A window that is over is done with, even when too little has arrived.
    """
    arrived = {pending.worker: True for pending in state.pending.values()}
    awaited = [worker for worker in state.active if state.ledger.held(worker)]
    have_all = bool(arrived) and all(worker in arrived for worker in awaited)
    if not have_all and not windows.is_due(now_ms):
        return False
    windows.merged()
    return have_all or len(arrived) >= settings.quorum


def stepped(state: State, settings: RunSettings) -> Stepped:
    """One outer step over all pending deltas."""
    coefficients = RULES[settings.rule].coefficients(state, settings)
    return Stepped(
        version=state.version + 1,
        deltas=tuple(state.pending),
        weights=weights_of(state.pending.values(), state.active, state.version, settings),
        **coefficients._asdict(),
    )


def weights_of(
    merged: Collection[PendingDelta], active: Sequence[str], version: int, settings: RunSettings
) -> tuple[float, ...]:
    """The weight of each delta in a step over `merged` that follows `version`.

    Also asked by whoever takes deltas out.
    """
    shares = _shares(merged, active, settings)
    return tuple(
        share * _of_age(version - delta.anchor_version, settings) * _of_youth(delta.nth, settings)
        for share, delta in zip(shares, merged, strict=True)
    )


def _shares(merged: Collection[PendingDelta], active: Sequence[str], settings: RunSettings) -> list[float]:
    """What each delta would weigh if all were fresh and their workers long since at work.

    workers  the mean over workers of the sum of each worker's deltas: its several deltas are one stretch of progress
             cut in pieces, so they add up. Of the step's workers, or, where each push is a step, of all active ones.
    tokens   the same, but weighed by what each knows, in tokens where all count them, else in samples. A delta of h
             steps with b samples each is h times the mean
             gradient with a noise of variance h/b, so the best estimate weighs it by b; and the sum stands for as many
             steps as the worker of the average *sample* took, Σnh/Σn with n = bh, and not that of the average worker:
             a slow worker, whom DyLU gives few steps, does not hold back what the fast ones have learned. Equal workers
             weigh 1/K, as above.
    """
    if settings.merge == "per-push":
        return [1.0 / max(1, len(active))] * len(merged)
    steps: dict[str, int] = {}
    samples: dict[str, int] = {}
    count_tokens = all(delta.tokens for delta in merged)
    for delta in merged:
        steps[delta.worker] = steps.get(delta.worker, 0) + delta.steps
        samples[delta.worker] = samples.get(delta.worker, 0) + (delta.tokens if count_tokens else delta.samples)
    if settings.weights == "workers" or not any(steps.values()):
        return [1.0 / max(1, sum(taken > 0 for taken in steps.values()))] * len(merged)
    everything = sum(samples.values())
    average_steps = sum(samples[worker] * steps[worker] for worker in steps) / everything
    batch = {worker: samples[worker] / max(1, steps[worker]) for worker in steps}
    return [batch[delta.worker] * average_steps / everything for delta in merged]


def _of_age(staleness: int, settings: RunSettings) -> float:
    """(1 + τ)^−a, FedAsync's polynomial (Xie et al. 2019, arXiv 1903.03934, §5.2) and FedBuff's with a = ½; a = 0
    weighs old and new alike."""
    return float((1 + staleness) ** -settings.staleness_exponent)


def _of_youth(nth: int, settings: RunSettings) -> float:
    """Whoever joins a run under way begins with an empty inner optimizer, whose first steps are wild."""
    return min(1.0, nth / (settings.warm_up_rounds + 1)) if nth else 1.0


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
