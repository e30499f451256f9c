"""Standbys that are slow, promoted at once, lied about, or die while they take over."""

from collections import Counter
from pathlib import Path

import pytest
import trio
from sim.cluster import (
    AWAY_SECONDS,
    BY_HAND,
    WAITING_MAX,
    WITNESSED,
    acks,
    both_ways,
    either_way,
    is_whole,
    reigns,
    take_over,
    trained,
)
from sim.scenario import CALLS_MAX, ScriptedWorld, make_plan, run

from hetero_async.core.messages import Confirm, Redirect
from hetero_async.core.replication import Durability
from hetero_async.ports import Incoming
from hetero_async.sim.network import DialEnd
from hetero_async.sim.plan import SERVER
from hetero_async.sim.process import Process


def test_18_of_two_that_are_promoted_at_once_one_serves_at_most(tmp_path: Path) -> None:
    begun: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.kill(SERVER)
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            for node in ("b", "c"):
                nursery.start_soon(world.operators[node], False)
        begun.append(len(world.times("b", "takes over")) + len(world.times("c", "takes over")))
        if not begun[0]:  # each had granted the term to itself
            await world.operators["c"](False)
        await world.until(lambda: world.is_served_by("b") or world.is_served_by("c"), "one serves")
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b", "c"), rules=BY_HAND), tmp_path, script)
    assert begun[0] <= 1
    terms = [term for term, _ in reigns(world)]
    assert terms == sorted({*terms})
    assert len(terms) == 1
    assert len({said.node for said in world.acks}) == 2
    assert is_whole(world, world.acks)


@either_way
def test_27_a_standby_with_a_slow_disk_makes_acknowledgements_slow_and_nothing_is_dropped(
    tmp_path: Path, rules: Durability
) -> None:
    moments: list[float] = []
    waiting: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.disks["b"].troubles.slow_seconds = 1.5
        moments.append(trio.current_time() + 3)
        for _ in range(30):
            await trio.sleep(0.5)
            waiting.append(len(world.serving.machine._post._held))
        moments.append(trio.current_time())
        world.disks["b"].troubles.slow_seconds = 0.0
        await trained(world)

    world = run(make_plan(samples=400, standbys=("b",), rules=rules), tmp_path, script)
    assert len(acks(world, SERVER, *moments)) >= 3
    assert max(waiting) <= WAITING_MAX
    assert not reigns(world)
    assert is_whole(world, world.acks)


def test_27_a_standby_that_changes_servers_in_the_middle_of_a_slow_append_confirms_none_of_it(tmp_path: Path) -> None:
    """What c is writing is of the lost server only. The new one must not take it for its own records."""

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(*both_ways(SERVER, "b"))
        world.disks["c"].troubles.slow_seconds = 8.0
        appended = [0]

        def begins(name: str, path: str) -> None:
            appended[0] += name == "fsync" and "/c/log" in path

        world.disk_of("c").before = begins
        await world.until(lambda: appended[0], "c has begun to write")
        world.kill(SERVER)
        world.mend(*both_ways(SERVER, "b"))
        await take_over(world)
        await trio.sleep(AWAY_SECONDS)
        world.disks["c"].troubles.slow_seconds = 0.0
        await trained(world, 3)
        assert world.times("c", "cut"), "and it is cut off"

    world = run(make_plan(samples=400, standbys=("b", "c"), rules=BY_HAND), tmp_path, script)
    assert is_whole(world, world.acks)
    assert reigns(world) == [(2, "b")]


def test_48_a_confirmation_of_an_unknown_term_releases_nothing(tmp_path: Path) -> None:
    heard: list[Incoming] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.kill("b")
        await trio.sleep(1)
        known = len(world.acks)
        end = DialEnd(world.network, Process("c", "site0"), [SERVER], role="standby", key=b"c")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end.run)
            await world.until(lambda: end.connection, "it is connected")
            for term in (0, 2, 7):
                assert await end.control.send(SERVER.encode(), Confirm(term=term, lsn=world.state.lsn))
                heard.append(await end.control.receive())
            nursery.cancel_scope.cancel()
        await trio.sleep(2)
        assert "c" not in world.serving.machine.replication.standings
        assert len(world.acks) == known
        world.release("b")
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=BY_HAND), tmp_path, script)
    assert [(incoming.term, incoming.message) for incoming in heard] == 3 * [(1, Redirect(server=SERVER, term=1))]
    assert not reigns(world)


@pytest.mark.parametrize("cut_power", [False, True], ids=["killed", "power"])
def test_69_a_standby_that_dies_at_any_disk_call_of_its_promotion_goes_on_with_it(
    tmp_path: Path, cut_power: bool
) -> None:
    deaths: list[tuple[str, str, int]] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.kill(SERVER)
        disk, life = world.disk_of("b"), Counter[tuple[str, str]]()

        def is_over() -> bool:
            """Its reign has begun: as soon as c is in step with it, c may take over from it."""
            return bool(acks(world, "b") or world.times("b", "partner"))

        def die(name: str, path: str) -> None:
            place = next((part for part in ("log", "checkpoints") if f"/b/{part}" in path), "root")
            life[name, place] += 1
            call = (name, place, life[name, place])
            if not disk.troubles.die_in_calls and call not in deaths and call[2] <= CALLS_MAX:
                deaths.append(call)
                disk.troubles.die_in_calls = 2  # this one

        disk.before = die
        while not is_over():
            process = world.processes["b"]
            await world.until(lambda now=process: now.is_dead or is_over(), "it is dead, or serves")
            life.clear()
            if process.is_dead and cut_power:
                disk.cut_power()
            await world.until(
                lambda was=process: world.processes["b"] is not was or not was.is_dead, "it is started again"
            )
        disk.before = lambda name, path: None

    plan = make_plan(samples=300, standbys=("b", "c"), rules=WITNESSED, segment_bytes=4096, checkpoint_every=1)
    world = run(plan, tmp_path, script)
    assert {call[:2] for call in deaths} >= {
        *((name, "log") for name in ("write", "fsync", "fallocate", "rename", "fsync of a directory")),
        ("fsync of a directory", "root"),
    }
    assert reigns(world) == [(2, "b")], "one promotion, however often it was begun"
    assert is_whole(world, world.acks)
