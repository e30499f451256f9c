"""One server and its workers on a bad network, in virtual time: the run ends, and nothing is forgotten.

Integers stand for tensors; a merge mixes them so that a wrong order shows. A world is its seed: run one again with
`World(seed).run()`.
"""

import heapq
import itertools
import json
import random
from collections.abc import Callable

import pytest
from core.cluster_checks import check_books, check_evaluations
from core.cluster_model import Numbers, coded
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.core import ranges
from hetero_async.core.admission import Facts
from hetero_async.core.events import Applied, Event, Provided, Received, Tick
from hetero_async.core.ledger import PRIVATE, SHARED, STREAM
from hetero_async.core.messages import PUBLISH, Ack, Gone, Hello, Message, Push
from hetero_async.core.records import Delta, Entry, Genesis, Published, RunSettings, Stepped
from hetero_async.core.server import Server
from hetero_async.core.state import State
from hetero_async.core.worker import Worker
from hetero_async.core.worker_events import Anchor, Cut, Evaluated, Fetched, Heard, Vitals
from hetero_async.core.worker_events import Tick as WorkerTick

SEEDS, SEEDS_PER_TEST = 240, 20
SAMPLES, POSITIONS, BATCH = 48, 120, 2
FAULTS_END_MS, END_MS = 8_000, 90_000
STEP_MS, SERVER_TICK_MS = 150, 200
EVERY = 0.2  # of a run, from one evaluation to the next


class Centre:
    """The server: its log is what survives it."""

    def __init__(self, world: "World", settings: RunSettings) -> None:
        self.world, self.settings = world, settings
        self.log: list[Entry] = []
        self.server: Server | None = None
        self.start()

    def start(self) -> None:
        state, self.model = State(), Numbers()
        for entry in self.log:
            state.fold(entry)
            self.model.apply(entry)
            assert state.ledger.is_exact()
        self.oldest = state.publish + 1
        self.server = Server(self.settings, State.load(json.loads(json.dumps(state.dump()))))
        self.settle()

    def step(self, event: Event) -> None:
        if self.server is None:
            return
        self.server.step(event)
        if self.world.chance(0.8):  # else: group commit
            self.server.step(Tick(now_ms=self.world.now_ms))
            self.settle()
        if self.server is not None and isinstance(event, Tick):
            wake_ms = self.server.timer(self.world.now_ms)
            assert wake_ms is None or wake_ms > self.world.now_ms, "a server that is due again at once never sleeps"

    def settle(self) -> None:
        while self.server is not None:
            ready = self.server.ready()
            if not ready.records and not ready.messages:
                return
            if self.world.fault(0.01):
                self.log.extend(ready.records[: self.world.random.randint(0, len(ready.records))])
                self.crash()
                return
            self.log.extend(ready.records)
            for entry in ready.records:
                self.model.apply(entry)
            assert self.server.state.ledger.is_exact()
            for outgoing in ready.messages:
                self.world.tell(outgoing.to, outgoing.message)
            if any(isinstance(entry.record, Genesis | Published) for entry in ready.records):
                self.server.step(Applied(oldest_publish=self.oldest, model_hash=b"%d" % self.model.theta))

    def crash(self) -> None:
        self.server = None
        self.world.after(self.world.random.randint(10, 4000), self.start)

    def fetch(self, worker: str, kind: str, number: int) -> None:
        if self.server is None:
            return
        here = self.model.publishes
        if kind == PUBLISH and self.oldest <= number <= max(here, default=0):
            move, merged, after = here[number]
            answer = (kind, number, move, merged, after)
        elif kind == PUBLISH:
            self.world.tell(worker, Gone(kind=kind, number=number))
            return
        else:
            newest = max(here, default=0)
            _, merged, after = here.get(newest, (0, {}, self.model.shadow))
            answer = (kind, newest, after, merged, after)
        self.world.carry(lambda: self.world.sites[worker].take(*answer))


class Site:
    """A worker: its outbox is what survives it."""

    def __init__(self, world: "World", name: str, speed: int) -> None:
        self.world, self.name, self.speed = world, name, speed
        self.place, self.data = world.places[name]
        self.disk: dict[int, tuple[Push, int]] = {}
        self.notes: list[tuple[int, bytes]] = []  # dropped as admitted
        self.lives = 0
        self.machine: Worker | None = None
        self.start()

    def start(self) -> None:
        self.lives += 1
        life = f"{self.name}:{self.lives}".encode()
        hello = Hello(
            run="r", software="0", schema_hash=b"s", last_seq=0, claims=(), device="cpu", dtype="fp32", life=life
        )
        self.machine = Worker(hello)
        self.machine.restore({seq: push for seq, (push, _) in self.disk.items()})
        self.payloads = {seq: payload for seq, (_, payload) in self.disk.items()}
        self.leases: ranges.Ranges = ()
        self.consumed: ranges.Ranges = ()
        self.is_dry = False
        self.steps = self.round_steps = self.window = self.shadow = 0

    def crash(self, longest_ms: int = 6000) -> None:
        self.machine = None
        self.world.after(self.world.random.randint(10, longest_ms), self.start)

    def tick(self) -> None:
        if self.machine is None:
            return
        self.train(self.machine)
        vitals = Vitals(
            doing="training", steps=self.steps, steps_per_second=self.speed * 1000 / STEP_MS,
            held=ranges.union(self.leases, self.consumed), batch=BATCH, dataset_samples=SAMPLES, data=self.data,
            evaluates_every=EVERY,
            wanted_samples=max(0, 4 * BATCH - ranges.size(self.leases)),
        )  # fmt: skip
        self.machine.step(WorkerTick(now_ms=self.world.now_ms, vitals=vitals))
        self.settle()
        if self.machine is not None and 0 < self.machine.evaluator.due <= self.machine.shadow:
            self.evaluate(self.machine)

    def train(self, machine: Worker) -> None:
        if not machine.joined or machine.shadow < 0:
            return
        window = machine.window
        for _ in range(self.speed):
            is_over = self.round_steps >= max(1, machine.stretch) * window.steps
            if (machine.in_flight and is_over) or (machine.stretch == 0 and machine.unmerged):
                return
            if ranges.size(self.leases) >= BATCH or self.is_dry:
                self.draw()
        is_due = self.round_steps >= window.steps or window.number != self.window or self.is_dry
        if self.consumed and is_due and not machine.in_flight:
            self.cut(machine)

    def evaluate(self, machine: Worker) -> None:
        machine.evaluator.taken()
        measured = Evaluated(publish=machine.shadow, term=machine.term, figures=(("loss", float(self.shadow)),))

        def done() -> None:
            if self.machine is machine:
                machine.step(measured)
                self.settle()

        self.world.after(self.world.random.randint(1, 1500), done)

    def draw(self) -> None:
        drawn, self.leases = ranges.take(self.leases, BATCH)
        self.consumed = ranges.union(self.consumed, drawn)
        self.steps += bool(drawn)
        self.round_steps += bool(drawn)

    def cut(self, machine: Worker) -> None:
        payload = coded(self.name, self.lives, machine.seq + 1, self.consumed, self.shadow)
        self.payloads[machine.seq + 1] = payload
        machine.step(
            Cut(
                now_ms=self.world.now_ms, anchor=Anchor(machine.shadow, machine.shadow_term), steps=self.round_steps,
                ranges=self.consumed,
                codec="int8", payload_bytes=7, payload_hash=payload.to_bytes(7),
            )
        )  # fmt: skip
        self.consumed, self.round_steps, self.window = (), 0, machine.window.number

    def hear(self, message: Message) -> None:
        if self.machine is not None:
            self.machine.step(Heard(now_ms=self.world.now_ms, message=message))
            self.settle()

    def settle(self) -> None:
        machine = self.machine
        assert machine is not None
        owed = machine.ready()
        for push in owed.saves:
            self.disk[push.seq] = (push, self.payloads[push.seq])
        if self.world.fault(0.004):
            self.crash()
            return
        for dropped in owed.drops:
            push, _ = self.disk.pop(dropped.seq)
            if not dropped.refusal:
                self.notes.append((dropped.seq, push.payload_hash))
        for message in owed.control:
            self.world.ask(self.name, message)
        for message in owed.bulk:
            assert isinstance(message, Push)
            saved, payload = self.disk[message.seq]
            assert saved.payload_hash == message.payload_hash, "an offer is what was saved"
            self.world.ask(self.name, message, payload.to_bytes(7))
        if owed.provide:
            self.world.provide(self.name)
        if owed.regranted is not None:
            self.leases = ranges.difference(owed.regranted, self.consumed)
        for granted in owed.granted:
            self.leases = ranges.union(self.leases, ranges.difference(granted, self.consumed))
            self.is_dry = not granted
        if machine.wanted is not None:
            kind, number = machine.wanted
            self.world.carry(lambda: self.world.centre.fetch(self.name, kind, number))
        if machine.refusal:
            self.crash(500)  # the site's agent starts it again

    def take(self, kind: str, number: int, move: int, merged: dict[str, int], after: int) -> None:
        machine = self.machine
        if machine is None or number <= machine.shadow or (kind == PUBLISH and machine.wanted != (kind, number)):
            return
        self.shadow = self.shadow + move if kind == PUBLISH else move
        assert self.shadow == after, "the shadow's hash"
        self.world.seen[number] = self.world.seen.get(number, after)
        assert self.world.seen[number] == after, "a publish is the same for all, before and after a crash"
        machine.step(Fetched(number=number, term=machine.term, merged_seq=merged.get(self.name, 0)))
        self.settle()

    @property
    def is_done(self) -> bool:
        return self.machine is not None and self.machine.is_finished and not self.machine.outbox


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ms = 1000
        self.seen: dict[int, int] = {}
        self.acked: set[tuple[str, int, int]] = set()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        settings = RunSettings(
            run="r", samples=POSITIONS, merge=self.random.choice(["window", "window", "per-push", "all"]),
            steps_per_round=3, max_staleness=self.random.choice([1, 2, 4]), lease_ttl_seconds=3.0,
            publish_every=self.random.choice([1, 1, 2, 4]),
        )  # fmt: skip
        self.settings = settings
        self.sites: dict[str, Site] = {}
        data = self.random.choice([[SHARED], [SHARED], [PRIVATE], [STREAM], [SHARED, PRIVATE, STREAM]])
        self.places = {f"w{number}": (f"s{number // 2}", self.random.choice(data)) for number in range(4)}
        self.centre = Centre(self, settings)
        for number in range(self.random.choice([3, 4])):
            self.sites[f"w{number}"] = Site(self, f"w{number}", self.random.choice([1, 1, 2]))
        self.every(SERVER_TICK_MS, lambda: self.centre.step(Tick(now_ms=self.now_ms)))
        for site in self.sites.values():
            self.every(STEP_MS, site.tick)

    # --- time and chance ---

    def after(self, milliseconds: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_ms + milliseconds, next(self._order), action))

    def every(self, milliseconds: int, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.after(milliseconds, again)

        self.after(self.random.randint(0, milliseconds), again)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def fault(self, share: float) -> bool:
        return self.now_ms < FAULTS_END_MS and self.chance(share)

    # --- the network ---

    def carry(self, deliver: Callable[[], None]) -> None:
        if self.fault(0.08):
            return
        for _ in range(2 if self.fault(0.05) else 1):
            is_slow = self.fault(0.1)
            self.after(self.random.randint(1, 3000 if is_slow else 60), deliver)

    def tell(self, worker: str, message: Message) -> None:
        if isinstance(message, Ack):
            self.acked.add((worker, message.seq, message.lsn))
        self.carry(lambda: self.sites[worker].hear(message))

    def ask(self, worker: str, message: Message, payload: bytes = b"") -> None:
        def deliver() -> None:
            received = Received(
                now_ms=self.now_ms,
                worker=worker,
                key=worker,
                site=self.sites[worker].place,
                message=message,
                payload=payload,
                facts=Facts(norm=1.0),
            )
            self.centre.step(received)

        self.carry(deliver)

    def provide(self, worker: str) -> None:
        def deliver() -> None:
            self.centre.step(
                Provided(
                    now_ms=self.now_ms, worker=worker, key=worker, schema_hash=b"s", parameters_hash=b"p", payload=b"\7"
                )
            )

        self.carry(deliver)

    # --- a run ---

    def run(self) -> None:
        while not all(site.is_done for site in self.sites.values()):
            self.now_ms, _, action = heapq.heappop(self._events)
            assert self.now_ms < END_MS, "the faults are over, and still it does not end"
            action()
        self.check()

    def check(self) -> None:
        log = self.centre.log
        deltas = {entry.lsn: entry.record for entry in log if isinstance(entry.record, Delta)}
        admitted = [(delta.worker, delta.seq, delta.payload_hash) for delta in deltas.values()]
        assert len({(worker, seq) for worker, seq, _ in admitted}) == len(admitted), "admitted twice"
        for worker, seq, lsn in self.acked:
            assert (deltas[lsn].worker, deltas[lsn].seq) == (worker, seq), "acknowledged and not in the log"
        for name, site in self.sites.items():
            for seq, payload_hash in site.notes:
                assert (name, seq, payload_hash) in admitted, "the worker was told it is safe"
        trained = [stretch for delta in deltas.values() for stretch in delta.ranges]
        assert ranges.size(tuple(trained)) == ranges.size(ranges.normal(trained)) == POSITIONS, "each position once"
        check_books(log, self.places, POSITIONS)
        check_evaluations(log, self.seen)
        self.check_merges(deltas)

    def check_merges(self, deltas: dict[int, Delta]) -> None:
        merged: list[int] = []
        version = 0
        for entry in self.centre.log:
            if isinstance(entry.record, Stepped):
                merged += entry.record.deltas
                version += 1
            elif isinstance(entry.record, Delta):
                rounds = self.settings.max_staleness * (len(self.sites) if self.settings.merge == "per-push" else 1)
                assert version - entry.record.anchor_version <= rounds, "staler than the bound"
        assert sorted(merged) == sorted(deltas), "each delta is merged once"
        for site in self.sites.values():
            assert site.shadow == self.centre.model.theta, "all stand on the run's last parameters"
            assert site.machine is not None
            assert not site.machine.unmerged


BATCHES = [range(first, first + SEEDS_PER_TEST) for first in range(0, SEEDS, SEEDS_PER_TEST)]


@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_a_run_ends_and_forgets_nothing_whatever_is_lost_on_the_way(seeds: range) -> None:
    for seed in seeds:
        try:
            World(seed).run()
        except (AssertionError, KeyError, ValueError) as error:
            raise AssertionError(f"World({seed}).run(): {error!r}") from error


@given(seed=st.integers(SEEDS, 2**32 - 1))
def test_neither_does_any_other_run(seed: int) -> None:
    """A run is some 900 events: with the 5000 examples of `make soak`, millions."""
    World(seed).run()
