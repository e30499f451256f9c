"""Standbys that are slow, promoted at once, lied about, or die while they take over."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from sim.cluster import (
    ARRIVING_SECONDS,
    AWAY_SECONDS,
    BY_HAND,
    LEASE_SECONDS,
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

from hetero_async.core.messages import (
    SNAPSHOT,
    Chunk,
    Confirm,
    Fence,
    Message,
    Redirect,
    SettingsRequest,
    StatusRequest,
    Wait,
    Want,
)
from hetero_async.core.replication import Durability
from hetero_async.formats import frames
from hetero_async.ports import Incoming, Lane, Peer
from hetero_async.sim.network import BULK_LANE, DialEnd, Letter
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


class Overheard(ScriptedWorld):
    """Notes who has said anything at all in which term, on either lane, and whether its promotion was durable then."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.overheard: list[tuple[str, int, bool]] = []
        super().__init__(*arguments, **more)

    def sending(self, node: str, peer: Peer, term: int, message: Message) -> None:
        self.overheard.append((node, term, term < 2 or (term, node) in reigns(self)))
        super().sending(node, peer, term, message)


@either_way
def test_69_a_new_term_is_in_the_log_before_anybody_hears_a_word_in_it(tmp_path: Path, rules: Durability) -> None:
    heard: dict[str, list[Incoming]] = {"standby": [], "worker": []}

    async def ask(world: ScriptedWorld, role: str, *questions: Message) -> None:
        end = DialEnd(world.network, Process("c", "site0"), ["b"], role=role, key=f"asks as {role}".encode())

        async def hear(lane: Lane) -> None:
            while True:
                heard[role].append(await lane.receive())

        async with trio.open_nursery() as nursery:
            for task in (end.run, partial(hear, end.control), partial(hear, end.bulk)):
                nursery.start_soon(task)
            while True:
                for question in questions:
                    lane = end.bulk if isinstance(question, Want) else end.control
                    await lane.send(b"b", question)
                await trio.sleep(0.5)

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.kill(SERVER)
        await trio.sleep(1)
        world.disks["b"].troubles.slow_seconds = 8.0
        await take_over(world)
        assert not reigns(world), "the disk is at it"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, world, "standby", StatusRequest(), Fence(term=0), SettingsRequest())
            nursery.start_soon(ask, world, "worker", Want(kind=SNAPSHOT, number=world.state.publish, first=0, count=1))
            await world.until(lambda: reigns(world), "its promotion is durable")
            world.disks["b"].troubles.slow_seconds = 0.0
            world.release(SERVER)
            await world.until(lambda: all(heard.values()), "both have an answer")
            nursery.cancel_scope.cancel()
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=rules), tmp_path, script, build=Overheard)
    assert isinstance(world, Overheard)
    assert {(node, term) for node, term, _ in world.overheard} >= {("b", 2)}
    assert [said for said in world.overheard if not said[2]] == []
    assert reigns(world) == [(2, "b")]


def test_10_without_a_witness_a_standby_never_serves_of_its_own_accord(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        await trio.sleep(ARRIVING_SECONDS)
        world.kill(SERVER)
        died_at = trio.current_time()

        def knows_of_none() -> list[float]:
            """When b said so to workers."""
            said = [at for worker in ("w0", "w1") for at, _ in world.answers(worker, Wait)]
            return [at for at in said if at > died_at + LEASE_SECONDS]

        await world.until(lambda: len(knows_of_none()) >= 20, "b has told 20 times that there is no server")
        assert max(knows_of_none()) > died_at + 5 * LEASE_SECONDS
        assert not world.is_served_by("b") and not world.times("b", "takes over") and not reigns(world)
        assert not acks(world, after=died_at)
        await take_over(world)
        world.release(SERVER)
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=BY_HAND), tmp_path, script)
    assert reigns(world) == [(2, "b")]


class Haunted(ScriptedWorld):
    """Before each chunk of term 3 one of term 1 arrives, with other bytes."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.ghosts = Counter[str]()
        super().__init__(*arguments, **more)

    def sending(self, node: str, peer: Peer, term: int, message: Message) -> None:
        if isinstance(message, Chunk) and term == 3:
            self.ghosts[peer.worker] += 1
            ghost = frames.encode(replace(message, total_hash=bytes(16)))
            self.network.dialling[peer.key].arrive(BULK_LANE, Letter(1, ghost, bytes(1000)))
        super().sending(node, peer, term, message)


def test_17_chunks_of_a_term_that_is_over_are_taken_by_no_worker_and_no_standby(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.kill(SERVER)
        await trio.sleep(1)
        await take_over(world)
        await trained(world, 4)

    world = run(make_plan(samples=300, standbys=("b", "c"), rules=BY_HAND), tmp_path, script, build=Haunted)
    assert isinstance(world, Haunted)
    assert min(world.ghosts["w0"], world.ghosts["c"]) >= 4, (
        "and a message that cannot be understood would break the run"
    )


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
            waiting.append(world.serving.machine.post.held)
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
    assert reigns(world) == [(3, "b")]


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
