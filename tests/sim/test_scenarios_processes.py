"""Processes that die, freeze, come back or come twice: what each of them must come to."""

import time
from pathlib import Path

import pytest
import torch
import trio
from sim.scenario import (
    LEASE_SECONDS,
    NEVER,
    ScriptedWorld,
    die_at_every_call,
    make_plan,
    positions,
    run,
    trained_in,
)

from hetero_async.core import ranges
from hetero_async.core.messages import Ack, Message, Nack, Rejoin
from hetero_async.core.records import Delta, Joined, Leased, Left
from hetero_async.errors import RefusedError, first_error
from hetero_async.sim.lives import WorkerLife
from hetero_async.sim.plan import SERVER
from hetero_async.sim.process import Process
from hetero_async.sim.workload import Regression
from hetero_async.sim.world import simulate

DISK_CALLS = {"write", "fsync", "fsync of a directory", "fallocate", "truncate", "rename", "unlink"}
DAY_SECONDS = 86_400.0
# The wall clock is right until then.
JUMP_SECONDS = 3.0


def leased_since(world: ScriptedWorld, at: float) -> list[int]:
    """Positions that were given to somebody, one by one; whoever joins again may keep some of his own."""
    leased = [entry.record.ranges for when, entry in world.records(Leased) if when >= at]
    kept = [entry.record.kept for when, entry in world.records(Joined) if when >= at]
    return [position for given in [*leased, *kept] for position in positions(given)]


def test_01_a_worker_killed_in_a_step_gives_its_samples_back_once(tmp_path: Path) -> None:
    held: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w0")) == 2, "w0 has trained a while")
        world.kill("w0")
        held.extend(positions(world.state.ledger.held("w0")))
        await world.until(lambda: world.records(Left, "w0"), "w0 is given up")

    world = run(make_plan(stays_away="w0"), tmp_path, script)
    ((left_at, left),) = world.records(Left, "w0")
    assert left.record.reason == f"not heard for {LEASE_SECONDS:g} s"
    assert LEASE_SECONDS <= left_at - world.times(SERVER, "← w0")[-1] < LEASE_SECONDS + 0.1
    assert len(held) > 0
    assert sorted(position for position in leased_since(world, left_at) if position in held) == held
    assert sorted(position for position in trained_in(world.deltas("w1")) if position in held) == held
    assert not [position for position in trained_in(world.deltas("w0")) if position in held]


def test_02_a_worker_killed_before_its_acknowledgement_comes_is_told_again(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        def kill(node: str, worker: str, message: Message) -> None:
            if worker == "w0" and isinstance(message, Ack) and message.seq == 2 and world.lives("w0") == 1:
                world.kill("w0", seconds=1.0)

        world.before_sending = kill
        await world.until(lambda: world.times("w0", "← server: Ack seq=2"), "w0 has heard of its delta")

    world = run(make_plan(), tmp_path, script)
    assert world.lives("w0") == 2
    assert [entry.record.incarnation for _, entry in world.records(Joined, "w0")] == [1, 2]
    ((at, entry),) = [(at, entry) for at, entry in world.records(Delta, "w0") if entry.record.seq == 2]
    told = world.answers("w0", Ack, seq=2)
    assert len(told) >= 2
    assert {message.lsn for _, message in told} == {entry.lsn}
    assert not world.answers("w0", Nack, seq=2)
    assert not {*leased_since(world, at)} & {*positions(entry.record.ranges)}, "trained is not leased again"


def test_03_a_worker_frozen_beyond_its_lease_finds_its_samples_given_to_others(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w0")) == 2, "w0 has trained a while")
        held = world.state.ledger.held("w0")
        world.processes["w0"].freeze()
        await world.until(lambda: world.records(Left, "w0"), "w0 is given up")
        await world.until(
            lambda: not ranges.intersection(held, world.state.ledger.free), "others have what was leased to w0"
        )
        world.processes["w0"].thaw()
        await world.until(lambda: len(world.deltas("w0")) > 3, "w0 trains again")

    world = run(make_plan(samples=300, max_staleness=8), tmp_path, script)
    left_at = world.records(Left, "w0")[0][0]
    assert world.lives("w0") == 1
    assert [type(message) for at, message in world.answers("w0", Rejoin)][:1] == [Rejoin]
    refused = [message.reason for at, message in world.answers("w0", Nack) if at > left_at]
    assert refused
    assert all(reason.startswith("positions ") and reason.endswith("are not leased to it") for reason in refused)
    assert [entry.record.incarnation for _, entry in world.records(Joined, "w0")] == [1, 2]
    after = [entry.record for at, entry in world.records(Delta, "w0") if at > left_at]
    assert {delta.incarnation for delta in after} == {2}, "what comes later is of its new life"


def test_03_a_worker_frozen_beyond_its_lease_keeps_samples_that_nobody_took(tmp_path: Path) -> None:
    held: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w0")) == 2, "w0 has trained a while")
        held.extend(positions(world.state.ledger.held("w0")))
        world.processes["w0"].freeze()
        await world.until(lambda: world.records(Left, "w0"), "w0 is given up")
        await trio.sleep(1)
        world.processes["w0"].thaw()

    world = run(make_plan(workers=1), tmp_path, script)
    ((left_at, _),) = world.records(Left, "w0")
    assert not world.answers("w0", Nack), "the lease was still its own"
    first = next(entry.record for at, entry in world.records(Delta, "w0") if at > left_at)
    assert (first.seq, first.incarnation) == (3, 2)
    assert {*positions(first.ranges)} <= {*held}


def test_04_a_server_killed_at_every_disk_call_comes_back_with_all_it_acknowledged(tmp_path: Path) -> None:
    deaths: list[tuple[str, str, int]] = []

    async def script(world: ScriptedWorld) -> None:
        deaths.extend(await die_at_every_call(world, cut_power=False))

    world = run(make_plan(samples=600, checkpoint_every=1, segment_bytes=4096), tmp_path, script)
    assert len(deaths) >= 30
    assert {name for name, _, _ in deaths} == DISK_CALLS
    assert all(lsn >= applied for lsn, applied, _ in world.noted.recoveries[SERVER])
    assert any(lsn > applied for lsn, applied, _ in world.noted.recoveries[SERVER]), (
        "some came back with what was not acknowledged"
    )


def test_05_a_server_killed_between_writing_and_acknowledging_answers_from_what_it_knows(tmp_path: Path) -> None:
    died_at: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        def kill(node: str, worker: str, message: Message) -> None:
            if worker == "w0" and isinstance(message, Ack) and message.seq == 2 and not died_at:
                died_at.append(trio.current_time())
                world.kill(SERVER, seconds=1.0)
                world.processes[SERVER].check()

        world.before_sending = kill
        await world.until(lambda: world.times("w0", "← server: Ack seq=2"), "w0 has heard of its delta")

    world = run(make_plan(), tmp_path, script)
    assert world.lives(SERVER) == 2
    ((_, entry),) = [(at, entry) for at, entry in world.records(Delta, "w0") if entry.record.seq == 2]
    assert {message.lsn for _, message in world.answers("w0", Ack, seq=2)} == {entry.lsn}
    assert len([at for at in world.times("w0", "→ server: Push seq=2 ") if at > died_at[0]]) >= 1, "it is offered again"
    assert not [at for at in world.times("w0", "→ server: Chunk number=2 kind=delta") if at > died_at[0]], (
        "not sent again"
    )
    assert len(world.times("w0", "→ server: Chunk number=2 kind=delta")) == 1


def test_12_everything_killed_and_brought_back_in_random_orders_converges(tmp_path: Path) -> None:
    names = [SERVER, "w0", "w1", "w2"]

    async def script(world: ScriptedWorld) -> None:
        random = world.random("swizzle")
        for _ in range(3):
            await trio.sleep(2)
            for name in random.sample(names, len(names)):
                world.kill(name)
                await trio.sleep(random.random())
            for name in random.sample(names, len(names)):
                world.release(name)
                await trio.sleep(random.random())

    world = run(make_plan(workers=3, sites=2), tmp_path, script)
    assert [world.lives(name) for name in names] == [4, 4, 4, 4]
    last = len(world.judge.story.publishes) - 1
    for name in names[1:]:
        publish, target = world.newest[name].target
        assert publish == last
        assert torch.equal(target, world.judge.story.publishes[last].shadow), f"{name} ends where the server does"


@pytest.mark.parametrize("shift", ["ahead", "back", "strobe"])
def test_43_the_wall_clock_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: str) -> None:
    plan = make_plan(samples=60)

    def fingerprint(name: str) -> str:
        outcome = simulate(plan, tmp_path / name, Regression(plan.dataset_samples, plan.seed))
        assert outcome.violation is None
        return outcome.fingerprint

    true = fingerprint("true")
    real, asked = time.time, [0]

    def wrong() -> float:
        asked[0] += 1
        if trio.current_time() < JUMP_SECONDS:
            return real()
        return real() + {"ahead": 30 * DAY_SECONDS, "back": -3600.0, "strobe": (-1) ** asked[0] * 3600.0}[shift]

    monkeypatch.setattr(time, "time", wrong)
    monkeypatch.setattr(time, "time_ns", lambda: int(wrong() * 1e9))
    assert fingerprint("wrong") == true


def test_62_of_two_processes_with_one_key_and_one_disk_the_newer_stays(tmp_path: Path) -> None:
    refused: list[str] = []

    async def original(world: ScriptedWorld) -> None:
        """The first life of w0, started by hand: its clone is the one that the world looks after."""
        plan = world.plan.workers[0]
        process = Process("w0", plan.site)
        try:
            with process.scope:
                await WorkerLife(world, process, plan).run()
        except* RefusedError as group:
            refused.append(str(first_error(group)))
            process.kill()

    async def script(world: ScriptedWorld) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(original, world)
            await world.until(lambda: len(world.deltas("w0")) == 2, "w0 has trained a while")
            world.disks["w0"] = world.copy_disk("w0")
            world.release("w0")
            await world.until(lambda: refused, "the older one is sent away")

    world = run(make_plan(first_joins_at=NEVER), tmp_path, script)
    assert refused == ["another process with the key of w0 has joined since; this one must stop"]
    assert [entry.record.incarnation for _, entry in world.records(Joined, "w0")] == [1, 2]
    assert {delta.incarnation for delta in world.deltas("w0")} == {1, 2}, "both have trained, one after the other"
    (joined_at, _) = world.records(Joined, "w0")[1]
    assert {entry.record.incarnation for at, entry in world.records(Delta, "w0") if at >= joined_at} == {2}
