"""How busy a worker's link is, and how much it carries while it is.

train.py tells it of each transfer's begin and end; both ways go on at once.
"""

from collections import deque
from statistics import median_low

from hetero_async.core.heartbeat import Usage

UP, DOWN = "up", "down"
# The rate of one transfer is an accident; so many also forget what the link was yesterday.
TRANSFERS_KEPT = 8
# So many tell what one takes.
KNOWN_FROM = 3


class Traffic:
    """Times are the caller's, in seconds."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # of what is under way
        self._busy_seconds, self._busy_since = 0.0, 0.0
        self._carried: dict[str, deque[tuple[int, float]]] = {
            way: deque(maxlen=TRANSFERS_KEPT) for way in (UP, DOWN)
        }  # bytes, and what they took

    def begin(self, way: str, now: float) -> None:
        """Also said of a transfer that is under way already."""
        if not self._since:
            self._busy_since = now
        self._since.setdefault(way, now)

    def end(self, way: str, now: float, carried_bytes: int = 0) -> None:
        """Also said when there is none. `carried_bytes` 0: it came to nothing."""
        since = self._since.pop(way, None)
        if since is None:
            return
        if carried_bytes:
            self._carried[way].append((carried_bytes, now - since))
        if not self._since:
            self._busy_seconds += now - self._busy_since

    def usage(self, now: float) -> Usage:
        busy = self._busy_seconds + (now - self._busy_since if self._since else 0.0)
        return Usage(
            link_busy_seconds=busy,
            upload_bytes_per_second=self._rate(UP),
            download_bytes_per_second=self._rate(DOWN),
            exchange_seconds=self._exchange_seconds(),
        )

    def _exchange_seconds(self) -> float:
        up, down = ([took for _, took in self._carried[way]] for way in (UP, DOWN))
        # The first that comes down is a snapshot, larger than what follows; and others' may be under way beside it.
        return median_low(up) + median_low(down) if min(len(up), len(down)) >= KNOWN_FROM else 0.0

    def _rate(self, way: str) -> float:
        carried = sum(size for size, _ in self._carried[way])
        seconds = sum(took for _, took in self._carried[way])
        return carried / seconds if seconds > 0 else 0.0
