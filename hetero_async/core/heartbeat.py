"""A worker's heartbeat: that it lives, how far it is, what became of its time; and what a server reads off several.

The worker's machine says it, the server's hears it (members.py) and shows it (status.py). Nothing is decided by it but
how long rounds are (pace.py).
"""

from collections import deque
from dataclasses import dataclass

# Shares of time are of so long: enough for a few rounds, little enough to notice that a link has become slow.
LATELY_MS = 60_000
NOTE_EVERY_MS = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What became of a worker's time since its loop began, and what its link is able to.

    A loop trains or waits. Its link is busy beside that: while a delta is on its way to its answer, or a publish here.
    """

    training_seconds: float = 0.0
    answer_wait_seconds: float = 0.0  # a round stretched to its limit waited for the server
    sample_wait_seconds: float = 0.0  # no sample was leased
    link_busy_seconds: float = 0.0
    upload_bytes_per_second: float = 0.0  # of the newest transfers; 0: there was none yet
    download_bytes_per_second: float = 0.0
    exchange_seconds: float = 0.0  # of a delta to its answer, and of a publish here; 0: not both are known yet
    round_trip_seconds: float = 0.0  # from a heartbeat to its answer; 0: there was none yet

    @property
    def loop_seconds(self) -> float:
        return self.training_seconds + self.answer_wait_seconds + self.sample_wait_seconds


UNUSED = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """I live, and this is how it goes; answered by `Beat`."""

    incarnation: int
    state: str
    steps: int  # optimizer steps in this life
    steps_per_second: float
    publish: int  # the publish that the model stands on
    bytes_up: int
    bytes_down: int
    evaluates_every: float = 0.0  # a share of the run; 0: its script has nothing to evaluate with
    usage: Usage = UNUSED


class Lately:
    """How the last minute of one life was spent, from its heartbeats."""

    def __init__(self) -> None:
        self._noted: deque[tuple[int, Usage]] = deque()
        self._newest = UNUSED

    def note(self, now_ms: int, usage: Usage) -> None:
        self._newest = usage
        if not self._noted or now_ms - self._noted[-1][0] >= NOTE_EVERY_MS:
            self._noted.append((now_ms, usage))
        while len(self._noted) > 1 and self._noted[1][0] <= now_ms - LATELY_MS:
            self._noted.popleft()

    def shares(self) -> dict[str, float] | None:
        """Of the loop's time, each 0 … 1: training, waiting for an answer, for samples; and of its link's. None: no
        time has passed yet."""
        if not self._noted:
            return None
        new, old = self._newest, self._noted[0][1]
        seconds = new.loop_seconds - old.loop_seconds
        if seconds <= 0:
            return None
        spent = {
            "training": new.training_seconds - old.training_seconds,
            "answer_wait": new.answer_wait_seconds - old.answer_wait_seconds,
            "sample_wait": new.sample_wait_seconds - old.sample_wait_seconds,
            "link": new.link_busy_seconds - old.link_busy_seconds,
        }
        # A worker says what it likes.
        return {what: round(min(1.0, max(0.0, part / seconds)), 4) for what, part in spent.items()}
