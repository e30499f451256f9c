"""The server's decisions: `step(event)` in, `ready()` out, `timer()` says when to be woken.

Rules
1. `step` never waits, reads no clock and touches nothing. Time is in the event.
2. Every change of the run is a record, folded into the state at once, so the next decision sees it.
3. The shell makes `Ready.records` durable with one fdatasync, applies them to the model, then sends
   `Ready.messages`. Hence an acknowledgement means durable, a publish means applied, and a crash at any point is a
   prefix of the log.
4. Hostile or confused peers are answered, never asserted about. Assertions are for what this file promised itself.

Stepping many events before one `ready` is group commit.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hetero_async.core import pace, ranges
from hetero_async.core.admission import Admitted, Duplicate, judge
from hetero_async.core.events import Applied, Event, Outgoing, Provided, Ready, Received, Tick
from hetero_async.core.members import Presences
from hetero_async.core.messages import (
    Ack,
    Beat,
    Bye,
    Finished,
    Heartbeat,
    Hello,
    Lease,
    LeaseRequest,
    Message,
    MetricReport,
    Nack,
    Provide,
    PublishReady,
    Push,
    Refused,
    Rejoin,
    Wait,
    Welcome,
    Window,
)
from hetero_async.core.records import (
    Beacon,
    Dataset,
    Delta,
    Entry,
    Genesis,
    Joined,
    Leased,
    Left,
    Metric,
    Published,
    Record,
    RunSettings,
    Settings,
    Stepped,
)
from hetero_async.core.state import State

# A worker that was asked for the initial parameters and then says nothing for so long is given up on.
PROVIDER_SILENCE_MS = 10_000
# Rounds are stretched to this many times their steps while a push is in flight; then the worker waits.
STRETCH = 4
# While anybody trains, time is looked at so often; after a longer silence of the clock itself we were away.
TICK_MS, ABSENCE_MS = 1_000, 3_000
# The most a worker is leased at once, in positions: bounds what one silent worker can hold back.
LEASE_POSITIONS_MAX = 1 << 20
# Names of figures in a run: each is kept for good, in every checkpoint.
METRICS_MAX = 256


class Server:
    def __init__(self, settings: RunSettings, state: State) -> None:
        self.state = state
        self.settings = settings
        self.presences = Presences()
        self.windows = pace.Windows()
        self._provider: tuple[str, int] | None = None  # who was asked for the initial parameters, and when
        self._oldest_publish = state.publish + 1
        self._announced = state.publish
        self._told_finished = False
        self._ticked_ms = 0
        self._records: list[Entry] = []
        self._messages: list[Outgoing] = []
        if state.settings is not None and state.settings != settings:
            self._record(Settings(settings=settings))

    def step(self, event: Event) -> None:
        match event:
            case Received():
                self.presences.hear(event.worker, event.now_ms)
                if answer := _ANSWERS.get(type(event.message)):
                    answer(self, event, event.message)
            case Provided():
                self._begin(event)
            case Applied():
                self._announce(event)
            case Tick():
                self._advance(event.now_ms)

    def ready(self) -> Ready:
        owed = Ready(tuple(self._records), tuple(self._messages), self.presences.take_strikes())
        self._records, self._messages = [], []
        return owed

    def timer(self, now_ms: int) -> int | None:
        """When the next Tick is wanted, in the caller's milliseconds, or never."""
        moments = [
            self.windows.deadline_ms,
            self.windows.merge_ms,
            self.presences.next_silence(self.state.active, now_ms, self._ttl_ms),
            now_ms + TICK_MS if self.state.active else None,
        ]
        return min((moment for moment in moments if moment is not None), default=None)

    # --- joining ---

    def _hello(self, event: Received, hello: Hello) -> None:
        if event.mismatch or hello.run != self.settings.run:
            other_run = f'this server trains the run "{self.settings.run}", not "{hello.run}"'
            self._send(event.worker, Refused(reason=event.mismatch or other_run))
        elif self.state.settings is None:
            self._ask_for_parameters(event)
        else:
            self._join(event, hello)

    def _ask_for_parameters(self, event: Received) -> None:
        provider, since_ms = self._provider or (event.worker, event.now_ms)
        if event.now_ms - since_ms > PROVIDER_SILENCE_MS:
            provider = event.worker
        if provider == event.worker:
            self._provider = (provider, event.now_ms)
            self._send(event.worker, Provide())
        else:
            self._send(event.worker, Wait(reason=f"{provider} is sending the initial parameters"))

    def _begin(self, event: Provided) -> None:
        if self.state.settings is not None:
            return
        genesis = Genesis(settings=self.settings, schema_hash=event.schema_hash, parameters_hash=event.parameters_hash)
        self._record(genesis, event.payload)

    def _join(self, event: Received, hello: Hello) -> None:
        state, worker = self.state, event.worker
        mine_or_free = ranges.union(state.ledger.held(worker), state.ledger.free)
        kept = ranges.intersection(ranges.normal(hello.claims), mine_or_free)
        presence = self.presences.hear(worker, event.now_ms)
        if worker not in state.active or not hello.life or presence.life != hello.life:
            incarnation = state.members[worker].incarnation + 1 if worker in state.members else 1
            self._record(Joined(worker=worker, site=event.site, incarnation=incarnation, kept=kept))
        presence.life = hello.life
        presence.device, presence.dtype, presence.doing = hello.device, hello.dtype, "joined"
        presence.steps_per_second = 0.0
        self._send(
            worker,
            Welcome(
                incarnation=state.members[worker].incarnation,
                life=hello.life,
                last_seq=state.members[worker].last_seq,
                granted=ranges.intersection(kept, state.ledger.held(worker)),
                publish=state.publish,
                seed=self.settings.seed,
                codec=self.settings.codec_up,
                stretch=0 if self.settings.merge == "all" else STRETCH,
            ),
        )
        self._send_window(worker, event.now_ms)

    def _is_present(self, event: Received, incarnation: int) -> bool:
        """Whether the message comes from the worker's present life; if not, the sender is told what to do."""
        member = self.state.members.get(event.worker)
        if member is not None and member.active and member.incarnation == incarnation:
            return True
        if member is not None and member.active and incarnation < member.incarnation:
            reason = f"another process with the key of {event.worker} has joined since; this one must stop"
            self._send(event.worker, Refused(reason=reason, incarnation=incarnation))
        else:
            self._send(event.worker, Rejoin(incarnation=incarnation, reason="the server had given you up"))
        return False

    def _bye(self, event: Received, bye: Bye) -> None:
        if event.worker in self.state.active and self.state.members[event.worker].incarnation == bye.incarnation:
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
                publish=self._announced,
                oldest=self._oldest_publish,
                trained=ranges.size(self.state.ledger.trained),
                positions=self.state.ledger.positions,
            ),
        )
        if self.state.is_finished:
            self._send(event.worker, Finished(publish=self.state.publish))

    def _lease_request(self, event: Received, request: LeaseRequest) -> None:
        if not self._is_present(event, request.incarnation):
            return
        ledger = self.state.ledger
        if ledger.positions == 0 and request.dataset_samples > 0:
            positions = self.settings.samples or round(self.settings.passes * request.dataset_samples)
            self._record(Dataset(samples=request.dataset_samples, positions=max(1, positions)))
        if request.dataset_samples != ledger.samples:
            reason = f"the dataset has {request.dataset_samples} samples here, but the run's has {ledger.samples}"
            self._send(event.worker, Refused(reason=reason))
            return
        forgotten = ranges.difference(ledger.held(event.worker), ranges.normal(request.held))
        granted = forgotten or ranges.take(ledger.free, self._lease_size(request))[0]
        if granted and not forgotten:
            self._record(Leased(worker=event.worker, ranges=granted))
        self._send(event.worker, Lease(number=request.number, ranges=granted, samples=ledger.samples))
        if self.state.is_finished:
            self._send(event.worker, Finished(publish=self.state.publish))

    def _lease_size(self, request: LeaseRequest) -> int:
        """What was asked for, but near the end no more than a fair share, so that nobody slow holds the last samples.

        Guided self-scheduling (Polychronopoulos & Kuck 1987): at most half of an even share of what is left."""
        share = ranges.size(self.state.ledger.free) // (2 * max(1, len(self.state.active)))
        batch = max(1, request.batch)
        return max(1, min(request.samples, max(batch, share // batch * batch), LEASE_POSITIONS_MAX))

    def _push(self, event: Received, push: Push) -> None:
        member = self.state.members.get(event.worker)
        if member is None or not member.active or member.incarnation != push.incarnation:
            # The worker's next heartbeat is told to join again; after that it offers the delta in its new life.
            return
        verdict = judge(self.state, event.worker, push, event.facts)
        if isinstance(verdict, Duplicate):
            self._send(event.worker, Ack(seq=push.seq, lsn=verdict.lsn))
        elif isinstance(verdict, Admitted):
            self._admit(event, push, verdict)
        else:
            self.presences.refuse(event.worker, event.now_ms, verdict)
            self._send(event.worker, Nack(seq=push.seq, reason=verdict.reason))
        self._send_window(event.worker, event.now_ms)

    def _admit(self, event: Received, push: Push, verdict: Admitted) -> None:
        assert len(event.payload) == push.payload_bytes, "what is admitted was pulled"
        presence = self.presences.hear(event.worker, event.now_ms)
        presence.staleness = self.state.staleness(verdict.anchor_version)
        delta = Delta(
            worker=event.worker,
            incarnation=push.incarnation,
            seq=push.seq,
            anchor_version=verdict.anchor_version,
            steps=push.steps,
            ranges=push.ranges,
            codec=push.codec,
            norm=event.facts.norm,
            payload_hash=push.payload_hash,
        )
        entry = self._record(delta, event.payload)
        self._send(event.worker, Ack(seq=push.seq, lsn=entry.lsn))
        if self.settings.merge == "per-push":
            self._merge(gain_share=1.0 / len(self.state.active))

    def _metric(self, event: Received, report: MetricReport) -> None:
        is_known = report.name in self.state.metrics or len(self.state.metrics) < METRICS_MAX
        if self._is_present(event, report.incarnation) and is_known:
            version = self.state.publish_versions.get(report.publish, self.state.version)
            self._record(Metric(worker=event.worker, name=report.name, value=report.value, version=version))

    # --- time ---

    def _advance(self, now_ms: int) -> None:
        if self.state.settings is None:
            return
        self._notice_absence(now_ms)
        for worker in self.presences.silent(self.state.active, now_ms, self._ttl_ms):
            self._record(Left(worker=worker, reason=f"not heard for {self.settings.lease_ttl_seconds:g} s"))
        if self.settings.merge == "window":
            in_training = () if self.state.is_trained else self.state.active
            reference = pace.reference_rate(map(self.presences.rate, in_training))
            if self.windows.advance(now_ms, reference, self.settings):
                for worker in self.state.active:
                    self._send_window(worker, now_ms)
        if self._is_merge_due(now_ms):
            self._merge(gain_share=1.0)
        self._publish_when_due()
        self._tell_finished()

    def _notice_absence(self, now_ms: int) -> None:
        """Ticks come every second while anybody trains; a larger gap means that it was us who were not there."""
        gap_ms = now_ms - self._ticked_ms
        if self._ticked_ms > 0 and gap_ms > ABSENCE_MS:
            self.presences.excuse(gap_ms)
        self._ticked_ms = now_ms

    def _is_merge_due(self, now_ms: int) -> bool:
        arrived = {pending.worker: True for pending in self.state.pending.values()}
        awaited = [worker for worker in self.state.active if self.state.ledger.held(worker)]
        have_all = arrived and not any(worker not in arrived for worker in awaited)
        if not (have_all and self._ends_early()) and not self.windows.is_due(now_ms, awaited, arrived):
            return False
        self.windows.merged()
        return bool(arrived)

    def _ends_early(self) -> bool:
        """Whether all having pushed is reason enough to merge: always in `all`, at the run's end in `window`."""
        return self.settings.merge == "all" or not self.state.ledger.free

    def _merge(self, gain_share: float) -> None:
        """One outer step over all pending deltas: the mean over workers of the sum of each worker's deltas.

        A worker's several deltas are one stretch of progress cut in pieces, so they add up; workers are averaged.
        """
        pending = self.state.pending
        workers = max(1, len({delta.worker for delta in pending.values() if delta.steps}))
        stepped = Stepped(
            version=self.state.version + 1,
            deltas=tuple(pending),
            weights=(gain_share / workers,) * len(pending),
            gain=self.settings.outer_learning_rate,
        )
        self._record(stepped)
        self._publish_when_due()

    def _publish_when_due(self) -> None:
        """Looked at with every tick too: a crash may have kept a step without its publish, or the bound has fallen."""
        state, every = self.state, self.settings.publish_every
        # Every worker waits for it in `all` and at the end; beyond the bound none could push anything until it comes.
        limit = 1 if self.settings.merge == "all" or state.is_trained else min(every, state.staleness_bound() + 1)
        if state.version - state.publish_versions[state.publish] >= limit:
            merged = tuple((name, member.merged_seq) for name, member in state.members.items())
            number, codec = state.publish + 1, self.settings.codec_down
            self._record(Published(number=number, version=state.version, codec=codec, merged=merged))

    def _announce(self, event: Applied) -> None:
        """The model has done what the records say: tell the workers what can be fetched, and log what it came to."""
        self._oldest_publish = event.oldest_publish
        if self._announced == self.state.publish:
            return
        self._announced = self.state.publish
        for worker in self.state.active:
            self._send(worker, PublishReady(number=self.state.publish, version=self.state.version))
        beacon = Beacon(
            version=self.state.version,
            publish=self.state.publish,
            model_hash=event.model_hash,
            state_hash=self.state.digest(),
        )
        self._record(beacon)
        self._tell_finished()

    def _tell_finished(self) -> None:
        if self.state.is_finished and self._announced == self.state.publish and not self._told_finished:
            self._told_finished = True
            for worker in self.state.active:
                self._send(worker, Finished(publish=self.state.publish))

    # --- small ---

    @property
    def _ttl_ms(self) -> int:
        return int(1000 * self.settings.lease_ttl_seconds)

    def steps_for(self, worker: str) -> int:
        rates = self.presences.rate
        return pace.steps_for(rates(worker), pace.reference_rate(map(rates, self.state.active)), self.settings)

    def _send_window(self, worker: str, now_ms: int) -> None:
        milliseconds = self.windows.left_ms(now_ms) if self.settings.merge == "window" else 0
        window = Window(number=self.windows.number, milliseconds=milliseconds, steps=self.steps_for(worker))
        self._send(worker, window)

    def _send(self, worker: str, message: Message) -> None:
        self._messages.append(Outgoing(worker, message))

    def _record(self, record: Record, payload: bytes = b"") -> Entry:
        entry = Entry(lsn=self.state.lsn + 1, term=self.state.term, record=record, payload=payload)
        self.state.fold(entry)
        self._records.append(entry)
        return entry


_ANSWERS: dict[type, Callable[[Server, Received, Any], None]] = {
    Hello: Server._hello,
    Heartbeat: Server._heartbeat,
    LeaseRequest: Server._lease_request,
    MetricReport: Server._metric,
    Bye: Server._bye,
    Push: Server._push,
}


def changed_for_good(logged: RunSettings, wanted: RunSettings) -> list[str]:
    """Names of settings that differ although a run keeps them from its genesis on."""
    fixed = ("run", "seed", "samples", "passes", "rule")
    return [name for name in fixed if replace(logged, **{name: getattr(wanted, name)}) != logged]
