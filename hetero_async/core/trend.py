"""Where a run is heading, as one process has seen it: the curves of its figures, and how fast it trains of late.

Not state: it begins with the records that a recovery reads, and nothing is decided by it. status.py shows it.
"""

from collections import deque

from hetero_async.core import ranges
from hetero_async.core.records import Delta, Entry, Metric

# More than a line of a terminal shows.
CURVE_POINTS_MAX = 64
# Speed is taken over so long; where rounds are long, over so many deltas at least.
RATE_MS = 180_000
RATE_DELTAS_MIN = 16
LOOK_EVERY_MS = 1_000

Point = tuple[int, float]  # version, value


class Curve:
    """All that one figure was: when there are too many points, each stands for twice as many and shows the newest."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.lowest: Point | None = None
        self.highest: Point | None = None
        self._each = 1  # a point stands for so many values
        self._in_newest = 0

    def add(self, version: int, value: float) -> None:
        if self.lowest is None or value < self.lowest[1]:
            self.lowest = version, value
        if self.highest is None or value > self.highest[1]:
            self.highest = version, value
        if self.points and self._in_newest < self._each:
            self.points[-1] = version, value
        else:
            if len(self.points) == CURVE_POINTS_MAX:
                self.points = self.points[1::2]
                self._each *= 2
            self.points.append((version, value))
            self._in_newest = 0
        self._in_newest += 1


class Trend:
    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self._samples = 0  # of all deltas seen
        self._looks: deque[tuple[int, int]] = deque()  # when, and how many they were then

    def see(self, entry: Entry, now_ms: int | None = None) -> None:
        """An entry that was applied. `now_ms` None: it is of the past, and nobody knows when it was."""
        match entry.record:
            case Metric(name=name, version=version, value=value):
                self.curves.setdefault(name, Curve()).add(version, value)
            case Delta() as delta if now_ms is not None:
                self._samples += ranges.size(delta.ranges)
                if not self._looks or now_ms - self._looks[-1][0] >= LOOK_EVERY_MS:
                    self._looks.append((now_ms, self._samples))

    def samples_per_second(self, now_ms: int) -> float:
        """Over the last minutes; 0 while that is not known. It falls while nothing comes in."""
        while len(self._looks) > RATE_DELTAS_MIN and self._looks[0][0] < now_ms - RATE_MS:
            self._looks.popleft()
        if not self._looks or now_ms <= self._looks[0][0]:
            return 0.0
        since_ms, samples = self._looks[0]
        return 1000 * (self._samples - samples) / (now_ms - since_ms)
