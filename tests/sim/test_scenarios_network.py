"""Links that are cut, one-way, flapping, doubling and reordering, and a slow reader at their end."""

from itertools import pairwise
from pathlib import Path

import pytest
import trio
from sim.scenario import LEASE_SECONDS, NEVER, ScriptedWorld, make_plan, positions, run, trained_in

from hetero_async.core.messages import Ack, Nack
from hetero_async.core.records import Delta, Joined, Left, Stepped
from hetero_async.formats.chunks import CREDITS
from hetero_async.shell.dial import SILENCE_SECONDS
from hetero_async.sim.checkers import OUTBOX_MAX
from hetero_async.sim.network import Condition
from hetero_async.sim.plan import SERVER

CUT_SECONDS = 8.0
UP, DOWN = ("site1", SERVER), (SERVER, "site1")


def between(times: list[float], begin: float, end: float) -> list[float]:
    return [at for at in times if begin <= at < end]


def test_09_a_site_that_is_cut_off_is_replaced_and_held_to_the_bound_when_it_returns(tmp_path: Path) -> None:
    cut_at: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w1")) == 2, "site1 trains")
        cut_at.append(trio.current_time())
        world.cut(UP, DOWN)
        await trio.sleep(CUT_SECONDS)
        world.mend(UP, DOWN)
        await world.until(lambda: len(world.records(Joined, "w1")) == 2, "site1 is back")

    world = run(make_plan(workers=4, sites=2, samples=500, max_staleness=2), tmp_path, script)
    mended_at = cut_at[0] + CUT_SECONDS
    steps = between([at for at, _ in world.records(Stepped)], cut_at[0] + LEASE_SECONDS + 2, mended_at)
    assert len(steps) >= 2, "the others go on"
    for name in ("w1", "w3"):
        (left_at, _), *_ = world.records(Left, name)
        assert left_at < cut_at[0] + LEASE_SECONDS + 1.5
        assert not [at for at, _ in world.records(Delta, name) if left_at < at < mended_at]
        late = [message.reason for at, message in world.answers(name, Nack) if at > mended_at]
        assert late, "what was trained before the cut comes too late"
        assert all("too stale: " in reason or "are not leased to it" in reason for reason in late)
        assert world.deltas(name)[-1].incarnation == 2
        assert world.lives(name) == 1


@pytest.mark.parametrize("way", [UP, DOWN])
def test_13_a_link_that_carries_one_way_only_is_given_up_and_what_was_sent_is_sent_again(
    tmp_path: Path, way: tuple[str, str]
) -> None:
    cut_at: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.times("w1", "→ server: Push")) == 3, "w1 has just offered a delta")
        cut_at.append(trio.current_time())
        world.cut(way)
        await trio.sleep(CUT_SECONDS + 2)
        world.mend(way)
        await world.until(lambda: len(world.deltas("w1")) > 3, "w1 trains again")

    world = run(make_plan(workers=2, sites=2, samples=400), tmp_path, script)
    (end,) = [end for end in world.ends if end.peer.worker == "w1"]
    assert end.generation == 2, "it has connected anew, once it went both ways"
    heard = world.times("w1", "← server")
    assert max(later - earlier for earlier, later in pairwise(heard)) >= SILENCE_SECONDS
    offers = world.times("w1", "→ server: Push seq=3 ")
    assert len(between(offers, 0, cut_at[0])) == 1
    assert len(between(offers, cut_at[0], NEVER)) >= 2, "it is offered until it is answered"
    given_up = [entry.record.reason for _, entry in world.records(Left, "w1") if entry.record.reason != "said bye"]
    assert given_up == ([f"not heard for {LEASE_SECONDS:g} s"] if way == UP else []), "the server hears, or does not"
    assert {message.reason.split(":")[0] for _, message in world.answers("w1", Nack, seq=3)} == {"too stale"}
    refused, _ = world.judge.account("w1").saved[3]
    assert 3 not in [delta.seq for delta in world.deltas("w1")]
    assert {*positions(refused.ranges)} <= {*trained_in([*world.deltas("w0"), *world.deltas("w1")])}


def test_19_a_flapping_link_makes_progress_and_piles_nothing_up(tmp_path: Path) -> None:
    flapped: list[float] = []
    outbox: list[int] = []
    under_way: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w1")) == 1, "site1 trains")
        flapped.append(trio.current_time())
        for _ in range(10):
            world.cut(UP, DOWN)
            await trio.sleep(1)
            world.mend(UP, DOWN)
            await trio.sleep(1)
            outbox.append(len(world.judge.account("w1").unanswered))
            under_way.append(len(world.network._under_way))
        flapped.append(trio.current_time())

    world = run(make_plan(workers=2, sites=2, samples=400), tmp_path, script)
    progress = between([at for at, _ in world.records(Delta, "w1")], *flapped)
    assert len(progress) >= 5
    assert {entry.record.reason for _, entry in world.records(Left, "w1")} <= {"said bye"}, "its lease lasts longer"
    assert max(outbox) <= 2 < OUTBOX_MAX
    assert max(under_way) < 20


def test_27_a_slow_reader_is_sent_no_more_than_it_asked_for_and_nothing_is_dropped(tmp_path: Path) -> None:
    waiting: list[int] = []
    trained: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w1")) == 1, "w1 trains")
        (end,) = [end for end in world.ends if end.peer.worker == "w1"]
        before = len(world.deltas("w0"))
        for _ in range(20):
            world.processes["w1"].freeze()
            await trio.sleep(0.5)
            waiting.append(end.bulk._inbox.statistics().current_buffer_used)
            world.processes["w1"].thaw()
            await trio.sleep(0.02)
        trained.append(len(world.deltas("w0")) - before)

    plan = make_plan(samples=300, chunk_bytes=16, codec_up="fp32", codec_down="fp32")
    world = run(plan, tmp_path, script)
    assert CREDITS <= max(waiting) <= 2 * CREDITS, "what it asked for, and what it is asked for"
    assert trained[0] >= 8, "others do not wait for it"
    sent = [line[12:] for line in world.lines if "→ w1: Chunk" in line]
    assert len(sent) > 200
    assert len(sent) == len({*sent}), "no chunk was dropped and sent again"


def test_44_messages_that_come_ten_times_count_once(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: world.state.is_finished if world.serving else False, "the run is trained")

    world = run(make_plan(samples=36, link=Condition(doubled=1.0, copies=9)), tmp_path, script)
    for name in ("w0", "w1"):
        assert len(world.records(Joined, name)) == 1
        admitted_at = {entry.record.seq: (at, entry.lsn) for at, entry in world.records(Delta, name)}
        assert list(admitted_at) == list(range(1, len(admitted_at) + 1)), "each is admitted"
        for seq, (_, lsn) in admitted_at.items():
            assert {message.lsn for _, message in world.answers(name, Ack, seq=seq)} == {lsn}
        assert len(world.answers(name, Ack)) > 2 * len(admitted_at), "said again, it is answered again"
        for at, message in world.answers(name, Nack):  # a copy that came when the next one was in the log already
            assert message.reason.startswith(f"delta {message.seq} comes after delta ")
            assert admitted_at[message.seq + 1][0] <= at


def test_45_messages_and_chunks_in_any_order_are_put_in_order(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: world.state.is_finished if world.serving else False, "the run is trained")

    plan = make_plan(link=Condition(reordered=1.0, jitter=0.4), chunk_bytes=16, max_staleness=8)
    world = run(plan, tmp_path, script)
    for name in ("w0", "w1"):
        seqs = [delta.seq for delta in world.deltas(name)]
        assert seqs == sorted({*seqs})
        assert len(seqs) >= 4
        arrived = [line.split("index=")[1] for line in world.lines if f"← {name}: Chunk" in line and "delta" in line]
        assert sum(int(later) != int(earlier) + 1 for earlier, later in pairwise(arrived)) > len(arrived) / 2
