"""What a worker makes of servers that change: whom it heeds, and what of the old one's is still the run's."""

from dataclasses import replace

import pytest
from core.worker_bench import WELCOME, Bench, ask, only

from hetero_async.core.messages import (
    PUBLISH,
    SNAPSHOT,
    Ack,
    Beat,
    Hello,
    Lease,
    Push,
    Redirect,
)
from hetero_async.core.worker import LOST, TURN_EVERY_MS
from hetero_async.core.worker_events import Dropped, Fetched, Owed


@pytest.mark.parametrize(
    ("fetched_from", "common", "wanted"),
    [
        (1, 4, None),  # the new server goes on from there or from later
        (1, 2, (SNAPSHOT, 5)),  # its third publish is another one
        (2, 5, None),
    ],
)
def test_what_another_server_has_published_is_kept_where_it_is_the_runs(
    fetched_from: int, common: int, wanted: tuple[str, int] | None
) -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=1)
    bench.worker.step(Fetched(number=3, term=1, merged_seq=0))
    bench.hear(Beat(version=9, publish=9, oldest=1, trained=0, positions=9), term=2)
    (hello,) = only(bench.wait(1), Hello)
    assert isinstance(hello, Hello)
    assert hello.shadow_term == 1
    bench.hear(replace(WELCOME, incarnation=2, attempt=1, publish=5, common=common), term=2)
    if fetched_from == 2:
        bench.worker.step(Fetched(number=5, term=2, merged_seq=0))
    assert bench.worker.wanted == (wanted if wanted or fetched_from == 2 else (PUBLISH, 4))
    assert (bench.cut((0, 8), anchor=3).saves[0].anchor, bench.worker.shadow_term) == (3, fetched_from)


def test_what_arrives_late_from_a_server_before_is_not_relied_on() -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=1)
    bench.hear(replace(WELCOME, incarnation=2, attempt=1, publish=1, common=1), term=2)
    bench.worker.step(Fetched(number=1, term=1, merged_seq=0))
    assert bench.worker.wanted == (SNAPSHOT, 1)


def test_a_delta_that_was_lost_with_its_server_is_waited_for_no_longer() -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=1)
    for start in (0, 8, 16):
        bench.cut((start, start + 8))
    for seq in (1, 2):
        bench.hear(Ack(seq=seq, lsn=9 + seq), term=1)
    welcome = replace(WELCOME, incarnation=2, attempt=1, last_seq=1)
    assert bench.hear(welcome, term=2).drops == [Dropped(2, LOST)]
    assert bench.worker.unmerged == [1, 3]


def test_a_new_servers_answer_to_the_life_under_the_old_one_is_not_taken() -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=1)
    lease = Lease(number=ask(bench), ranges=((0, 4),), samples=64)
    assert bench.hear(lease, term=2).granted == [], "it is not in the claims of the Hello that comes next"
    assert only(bench.wait(0), Hello)


def test_nothing_of_a_lower_term_is_heeded_and_a_higher_one_is_joined_anew() -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=1)
    bench.cut((0, 4))
    owed = bench.hear(Beat(version=0, publish=0, oldest=0, trained=0, positions=8), term=2)
    assert not bench.worker.joined
    assert only(bench.wait(0), Hello)
    assert bench.hear(Ack(seq=1, lsn=5), term=1).drops == owed.drops == []
    owed = bench.hear(replace(WELCOME, incarnation=2, attempt=1), term=2)
    assert [push.incarnation for push in bench.wait(0).bulk if isinstance(push, Push)] == [2]
    lease = Lease(number=ask(bench), ranges=((4, 8),), samples=64)
    assert bench.hear(lease, term=1).granted == []
    assert bench.hear(lease, term=2).granted == [((4, 8),)]


def test_a_redirect_is_followed_unless_it_comes_from_the_past() -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=2)
    assert bench.hear(Redirect(server="a", term=1)).turn is None
    assert bench.hear(Redirect(server="b", term=2)).turn == "b"


def test_a_server_that_may_have_been_deposed_sends_it_to_any_other_and_not_faster_than_one_is_found() -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=1)
    away = Redirect(server="", term=1)
    assert bench.hear(away, term=1).turn == ""
    assert bench.hear(away, term=1).turn is None
    assert bench.wait(TURN_EVERY_MS) and bench.hear(away, term=1).turn == ""


def test_a_deposed_server_that_goes_on_answering_is_not_heeded_and_left_for_another() -> None:
    bench = Bench(joined=False)
    bench.hear(WELCOME, term=2)
    bench.cut((0, 4))
    beat = Beat(version=9, publish=9, oldest=0, trained=0, positions=8)
    owed = bench.hear(beat, term=1)
    assert owed.turn == "" and bench.worker.joined
    assert bench.worker.known_publish == 0
    assert bench.hear(Redirect(server="", term=1), term=1).turn is None, "the way is still being changed"
    bench.wait(TURN_EVERY_MS)
    assert bench.hear(Ack(seq=1, lsn=5), term=1) == Owed(turn="")
