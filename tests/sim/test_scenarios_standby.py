"""Servers that are lost, cut off, frozen or deposed while others stand by: who serves then, and what is kept."""

from pathlib import Path

import pytest
import trio
from sim.cluster import (
    ARRIVING_SECONDS,
    AWAY_SECONDS,
    BY_HAND,
    CONTINUING,
    LEASE_SECONDS,
    LOCAL,
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
from sim.logs import flip, record_headers, segments
from sim.scenario import Said, ScriptedWorld, make_plan, run

from hetero_async import serve
from hetero_async.core.records import Promoted
from hetero_async.core.replication import Durability
from hetero_async.core.server import Server
from hetero_async.formats.segment import RECORD_HEADER_BYTES
from hetero_async.sim.plan import SERVER, WITNESS


def is_level(machine: Server) -> bool:
    """Whether the standby has confirmed every record."""
    return machine.replication.standings["b"].confirmed == machine.state.lsn


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


@either_way
@pytest.mark.parametrize("how", ["its last record is damaged", "it is an older copy"])
def test_36_38_what_a_server_s_disk_has_lost_its_standby_has(tmp_path: Path, rules: Durability, how: str) -> None:
    """Its own log cannot tell that something is missing at its end, for what it lost looks as if it was never there."""

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        (segment,) = segments(world.log)
        older = segment.read_bytes()
        await trained(world)
        await world.until(lambda: is_level(world.serving.machine), "the standby has what the disk will lose")
        world.kill(SERVER)
        if how == "it is an older copy":
            segment.write_bytes(older)
        else:
            offset, _ = record_headers(segment)[-1]
            flip(segment, offset + RECORD_HEADER_BYTES)
        world.judge.disk_lost(SERVER)
        world.release(SERVER)
        await world.until(lambda: not world.serves[SERVER], "it does not serve from what it has left")
        await take_over(world)
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=rules), tmp_path, script)
    assert reigns(world) == [(2, "b")]
    assert is_whole(world, world.acks)
    assert not world.judge.forgiven


def test_41_a_disk_that_is_slower_than_the_lease_brings_nobody_to_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "INBOX_SIZE", 2)  # as if there were hundreds of workers

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.disk.troubles.slow_seconds = 2.5 * LEASE_SECONDS
        await trained(world)
        world.disk.troubles.slow_seconds = 0.0
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=WITNESSED), tmp_path, script)
    assert not reigns(world)
    assert {said.term for said in world.acks} == {1}
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
            waiting.append(world.serving.machine.post.held)
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
    assert reigns(world) == [(2 if rules.has_witness else 3, "b")], "by hand, each of three has every third term"
    assert not world.judge.forgiven


@pytest.mark.parametrize("merge", ["window", "per-push", "all"])
def test_10_a_lost_server_that_had_waited_for_nobody_takes_a_tail_with_it_that_is_named_and_trained_again(
    tmp_path: Path, merge: str
) -> None:
    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(*both_ways(SERVER, "b"))
        await trained(world, 3)
        if merge == "all":
            world.kill("w1")
            await world.until(lambda: world.state.pending, "a delta is in the log, and waits for one of w1")
            await trio.sleep(ARRIVING_SECONDS)
            world.release("w1")
        world.kill(SERVER)
        world.mend(*both_ways(SERVER, "b"))
        await world.operators["b"](False)
        assert not world.is_served_by("b"), "the operator is told first"
        await world.operators["b"](True)
        await world.until(lambda: world.is_served_by("b"), "b serves")
        await trained(world)

    world = run(make_plan(samples=300, standbys=("b",), rules=LOCAL, merge=merge), tmp_path, script)
    assert len(world.times("b", "promoted; against it: server cannot be asked: what it alone has written down")) == 1
    assert world.judge.forgiven, "acknowledged, and gone"
    assert reigns(world) == [(2, "b")]


def test_10_a_worker_that_stands_on_a_publish_of_the_lost_tail_does_not_take_it_for_its_successors(
    tmp_path: Path,
) -> None:
    """Both servers have made a publish of that number, and they are not the same."""
    lost: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.cut(*both_ways(SERVER, "b"))
        await trained(world, 3)
        lost.append(world.newest["w1"].target[0])
        world.kill(SERVER)
        world.cut(*both_ways("site1", "b"))
        await world.operators["b"](True)
        await world.until(lambda: world.is_served_by("b") and world.state.publish == lost[0], "b is as far")
        world.mend(*both_ways("site1", "b"))
        await trained(world)

    world = run(make_plan(sites=2, samples=300, standbys=("b",), rules=LOCAL), tmp_path, script)
    assert lost[0] > 1
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
    assert len(ends) == len({lsn for lsn, _ in ends}), "as far as both logs go they come to the same state"


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
        moments.append(trio.current_time())
        world.mend(*both_ways(SERVER, "b", "c", WITNESS, "site1"), *both_ways("site0", "b", "c"))
        await trained(world)

    world = run(make_plan(sites=2, samples=400, standbys=("b", "c"), rules=rules), tmp_path, script)
    assert not acks(world, SERVER, after=moments[0] - AWAY_SECONDS + ARRIVING_SECONDS)
    assert {said.node for said in acks(world, after=moments[1])} == {"b"}
    assert reigns(world) == [(2 if rules.has_witness else 3, "b")], "by hand, each of three has every third term"
    assert is_whole(world, world.acks)
