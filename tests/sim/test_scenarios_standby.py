"""Servers that are lost, cut off, frozen or deposed while others stand by: who serves then, and what is kept."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from sim.scenario import CALLS_MAX, NEVER, Said, ScriptedWorld, make_plan, run

from hetero_async.core.messages import Confirm, Redirect
from hetero_async.core.records import Delta, Promoted
from hetero_async.core.replication import Durability
from hetero_async.ports import Incoming
from hetero_async.sim.network import DialEnd
from hetero_async.sim.plan import SERVER, WITNESS
from hetero_async.sim.process import Process

LEASE_MS = 2000
LEASE_SECONDS = LEASE_MS / 1000
WITNESSED = Durability(durability="replicated", has_witness=True, lease_ms=LEASE_MS)
CONTINUING = replace(WITNESSED, when_alone="continue")
BY_HAND = Durability(durability="replicated", lease_ms=LEASE_MS)
LOCAL = Durability(durability="local", lease_ms=LEASE_MS)
# What was under way when a link was cut, or a peer died, may arrive for so long.
ARRIVING_SECONDS = 0.5
AWAY_SECONDS = 10.0
# Messages that wait for a standby: a worker repeats itself, and what is the same waits once.
WAITING_MAX = 40

either_way = pytest.mark.parametrize("rules", [WITNESSED, BY_HAND], ids=["witness", "operator"])


async def trained(world: ScriptedWorld, more: int = 2) -> None:
    """So many more deltas of w0 are acknowledged."""
    known = len(world.judge.account("w0").acknowledged)
    await world.until(
        lambda: len(world.judge.account("w0").acknowledged) >= known + more,
        f"{more} more deltas of w0 are acknowledged",
    )


async def take_over(world: ScriptedWorld, node: str = "b") -> None:
    """By itself, if there is a witness; by the operator's word otherwise."""
    if not world.plan.rules.has_witness:
        await world.operators[node](False)
    await world.until(lambda: world.is_served_by(node), f"{node} serves")


def both_ways(node: str, *others: str) -> list[tuple[str, str]]:
    return [way for other in others for way in ((node, other), (other, node))]


def acks(world: ScriptedWorld, node: str = "", after: float = 0.0, before: float = NEVER) -> list[Said]:
    return [said for said in world.acks if said.node == (node or said.node) and after <= said.at < before]


def reigns(world: ScriptedWorld) -> list[tuple[int, str]]:
    """Those that followed the first one, in the run's history."""
    return [
        (entry.term, entry.record.server) for _, entry in world.records(Promoted) if isinstance(entry.record, Promoted)
    ]


def is_whole(world: ScriptedWorld, said: list[Said]) -> bool:
    """Whether each of these acknowledgements is of a delta that is in the run's history."""
    admitted = {entry.lsn for _, entry in world.records(Delta)}
    return {one.lsn for one in said} <= admitted


@either_way
def test_06_a_server_that_was_frozen_while_another_took_over_says_no_word_and_stands_by(
    tmp_path: Path, rules: Durability
) -> None:
    thawed_at: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        frozen = world.processes[SERVER]
        frozen.freeze()
        await trio.sleep(AWAY_SECONDS)
        await take_over(world)
        thawed_at.append(trio.current_time())
        frozen.thaw()
        await world.until(lambda: world.lives(SERVER) == 2, "it ends")
        assert not world.serves[SERVER], "it was deposed, and no other failure"
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=rules), tmp_path, script)
    (_, promoted), *_ = world.records(Promoted)
    assert {said.lsn < promoted.lsn for said in acks(world, SERVER)} == {True}, "at most what b had confirmed"
    assert not acks(world, SERVER, after=thawed_at[0] + ARRIVING_SECONDS)
    assert {said.term for said in acks(world, "b")} == {2}
    assert reigns(world) == [(2, "b")]
    assert is_whole(world, world.acks)


@pytest.mark.parametrize("rules", [WITNESSED, BY_HAND, LOCAL], ids=["witness", "operator", "local"])
@pytest.mark.parametrize("how", ["killed", "frozen", "loses power"])
def test_07_08_without_its_standby_a_server_waits_or_does_not_as_the_run_has_it(
    tmp_path: Path, rules: Durability, how: str
) -> None:
    moments: list[float] = []
    waiting: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        standby = world.processes["b"]
        match how:
            case "killed":
                world.kill("b")
            case "loses power":
                world.cut_power("b")
            case "frozen":
                standby.freeze()
        moments.append(trio.current_time())
        for _ in range(int(AWAY_SECONDS)):
            await trio.sleep(1)
            waiting.append(len(world.serving.machine._post._held))
        moments.append(trio.current_time())
        told = world.serving.status()["state"]
        assert ("no standby is in reach to confirm" in told) == (rules.durability == "replicated")
        standby.thaw()
        world.release("b")
        await trained(world)
        lsn = len(world.noted.entries)
        await world.until(lambda: world.serving.machine.replication.standings["b"].confirmed >= lsn, "b has caught up")

    world = run(make_plan(samples=300, standbys=("b",), rules=rules), tmp_path, script)
    quiet = acks(world, after=moments[0] + ARRIVING_SECONDS, before=moments[1])
    assert bool(quiet) == (rules.durability == "local")
    assert max(waiting) <= WAITING_MAX
    assert not reigns(world), "nobody takes over from a server that lives"
    assert is_whole(world, world.acks)


@either_way
@pytest.mark.parametrize("cut_power", [False, True], ids=["killed", "power"])
def test_10_a_lost_site_is_replaced_and_all_that_was_acknowledged_is_there(
    tmp_path: Path, rules: Durability, cut_power: bool
) -> None:
    lost: list[Said] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        lost.extend(world.acks)
        world.kill("w1", SERVER)
        if cut_power:
            world.disk.cut_power()
        await trio.sleep(AWAY_SECONDS)
        await take_over(world)
        await trained(world, 3)  # with c alone to confirm
        assert {said.node for said in acks(world, after=trio.current_time() - 1)} <= {"b"}

    world = run(make_plan(sites=2, samples=300, standbys=("b", "c"), rules=rules), tmp_path, script)
    assert {said.node for said in lost} == {SERVER}
    assert is_whole(world, world.acks)
    assert reigns(world) == [(2, "b")]
    assert not world.judge.forgiven


def test_10_a_lost_server_that_had_waited_for_nobody_takes_a_tail_with_it_that_is_named_and_trained_again(
    tmp_path: Path,
) -> None:
    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(*both_ways(SERVER, "b"))
        await trained(world, 3)
        world.kill(SERVER)
        world.mend(*both_ways(SERVER, "b"))
        await world.operators["b"](False)
        assert not world.is_served_by("b"), "the operator is told first"
        await world.operators["b"](True)
        await world.until(lambda: world.is_served_by("b"), "b serves")
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=LOCAL), tmp_path, script)
    assert len(world.times("b", "promoted; against it: server cannot be asked: what it alone has written down")) == 1
    assert world.judge.forgiven, "acknowledged, and gone"
    assert reigns(world) == [(2, "b")]


@either_way
@pytest.mark.parametrize("cut_power", [False, True], ids=["killed", "power"])
def test_11_a_server_and_its_standby_come_back_to_the_same_state_and_the_same_reign(
    tmp_path: Path, rules: Durability, cut_power: bool
) -> None:
    lsns: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world, 3)
        world.kill(SERVER, "b")
        lsns.append(max(said.lsn for said in world.acks))
        if cut_power:
            world.disks[SERVER].cut_power()
            world.disks["b"].cut_power()
        await trio.sleep(AWAY_SECONDS)
        world.release(SERVER, "b")
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=rules), tmp_path, script)
    back = {node: recoveries[1] for node, recoveries in world.noted.recoveries.items()}
    assert min(lsn for lsn, _, _ in back.values()) >= lsns[0]
    assert {said.term for said in world.acks} == {1}
    assert not reigns(world)
    ends = {(lsn, digest) for (lsn, _, digest) in (recoveries[-1] for recoveries in world.noted.recoveries.values())}
    assert len(ends) == 1, "both logs end with the same state"


@pytest.mark.parametrize("way", [(SERVER, "b"), ("b", SERVER)], ids=["there", "back"])
@either_way
def test_14_across_a_link_that_carries_one_way_only_nothing_is_acknowledged_and_nobody_else_serves(
    tmp_path: Path, rules: Durability, way: tuple[str, str]
) -> None:
    moments: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(way)
        moments.append(trio.current_time())
        await trio.sleep(AWAY_SECONDS)
        moments.append(trio.current_time())
        world.mend(way)
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=rules), tmp_path, script)
    assert not acks(world, after=moments[0] + ARRIVING_SECONDS, before=moments[1])
    assert acks(world, SERVER, after=moments[1])
    assert not reigns(world)


@pytest.mark.parametrize("rules", [WITNESSED, CONTINUING], ids=["wait", "continue"])
def test_15_of_two_that_only_the_witness_can_reach_one_reigns(tmp_path: Path, rules: Durability) -> None:
    moments: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(*both_ways(SERVER, "b"))
        moments.append(trio.current_time())
        await trio.sleep(AWAY_SECONDS)
        moments.append(trio.current_time())
        if rules is CONTINUING:
            world.kill(SERVER, seconds=AWAY_SECONDS)  # b must not serve: it lacks what was acknowledged since
            await trio.sleep(AWAY_SECONDS)
        world.mend(*both_ways(SERVER, "b"))
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=rules), tmp_path, script)
    alone = acks(world, after=moments[0] + 2 * LEASE_SECONDS, before=moments[1])
    assert bool(alone) == (rules is CONTINUING)
    assert not reigns(world)
    assert is_whole(world, world.acks)


def test_16_a_server_that_cannot_reach_the_witness_serves_on_while_its_standby_confirms(tmp_path: Path) -> None:
    moments: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(*both_ways(SERVER, WITNESS))
        await trio.sleep(2 * LEASE_SECONDS)
        moments.append(trio.current_time())
        await trained(world, 3)
        moments.append(trio.current_time())
        assert world.times(SERVER, "witness away")
        world.mend(*both_ways(SERVER, WITNESS))
        await world.until(lambda: world.times(SERVER, "witness reached"), "the witness answers again")

    world = run(make_plan(samples=300, standbys=("b",), rules=WITNESSED), tmp_path, script)
    assert acks(world, SERVER, *moments)
    assert not reigns(world)


@either_way
def test_17_a_deposed_server_that_still_has_half_of_the_workers_acknowledges_nothing_to_them(
    tmp_path: Path, rules: Durability
) -> None:
    moments: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(*both_ways(SERVER, "b", "c", WITNESS, "site1"), *both_ways("site0", "b", "c"))
        await trio.sleep(AWAY_SECONDS)
        await take_over(world)
        moments.append(trio.current_time())
        known = len(world.judge.account("w1").acknowledged)
        await world.until(lambda: len(world.judge.account("w1").acknowledged) > known + 2, "w1 trains with b")
        assert world.network.dialling[b"w0"].server.worker == SERVER, "w0 is with the old one still"
        moments.append(trio.current_time())
        world.mend(*both_ways(SERVER, "b", "c", WITNESS, "site1"), *both_ways("site0", "b", "c"))
        await trained(world)

    world = run(make_plan(sites=2, samples=400, standbys=("b", "c"), rules=rules), tmp_path, script)
    assert not acks(world, SERVER, after=moments[0] - AWAY_SECONDS + ARRIVING_SECONDS)
    assert {said.node for said in acks(world, after=moments[1])} == {"b"}
    assert reigns(world) == [(2, "b")]
    assert is_whole(world, world.acks)


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

        def die(name: str, path: str) -> None:
            place = next((part for part in ("log", "checkpoints") if f"/b/{part}" in path), "root")
            life[name, place] += 1
            call = (name, place, life[name, place])
            if not disk.troubles.die_in_calls and call not in deaths and call[2] <= CALLS_MAX:
                deaths.append(call)
                disk.troubles.die_in_calls = 2  # this one

        disk.before = die
        while not acks(world, "b"):
            process = world.processes["b"]
            await world.until(lambda now=process: now.is_dead or acks(world, "b"), "it is dead, or serves")
            life.clear()
            if process.is_dead and cut_power:
                disk.cut_power()
            await world.until(
                lambda was=process: world.processes["b"] is not was or not was.is_dead, "it is started again"
            )
        disk.before = lambda name, path: None

    plan = make_plan(samples=300, standbys=("b", "c"), rules=WITNESSED, segment_bytes=4096, checkpoint_every=1)
    world = run(plan, tmp_path, script)
    assert len(deaths) >= 10
    assert reigns(world) == [(2, "b")], "one promotion, however often it was begun"
    assert is_whole(world, world.acks)
