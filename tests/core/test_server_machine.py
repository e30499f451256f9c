"""Whatever workers and crashes do to the server's machine: the ledger stays exact, acknowledgements stay true."""

import json
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hetero_async.core import ranges
from hetero_async.core.admission import Cause, Facts, NotAdmitted
from hetero_async.core.evaluating import KeepBest
from hetero_async.core.events import Applied, Provided, Received, Tick
from hetero_async.core.ledger import PRIVATE, SHARED, STREAM
from hetero_async.core.messages import (
    Ack,
    Bye,
    Heartbeat,
    Hello,
    Lease,
    LeaseRequest,
    Message,
    MetricReport,
    Push,
    Welcome,
)
from hetero_async.core.records import Delta, Entry, Evaluated, RunSettings
from hetero_async.core.server import Server
from hetero_async.core.state import State

WORKERS = ["a-0", "a-1", "b-0"]
SAMPLES = 40
SETTINGS = {
    merge: RunSettings(run="r", samples=90, merge=merge, lease_ttl_seconds=5.0, max_staleness=2, steps_per_round=4)
    for merge in ("window", "per-push", "all")
}
DATA = st.sampled_from([SHARED, SHARED, PRIVATE, STREAM])
RARELY = st.sampled_from([False, False, False, False, True])
LIVES = (b"first", b"second")
OFTEN = st.sampled_from([True, True, True, True, False])


class ServerMachine(RuleBasedStateMachine):
    """`log` is what was durable; `acked` and `sent` are the observer's own books, outside the code under test."""

    @initialize(merge=st.sampled_from(sorted(SETTINGS)))
    def begin(self, merge: str) -> None:
        self.settings = SETTINGS[merge]
        self.server = Server(self.settings, State(), keep_best=KeepBest("loss"))
        self.log: list[Entry] = []
        self.acked: dict[tuple[str, int], bytes] = {}
        self.newest: dict[str, Ack] = {}
        self.sent: list[tuple[str, Push]] = []
        self.held: dict[str, ranges.Ranges] = {}
        self.now_ms = 1
        self.step(Provided(now_ms=1, worker="a-0", key="a-0", schema_hash=b"s", parameters_hash=b"p", payload=b""))

    def step(self, event: Received | Provided | Tick) -> list[tuple[str, Message]]:
        """Step, tick, and do what is owed: the records become durable before any message is seen."""
        self.server.step(event)
        self.server.step(Tick(now_ms=self.now_ms))
        told: list[tuple[str, Message]] = []
        ready = self.server.ready()
        while ready.records or ready.messages:
            self.log.extend(ready.records)
            told += [(outgoing.to, outgoing.message) for outgoing in ready.messages]
            if ready.records:
                self.server.step(Applied(oldest_publish=1, model_hash=b"m"))
            ready = self.server.ready()
        for worker, message in told:
            self.hear(worker, message)
        return told

    def hear(self, worker: str, message: Message) -> None:
        if isinstance(message, Ack):
            pushes = [push for name, push in self.sent if (name, push.seq) == (worker, message.seq)]
            admitted = self.log[message.lsn - 1].record
            assert isinstance(admitted, Delta)
            assert admitted.payload_hash in {push.payload_hash for push in pushes}
            assert self.acked.setdefault((worker, message.seq), admitted.payload_hash) == admitted.payload_hash
            self.newest[worker] = max(message, self.newest.get(worker, message), key=lambda ack: ack.seq)
        elif isinstance(message, Lease):
            self.held[worker] = ranges.union(self.held.get(worker, ()), message.ranges)
        elif isinstance(message, Welcome):
            self.held[worker] = message.granted

    def receive(self, worker: str, message: Message, facts: Facts | None = None) -> None:
        received = Received(
            now_ms=self.now_ms, worker=worker, key=worker, site=worker[0], message=message,
            facts=facts or Facts(norm=1.0),
        )  # fmt: skip
        self.step(received)

    def incarnation(self, worker: str) -> int:
        member = self.server.state.members.get(worker)
        return member.incarnation if member else 0

    @rule(worker=st.sampled_from(WORKERS), claims=st.booleans(), life=st.sampled_from((b"", *LIVES)))
    def join(self, worker: str, claims: bool, life: bytes) -> None:
        claimed = self.held.get(worker, ()) if claims else ()
        newest = self.newest.get(worker, Ack(seq=0, lsn=0))
        self.receive(
            worker,
            Hello(
                run="r",
                software="0",
                schema_hash=b"s",
                last_seq=0,
                claims=claimed,
                device="cpu",
                dtype="fp32",
                life=life,
                acknowledged=newest.seq,
                receipt=newest.receipt,
            ),
        )

    def has_joined(self, worker: str) -> bool:
        presence = self.server.presences.of(worker)
        return worker in self.server.state.active and presence is not None and presence.life != b""

    @rule(worker=st.sampled_from(WORKERS), samples=st.integers(0, 30), late=RARELY, knows=OFTEN, data=DATA)
    def ask(self, worker: str, samples: int, late: bool, knows: bool, data: str = SHARED) -> None:
        if not (late or self.has_joined(worker)):
            self.join(worker, claims=True, life=LIVES[0])
        self.receive(
            worker,
            LeaseRequest(
                incarnation=max(0, self.incarnation(worker) - late),
                number=1,
                held=self.server.state.ledger.held(worker) if knows else (),
                samples=samples,
                batch=4,
                dataset_samples=SAMPLES,
                data=data,
            ),
        )

    @rule(
        worker=st.sampled_from(WORKERS),
        count=st.integers(1, 12),
        skip=st.integers(0, 3),
        gap=st.integers(0, 2),
        behind=st.sampled_from([0, 0, 0, 1, 2, 4, -1]),
        stray=RARELY,
        norm=st.sampled_from([1.0, 1.1, 1e9]),
        refusal=RARELY.map(lambda broken: NotAdmitted("not finite", Cause.INFINITE) if broken else None),
    )
    def push(
        self,
        worker: str,
        count: int,
        skip: int,
        gap: int,
        behind: int,
        stray: bool,
        norm: float,
        refusal: NotAdmitted | None,
    ) -> None:
        if not self.held.get(worker):
            self.ask(worker, samples=16, late=False, knows=True)
        _, rest = ranges.take(self.held.get(worker, ()), skip)
        consumed, _ = ranges.take(rest, count)
        member = self.server.state.members.get(worker)
        seq = (member.last_seq if member else 0) + gap
        push = Push(
            incarnation=self.incarnation(worker),
            seq=seq,
            anchor=max(0, self.server.state.publish - behind),
            anchor_term=1,
            steps=count,
            ranges=((0, count),) if stray else consumed,
            codec="int8",
            payload_bytes=0,
            payload_hash=bytes([len(self.sent) % 256, len(self.sent) // 256]),
        )
        self.sent.append((worker, push))
        self.receive(worker, push, Facts(norm=norm, refusal=refusal))

    @rule(which=st.integers(0, 10_000), renewed=st.booleans())
    def push_again(self, which: int, renewed: bool) -> None:
        """A copy from the network's depths, or the outbox of a life that has joined again."""
        if self.sent:
            worker, push = self.sent[which % len(self.sent)]
            self.receive(worker, replace(push, incarnation=self.incarnation(worker)) if renewed else push)

    @rule(worker=st.sampled_from(WORKERS), late=RARELY)
    def beat(self, worker: str, late: bool) -> None:
        self.receive(
            worker,
            Heartbeat(
                incarnation=max(0, self.incarnation(worker) - late),
                state="training",
                steps=1,
                steps_per_second=2.0,
                publish=0,
                bytes_up=0,
                bytes_down=0,
                evaluates_every=0.1,
            ),
        )

    @rule(worker=st.sampled_from(WORKERS), late=RARELY, loss=st.floats(0, 9), behind=st.sampled_from([0, 0, 1, 5]))
    def evaluated(self, worker: str, late: bool, loss: float, behind: int) -> None:
        """What it was asked to measure, or something else."""
        given = self.server.state.evaluation
        self.receive(
            worker,
            MetricReport(
                incarnation=max(0, self.incarnation(worker) - late),
                figures=(("loss", loss),),
                publish=max(0, (given.publish if given else self.server.state.publish) - behind),
                is_evaluation=True,
            ),
        )

    @rule(worker=st.sampled_from(WORKERS), late=RARELY)
    def bye(self, worker: str, late: bool) -> None:
        self.receive(worker, Bye(incarnation=max(0, self.incarnation(worker) - late)))

    @rule(seconds=st.integers(1, 12))
    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now_ms += 1000
            self.step(Tick(now_ms=self.now_ms))

    @rule(worker=st.sampled_from(WORKERS), lost=OFTEN)
    def crash(self, worker: str, lost: bool) -> None:
        """The server dies after deciding on a last event; `lost`: before that became durable and anybody was told."""
        bye = Bye(incarnation=self.incarnation(worker))
        self.server.step(Received(now_ms=self.now_ms, worker=worker, key=worker, site="s", message=bye))
        self.log.extend([] if lost else self.server.ready().records)
        self.server = Server(self.settings, self.replayed(), keep_best=KeepBest("loss"))

    def replayed(self) -> State:
        state = State()
        for entry in self.log:
            state.fold(entry)
        return State.load(json.loads(json.dumps(state.dump())))

    @invariant()
    def positions_add_up(self) -> None:
        assert self.server.state.ledger.is_exact()

    @invariant()
    def replay_gives_the_same_state(self) -> None:
        assert self.replayed().digest() == self.server.state.digest()

    @invariant()
    def every_acknowledged_delta_is_in_the_log_once(self) -> None:
        admitted = [(entry.record.worker, entry.record.seq) for entry in self.log if isinstance(entry.record, Delta)]
        assert len(admitted) == len(set(admitted))
        assert self.acked.keys() <= set(admitted)

    @invariant()
    def what_is_durable_is_never_missed(self) -> None:
        assert not self.server.lost

    @invariant()
    def the_best_is_the_smallest_that_was_answered(self) -> None:
        best = self.server.state.best
        found = [entry.record.value for entry in self.log if isinstance(entry.record, Evaluated) and entry.record.name]
        assert best.value == min(found) if best else not found

    @invariant()
    def no_position_is_in_two_deltas(self) -> None:
        trained: ranges.Ranges = ()
        for entry in self.log:
            if isinstance(entry.record, Delta):
                assert not ranges.intersection(trained, entry.record.ranges)
                trained = ranges.union(trained, entry.record.ranges)
        assert ranges.size(trained) <= self.settings.samples


TestServerMachine = ServerMachine.TestCase
TestServerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
