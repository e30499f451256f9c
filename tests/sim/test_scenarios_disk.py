"""Disks that lose power, memory that flips bits, a log cut short by a crash: found, or made good."""

from pathlib import Path

import pytest
import torch
import trio
from sim.logs import copy_of, segments, start_and_halt, start_on, train_and_stop
from sim.scenario import ScriptedWorld, die_at_every_call, make_plan, run

from hetero_async.core.records import Beacon, Entry, Stepped
from hetero_async.errors import LogCorrupt
from hetero_async.looking import verify_directory
from hetero_async.sim.plan import SERVER
from hetero_async.sim.watched import WatchedModel

# The server dies at the n-th such call of a truncation.
TRUNCATION_CALLS = (("unlink", 1), ("unlink", 2), ("unlink", 3), ("fsync of a directory", 1))


def test_33_a_server_that_loses_its_power_at_every_disk_call_keeps_all_it_acknowledged(tmp_path: Path) -> None:
    deaths: list[tuple[str, str, int]] = []

    async def script(world: ScriptedWorld) -> None:
        deaths.extend(await die_at_every_call(world, cut_power=True))

    world = run(make_plan(samples=600, checkpoint_every=1, segment_bytes=4096), tmp_path, script)
    assert len(deaths) >= 30
    assert all(lsn >= settled for lsn, settled, _ in world.noted.recoveries[SERVER])
    assert ("fsync", "log", 6) in deaths, "many an append has been interrupted between write and fdatasync"


class Undecided(WatchedModel):
    """A mutant: what a step comes to depends on how often it was asked."""

    asked = 0

    def apply(self, entry: Entry) -> None:
        super().apply(entry)
        if isinstance(entry.record, Stepped):
            Undecided.asked += 1
            self.theta[0] += 1e-6 * Undecided.asked


def test_42_a_step_that_comes_out_differently_is_found_at_the_next_start(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await train_and_stop(world, 4)
        await start_and_halt(world)

    world = run(make_plan(), tmp_path, script, make_model=Undecided)
    stepped = world.records(Stepped)[0][1].lsn
    beacon = next(entry.lsn for _, entry in world.records(Beacon) if entry.lsn > stepped)
    assert world.halt == f"record {beacon}: the parameters differ from those that were logged"


@pytest.mark.parametrize("part", ["parameters", "momentum", "state"])
def test_42_a_bit_that_flips_in_memory_is_found_at_the_next_start(tmp_path: Path, part: str) -> None:
    flipped_at: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w0")) == 3, "w0 has trained a while")
        model = world.serving.model
        if part == "state":
            world.state.members["w0"].samples ^= 1 << 4
        else:
            vector = model.theta if part == "parameters" else model.momenta[0]
            vector.view(torch.int32)[5] ^= 1 << 20
        flipped_at.append(world.state.lsn)
        await train_and_stop(world, 5)
        with pytest.raises(LogCorrupt, match=r"parameters differ|is not the one that was logged"):
            verify_directory(world.log, lambda _: None)
        await start_and_halt(world)

    world = run(make_plan(), tmp_path, script)
    beacon = next(entry.lsn for _, entry in world.records(Beacon) if entry.lsn > flipped_at[0])
    why = ": the parameters differ from those that were logged"
    if part == "state":
        why = f" (Beacon) cannot be: the state before record {beacon} is not the one that was logged"
    assert world.halt == f"record {beacon}{why}"


def test_42_a_bit_that_flipped_before_a_checkpoint_is_found_by_verify(tmp_path: Path) -> None:
    """The checkpoint holds the flipped bit, and agrees with itself: only an earlier one or the whole log can tell."""
    halts: list[str] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w0")) == 3, "w0 has trained a while")
        world.serving.model.theta.view(torch.int32)[5] ^= 1 << 20
        flipped_at = world.state.lsn
        checkpoints = world.disk.root / "checkpoints"
        await world.until(
            lambda: any(int(path.name) > flipped_at for path in checkpoints.glob("[0-9]*")), "there is a new checkpoint"
        )
        world.kill(SERVER)
        with pytest.raises(LogCorrupt) as halted:
            verify_directory(world.log, lambda _: None)
        beacon = next(entry.lsn for _, entry in world.records(Beacon) if entry.lsn > flipped_at)
        halts.extend([str(halted.value), f"record {beacon}: the parameters differ from those that were logged"])
        world.stop()

    run(make_plan(checkpoint_every=2, keep_log=True), tmp_path, script)
    assert halts[0] == halts[1]


@pytest.mark.parametrize("cut_power", [False, True])
def test_69_a_crash_while_the_log_is_truncated_leaves_no_gap_and_the_rest_goes_later(
    tmp_path: Path, cut_power: bool
) -> None:
    deaths: list[tuple[str, int, int]] = []

    async def script(world: ScriptedWorld) -> None:
        for call, number in TRUNCATION_CALLS:
            unlinked = seen = 0

            def die(name: str, path: str, call: str = call, number: int = number) -> None:
                nonlocal seen, unlinked
                unlinked += name == "unlink" and path.endswith(".log")
                if name == call and unlinked:
                    seen += 1
                    if seen == number:
                        world.disk.troubles.die_in_calls = 2

            world.disk.before = die
            await world.until(lambda: world.is_served_by(SERVER), "it serves")
            process = world.processes[SERVER]
            await world.until(lambda now=process: now.is_dead, f"it dies at {call}")
            world.disk.before = lambda name, path: None
            world.hold(SERVER, seconds=1)
            await trio.sleep(0.1)
            if cut_power:
                world.disk.cut_power()
            left = segments(world.log)
            first_lsn = int(left[0].stem)
            assert start_on(copy_of(world.log), first_lsn - 1) >= len(world.noted.entries)
            deaths.append((call, number, first_lsn))
            await world.until(lambda was=left[0]: not was.exists(), "the rest is deleted")

    world = run(make_plan(samples=500, segment_bytes=512, checkpoint_every=2), tmp_path, script)
    assert [(call, number) for call, number, _ in deaths] == list(TRUNCATION_CALLS)
    first_lsns = [first_lsn for _, _, first_lsn in deaths]
    assert first_lsns == sorted({*first_lsns}), "each time less of the log is left"
    assert int(segments(world.log)[0].stem) > first_lsns[-1]
