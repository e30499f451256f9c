"""The counter between the user's thread, which trains, and the background thread, which talks.

Each side leaves things here and takes things away under one lock; neither ever waits for the other's work, except
where the training loop has nothing left that it may do: no sample leased, or a round stretched to its limit. Then it
waits here, and `doing` says for what.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hetero_async.core import ranges
from hetero_async.core.heartbeat import UNUSED, Usage
from hetero_async.core.ledger import SHARED
from hetero_async.core.probe import ProbeVerdict
from hetero_async.core.ranges import Ranges
from hetero_async.core.worker_events import Anchor, Vitals
from hetero_async.errors import HeteroAsyncError

# How often a waiting loop looks whether the background has died.
LOOK_SECONDS = 0.5
# Leases are asked for ahead. So many rounds' samples should lie ready beside those that the next round may be stretched
# to: what is left of the present one, and one more while a request is on its way. A server that falls silent then never
# makes the loop wait for samples before it has to wait for the answer to its delta.
ROUNDS_AHEAD = 2
# The quickest of so many answers says how far the server is; the others say what else held them up.
ANSWERS_KEPT = 8
# What a loop that has begun waits for.
FOR_ANSWER, FOR_SAMPLES = "waiting for the server", "waiting for samples"
# Weight of the newest step in the running mean of step times: about the last 20 steps count.
RATE_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """Where the parameters should stand, as the background computed it after `rounds` rounds were handed over."""

    flat: object  # a flat fp32 tensor; opaque here
    anchor: Anchor
    rounds: int
    buffers: object = ()  # of the model, as the run has them; opaque here


@dataclass(frozen=True, slots=True)
class Round:
    """A finished round on its way to the background."""

    delta: object  # a flat fp32 tensor; opaque here
    anchor: Anchor
    steps: int
    ranges: Ranges
    buffers: object = None  # of the model, those that the round has changed; opaque here
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """Parameters to be measured, and which ones they are."""

    flat: object  # a flat fp32 tensor; opaque here
    anchor: Anchor
    buffers: object = ()  # of the run; opaque here


class Desk:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._lock = threading.Condition()
        self._leases: Ranges = ()
        self._ahead: Ranges = ()  # reserved: their samples are being fetched, and no step may have used them
        self._consumed: Ranges = ()  # drawn since the last cut
        self._tokens = 0  # in them
        self._handed_over: dict[int, Ranges] = {}  # by round; not in the outbox yet
        self._is_dry = False  # the server has no free position left
        self._target: Target | None = None
        self._published: Published | None = None
        self._window = self._served_window = 0  # the present one, and the last that a round was cut for
        self._deadline: float | None = None
        self._cut_at = 0.0
        self._answer_seconds: deque[float] = deque(maxlen=ANSWERS_KEPT)  # from cuts to their answers
        self._is_overdue = False
        self._seconds_per_step = 0.0
        self._last_step: float | None = None
        self._began: float | None = None  # with the first batch
        self._waited = {FOR_ANSWER: 0.0, FOR_SAMPLES: 0.0}  # seconds
        self._waiting: tuple[str, float] | None = None  # for what, and since when
        self._error: HeteroAsyncError | None = None
        self.hand_over: Callable[[Round], None] = lambda _: None  # set by the background before it lets anybody train
        self.doing = "joining"
        self.waiting = ""  # why the server does not let us train yet
        self.seed = self.samples = self.steps = self.batch = self.dataset_samples = 0
        self.data = SHARED
        self.evaluates_every = 0.0
        self.round_steps = 0
        self.rounds = 0
        self.steps_per_round = 1
        self.stretch = 0
        self.is_busy = False  # a push is unanswered
        self.must_wait = False  # a synchronous run waits for its merge
        self.is_spoilt = False  # the parameters cannot be used: begin again from the next target
        self.is_finished = False
        self.progress = 0.0
        self.anchor = Anchor()  # what the parameters stand on
        self.lacks_initial = False  # the run's initial parameters are on their way
        self.verdict: ProbeVerdict | None = None  # the server's on our probe

    # --- the training side ---

    def draw(self, count: int) -> list[int] | None:
        """`count` leased positions, fewer only at the run's end; empty when there are none yet, None when finished."""
        with self._lock:
            drawn = self._take(count)
            self._consumed = ranges.union(self._consumed, drawn or ())
            return _positions(drawn)

    def reserve(self, count: int) -> list[int] | None:
        """As `draw`, for samples that are fetched ahead: they are drawn when they are consumed."""
        with self._lock:
            reserved = self._take(count)
            self._ahead = ranges.union(self._ahead, reserved or ())
            return _positions(reserved)

    def _take(self, count: int) -> Ranges | None:
        self._raise_error()
        self._began = self._clock() if self._began is None else self._began
        if self.is_finished:
            return None
        if ranges.size(self._leases) < count and not self._is_dry:
            return ()
        if not (self._leases or self._ahead) and self._consumed and self.round_steps == 0:
            # The last batches, and no step came of them (accumulated, or skipped by a scaler): only a step can report
            # them, so they are drawn again until there is one.
            self._leases, self._consumed, self._tokens = self._consumed, (), 0
        taken, self._leases = ranges.take(self._leases, count)
        return taken

    def consume(self, positions: Sequence[int]) -> bool:
        """Whether these may still be trained on: since they were reserved they may have been leased to others."""
        drawn = ranges.normal((position, position + 1) for position in positions)
        with self._lock:
            if not ranges.contains(self._ahead, drawn):
                return False
            self._ahead = ranges.difference(self._ahead, drawn)
            self._consumed = ranges.union(self._consumed, drawn)
            return True

    def count_tokens(self, tokens: int) -> None:
        """Of the batch that was drawn last."""
        with self._lock:
            self._tokens += tokens

    def count_step(self) -> None:
        now = self._clock()
        with self._lock:
            if self._last_step is not None:
                took = now - self._last_step
                known = self._seconds_per_step
                self._seconds_per_step = took if known == 0 else known + RATE_WEIGHT * (took - known)
            self._last_step = now
            self.steps += 1
            self.round_steps += 1

    @property
    def is_dry(self) -> bool:
        """Whether the server has no more samples to give."""
        return self._is_dry

    def is_round_due(self) -> bool:
        """With the last step that leaves the delta time to be at the server by the window's deadline; after the
        assigned steps where there is none; at last when stretched out.

        News of a deadline have been on their way as long as a delta will be, so a whole answer's time is set aside.
        """
        with self._lock:
            if self.round_steps == 0 or not self._consumed or self.is_busy:
                return False
            if self._is_overdue:
                return True
            if self._deadline is not None and self.round_steps < max(1, self.stretch) * self.steps_per_round:
                ahead = self._seconds_per_step + min(self._answer_seconds, default=0.0)
                return self._clock() + ahead > self._deadline
            return self.round_steps >= self.steps_per_round

    def is_stretched_out(self) -> bool:
        """Whether the loop must wait before its next step."""
        with self._lock:
            stretched = self.is_busy and self.round_steps >= self.stretch * self.steps_per_round
            return (stretched or self.must_wait) and not self.is_finished

    def can_flush(self) -> bool:
        """Whether there is an unfinished round and nothing left to go on with, so that it should be cut now."""
        with self._lock:
            return self._is_dry and self.round_steps > 0 and bool(self._consumed) and not self.is_busy

    def cut(self, delta: object, buffers: object = None) -> None:
        """Hand the round over. The background takes it from here."""
        with self._lock:
            finished = Round(delta, self.anchor, self.round_steps, self._consumed, buffers, self._tokens)
            self._consumed, self._tokens, self.round_steps = (), 0, 0
            self.rounds += 1
            self._handed_over[self.rounds] = finished.ranges
            self.is_busy = True
            self._cut_at = self._clock()
            if self._is_overdue:
                self._is_overdue = False  # it was the last window's, and the present one goes on
            elif self._deadline is not None:
                self._served_window, self._deadline = self._window, None
        self.hand_over(finished)

    def begin_again(self) -> None:
        """The parameters were spoilt and are the run's again. What is drawn is not reported: it will be leased anew."""
        with self._lock:
            self._consumed, self._tokens, self.round_steps = (), 0, 0
            self.is_spoilt = False

    def take_target(self) -> Target | None:
        """The newest target, if no round was cut since it was computed: then it would lack that round's delta."""
        with self._lock:
            target, self._target = self._target, None
            return target if target is not None and target.rounds == self.rounds else None

    def take_published(self) -> Published | None:
        """What is to be measured, between two rounds: while one is under way it would grow old."""
        with self._lock:
            if self.round_steps > 0 and not self.is_finished:
                return None
            published, self._published = self._published, None
            return published

    @contextlib.contextmanager
    def stepping_aside(self, doing: str) -> Iterator[None]:
        """What is done in here is no step: it says nothing about the worker's speed, and its windows pass by."""
        was, self.doing = self.doing, doing
        try:
            yield
        finally:
            with self._lock:
                self.doing, self._last_step = was, None
                self._is_overdue &= self.round_steps > 0

    def wait(self, why: str) -> None:
        """Wait until the background has left something, and say why in the meantime."""
        with self._lock:
            self._raise_error()
            was, self.doing = self.doing, why
            self.waited()
            self._waiting = why, self._clock()
            self._lock.wait(LOOK_SECONDS)
            self._waited, self._waiting = self._waited_by(self._clock()), None
            self.doing = was
            self._raise_error()

    def waited(self) -> None:
        """A wait is not a slow step."""
        with self._lock:
            self._last_step = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the background's side ---

    def vitals(self, bytes_up: int, bytes_down: int, link: Usage = UNUSED) -> Vitals:
        """`link`: what it alone is known of; the loop's times are added here."""
        with self._lock:
            now = self._clock()
            waited = self._waited_by(now)
            loop_seconds = 0.0 if self._began is None else now - self._began
            round_samples = self.steps_per_round * self.batch
            ahead = (ROUNDS_AHEAD + self.stretch) * round_samples
            left = ranges.size(self._leases) + ranges.size(self._ahead)
            return Vitals(
                doing=self.doing,
                steps=self.steps,
                steps_per_second=1 / self._seconds_per_step if self._seconds_per_step else 0.0,
                bytes_up=bytes_up,
                bytes_down=bytes_down,
                held=ranges.union(self._leases, self._reserved()),
                undrawn_samples=left,
                wanted_samples=ahead + round_samples - left if left < ahead else 0,
                batch=max(1, self.batch),
                dataset_samples=self.dataset_samples,
                usage=replace(
                    link,
                    training_seconds=max(0.0, loop_seconds - sum(waited.values())),
                    answer_wait_seconds=waited[FOR_ANSWER],
                    sample_wait_seconds=waited[FOR_SAMPLES],
                ),
                data=self.data,
                evaluates_every=self.evaluates_every,
            )

    def _waited_by(self, now: float) -> dict[str, float]:
        """The wait that goes on included. One that is no part of the loop is not counted."""
        waited = dict(self._waited)
        if self._waiting is not None and self._waiting[0] in waited:
            why, since = self._waiting
            waited[why] += now - since
        return waited

    def _drawn(self) -> Ranges:
        """In the unfinished round, or in one that is being encoded."""
        return ranges.normal(stretch for drawn in (self._consumed, *self._handed_over.values()) for stretch in drawn)

    def _reserved(self) -> Ranges:
        return ranges.union(self._ahead, self._drawn())

    def grant(self, granted: Ranges, samples: int) -> None:
        with self._lock:
            self.samples = samples
            self._is_dry = not granted
            # What was lost in a new join, though drawn already, may come back to us: it is not drawn a second time.
            self._leases = ranges.union(self._leases, ranges.difference(granted, self._reserved()))
            self._lock.notify_all()

    def regrant(self, held: Ranges) -> None:
        """After a new join only these are still leased; what is already drawn stays drawn and may be refused."""
        with self._lock:
            self._ahead = ranges.intersection(self._ahead, held)
            self._leases = ranges.difference(held, self._reserved())
            self._lock.notify_all()

    def pace(self, window: int, seconds_left: float | None, steps: int) -> None:
        """The present window's end, from now, or None; and the steps expected until then.

        The news of the next window may be faster than our own look at the clock: the old one is overdue then.
        """
        with self._lock:
            self._is_overdue |= window > self._window and self._deadline is not None
            if window < self._window:
                self._served_window = 0  # another process of the server counts anew
            self._window = window
            is_open = seconds_left is not None and window > self._served_window
            self._deadline = self._clock() + (seconds_left or 0.0) if is_open else None
            self.steps_per_round = steps

    def offer_target(self, target: Target) -> None:
        with self._lock:
            self._target = target
            self._lock.notify_all()

    def offer_published(self, published: Published) -> None:
        with self._lock:
            self._published = published
            self._lock.notify_all()

    def tell(self, *, rounds: int, in_flight: bool, unmerged: bool, progress: float) -> None:
        """How it stands with the first `rounds` rounds; one cut since then is in flight as well."""
        with self._lock:
            self._handed_over = {number: held for number, held in self._handed_over.items() if number > rounds}
            was_busy, self.is_busy = self.is_busy, in_flight or rounds < self.rounds
            if was_busy and not self.is_busy:
                self._answer_seconds.append(self._clock() - self._cut_at)
            self.must_wait = self.stretch == 0 and (unmerged or rounds < self.rounds)
            self.progress = progress
            self._lock.notify_all()

    def spoil(self) -> None:
        """A round has come to nothing that can be pushed."""
        with self._lock:
            self.is_spoilt = True

    def finish(self) -> None:
        with self._lock:
            self.is_finished = True
            self.progress = 1.0
            self._lock.notify_all()

    def fail(self, error: HeteroAsyncError, only_first: bool = False) -> None:
        with self._lock:
            if self._error is None or not only_first:
                self._error = error
            self._lock.notify_all()


def _positions(of: Ranges | None) -> list[int] | None:
    return None if of is None else [position for start, stop in of for position in range(start, stop)]
