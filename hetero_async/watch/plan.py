"""What to expect of a run before it is begun, in figures and in what will not work.

`hetero-async plan` shows it. timing.py says how fast everything turns; here is what follows from it: what learning
gets, what links, memory and disks must bear, and how long rounds must be. A test holds it against simulated worlds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hetero_async.watch.timing import PUBLISHES_HELD_MIN, Question, Site, Timing, buffers, uploads_at_once

DAY_SECONDS = 86_400
# What a worker says beside its deltas, and what it is told beside publishes: a heartbeat a second and its answer; for
# each round the offer, a chunk's header and a request for samples, and their answers; for each publish its news, a
# chunk's header and what asks for it.
HEARTBEAT_BYTES, BEAT_BYTES = 360.0, 75.0
ROUND_UP_BYTES, ROUND_DOWN_BYTES = 390.0, 250.0
PUBLISH_UP_BYTES, PUBLISH_DOWN_BYTES = 50.0, 140.0
# Of Python and torch.
PROCESS_BYTES = 300 * 1024 * 1024
# What a large machine has.
MEMORY_BYTES_MAX = 1 << 40
# store.py keeps two checkpoints and writes a third; model.py holds two snapshots; log.py's segments.
CHECKPOINTS, SNAPSHOTS, SEGMENT_BYTES = 3, 2, 64 * 1024 * 1024
MERGED_AT_ONCE = 4
# Whoever trains so much of the time hardly waits.
WAITING_SHARE = 0.98
# Nobody trains so many steps alone.
STEPS_MAX = 1 << 20
# Rounds that links make longer by less than this are not worth a word.
LONGER_TOLD = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteForecast:
    """Seconds are a round's, shares between 0 and 1; bytes per second are those of the whole site."""

    name: str
    steps_per_round: int
    round_seconds: float
    answer_seconds: float  # from a cut to its acknowledgement
    receive_seconds: float  # from a merge to its publish in the worker
    training_share: float
    staleness: float
    up_bytes_per_round: float
    down_bytes_per_round: float
    up_bytes_per_second: float
    down_bytes_per_second: float
    up_busy: float
    down_busy: float
    steps_per_second: float
    samples_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """`steps_that_hide_links`: the H from which on each delta is measured from the merge before it."""

    sites: tuple[SiteForecast, ...]
    window_seconds: float
    merges_per_second: float
    steps_that_hide_links: int
    steps_that_fit: int  # the H from which on the links carry it all, and nobody waits
    steps_per_second: float
    samples_per_second: float
    share_of_all: float  # of what all sites would do without any link between them
    times_best_site: float
    bytes_per_day: float
    server_busy: float
    server_memory_bytes: float
    server_disk_bytes: float
    log_bytes_per_day: float
    worker_memory_bytes: float
    device_memory_bytes: float
    joining_seconds: float
    days: float  # infinite where the run's samples are not known
    warnings: tuple[str, ...]


def forecast(question: Question) -> Forecast:
    """What to expect, and in `warnings` what will not work."""
    pace = Timing.of(question)
    sites = tuple(_site(pace, site) for site in question.sites)
    samples = sum(site.samples_per_second for site in sites)
    alone = [site.workers * site.batch / site.step_seconds for site in question.sites]
    log = pace.deltas_per_second * question.delta_bytes
    joining = pace.joining_seconds()
    seconds = joining + question.samples / samples if question.samples and samples else math.inf
    foretold = Forecast(
        sites=sites,
        window_seconds=pace.window,
        merges_per_second=pace.merges_per_second,
        steps_that_hide_links=_least_steps(question, Timing.hides_links),
        steps_that_fit=_least_steps(question, Timing.fits),
        steps_per_second=sum(site.steps_per_second for site in sites),
        samples_per_second=samples,
        share_of_all=samples / sum(alone),
        times_best_site=samples / max(alone),
        bytes_per_day=DAY_SECONDS * sum(site.up_bytes_per_second + site.down_bytes_per_second for site in sites),
        server_busy=pace.server_seconds * pace.merges_per_second,
        server_memory_bytes=server_memory_bytes(question),
        server_disk_bytes=server_disk_bytes(question, pace.deltas_per_second / pace.merges_per_second, log * seconds),
        log_bytes_per_day=DAY_SECONDS * log,
        worker_memory_bytes=worker_memory_bytes(question),
        device_memory_bytes=8 * question.parameters,  # base, and a delta while it is encoded (tensors/replica.py)
        joining_seconds=joining,
        days=seconds / DAY_SECONDS,
        warnings=(),
    )
    return replace(foretold, warnings=tuple(_warnings(question, pace, foretold)))


def _warnings(question: Question, pace: Timing, foretold: Forecast) -> Iterator[str]:
    steps = foretold.steps_that_fit
    cure = f"from steps_per_round = {steps} on the links carry it" if steps else "choose a coarser codec"
    for site, expected in zip(question.sites, foretold.sites, strict=True):
        if not math.isfinite(expected.staleness):
            yield f"{site.name}: none of its deltas would get through, so it is counted as nothing here; {cure}"
        elif pace.is_refused(site):
            yield (
                f"{site.name}: its deltas would be {expected.staleness:.1f} merges old, and come to be refused "
                f"(max_staleness = {question.settings.max_staleness}), so it is counted as nothing here; {cure}"
            )
        elif expected.training_share < WAITING_SHARE:
            reason = "in step with all others" if question.settings.merge == "all" else f"for answers; {cure}"
            yield f"{site.name}: its workers wait {1 - expected.training_share:.0%} of the time {reason}"
    if pace.longer >= LONGER_TOLD:
        yield (
            f"rounds last {pace.longer:.1f} times as long as steps_per_round has them: exchanges over these links "
            "take more than half of one, and a coarser codec would shorten both"
        )
    if foretold.server_busy > 1:
        yield (
            f"server: a merge takes {pace.server_seconds:,.0f} s of one core, and one is due every "
            f"{1 / foretold.merges_per_second:,.0f} s; {cure}"
        )
    if foretold.server_memory_bytes > MEMORY_BYTES_MAX:
        yield "server: one process holds all parameters, and few machines have so much memory"


def _site(pace: Timing, site: Site) -> SiteForecast:
    question = pace.question
    cycle, share, publishes = pace.round_seconds(site), pace.training_share(site), pace.publishes_per_second
    counted = site.workers * share / site.step_seconds if not pace.is_refused(site) else 0.0
    up = (question.delta_bytes + ROUND_UP_BYTES) / cycle + PUBLISH_UP_BYTES * publishes + HEARTBEAT_BYTES
    down = (question.publish_bytes + PUBLISH_DOWN_BYTES) * publishes + ROUND_DOWN_BYTES / cycle + BEAT_BYTES
    up, down = site.workers * up, site.workers * down
    return SiteForecast(
        name=site.name,
        steps_per_round=pace.steps_per_round(site),
        round_seconds=cycle,
        answer_seconds=pace.answer_seconds(site),
        receive_seconds=pace.receive_seconds(site),
        training_share=share,
        staleness=pace.staleness(site),
        up_bytes_per_round=question.delta_bytes,
        down_bytes_per_round=question.publish_bytes * publishes * cycle,
        up_bytes_per_second=up,
        down_bytes_per_second=down,
        up_busy=up / site.up,
        down_busy=down / site.down,
        steps_per_second=counted,
        samples_per_second=site.batch * counted,
    )


def _least_steps(question: Question, holds: Callable[[Timing], bool]) -> int:
    """The least H with which this holds; 0 where none does."""

    def holds_with(steps: int) -> bool:
        settings = replace(question.settings, steps_per_round=steps, seconds_per_round=0.0)
        return holds(Timing.of(replace(question, settings=settings), is_plain=True))

    high = 1
    while not holds_with(high):
        high *= 2
        if high > STEPS_MAX:
            return 0
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds_with(middle) else (middle, high)
    return high


# --- memory and disk ---


def server_memory_bytes(question: Question) -> float:
    """Resident at the peak, with some workers far behind and some that have just come (tensors/model.py)."""
    n, workers = question.parameters, question.workers
    vectors = 4 * n * (2 + buffers(question.settings)) + n / 2  # θ, θ̂, momentum; what the run began with, at four bits
    publishing = 4 * n + 3 * question.publish_bytes  # the next θ̂, and the change coded, compressed and packed
    # Deltas lie on a shelf; of a few that are unpacked the coded bytes are let go. A mean of more needs a vector.
    merging = (min(workers, MERGED_AT_ONCE) + 1) * question.delta_bytes + (4 * n if workers > MERGED_AT_ONCE else 0.0)
    arriving = min(workers, uploads_at_once(question)) * question.delta_bytes
    held = max(4 * n, PUBLISHES_HELD_MIN * question.publish_bytes) + SNAPSHOTS * question.snapshot_bytes
    return PROCESS_BYTES + vectors + max(publishing, merging) + arriving + held


def server_disk_bytes(question: Question, deltas_per_merge: float, log_bytes: float = math.inf) -> float:
    """Checkpoints, and the log back to the older one of them, in whole segments, of which the newest has its room
    already. `log_bytes`: of the whole run, which is all kept with keep_log; infinite where that is not known."""
    checkpoint = 4 * question.parameters * (2 + buffers(question.settings)) + question.parameters / 2
    # The older of two, and up to the next: twice the distance of two checkpoints.
    needed = 2 * question.checkpoint_every * deltas_per_merge * question.delta_bytes
    kept = log_bytes if question.keep_log and math.isfinite(log_bytes) else min(log_bytes, needed)
    segments = 1 + math.ceil(kept / SEGMENT_BYTES) if log_bytes > SEGMENT_BYTES else 1
    return CHECKPOINTS * checkpoint + segments * SEGMENT_BYTES


def worker_memory_bytes(question: Question) -> float:
    """On the host: shadow, the next one, a target, deltas not merged yet, and the state of a coarse codec."""
    feedback = 2 if question.settings.codec_up in ("2bit", "topk") else 0
    return PROCESS_BYTES + 4 * question.parameters * (3 + feedback) + 2 * question.delta_bytes + question.publish_bytes
