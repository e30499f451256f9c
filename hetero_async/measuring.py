"""What a run has been like, in the figures that a plan has: read off its log and its histories, for `plan --against`.

Reads only; the run may have ended, be dead, or go on. The log says how large and how stale deltas were, the history
what was when; only the run's middle counts, in which all train.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, linear_regression

from hetero_async.core import ranges
from hetero_async.core.records import Delta, Stepped
from hetero_async.errors import UserError
from hetero_async.remains import oldest_start
from hetero_async.replay import fold, start_of
from hetero_async.reporting import history_at, places
from hetero_async.watch.history import SENDING, STATES, TRAINING, WAITING, Series
from hetero_async.watch.outcome import Outcome, SiteOutcome

# Of the samples that are trained: before it workers join, after it the last leases are used up.
STEADY = (0.25, 0.9)
# With fewer merges in it, where it begins and ends would decide.
MERGES_MIN = 8


def outcome_of(place: Path) -> Outcome:
    """Of the run that `place` names, as `report` takes it. Raises ConfigError, UserError, LogCorrupt."""
    log, directories = places(place)
    whole = history_at(directories).whole
    if not whole.slots:
        raise UserError(f"{place}: nobody noted what was when: there is no history.json beside its log")
    trained = whole.figures["trained"]
    low, high = (share * trained[-1] for share in STEADY)
    first, last = bisect_left(trained, low), min(bisect_left(trained, high), len(trained) - 1)
    merges = int(whole.figures["version"][last] - whole.figures["version"][first])
    if merges < MERGES_MIN:
        raise UserError(f"{place}: too short to be measured: {merges} merges while it was steady, not {MERGES_MIN}")
    read = _Read(log)
    sizes, ages = ([value for at, value in noted if low <= at <= high] for noted in (read.sizes, read.ages))
    steady = _Stretch(whole, first, last)
    return Outcome(
        seconds=steady.seconds[-1] - steady.seconds[0],
        merges=merges,
        sites=tuple(steady.site(name) for name in sorted(whole.carried)),
        samples_per_second=steady.rate(trained),
        merges_per_second=steady.rate(whole.figures["version"]),
        delta_bytes=fmean(sizes) if sizes else math.nan,
        staleness=fmean(ages) if ages else math.nan,
        server_memory_bytes=max(whole.figures["memory_bytes"]) or math.nan,
        server_disk_bytes=max(whole.figures["disk_bytes"]) or math.nan,
        run_seconds=_run_seconds(whole) if read.is_finished else math.nan,
    )


class _Stretch:
    """The columns from `first` to `last`."""

    def __init__(self, whole: Series, first: int, last: int) -> None:
        self._whole = whole
        self._columns = slice(first, last + 1)
        self.seconds = [slot * whole.step_seconds for slot in whole.slots[self._columns]]

    def rate(self, totals: Sequence[float]) -> float:
        """How much more there is a second: the slope of all columns, since what comes in bursts would make that from
        the first to the last one a matter of where they lie."""
        return linear_regression(self.seconds, totals[self._columns]).slope

    def site(self, name: str) -> SiteOutcome:
        sent, received = zip(*self._whole.carried[name], strict=True)
        letters = dict.fromkeys(STATES, 0)
        for shares in self._whole.sites.get(name, [])[self._columns]:
            for letter, share in zip(STATES, shares, strict=True):
                letters[letter] += share
        training, waiting = letters[TRAINING] + letters[SENDING], letters[WAITING]
        return SiteOutcome(
            name=name,
            up_bytes_per_second=self.rate(sent),
            down_bytes_per_second=self.rate(received),
            training_share=training / (training + waiting) if training + waiting else math.nan,
        )


class _Read:
    """What the log says of deltas: bytes of each that came, staleness of each that was merged, both with the samples
    that were trained by then."""

    def __init__(self, log: Path) -> None:
        checkpoint, entries = oldest_start(log, with_arrays=False)
        state = start_of(checkpoint)
        anchors = {lsn: pending.anchor_version for lsn, pending in state.pending.items()}
        self.sizes: list[tuple[int, int]] = []
        self.ages: list[tuple[int, int]] = []
        for entry in entries:
            fold(entry, state)
            trained = ranges.size(state.ledger.trained)
            match entry.record:
                case Delta(anchor_version=anchor):
                    anchors[entry.lsn] = anchor
                    self.sizes.append((trained, len(entry.payload)))
                case Stepped(deltas=deltas, version=version):
                    self.ages += [(trained, version - anchors.pop(lsn) - 1) for lsn in deltas]
        self.is_finished = state.is_finished


def _run_seconds(whole: Series) -> float:
    """From the first worker to the last sample; NaN where nobody saw it begin."""
    trained = whole.figures["trained"]
    seen = [any(map(sum, shares)) for shares in zip(*whole.sites.values(), strict=True)]
    if trained[0] or True not in seen:
        return math.nan
    return float((whole.slots[bisect_left(trained, trained[-1])] - whole.slots[seen.index(True)]) * whole.step_seconds)
