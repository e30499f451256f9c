"""The server's decisions: `step(event)` in, `ready()` out, `timer()` says when to be woken.

Rules
1. `step` never waits, reads no clock and touches nothing. Time is in the event.
2. Every change of the run is a record, folded into the state at once, so the next decision sees it.
3. The shell makes `Ready.records` durable with one fdatasync, applies them to the model, then sends
   `Ready.messages`. Hence an acknowledgement means durable, a publish means applied, and a crash at any point is a
   prefix of the log.
4. What follows from a record is said when the record is released (replication.py): at once, or when a standby has it.
5. Hostile or confused peers are answered, never asserted about. Assertions are for what this file promised itself.

Stepping many events before one `ready` is group commit.
"""

from collections.abc import Callable
from typing import Any

from hetero_async.core import evaluating, leasing, merging, pace, probing, ranges
from hetero_async.core.admission import Admitted, Duplicate, delta_of, judge
from hetero_async.core.evaluating import KeepBest
from hetero_async.core.events import Applied, Event, Followed, Provided, Ready, Received, Tick, Witnessed
from hetero_async.core.heartbeat import Heartbeat
from hetero_async.core.ledger import PRIVATE, SHARED, STREAM, book_of
from hetero_async.core.members import Presences, absence, is_life
from hetero_async.core.messages import (
    Beat,
    Bye,
    Finished,
    Hello,
    Lease,
    LeaseRequest,
    Message,
    MetricReport,
    Nack,
    PublishReady,
    Push,
    Redirect,
    Refused,
    Rejoin,
    Welcome,
    Window,
)
from hetero_async.core.post import Post
from hetero_async.core.probe import ProbeReport, ProbeVerdict
from hetero_async.core.provider import Provider
from hetero_async.core.ranges import Ranges
from hetero_async.core.receipts import Receipts
from hetero_async.core.records import (
    Beacon,
    Entry,
    Genesis,
    Joined,
    Leased,
    Left,
    Promoted,
    Record,
    RunSettings,
    Settings,
)
from hetero_async.core.replication import Durability, Replication
from hetero_async.core.state import FIRST_SERVER, State
from hetero_async.core.succession import Succession

# Rounds are stretched to this many times their steps while a push is in flight; then the worker waits.
STRETCH = 4
# Time is looked at so often; after a longer silence of the clock itself we were away.
TICK_MS, ABSENCE_MS = 1_000, 3_000


class Server:
    def __init__(
        self,
        settings: RunSettings,
        state: State,
        durability: Durability = Durability(),  # noqa: B008, it is frozen
        name: str = FIRST_SERVER,
        term: int = 0,
        secret: bytes = b"",
        keep_best: KeepBest = KeepBest(),  # noqa: B008, likewise
    ) -> None:
        """`term`, where it is above the log's: a standby takes over, and that becomes the first thing that it says."""
        self.state = state
        self.settings = settings
        self.presences = Presences()
        self.windows = pace.Windows()
        self.replication = Replication(durability)
        self.announced = 0  # the publish that workers may know of
        self.lost = ""  # what proves that our log lacks what was durable; nothing may be said from then on
        self._receipts = Receipts(secret, state)
        self._keep_best = keep_best
        self._provider = Provider()
        self._oldest_publish = state.publish + 1
        self._applied = state.publish
        self._told_finished = False
        self._now_ms = self._ticked_ms = 0
        self._records: list[Entry] = []
        self.post = Post()
        self.succession = Succession(name, settings.run, state, self.replication, self.post)
        if term > state.term:
            self._record(Promoted(term=term, server=name))
        if state.settings is not None and state.settings != settings:
            self._record(Settings(settings=settings))
        self._announcements = {state.publish: state.lsn}  # publish → the record that must be released before

    def step(self, event: Event) -> None:
        match event:
            case Received() if not self.succession.is_under_way:
                self._now_ms = event.now_ms
                self.presences.hear(event.worker, event.now_ms)
                if isinstance(event.message, Hello | Heartbeat) and not self.replication.is_sure(event.now_ms):
                    # Nothing leaves here that a worker could go on with, and there may be a server where it does.
                    self.post.send(event.worker, Redirect(server="", term=self.state.term))
                elif answer := _ANSWERS.get(type(event.message)):
                    answer(self, event, event.message)
            case Followed() | Witnessed():
                self._now_ms = event.now_ms
                self.succession.step(event)
            case Provided() if not self.succession.is_under_way:
                self._begin(event)
            case Applied():
                self._make_known(event)
            case Tick():
                self._now_ms = event.now_ms
                self._advance(event.now_ms)

    def ready(self) -> Ready:
        released = self.replication.release(self._now_ms, self.state.lsn)
        while self._announcements and min(self._announcements.values()) <= released:
            self._announce(min(self._announcements))
        records, self._records = self._records, []
        return Ready(tuple(records), self.post.take(released), self.presences.take_strikes())

    def timer(self, now_ms: int) -> int:
        """When the next Tick is wanted, in the caller's milliseconds."""
        if self.succession.is_under_way:
            return now_ms + TICK_MS
        moments = [
            self.windows.deadline_ms,
            self.windows.merge_ms,
            self.presences.next_silence(self.state.active, now_ms, self._ttl_ms),
            now_ms + TICK_MS,
        ]
        return min(moment for moment in moments if moment is not None)

    # --- joining ---

    def _hello(self, event: Received, hello: Hello) -> None:
        if event.mismatch or hello.run != self.settings.run:
            other_run = f'this server trains the run "{self.settings.run}", not "{hello.run}"'
            self._send(event.worker, Refused(reason=event.mismatch or other_run))
        elif lost := self._receipts.lost(event.worker, hello):
            self.lost = lost
        elif self.state.settings is None:
            self._send(event.worker, self._provider.answer(event.worker, event.now_ms))
        else:
            self._join(event, hello)

    def _begin(self, event: Provided) -> None:
        if self.state.settings is not None:
            return
        genesis = Genesis(
            key=event.key, settings=self.settings,
            schema_hash=event.schema_hash, parameters_hash=event.parameters_hash,
        )  # fmt: skip
        self._record(genesis, event.payload)

    def _join(self, event: Received, hello: Hello) -> None:
        state, worker = self.state, event.worker
        books = (SHARED, STREAM, book_of(PRIVATE, event.site))
        kept = state.ledger.claimable(worker, ranges.normal(hello.claims), books)
        presence = self.presences.hear(worker, event.now_ms)
        is_known = worker in state.active and state.members[worker].key == event.key
        if not is_known or presence.life != hello.life:
            incarnation = state.members[worker].incarnation + 1 if worker in state.members else 1
            joined = Joined(
                worker=worker, key=event.key, site=event.site,
                incarnation=incarnation, kept=kept, is_warm=hello.is_warm,
            )  # fmt: skip
            self._record(joined)
        presence.join(hello)
        self._send(
            worker,
            Welcome(
                incarnation=state.members[worker].incarnation,
                life=hello.life,
                attempt=hello.attempt,
                last_seq=state.members[worker].last_seq,
                granted=ranges.intersection(kept, state.ledger.held(worker)),
                publish=state.publish,
                common=state.common_publish(hello.shadow_term),
                seed=self.settings.seed,
                codec=self.settings.codec_up,
                stretch=0 if self.settings.merge == "all" else STRETCH,
            ),
        )
        self._send_window(worker, event.now_ms)

    def _absence(self, event: Received, incarnation: int) -> Rejoin | Refused | None:
        member = self.state.members.get(event.worker)
        return absence(member, self.presences.hear(event.worker, event.now_ms), event, incarnation)

    def _is_present(self, event: Received, incarnation: int) -> bool:
        """Whether the message comes from the worker's present life; if not, the sender is told what to do."""
        answer = self._absence(event, incarnation)
        if answer is not None:
            self._send(event.worker, answer)
        return answer is None

    def _bye(self, event: Received, bye: Bye) -> None:
        if is_life(self.state.members.get(event.worker), event, bye.incarnation):
            self._record(Left(worker=event.worker, reason="said bye"))

    # --- a worker's life ---

    def _heartbeat(self, event: Received, heartbeat: Heartbeat) -> None:
        if not self._is_present(event, heartbeat.incarnation):
            return
        self.presences.hear(event.worker, event.now_ms).beat(heartbeat)
        self._send(
            event.worker,
            Beat(
                version=self.state.version,
                publish=self.announced,
                oldest=self._oldest_publish,
                trained=ranges.size(self.state.ledger.trained),
                positions=self.state.ledger.positions,
                evaluate=self._evaluated_by(event.worker),
            ),
        )
        if self._is_over:
            self._send(event.worker, Finished(publish=self.state.publish))

    def _lease_request(self, event: Received, request: LeaseRequest) -> None:
        if not self._is_present(event, request.incarnation):
            return
        ledger, book = self.state.ledger, book_of(request.data, event.site)
        opened = leasing.opened(ledger, event.site, request, self.settings)
        if isinstance(opened, str):
            self._send(event.worker, Refused(reason=opened))
            return
        if opened is not None:
            self._record(opened)
        lost = ranges.difference(ledger.held(event.worker), ranges.normal(request.held))
        granted: Ranges | None = ranges.intersection(lost, ledger.all_of(book))
        if not granted:
            rates = {worker: self.presences.rate(worker) for worker in self.state.active}
            granted = leasing.granted(ledger, event.worker, book, request, rates, self.steps_for(event.worker))
            if granted is None:
                return
            if granted:
                self._record(Leased(worker=event.worker, ranges=granted))
        self._send(event.worker, Lease(number=request.number, ranges=granted, samples=request.dataset_samples))
        if self._is_over:
            self._send(event.worker, Finished(publish=self.state.publish))

    def _push(self, event: Received, push: Push) -> None:
        if self._absence(event, push.incarnation) is not None:
            # The worker's next heartbeat is told to join again; after that it offers the delta in its new life.
            return
        verdict = judge(self.state, event.worker, push, event.facts)
        if isinstance(verdict, Duplicate):
            self.post.send_of(verdict.lsn, event.worker, self._receipts.ack(event.worker, push.seq, verdict.lsn))
        elif isinstance(verdict, Admitted):
            self._admit(event, push, verdict)
        else:
            self.presences.refuse(event.worker, event.now_ms, verdict)
            self._send(event.worker, Nack(seq=push.seq, reason=verdict.reason))
        self._send_window(event.worker, event.now_ms)

    def _admit(self, event: Received, push: Push, verdict: Admitted) -> None:
        assert len(event.payload) == push.payload_bytes, "what is admitted was pulled"
        self.presences.hear(event.worker, event.now_ms).staleness = self.state.staleness(verdict.anchor_version)
        entry = self._record(delta_of(event.worker, push, event.facts, verdict), event.payload)
        self._send(event.worker, self._receipts.ack(event.worker, push.seq, entry.lsn))
        if self.settings.merge == "per-push":
            self._record(merging.stepped(self.state, self.settings))
            self._publish_when_due()

    def _metric(self, event: Received, report: MetricReport) -> None:
        if self._is_present(event, report.incarnation):
            for record in evaluating.recorded(self.state, event.worker, report, self._keep_best):
                self._record(record)

    def _probe(self, event: Received, report: ProbeReport) -> None:
        if not self._is_present(event, report.incarnation):
            return
        reason = ""
        if self.settings.probe != "off":
            presence = self.presences.hear(event.worker, event.now_ms)
            reason, reference = probing.judged(self.state, event.worker, presence, report)
            if reference is not None:
                self._record(reference)
        is_refused = bool(reason) and self.settings.probe == "refuse"
        if is_refused:
            self._record(Left(worker=event.worker, reason=reason))
        self._send(event.worker, ProbeVerdict(reason=reason, is_refused=is_refused))

    def _evaluated_by(self, worker: str) -> int:
        """The publish that it is to measure, 0: none."""
        given = self.state.evaluation
        return given.publish if given is not None and given.worker == worker else 0

    # --- time ---

    def _advance(self, now_ms: int) -> None:
        self.succession.hand_over(now_ms)
        if self.state.settings is None or self.succession.is_under_way:
            return
        # Ticks come every second while anybody trains; a larger gap means that it was us who were not there.
        if self._ticked_ms > 0 and now_ms - self._ticked_ms > ABSENCE_MS:
            self.presences.excuse(now_ms - self._ticked_ms)
        self._ticked_ms = now_ms
        for worker in self.presences.silent(self.state.active, now_ms, self._ttl_ms):
            self._record(Left(worker=worker, reason=f"not heard for {self.settings.lease_ttl_seconds:g} s"))
        if self.settings.merge == "window":
            rates = map(self.presences.rate, () if self.state.is_trained else self.state.active)
            exchanges = map(self.presences.exchange_seconds, self.state.active)
            if self.windows.advance(now_ms, reference := pace.reference_rate(rates), self.settings, exchanges):
                for worker in self.state.active:
                    self._send_window(worker, now_ms, reference)
        if merging.is_due(self.state, self.settings, self.windows, now_ms):
            self._record(merging.stepped(self.state, self.settings))
        self._publish_when_due()
        if evaluation := evaluating.handed_out(self.state, self.presences):
            self._record(evaluation)
        self._tell_finished()

    def _publish_when_due(self) -> None:
        if published := merging.published(self.state, self.settings):
            self._record(published)

    def _make_known(self, event: Applied) -> None:
        """The model has done what the records say: what it came to is logged, and what can be fetched announced."""
        self._oldest_publish = event.oldest_publish
        if self._applied == self.state.publish:
            return
        self._applied = self.state.publish
        self._announcements[self.state.publish] = self.state.lsn
        beacon = Beacon(
            version=self.state.version, publish=self.state.publish,
            model_hash=event.model_hash, state_hash=self.state.digest(),
        )  # fmt: skip
        self._record(beacon)

    def _announce(self, publish: int) -> None:
        """Tell the workers of a publish that no disaster can take back any more."""
        del self._announcements[publish]
        self.announced = publish
        version = self.state.publish_versions.get(publish, self.state.version)
        for worker in self.state.active:
            is_evaluator = self._evaluated_by(worker) == publish
            self.post.send(worker, PublishReady(number=publish, version=version, evaluate=is_evaluator))
        self._tell_finished()

    def _tell_finished(self) -> None:
        if self._is_over and not self._told_finished:
            self._told_finished = True
            for worker in self.state.active:
                self.post.send(worker, Finished(publish=self.state.publish))

    @property
    def _is_over(self) -> bool:
        """Everything is trained and merged, and the workers may know it."""
        return self.state.is_finished and self.announced == self.state.publish

    @property
    def _ttl_ms(self) -> int:
        return int(1000 * self.settings.lease_ttl_seconds)

    def steps_for(self, worker: str, reference: float = 0.0) -> int:
        """`reference`: if it is known already; to find it everybody is looked at."""
        reference = reference or pace.reference_rate(map(self.presences.rate, self.state.active))
        return pace.steps_for(self.presences.rate(worker), reference, self.settings, self.windows.longer)

    def _send_window(self, worker: str, now_ms: int, reference: float = 0.0) -> None:
        milliseconds = self.windows.left_ms(now_ms) if self.settings.merge == "window" else 0
        window = Window(number=self.windows.number, milliseconds=milliseconds, steps=self.steps_for(worker, reference))
        self._send(worker, window)

    def _send(self, worker: str, message: Message) -> None:
        self.post.send_of(self.state.lsn, worker, message)

    def _record(self, record: Record, payload: bytes = b"") -> Entry:
        term = record.term if isinstance(record, Promoted) else self.state.term
        entry = Entry(lsn=self.state.lsn + 1, term=term, record=record, payload=payload)
        self.state.fold(entry)
        self._records.append(entry)
        return entry


_ANSWERS: dict[type, Callable[[Server, Received, Any], None]] = {
    Hello: Server._hello,
    Heartbeat: Server._heartbeat,
    LeaseRequest: Server._lease_request,
    MetricReport: Server._metric,
    ProbeReport: Server._probe,
    Bye: Server._bye,
    Push: Server._push,
}
