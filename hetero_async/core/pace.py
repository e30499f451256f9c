"""When to merge, and how many steps each worker should do until then.

DyLU (Liu et al. 2024, arXiv 2401.09135, §5): a worker's steps per round follow its measured speed, so that rounds last
equally long everywhere and a deadline costs nobody any waiting. Policies:

window    deadlines at equal distances, for which everybody pushes what it has; the merge comes when all have
          arrived, or the deadline's grace is over. A delta that comes later joins the next merge. Over thin links
          windows last longer, so that half of a round at least is trained on what the last one came to.
per-push  every delta is merged at once.
all       a merge waits for every worker that holds a lease: synchronous DiLoCo, the yardstick.

Nothing here is state: what comes of it is written in `Stepped`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median_high

from hetero_async.core.records import RunSettings

# A window shorter than this would be all overhead; a run whose steps take microseconds gets longer rounds.
WINDOW_MS_MIN = 50
# While a delta and the publish that it is in are under way, a worker trains on what it knew before, and workers drift
# apart. At up to this share of a round a merge takes back what drift there was: what is steep is in balance by the end
# of the round. Beyond it drift adds up; longer rounds, up to so many times, cost less.
EXCHANGE_SHARE_MAX = 0.5
LONGER_MAX = 4.0
# A window is at most so many times as long as the last one: the first figures of speeds and links are the worst, and
# leases are as large as rounds.
GROWTH_MAX = 1.5
# So many times as long as the speeds that are known now would have it, an open window is shortened.
OVERLONG = 2


def reference_rate(rates: Iterable[float]) -> float:
    """The 90th percentile of the known speeds (the fastest of up to nine), 0 when none is known."""
    known = sorted(rate for rate in rates if rate > 0)
    return known[min(len(known) - 1, int(0.9 * len(known)))] if known else 0.0


def rounds_longer(exchanges: Iterable[float], reference: float, settings: RunSettings) -> float:
    """How many times as long as `steps_per_round` rounds are to last, by the median of what workers' exchanges take (of
    two the longer one; seconds, 0: unknown)."""
    known = [seconds for seconds in exchanges if seconds > 0]
    if settings.merge != "window" or settings.seconds_per_round > 0 or reference <= 0 or not known:
        return 1.0
    needed = median_high(known) / EXCHANGE_SHARE_MAX * reference / settings.steps_per_round
    return min(LONGER_MAX, max(1.0, needed))


def steps_for(rate: float, reference: float, settings: RunSettings, longer: float = 1.0) -> int:
    """H of a worker: as many steps as it does while the reference worker does `longer` times `steps_per_round`."""
    if settings.seconds_per_round > 0:
        return max(1, round(rate * settings.seconds_per_round)) if rate > 0 else settings.steps_per_round
    most = int(longer * settings.steps_per_round)
    if rate <= 0 or reference <= 0 or not settings.dylu:
        return most
    return max(1, min(most, int(most * rate / reference)))


@dataclass(slots=True)
class Windows:
    """The deadlines of policy `window`. Before any speed is known there is none: workers push after their steps."""

    number: int = 0
    deadline_ms: int | None = None
    merge_ms: int | None = None  # set while a closed window waits for its stragglers
    longer: float = 1.0  # than the settings have it

    def advance(self, now_ms: int, reference: float, settings: RunSettings, exchanges: Iterable[float] = ()) -> bool:
        """Close the window whose deadline has passed and open the next. True when there is a deadline to be told."""
        if reference <= 0:  # nobody trains: a deadline that nobody moves would be due for ever
            self.deadline_ms = None
            return False
        if self.deadline_ms is None or now_ms >= self.deadline_ms:
            self.longer = min(GROWTH_MAX * self.longer, rounds_longer(exchanges, reference, settings))
        length = self.length_ms(reference, settings, self.longer)
        if self.deadline_ms is None:
            self.number, self.deadline_ms = 1, now_ms + length
            return True
        if now_ms < self.deadline_ms:
            # After a restart the first speed that is heard may be the slowest one's.
            if is_overlong := self.deadline_ms - now_ms > OVERLONG * length:
                self.deadline_ms = now_ms + length
            return is_overlong
        self.merge_ms = self.deadline_ms + int(settings.grace * length)
        self.number += 1
        # After a pause (a full disk, a frozen process) deadlines go on from now instead of rushing to catch up.
        self.deadline_ms = max(self.deadline_ms, now_ms - length // 2) + length
        return True

    def is_due(self, now_ms: int) -> bool:
        """Whether the closed window's grace is over."""
        return self.merge_ms is not None and now_ms >= self.merge_ms

    def merged(self) -> None:
        self.merge_ms = None

    def left_ms(self, now_ms: int) -> int:
        """Milliseconds until the deadline; 0 when there is none."""
        return 0 if self.deadline_ms is None else max(1, self.deadline_ms - now_ms)

    @staticmethod
    def length_ms(reference: float, settings: RunSettings, longer: float = 1.0) -> int:
        seconds = settings.seconds_per_round or longer * settings.steps_per_round / reference
        return max(WINDOW_MS_MIN, int(1000 * seconds))
