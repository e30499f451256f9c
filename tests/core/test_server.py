"""What the server's machine decides: who may join, when it merges, what it tells whom."""

from dataclasses import replace

import pytest

from hetero_async.core.admission import Facts
from hetero_async.core.events import Applied, Event, Provided, Received, Tick
from hetero_async.core.messages import (
    Ack,
    Bye,
    Finished,
    Heartbeat,
    Hello,
    Lease,
    LeaseRequest,
    Message,
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
from hetero_async.core.provider import PROVIDER_SILENCE_MS
from hetero_async.core.records import Delta, Entry, Genesis, Joined, Left, RunSettings, Settings, Stepped
from hetero_async.core.server import Server
from hetero_async.core.state import State

SETTINGS = RunSettings(run="r", samples=64, steps_per_round=8, lease_ttl_seconds=5.0)
HELLO = Hello(run="r", software="0", schema_hash=b"s", last_seq=0, claims=(), device="cpu", dtype="fp32", life=b"first")
PUSH = Push(
    incarnation=1, seq=1, anchor=0, anchor_term=1, steps=1, ranges=((0, 4),), codec="int8", payload_bytes=0,
    payload_hash=b"h",
)  # fmt: skip


class Bench:
    """A server's machine and a clock."""

    def __init__(self, **changes: object) -> None:
        self.server = Server(replace(SETTINGS, **changes), State())  # type: ignore[arg-type]
        self.log: list[Entry] = []
        self.now_ms = 1000

    def step(self, event: Event) -> list[tuple[str, Message]]:
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
        return told

    def say(self, worker: str, message: Message, **more: object) -> list[tuple[str, Message]]:
        event = Received(
            now_ms=self.now_ms, worker=worker, key=worker, site="s", message=message, facts=Facts(norm=1.0)
        )
        return self.step(replace(event, **more))  # type: ignore[arg-type]

    def wait(self, milliseconds: int) -> list[tuple[str, Message]]:
        told: list[tuple[str, Message]] = []
        for _ in range(0, milliseconds, 100):
            self.now_ms += 100
            told += self.step(Tick(now_ms=self.now_ms))
        return told

    def begin(self, *workers: str) -> "Bench":
        self.step(Provided(now_ms=0, worker="a", key="a", schema_hash=b"s", parameters_hash=b"p", payload=b""))
        for worker in workers:
            self.say(worker, HELLO)
            self.beat(worker)
        return self

    def beat(self, worker: str, rate: float = 8.0) -> list[tuple[str, Message]]:
        incarnation = self.server.state.members[worker].incarnation
        return self.say(
            worker,
            Heartbeat(
                incarnation=incarnation, state="training", steps=1, steps_per_second=rate, publish=0, bytes_up=0,
                bytes_down=0,
            ),
        )  # fmt: skip

    def lease(self, worker: str, samples: int, dataset_samples: int = 64) -> list[tuple[str, Message]]:
        state = self.server.state
        return self.say(
            worker,
            LeaseRequest(
                incarnation=state.members[worker].incarnation, number=1, held=state.ledger.held(worker),
                samples=samples, batch=4, dataset_samples=dataset_samples,
            ),
        )  # fmt: skip

    def push(self, worker: str, anchor: int = 0, steps: int = 4) -> list[tuple[str, Message]]:
        """All that the worker has leased."""
        member = self.server.state.members[worker]
        return self.say(
            worker,
            Push(
                incarnation=member.incarnation, seq=member.last_seq + 1, anchor=anchor, anchor_term=1, steps=steps,
                ranges=self.server.state.ledger.held(worker), codec="int8", payload_bytes=0,
                payload_hash=bytes([member.last_seq]),
            ),
        )  # fmt: skip

    def records(self, kind: type) -> list[object]:
        return [entry.record for entry in self.log if isinstance(entry.record, kind)]


def told_to(worker: str, kind: type, told: list[tuple[str, Message]]) -> list[Message]:
    return [message for name, message in told if name == worker and isinstance(message, kind)]


def test_the_first_worker_is_asked_for_parameters_and_the_others_wait() -> None:
    bench = Bench()
    assert bench.say("a", HELLO) == [("a", Provide())]
    assert bench.say("b", HELLO) == [("b", Wait(reason="a is sending the initial parameters"))]
    bench.now_ms += PROVIDER_SILENCE_MS + 1
    assert bench.say("b", HELLO) == [("b", Provide())], "a has fallen silent"
    bench.begin()
    assert told_to("b", Welcome, bench.say("b", HELLO))


@pytest.mark.parametrize(
    ("hello", "mismatch", "reason"),
    [(HELLO, "tensor x differs", "tensor x differs"), (replace(HELLO, run="q"), "", 'trains the run "r", not "q"')],
)
def test_who_does_not_fit_is_refused(hello: Hello, mismatch: str, reason: str) -> None:
    ((_, refused),) = Bench().begin().say("a", hello, mismatch=mismatch)
    assert isinstance(refused, Refused)
    assert reason in refused.reason


def test_a_dataset_of_another_length_is_refused() -> None:
    bench = Bench().begin("a", "b")
    bench.lease("a", 8)
    ((_, refused),) = bench.lease("b", 8, dataset_samples=65)
    assert refused == Refused(reason="the dataset has 65 samples here, but the run's has 64")


def test_leases_shrink_towards_the_end_and_come_in_whole_batches() -> None:
    bench = Bench().begin("a", "b")
    sizes = []
    for _ in range(20):
        (lease,) = told_to("a", Lease, bench.lease("a", 64))
        assert isinstance(lease, Lease)
        sizes.append(sum(stop - start for start, stop in lease.ranges))
    assert sizes[:4] == [16, 12, 8, 4]
    assert sum(sizes) == 64
    assert sizes[-1] == 0


def test_an_acknowledged_delta_is_in_the_log_with_its_ranges() -> None:
    bench = Bench().begin("a", "b")
    bench.lease("a", 8)
    (ack,) = told_to("a", Ack, bench.push("a"))
    assert isinstance(ack, Ack)
    delta = bench.log[ack.lsn - 1].record
    assert isinstance(delta, Delta)
    assert (delta.worker, delta.seq, delta.ranges) == ("a", 1, ((0, 8),))
    assert told_to("a", Nack, bench.push("a")), "nothing is leased any more"


def test_nobody_can_report_the_samples_that_another_has_leased() -> None:
    bench = Bench().begin("a", "b")
    bench.lease("a", 8)
    bench.lease("b", 8)
    [(start, stop)] = bench.server.state.ledger.held("b")
    claim = Push(
        incarnation=1, seq=1, anchor=0, anchor_term=1, steps=1, ranges=((start, stop),), codec="int8", payload_bytes=0,
        payload_hash=b"x",
    )  # fmt: skip
    [nack] = told_to("a", Nack, bench.say("a", claim))
    assert isinstance(nack, Nack) and nack.reason == f"positions {start}..{stop - 1} are not leased to it"
    assert bench.server.state.ledger.held("b") == ((start, stop),)
    assert not bench.records(Delta)


def test_a_delta_said_again_is_acknowledged_again_and_logged_once() -> None:
    bench = Bench(merge="per-push").begin("a", "b")
    bench.lease("a", 8)
    acks = [told_to("a", Ack, bench.say("a", PUSH)) for _ in range(3)]
    assert acks[0] == acks[1] == acks[2] != []
    assert len(bench.records(Delta)) == len(bench.records(Stepped)) == 1


def test_what_was_never_pulled_is_never_admitted() -> None:
    bench = Bench(merge="per-push").begin("a", "b")
    bench.lease("a", 8)
    push = replace(PUSH, payload_bytes=9)
    with pytest.raises(AssertionError, match="pulled"):
        bench.say("a", push)


def test_a_window_is_merged_when_all_who_hold_leases_have_pushed() -> None:
    bench = Bench().begin("a", "b")
    bench.lease("a", 8)
    bench.lease("b", 8)
    bench.wait(1000)
    bench.push("a")
    assert not bench.records(Stepped)
    told = bench.push("b")
    (stepped,) = bench.records(Stepped)
    assert isinstance(stepped, Stepped)
    assert stepped.weights == (0.5, 0.5)
    assert told_to("a", PublishReady, told) == [PublishReady(number=1, version=1)]


def test_a_late_delta_is_not_waited_for_and_joins_the_next_merge_with_staleness_one() -> None:
    bench = Bench().begin("a", "b")
    bench.lease("a", 8)
    bench.lease("b", 8)
    bench.wait(1000)
    bench.push("a")
    for _ in range(3):
        bench.wait(100)
        bench.beat("b")
    assert len(bench.records(Stepped)) == 1, "the grace of a quarter window is over"
    bench.push("b", anchor=0)
    assert bench.server.presences.hear("b", bench.now_ms).staleness == 1
    bench.wait(1000)
    assert len(bench.records(Stepped)) == 2


def test_each_push_steps_by_its_share_where_the_run_says_so() -> None:
    bench = Bench(merge="per-push").begin("a", "b")
    bench.lease("a", 8)
    bench.push("a")
    (stepped,) = bench.records(Stepped)
    assert isinstance(stepped, Stepped)
    assert stepped.weights == (0.5,)


def test_a_synchronous_run_waits_for_everybody_however_long() -> None:
    bench = Bench(merge="all", lease_ttl_seconds=1e6).begin("a", "b")
    bench.lease("a", 8)
    bench.lease("b", 8)
    bench.push("a")
    bench.wait(60_000)
    assert not bench.records(Stepped)
    bench.push("b")
    assert bench.records(Stepped)


def test_the_end_merges_publishes_and_tells_everybody_at_once() -> None:
    bench = Bench(samples=8).begin("a", "b")
    while bench.server.state.ledger.free or not bench.server.state.ledger.positions:
        bench.lease("a", 8)
    told = bench.push("a")
    assert bench.server.state.is_finished
    assert told_to("a", Finished, told) == told_to("b", Finished, told) == [Finished(publish=1)]


def test_a_silent_worker_leaves_and_its_ranges_return() -> None:
    bench = Bench().begin("a", "b")
    bench.lease("a", 8)
    for _ in range(6):
        bench.wait(1000)
        bench.beat("b")
    assert bench.records(Left) == [Left(worker="a", reason="not heard for 5 s")]
    assert bench.server.state.ledger.free == ((0, 64),)
    late = replace(PUSH, ranges=((0, 8),))
    assert not told_to("a", Ack, bench.say("a", late))
    beat = Heartbeat(incarnation=1, state="", steps=1, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0)
    assert told_to("a", Rejoin, bench.say("a", beat))


def test_a_server_that_was_frozen_itself_calls_nobody_dead() -> None:
    bench = Bench().begin("a")
    bench.now_ms += 60_000
    bench.step(Tick(now_ms=bench.now_ms))
    assert not bench.records(Left)


def test_a_worker_that_joins_again_keeps_what_it_claims_and_the_older_life_is_refused() -> None:
    bench = Bench().begin("a", "b")
    bench.lease("a", 16)
    bench.say("a", replace(HELLO, claims=((0, 4), (60, 64)), life=b"new"))
    assert bench.records(Joined)[-1] == Joined(worker="a", key="a", site="s", incarnation=2, kept=((0, 4), (60, 64)))
    assert bench.server.state.ledger.held("a") == ((0, 4), (60, 64))
    beat = Heartbeat(incarnation=1, state="", steps=1, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0)
    assert told_to("a", Refused, bench.say("a", beat))


def test_after_a_restart_everybody_joins_anew_before_anything_else_is_heard() -> None:
    bench = Bench().begin("a", "b")
    bench.say("a", replace(HELLO, life=b"process"))  # given incarnation 2, in an answer that the crash swallowed
    bench.lease("a", 8)
    bench.server = Server(bench.server.settings, bench.server.state)
    assert not told_to("a", Ack, bench.say("a", replace(PUSH, incarnation=2)))
    beat = Heartbeat(incarnation=1, state="", steps=1, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0)
    told = bench.say("a", beat)
    assert told_to("a", Rejoin, told)
    assert not told_to("a", Refused, told), "the process that has joined since may be itself"
    bench.say("a", replace(HELLO, life=b"process", claims=((0, 8),)))
    assert told_to("a", Ack, bench.say("a", replace(PUSH, incarnation=3)))


def test_another_key_of_a_worker_is_another_life_so_that_each_delta_has_one_key() -> None:
    bench = Bench().begin("a")
    bench.say("a", replace(HELLO, life=b"process"))
    bench.lease("a", 8)
    push = replace(PUSH, incarnation=2, ranges=((0, 8),))
    beat = Heartbeat(incarnation=2, state="", steps=1, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0)
    assert told_to("a", Rejoin, bench.say("a", beat, key="renewed"))
    assert not told_to("a", Ack, bench.say("a", push, key="renewed"))
    bench.say("a", Bye(incarnation=2), key="renewed")
    assert bench.server.state.active == ["a"]
    hello = replace(HELLO, life=b"process", claims=((0, 8),))
    (welcome,) = told_to("a", Welcome, bench.say("a", hello, key="renewed"))
    assert bench.records(Joined)[-1] == Joined(worker="a", key="renewed", site="s", incarnation=3, kept=((0, 8),))
    assert told_to("a", Welcome, bench.say("a", hello, key="renewed")) == [welcome], "the same life is not joined twice"
    assert not told_to("a", Ack, bench.say("a", replace(push, incarnation=3))), "the older key has no life any more"
    assert told_to("a", Ack, bench.say("a", replace(push, incarnation=3), key="renewed"))
    given = bench.server.state.contributions
    assert (given["a"].lives, given["a"].samples) == (2, 0)
    assert (given["renewed"].lives, given["renewed"].samples, given["renewed"].deltas) == (1, 8, 1)


def test_who_gave_the_initial_parameters_is_in_the_genesis() -> None:
    (genesis,) = Bench().begin().records(Genesis)
    assert isinstance(genesis, Genesis) and genesis.key == "a"


def test_workers_are_given_steps_by_their_speed() -> None:
    bench = Bench().begin("a", "b")
    bench.beat("b", rate=2.0)
    bench.lease("b", 8)
    windows = told_to("b", Window, bench.push("b"))
    assert [window.steps for window in windows if isinstance(window, Window)][-1] == 2


def test_changed_settings_are_a_record() -> None:
    bench = Bench().begin("a")
    changed = replace(SETTINGS, outer_learning_rate=0.1)
    again = Server(changed, State.load(bench.server.state.dump()))
    assert [entry.record for entry in again.ready().records] == [Settings(settings=changed)]
    assert Server(SETTINGS, State.load(bench.server.state.dump())).ready().records == ()


def test_a_publish_lost_in_a_crash_behind_its_step_is_made_good() -> None:
    bench = Bench(samples=8).begin("a")
    for _ in range(8):
        bench.lease("a", 8)
        bench.push("a")
    assert bench.server.state.is_finished
    kept = max(number for number, entry in enumerate(bench.log) if isinstance(entry.record, Stepped))
    again = Bench(samples=8)
    for entry in bench.log[: kept + 1]:
        again.server.state.fold(entry)
    told = again.say("a", HELLO)
    assert again.server.state.is_finished
    assert told_to("a", Finished, told)


@pytest.mark.parametrize(
    ("changes", "unpublished"),
    [
        ({"publish_every": 3}, 2),
        ({"publish_every": 3, "max_staleness": 1}, 1),
        ({"publish_every": 3, "merge": "all"}, 0),
        ({"publish_every": 1}, 0),
    ],
)
def test_the_newest_publish_is_never_so_old_that_nobody_could_push_or_go_on(
    changes: dict[str, object], unpublished: int
) -> None:
    bench = Bench(**changes).begin("a")
    oldest = 0
    for _ in range(12):
        bench.lease("a", 4)
        bench.push("a", anchor=bench.server.state.publish)
        bench.beat("a")
        bench.wait(1300)
        state = bench.server.state
        oldest = max(oldest, state.version - state.publish_versions[state.publish])
    assert bench.server.state.version > 4
    assert oldest == unpublished
