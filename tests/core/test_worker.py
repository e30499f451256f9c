"""The worker's half of the protocol, one behaviour a test: the outbox, joining again, publishes, leases, the end."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from core.worker_bench import HELLO, WELCOME, Bench, ask, offered, only

from hetero_async.core.messages import (
    PUBLISH,
    SNAPSHOT,
    Ack,
    Beat,
    Finished,
    Gone,
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
    Want,
    Welcome,
)
from hetero_async.core.ranges import Ranges
from hetero_async.core.worker import OFFER_AGAIN_MS
from hetero_async.core.worker_events import Dropped, Fetched, Heard
from hetero_async.core.worker_events import Reconnected as Reconnects


def test_a_delta_is_saved_and_then_offered() -> None:
    owed = Bench().cut((0, 8))
    (push,) = owed.saves
    assert owed.bulk == [push]
    assert (push.seq, push.incarnation, push.ranges) == (1, 1, ((0, 8),))


def test_one_delta_is_offered_at_a_time_and_in_order() -> None:
    bench = Bench()
    assert offered(bench.cut((0, 8))) == [1]
    second = bench.cut((8, 16))
    assert ([push.seq for push in second.saves], offered(second)) == ([2], [])
    answered = bench.hear(Ack(seq=1, lsn=9))
    assert (answered.drops, offered(answered)) == ([Dropped(1)], [2])
    assert bench.hear(Ack(seq=1, lsn=9)).drops == [], "the same answer again"
    assert bench.worker.unmerged == [1, 2], "acknowledged is not merged"


def test_an_offer_that_nobody_reacts_to_is_made_again_with_the_same_header() -> None:
    bench = Bench()
    (first,) = bench.cut((0, 8)).bulk
    assert bench.wait(OFFER_AGAIN_MS - 1).bulk == []
    bench.hear(Want(kind="delta", number=1, first=0, count=8))
    assert bench.wait(1).bulk == [], "the receiver is at it"
    assert bench.wait(OFFER_AGAIN_MS).bulk == [first]
    bench.worker.step(Reconnects(now_ms=bench.now_ms))
    assert bench.wait(1).bulk == [first]


def test_a_refused_delta_no_longer_counts_as_own_progress() -> None:
    bench = Bench()
    bench.cut((0, 8))
    bench.cut((8, 16))
    assert bench.hear(Nack(seq=1, reason="too stale")).drops == [Dropped(1, "too stale")]
    assert bench.worker.unmerged == [2]
    assert bench.hear(Nack(seq=1, reason="too stale")).drops == [], "the same answer again"


def test_a_rejoin_keeps_outbox_and_bytes_and_changes_the_incarnation_only() -> None:
    bench = Bench()
    (before,) = bench.cut((0, 8)).saves
    bench.hear(Rejoin(incarnation=1, reason="given up"))
    assert not bench.worker.joined
    (hello,) = only(bench.wait(1, held=((8, 12),)), Hello)
    assert hello == replace(HELLO, attempt=1, last_seq=1, claims=((0, 12),))
    owed = bench.hear(replace(WELCOME, incarnation=2, attempt=1, granted=((0, 12),)))
    assert owed.regranted == ((8, 12),), "what lies in the outbox is not to be drawn again"
    assert bench.wait(1).bulk == [replace(before, incarnation=2)]


def test_a_rejoin_meant_for_an_earlier_life_is_not_heard() -> None:
    bench = Bench()
    bench.hear(Rejoin(incarnation=0, reason="given up"))
    assert bench.worker.joined


@pytest.mark.parametrize(
    "welcome",
    [
        replace(WELCOME, incarnation=2, attempt=1, life=b"second"),
        replace(WELCOME, incarnation=2, last_seq=1),
        replace(WELCOME, granted=((0, 4),)),
        replace(WELCOME, incarnation=0),
    ],
)
def test_a_welcome_to_somebody_else_or_to_an_old_hello_changes_nothing(welcome: Welcome) -> None:
    bench = Bench()
    assert bench.hear(welcome).regranted is None
    assert bench.worker.incarnation == 1
    bench.hear(Rejoin(incarnation=1, reason="given up"))
    assert bench.hear(welcome).regranted is None
    assert not bench.worker.joined


def test_hello_carries_the_newest_receipt() -> None:
    bench = Bench()
    for start in (0, 8):
        bench.cut((start, start + 8))
    bench.hear(Ack(seq=2, lsn=5, receipt=b"two"))
    bench.hear(Ack(seq=1, lsn=4, receipt=b"one"))
    bench.hear(Rejoin(incarnation=1, reason="given up"))
    (hello,) = only(bench.wait(1), Hello)
    assert isinstance(hello, Hello)
    assert (hello.acknowledged, hello.receipt) == (2, b"two")


def test_a_new_life_offers_what_the_old_one_left_and_numbers_on_from_there() -> None:
    left = dict(_pushes(5, 3))
    bench = Bench(joined=False)
    bench.worker.restore(left)
    (hello,) = only(bench.wait(1), Hello)
    assert isinstance(hello, Hello)
    assert (hello.last_seq, hello.claims) == (5, ((24, 32), (40, 48)))
    bench.hear(replace(WELCOME, incarnation=2, last_seq=4))
    assert offered(bench.wait(1)) == [3]
    assert bench.worker.unmerged == [3, 5]
    assert bench.cut((50, 51)).saves[0].seq == 6


def _pushes(*numbers: int) -> Iterator[tuple[int, Push]]:
    for seq in numbers:
        yield (
            seq,
            Push(
                incarnation=1, seq=seq, anchor=0, anchor_term=1, steps=1, ranges=((8 * seq, 8 * seq + 8),),
                codec="int8",
                payload_bytes=1, payload_hash=b"h",
            ),
        )  # fmt: skip


def test_numbers_go_on_from_the_log_when_the_outbox_is_empty() -> None:
    bench = Bench(joined=False)
    bench.hear(replace(WELCOME, last_seq=11))
    assert bench.cut((0, 8)).saves[0].seq == 12


def test_what_a_publish_contains_is_merged_and_its_lost_acknowledgement_is_made_good() -> None:
    bench = Bench()
    for start in (0, 8, 16):
        bench.cut((start, start + 8))
    bench.hear(Ack(seq=1, lsn=9))
    bench.worker.step(Fetched(number=1, term=0, merged_seq=2))
    assert bench.worker.unmerged == [3]
    assert bench.worker.ready().drops == [Dropped(2)]
    assert list(bench.worker.outbox) == [3]


@pytest.mark.parametrize(
    ("shadow", "heard", "wanted"),
    [
        (None, (), (SNAPSHOT, 0)),
        (0, (), None),
        (0, (PublishReady(number=1, version=1),), (PUBLISH, 1)),
        (1, (PublishReady(number=3, version=3),), (PUBLISH, 2)),
        (1, (Beat(version=3, publish=3, oldest=2, trained=0, positions=9),), (PUBLISH, 2)),
        (1, (Beat(version=3, publish=3, oldest=3, trained=0, positions=9),), (SNAPSHOT, 3)),
        (1, (PublishReady(number=2, version=2), Gone(kind=PUBLISH, number=2)), (SNAPSHOT, 2)),
        (1, (PublishReady(number=2, version=2), PublishReady(number=1, version=1)), (PUBLISH, 2)),
        (5, (Rejoin(incarnation=1, reason="x"), replace(WELCOME, attempt=1, publish=3)), (SNAPSHOT, 3)),
    ],
)
def test_what_is_fetched_next(
    shadow: int | None, heard: tuple[Message, ...], wanted: tuple[str, int] | None
) -> None:  # fmt: skip
    bench = Bench()
    if shadow is not None:
        bench.worker.step(Fetched(number=shadow, term=0, merged_seq=0))
    for message in heard:
        bench.hear(message)
    assert bench.worker.wanted == wanted


def test_nothing_is_fetched_before_the_worker_has_joined() -> None:
    assert Bench(joined=False).worker.wanted is None


def test_it_is_finished_when_it_stands_on_the_last_publish() -> None:
    bench = Bench()
    bench.hear(Beat(version=1, publish=1, oldest=1, trained=30, positions=40))
    assert bench.worker.progress == 0.75
    bench.hear(Finished(publish=2))
    assert (bench.worker.is_finished, bench.worker.wanted) == (False, (SNAPSHOT, 2))
    bench.worker.step(Fetched(number=2, term=0, merged_seq=0))
    assert bench.worker.is_finished
    assert bench.worker.progress == 1.0
    assert not only(bench.wait(1000, wanted_samples=8, batch=4), LeaseRequest)


def test_more_is_asked_for_with_all_that_is_held_named() -> None:
    bench = Bench()
    bench.cut((0, 8))
    (request,) = only(
        bench.wait(500, held=((8, 12),), wanted_samples=16, batch=4, dataset_samples=64), LeaseRequest
    )  # fmt: skip
    assert isinstance(request, LeaseRequest)
    assert (request.held, request.samples, request.batch, request.dataset_samples) == (((0, 12),), 16, 4, 64)
    assert not only(bench.wait(100, wanted_samples=16), LeaseRequest), "not so often"


def grants(bench: Bench, number: int) -> list[Ranges]:
    return bench.hear(Lease(number=number, ranges=((0, 4),), samples=64)).granted


def test_an_answer_to_the_present_request_is_taken_once() -> None:
    bench = Bench()
    number = ask(bench)
    assert grants(bench, number) == [((0, 4),)]
    assert grants(bench, number) == [], "it arrived twice"
    older = ask(bench)
    assert grants(bench, ask(bench)) == [((0, 4),)]
    assert grants(bench, older) == []


def test_an_answer_that_takes_longer_than_the_next_request_is_taken() -> None:
    bench = Bench()
    number = ask(bench)
    assert [ask(bench) for _ in range(3)] == [number] * 3
    assert grants(bench, number) == [((0, 4),)]
    assert ask(bench) != number


def test_what_was_granted_and_is_on_its_way_to_the_loop_is_not_asked_for_again() -> None:
    bench = Bench()
    number = ask(bench)
    bench.worker.step(Heard(now_ms=bench.now_ms, message=Lease(number=number, ranges=((0, 4),), samples=64)))
    late = bench.wait(500, wanted_samples=16, batch=4, dataset_samples=64)
    assert late.granted == [((0, 4),)]
    assert not only(late, LeaseRequest), "it would say that it does not hold what it was granted"
    assert only(bench.wait(1, held=((0, 4),), wanted_samples=12, batch=4, dataset_samples=64), LeaseRequest)


def test_a_refusal_because_it_has_itself_joined_again_makes_it_say_hello() -> None:
    bench = Bench()
    bench.hear(Refused(reason="another process has joined", incarnation=1, life=b"first"))
    assert bench.worker.refusal == ""
    assert only(bench.wait(0), Hello)
    bench.hear(replace(WELCOME, incarnation=2, attempt=1))
    bench.hear(Refused(reason="another process has joined", incarnation=2, life=b"second"))
    assert bench.worker.refusal == "another process has joined"


def test_a_refusal_meant_for_an_earlier_life_is_not_heeded() -> None:
    bench = Bench(joined=False)
    bench.hear(replace(WELCOME, incarnation=2))
    bench.hear(Refused(reason="another process has joined", incarnation=1))
    assert bench.worker.refusal == ""
    bench.hear(Refused(reason="another process has joined", incarnation=2))
    assert bench.worker.refusal == "another process has joined"


def test_an_answer_to_another_life_is_not_taken() -> None:
    bench, next_life = Bench(), Bench(joined=False)
    numbers = [ask(bench) for _ in range(3)]
    next_life.hear(replace(WELCOME, incarnation=2))
    ask(next_life)
    assert all(not grants(next_life, number) for number in numbers)
    older = ask(bench)
    bench.hear(Rejoin(incarnation=1, reason="given up"))
    bench.hear(replace(WELCOME, attempt=1))
    assert bench.worker.joined
    assert grants(bench, older) == [], "it was asked before the server said what is still held"


def test_hellos_and_heartbeats_are_said_again_until_the_world_changes() -> None:
    bench = Bench(joined=False)
    assert [len(only(bench.wait(500), Hello)) for _ in range(4)] == [1, 0, 1, 0]
    bench.hear(WELCOME)
    assert [len(only(bench.wait(500), Heartbeat)) for _ in range(4)] == [1, 0, 1, 0]


def test_a_heartbeat_tells_how_long_the_quickest_answer_took() -> None:
    bench = Bench()
    answer = Beat(version=1, publish=0, oldest=0, trained=0, positions=0)

    def told_after(milliseconds: int) -> float:
        """What the next heartbeat says when this one is answered after so long."""
        bench.wait(milliseconds)
        bench.hear(answer)
        (beat,) = only(bench.wait(1000 - milliseconds), Heartbeat)
        assert isinstance(beat, Heartbeat)
        return beat.usage.round_trip_seconds

    (first,) = only(bench.wait(1000), Heartbeat)
    assert isinstance(first, Heartbeat) and first.usage.round_trip_seconds == 0
    assert [told_after(milliseconds) for milliseconds in (300, 80, 500)] == [0.3, 0.08, 0.08]
    assert [told_after(200) for _ in range(8)][-1] == 0.2, "what was long ago does not count"
    bench.worker.step(Reconnects(now_ms=bench.now_ms))
    bench.hear(answer)  # to a question on the connection before
    (beat,) = only(bench.wait(1000), Heartbeat)
    assert isinstance(beat, Heartbeat) and beat.usage.round_trip_seconds == 0.2


def test_a_refusal_that_overtakes_our_own_welcome_is_not_heeded() -> None:
    bench = Bench()
    bench.hear(Rejoin(incarnation=1, reason="given up"))
    bench.hear(Refused(reason="another process has joined", incarnation=1))
    assert bench.worker.refusal == ""
    bench.hear(replace(WELCOME, incarnation=2, attempt=1))
    bench.hear(Refused(reason="another process has joined", incarnation=2))
    assert bench.worker.refusal == "another process has joined"


def test_before_the_run_begins_it_provides_or_waits_and_after_a_refusal_it_says_nothing() -> None:
    bench = Bench(joined=False)
    assert bench.hear(Provide()).provide
    bench.hear(Wait(reason="a is sending"))
    assert bench.worker.waiting == "a is sending"
    bench.hear(Refused(reason="another model"))
    assert bench.worker.refusal == "another model"
    assert bench.wait(5000).control == []
