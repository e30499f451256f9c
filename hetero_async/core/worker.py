"""The worker's half of the protocol: join, hold leases, offer deltas until answered, follow the publishes.

The same shape as the server's machine: `step(event)` in, `ready()` out, time in the events. It knows of deltas only
their headers (the bytes lie in the outbox) and of parameters only publish numbers.

Rules
1. A delta is saved to the outbox before the first word about it is sent; it stays there until answered.
2. One delta is offered at a time, in the order of their seq, with the same bytes each time.
3. A server of a lower term than one that was heard before is not heeded and is left, for it may answer for as long as
   it lives; that of a higher term is joined anew.
4. `unmerged` are the own deltas that the worker's shadow does not contain yet: acknowledged or not, never refused.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hetero_async.core import ranges
from hetero_async.core.evaluator import Evaluator, report_of
from hetero_async.core.messages import (
    INITIAL,
    PUBLISH,
    SNAPSHOT,
    Ack,
    Beat,
    Finished,
    Gone,
    Hello,
    Lease,
    Nack,
    Provide,
    PublishReady,
    Push,
    Redirect,
    Refused,
    Rejoin,
    Wait,
    Want,
    Welcome,
    Window,
)
from hetero_async.core.probe import ProbeVerdict
from hetero_async.core.prober import Prober
from hetero_async.core.ranges import Ranges
from hetero_async.core.worker_events import (
    Cut,
    Dropped,
    Evaluated,
    Event,
    Fetched,
    Heard,
    Measured,
    Owed,
    Reconnected,
    Tick,
    Vitals,
)

HELLO_EVERY_MS = 1_000
# Heartbeats are small; one a second makes a dead worker known well within any lease's time to live.
HEARTBEAT_EVERY_MS = 1_000
LEASE_EVERY_MS = 500
TURN_EVERY_MS = 1_000
# An offer without any sign of the receiver for so long was lost on the way.
OFFER_AGAIN_MS = 3_000
# The quickest of so many answers to a heartbeat says how far the server is; the others say what else held them up.
ROUND_TRIPS_KEPT = 8
LOST = "acknowledged by a server that was lost before any standby had it"


class Worker:
    def __init__(self, hello: Hello) -> None:
        """`hello` is what stays the same of it for all of this process's life."""
        self._hello = hello
        self.joined = False
        self.term = self.incarnation = self.seq = self.seed = 0
        self.codec = ""
        self.stretch = 0
        self.outbox: dict[int, Push] = {}
        self.unmerged: list[int] = []
        self.shadow = self.known_publish = -1
        self.shadow_term = 0
        self.oldest_publish = 0
        self.window = Window(number=0, milliseconds=0, steps=1)
        self.window_ms = 0  # when it was heard
        self.samples = self.trained = self.positions = 0
        self.last_publish: int | None = None  # set when the run is finished
        self.refusal = ""
        self.waiting = ""
        self._owed = Owed()
        self._hello_ms = self._beat_ms = self._lease_ms = self._offer_ms = self._turned_ms = -(10**9)
        self._asked_ms: int | None = None  # the oldest heartbeat that was not answered
        self._round_trips_ms: deque[int] = deque(maxlen=ROUND_TRIPS_KEPT)
        self._must_snapshot = False
        self._lease_number = self._attempt = 0
        self._acknowledged = Ack(seq=0, lsn=0)  # the newest
        self.evaluator = Evaluator()
        self.prober = Prober()

    def restore(self, outbox: Mapping[int, Push]) -> None:
        """Take over what an earlier life left unanswered."""
        self.outbox = dict(sorted(outbox.items()))
        self.unmerged = list(self.outbox)
        self.seq = max(self.outbox, default=0)

    def step(self, event: Event) -> None:
        match event:
            case Heard():
                self._notice_term(event.term)
                if event.term not in (0, self.term):
                    self._turn_away(event.now_ms)
                    return
                if event.term == 0 and isinstance(event.message, Wait):
                    self._turn_away(event.now_ms)
                if answer := _ANSWERS.get(type(event.message)):
                    answer(self, event.message, event.now_ms)
            case Measured():
                self._measured(event)
            case Evaluated():
                self._report(self.evaluator.evaluated(event, self.term))
            case Cut():
                self._cut(event)
            case Fetched():
                self._fetched(event)
            case Reconnected():
                self._offer_ms = self._hello_ms = self._beat_ms = -(10**9)
                self._asked_ms = None  # what was asked on the connection before is lost
            case Tick():
                self._tick(event.now_ms, event.vitals)

    def ready(self) -> Owed:
        owed, self._owed = self._owed, Owed()
        return owed

    # --- what can be read off it ---

    @property
    def in_flight(self) -> bool:
        return bool(self.outbox)

    @property
    def wanted(self) -> tuple[str, int] | None:
        """The next object to fetch: publish by publish, or a snapshot where that is fewer bytes or the only way."""
        if self.joined and self.shadow >= 0 and self.prober.is_lacking:
            return INITIAL, 0
        if not self.joined or self.shadow >= self.known_publish:
            return None
        if self.shadow < 0 or self._must_snapshot or self.oldest_publish > self.shadow + 1:
            return SNAPSHOT, self.known_publish
        return PUBLISH, self.shadow + 1

    @property
    def is_finished(self) -> bool:
        return self.last_publish is not None and self.shadow >= self.last_publish

    @property
    def progress(self) -> float:
        return self.trained / self.positions if self.positions else 0.0

    # --- joining ---

    def _notice_term(self, term: int) -> None:
        if term > self.term:
            self.term, self.last_publish = term, None
            if self.joined:
                self._join_anew("joining a new server")

    def _join_anew(self, why: str) -> None:
        self.joined, self.waiting = False, why
        self._attempt += 1
        self._hello_ms = -(10**9)

    def _turn_away(self, now_ms: int) -> None:
        """From whoever knows of no server either, or is deposed; not faster than a server is found."""
        if now_ms - self._turned_ms >= TURN_EVERY_MS:
            self._turned_ms = now_ms
            self._owed.turn = ""

    def _redirect(self, redirect: Redirect, now_ms: int) -> None:
        if not redirect.server:
            self._turn_away(now_ms)
        elif redirect.term >= self.term:
            self._owed.turn = redirect.server

    def _welcome(self, welcome: Welcome, now_ms: int) -> None:
        if (welcome.life, welcome.attempt) != (self._hello.life, self._attempt) or self.joined:
            return  # of another process with our key, or an earlier attempt of ours
        self.joined, self.waiting = True, ""
        self.incarnation, self.seed = welcome.incarnation, welcome.seed
        self.codec, self.stretch = welcome.codec, welcome.stretch
        self.seq = max(self.seq, welcome.last_seq)
        self.known_publish = welcome.publish
        if self.shadow > welcome.common:
            self.shadow = -1  # what we stand on is not the run's any more: begin again from a snapshot
        self.evaluator.joined(welcome.common)
        self.prober.joined()
        self.outbox = {seq: replace(push, incarnation=welcome.incarnation) for seq, push in self.outbox.items()}
        for seq in [seq for seq in self.unmerged if seq > welcome.last_seq and seq not in self.outbox]:
            self.unmerged.remove(seq)
            self._owed.drops.append(Dropped(seq, LOST))
        reported = ranges.normal(stretch for push in self.outbox.values() for stretch in push.ranges)
        self._lease_number = max(self._lease_number + 1, welcome.incarnation << 32)  # fits no answer to a life before
        self._owed.regranted = ranges.difference(welcome.granted, reported)
        self._beat_ms = self._offer_ms = -(10**9)

    def _provide(self, provide: Provide, now_ms: int) -> None:
        self._owed.provide = True
        self.waiting = "sending the initial parameters"

    def _wait(self, wait: Wait, now_ms: int) -> None:
        self.waiting = wait.reason

    def _rejoin(self, rejoin: Rejoin, now_ms: int) -> None:
        if rejoin.incarnation == self.incarnation:
            self._join_anew(rejoin.reason)

    def _refused(self, refused: Refused, now_ms: int) -> None:
        # While we join anew, what we said before may be answered still: that another has joined, which was us.
        is_meant = refused.incarnation == 0 or (self.joined and refused.incarnation == self.incarnation)
        if is_meant and refused.life == self._hello.life:
            self._join_anew("joining the server anew")
        elif is_meant:
            self.refusal = refused.reason

    # --- deltas ---

    def _cut(self, cut: Cut) -> None:
        self.seq += 1
        push = Push(
            incarnation=self.incarnation,
            seq=self.seq,
            anchor=cut.anchor.publish,
            anchor_term=cut.anchor.term,
            steps=cut.steps,
            ranges=cut.ranges,
            codec=cut.codec,
            tokens=cut.tokens,
            payload_bytes=cut.payload_bytes,
            payload_hash=cut.payload_hash,
        )
        self._owed.saves.append(push)
        self.outbox[self.seq] = push
        self.unmerged.append(self.seq)
        if len(self.outbox) == 1:
            self._offer(cut.now_ms)

    def _offer(self, now_ms: int) -> None:
        head = next(iter(self.outbox.values()), None)
        if head is not None and self.joined:
            self._owed.bulk.append(head)
            self._offer_ms = now_ms

    def _ack(self, ack: Ack, now_ms: int) -> None:
        if ack.seq > self._acknowledged.seq:
            self._acknowledged = ack
        self._answered(Dropped(ack.seq), now_ms)

    def _nack(self, nack: Nack, now_ms: int) -> None:
        if nack.seq in self.outbox:
            self.unmerged.remove(nack.seq)
        self._answered(Dropped(nack.seq, nack.reason or "refused"), now_ms)

    def _answered(self, dropped: Dropped, now_ms: int) -> None:
        if self.outbox.pop(dropped.seq, None) is not None:
            self._owed.drops.append(dropped)
            self._offer(now_ms)

    def _want(self, want: Want, now_ms: int) -> None:
        self._offer_ms = now_ms

    def _measured(self, measured: Measured) -> None:
        if self.joined and self.shadow >= 0:
            self._report(Evaluated(publish=self.shadow, figures=((measured.name, measured.value),)), False)

    def _report(self, told: Evaluated | None, is_evaluation: bool = True) -> None:
        if told is not None and self.joined:
            self._owed.control.append(report_of(told, self.incarnation, is_evaluation))

    def _verdict(self, verdict: ProbeVerdict, now_ms: int) -> None:
        self.prober.answered(verdict)
        if verdict.is_refused:
            self.refusal = verdict.reason

    # --- publishes ---

    def _fetched(self, fetched: Fetched) -> None:
        if fetched.kind == INITIAL:
            self.prober.is_lacking = False
            return
        # What came late from an earlier server may not be the run's: this one has said before what they have in common.
        self.shadow = fetched.number if fetched.term == self.term else -1
        self.shadow_term = fetched.term
        self._must_snapshot = False
        self.unmerged = [seq for seq in self.unmerged if seq > fetched.merged_seq]
        for seq in [seq for seq in self.outbox if seq <= fetched.merged_seq]:
            # Merged, so it was admitted and durable: the acknowledgement itself was lost on the way.
            del self.outbox[seq]
            self._owed.drops.append(Dropped(seq))

    def _publish_ready(self, ready: PublishReady, now_ms: int) -> None:
        self.known_publish = max(self.known_publish, ready.number)
        if ready.evaluate:
            self._report(self.evaluator.asked(ready.number))

    def _beat(self, beat: Beat, now_ms: int) -> None:
        self.known_publish = max(self.known_publish, beat.publish)
        self.oldest_publish = beat.oldest
        self.trained, self.positions = beat.trained, beat.positions
        if self._asked_ms is not None:
            self._round_trips_ms.append(max(1, now_ms - self._asked_ms))  # 0 is said where none is known
            self._asked_ms = None
        self._report(self.evaluator.asked(beat.evaluate))

    def _gone(self, gone: Gone, now_ms: int) -> None:
        self._must_snapshot |= gone.kind != INITIAL
        self.prober.is_lacking &= gone.kind != INITIAL

    def _finished(self, finished: Finished, now_ms: int) -> None:
        self.last_publish = finished.publish
        self.known_publish = max(self.known_publish, finished.publish)
        self.trained = self.positions

    # --- leases and windows ---

    def _lease(self, lease: Lease, now_ms: int) -> None:
        if not self.joined:
            return  # a new server's answer to the life before: it is not in the claims that we join with
        if lease.number != self._lease_number:
            return  # asked before we knew what we know now: it may name positions that are trained already
        self._lease_number += 1  # a request is made again until it is answered, and its first answer is taken
        self.samples = lease.samples
        self._owed.granted.append(lease.ranges)

    def _window(self, window: Window, now_ms: int) -> None:
        self.window, self.window_ms = window, now_ms

    # --- time ---

    def _tick(self, now_ms: int, vitals: Vitals) -> None:
        if self.refusal:
            return
        if not self.joined:
            self._say_hello(now_ms, vitals)
            return
        if now_ms - self._beat_ms >= HEARTBEAT_EVERY_MS:
            self._beat_ms = now_ms
            self._asked_ms = now_ms if self._asked_ms is None else self._asked_ms
            round_trip_ms = min(self._round_trips_ms, default=0)
            self._owed.control.append(vitals.heartbeat(self.incarnation, max(0, self.shadow), round_trip_ms))
        self._owed.control += self.prober.due(self.incarnation, now_ms)
        # The vitals know nothing yet of what is on its way to the loop; what we do not hold would be granted again.
        is_answered = bool(self._owed.granted) or self._owed.regranted is not None
        is_lacking = vitals.wanted_samples > 0 and not is_answered and self.last_publish is None
        if is_lacking and now_ms - self._lease_ms >= LEASE_EVERY_MS:
            self._lease_ms = now_ms
            self._owed.control.append(vitals.lease_request(self.incarnation, self._lease_number, self._held(vitals)))
        if self.outbox and now_ms - self._offer_ms >= OFFER_AGAIN_MS:
            self._offer(now_ms)

    def _say_hello(self, now_ms: int, vitals: Vitals) -> None:
        if now_ms - self._hello_ms < HELLO_EVERY_MS:
            return
        self._hello_ms = now_ms
        self._owed.control.append(
            replace(
                self._hello,
                attempt=self._attempt,
                last_seq=self.seq,
                claims=self._held(vitals),
                shadow_term=self.shadow_term,
                acknowledged=self._acknowledged.seq,
                receipt=self._acknowledged.receipt,
                is_warm=self._hello.is_warm or vitals.steps > 0,
            )
        )

    def _held(self, vitals: Vitals) -> Ranges:
        """All that is leased to us as far as we know: not drawn yet, drawn, or on its way in a delta."""
        return ranges.normal([*vitals.held, *(stretch for push in self.outbox.values() for stretch in push.ranges)])


_ANSWERS: dict[type, Callable[[Worker, Any, int], None]] = {
    Welcome: Worker._welcome,
    Provide: Worker._provide,
    Wait: Worker._wait,
    Rejoin: Worker._rejoin,
    Redirect: Worker._redirect,
    Refused: Worker._refused,
    Ack: Worker._ack,
    Nack: Worker._nack,
    ProbeVerdict: Worker._verdict,
    Want: Worker._want,
    PublishReady: Worker._publish_ready,
    Beat: Worker._beat,
    Gone: Worker._gone,
    Finished: Worker._finished,
    Lease: Worker._lease,
    Window: Worker._window,
}
